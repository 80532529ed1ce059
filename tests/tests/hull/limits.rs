//! Limits that hold: memory, processors, processes, and the size of the machine around them.

use hull_tests::{Hull, LoopDevice, on_every_machine};

on_every_machine!(
    a_container_that_takes_too_much_memory_is_killed_and_says_so,
    limits_are_seen_inside,
    a_container_writes_no_more_to_its_root_than_its_size,
);

fn a_container_that_takes_too_much_memory_is_killed_and_says_so(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(&["-m", "64m"], &["sh", "-c", "tail /dev/zero"]);
    assert_eq!(container.wait(), 137);
    assert_eq!(container.inspect()["Hull"]["exit"]["oom_killed"], true);
    // Another container is not disturbed by its limit.
    hull.run(&["-m", "64m"], &["true"]).ok();
}

#[test]
fn a_program_that_takes_too_much_memory_goes_alone() {
    let hull = Hull::on("uml");
    let container = hull.start(&["-m", "40m"], &["sh", "-c", "while :; do :; done"]);
    // Another process in need of memory while the killed one's is being freed had init killed, once
    // in twenty times.
    for round in 0..15 {
        container.sh("tail /dev/zero").ends(137);
        assert_eq!(container.state(), "running", "round {round}");
    }
}

fn a_container_writes_no_more_to_its_root_than_its_size(machine: &'static str) {
    // It says why when there are none.
    let Some(_) = LoopDevice::new(&[0; 4096]) else {
        return;
    };
    let hull = Hull::on(machine);
    let write = "dd if=/dev/zero of=/x bs=1M count=64 2>&1 | grep -c 'No space left'; \
                 rm /x; echo y >/etc/motd; cat /etc/motd; ls /bin/sh";
    let size = ["--storage-opt", "size=24m"];
    assert_eq!(hull.sh(&size, write).ok().text(), "1\ny\n/bin/sh");
    // One that stays keeps its layer, which goes with it; nothing is mounted or attached meanwhile.
    let container = hull.start(&size, &["sh", "-c", "echo x >/x"]);
    assert_eq!(container.wait(), 0);
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let file = hull.path("data/containers").join(&id).join("layer.img");
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 24 << 20);
    let attached = std::fs::read_dir("/sys/block")
        .unwrap()
        .flatten()
        .any(|disk| {
            let backing = disk.path().join("loop/backing_file");
            std::fs::read_to_string(backing).is_ok_and(|path| path.contains(&id))
        });
    assert!(!attached, "{id}");
    container.does("rm").ok();
    assert!(!file.exists());
    hull.run(&["--storage-opt", "size=1m"], &["true"])
        .fails(125, &["too small", "8 MiB"]);
    hull.run(&["--storage-opt", "inodes=1"], &["true"])
        .fails(125, &["unknown storage option"]);
}

fn limits_are_seen_inside(machine: &'static str) {
    let hull = Hull::on(machine);
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max";
    let output = hull
        .sh(
            &["-m", "100m", "--cpus", "0.5", "--pids-limit", "50"],
            script,
        )
        .ok();
    assert_eq!(output.text(), "104857600\n50000 100000\n50");
}

#[test]
fn the_machine_is_as_big_as_the_limit_needs() {
    let hull = Hull::new();
    let total = |options: &[&str]| {
        let text = hull
            .sh(
                options,
                "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
            )
            .ok()
            .text();
        text.parse::<u64>().unwrap() >> 10
    };
    let usual = total(&[]);
    assert!(
        (220..=256).contains(&usual),
        "{usual} MiB without an option"
    );
    let large = total(&["-m", "1g"]);
    assert!(large >= 1000, "{large} MiB for a limit of 1 GiB");
}

#[test]
fn a_fork_bomb_stops_at_the_limit() {
    let hull = Hull::new();
    let script = "i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done 2>/dev/null; cat /sys/fs/cgroup/pids.current";
    let container = hull.start(&["--pids-limit", "20"], &["sleep", "1000"]);
    let _ = container.sh(&format!("{script} >/tmp/count"));
    let stats = hull
        .hull(["stats", "--no-stream", "--json", &container.name])
        .run()
        .ok()
        .json();
    assert!(
        stats[0]["pids"]["current"].as_u64().unwrap() <= 20,
        "{stats}"
    );
    assert_eq!(stats[0]["pids"]["limit"], 20);
}

#[test]
fn half_a_processor_takes_twice_the_time() {
    let hull = Hull::new();
    let container = hull.start(&["--cpus", "0.5"], &["sh", "-c", "while :; do :; done"]);
    let used = || {
        let text = container
            .sh("sed -n 's/^usage_usec //p' /sys/fs/cgroup/cpu.stat")
            .ok()
            .text();
        text.parse::<f64>().unwrap()
    };
    let (before, begin) = (used(), std::time::Instant::now());
    std::thread::sleep(std::time::Duration::from_secs(3));
    let share = (used() - before) / begin.elapsed().as_micros() as f64;
    assert!(share > 0.25 && share < 0.65, "{share:.2} of a processor");
}

#[test]
fn a_machine_stays_on_the_processors_of_the_host_that_it_is_given() {
    let hull = Hull::new();
    let container = hull.start(
        &["--cpuset-cpus", "0", "--memory-swap", "-1"],
        &["sleep", "1000"],
    );
    for process in ["machine", "sandbox"] {
        let pid = container.host_process(process).as_raw_nonzero();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(
            status.contains("Cpus_allowed_list:\t0\n"),
            "{process}: {status}"
        );
    }
    let asked = container.inspect()["HostConfig"].clone();
    assert_eq!(asked["CpusetCpus"], "0");
    assert_eq!(asked["MemorySwap"], -1);
    container.is_removed_by_force();
    for (options, said) in [
        (
            vec!["--cpuset-cpus", "1000"],
            "--cpuset-cpus: there is no processor 1000; there are 0",
        ),
        (vec!["--cpuset-cpus", "2-1"], "invalid processors \"2-1\""),
        (
            vec!["--memory-swap", "64m"],
            "--memory-swap: it needs --memory",
        ),
        (
            vec!["-m", "64m", "--memory-swap", "32m"],
            "memory and swap together are less than --memory",
        ),
    ] {
        hull.run(&options, &["true"]).fails(125, &[said]);
    }
    hull.assert_clean();
}
