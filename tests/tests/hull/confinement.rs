//! What the host processes of a machine may do to the host, read from the running processes.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::fs::StatVfsMountFlags;

use hull_tests::{Container, Hull, cgroup, left_out, on_every_machine};

on_every_machine!(
    processes_of_a_machine_have_limits_of_their_own,
    machine_and_devices_are_in_a_control_group_with_limits,
    a_control_group_goes_with_its_sandbox_whatever_is_killed,
    a_read_only_root_is_read_only_for_the_device_process,
    directories_of_a_device_process_lead_nowhere_else,
);

fn processes_of_a_machine_have_limits_of_their_own(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(&["-m", "64m", "--pids-limit", "32"], &["sleep", "1000"]);
    let memory = container.inspect()["memory"].as_u64();
    for process in ["machine", "devices"] {
        let pid = container.host_process(process).as_raw_nonzero();
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        assert_eq!(read("oom_score_adj").trim(), "200", "{process}");
        let limits = read("limits");
        let limit = |resource: &str| -> Option<u64> {
            let line = limits.lines().find(|line| line.starts_with(resource))?;
            let value = line
                .trim_start_matches(resource)
                .split_whitespace()
                .next()?;
            value.parse().ok()
        };
        for (resource, most) in [
            ("Max core file size", 1),
            ("Max msgqueue size", 0),
            ("Max locked memory", 64 << 10),
            ("Max pending signals", 1024),
        ] {
            let limit = limit(resource).unwrap_or(u64::MAX);
            assert!(limit <= most, "{process}: {resource}: {limit}");
        }
        if process == "machine" {
            let processes = limit("Max processes").expect("a limit");
            assert!(processes < 6000, "{processes} processes");
            let size = limit("Max file size").expect("a limit");
            assert!(size <= memory.unwrap_or(128 << 20) + (1 << 20), "{size}");
        }
        let status = read("status");
        for field in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
            assert!(status.contains(field), "{process}: {field}");
        }
    }
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
    let memory = container.inspect()["memory"].as_u64().expect("its memory");
    if cgroup::below(&hull.cgroup_parent()).is_empty() {
        return left_out("control groups cannot be made here");
    }
    for process in ["machine", "devices"] {
        let [limit, swap, processes, quota] = limits(&container, process);
        let limit: u64 = limit.expect("a limit of memory").parse().unwrap();
        assert!(limit >= memory && limit <= memory + (64 << 20), "{limit}");
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
