//! podman with hull as its runtime: what a user of podman can rely on.

use std::time::{Duration, Instant};

use hull_tests::{Podman, Terminal, eventually, left_out};

#[test]
fn podman_run_returns_the_commands_status() {
    let podman = Podman::new();
    podman.sh(&[], "exit 0").ends(0);
    podman.sh(&[], "exit 7").ends(7);
    podman.run(&[], &["/etc/passwd"]).ends(126);
    podman.run(&[], &["no-such-command"]).ends(127);
    // In a shell of its own: process 1 does not die of its own signal.
    podman.sh(&[], "sh -c 'kill -9 $$'; exit $?").ends(137);
}

#[test]
fn podman_run_ends_with_137_when_the_container_is_killed() {
    let podman = Podman::new();
    let name = podman.unique("killed");
    let running = podman
        .podman(["run", "--rm", "--network", "none", "--name", &name])
        .args(["busybox", "sleep", "1000"])
        .start();
    eventually("it runs", Duration::from_secs(20), || {
        let listed = podman
            .podman(["ps", "--filter", &format!("name={name}"), "--filter"])
            .args(["status=running", "--format", "{{.Names}}"])
            .run();
        listed.text() == name
    });
    podman.does("kill", &name).ok();
    running.finish().ends(137);
}

#[test]
fn podman_run_keeps_output_and_errors_apart_and_passes_input() {
    let podman = Podman::new();
    let output = podman.sh(&[], "echo out; echo err >&2").ok();
    assert_eq!(output.text(), "out");
    assert_eq!(output.error(), "err\n");
    let output = podman
        .podman(["run", "--rm", "-i", "--network", "none", "busybox", "cat"])
        .input("to the end")
        .run()
        .ok();
    assert_eq!(output.text(), "to the end");
}

#[test]
fn podman_run_passes_a_megabyte_in_both_directions() {
    let podman = Podman::new();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let output = podman
        .podman(["run", "--rm", "-i", "--network", "none", "busybox", "cat"])
        .input(bytes.clone())
        .run()
        .ok();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
}

#[test]
fn podman_containers_have_a_kernel_of_their_own() {
    let podman = Podman::new();
    if !podman.runtime.is_hull() {
        return left_out("containers of this runtime share the host's kernel");
    }
    let release = podman.run(&[], &["uname", "-r"]).ok().text();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.ends_with("-hull"), "{release}");
    assert_ne!(release, host.trim());
}

#[test]
fn podman_run_with_a_terminal_gives_the_container_one() {
    let podman = Podman::new();
    let invocation = podman
        .podman(["run", "--rm", "-it", "--network", "none", "busybox", "sh"])
        .limit(Duration::from_secs(30));
    let mut terminal = Terminal::start(invocation, 33, 101);
    terminal.wait_for("# ");
    terminal.write("stty size; tty; echo ab''c\n");
    terminal.wait_for("33 101");
    terminal.wait_for("/dev/pts/0");
    terminal.wait_for("abc");
    terminal.resize(44, 102);
    terminal.write("until [ \"$(stty size)\" = '44 102' ]; do sleep 0.1; done; echo resi''zed\n");
    terminal.wait_for("resized");
    terminal.write("exit 3\n");
    assert_eq!(terminal.wait(), 3);
}

#[test]
fn podman_run_detached_logs_and_wait() {
    let podman = Podman::new();
    let script =
        "echo one; echo two >&2; until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5; exit 4";
    let name = podman.start(&[], &["sh", "-c", script]);
    assert_eq!(podman.state(&name), "running");
    eventually("both lines", Duration::from_secs(10), || {
        let output = podman.does("logs", &name).ok();
        output.text() == "one" && output.error() == "two\n"
    });
    let waiting = podman.podman(["wait", &name]).start();
    podman.exec(&name, &["touch", "/tmp/go"]).ok();
    assert_eq!(waiting.finish().ok().text(), "4");
    assert_eq!(podman.wait(&name), 4, "and at once when it has ended");
    assert_eq!(podman.inspect(&name, "{{.State.ExitCode}}"), "4");
    eventually("the container has exited", Duration::from_secs(20), || {
        podman.state(&name) == "exited"
    });
}

#[test]
fn podman_logs_follows_to_the_end() {
    let podman = Podman::new();
    let script = "echo a; until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5; echo b";
    let name = podman.start(&[], &["sh", "-c", script]);
    let mut following = podman.podman(["logs", "-f", &name]).start();
    following.wait_for("a\n");
    podman.exec(&name, &["touch", "/tmp/go"]).ok();
    assert_eq!(following.finish().ok().text(), "a\nb");
}

#[test]
fn podman_exec_returns_the_commands_status() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    podman.exec(&name, &["true"]).ends(0);
    podman.exec_sh(&name, "exit 9").ends(9);
    podman.exec(&name, &["/etc/passwd"]).ends(126);
    podman.exec(&name, &["no-such-command"]).ends(127);
    podman.exec_sh(&name, "kill -9 $$").ends(137);
}

#[test]
fn podman_exec_passes_streams_environment_user_and_directory() {
    let podman = Podman::new();
    let name = podman.sleeper(&["-e", "SET=run"]);
    let output = podman.exec_sh(&name, "echo $SET; echo err >&2").ok();
    assert_eq!(output.text(), "run");
    assert_eq!(output.error(), "err\n");
    let output = podman
        .podman(["exec", "-e", "A=b", "-u", "nobody:users", "-w", "/var"])
        .args([&name, "sh", "-c", "echo $A $(id -u):$(id -g) $PWD"])
        .run()
        .ok();
    assert_eq!(output.text(), "b 65534:100 /var");
    let output = podman
        .podman(["exec", "-i", &name, "cat"])
        .input("to the end")
        .run()
        .ok();
    assert_eq!(output.text(), "to the end");
}

#[test]
fn podman_exec_with_a_terminal_gives_the_command_one() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    let invocation = podman
        .podman(["exec", "-it", &name, "sh"])
        .limit(Duration::from_secs(30));
    let mut terminal = Terminal::start(invocation, 31, 99);
    terminal.wait_for("# ");
    terminal.write("stty size; test -t 0 && test -t 1 && echo on''e\n");
    terminal.wait_for("31 99");
    terminal.wait_for("one");
    terminal.write("exit 5\n");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn podman_exec_detached_runs_on() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    podman
        .podman(["exec", "-d", &name, "sh", "-c"])
        .arg("until [ -e /tmp/go ]; do sleep 0.05; done; echo done >/tmp/done")
        .run()
        .ok();
    podman.exec_sh(&name, "cat /tmp/done 2>/dev/null").ends(1);
    podman
        .exec_sh(
            &name,
            "touch /tmp/go; until [ -s /tmp/done ]; do sleep 0.05; done",
        )
        .ok();
}

#[test]
fn podman_exec_ends_with_the_container() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    let mut running = podman
        .podman(["exec", &name, "sh", "-c", "echo begun; sleep 1000"])
        .start();
    running.wait_for("begun");
    podman.does("kill", &name).ok();
    running.finish().ends(137);
}

#[test]
fn podman_stop_lets_the_container_end_and_kills_it_after_its_time() {
    let podman = Podman::new();
    let name = podman.ready(
        &[],
        "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done",
    );
    podman.does("stop", &name).ok();
    assert_eq!(podman.wait(&name), 5);

    let name = podman.ready(
        &[],
        "trap '' TERM; echo ready; while :; do sleep 0.05; done",
    );
    let begin = Instant::now();
    podman.podman(["stop", "-t", "1", &name]).run().ok();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_eq!(podman.wait(&name), 137);
}

#[test]
fn podman_kill_sends_the_signal() {
    let podman = Podman::new();
    let name = podman.ready(
        &[],
        "trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done",
    );
    podman.podman(["kill", "-s", "HUP", &name]).run().ok();
    eventually("the signal", Duration::from_secs(10), || {
        podman.logs(&name).contains("hup")
    });
    assert_eq!(podman.state(&name), "running");
    podman.does("kill", &name).ok();
    assert_eq!(podman.wait(&name), 137);
}

#[test]
fn podman_pause_holds_everything_and_unpause_lets_it_go_on() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    let volume = format!("{}:/data", scratch.display());
    let name = podman.ready(
        &["-v", &volume],
        "echo ready; while :; do echo >>/data/ticks; sleep 0.05; done",
    );
    let ticks = || std::fs::metadata(scratch.join("ticks")).map_or(0, |file| file.len());
    eventually("it ticks", Duration::from_secs(10), || ticks() > 2);
    podman.does("pause", &name).ok();
    assert_eq!(podman.state(&name), "paused");
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(ticks(), before);
    podman.does("unpause", &name).ok();
    assert_eq!(podman.state(&name), "running");
    eventually("it goes on", Duration::from_secs(10), || ticks() > before);
}

#[test]
fn podman_inspect_knows_the_state_and_a_process_that_lives() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    let pid = podman.inspect(&name, "{{.State.Pid}}");
    let process = format!("/proc/{pid}/stat");
    assert!(std::path::Path::new(&process).exists(), "{process}");
    assert_eq!(podman.inspect(&name, "{{.State.Running}}"), "true");
    podman.does("stop", &name).ok();
    assert_eq!(podman.inspect(&name, "{{.State.Pid}}"), "0");
    assert_eq!(podman.inspect(&name, "{{.State.Running}}"), "false");
}

#[test]
fn podman_create_and_start_attached() {
    let podman = Podman::new();
    let name = podman.unique("later");
    podman
        .podman(["create", "--network", "none", "--name", &name])
        .args(["busybox", "sh", "-c", "echo begun; exit 6"])
        .run()
        .ok();
    assert_eq!(podman.state(&name), "created");
    let output = podman.podman(["start", "-a", &name]).run().ends(6);
    assert_eq!(output.text(), "begun");
}

#[test]
fn podman_starts_a_stopped_container_again_with_its_files() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    podman.exec_sh(&name, "echo kept >/root/file").ok();
    let boot = podman
        .exec_sh(&name, "cat /proc/sys/kernel/random/boot_id")
        .ok()
        .text();
    podman.does("stop", &name).ok();
    podman.does("start", &name).ok();
    assert_eq!(
        podman.exec(&name, &["cat", "/root/file"]).ok().text(),
        "kept"
    );
    podman.podman(["restart", "-t", "1", &name]).run().ok();
    assert_eq!(
        podman.exec(&name, &["cat", "/root/file"]).ok().text(),
        "kept"
    );
    if podman.runtime.is_hull() {
        let again = podman.exec_sh(&name, "cat /proc/sys/kernel/random/boot_id");
        assert_ne!(again.ok().text(), boot, "a new machine");
    }
}

#[test]
fn podman_cp_copies_into_and_out_of_a_running_container() {
    let podman = Podman::new();
    let scratch = podman.scratch();
    let name = podman.sleeper(&[]);
    std::fs::write(scratch.join("in"), "from outside").unwrap();
    let copy = |from: &str, to: &str| podman.podman(["cp", from, to]).run();
    copy(
        scratch.join("in").to_str().unwrap(),
        &format!("{name}:/root/in"),
    )
    .ok();
    assert_eq!(
        podman.exec(&name, &["cat", "/root/in"]).ok().text(),
        "from outside"
    );
    podman.exec_sh(&name, "echo from inside >/root/out").ok();
    copy(
        &format!("{name}:/root/out"),
        scratch.join("out").to_str().unwrap(),
    )
    .ok();
    let out = std::fs::read_to_string(scratch.join("out")).unwrap();
    assert_eq!(out, "from inside\n");
}

#[test]
fn podman_top_lists_the_processes_of_the_container() {
    let podman = Podman::new();
    let name = podman.ready(&[], "echo ready; sleep 1234 & wait");
    // podman runs the container's own `ps` if it is given options for ps.
    let output = podman
        .podman(["top", &name, "-o", "pid,args"])
        .run()
        .ok()
        .text();
    assert!(output.contains("sleep 1234"), "{output}");
    assert!(!output.contains("agent"), "{output}");
    // Without, it looks at the host's processes, of which a machine has one.
    let output = podman.does("top", &name).ok().text();
    assert!(output.lines().count() > 1, "{output}");
}

#[test]
fn podman_stats_show_memory_and_processes() {
    let podman = Podman::new();
    let name = podman.sleeper(&["-m", "128m"]);
    let stats = podman
        .podman(["stats", "--no-stream", "--format", "json", &name])
        .run()
        .ok()
        .json();
    let stats = &stats[0];
    assert_eq!(stats["name"], name.as_str(), "{stats}");
    let usage = stats["mem_usage"].as_str().unwrap();
    assert!(!usage.starts_with("0B"), "{usage}");
    assert_ne!(stats["pids"], "0", "{stats}");
}

#[test]
fn podman_update_changes_the_limit_of_a_running_container() {
    let podman = Podman::new();
    let name = podman.sleeper(&["-m", "256m"]);
    podman
        .exec_sh(&name, "head -c 100m /dev/zero | tail | wc -c")
        .ok();
    podman
        .podman(["update", "-m", "48m", "--memory-swap", "48m", &name])
        .run()
        .ok();
    let output = podman.exec_sh(&name, "head -c 100m /dev/zero | tail; exit 0");
    let after = podman
        .exec_sh(&name, "sh -c 'tail /dev/zero'; echo $?")
        .ok();
    assert_eq!(after.text(), "137", "{output:?}");
    assert_eq!(podman.state(&name), "running");
}

#[test]
fn podman_run_passes_signals_on() {
    let podman = Podman::new();
    let script = "trap 'echo got it; exit 8' INT; echo ready; while :; do sleep 0.05; done";
    let mut running = podman
        .podman(["run", "--rm", "--network", "none", "busybox", "sh", "-c"])
        .arg(script)
        .start();
    running.wait_for("ready");
    running.signal(rustix::process::Signal::INT);
    let output = running.finish().ends(8);
    assert!(output.text().ends_with("got it"), "{}", output.text());
}

#[test]
fn podman_run_detached_with_rm_removes_the_container_at_its_end() {
    let podman = Podman::new();
    let script = "until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5";
    let name = podman.start(&["--rm"], &["sh", "-c", script]);
    podman.exec(&name, &["touch", "/tmp/go"]).ok();
    eventually("it is gone", Duration::from_secs(20), || {
        podman.podman(["ps", "-a", "-q"]).run().text().is_empty()
    });
}

#[test]
fn podman_sees_that_a_container_was_killed_from_outside() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    let pid = podman.inspect(&name, "{{.State.Pid}}").parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(podman.wait(&name), 137);
    // "stopped" until podman's own clean-up process has been there.
    eventually("the container has exited", Duration::from_secs(20), || {
        podman.state(&name) == "exited"
    });
    podman.does("start", &name).ok();
    podman.exec(&name, &["true"]).ok();
}

#[test]
fn podman_diff_commit_and_export_see_what_the_container_wrote() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    podman
        .exec_sh(&name, "echo written >/root/new; rm /etc/nsswitch.conf")
        .ok();
    let diff = podman.does("diff", &name).ok().text();
    assert!(diff.lines().any(|line| line == "A /root/new"), "{diff}");
    let removed = "D /etc/nsswitch.conf";
    assert!(diff.lines().any(|line| line == removed), "{diff}");
    podman
        .podman(["commit", "-q", &name, "committed"])
        .run()
        .ok();
    let output = podman
        .podman(["run", "--rm", "--network", "none", "committed"])
        .args(["cat", "/root/new"])
        .run()
        .ok();
    assert_eq!(output.text(), "written");
    let archive = podman.scratch().join("export.tar");
    podman
        .podman(["export", "-o"])
        .args([archive.to_str().unwrap(), &name])
        .run()
        .ok();
    let names = hull_tests::Invocation::new("tar")
        .arg("-tf")
        .arg(&archive)
        .run()
        .ok()
        .text();
    assert!(names.lines().any(|line| line == "root/new"));
}

#[test]
fn podman_exec_serves_many_at_once() {
    let podman = Podman::new();
    let name = podman.sleeper(&[]);
    let all: Vec<_> = (0..8)
        .map(|n| {
            let script = format!("echo {n}; exit {n}");
            podman.podman(["exec", &name, "sh", "-c", &script]).start()
        })
        .collect();
    for (n, running) in all.into_iter().enumerate() {
        let output = running.finish().ends(i32::try_from(n).unwrap());
        assert_eq!(output.text(), n.to_string());
    }
}

#[test]
fn podman_starts_several_containers_at_once() {
    let podman = Podman::new();
    let all: Vec<_> = (0..4)
        .map(|n| {
            podman
                .podman(["run", "--rm", "--network", "none", "busybox", "sh", "-c"])
                .arg(format!("exit {n}"))
                .start()
        })
        .collect();
    for (n, running) in all.into_iter().enumerate() {
        running.finish().ends(i32::try_from(n).unwrap());
    }
}

#[test]
fn podman_leaves_nothing_behind() {
    let podman = Podman::new();
    podman.sh(&[], "exit 3").ends(3);
    podman.run(&[], &["no-such-command"]).ends(127);
    let running = podman.sleeper(&["-m", "64m"]);
    podman
        .podman(["exec", "-d", &running, "sleep", "1000"])
        .run()
        .ok();
    let paused = podman.sleeper(&[]);
    podman.does("pause", &paused).ok();
    let stopped = podman.sleeper(&[]);
    podman.does("stop", &stopped).ok();
    let pod = podman.unique("pod");
    podman
        .podman(["pod", "create", "--network", "none", "--name", &pod])
        .run()
        .ok();
    podman.sleeper(&["--pod", &pod]);
    podman.assert_clean();
}
