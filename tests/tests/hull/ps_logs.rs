//! What containers do and did: `ps`, `logs`, `inspect`, `wait`, `stop`, `kill`, `rm`, `stats`,
//! `attach`.

use std::time::{Duration, Instant};

use hull_tests::{Hull, on_every_machine};

on_every_machine!(
    stop_ends_a_container_and_rm_removes_it,
    stats_show_what_is_used_inside_and_what_it_costs_outside
);

fn stop_ends_a_container_and_rm_removes_it(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(
        &[],
        &[
            "sh",
            "-c",
            "trap 'exit 5' TERM; touch /tmp/ready; while :; do sleep 0.05; done",
        ],
    );
    container
        .sh("until [ -e /tmp/ready ]; do sleep 0.05; done")
        .ok();
    container.does("rm").fails(1, &["running"]).hint("rm -f");
    container.does("stop").ok();
    assert_eq!(container.state(), "stopped");
    assert_eq!(container.wait(), 5);
    assert_eq!(container.inspect()["Hull"]["exit"]["status"], 5);
    container.does("stop").ok();
    container.does("rm").ok();
    hull.assert_clean();
    container.does("rm").fails(1, &["no such container"]);
}

fn stats_show_what_is_used_inside_and_what_it_costs_outside(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(&["-m", "128m"], &["sleep", "1000"]);
    let stats = hull
        .hull(["stats", "--no-stream", "--json", &container.name])
        .run()
        .ok()
        .json();
    let stats = &stats[0];
    assert_eq!(stats["name"], container.name.as_str());
    assert_eq!(stats["memory"]["limit"], 128 << 20);
    assert_eq!(stats["pids"]["current"], 1);
    let host = stats["host_memory_total"].as_u64().unwrap();
    let parts: u64 = ["sandbox", "devices", "machine"]
        .iter()
        .map(|part| stats["host_memory"][part].as_u64().unwrap())
        .sum();
    assert_eq!(host, parts);
    assert!(host > 1 << 20 && host < 512 << 20, "{host} bytes");
    let table = hull.hull(["stats", "--no-stream"]).run().ok().text();
    assert!(
        table.contains("HOST MEM") && table.contains(&container.name),
        "{table}"
    );
}

#[test]
fn ps_lists_running_containers_and_with_a_all() {
    let hull = Hull::new();
    let running = hull.start(&["--label", "role=web"], &["sleep", "1000"]);
    let ended = hull.start(&[], &["sh", "-c", "exit 3"]);
    ended.wait();
    let table = hull.hull(["ps"]).run().ok().text();
    assert!(
        table.contains(&running.name) && !table.contains(&ended.name),
        "{table}"
    );
    assert!(table.contains("Up ") && table.contains("uml"), "{table}");
    let table = hull.hull(["ps", "-a"]).run().ok().text();
    assert!(table.contains("Exited (3)"), "{table}");
    let names = |filter: &str| {
        let list = hull
            .hull(["ps", "-a", "--json", "--filter", filter])
            .run()
            .ok()
            .json();
        list.as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names("label=role=web"), [running.name.as_str()]);
    assert_eq!(names("status=exited"), [ended.name.as_str()]);
    assert_eq!(names("exited=3"), [ended.name.as_str()]);
    assert_eq!(names("ancestor=busybox").len(), 2);
    hull.hull(["ps", "--filter", "colour=blue"])
        .run()
        .fails(125, &["colour"]);
}

#[test]
fn logs_keep_both_streams_apart_and_in_order() {
    let hull = Hull::new();
    let container = hull.start(&[], &["sh", "-c", "echo one; echo two >&2; printf three"]);
    container.wait();
    let output = container.does("logs").ok();
    assert_eq!(output.text(), "one\nthree");
    assert_eq!(output.error(), "two\n");
}

#[test]
fn logs_can_be_limited_and_followed() {
    let hull = Hull::new();
    let script =
        "echo a; echo b; echo c; until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5; echo d";
    let container = hull.start(&[], &["sh", "-c", script]);
    let tail = |n: &str| {
        hull.hull(["logs", "--tail", n, &container.name])
            .run()
            .ok()
            .text()
    };
    hull_tests::eventually("three lines", Duration::from_secs(5), || {
        tail("all") == "a\nb\nc"
    });
    assert_eq!(tail("2"), "b\nc");
    assert_eq!(tail("0"), "");
    let mut following = hull
        .hull(["logs", "-f", "--tail", "1", &container.name])
        .start();
    following.wait_for("c\n");
    container.sh("touch /tmp/go").ok();
    assert_eq!(
        following.finish().ok().text(),
        "c\nd",
        "follows to the end of the container"
    );
    let since = |time: &str| {
        hull.hull(["logs", "--since", time, &container.name])
            .run()
            .ok()
            .text()
    };
    assert_eq!(since("1h"), "a\nb\nc\nd");
    assert_eq!(since("2100-01-01T00:00:00Z"), "");
}

#[test]
fn wait_prints_the_exit_status_when_the_container_ends() {
    let hull = Hull::new();
    let container = hull.start(
        &[],
        &[
            "sh",
            "-c",
            "until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5; exit 4",
        ],
    );
    let mut waiting = hull.hull(["wait", &container.name]).start();
    container.sh("sleep 0.2").ok();
    assert!(waiting.is_running());
    container.sh("touch /tmp/go").ok();
    assert_eq!(waiting.finish().ok().text(), "4");
    assert_eq!(container.wait(), 4, "and at once when it has ended already");
}

#[test]
fn stop_kills_after_its_time_and_kill_at_once() {
    let hull = Hull::new();
    let stubborn = [
        "sh",
        "-c",
        "trap '' TERM; echo ready; while :; do sleep 1; done",
    ];
    let container = hull.start(&[], &stubborn);
    hull_tests::eventually("ready", Duration::from_secs(5), || {
        container.does("logs").ok().text() == "ready"
    });
    let begin = Instant::now();
    hull.hull(["stop", "-t", "1", &container.name]).run().ok();
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_secs(1) && took < Duration::from_secs(5),
        "{took:?}"
    );
    assert_eq!(container.wait(), 137);

    let container = hull.start(
        &[],
        &[
            "sh",
            "-c",
            "trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done",
        ],
    );
    hull_tests::eventually("ready", Duration::from_secs(5), || {
        container.does("logs").ok().text() == "ready"
    });
    hull.hull(["kill", "-s", "HUP", &container.name]).run().ok();
    hull_tests::eventually("the signal", Duration::from_secs(5), || {
        container.does("logs").ok().text().contains("hup")
    });
    assert_eq!(container.state(), "running");
    container.does("kill").ok();
    assert_eq!(container.wait(), 137);
    container.does("kill").fails(1, &["not running"]);
    hull.hull(["kill", "-s", "NOSUCH", &container.name])
        .run()
        .fails(125, &["NOSUCH"]);
}

#[test]
fn rm_with_force_ends_and_removes_whatever_state_it_is_in() {
    let hull = Hull::new();
    let running = hull.sleeper();
    let paused = hull.sleeper();
    paused.does("pause").ok();
    let ended = hull.start(&[], &["true"]);
    ended.wait();
    hull.hull([
        "rm",
        "-f",
        &running.name,
        &paused.name,
        &ended.name,
        "never-was",
    ])
    .run()
    .ok();
    assert!(hull.names().is_empty());
    hull.assert_clean();
}

#[test]
fn containers_are_found_by_the_beginning_of_their_id() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let id = container.inspect()["Hull"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    hull.hull(["exec", &id[..12], "true"]).run().ok();
    hull.hull(["exec", &id, "true"]).run().ok();
    hull.hull(["exec", &id[..4], "true"]).run().ok();
}

#[test]
fn inspect_says_all_that_is_known() {
    let hull = Hull::new();
    let directory = hull.scratch();
    let volume = format!("{}:/data:ro", directory.display());
    let container = hull.start(
        &["-v", &volume, "-m", "64m", "--cpus", "1"],
        &["sleep", "1000"],
    );
    let inspected = container.inspect();
    assert_eq!(inspected["Hull"]["name"], container.name.as_str());
    assert_eq!(inspected["Hull"]["image"], "busybox");
    assert_eq!(inspected["Hull"]["state"], "running");
    assert_eq!(inspected["Hull"]["machine"], "uml");
    assert_eq!(inspected["Hull"]["volumes"][0], volume.as_str());
    assert_eq!(
        inspected["Hull"]["command"],
        serde_json::json!(["sleep", "1000"])
    );
    assert_eq!(
        inspected["Hull"]["spec"]["linux"]["resources"]["memory"]["limit"],
        64 << 20
    );
    hull.hull(["inspect", "never-was"]).run().ends(1);
}

#[test]
fn attach_shows_output_from_now_on_and_ends_with_the_container() {
    let hull = Hull::new();
    let container = hull.start(
        &["-i"],
        &[
            "sh",
            "-c",
            "echo before; while read line; do echo got $line; [ $line != end ] || exit 6; done",
        ],
    );
    hull_tests::eventually("first line", Duration::from_secs(5), || {
        container.does("logs").ok().text() == "before"
    });
    let mut attached = hull.hull(["attach", &container.name]).start();
    attached.write("hello\n");
    attached.wait_for("got hello");
    attached.write("end\n");
    let output = attached.finish().ends(6);
    assert!(!output.text().contains("before"), "{}", output.text());
    container.does("attach").fails(1, &["stopped"]);
}

#[test]
fn a_container_is_removed_although_somebody_does_not_read_its_output() {
    let hull = Hull::new();
    let name = hull.unique("c");
    // Its output is a pipe that is full soon.
    let (command, _) = hull
        .hull(["run", "--name", &name, "busybox", "yes"])
        .into_parts();
    let mut command = command;
    let mut reader = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let container = hull.container(&name);
    hull_tests::eventually("it runs", Duration::from_secs(10), || {
        hull.names().contains(&name) && container.state() == "running"
    });
    std::thread::sleep(Duration::from_millis(300));
    hull.hull(["stop", "-t", "0", &name]).run().ok();
    let removed = container.does("rm").ok();
    assert!(removed.took < Duration::from_secs(5), "{:?}", removed.took);
    assert!(hull.names().is_empty());
    reader.kill().unwrap();
    reader.wait().unwrap();
    hull.assert_clean();
}

#[test]
fn output_is_kept_as_asked_for() {
    let hull = Hull::new();
    let silent = hull.start(&["--log-driver", "none"], &["echo", "unseen"]);
    assert_eq!(silent.wait(), 0);
    silent
        .does("logs")
        .fails(1, &["nothing is kept of the output", "--log-driver none"]);
    assert_eq!(silent.inspect()["HostConfig"]["LogConfig"]["Type"], "none");
    let id = silent.inspect()["Hull"]["id"].as_str().unwrap().to_owned();
    let log = hull.path("data/containers").join(id).join("log");
    assert!(!log.exists());

    let options = ["--log-driver", "json-file", "--log-opt", "max-size=20k"];
    let short = hull.start(&options, &["seq", "1", "100000"]);
    assert_eq!(short.wait(), 0);
    let output = short.does("logs").ok();
    assert!(output.error().contains("the beginning is lost"));
    assert!(output.text().ends_with("\n100000"));
    hull.run(&["--log-driver", "syslog"], &["true"])
        .fails(125, &["not supported: log driver \"syslog\""]);
    hull.run(&["--log-opt", "labels-regex=x"], &["true"])
        .fails(125, &["not supported: log option \"labels-regex=x\""]);
}

#[test]
fn logs_show_what_is_kept_beside_lines() {
    let hull = Hull::new();
    let kept = [
        "--log-opt",
        "labels=role",
        "--log-opt",
        "env=PLACE",
        "--log-opt",
        "tag={{.Name}}",
        "--log-opt",
        "max-file=3",
    ];
    let own = ["--label", "role=front", "-e", "PLACE=here"];
    let container = hull.start(&[&kept[..], &own].concat(), &["sh", "-c", "echo a; echo b"]);
    assert_eq!(container.wait(), 0);
    let details = hull
        .hull(["logs", "--details", &container.name])
        .run()
        .ok()
        .text();
    let each = format!("PLACE=here,role=front,tag={}", container.name);
    assert_eq!(details, format!("{each} a\n{each} b"));
    let config = container.inspect()["HostConfig"]["LogConfig"]["Config"].clone();
    assert_eq!(config["tag"], "{{.Name}}");
    // Of one that was never started.
    let create = [
        "create",
        "--name",
        "idle",
        "--log-opt",
        "env=PLACE",
        "busybox",
    ];
    hull.hull(create).run().ok();
    hull.hull(["logs", "--details", "idle"]).run().ok();
    // What cannot be kept is told before anything is replaced.
    hull.hull([
        "run",
        "--replace",
        "--name",
        "idle",
        "--log-driver",
        "syslog",
        "busybox",
    ])
    .run()
    .fails(125, &["syslog"]);
    assert!(hull.names().contains(&"idle".to_owned()));
}

#[test]
fn run_attaches_what_it_is_told_to() {
    let hull = Hull::new();
    let run = |options: &[&str]| {
        let cat = if options.contains(&"-i") {
            "cat"
        } else {
            "true"
        };
        let script = format!("echo output; echo error >&2; {cat}");
        let run = [&["run", "--rm"], options, &["busybox", "sh", "-c", &script]];
        hull.hull(run.concat()).input("input\n").run().ok()
    };
    let both = run(&["-i", "-a", "stdin", "-a", "STDOUT"]);
    assert_eq!(both.text(), "output\ninput");
    assert_eq!(both.error(), "");
    let error = run(&["--attach", "stderr"]);
    assert_eq!(
        (error.text(), error.error().trim()),
        (String::new(), "error")
    );
    // Docker's answer when no output is wanted.
    let id = run(&["-i", "-a", "stdin"]).text();
    assert!(id.len() == 64 && !id.contains('\n'), "{id}");
    hull.run(&["-d", "-a", "stdout"], &["true"])
        .fails(125, &["--attach", "--detach"]);
    hull.assert_clean();
}

#[test]
fn annotations_are_in_the_specification() {
    let hull = Hull::new();
    let options = ["--annotation", "com.example/a=b=c", "--annotation", "d"];
    let container = hull.start(&options, &["true"]);
    let annotations = &container.inspect()["HostConfig"]["Annotations"];
    assert_eq!(
        *annotations,
        serde_json::json!({"com.example/a": "b=c", "d": ""})
    );
}
