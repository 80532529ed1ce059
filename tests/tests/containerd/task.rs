//! Containers as `ctr` runs them.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use hull_tests::shim::kill;
use hull_tests::{BUSYBOX, Containerd, Invocation, Output, executable};
use rustix::process::Signal;

/// ctr failed, and said so.
fn says(output: Output, parts: &[&str]) {
    let output = output.ends(1);
    let text = output.error();
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_container_has_its_own_kernel_and_gives_its_output_and_status() {
    let containerd = Containerd::new();
    let output = containerd
        .run(&[], &["sh", "-c", "uname -r; echo err >&2; exit 7"])
        .ends(7);
    let host = Invocation::new("uname").arg("-r").run().ok().text();
    assert!(output.text().contains("hull"), "{}", output.text());
    assert_ne!(output.text(), host);
    assert!(output.error().contains("err"), "{}", output.error());
    containerd.assert_clean();
}

#[test]
fn a_container_is_of_the_configuration_that_its_options_name() {
    let containerd = Containerd::new();
    let own = std::fs::read_to_string(containerd.path("config.toml")).unwrap();
    let other = containerd.path("other.toml");
    // State elsewhere, too: what has to be removed is found there.
    let state = format!("{:?}", containerd.path("run"));
    let moved = format!("{:?}", containerd.path("other-run"));
    std::fs::write(&other, own.replace(&state, &moved) + "memory = \"400m\"\n").unwrap();
    let options = ["--runtime-config-path", other.to_str().unwrap()];
    let total = ["sh", "-c", "grep MemTotal /proc/meminfo | tr -dc 0-9"];
    let total = containerd.run(&options, &total).ok().text();
    let total: u64 = total.parse().unwrap();
    assert!((370 << 10..400 << 10).contains(&total), "{total} kB");
    let id = containerd.start_container(&options, &["sleep", "1000"]);
    let sandboxes = || {
        let entries = std::fs::read_dir(containerd.path("other-run/sandboxes"));
        entries.map_or(0, |entries| entries.count())
    };
    assert_eq!(sandboxes(), 1);
    kill(containerd.shim(&id));
    containerd.remove(&id);
    assert_eq!(sandboxes(), 0);
    let relative = ["--runtime-config-path", "other.toml"];
    says(
        containerd.run(&relative, &["true"]),
        &["other.toml", "absolute path"],
    );
    containerd.assert_clean();
}

#[test]
fn processes_are_executed_in_a_running_container() {
    let containerd = Containerd::new();
    let id = containerd.start_container(&[], &["sleep", "1000"]);
    let output = containerd
        .exec(&id, "echo out; echo err >&2; exit 3")
        .ends(3);
    assert_eq!(output.text(), "out");
    assert_eq!(output.error().trim(), "err");
    let echoed = containerd
        .ctr(["task", "exec", "--exec-id", "in", &id, "cat"])
        .input("what is written")
        .run()
        .ok();
    assert_eq!(echoed.text(), "what is written");
    let none = containerd
        .ctr(["task", "exec", "--exec-id", "none", &id, "nonexistent"])
        .run();
    says(none, &["nonexistent", "executable file not found in $PATH"]);
    // One that could not be started is in nobody's way.
    assert_eq!(containerd.exec(&id, "echo again").ok().text(), "again");
    containerd.remove(&id);
    containerd.assert_clean();
}

#[test]
fn a_command_that_is_not_there_is_named_and_nothing_is_left() {
    let containerd = Containerd::new();
    let none = containerd.run(&[], &["nonexistent"]);
    says(none, &["nonexistent", "executable file not found in $PATH"]);
    let network = containerd.run(&["--net-host"], &["true"]);
    says(network, &["not supported", "network"]);
    containerd.assert_clean();
    containerd.run(&[], &["true"]).ok();
}

#[test]
fn a_container_is_paused_resumed_signalled_and_deleted() {
    let containerd = Containerd::new();
    let script = "trap 'exit 5' TERM; while :; do sleep 0.1; done";
    let id = containerd.start_container(&[], &["sh", "-c", script]);
    assert_eq!(containerd.state(&id), "RUNNING");
    containerd.ctr(["task", "pause", &id]).run().ok();
    assert_eq!(containerd.state(&id), "PAUSED");
    containerd.ctr(["task", "resume", &id]).run().ok();
    assert_eq!(containerd.state(&id), "RUNNING");
    containerd
        .ctr(["task", "kill", "-s", "TERM", &id])
        .run()
        .ok();
    containerd.becomes(&id, "STOPPED");
    assert_eq!(containerd.status(&id), 5);
    containerd.assert_clean();
}

#[test]
fn events_come_in_the_order_in_which_things_happen() {
    let containerd = Containerd::new();
    let events = containerd.ctr(["events"]).start();
    let id = containerd.start_container(&["--memory-limit", "50000000"], &["sleep", "1000"]);
    containerd.exec(&id, "exit 4").ends(4);
    containerd.ctr(["task", "pause", &id]).run().ok();
    containerd.ctr(["task", "resume", &id]).run().ok();
    containerd
        .ctr(["task", "kill", "-s", "KILL", &id])
        .run()
        .ok();
    containerd.becomes(&id, "STOPPED");
    containerd.remove(&id);
    hull_tests::eventually("the last event", Duration::from_secs(10), || {
        events.so_far().contains("/tasks/delete")
    });
    events.signal(Signal::TERM);
    let text = events.finish().text();
    let topics: Vec<&str> = text
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("/tasks/"))
        .collect();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    assert_eq!(topics, expected, "{text}");
}

#[test]
fn a_container_that_takes_too_much_memory_is_reported_as_such() {
    let containerd = Containerd::new();
    let events = containerd.ctr(["events"]).start();
    containerd
        .run(&["--memory-limit", "50000000"], &["tail", "/dev/zero"])
        .ends(137);
    events.signal(Signal::TERM);
    let text = events.finish().text();
    let at = |topic: &str| {
        text.find(topic)
            .unwrap_or_else(|| panic!("{topic}: {text}"))
    };
    assert!(at("/tasks/start") < at("/tasks/oom") && at("/tasks/oom") < at("/tasks/exit"));
}

#[test]
fn metrics_are_those_of_the_guest_s_control_group() {
    let containerd = Containerd::new();
    let id = containerd.start_container(&["--memory-limit", "64000000"], &["sleep", "1000"]);
    let text = containerd.ctr(["task", "metrics", &id]).run().ok().text();
    let value = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    assert_eq!(value("pids.current"), 1);
    assert!(value("cpu.usage_usec") > 0);
    assert!((1..64_000_000).contains(&value("memory.usage ")), "{text}");
    // Whole pages.
    assert_eq!(value("memory.usage_limit"), 64_000_000 / 4096 * 4096);
}

#[test]
fn a_reader_that_comes_late_gets_every_byte() {
    let containerd = Containerd::new();
    let id = containerd.unique();
    let command = containerd.ctr(["run", "--rm", "--runtime", "io.containerd.hull.v2", BUSYBOX]);
    let script = "dd if=/dev/zero bs=1M count=64 2>/dev/null";
    let (command, _) = command.arg(&id).args(["sh", "-c", script]).into_parts();
    let mut words = vec![command.get_program().to_owned()];
    words.extend(command.get_args().map(Into::into));
    let line: Vec<String> = words
        .iter()
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .collect();
    let mut pipeline = Invocation::new("sh")
        .arg("-c")
        .arg(format!("{} | (sleep 2; wc -c)", line.join(" ")));
    for (name, value) in command.get_envs() {
        let value = value.unwrap_or_default();
        pipeline = pipeline.env(name.to_str().unwrap(), value);
    }
    let read = pipeline.limit(Duration::from_secs(60)).run().ok();
    assert_eq!(read.text(), (64 << 20).to_string());
}

#[test]
fn files_of_the_host_and_a_read_only_root_are_what_was_asked_for() {
    let containerd = Containerd::new();
    let shared = containerd.path("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("a"), "from the host").unwrap();
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:rw",
        shared.display()
    );
    let script = "cat /shared/a; echo from the guest >/shared/b; touch /x 2>&1 | grep -c Read-only";
    let output = containerd
        .run(&["--read-only", "--mount", &mount], &["sh", "-c", script])
        .ok();
    assert_eq!(output.text(), "from the host1");
    let written = std::fs::read_to_string(shared.join("b")).unwrap();
    assert_eq!(written, "from the guest\n");
}

#[test]
fn the_shim_says_what_it_is_and_what_is_wrong_with_its_arguments() {
    let shim = executable().with_file_name("containerd-shim-hull-v2");
    let call = |arguments: &[&str]| Invocation::new(&shim).args(arguments).run();
    let version = call(&["-v"]).ok().text();
    assert!(version.starts_with("containerd-shim-hull-v2 "), "{version}");
    let info = call(&["-info"]).ok();
    let info = String::from_utf8_lossy(&info.stdout).into_owned();
    assert!(info.contains("io.containerd.hull.v2") && info.contains("ociVersionMin"));
    call(&["-frobnicate", "x"])
        .fails(1, &["-frobnicate"])
        .hint("io.containerd.hull.v2");
    call(&["-id", "x", "levitate"]).fails(1, &["levitate"]);
    // Without a socket there is nobody to serve.
    call(&["-namespace", "n", "-id", "x"]).fails(1, &["start"]);
}

#[test]
fn output_goes_to_files_and_programs() {
    let containerd = Containerd::new();
    let file = containerd.path("logs/file");
    let uri = format!("file://{}", file.display());
    let script = "echo out; echo err >&2";
    let id = containerd.start_container(&["--log-uri", &uri], &["sh", "-c", script]);
    containerd.becomes(&id, "STOPPED");
    containerd.remove(&id);
    let mut lines: Vec<_> = std::fs::read_to_string(&file)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    assert_eq!(lines, ["err", "out"]);
    let log = containerd.path("log");
    let program = containerd.path("program");
    let text = format!(
        "#!/bin/sh\nexec 5>&-\n{{ echo \"$CONTAINER_ID $*\"; cat <&3; cat <&4; }} >{}\n",
        log.display()
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?--tag=a", program.display());
    let id = containerd.start_container(&["--log-uri", &uri], &["sh", "-c", script]);
    containerd.becomes(&id, "STOPPED");
    containerd.remove(&id);
    let expected = format!("{id} --tag a\nout\nerr\n");
    hull_tests::eventually("the log", Duration::from_secs(10), || {
        std::fs::read_to_string(&log).is_ok_and(|text| text == expected)
    });
    let nowhere = ["--log-uri", "gopher://x"];
    let output = containerd.run(&nowhere, &["true"]);
    says(output, &["gopher"]);
    containerd.assert_clean();
}
