//! Files as kernels write them.
#![allow(clippy::unwrap_used)]

use super::*;

const CPU_STAT: &str = "\
usage_usec 8361251
user_usec 6128340
system_usec 2232911
nice_usec 0
core_sched.force_idle_usec 0
nr_periods 318
nr_throttled 42
throttled_usec 2713406
nr_bursts 0
burst_usec 0
";

const MEMORY_STAT: &str = "\
anon 21090304
file 35205120
kernel 2945024
kernel_stack 98304
pagetables 348160
sec_pagetables 0
percpu 1440
sock 4096
vmalloc 0
shmem 1052672
zswap 0
zswapped 0
file_mapped 9072640
file_dirty 270336
file_writeback 0
swapcached 0
anon_thp 2097152
file_thp 0
shmem_thp 0
inactive_anon 22069248
active_anon 53248
inactive_file 13037568
active_file 21114880
unevictable 0
slab_reclaimable 1908912
slab_unreclaimable 436512
slab 2345424
workingset_refault_anon 3
workingset_refault_file 120
workingset_activate_anon 1
workingset_activate_file 40
workingset_restore_anon 0
workingset_restore_file 0
workingset_nodereclaim 0
pgdemote_kswapd 0
pgscan 5120
pgsteal 4096
pgscan_kswapd 5120
pgscan_direct 0
pgsteal_kswapd 4096
pgsteal_direct 0
pgfault 60421
pgmajfault 118
pgrefill 7
pgactivate 5161
pgdeactivate 9
pglazyfree 11
pglazyfreed 2
thp_fault_alloc 1
thp_collapse_alloc 0
";

const NET_DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  eth0: 1296342     912    1    2    0     0          0         3   712345     640    4    5    0     0       0          0
  eth1:0      0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
";

const PRESSURE: &str = "\
some avg10=1.53 avg60=0.87 avg300=0.22 total=1327043
full avg10=0.00 avg60=0.10 avg300=0.04 total=402331
";

#[test]
fn cpu_time_and_throttling() {
    let cpu = parse_cpu(CPU_STAT);
    assert_eq!(cpu.usage_ns, 8_361_251_000);
    assert_eq!((cpu.user_ns, cpu.system_ns), (6_128_340_000, 2_232_911_000));
    assert_eq!((cpu.periods, cpu.throttled_periods), (Some(318), Some(42)));
    assert_eq!(cpu.throttled_ns, Some(2_713_406_000));
    // Without the controller there is usage only.
    assert_eq!(parse_cpu("usage_usec 1\nuser_usec 1\n").periods, None);
}

#[test]
fn memory_counters() {
    let memory = memory::parse_stat(MEMORY_STAT);
    assert_eq!((memory.anon, memory.file), (21_090_304, 35_205_120));
    assert_eq!(memory.inactive_file, 13_037_568);
    assert_eq!((memory.slab, memory.sock), (2_345_424, 4096));
    assert_eq!((memory.pgfault, memory.pgmajfault), (60_421, 118));
    assert_eq!((memory.pgscan, memory.pgsteal), (5120, 4096));
    assert_eq!(memory.workingset_refault, 123);
    assert_eq!(memory.workingset_activate, 41);
    assert_eq!((memory.pglazyfree, memory.thp_fault_alloc), (11, 1));
}

#[test]
fn memory_of_the_guest() {
    let text =
        "MemTotal:         248320 kB\nMemFree:          101004 kB\nMemAvailable:     180224 kB\n";
    assert_eq!(memory::guest(text), (248_320 * 1024, 180_224 * 1024));
    assert_eq!(memory::guest(""), (0, 0));
}

#[test]
fn devices_of_a_group() {
    let text = "\
254:0 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0
254:16 rbytes=90430464 wbytes=299008000 rios=8950 wios=1252 dbytes=50331648 dios=3021
7:0
none
";
    let devices = parse_io(text);
    assert_eq!(devices.len(), 2);
    assert_eq!((devices[1].major, devices[1].minor), (254, 16));
    assert_eq!(devices[0].read_bytes, 1_459_200);
    assert_eq!(devices[0].write_bytes, 314_773_504);
    assert_eq!((devices[1].reads, devices[1].writes), (8950, 1252));
    let many: String = (0..200)
        .map(|minor| format!("254:{minor} rbytes=1\n"))
        .collect();
    assert_eq!(parse_io(&many).len(), MAX_IO_DEVICES);
}

#[test]
fn pressure_has_two_lines() {
    let pressure = parse_pressure(PRESSURE);
    let some: &PressureLine = &pressure.some;
    assert_eq!((some.avg10, some.avg60, some.avg300), (153, 87, 22));
    assert_eq!(some.total_ns, 1_327_043_000);
    assert_eq!(pressure.full.total_ns, 402_331_000);
    assert_eq!((pressure.full.avg10, pressure.full.avg60), (0, 10));
    assert_eq!(hundredths("100.00"), 10_000);
    assert!(parse_pressure("").some.is_none());
}

#[test]
fn interfaces_without_loopback() {
    let interfaces = network::parse(NET_DEV);
    assert_eq!(interfaces.len(), 2);
    let eth0 = &interfaces[0];
    assert_eq!(eth0.name, "eth0");
    assert_eq!((eth0.receive_bytes, eth0.receive_packets), (1_296_342, 912));
    assert_eq!((eth0.receive_errors, eth0.receive_dropped), (1, 2));
    assert_eq!((eth0.transmit_bytes, eth0.transmit_packets), (712_345, 640));
    assert_eq!((eth0.transmit_errors, eth0.transmit_dropped), (4, 5));
}

#[test]
fn huge_pages_are_named_as_control_groups_name_them() {
    assert_eq!(page_size_name("hugepages-2048kB").unwrap(), "2MB");
    assert_eq!(page_size_name("hugepages-1048576kB").unwrap(), "1GB");
    assert_eq!(page_size_name("hugepages-64kB").unwrap(), "64KB");
    assert_eq!(page_size_name("x"), None);
}

/// A directory with the files of a group.
fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

#[test]
fn a_group_with_all_controllers() {
    let directory = group(&[
        ("cpu.stat", CPU_STAT),
        ("cpu.pressure", PRESSURE),
        ("memory.stat", MEMORY_STAT),
        ("memory.current", "59768832\n"),
        ("memory.max", "134217728\n"),
        ("memory.peak", "61000000\n"),
        ("memory.swap.current", "4096\n"),
        ("memory.swap.max", "max\n"),
        (
            "memory.events",
            "low 0\nhigh 1\nmax 20\noom 3\noom_kill 2\noom_group_kill 0\n",
        ),
        ("memory.pressure", PRESSURE),
        ("pids.current", "7\n"),
        ("pids.max", "max\n"),
        (
            "io.stat",
            "254:0 rbytes=10 wbytes=1 rios=1 wios=1\n254:16 rbytes=5 wbytes=2\n",
        ),
        ("io.pressure", PRESSURE),
    ]);
    let stats = read(directory.path(), std::process::id());
    assert_eq!(stats.memory.usage, 59_768_832);
    assert_eq!(stats.memory.limit, Some(134_217_728));
    assert_eq!(stats.memory.swap_usage, Some(4096));
    assert_eq!(stats.memory.swap_limit, None);
    assert_eq!((stats.memory.max_events, stats.memory.oom_kills), (20, 2));
    assert_eq!((stats.pids.current, stats.pids.limit), (7, None));
    assert!(stats.io.pressure.full.is_some() && stats.memory.pressure.some.is_some());
    assert!(stats.hugetlb.is_empty());
    assert!(stats.time_ns > 1_600_000_000_000_000_000);
    // For older hosts.
    assert_eq!(
        (stats.cpu_usage_us, stats.cpu_throttled_us),
        (8_361_251, 2_713_406)
    );
    assert_eq!((stats.memory_limit, stats.oom_kills), (134_217_728, 2));
    assert_eq!((stats.pids_current, stats.pids_limit), (7, 0));
    assert_eq!((stats.io_read_bytes, stats.io_write_bytes), (15, 3));
}

#[test]
fn a_group_without_files_has_no_metrics() {
    let empty = tempfile::tempdir().unwrap();
    let stats = read(empty.path(), 0);
    assert!(stats.cpu.is_none() && stats.memory.is_none());
    assert!(stats.pids.is_none() && stats.io.is_none());
    assert_eq!(stats.memory_usage, 0);
}

#[test]
fn a_file_longer_than_the_buffer_is_cut_at_a_line() {
    let long: String = (0..2000).map(|n| format!("key{n} {n}\n")).collect();
    let directory = group(&[("long", &long)]);
    let opened = open_directory(directory.path()).unwrap();
    let mut files = Files::new();
    let text = files.read_all(opened.as_fd(), "long").unwrap();
    assert!(text.ends_with('\n') && long.starts_with(text) && text.len() > 8000);
}
