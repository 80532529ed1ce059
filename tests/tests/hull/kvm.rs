//! Machine kind `kvm`: what only it has, and how it breaks down.

use std::time::Duration;

use hull_tests::{Container, Hull, eventually, guest_files, left_out, no_kvm};

/// A test directory whose machines are of this kind; `None`, with the reason noted, where they
/// cannot be.
fn with_kvm() -> Option<Hull> {
    match no_kvm() {
        None => Some(Hull::on("kvm")),
        Some(reason) => {
            left_out(&reason);
            None
        }
    }
}

/// Memory of the machine process on the host, MiB.
fn memory_of(container: &Container<'_>) -> u64 {
    let pid = container.host_process("machine").as_raw_nonzero();
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() >> 10
}

#[test]
fn a_machine_is_one_process_beside_the_sandbox_process() {
    let Some(hull) = with_kvm() else { return };
    let container = hull.sleeper();
    let inspected = container.inspect();
    assert_eq!(inspected["Hull"]["machine"], "kvm");
    assert_eq!(inspected["Hull"]["processes"]["devices"], 0);
    assert_ne!(inspected["Hull"]["processes"]["machine"], 0);
}

#[test]
fn a_container_has_the_processors_that_it_asks_for() {
    let Some(hull) = with_kvm() else { return };
    let script = "nproc; grep -c ^processor /proc/cpuinfo; \
                  cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    let found = hull.sh(&["--cpus", "2"], script).ok().text();
    let found: Vec<_> = found.lines().collect();
    assert_eq!(found[..2], ["2", "2"], "{found:?}");
    assert!(["kvm-clock", "tsc"].contains(&found[2]), "{found:?}");
    // All of them compute: each counts on a processor of its own.
    let script = "for cpu in 0 1; do (taskset -c $cpu sh -c 'i=0; while [ $i -lt 2000 ]; do \
                  i=$((i+1)); done; echo done') & done; wait";
    let found = hull.sh(&["--cpus", "2"], script).ok().text();
    assert_eq!(found.lines().count(), 2, "{found}");
}

#[test]
fn machines_small_and_large_boot_with_the_memory_and_processors_asked_for() {
    let Some(hull) = with_kvm() else { return };
    // The largest one has memory above the devices, too.
    for (memory, cpus, mib) in [("16m", "1", 16), ("4g", "2", 4096)] {
        let script = "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        let found = hull.sh(&["-m", memory, "--cpus", cpus], script).ok().text();
        let found: Vec<_> = found.lines().collect();
        assert_eq!(found[0], cpus, "{memory}");
        let total = found[1].parse::<u64>().unwrap() >> 10;
        assert!(total > mib * 9 / 10, "{memory}: {total} MiB");
    }
}

#[test]
fn guests_have_no_virtualization_and_no_performance_counters() {
    let Some(hull) = with_kvm() else { return };
    let flags = hull.sh(&[], "grep ^flags /proc/cpuinfo").ok().text();
    for absent in ["vmx", "svm", "monitor", "arch_perfmon"] {
        assert!(
            !flags.split_whitespace().any(|flag| flag == absent),
            "{flags}"
        );
    }
    assert!(flags.contains("hypervisor"), "{flags}");
    let name = hull.sh(&[], "grep '^model name' /proc/cpuinfo").ok().text();
    let host = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(host.contains(&name), "{name}");
}

#[test]
fn memory_that_a_container_frees_goes_back_to_the_host() {
    let Some(hull) = with_kvm() else { return };
    let options = ["-m", "300m", "--shm-size", "250m"];
    let container = hull.start(&options, &["sleep", "1000"]);
    let before = memory_of(&container);
    let fill = "dd if=/dev/zero of=/dev/shm/x bs=1M count=200 2>/dev/null";
    container.sh(fill).ok();
    let full = memory_of(&container);
    assert!(full >= before + 190, "{before} {full}");
    container.sh("rm /dev/shm/x").ok();
    let back = Duration::from_secs(10);
    eventually("what was freed is given back", back, || {
        memory_of(&container) < before + 20
    });
}

#[test]
fn a_kernel_that_cannot_be_booted_is_named_with_the_reason() {
    let Some(hull) = with_kvm() else { return };
    let kernel = std::fs::read(guest_files().join("kernel-x86_64")).unwrap();
    let short = &kernel[..1 << 20];
    let mut foreign = kernel.clone();
    // Its entry: the note's type is another one.
    let name = foreign.windows(4).position(|bytes| bytes == b"Xen\0");
    let mut at = name.expect("a note");
    while foreign[at - 4..at] != 18u32.to_le_bytes() {
        let next = foreign[at + 1..]
            .windows(4)
            .position(|bytes| bytes == b"Xen\0");
        at += 1 + next.expect("the note of the entry");
    }
    foreign[at - 4] = 99;
    for (content, why) in [
        (short, "its notes are beyond its end"),
        (&foreign, "it has no PVH entry (CONFIG_PVH)"),
    ] {
        let file = hull.scratch().join("kernel");
        std::fs::write(&file, content).unwrap();
        let output = hull.run(&["--kernel", file.to_str().unwrap()], &["true"]);
        output.fails(125, &[&format!("cannot boot the guest kernel: {why}")]);
        hull.assert_clean();
    }
}

#[test]
fn a_guest_that_floods_its_console_harms_nothing() {
    let Some(hull) = with_kvm() else { return };
    let container = hull.start(&["--cap-add", "ALL"], &["sleep", "1000"]);
    let flood = "mkdir /p && mount -t proc proc /p && echo 9 >/p/sys/kernel/printk; \
                 i=0; while [ $i -lt 300 ]; do echo 'much to say, again and again' >/dev/kmsg; \
                 i=$((i+1)); done; echo flooded";
    let output = container.sh(flood);
    // Whether a container may write there is its rights' affair.
    assert!(output.text().contains("flooded") || output.status != 0);
    assert_eq!(container.sh("echo alive").ok().text(), "alive");
    let console = container.inspect()["Hull"]["files"]["console"].clone();
    let size = std::fs::metadata(console.as_str().unwrap()).unwrap().len();
    assert!(size <= 64 << 10, "{size}");
}
