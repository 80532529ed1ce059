//! Containers that last: created, started, started again, renamed.

use std::fs;
use std::time::Duration;

use hull_tests::{Archive, Hull, Invocation, descendants, eventually, on_every_machine};

on_every_machine!(a_container_is_created_started_and_started_again_with_what_it_wrote);

fn a_container_is_created_started_and_started_again_with_what_it_wrote(machine: &'static str) {
    let hull = Hull::on(machine);
    let script = "echo run; cat /kept 2>/dev/null; echo more >>/kept; exit 7";
    let created = hull
        .hull([
            "create", "--name", "job", "-e", "A=b", "busybox", "sh", "-c", script,
        ])
        .run()
        .ok();
    let job = hull.container("job");
    assert_eq!(job.inspect()["Hull"]["id"], created.text());
    assert_eq!(job.state(), "created");
    assert_eq!(hull.names(), ["job"]);
    assert_eq!(hull.hull(["ps", "-q"]).run().ok().text(), "");
    hull.hull(["exec", "job", "true"])
        .run()
        .fails(1, &["container job is not running: it is created"]);
    assert_eq!(job.does("wait").ok().text(), "0");
    assert_eq!(job.does("stop").ok().text(), "job");

    let start = || hull.hull(["start", "--attach", "job"]).run();
    assert_eq!(start().ends(7).text(), "run");
    assert_eq!(job.state(), "stopped");
    assert_eq!(start().ends(7).text(), "run\nmore");
    assert_eq!(job.does("start").ok().text(), "job");
    assert_eq!(job.does("wait").ok().text(), "7");
    // One log, whatever number of starts.
    assert_eq!(
        job.does("logs").ok().text(),
        "run\nrun\nmore\nrun\nmore\nmore"
    );
    job.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn a_container_that_runs_is_not_started_twice() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let before = container.inspect()["Hull"]["started"].clone();
    container.does("start").ok();
    assert_eq!(container.inspect()["Hull"]["started"], before);
    container.does("pause").ok();
    container
        .does("start")
        .fails(1, &["cannot start container", "it is paused"]);
    container.does("unpause").ok();
    container.is_removed_by_force();
    hull.hull(["start", "nobody"])
        .run()
        .fails(1, &["no such container: nobody"]);
}

#[test]
fn many_starts_of_one_container_at_once_start_it_once() {
    let hull = Hull::new();
    hull.hull([
        "create",
        "--name",
        "one",
        "busybox",
        "sh",
        "-c",
        "echo begin; sleep 1000",
    ])
    .run()
    .ok();
    std::thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| hull.hull(["start", "one"]).run().ok());
        }
    });
    let one = hull.container("one");
    eventually("it printed", Duration::from_secs(10), || {
        one.does("logs").ok().text() == "begin"
    });
    one.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_container_is_restarted_with_its_network_and_the_containers_that_share_it_go_on() {
    let hull = Hull::networked("uml");
    let container = hull.start(&["-p", "127.0.0.1:0:80"], &["sleep", "1000"]);
    let joined = hull.start(
        &["--network", &format!("container:{}", container.name)],
        &["sleep", "1000"],
    );
    let ports = container.inspect()["Hull"]["ports"].clone();
    assert_ne!(ports, serde_json::json!([]));
    let shown = container.does("port").ok().text();
    assert!(shown.starts_with("80/tcp -> 127.0.0.1:"), "{shown}");
    let begun = container.inspect()["Hull"]["started"].clone();
    hull.hull(["restart", "-t", "0", &container.name])
        .run()
        .ok();
    assert_ne!(container.inspect()["Hull"]["started"], begun);
    container.address();
    joined.exec(&["true"]).ok();
    hull.hull(["restart", "-t", "0", &joined.name]).run().ok();
    assert_eq!(joined.addresses(), container.addresses());
    joined.is_removed_by_force();
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_start_that_fails_leaves_the_container_as_it_was() {
    let hull = Hull::new();
    let directory = hull.scratch().join("volume");
    fs::create_dir(&directory).unwrap();
    let volume = format!("{}:/v", directory.display());
    hull.hull([
        "create", "--name", "job", "-v", &volume, "busybox", "/nothing",
    ])
    .run()
    .ok();
    let job = hull.container("job");
    for _ in 0..2 {
        job.does("start").fails(127, &["/nothing"]);
        assert_eq!(job.state(), "created");
    }
    fs::remove_dir(&directory).unwrap();
    job.does("start")
        .fails(125, &["host path", "of a volume does not exist"]);
    job.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn a_container_survives_a_reboot_and_is_started_again() {
    let hull = Hull::new();
    let container = hull.start(&[], &["sh", "-c", "echo x >>/data; cat /data; sleep 1000"]);
    eventually("it printed", Duration::from_secs(10), || {
        container.does("logs").ok().text() == "x"
    });
    container.kill_host_process("sandbox");
    eventually("it is down", Duration::from_secs(10), || {
        container.state() == "stopped"
    });
    // /run is a tmpfs.
    fs::remove_dir_all(hull.path("run")).unwrap();
    container.does("start").ok();
    eventually("it printed again", Duration::from_secs(10), || {
        container.does("logs").ok().text() == "x\nx\nx"
    });
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_container_has_one_name_at_a_time() {
    let hull = Hull::new();
    let create = |name: &str| {
        hull.hull(["create", "--name", name, "busybox", "true"])
            .run()
    };
    create("one").ok();
    create("two").ok();
    hull.hull(["rename", "one", "two"])
        .run()
        .fails(125, &["\"two\" is in use"]);
    hull.hull(["rename", "one", "three"]).run().ok();
    create("one").ok();
    let mut names = hull.names();
    names.sort();
    assert_eq!(names, ["one", "three", "two"]);
    hull.hull(["container", "prune", "-f"]).run().ok();
    hull.assert_clean();
}

#[test]
fn the_id_of_a_container_is_written_to_a_file_that_did_not_exist() {
    let hull = Hull::new();
    let file = hull.scratch().join("id");
    let path = file.to_str().unwrap();
    let id = hull
        .hull(["create", "--cidfile", path, "--name", "with-id", "busybox"])
        .run()
        .ok()
        .text();
    assert_eq!(fs::read_to_string(&file).unwrap(), id);
    hull.run(&["--cidfile", path], &["true"])
        .fails(125, &["--cidfile", "exists"]);
    fs::remove_file(&file).unwrap();
    hull.run(&["--cidfile", path], &["/nothing"]).ends(127);
    assert!(!file.exists(), "there is no container");
    hull.container("with-id").does("rm").ok();
}

#[test]
fn files_are_copied_to_a_container_before_its_first_start() {
    let hull = Hull::new();
    hull.hull(["create", "--name", "job", "busybox", "cat", "/etc/given"])
        .run()
        .ok();
    let archive = Archive::new().file("given", "given\n").bytes();
    hull.hull(["cp", "-", "job:/etc"]).input(archive).run().ok();
    let output = hull.hull(["start", "-a", "job"]).run().ok();
    assert_eq!(output.text(), "given");
    hull.container("job").does("rm").ok();
}

/// Waits until a container has been started again so often.
fn is_restarted(hull: &Hull, name: &str, times: u64) {
    eventually("it is started again", Duration::from_secs(20), || {
        hull.container(name).inspect()["Hull"]["restarts"]
            .as_u64()
            .unwrap_or_default()
            >= times
    });
}

#[test]
fn a_container_that_fails_is_started_again_as_often_as_was_asked_for() {
    let hull = Hull::new();
    let options = [
        "run",
        "-d",
        "--name",
        "job",
        "--restart",
        "on-failure:2",
        "busybox",
    ];
    hull.hull(options)
        .args(["sh", "-c", "echo run; exit 3"])
        .run()
        .ok();
    let job = hull.container("job");
    eventually(
        "it was started three times",
        Duration::from_secs(20),
        || job.does("logs").ok().text() == "run\nrun\nrun",
    );
    eventually("it is left alone", Duration::from_secs(10), || {
        hull.hull(["rm", "job"]).run().status == 0
    });
    hull.assert_clean();
}

#[test]
fn a_container_that_ended_well_is_not_started_again_on_failure() {
    let hull = Hull::new();
    let options = [
        "run",
        "--name",
        "job",
        "--restart",
        "on-failure",
        "busybox",
        "true",
    ];
    hull.hull(options).run().ok();
    eventually("it is left alone", Duration::from_secs(10), || {
        hull.hull(["rm", "job"]).run().status == 0
    });
    hull.assert_clean();
}

#[test]
fn a_container_that_is_always_started_again_stays_down_when_a_person_stops_it() {
    let hull = Hull::new();
    let container = hull.start(&["--restart", "always"], &["sleep", "1000"]);
    container.kill_host_process("machine");
    is_restarted(&hull, &container.name, 1);
    eventually("it runs", Duration::from_secs(10), || {
        container.state() == "running"
    });
    container.exec(&["kill", "-9", "1"]);
    container.kill_host_process("sandbox");
    is_restarted(&hull, &container.name, 2);
    eventually("it runs", Duration::from_secs(10), || {
        container.state() == "running"
    });
    hull.hull(["stop", "-t", "0", &container.name]).run().ok();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(container.state(), "stopped");
    container.does("start").ok();
    container.kill_host_process("machine");
    is_restarted(&hull, &container.name, 1);
    hull.hull(["restart", "-t", "0", &container.name])
        .run()
        .ok();
    assert_eq!(container.state(), "running");
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_container_that_waits_to_be_started_again_is_stopped_and_removed() {
    let hull = Hull::new();
    let container = hull.start(&["--restart", "always"], &["false"]);
    // The waits become longer.
    is_restarted(&hull, &container.name, 3);
    hull.hull(["stop", &container.name]).run().ok();
    container.does("rm").ok();
    let container = hull.start(&["--restart", "always"], &["false"]);
    is_restarted(&hull, &container.name, 3);
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn containers_are_started_at_boot_as_their_policies_say() {
    let hull = Hull::new();
    for policy in ["no", "on-failure", "always", "unless-stopped"] {
        let options = [
            "run",
            "-d",
            "--name",
            policy,
            "--restart",
            policy,
            "busybox",
        ];
        hull.hull(options).args(["sleep", "1000"]).run().ok();
    }
    let options = [
        "run",
        "-d",
        "--name",
        "stopped",
        "--restart",
        "unless-stopped",
        "busybox",
    ];
    hull.hull(options).args(["sleep", "1000"]).run().ok();
    hull.hull(["stop", "-t", "0", "stopped"]).run().ok();
    // As the unit does when the host goes down.
    hull.hull(["stop", "-t", "0", "--all", "--until-boot"])
        .run()
        .ok();
    assert_eq!(hull.hull(["ps", "-q"]).run().ok().text(), "");
    fs::remove_dir_all(hull.path("run")).unwrap();
    let mut started: Vec<String> = hull
        .hull(["start", "--at-boot"])
        .run()
        .ok()
        .text()
        .lines()
        .map(str::to_owned)
        .collect();
    started.sort();
    assert_eq!(started, ["always", "on-failure", "unless-stopped"]);
    hull.hull(["rm", "-f", "--all"]).run().ok();
    hull.assert_clean();
}

#[test]
fn a_container_is_started_again_for_a_person_without_root() {
    let hull = Hull::without_root();
    let container = hull.start(
        &["--restart", "always", "--network", "none"],
        &["sleep", "1000"],
    );
    container.kill_host_process("machine");
    is_restarted(&hull, &container.name, 1);
    eventually("it runs", Duration::from_secs(10), || {
        container.state() == "running"
    });
    container.exec(&["true"]).ok();
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_restart_policy_that_makes_no_sense_is_named() {
    let hull = Hull::new();
    hull.run(&["--restart", "always"], &["true"])
        .fails(125, &["--rm and --restart"]);
    for policy in ["sometimes", "always:3", "on-failure:x"] {
        hull.hull(["create", "--restart", policy, "busybox"])
            .run()
            .fails(125, &["--restart: invalid restart policy", policy]);
    }
}

#[test]
fn the_health_of_a_container_is_known() {
    let hull = Hull::new();
    let container = hull.start(
        &[
            "--health-cmd",
            "echo checked; test -e /healthy",
            "--health-interval",
            "100ms",
            "--health-retries",
            "2",
        ],
        &["sleep", "1000"],
    );
    let status = || {
        let health = container.inspect()["State"]["Health"].clone();
        health["Status"].as_str().unwrap_or_default().to_owned()
    };
    let becomes = |wanted: &str| {
        eventually(wanted, Duration::from_secs(20), || status() == wanted);
    };
    becomes("unhealthy");
    let log = container.inspect()["State"]["Health"]["Log"].clone();
    assert_eq!(log[0]["Output"], "checked\n");
    assert_eq!(log[0]["ExitCode"], 1);
    container.exec(&["touch", "/healthy"]).ok();
    becomes("healthy");
    let listed = hull.hull(["ps", "-f", "health=healthy"]).run().ok().text();
    assert!(listed.contains("(healthy)"), "{listed}");
    let none = hull.hull(["ps", "-q", "-f", "health=unhealthy"]).run().ok();
    assert_eq!(none.text(), "");
    // Nothing can be executed in a paused container: that is no failure.
    container.does("pause").ok();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(status(), "healthy");
    container.does("unpause").ok();
    let events = hull
        .hull(["events", "--since", "1h", "--until", "now"])
        .args(["--filter", "type=health_status"])
        .run()
        .ok()
        .text();
    assert!(
        events.contains("status=unhealthy") && events.contains("status=healthy"),
        "{events}"
    );
    hull.hull(["stop", "-t", "0", &container.name]).run().ok();
    assert_eq!(status(), "");
    container.does("start").ok();
    becomes("healthy");
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn a_health_check_that_takes_too_long_has_failed_and_is_ended() {
    let hull = Hull::new();
    let options = [
        "--health-cmd=sleep 77",
        "--health-interval=100ms",
        "--health-timeout=300ms",
        "--health-retries=1",
    ];
    let container = hull.start(&options, &["sleep", "1000"]);
    eventually("it is unhealthy", Duration::from_secs(20), || {
        container.inspect()["State"]["Health"]["Status"] == "unhealthy"
    });
    let log = container.inspect()["State"]["Health"]["Log"].clone();
    let output = log[0]["Output"].as_str().unwrap().to_owned();
    assert!(output.contains("exceeded timeout"), "{output}");
    let checks = || {
        let processes = container.sh("ps | grep -c '[s]leep 77' || true").ok();
        processes.text().parse::<u32>().unwrap()
    };
    eventually("few are left", Duration::from_secs(10), || checks() <= 1);
    container.is_removed_by_force();
    hull.run(&["--health-interval", "1s"], &["true"])
        .fails(125, &["no health check"]);
    hull.assert_clean();
}

#[test]
fn a_privileged_container_may_do_everything_in_its_guest() {
    let hull = Hull::new();
    let script = "mkdir /m; mount -t tmpfs x /m && echo mounted; \
                  echo 17 >/proc/sys/vm/swappiness && cat /proc/sys/vm/swappiness; \
                  dd if=/dev/zero of=/d bs=1M count=8 2>/dev/null; mke2fs /d >/dev/null 2>&1; \
                  test -c /dev/net/tun && echo tunnels; grep CapEff /proc/self/status";
    let output = hull.sh(&["--privileged"], script).ok().text();
    assert!(output.contains("mounted\n17\ntunnels"), "{output}");
    assert!(output.contains("1ffffffffff"), "{output}");
    hull.sh(&[], "mount -t tmpfs x /mnt").ends(1);
}

#[test]
fn further_options_of_docker_mean_what_they_mean_there() {
    let hull = Hull::new();
    let groups = hull.sh(
        &["--group-add", "7", "--group-add", "42", "-u", "5:6"],
        "id -G",
    );
    assert_eq!(groups.ok().text(), "6 7 42");
    let labels = hull.scratch().join("labels");
    fs::write(&labels, "# comment\na=b\n\nc=d\n").unwrap();
    let container = hull.start(
        &[
            "--label-file",
            labels.to_str().unwrap(),
            "--stop-timeout",
            "0",
            "-c",
            "512",
        ],
        &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
    );
    assert_eq!(container.inspect()["Hull"]["labels"]["c"], "d");
    let begin = std::time::Instant::now();
    container.does("stop").ok();
    assert!(begin.elapsed() < Duration::from_secs(8));
    let name = container.name.clone();
    hull.hull([
        "run",
        "-d",
        "--replace",
        "--name",
        &name,
        "busybox",
        "sleep",
        "1000",
    ])
    .run()
    .ok();
    assert_eq!(container.state(), "running");
    container.is_removed_by_force();
}

/// A container that ends again and again, and is started each time.
fn restless(hull: &Hull) -> String {
    let name = hull.unique("r");
    hull.hull(["run", "-d", "--restart", "always", "--name", &name])
        .args(["busybox", "true"])
        .run()
        .ok();
    name
}

#[test]
fn a_container_that_restarts_all_the_time_can_be_stopped_started_and_removed_at_any_moment() {
    let hull = Hull::new();
    for round in 0..8 {
        let name = restless(&hull);
        let container = hull.container(&name);
        std::thread::sleep(Duration::from_millis(40 * round));
        container.does("stop").ok();
        assert_eq!(container.state(), "stopped", "round {round}");
        let restarts = container.inspect()["RestartCount"].clone();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(container.state(), "stopped", "round {round}");
        assert_eq!(container.inspect()["RestartCount"], restarts);
        container.does("start").ok();
        std::thread::sleep(Duration::from_millis(30 * round));
        container.is_removed_by_force();
        hull.assert_clean();
    }
}

#[test]
fn a_supervisor_leaves_no_zombies() {
    let hull = Hull::new();
    let name = restless(&hull);
    let container = hull.container(&name);
    eventually("it was restarted", Duration::from_secs(20), || {
        container.inspect()["RestartCount"].as_u64() >= Some(3)
    });
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let is_its = |command: &str| command.contains("supervisor-process") && command.contains(&id);
    let (pid, _) = descendants()
        .into_iter()
        .find(|(_, command)| is_its(command))
        .expect("a supervisor");
    let zombies = || {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let is_zombie = |child: &&str| {
            let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
            stat.contains(") Z ")
        };
        children.split_whitespace().filter(is_zombie).count()
    };
    eventually("no zombie is left", Duration::from_secs(5), || {
        zombies() == 0
    });
    container.is_removed_by_force();
    hull.assert_clean();
}

#[test]
fn looking_at_what_was_never_started_changes_nothing() {
    let hull = Hull::new();
    hull.hull([
        "create", "--name", "new", "busybox", "stat", "-c", "%a %u", "/",
    ])
    .run()
    .ok();
    let image = hull.run(&[], &["stat", "-c", "%a %u", "/"]).ok().text();
    assert_eq!(hull.container("new").does("diff").ok().text(), "");
    let started = hull.hull(["start", "-a", "new"]).run().ok();
    assert_eq!(started.text(), image);
}

#[test]
fn a_unit_of_systemd_starts_and_stops_one_container() {
    let hull = Hull::new();
    let script = "trap 'echo stopped; exit 0' TERM; echo up; while :; do sleep 0.1; done";
    hull.hull(["create", "--name", "job", "busybox", "sh", "-c", script])
        .run()
        .ok();
    let unit = hull.hull(["generate", "systemd", "job"]).run().ok().text();
    let command = |key: &str| {
        let mut lines = unit.lines();
        let line = lines.find_map(|line| line.strip_prefix(key)).unwrap();
        // As systemd splits it: words, of which one is quoted.
        let words: Vec<String> = line.split(' ').map(|word| word.replace('"', "")).collect();
        Invocation::new(&words[0])
            .args(&words[1..])
            .env("HULL_CONFIG", hull.path("config.toml"))
    };
    let mut started = command("ExecStart=").start();
    started.wait_for("up");
    command("ExecStop=").run().ok();
    assert_eq!(started.finish().ok().text(), "up\nstopped");
    hull.hull(["update", "--restart", "always", "job"])
        .run()
        .ok();
    hull.hull(["generate", "systemd", "job"])
        .run()
        .fails(125, &["has --restart"])
        .hint("hull update --restart no job");
    hull.hull(["rm", "-f", "job"]).run().ok();
    hull.assert_clean();
}
