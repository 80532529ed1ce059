//! On trees of plain files for both versions, and on this machine's hierarchies where they are
//! writable.

#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Stdio};

use super::directory::PAUSE;
use super::*;

fn resources(json: &str) -> LinuxResources {
    serde_json::from_str(json).unwrap()
}

/// Creates a directory with these files.
fn group(directory: &Path, files: &[(&str, &str)]) {
    std::fs::create_dir_all(directory).unwrap();
    for (file, text) in files {
        std::fs::write(directory.join(file), text).unwrap();
    }
}

fn read(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn hierarchy(mount: &Path) -> Hierarchy {
    Hierarchy {
        mount: mount.to_owned(),
        caller: PathBuf::new(),
        controllers: String::new(),
    }
}

fn below(path: &str) -> Location {
    Location::Mount(path.into())
}

/// Creates groups below these mounts.
fn make(
    hierarchies: &[Hierarchy],
    location: Location,
    resources: Option<&LinuxResources>,
    overhead: u64,
) -> Result<Groups> {
    let copy = |hierarchy: &Hierarchy| Hierarchy {
        mount: hierarchy.mount.clone(),
        caller: hierarchy.caller.clone(),
        controllers: hierarchy.controllers.clone(),
    };
    let place = Place {
        hierarchies: hierarchies.iter().map(copy).collect(),
        location,
    };
    place.make(resources, overhead)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn v1_limits_find_their_hierarchies() {
    let root = tempfile::tempdir().unwrap();
    let [memory, cpu, cpuset] = ["memory", "cpu", "cpuset"].map(|name| root.path().join(name));
    group(&memory, &[]);
    group(&cpu, &[]);
    group(&cpuset, &[("cpuset.cpus", "0-3\n"), ("cpuset.mems", "0\n")]);
    // The files that the kernel creates in a new group.
    group(
        &memory.join("p/c"),
        &[
            ("memory.limit_in_bytes", ""),
            ("memory.memsw.limit_in_bytes", ""),
        ],
    );
    group(
        &cpu.join("p/c"),
        &[
            ("cpu.shares", ""),
            ("cpu.cfs_quota_us", ""),
            ("cpu.cfs_period_us", ""),
        ],
    );
    for path in ["p", "p/c"] {
        group(
            &cpuset.join(path),
            &[("cpuset.cpus", "\n"), ("cpuset.mems", "\n")],
        );
    }
    let limits = resources(
        r#"{"memory":{"limit":1000,"swap":2000},"cpu":{"shares":512,"quota":50,"period":100,"cpus":"1"}}"#,
    );
    let hierarchies = [&memory, &cpu, &cpuset].map(|mount| hierarchy(mount));
    let groups = make(&hierarchies, below("p/c"), Some(&limits), 24).unwrap();
    assert_eq!(
        groups.directories,
        [&memory, &cpu, &cpuset].map(|mount| mount.join("p/c"))
    );
    assert_eq!(read(memory.join("p/c/memory.limit_in_bytes")), "1024");
    assert_eq!(read(memory.join("p/c/memory.memsw.limit_in_bytes")), "2024");
    assert_eq!(read(cpu.join("p/c/cpu.shares")), "512");
    assert_eq!(read(cpu.join("p/c/cpu.cfs_quota_us")), "50");
    assert_eq!(read(cpu.join("p/c/cpu.cfs_period_us")), "100");
    assert_eq!(read(cpuset.join("p/cpuset.cpus")), "0-3");
    assert_eq!(read(cpuset.join("p/c/cpuset.mems")), "0");
    assert_eq!(read(cpuset.join("p/c/cpuset.cpus")), "1");
}

#[test]
fn v2_enables_controllers_on_the_way_and_converts() {
    let root = tempfile::tempdir().unwrap();
    let files = [
        (
            "cgroup.controllers",
            "cpuset cpu io memory hugetlb pids rdma\n",
        ),
        ("cgroup.subtree_control", ""),
        ("memory.max", "max\n"),
        ("memory.swap.max", "max\n"),
        ("cpu.max", "max 100000\n"),
        ("cpu.weight", "100\n"),
        ("io.max", ""),
        ("io.weight", ""),
    ];
    for path in ["", "p.slice", "p.slice/c.scope"] {
        group(&root.path().join(path), &files);
    }
    let limits = resources(
        r#"{"memory":{"limit":1000,"swap":2000},"cpu":{"shares":512,"period":5000},
            "blockIO":{"weight":1000,"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":600}]}}"#,
    );
    let location = path::location(Some(Path::new("p.slice::c")), "c", true).unwrap();
    let expected = root.path().join("p.slice/-c.scope");
    group(&expected, &files);
    let hierarchies = [hierarchy(root.path())];
    let groups = make(&hierarchies, location, Some(&limits), 24).unwrap();
    assert_eq!(groups.directories, std::slice::from_ref(&expected));
    let enabled = "+cpuset +cpu +io +memory +pids";
    assert_eq!(read(root.path().join("cgroup.subtree_control")), enabled);
    assert_eq!(
        read(root.path().join("p.slice/cgroup.subtree_control")),
        enabled
    );
    assert_eq!(read(expected.join("cgroup.subtree_control")), "");
    for (file, value) in [
        ("memory.max", "1024"),
        ("memory.swap.max", "1000"),
        ("cpu.max", "max 5000"),
        ("cpu.weight", "59"),
        ("io.weight", "10000"),
        ("io.max", "8:0 rbps=600"),
    ] {
        assert_eq!(read(expected.join(file)), value, "{file}");
    }
}

#[test]
fn a_wall_is_not_put_through_a_running_machine() {
    let root = tempfile::tempdir().unwrap();
    let groups = Groups {
        directories: vec![root.path().to_owned()],
    };
    group(
        root.path(),
        &[
            ("cgroup.controllers", "memory\n"),
            ("memory.max", "5000"),
            ("memory.current", "3000\n"),
            ("memory.stat", "anon 100\nfile 2800\nshmem 1800\n"),
        ],
    );
    // 3000 in use, of which 1000 are file pages.
    groups
        .apply(&resources(r#"{"memory":{"limit":1900}}"#), 99)
        .unwrap();
    assert_eq!(read(root.path().join("memory.max")), "5000");
    groups
        .apply(&resources(r#"{"memory":{"limit":1900}}"#), 100)
        .unwrap();
    assert_eq!(read(root.path().join("memory.max")), "2000");
}

#[test]
fn a_missing_controller_is_an_error_for_who_needs_it_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let [v1, v2] = ["pids", "unified"].map(|name| root.path().join(name));
    group(&v1, &[]);
    group(
        &v2,
        &[
            ("cgroup.controllers", "hugetlb\n"),
            ("cgroup.subtree_control", ""),
        ],
    );
    std::fs::create_dir(v1.join("there")).unwrap();
    for hierarchies in [
        vec![hierarchy(&v1), hierarchy(&v2)],
        vec![hierarchy(&v2)],
        vec![],
    ] {
        for (limits, message) in [
            (
                r#"{"memory":{"limit":1000}}"#,
                "cannot set linux.resources.memory.limit: the host has no memory controller",
            ),
            (
                r#"{"cpu":{"cpus":"0"}}"#,
                "cannot set linux.resources.cpu.cpus: the host has no cpuset controller",
            ),
        ] {
            let limits = resources(limits);
            let failure = make(&hierarchies, below("there/a/b"), Some(&limits), 0).unwrap_err();
            assert_eq!(failure.message, message);
            assert_eq!(names(&v1), ["there"]);
            assert!(names(&v1.join("there")).is_empty());
            assert_eq!(names(&v2), ["cgroup.controllers", "cgroup.subtree_control"]);
        }
    }
    // Swap alone is set if there is a file for it.
    let swap = resources(r#"{"memory":{"swap":1000}}"#);
    let groups = make(&[hierarchy(&v1)], below("there/a"), Some(&swap), 0).unwrap();
    groups.remove().unwrap();
    assert_eq!(names(&v1), ["there"]);
}

#[test]
fn a_missing_file_of_a_controller_is_named() {
    let root = tempfile::tempdir().unwrap();
    group(root.path(), &[("blkio.reset_stats", "")]);
    let groups = Groups {
        directories: vec![root.path().to_owned()],
    };
    let failure = groups
        .apply(&resources(r#"{"blockIO":{"weight":100}}"#), 0)
        .unwrap_err();
    assert_eq!(
        failure.message,
        "cannot set linux.resources.blockIO.weight: the host's blkio controller has no \
         blkio.bfq.weight or blkio.weight or io.bfq.weight or io.weight"
    );
}

#[test]
fn removes_what_is_below_but_not_what_is_above() {
    let root = tempfile::tempdir().unwrap();
    let hierarchies = [hierarchy(root.path())];
    let groups = make(&hierarchies, below("a/b"), None, 0).unwrap();
    std::fs::create_dir_all(root.path().join("a/b/c/d")).unwrap();
    group(&root.path().join("a/b/c"), &[("cgroup.procs", "7\n5\n")]);
    assert_eq!(groups.processes().unwrap(), [5, 7]);
    std::fs::remove_file(root.path().join("a/b/c/cgroup.procs")).unwrap();
    groups.remove().unwrap();
    groups.remove().unwrap();
    assert!(groups.processes().unwrap().is_empty());
    assert_eq!(names(root.path()), ["a"]);
    let text = serde_json::to_string(&groups).unwrap();
    let again: Groups = serde_json::from_str(&text).unwrap();
    assert_eq!(again.directories, groups.directories);
}

#[test]
fn a_killed_process_is_dying_until_it_is_gone() {
    let mut sleep = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let pid = sleep.id().cast_signed();
    assert!(!is_dying(pid));
    sleep.kill().unwrap();
    assert!(is_dying(pid), "killed, or a zombie");
    sleep.wait().unwrap();
    assert!(is_dying(pid), "gone");
}

/// Kills the process and removes the groups, also when the test fails.
struct Cleanup(Child, Groups);

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = self.1.remove();
    }
}

#[test]
fn on_this_machine() {
    let path = PathBuf::from(format!("/hull-test-{}", std::process::id()));
    let groups = match Place::find(Some(&path), "c1", false).and_then(|place| place.make(None, 0)) {
        Ok(groups) if !groups.directories.is_empty() => groups,
        other => {
            eprintln!("left out: no control groups can be made here: {other:?}");
            return;
        }
    };
    let mut child = Command::new("sh")
        .args(["-c", "read line; exec sleep 600"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id() as i32;
    let stdin = child.stdin.take();
    let mut cleanup = Cleanup(child, groups.clone());
    for directory in &groups.directories {
        assert!(directory.ends_with(path.strip_prefix("/").unwrap()) && directory.is_dir());
    }
    groups.join(pid).unwrap();
    assert_eq!(groups.processes().unwrap(), [pid]);
    let own = read(format!("/proc/{pid}/cgroup"));
    let moved = own
        .lines()
        .filter(|line| line.ends_with(path.to_str().unwrap()))
        .count();
    assert_eq!(moved, groups.directories.len(), "{own}");

    // Raise and lower both: the kernel checks their order.
    const MIB: u64 = 1 << 20;
    if groups.find("memory.limit_in_bytes").is_some() || groups.find("memory.max").is_some() {
        for mib in [64, 256, 32] {
            let limit = mib * MIB;
            let json = format!(r#"{{"memory":{{"limit":{limit},"swap":{limit}}}}}"#);
            groups.apply(&resources(&json), MIB).unwrap();
            let file = groups
                .find("memory.limit_in_bytes")
                .or_else(|| groups.find("memory.max"))
                .unwrap();
            assert_eq!(read(file).trim(), (limit + MIB).to_string());
        }
        // Memory is charged to the group from now on: the limit stays above what a process keeps.
        drop(stdin);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !read(format!("/proc/{pid}/cmdline")).starts_with("sleep") {
            assert!(Instant::now() < deadline, "the command does not start");
            std::thread::sleep(PAUSE);
        }
        groups
            .apply(&resources(r#"{"memory":{"limit":1,"swap":1}}"#), 0)
            .unwrap();
        assert_eq!(groups.processes().unwrap(), [pid]);
    } else {
        eprintln!("left out: memory limits: there is no memory controller");
    }
    if groups.find("cpu.shares").is_some() || groups.find("cpu.weight").is_some() {
        for (quota, period) in [(50_000, 100_000), (200_000, 1_000_000), (5_000, 10_000)] {
            let json = format!(r#"{{"cpu":{{"quota":{quota},"period":{period},"shares":512}}}}"#);
            groups.apply(&resources(&json), 0).unwrap();
        }
    } else {
        eprintln!("left out: processor time: there is no cpu controller");
    }
    if groups.find("cpuset.cpus").is_some() {
        groups
            .apply(&resources(r#"{"cpu":{"cpus":"0","mems":"0"}}"#), 0)
            .unwrap();
        let failure = groups
            .apply(&resources(r#"{"cpu":{"cpus":"x"}}"#), 0)
            .unwrap_err();
        let start = "cannot set linux.resources.cpu.cpus (";
        assert!(failure.message.starts_with(start), "{failure}");
    }

    let failure = groups.remove().unwrap_err();
    assert!(
        failure.message.contains(&format!("with processes [{pid}]")),
        "{failure}"
    );
    cleanup.0.kill().unwrap();
    cleanup.0.wait().unwrap();
    groups.remove().unwrap();
    groups.remove().unwrap();
    assert!(
        groups
            .directories
            .iter()
            .all(|directory| !directory.exists())
    );
    let failure = groups.join(1).unwrap_err();
    assert!(
        failure
            .message
            .starts_with("cannot move process 1 to the control group"),
        "{failure}"
    );
}
