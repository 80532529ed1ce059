//! Limits of a bundle, each shown to hold, and `hull-oci update`, which changes them while the
//! container runs.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_tests::{Init, Oci, cgroup, eventually};
use serde_json::{Value, json};

/// Forks until that is refused, at most 60 times.
const FORK_UNTIL_REFUSED: &str =
    "i=0; while [ $i -lt 60 ]; do sleep 1000 </dev/null >/dev/null 2>&1 & i=$((i+1)); done; :";

/// A file of the container's control group in the guest.
fn guest(init: &Init<'_>, file: &str) -> String {
    init.sh(&format!("cat /sys/fs/cgroup/{file}")).ok().text()
}

/// A file of the container's control group on the host, version 1 or 2.
fn host(init: &Init<'_>, v1: &str, v2: &str) -> Option<(PathBuf, String)> {
    cgroup::file_of(init.keeper().as_raw_nonzero().get(), v1, v2)
}

/// The share of a processor that a container uses.
fn share(oci: &Oci, init: &Init<'_>) -> f64 {
    let used = || {
        let event = oci.oci(["events", "--stats", &init.id]).run().ok().json();
        event["data"]["cpu"]["usage"]["total"].as_f64().unwrap()
    };
    let (before, begin) = (used(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    (used() - before) / begin.elapsed().as_nanos() as f64
}

#[test]
fn a_container_over_its_memory_is_killed_and_events_tell() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("memory", json!({"limit": 48 << 20}))
        .sh("echo up; while :; do sh -c 'tail /dev/zero' 2>/dev/null; sleep 0.2; done");
    let init = oci.start(&bundle);
    init.says("up");
    let mut watching = oci.oci(["events", "--interval", "50ms", &init.id]).start();
    watching.wait_for("\"type\":\"oom\"");
    init.kill("KILL").ok();
    watching.finish().ok();

    let bundle = bundle.args(&["tail", "/dev/zero"]);
    oci.oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .run()
        .ends(137);
}

#[test]
fn a_container_has_no_more_processes_than_its_limit() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("pids", json!({"limit": 20}))
        .sh("sleep 1000");
    let init = oci.start(&bundle);
    init.sh(FORK_UNTIL_REFUSED);
    assert!(guest(&init, "pids.max") == "20");
    let event = oci.oci(["events", "--stats", &init.id]).run().ok().json();
    let current = event["data"]["pids"]["current"].as_u64().unwrap();
    assert!((18..=20).contains(&current), "{event}");
}

#[test]
fn a_container_gets_no_more_processor_time_than_its_quota() {
    let oci = Oci::new();
    let limits = json!({"quota": 30_000, "period": 100_000});
    let bundle = oci
        .bundle()
        .resources("cpu", limits)
        .sh("while :; do :; done");
    let init = oci.start(&bundle);
    assert_eq!(guest(&init, "cpu.max"), "30000 100000");
    let share = share(&oci, &init);
    assert!(share > 0.1 && share < 0.4, "{share:.2} of a processor");
}

#[test]
fn a_device_that_is_not_allowed_cannot_be_opened_though_it_can_be_made() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        for set in ["bounding", "effective", "permitted"] {
            let set = &mut config["process"]["capabilities"][set];
            set.as_array_mut().unwrap().push(json!("CAP_MKNOD"));
        }
        config["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "rw"},
        ]);
    });
    let init = oci.start(&bundle);
    // 1:11 is the kernel's log; 10:229 is fuse.
    init.sh("mknod /dev/allowed c 1 11 && mknod /dev/denied c 10 229")
        .ok();
    init.sh("exec 3<>/dev/denied")
        .ends(1)
        .error()
        .contains("Operation not permitted")
        .then_some(())
        .expect("the group's program denies it");
    init.sh("exec 3>/dev/allowed").ok();
    init.sh("echo x >/dev/null; head -c 1 /dev/zero").ok();
}

#[test]
fn resource_limits_of_the_process_hold() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        config["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 16, "hard": 32},
            {"type": "RLIMIT_FSIZE", "soft": 4096, "hard": 4096},
        ]);
    });
    let init = oci.start(&bundle);
    let limits = init.sh("ulimit -n; ulimit -H -n").ok().text();
    assert_eq!(limits, "16\n32");
    let many = "i=3; while [ $i -lt 16 ]; do eval \"exec $i</dev/null\" || exit 3; i=$((i+1)); done; cat 16</dev/null";
    init.sh(&format!("({many}) 2>&1 || echo refused"))
        .ok()
        .text()
        .contains("refused")
        .then_some(())
        .expect("no more than 16 descriptors");
    init.sh("head -c 10000 /dev/zero >/file; test $(stat -c %s /file) = 4096")
        .ok();
}

#[test]
fn huge_pages_are_limited_where_the_guest_has_them_and_refused_otherwise() {
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        config["linux"]["resources"]["hugepageLimits"] =
            json!([{"pageSize": "2MB", "limit": 4 << 20}]);
    });
    // A user-mode kernel has no huge pages.
    let init = oci.init();
    oci.creates(&init, &bundle, &[])
        .fails(1, &["linux.resources.hugepageLimits", "no hugetlb"]);
    oci.assert_clean();
}

#[test]
fn processors_of_the_host_are_those_of_the_cpuset() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("cpu", json!({"cpus": "1", "mems": "0"}));
    let init = oci.start(&bundle);
    let Some((_, cpus)) = host(&init, "cpuset.cpus", "cpuset.cpus") else {
        return hull_tests::left_out("no control groups of processors on this host");
    };
    assert_eq!(cpus, "1");
    // It holds for the machine, which is what uses processors.
    let machine = init.host_process("machine").unwrap().as_raw_nonzero();
    let status = fs::read_to_string(format!("/proc/{machine}/status")).unwrap();
    assert!(status.contains("Cpus_allowed_list:\t1\n"), "{status}");
}

#[test]
fn memory_and_processor_time_of_the_machine_are_limited_on_the_host() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("memory", json!({"limit": 64 << 20}))
        .resources(
            "cpu",
            json!({"quota": 50_000, "period": 100_000, "shares": 512}),
        );
    let init = oci.start(&bundle);
    let (_, limit) = host(&init, "memory.limit_in_bytes", "memory.max").unwrap();
    let limit: u64 = limit.parse().unwrap();
    assert!((64 << 20..512 << 20).contains(&limit), "{limit}");
    let (_, quota) = host(&init, "cpu.cfs_quota_us", "cpu.max").unwrap();
    assert!(quota.starts_with("50000"), "{quota}");
    // Everything that the container costs is inside.
    for process in ["pod", "devices", "machine"] {
        let pid = init.host_process(process).unwrap().as_raw_nonzero();
        let keeper = init.keeper().as_raw_nonzero();
        let groups = |pid| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert_eq!(groups(pid), groups(keeper), "{process}");
    }
}

/// What kubeadm's clusters and `podman --cgroup-manager systemd` write.
#[test]
fn systemds_notation_of_control_groups_is_understood() {
    let oci = Oci::new();
    for (options, within) in [
        (
            &["--systemd-cgroup"][..],
            "/hulltest.slice/hulltest-a.slice/cri-containerd-{id}.scope",
        ),
        // A relative path as others, to runc as well.
        (&[], "/hulltest-a.slice:cri-containerd:{id}"),
    ] {
        let init = oci.init();
        let notation = format!("hulltest-a.slice:cri-containerd:{}", init.id);
        let within = within.replace("{id}", &init.id);
        let bundle = oci
            .bundle()
            .with(|config| config["linux"]["cgroupsPath"] = json!(notation));
        let arguments: Vec<_> = options.iter().chain(&["run", "-d", "--bundle"]).collect();
        oci.oci(arguments)
            .arg(&bundle.path)
            .arg("--pid-file")
            .arg(init.pid_file())
            .arg(&init.id)
            .output_to(&oci.path("out"), &oci.path("err"))
            .run()
            .ok();
        let of_host = fs::read_to_string(format!("/proc/{}/cgroup", init.keeper())).unwrap();
        let groups = of_host.lines().filter(|line| line.ends_with(&within));
        assert!(groups.count() > 0, "{within} of {of_host}");
        // The guest's is the same: from outside its own namespace it shows.
        let of_guest = init.sh("cat /proc/self/cgroup").ok().text();
        assert_eq!(of_guest, "0::/");
        init.is_gone_after_a_kill();
    }
    for slice in ["/hulltest.slice/hulltest-a.slice", "/hulltest.slice"] {
        cgroup::remove(slice);
    }
}

#[test]
fn a_machine_without_limits_is_kept_within_its_size_on_the_host() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let memory = init
        .sh("sed -n 's/^MemTotal: *//p' /proc/meminfo")
        .ok()
        .text();
    let memory: u64 = memory.trim_end_matches(" kB").trim().parse().unwrap();
    let (_, limit) = host(&init, "memory.limit_in_bytes", "memory.max").unwrap();
    let limit: u64 = limit.parse().unwrap();
    assert!(limit >> 10 > memory, "{limit}, {memory} KiB");
    assert!(
        limit >> 10 < 2 * memory + (256 << 10),
        "{limit}, {memory} KiB"
    );
    let (_, processes) = host(&init, "pids.max", "pids.max").unwrap();
    assert!(processes.parse::<u64>().is_ok(), "{processes}");
}

#[test]
fn block_devices_are_throttled_on_the_host() {
    let oci = Oci::new();
    use std::os::unix::fs::MetadataExt;
    let device = fs::metadata(oci.path(".")).unwrap().dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let throttle = |rate: u64| json!([{"major": major, "minor": minor, "rate": rate}]);
    let bundle = oci.bundle().resources(
        "blockIO",
        json!({
            "throttleReadBpsDevice": throttle(4 << 20),
            "throttleWriteBpsDevice": throttle(2 << 20),
        }),
    );
    if major == 0 {
        return hull_tests::left_out("the tests' directory is on no block device");
    }
    let init = oci.start(&bundle);
    let (_, write) = host(&init, "blkio.throttle.write_bps_device", "io.max").unwrap();
    assert!(write.starts_with(&format!("{major}:{minor} ")), "{write}");
    assert!(write.contains("2097152"), "{write}");
    let (_, read) = host(&init, "blkio.throttle.read_bps_device", "io.max").unwrap();
    assert!(read.contains("4194304"), "{read}");
}

#[test]
fn update_changes_limits_while_the_container_runs_and_they_hold() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("memory", json!({"limit": 128 << 20}))
        .sh("while :; do :; done");
    let init = oci.start(&bundle);
    let update = |options: &[&str]| {
        oci.oci(["update"]).args(options).arg(&init.id).run().ok();
    };
    let before = host(&init, "memory.limit_in_bytes", "memory.max");
    update(&["--memory", "40m", "--pids-limit", "15"]);
    assert_eq!(guest(&init, "memory.max"), (40 << 20).to_string());
    assert_eq!(guest(&init, "pids.max"), "15");
    // A machine keeps its size, and its wall with it.
    assert!(host(&init, "memory.limit_in_bytes", "memory.max") <= before);
    init.sh("tail /dev/zero").ends(137);
    // Killed processes have not released all memory at once, and others would be killed for it.
    init.sh("until [ $(cat /sys/fs/cgroup/memory.current) -lt 20000000 ]; do sleep 0.05; done")
        .ok();
    init.sh(FORK_UNTIL_REFUSED);
    let event = oci.oci(["events", "--stats", &init.id]).run().ok().json();
    assert!(event["data"]["pids"]["current"].as_u64().unwrap() <= 15);
    assert_eq!(event["data"]["memory"]["usage"]["limit"], 40 << 20);

    update(&["--cpu-period", "100000", "--cpu-quota", "20000"]);
    assert_eq!(guest(&init, "cpu.max"), "20000 100000");
    let used = share(&oci, &init);
    assert!(used < 0.3, "{used:.2} of a processor");
    let (_, quota) = host(&init, "cpu.cfs_quota_us", "cpu.max").unwrap();
    assert!(quota.starts_with("20000"), "{quota}");

    update(&[
        "--pids-limit",
        "-1",
        "--cpu-quota",
        "-1",
        "--memory",
        "100m",
    ]);
    assert_eq!(guest(&init, "pids.max"), "max");
    assert!(guest(&init, "cpu.max").starts_with("max "));
    assert_eq!(guest(&init, "memory.max"), (100 << 20).to_string());
    let used = share(&oci, &init);
    assert!(used > 0.3, "{used:.2} of a processor");
}

#[test]
fn update_takes_limits_of_a_file_or_of_standard_input() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let limits = json!({"memory": {"limit": 50 << 20}, "pids": {"limit": 33}});
    oci.oci(["update", "--resources", "-", &init.id])
        .input(limits.to_string())
        .run()
        .ok();
    assert_eq!(guest(&init, "memory.max"), (50 << 20).to_string());
    assert_eq!(guest(&init, "pids.max"), "33");
    let file = oci.path("limits.json");
    fs::write(&file, json!({"cpu": {"shares": 2048}}).to_string()).unwrap();
    oci.oci(["update", "--resources", file.to_str().unwrap(), &init.id])
        .run()
        .ok();
    assert_eq!(guest(&init, "pids.max"), "33", "the others stay");
    assert_ne!(guest(&init, "cpu.weight"), "100");
    for (text, word) in [("{", "limits"), ("[]", "limits")] {
        fs::write(&file, text).unwrap();
        oci.oci(["update", "-r", file.to_str().unwrap(), &init.id])
            .run()
            .fails(1, &[word]);
    }
    for (options, word) in [
        (["--memory", "nonsense"], "memory"),
        (["--cpu-quota", "x"], "cpu"),
        (["--l3-cache-schema", "x"], "RDT"),
    ] {
        oci.oci(["update"])
            .args(options)
            .arg(&init.id)
            .run()
            .fails(1, &[word]);
    }
}

#[test]
fn limits_of_one_container_of_a_pod_leave_the_others_alone() {
    let oci = Oci::new();
    let pod: Value = json!(oci.unique());
    let bundle = |limit: u64| {
        oci.bundle()
            .resources("memory", json!({"limit": limit}))
            .with(|config| config["annotations"]["io.kubernetes.cri-o.SandboxID"] = pod.clone())
    };
    let large = oci.start(&bundle(100 << 20));
    let small = oci.start(&bundle(20 << 20));
    small.sh("tail /dev/zero").ends(137);
    assert_eq!(guest(&large, "memory.max"), (100 << 20).to_string());
    eventually("both run", Duration::from_secs(5), || {
        large.status() == "running" && small.status() == "running"
    });
    large
        .sh("head -c 40000000 /dev/zero | tail -c 30000000 >/dev/null")
        .ok();
}
