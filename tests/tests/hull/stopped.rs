//! Containers that have ended, or are to end: what can be had of them, also after the host was
//! started anew, and commands that end several.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::time::{Duration, Instant};

use hull_tests::{Archive, Hull, eventually};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn files_are_copied_from_and_to_a_container_that_has_ended() {
    let hull = Hull::new();
    let scratch = hull.scratch();
    fs::create_dir(scratch.join("volume")).unwrap();
    let volume = format!("{}:/mnt/volume", scratch.join("volume").display());
    let script = "echo data >/root/result; ln /root/result /root/hard; chown 5:6 /root/result; \
                  ln -s / /root/top; chmod 711 /; echo v >/mnt/volume/file";
    let job = hull.container("job");
    hull.hull([
        "run",
        "--name",
        "job",
        "-v",
        volume.as_str(),
        "busybox",
        "sh",
        "-c",
        script,
    ])
    .run()
    .ok();
    let cp = |from: &str, to: &str| hull.hull(["cp", "-a", from, to]).run();
    let here = |name: &str| scratch.join(name).to_str().unwrap().to_owned();

    cp("job:/root", &here("root")).ok();
    let result = scratch.join("root/result");
    assert_eq!(fs::read_to_string(&result).unwrap(), "data\n");
    let metadata = fs::metadata(&result).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (5, 6));
    assert_eq!(metadata.nlink(), 2, "hard links are kept");
    cp("job:/mnt/volume/file", &here("of-volume")).ok();
    assert_eq!(fs::read_to_string(here("of-volume")).unwrap(), "v\n");
    // Links mean what they mean in the container.
    cp("job:/root/top/root/result", &here("by-link")).ok();
    assert_eq!(fs::read_to_string(here("by-link")).unwrap(), "data\n");
    cp("job:/nowhere", &here("x")).fails(1, &["/nowhere", "No such file"]);

    fs::write(here("new"), "new\n").unwrap();
    cp(&here("new"), "job:/root/top/etc/").ok();
    cp(&here("new"), "job:/mnt/volume/").ok();
    assert_eq!(
        fs::read_to_string(scratch.join("volume/new")).unwrap(),
        "new\n"
    );
    cp(&here("new"), "job:/no/such/place").fails(1, &["/no/such"]);
    let archive = Archive::new().file("by-tar", "tar\n").bytes();
    hull.hull(["cp", "-", "job:/etc"]).input(archive).run().ok();
    cp("job:/etc/new", &here("back")).ok();
    cp("job:/etc/by-tar", &here("by-tar")).ok();
    assert_eq!(fs::read_to_string(here("back")).unwrap(), "new\n");
    let listed = hull.hull(["cp", "job:/", "-"]).run().ok();
    let mut archive = tar::Archive::new(listed.stdout.as_slice());
    let first = archive.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(first.header().mode().unwrap() & 0o777, 0o711);

    job.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn files_are_copied_to_volumes_of_a_container_that_was_never_started() {
    let hull = Hull::new();
    let scratch = hull.scratch();
    fs::write(scratch.join("new"), "new\n").unwrap();
    fs::write(scratch.join("single"), "old\n").unwrap();
    let single = format!("{}:/etc/deep/single", scratch.join("single").display());
    let job = hull.container("job");
    hull.hull(["create", "--name", "job", "-v", "/srv/deep/volume", "-v"])
        .arg(&single)
        .args(["busybox", "cat", "/srv/deep/volume/new", "/etc/deep/single"])
        .run()
        .ok();
    let new = scratch.join("new").display().to_string();
    let cp = |from: &str, to: &str| hull.hull(["cp", from, to]).run();
    cp(&new, "job:/srv/deep/volume/").ok();
    let output = hull.hull(["start", "-a", "job"]).run().ok();
    assert_eq!(output.text(), "new\nold");
    hull.hull(["rm", "-v", "job"]).run().ok();
    drop(job);
    hull.assert_clean();
}

#[test]
fn a_read_only_container_that_has_ended_takes_no_files() {
    let hull = Hull::new();
    hull.hull(["run", "--name", "ro", "--read-only", "busybox", "true"])
        .run()
        .ok();
    hull.hull(["cp", "-", "ro:/root"])
        .input(Archive::new().file("x", "").bytes())
        .run()
        .fails(1, &["ead-only file system"]);
    hull.hull(["cp", "ro:/bin/busybox", "-"]).run().ok();
}

#[test]
fn files_are_copied_from_and_to_a_container_that_has_ended_without_root() {
    let hull = Hull::without_root();
    let script = "echo data >/root/result; chown 5:6 /root/result";
    hull.hull(["run", "--name", "job", "--network", "none", "busybox"])
        .args(["sh", "-c", script])
        .run()
        .ok();
    let listed = hull.hull(["cp", "job:/root/result", "-"]).run().ok();
    let mut archive = tar::Archive::new(listed.stdout.as_slice());
    let entry = archive.entries().unwrap().next().unwrap().unwrap();
    assert_eq!(entry.header().uid().unwrap(), 5);
    let archive = Archive::new().file("new", "new\n").bytes();
    hull.hull(["cp", "-", "job:/root"])
        .input(archive)
        .run()
        .ok();
    let copied = hull.hull(["cp", "job:/root/new", "-"]).run().ok();
    assert!(copied.text().contains("new"));
    hull.hull(["rm", "job"]).run().ok();
}

#[test]
fn nothing_planted_in_a_container_leads_a_copy_to_the_host() {
    let hull = Hull::new();
    let scratch = hull.scratch();
    fs::write(scratch.join("secret"), "secret").unwrap();
    let link = format!(
        "ln -s {} /link; ln -s ../../../../.. /up",
        scratch.display()
    );
    hull.hull(["run", "--name", "bad", "busybox", "sh", "-c", &link])
        .run()
        .ok();
    for path in [
        "link/secret".to_owned(),
        format!("up{}/secret", scratch.display()),
        format!("../../..{}/secret", scratch.display()),
    ] {
        hull.hull(["cp", "-L", &format!("bad:/{path}"), "-"])
            .run()
            .fails(1, &["No such file"]);
    }
    // Nor does one of the host, on the way in.
    symlink(scratch.join("secret"), scratch.join("to-secret")).unwrap();
    let source = scratch.join("to-secret");
    hull.hull(["cp", source.to_str().unwrap(), "bad:/root/link"])
        .run()
        .ok();
    hull.hull(["cp", "-L", "bad:/root/link", "-"])
        .run()
        .fails(1, &["No such file"]);
}

#[test]
fn containers_are_there_when_the_host_was_started_anew() {
    let hull = Hull::new();
    let script = "echo said; echo precious >/data";
    hull.hull(["run", "--name", "kept", "busybox", "sh", "-c", script])
        .run()
        .ok();
    let running = hull.sleeper();
    running.kill_host_process("sandbox");
    eventually("stopped", Duration::from_secs(10), || {
        running.state() == "stopped"
    });
    // Its control groups are gone as well.
    hull.hull(["rm", &running.name]).run().ok();
    let running = hull.sleeper();
    let status = hull.path("data/containers");
    let of_running = running.inspect()["Hull"]["id"].as_str().unwrap().to_owned();
    let written = fs::read(status.join(&of_running).join("status.json")).unwrap();
    hull.hull(["kill", &running.name]).run().ok();
    fs::write(status.join(&of_running).join("status.json"), written).unwrap();
    fs::remove_dir_all(hull.path("run")).unwrap();

    let mut names = hull.names();
    names.sort();
    let mut expected = ["kept".to_owned(), running.name.clone()];
    expected.sort();
    assert_eq!(names, expected);
    assert_eq!(running.state(), "stopped");
    assert_eq!(
        hull.container("kept").inspect()["Hull"]["exit"]["status"],
        0
    );
    assert_eq!(hull.hull(["logs", "kept"]).run().ok().text(), "said");
    let copied = hull.hull(["cp", "kept:/data", "-"]).run().ok();
    assert!(copied.text().contains("precious"));
    hull.hull(["image", "prune", "-af"]).run().ok();
    hull.hull(["image", "rm", "busybox"])
        .run()
        .fails(1, &["in use"]);
    hull.run(&[], &["true"]).ok();
    hull.hull(["rm", "kept", &running.name]).run().ok();
    hull.assert_clean();
}

#[test]
fn a_container_that_was_killed_can_be_removed_at_once() {
    let hull = Hull::new();
    for _ in 0..3 {
        let container = hull.sleeper();
        container.does("kill").ok();
        container.does("rm").ok();
    }
    // So can one whose processes are frozen.
    let container = hull.sleeper();
    container.does("pause").ok();
    container.does("kill").ok();
    container.does("rm").ok();
    // Its name is free when it removes itself.
    for _ in 0..2 {
        hull.start(&["--rm", "--name", "again"], &["sleep", "1000"]);
        hull.hull(["kill", "again"]).run().ok();
    }
    // Other signals end it when it wants.
    let script = "trap 'sleep 1; exit 3' TERM; echo ready; sleep 1000 & wait";
    let container = hull.start(&[], &["sh", "-c", script]);
    eventually("ready", Duration::from_secs(20), || {
        container.does("logs").ok().text().contains("ready")
    });
    hull.hull(["kill", "-s", "TERM", &container.name])
        .run()
        .ok();
    assert_eq!(container.wait(), 3);
    container.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn several_containers_are_stopped_at_the_same_time() {
    let hull = Hull::new();
    // They ignore the signal to stop.
    let names: Vec<String> = (0..4).map(|_| hull.sleeper().name).collect();
    let begin = Instant::now();
    let output = hull.hull(["stop", "-t", "4"]).args(&names).run().ok();
    let took = begin.elapsed();
    assert_eq!(output.text().lines().collect::<Vec<_>>(), names);
    assert!(
        took < Duration::from_secs(10),
        "one after the other: {took:?}"
    );
    let output = hull.hull(["wait"]).args(&names).run().ok();
    assert_eq!(output.text(), "137\n137\n137\n137");
    let output = hull.hull(["rm", "nobody"]).args(&names).run();
    let output = output.fails(1, &["no such container: nobody"]);
    assert_eq!(output.text().lines().count(), 4);
    hull.assert_clean();
}

#[test]
fn a_container_in_the_machine_of_one_that_was_killed_has_ended_and_starts_again() {
    let hull = Hull::new();
    let first = hull.start(&[], &["sleep", "1000"]);
    let network = format!("container:{}", first.name);
    let joined = hull.start(&["--network", &network], &["sleep", "1000"]);
    let pid = first.inspect()["Hull"]["processes"]["sandbox"].as_i64();
    let pid = Pid::from_raw(i32::try_from(pid.unwrap()).unwrap());
    kill_process(pid.unwrap(), Signal::KILL).unwrap();
    eventually("both have ended", Duration::from_secs(10), || {
        first.state() == "stopped" && joined.state() == "stopped"
    });
    first.does("start").ok();
    assert_eq!(joined.state(), "stopped", "its machine is another one now");
    joined.exec(&["true"]).fails(1, &["not running"]);
    joined.does("start").ok();
    joined.exec(&["true"]).ok();
    for container in [joined, first] {
        container.is_removed_by_force();
    }
    hull.assert_clean();
}

#[test]
fn an_image_that_is_removed_by_force_stays_for_its_containers() {
    let hull = Hull::new();
    let container = hull.start(&[], &["sleep", "1000"]);
    let removed = hull.hull(["rmi", "-f", "busybox"]).run().ok();
    assert!(!removed.text().contains("Deleted"), "{}", removed.text());
    hull.hull(["restart", "-t", "0", &container.name])
        .run()
        .ok();
    container.exec(&["true"]).ok();
    hull.hull(["rmi", "-f", "never-was"]).run().ok();
    container.is_removed_by_force();
    let left = hull.hull(["images", "-q"]).run().ok().text();
    hull.hull(["rmi", &left]).run().ok();
    hull.assert_clean();
}

#[test]
fn nothing_is_pruned_without_a_yes() {
    let hull = Hull::new();
    hull.hull(["create", "--name", "idle", "busybox"])
        .run()
        .ok();
    for answer in ["", "n\n", "yess\n"] {
        hull.hull(["container", "prune"]).input(answer).run().ok();
        assert!(hull.names().contains(&"idle".to_owned()), "{answer:?}");
    }
    hull.hull(["container", "prune"]).input("y\n").run().ok();
    assert!(hull.names().is_empty());
    hull.assert_clean();
}

#[test]
fn a_container_is_created_once_whatever_becomes_of_it() {
    let hull = Hull::new();
    hull.hull(["create", "--name", "job", "busybox", "true"])
        .run()
        .ok();
    for _ in 0..2 {
        hull.hull(["start", "-a", "job"]).run().ok();
    }
    hull.run(&["--name", "other"], &["true"]).ok();
    let actions = |name: &str| {
        let filter = format!("container={name}");
        let events = [
            "events", "--since", "1h", "--until", "now", "--filter", &filter,
        ];
        let events = hull.hull(events).args(["--format", "{{.Action}}"]);
        events.run().ok().text().replace('\n', " ")
    };
    assert_eq!(actions("job"), "create start die start die");
    hull.hull(["rm", "job"]).run().ok();
    hull.assert_clean();
}

#[test]
fn a_volume_over_etc_does_not_hide_names_and_name_servers() {
    let hull = Hull::networked("uml");
    let show = |host: &str, volume: &str| {
        let options = [
            "--hostname",
            host,
            "-v",
            volume,
            "--add-host",
            "foo:192.0.2.7",
        ];
        let script =
            "cat /etc/hostname; grep -c foo /etc/hosts; test -s /etc/resolv.conf && echo ok";
        hull.run(&options, &["sh", "-c", script]).ok().text()
    };
    assert_eq!(show("one", "etc:/etc"), "one\n1\nok");
    assert_eq!(show("two", "etc:/etc"), "two\n1\nok");
    assert_eq!(show("three", "empty:/etc:nocopy"), "three\n1\nok");
    hull.hull(["volume", "rm", "etc", "empty"]).run().ok();
    // A directory of the host that is not there is created, as Docker does.
    let there = hull.path("deep/er");
    let volume = format!("{}:/v", there.display());
    hull.run(&["-v", &volume], &["touch", "/v/file"]).ok();
    assert!(there.join("file").exists());
    let mount = format!("type=bind,source={}/no,target=/v", there.display());
    hull.run(&["--mount", &mount], &["true"])
        .fails(125, &["does not exist"]);
    hull.assert_clean();
}

#[test]
fn an_image_of_a_container_has_the_ports_and_the_check_of_its_options() {
    let hull = Hull::new();
    let options = [
        "--name",
        "made",
        "--platform",
        "linux",
        "--expose",
        "7000-7001/udp",
        "--health-cmd",
        "true",
    ];
    hull.hull(["create"])
        .args(options)
        .arg("busybox")
        .run()
        .fails(125, &["--platform"]);
    let platform = match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        _ => "linux/arm64",
    };
    let options = options.map(|word| if word == "linux" { platform } else { word });
    hull.hull(["create"])
        .args(options)
        .arg("busybox")
        .run()
        .ok();
    hull.hull(["commit", "made", "made:1"]).run().ok();
    let inspect = ["image", "inspect", "made:1"];
    let config = hull.hull(inspect).run().ok().json()[0]["Config"].clone();
    assert_eq!(
        config["ExposedPorts"],
        serde_json::json!({"7000/udp": {}, "7001/udp": {}})
    );
    assert_eq!(
        config["Healthcheck"]["Test"],
        serde_json::json!(["CMD-SHELL", "true"])
    );
    hull.hull(["rm", "made"]).run().ok();
    hull.hull(["rmi", "made:1"]).run().ok();
    hull.hull(["run", "--no-healthcheck", "--health-cmd", "true", "busybox"])
        .run()
        .fails(125, &["--no-healthcheck"]);
    hull.assert_clean();
}
