//! Docker with hull as its runtime: what a user of Docker can rely on.

use std::time::{Duration, Instant};

use hull_tests::{Docker, Terminal, eventually, left_out};

#[test]
fn docker_run_returns_the_commands_status() {
    let docker = Docker::new();
    docker.sh(&[], "exit 0").ends(0);
    docker.sh(&[], "exit 7").ends(7);
    docker.run(&[], &["/etc/passwd"]).ends(126);
    docker.run(&[], &["no-such-command"]).ends(127);
    // In a shell of its own: process 1 does not die of its own signal.
    docker.sh(&[], "sh -c 'kill -9 $$'; exit $?").ends(137);
}

#[test]
fn docker_run_keeps_output_and_errors_apart_and_passes_input() {
    let docker = Docker::new();
    let output = docker.sh(&[], "echo out; echo err >&2").ok();
    assert_eq!(output.text(), "out");
    assert_eq!(output.error(), "err\n");
    let bytes: Vec<u8> = (0..1u32 << 20).map(|n| (n % 251) as u8).collect();
    let output = docker
        .docker(["run", "--rm", "-i", "--network", "none", "busybox", "cat"])
        .input(bytes.clone())
        .run()
        .ok();
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
}

#[test]
fn docker_containers_have_a_kernel_of_their_own() {
    let docker = Docker::new();
    if !docker.runtime.is_hull() {
        return left_out("containers of this runtime share the host's kernel");
    }
    let release = docker.run(&[], &["uname", "-r"]).ok().text();
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(release.ends_with("-hull"), "{release}");
    assert_ne!(release, host.trim());
}

#[test]
fn docker_run_with_a_terminal_gives_the_container_one() {
    let docker = Docker::new();
    let invocation = docker
        .docker(["run", "--rm", "-it", "--network", "none", "busybox", "sh"])
        .limit(Duration::from_secs(30));
    let mut terminal = Terminal::start(invocation, 33, 101);
    terminal.wait_for("# ");
    // The client sends the size after the start.
    terminal.write("until [ \"$(stty size)\" = '33 101' ]; do sleep 0.1; done; echo siz''ed\n");
    terminal.wait_for("sized");
    terminal.resize(44, 102);
    terminal.write("until [ \"$(stty size)\" = '44 102' ]; do sleep 0.1; done; echo resi''zed\n");
    terminal.wait_for("resized");
    terminal.write("exit 3\n");
    assert_eq!(terminal.wait(), 3);
}

#[test]
fn docker_run_detached_logs_and_wait() {
    let docker = Docker::new();
    let script = "echo one; echo two >&2; until [ -e /tmp/go ]; do sleep 0.05; done; sleep 0.5; echo three; exit 4";
    let name = docker.start(&[], &["sh", "-c", script]);
    assert_eq!(docker.state(&name), "running");
    eventually("both lines", Duration::from_secs(10), || {
        let output = docker.does("logs", &name).ok();
        output.text() == "one" && output.error() == "two\n"
    });
    let waiting = docker.docker(["wait", &name]).start();
    let mut following = docker.docker(["logs", "-f", &name]).start();
    following.wait_for("one\n");
    docker.exec(&name, &["touch", "/tmp/go"]).ok();
    assert_eq!(waiting.finish().ok().text(), "4");
    assert_eq!(following.finish().ok().text(), "one\nthree");
    assert_eq!(docker.inspect(&name, "{{.State.ExitCode}}"), "4");
    assert_eq!(docker.state(&name), "exited");
}

#[test]
fn docker_exec_returns_the_commands_status() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    docker.exec(&name, &["true"]).ends(0);
    docker.exec_sh(&name, "exit 9").ends(9);
    docker.exec(&name, &["/etc/passwd"]).ends(126);
    // Docker 20.10 takes runc 1.1's message about a missing command as one that cannot be executed.
    let status = docker.exec(&name, &["no-such-command"]).status;
    assert!([126, 127].contains(&status), "{status}");
    docker.exec_sh(&name, "kill -9 $$").ends(137);
}

#[test]
fn docker_exec_passes_streams_environment_user_and_directory() {
    let docker = Docker::new();
    let name = docker.sleeper(&["-e", "SET=run"]);
    let output = docker.exec_sh(&name, "echo $SET; echo err >&2").ok();
    assert_eq!(output.text(), "run");
    assert_eq!(output.error(), "err\n");
    let output = docker
        .docker(["exec", "-e", "A=b", "-u", "nobody:users", "-w", "/var"])
        .args([&name, "sh", "-c", "echo $A $(id -u):$(id -g) $PWD"])
        .run()
        .ok();
    assert_eq!(output.text(), "b 65534:100 /var");
    let output = docker
        .docker(["exec", "-i", &name, "cat"])
        .input("to the end")
        .run()
        .ok();
    assert_eq!(output.text(), "to the end");
}

#[test]
fn docker_exec_with_a_terminal_gives_the_command_one() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    let invocation = docker
        .docker(["exec", "-it", &name, "sh"])
        .limit(Duration::from_secs(30));
    let mut terminal = Terminal::start(invocation, 31, 99);
    terminal.wait_for("# ");
    terminal.write("until [ \"$(stty size)\" = '31 99' ]; do sleep 0.1; done; echo siz''ed\n");
    terminal.wait_for("sized");
    terminal.write("test -t 0 && test -t 1 && echo on''e\n");
    terminal.wait_for("one");
    terminal.write("exit 5\n");
    assert_eq!(terminal.wait(), 5);
}

#[test]
fn docker_exec_detached_runs_on() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    docker
        .docker(["exec", "-d", &name, "sh", "-c"])
        .arg("until [ -e /tmp/go ]; do sleep 0.05; done; echo done >/tmp/done")
        .run()
        .ok();
    docker.exec_sh(&name, "cat /tmp/done 2>/dev/null").ends(1);
    let script = "touch /tmp/go; until [ -s /tmp/done ]; do sleep 0.05; done";
    docker.exec_sh(&name, script).ok();
}

#[test]
fn docker_stop_lets_the_container_end_and_kills_it_after_its_time() {
    let docker = Docker::new();
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let name = docker.ready(&[], script);
    docker.does("stop", &name).ok();
    assert_eq!(docker.wait(&name), 5);

    let script = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let name = docker.ready(&[], script);
    let begin = Instant::now();
    docker.docker(["stop", "-t", "1", &name]).run().ok();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_eq!(docker.wait(&name), 137);
}

#[test]
fn docker_kill_sends_the_signal() {
    let docker = Docker::new();
    let script = "trap 'echo hup' HUP; echo ready; while :; do sleep 0.05; done";
    let name = docker.ready(&[], script);
    docker.docker(["kill", "-s", "HUP", &name]).run().ok();
    eventually("the signal", Duration::from_secs(10), || {
        docker.logs(&name).contains("hup")
    });
    assert_eq!(docker.state(&name), "running");
    docker.does("kill", &name).ok();
    assert_eq!(docker.wait(&name), 137);
}

#[test]
fn docker_pause_holds_everything_and_unpause_lets_it_go_on() {
    let docker = Docker::new();
    let scratch = docker.scratch();
    let volume = format!("{}:/data", scratch.display());
    let script = "echo ready; while :; do echo >>/data/ticks; sleep 0.05; done";
    let name = docker.ready(&["-v", &volume], script);
    let ticks = || std::fs::metadata(scratch.join("ticks")).map_or(0, |file| file.len());
    eventually("it ticks", Duration::from_secs(10), || ticks() > 2);
    docker.does("pause", &name).ok();
    assert_eq!(docker.state(&name), "paused");
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(ticks(), before);
    docker.does("unpause", &name).ok();
    assert_eq!(docker.state(&name), "running");
    eventually("it goes on", Duration::from_secs(10), || ticks() > before);
}

#[test]
fn docker_starts_a_stopped_container_again_with_its_files() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    docker.exec_sh(&name, "echo kept >/root/file").ok();
    docker.does("stop", &name).ok();
    docker.does("start", &name).ok();
    let kept = || docker.exec(&name, &["cat", "/root/file"]).ok().text();
    assert_eq!(kept(), "kept");
    docker.docker(["restart", "-t", "1", &name]).run().ok();
    assert_eq!(kept(), "kept");
}

#[test]
fn docker_restarts_a_container_that_fails() {
    let docker = Docker::new();
    // Fails twice, then ends well.
    let script = "echo run >>/root/runs; [ $(wc -l </root/runs) -gt 2 ] || exit 3";
    let name = docker.start(&["--restart", "on-failure:5"], &["sh", "-c", script]);
    eventually("it ended well", Duration::from_secs(30), || {
        docker.inspect(
            &name,
            "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}",
        ) == "exited 0 2"
    });
}

#[test]
fn docker_sees_whether_a_container_is_healthy() {
    let docker = Docker::new();
    let name = docker.sleeper(&[
        "--health-cmd",
        "test ! -e /tmp/ill",
        "--health-interval",
        "200ms",
        "--health-retries",
        "2",
    ]);
    let health = || docker.inspect(&name, "{{.State.Health.Status}}");
    eventually("healthy", Duration::from_secs(20), || health() == "healthy");
    docker.exec(&name, &["touch", "/tmp/ill"]).ok();
    eventually("unhealthy", Duration::from_secs(20), || {
        health() == "unhealthy"
    });
    docker.exec(&name, &["rm", "/tmp/ill"]).ok();
    eventually("healthy", Duration::from_secs(20), || health() == "healthy");
}

#[test]
fn docker_stats_show_memory_and_processes() {
    let docker = Docker::new();
    let name = docker.sleeper(&["-m", "128m"]);
    let template = "{{.Name}} {{.PIDs}} {{.MemUsage}}";
    let stats = docker
        .docker(["stats", "--no-stream", "--format", template, &name])
        .run()
        .ok()
        .text();
    let words: Vec<&str> = stats.split(' ').collect();
    assert_eq!(words[0], name, "{stats}");
    assert_ne!(words[1], "0", "{stats}");
    assert_ne!(words[2], "0B", "{stats}");
    // Docker shows the host's control group: with a machine around the container, its limit is
    // wider than the one that holds inside.
    let wall = if docker.runtime.is_hull() {
        "256MiB"
    } else {
        "128MiB"
    };
    assert_eq!(words[4], wall, "{stats}");
}

#[test]
fn docker_top_lists_a_process() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    // Docker asks the host's ps about the processes that the runtime lists.
    let table = docker.does("top", &name).ok().text();
    assert!(
        table.contains("PID") && table.lines().count() > 1,
        "{table}"
    );
}

#[test]
fn docker_update_changes_the_limit_of_a_running_container() {
    let docker = Docker::new();
    let name = docker.sleeper(&["-m", "256m", "--memory-swap", "256m"]);
    let takes_100_mb = "head -c 100m /dev/zero | tail | wc -c";
    assert_eq!(docker.exec_sh(&name, takes_100_mb).ok().text(), "104857600");
    docker
        .docker(["update", "-m", "48m", "--memory-swap", "48m", &name])
        .run()
        .ok();
    let output = docker.exec_sh(&name, "sh -c 'tail /dev/zero'; echo $?");
    assert_eq!(output.ok().text(), "137");
    assert_eq!(docker.state(&name), "running");
}

#[test]
fn docker_cp_copies_into_and_out_of_a_running_container() {
    let docker = Docker::new();
    let scratch = docker.scratch();
    let name = docker.sleeper(&[]);
    std::fs::write(scratch.join("in"), "from outside").unwrap();
    let copy = |from: &str, to: &str| docker.docker(["cp", from, to]).run();
    let (inside, outside) = (scratch.join("in"), scratch.join("out"));
    copy(inside.to_str().unwrap(), &format!("{name}:/root/in")).ok();
    let output = docker.exec(&name, &["cat", "/root/in"]).ok();
    assert_eq!(output.text(), "from outside");
    docker.exec_sh(&name, "echo from inside >/root/out").ok();
    copy(&format!("{name}:/root/out"), outside.to_str().unwrap()).ok();
    assert_eq!(std::fs::read_to_string(outside).unwrap(), "from inside\n");
}

#[test]
fn docker_volumes_limits_and_options_hold() {
    let docker = Docker::new();
    let scratch = docker.scratch();
    std::fs::write(scratch.join("file"), "content\n").unwrap();
    let (volume, read_only) = (
        format!("{}:/data", scratch.display()),
        format!("{}:/only:ro", scratch.display()),
    );
    let script = "cat /only/file; echo new >/data/new; ! echo no >/only/no 2>/dev/null; \
                  echo $(id -u):$(id -g) $PWD \"$A\" $(hostname); df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2";
    let options = [
        "-v",
        &volume,
        "-v",
        &read_only,
        "--user",
        "0:100",
        "--workdir",
        "/var/tmp",
        "--env",
        "A=b c",
        "--hostname",
        "here",
        "--shm-size",
        "32m",
    ];
    let output = docker.sh(&options, script).ok();
    assert_eq!(output.text(), "content\n0:100 /var/tmp b c here\n32768");
    assert!(scratch.join("new").exists() && !scratch.join("no").exists());
    let options = ["-m", "64m", "--memory-swap", "64m"];
    docker.sh(&options, "exec tail /dev/zero").ends(137);
    let script = "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done; echo all forty";
    let output = docker.sh(&["--pids-limit", "20"], script);
    assert!(output.error().contains("fork"), "{}", output.error());
}

#[test]
fn docker_privileged_sees_everything_in_the_guest_and_nothing_of_the_host() {
    let docker = Docker::new();
    // Docker asks for all existing capabilities, of which a host's root may lack some.
    if !docker.runtime.is_hull() {
        return left_out("a privileged container of this runtime sees the host");
    }
    let script = "mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted";
    let output = docker.sh(&["--privileged"], script).ok();
    assert_eq!(output.text(), "mounted");
    let devices = docker.run(&["--privileged"], &["ls", "/dev"]).ok().text();
    for disk in std::fs::read_dir("/sys/class/block").unwrap().flatten() {
        let name = disk.file_name().into_string().unwrap();
        if ["loop", "ram", "zram"]
            .iter()
            .any(|one| name.starts_with(one))
        {
            continue;
        }
        assert!(!devices.lines().any(|line| line == name), "{name}");
    }
    assert!(!devices.lines().any(|line| line == "kvm"), "{devices}");
}

#[test]
fn docker_sees_that_a_container_was_killed_from_outside() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    let pid = docker.inspect(&name, "{{.State.Pid}}").parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(docker.wait(&name), 137);
    docker.does("start", &name).ok();
    docker.exec(&name, &["true"]).ok();
}

#[test]
fn docker_diff_and_commit_see_what_the_container_wrote() {
    let docker = Docker::new();
    let name = docker.sleeper(&[]);
    let script = "echo written >/root/new; rm /etc/nsswitch.conf";
    docker.exec_sh(&name, script).ok();
    let diff = docker.does("diff", &name).ok().text();
    for line in ["A /root/new", "D /etc/nsswitch.conf"] {
        assert!(diff.lines().any(|found| found == line), "{diff}");
    }
    docker.docker(["commit", &name, "committed"]).run().ok();
    let output = docker
        .docker(["run", "--rm", "--network", "none", "committed"])
        .args(["cat", "/root/new"])
        .run()
        .ok();
    assert_eq!(output.text(), "written");
}

#[test]
fn docker_init_is_process_1() {
    let docker = Docker::new();
    let output = docker.sh(&["--init"], "echo $$; tr '\\0' ' ' </proc/1/cmdline");
    let text = output.ok().text();
    assert!(!text.starts_with("1\n") && text.contains("init"), "{text}");
}

#[test]
fn docker_build_runs_its_steps_in_the_runtime() {
    let docker = Docker::new();
    let directory = docker.scratch().join("context");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("file"), "content\n").unwrap();
    let recipe = "FROM busybox\n\
                  ENV A=b\n\
                  COPY file /file\n\
                  RUN echo $A >/made && cat /file >>/made && uname -r >/kernel\n\
                  CMD [\"cat\", \"/made\"]\n";
    std::fs::write(directory.join("Dockerfile"), recipe).unwrap();
    docker
        .docker(["build", "--network", "none", "-t", "built"])
        .arg(&directory)
        .env("DOCKER_BUILDKIT", "0")
        .run()
        .ok();
    let run = |command: &[&str]| {
        docker
            .docker(["run", "--rm", "--network", "none", "built"])
            .args(command)
            .run()
            .ok()
            .text()
    };
    assert_eq!(run(&[]), "b\ncontent");
    if docker.runtime.is_hull() {
        let kernel = run(&["cat", "/kernel"]);
        assert!(kernel.ends_with("-hull"), "{kernel}");
    }
}

#[test]
fn docker_containers_live_on_when_dockerd_dies() {
    let mut docker = Docker::new();
    let scratch = docker.scratch();
    let volume = format!("{}:/data", scratch.display());
    let script = "trap 'exit 5' TERM; echo ready; while :; do echo >>/data/ticks; sleep 0.05; done";
    let name = docker.ready(&["-v", &volume], script);
    let pid = docker.inspect(&name, "{{.State.Pid}}");
    let ticks = || std::fs::metadata(scratch.join("ticks")).map_or(0, |file| file.len());
    docker.kill_daemon();
    let before = ticks();
    eventually("it goes on", Duration::from_secs(10), || {
        ticks() > before + 2
    });
    docker.start_daemon();
    assert_eq!(docker.state(&name), "running");
    assert_eq!(docker.inspect(&name, "{{.State.Pid}}"), pid);
    docker.exec_sh(&name, "echo still here").ok();
    docker.does("stop", &name).ok();
    assert_eq!(docker.wait(&name), 5);
}

#[test]
fn docker_containers_can_share_a_network() {
    let docker = Docker::new();
    let script = "echo ready; while :; do echo hello | nc -l -p 4321 127.0.0.1; done";
    let server = docker.ready(&[], script);
    let client = docker.sleeper(&["--network", &format!("container:{server}")]);
    eventually("an answer", Duration::from_secs(20), || {
        let output = docker.exec_sh(&client, "nc 127.0.0.1 4321 </dev/null");
        output.text() == "hello"
    });
    docker.exec(&server, &["touch", "/root/file"]).ok();
    docker.exec(&client, &["test", "-e", "/root/file"]).ends(1);
}

#[test]
fn docker_leaves_nothing_behind() {
    let docker = Docker::new();
    docker.sh(&[], "exit 3").ends(3);
    docker.run(&[], &["no-such-command"]).ends(127);
    let running = docker.sleeper(&["-m", "64m"]);
    docker
        .docker(["exec", "-d", &running, "sleep", "1000"])
        .run()
        .ok();
    let paused = docker.sleeper(&[]);
    docker.does("pause", &paused).ok();
    let stopped = docker.sleeper(&[]);
    docker.does("stop", &stopped).ok();
    docker.assert_clean();
}

#[test]
fn docker_runs_containers_by_the_shim() {
    let docker = Docker::new();
    if !docker.has_shims() {
        hull_tests::left_out("Docker before 23 takes no shims of containerd for runtimes");
        return;
    }
    let shim = ["--runtime", "shim"];
    let script = "uname -r; echo err >&2; exit 5";
    let output = docker.sh(&shim, script).ends(5);
    assert!(output.text().contains("hull"), "{}", output.text());
    assert!(output.error().contains("err"));
    let name = docker.sleeper(&shim);
    assert_eq!(docker.exec(&name, &["echo", "hi"]).ok().text(), "hi");
    docker.exec_sh(&name, "exit 4").ends(4);
    // The end of that was not the container's.
    assert_eq!(docker.state(&name), "running");
    docker.does("pause", &name).ok();
    assert_eq!(docker.state(&name), "paused");
    docker.does("unpause", &name).ok();
    docker.does("restart", &name).ok();
    assert_eq!(docker.exec(&name, &["echo", "again"]).ok().text(), "again");
    docker.does("stop", &name).ok();
    assert_eq!(docker.inspect(&name, "{{.State.ExitCode}}"), "0");
    docker
        .run(&["--runtime", "shim", "-m", "64m"], &["tail", "/dev/zero"])
        .ends(137);
    docker.assert_clean();
}
