//! What the host processes of a machine may do to the host, read from the running processes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::StatVfsMountFlags;

use hull_tests::{
    Container, Hull, Options, busybox_archive, cgroup, descendants, eventually, left_out,
    on_every_machine,
};

on_every_machine!(
    processes_are_confined_as_documented,
    what_a_guest_can_reach_is_listed_with_the_threads_that_serve_it,
    a_guest_keeps_its_programs_from_its_kernel,
    machine_and_devices_are_in_a_control_group_with_limits,
    a_control_group_goes_with_its_sandbox_whatever_is_killed,
    a_read_only_root_is_read_only_for_the_device_process,
    directories_of_a_device_process_lead_nowhere_else,
);

/// The rows of the tables in docs/security.md about this process, one cell for each column: those
/// of the first table, then those of the second.
fn documented(process: &str) -> Vec<String> {
    let page = fs::read_to_string(hull_tests::repository().join("docs/security.md")).unwrap();
    let rows = page
        .lines()
        .filter(|line| line.starts_with(&format!("| `{process}` |")));
    let cells = rows.flat_map(|row| row.trim_matches('|').split('|').skip(1));
    cells
        .map(|cell| cell.trim().trim_matches('`').to_owned())
        .collect()
}

/// Names of the capabilities in a set, as in linux/capability.h.
fn capabilities(set: &str) -> String {
    const NAMES: [(u32, &str); 14] = [
        (0, "chown"),
        (1, "dac_override"),
        (3, "fowner"),
        (4, "fsetid"),
        (5, "kill"),
        (27, "mknod"),
        (12, "net_admin"),
        (13, "net_raw"),
        (31, "setfcap"),
        (6, "setgid"),
        (7, "setuid"),
        (21, "sys_admin"),
        (23, "sys_nice"),
        (19, "sys_ptrace"),
    ];
    let mut set = u64::from_str_radix(set, 16).unwrap();
    let mut found = Vec::new();
    for (number, name) in NAMES {
        if set & (1 << number) != 0 {
            found.push(name);
            set &= !(1 << number);
        }
    }
    assert_eq!(set, 0, "further capabilities");
    match &found[..] {
        [] => "none".to_owned(),
        found => found.join(" "),
    }
}

/// Of the threads of kind `kvm`'s process, those of the fs device have the device process's
/// capabilities, and the others none.
fn only_the_fs_device_has_capabilities(pid: i32) {
    let documented = &documented("devices")[1];
    let mut threads = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(thread.path().join(file)).unwrap();
        let (name, status) = (read("comm"), read("status"));
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let name = name.trim().to_owned();
        match name.starts_with("fs") {
            true => assert_eq!(&capabilities(line.unwrap().trim()), documented, "{name}"),
            false => assert_eq!(capabilities(line.unwrap().trim()), "none", "{name}"),
        }
        threads.push(name);
    }
    for name in ["fs", "vcpu0", "vsock"] {
        assert!(threads.iter().any(|thread| thread == name), "{threads:?}");
    }
}

/// Compares a process with the tables in docs/security.md. `memory` is that of its machine.
fn is_confined_as_documented(process: &str, pid: i32, memory: u64) {
    let own = |what: &str| fs::read_link(format!("/proc/self/ns/{what}")).unwrap();
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let status = read("status");
    let status = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.unwrap_or_else(|| panic!("no {field}"))
            .trim()
            .to_owned()
    };
    let user = match status("Uid:").split_whitespace().next() {
        Some("0") => "root",
        Some(_) => "one of its own",
        None => panic!("no user"),
    };
    match process {
        "monitor" => only_the_fs_device_has_capabilities(pid),
        _ => assert_eq!(status("CapEff:"), status("CapBnd:"), "{process}"),
    }
    let namespaces: Vec<_> = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]
        .into_iter()
        .filter(|what| fs::read_link(format!("/proc/{pid}/ns/{what}")).unwrap() != own(what))
        .collect();
    let found = [
        user.to_owned(),
        capabilities(&status("CapEff:")),
        ["no", "yes"][usize::from(status("NoNewPrivs:") == "1")].to_owned(),
    ];
    let documented = documented(process);
    assert_eq!(documented[..3], found, "{process}");
    assert_eq!(status("Seccomp:"), "2", "{process}");
    if process != "sandbox" {
        assert_no_load_passes_a_store(&status("Speculation_Store_Bypass:"));
    }
    assert_eq!(documented[4], namespaces.join(" "), "{process}");

    let limits = read("limits");
    let limit = |resource: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(resource));
        let word = line.and_then(|line| line.split_whitespace().nth(1));
        word.expect("a limit").to_owned()
    };
    let resources = [
        "Max core file size",
        "Max open files",
        "Max processes",
        "Max file size",
        "Max locked memory",
        "Max pending signals",
        "Max msgqueue size",
    ];
    for (resource, documented) in resources.into_iter().zip(&documented[7..]) {
        let limit = limit(resource);
        let what = format!("{process}: {resource}: {limit}");
        let number = || limit.parse::<u64>().unwrap_or_else(|_| panic!("{what}"));
        match &documented[..] {
            "the caller's" | "the host's most" | "unlimited" => {}
            "by its size" if resource == "Max processes" => assert!(number() < 6000, "{what}"),
            "by its size" => assert!(number() <= memory + (1 << 20), "{what}"),
            // Or what the host allows, if that is less.
            "1024 and one for each layer" => assert!(number() <= 1024 + 500, "{what}"),
            most => assert!(number() <= most.parse().unwrap(), "{what}"),
        }
    }
}

fn processes_are_confined_as_documented(machine: &'static str) {
    let hull = Hull::on(machine);
    let volume = format!("{}:/v", hull.scratch().display());
    let container = hull.start(&["-m", "64m", "-v", &volume], &["sleep", "1000"]);
    container.sh("ls /v; echo x >/x").ok();
    let memory = container.inspect()["Hull"]["memory"]
        .as_u64()
        .expect("its memory");
    for process in ["sandbox", "devices", "machine"] {
        let pid = container.host_process(process).as_raw_nonzero().get();
        let documented = match (machine, process) {
            ("kvm", "machine" | "devices") => "monitor",
            _ => process,
        };
        is_confined_as_documented(documented, pid, memory);
        if process != "sandbox" {
            let adjustment = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            assert_eq!(adjustment.trim(), "200", "{process}");
        }
        check_open_files(&container, documented, pid);
    }
}

fn what_a_guest_can_reach_is_listed_with_the_threads_that_serve_it(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.sleeper();
    let listed = hull
        .hull(["inspect", "--devices", &container.name])
        .run()
        .ok();
    let listed = listed.json()[0]["devices"].as_array().unwrap().clone();
    let device = |name: &str| {
        let found = listed.iter().find(|device| device["device"] == name);
        found.unwrap_or_else(|| panic!("no {name}: {listed:?}"))
    };
    for name in ["fs", "vsock", "entropy"] {
        let found = device(name);
        assert!(!found["queues"].as_array().unwrap().is_empty(), "{found}");
        let thread = format!(
            "/proc/{}/task/{}/comm",
            found["process"], found["threads"][0]
        );
        assert_eq!(fs::read_to_string(thread).unwrap().trim(), name);
        assert_eq!(found["memory"].is_string(), machine == "kvm", "{found}");
    }
    if machine == "kvm" {
        assert_eq!(device("serial port")["ports"], "0x3f8-0x3ff");
        assert_eq!(device("local APIC")["process"], 0);
    }
    container.does("kill");
    container.wait();
    let ended = hull.hull(["inspect", "--devices", &container.name]).run();
    ended.fails(1, &["not running"]);
}

/// By the words of /proc/PID/status (fs/proc/array.c).
#[track_caller]
fn assert_no_load_passes_a_store(found: &str) {
    let fine = [
        "thread force mitigated",
        "globally mitigated",
        "not vulnerable",
        // A processor without a way to forbid it.
        "vulnerable",
        "unknown",
    ];
    assert!(fine.contains(&found), "{found}");
}

#[test]
fn core_scheduling_is_set_or_the_start_fails_by_name() {
    let hull = Hull::with(Options {
        configuration: "core_sched = true".to_owned(),
        ..Options::default()
    });
    let output = hull.run(&[], &["true"]);
    if output.status != 0 {
        output.fails(125, &["core_sched", "not supported", "CONFIG_SCHED_CORE"]);
        hull.assert_clean();
        left_out("the kernel of this machine has no core scheduling");
    }
}

#[test]
fn a_layer_is_unpacked_by_a_process_confined_as_documented() {
    let hull = Hull::on("uml");
    let archive = fs::read(busybox_archive()).unwrap();
    let (first, rest) = archive.split_at(archive.len() / 2);
    let mut importing = hull.hull(["image", "import", "-", "slow"]).start();
    importing.write(first);
    let mut unpacking = None;
    eventually("a process unpacks", Duration::from_secs(10), || {
        unpacking = descendants()
            .into_iter()
            .find(|(_, command)| command.contains("unpack-process"));
        // Confined, it has begun to unpack.
        unpacking.as_ref().is_some_and(|(pid, _)| {
            let status = fs::read_to_string(format!("/proc/{pid}/status"));
            status.is_ok_and(|status| status.contains("Seccomp:\t2"))
        })
    });
    let (pid, _) = unpacking.unwrap();
    is_confined_as_documented("unpack", pid, 0);
    // Nothing above the layer can be reached from there.
    let root = fs::metadata(format!("/proc/{pid}/fd/4")).unwrap();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        // Closed meanwhile, or of /proc.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        if entry.path().is_dir() && !target.starts_with("/proc") {
            let above = fs::metadata(entry.path().join("../".repeat(16))).unwrap();
            assert_eq!((above.dev(), above.ino()), (root.dev(), root.ino()));
        }
    }
    importing.write(rest);
    importing.close_input();
    importing.finish().ok();
    hull.run(&[], &["true"]).ok();
}

/// No process holds other files of the host than documented.
fn check_open_files(container: &Container<'_>, process: &str, pid: i32) {
    let below = container.hull().path("");
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
        // Closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_str().unwrap();
        let is_file = target.starts_with('/') && !target.ends_with("(deleted)");
        let known = match process {
            _ if !is_file => true,
            _ if target == "/dev/null" || target == "/dev/net/tun" => true,
            // Messages, and for QEMU what its jail holds.
            "machine" => target.starts_with(below.to_str().unwrap()) || !Path::new(target).is_dir(),
            "sandbox" => target.starts_with(below.to_str().unwrap()),
            // Names in the container's file systems: see the test of its directories.
            _ => true,
        };
        assert!(known, "{process} holds {target}");
    }
}

fn a_guest_keeps_its_programs_from_its_kernel(machine: &'static str) {
    let hull = Hull::on(machine);
    let script = "cd /proc/sys; for p in kernel/kptr_restrict kernel/dmesg_restrict \
                  kernel/yama/ptrace_scope fs/protected_symlinks fs/protected_hardlinks fs/protected_fifos \
                  fs/protected_regular; do echo $p $(cat $p); done; \
                  [ $(cat kernel/unprivileged_bpf_disabled) -gt 0 ] && echo no bpf; \
                  grep -c '^0*[1-9a-f]' /proc/kallsyms; dmesg >/dev/null || echo no dmesg; \
                  zcat /proc/config.gz | grep -E 'CONFIG_(SLAB_FREELIST_HARDENED|HARDENED_USERCOPY|INIT_ON_ALLOC_DEFAULT_ON|PANIC_ON_OOPS|LIST_HARDENED)='";
    let found = hull.sh(&[], script).ok().text();
    assert_eq!(
        found.lines().collect::<Vec<_>>(),
        [
            "kernel/kptr_restrict 2",
            "kernel/dmesg_restrict 1",
            "kernel/yama/ptrace_scope 1",
            "fs/protected_symlinks 1",
            "fs/protected_hardlinks 1",
            "fs/protected_fifos 1",
            "fs/protected_regular 2",
            "no bpf",
            "0",
            "no dmesg",
            "CONFIG_SLAB_FREELIST_HARDENED=y",
            "CONFIG_INIT_ON_ALLOC_DEFAULT_ON=y",
            "CONFIG_HARDENED_USERCOPY=y",
            "CONFIG_LIST_HARDENED=y",
            "CONFIG_PANIC_ON_OOPS=y",
        ]
    );
}

/// The limits of the control groups of a host process: memory, swap, processes, processor time.
fn limits(container: &Container<'_>, process: &str) -> [Option<String>; 4] {
    let pid = container.host_process(process).as_raw_nonzero().get();
    [
        ("memory.limit_in_bytes", "memory.max"),
        ("memory.memsw.limit_in_bytes", "memory.swap.max"),
        ("pids.max", "pids.max"),
        ("cpu.cfs_quota_us", "cpu.max"),
    ]
    .map(|(v1, v2)| {
        let (file, text) = cgroup::file_of(pid, v1, v2)?;
        let parent = format!("{}/", container.hull().cgroup_parent());
        file.to_str()?.contains(&parent).then_some(text)
    })
}

fn machine_and_devices_are_in_a_control_group_with_limits(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(&["-m", "64m"], &["sleep", "1000"]);
    let memory = container.inspect()["Hull"]["memory"]
        .as_u64()
        .expect("its memory");
    if cgroup::below(&hull.cgroup_parent()).is_empty() {
        return left_out("control groups cannot be made here");
    }
    let beside = match machine {
        "qemu" => 224 << 20,
        "kvm" => 96 << 20,
        _ => 64 << 20,
    };
    for process in ["machine", "devices"] {
        let [limit, swap, processes, quota] = limits(&container, process);
        let limit: u64 = limit.expect("a limit of memory").parse().unwrap();
        assert!(limit >= memory && limit <= memory + beside, "{limit}");
        // Not all hosts count swap.
        if let Some(swap) = swap {
            assert!(swap.parse::<u64>().unwrap() <= 2 * limit, "{swap}");
        }
        let processes: u64 = processes.expect("a limit of processes").parse().unwrap();
        assert!(processes < 8192, "{processes}");
        assert!(!quota.expect("a limit of processors").starts_with("max"));
    }
    // What the guest runs is in it as well.
    let pid = container.host_process("machine").as_raw_nonzero();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let group = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    for child in fs::read_to_string(children).unwrap().split_whitespace() {
        let group = group(child);
        assert!(group.contains(&hull.cgroup_parent()), "{group}");
    }
    let sandbox = container.host_process("sandbox").as_raw_nonzero();
    assert_eq!(group(&sandbox.to_string()), group("self"));
    container.does("kill").ok();
    container.wait();
    container.does("rm").ok();
    assert!(cgroup::below(&hull.cgroup_parent()).is_empty());
}

fn a_control_group_goes_with_its_sandbox_whatever_is_killed(machine: &'static str) {
    let hull = Hull::on(machine);
    for process in ["sandbox", "machine", "devices"] {
        let container = hull.sleeper();
        container.kill_host_process(process);
        container.wait();
        container.does("rm").ok();
        hull.assert_clean();
    }
}

fn a_read_only_root_is_read_only_for_the_device_process(machine: &'static str) {
    let hull = Hull::on(machine);
    let image = hull.start(&["--read-only", "--tmpfs", "/new/tmp"], &["sleep", "1000"]);
    image.sh("touch /x").ends(1);
    image.sh("touch /new/tmp/x").ok();
    assert!(!writes_to_the_root(&image));
    assert!(writes_to_the_root(&hull.sleeper()), "of a plain container");
}

/// Whether a device process could write to the root file system of its container.
fn writes_to_the_root(container: &Container<'_>) -> bool {
    // OVERLAYFS_SUPER_MAGIC (linux/magic.h).
    const OVERLAY: i64 = 0x794c_7630;
    let pid = container.host_process("devices").as_raw_nonzero();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let roots: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| rustix::fs::statfs(path).is_ok_and(|found| found.f_type == OVERLAY))
        .collect();
    assert!(!roots.is_empty(), "no root is held for {}", container.name);
    roots.iter().any(|path| {
        let flags = rustix::fs::statvfs(path).unwrap().f_flag;
        !flags.contains(StatVfsMountFlags::RDONLY)
    })
}

fn directories_of_a_device_process_lead_nowhere_else(machine: &'static str) {
    let hull = Hull::on(machine);
    let volume = hull.scratch().join("volume");
    fs::create_dir_all(volume.join("deep/er")).unwrap();
    let volume = format!("{}:/v", volume.join("deep").display());
    let container = hull.start(&["-v", &volume], &["sleep", "1000"]);
    container
        .sh("ls -R /v /etc >/dev/null; echo x >/tmp/x")
        .ok();
    let pid = container.host_process("devices").as_raw_nonzero();
    let mut directories = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let path = entry.unwrap().path();
        // A descriptor may be closed meanwhile.
        let Ok(own) = fs::metadata(&path) else {
            continue;
        };
        if !own.is_dir() {
            continue;
        }
        directories += 1;
        // From whichever directory, the way up ends in one of the same file system that is not
        // the root of the host's.
        let top = fs::metadata(path.join("../../../../../../../../../../../..")).unwrap();
        let host = fs::metadata("/").unwrap();
        let shown = fs::read_link(&path).unwrap();
        assert_ne!(
            (top.dev(), top.ino()),
            (host.dev(), host.ino()),
            "{shown:?}"
        );
        // Its own /proc is below its own root, which is empty but for that.
        let jail = fs::metadata(format!("/proc/{pid}/root")).unwrap();
        let is_in_jail = (top.dev(), top.ino()) == (jail.dev(), jail.ino());
        assert!(is_in_jail || top.dev() == own.dev(), "{shown:?}");
    }
    assert!(
        directories >= 3,
        "{directories} directories: root, etc and volume"
    );
}

#[test]
fn files_of_the_resolver_cost_the_host_nothing() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let fill = container.sh("dd if=/dev/zero of=/etc/hosts bs=1M count=16 2>&1");
    fill.ends(1);
    let size = container.sh("stat -c %s /etc/hosts").ok().text();
    assert!(size.parse::<u64>().unwrap() <= 1 << 20, "{size} bytes");
    // Its own files are small, and the sandbox's as well.
    let used = |directory: &str| {
        let du = hull_tests::Invocation::new("du")
            .arg("-sk")
            .arg(hull.path(directory));
        let text = du.run().ok().text();
        let kilobytes = text.split_whitespace().next().unwrap();
        kilobytes.parse::<u64>().unwrap()
    };
    for directory in ["run", "data/containers"] {
        assert!(
            used(directory) < 1024,
            "{directory}: {} KiB",
            used(directory)
        );
    }
    container
        .sh("echo 192.0.2.1 x >/etc/hosts; grep x /etc/hosts")
        .ok();
}
