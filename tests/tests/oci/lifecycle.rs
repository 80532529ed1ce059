//! Lifecycle of a bundle with `hull-oci`, as of runc's users: create, start, state, kill, delete,
//! run, and the process of the host that stands for the container.

use std::fs::{self, File};
use std::time::Duration;

use hull_tests::{Oci, eventually, pid_in};
use rustix::process::{Signal, kill_process};
use serde_json::json;

#[test]
fn a_container_is_created_started_killed_and_deleted() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("echo runs; exec sleep 1000");
    let init = oci.create(&bundle);
    let state = init.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], init.id.as_str());
    let pid = state["pid"].as_i64().unwrap();
    assert!(fs::exists(format!("/proc/{pid}")).unwrap(), "{state}");
    assert_eq!(
        init.output(),
        "",
        "nothing of the container runs before start"
    );
    init.does("start").ok();
    assert_eq!(init.status(), "running");
    init.says("runs\n");
    init.does("delete").fails(1, &["not stopped"]);
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
    init.becomes("stopped");
    assert_eq!(init.state()["pid"], 0);
    init.does("delete").ok();
    init.does("state").fails(1, &["container does not exist"]);
    oci.assert_clean();
}

#[test]
fn a_created_container_can_be_deleted_without_being_started() {
    let oci = Oci::new();
    let init = oci.create(&oci.bundle());
    init.does("delete").ok();
    assert_ne!(init.ends(), 0);
    oci.assert_clean();
}

#[test]
fn a_bundle_is_used_from_its_own_directory() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("echo here");
    let output = oci
        .oci(["run", &oci.unique()])
        .with(|command| {
            command.current_dir(&bundle.path);
        })
        .run()
        .ok();
    assert_eq!(output.text(), "here");
}

#[test]
fn run_ends_with_the_status_of_the_command_and_leaves_nothing() {
    let oci = Oci::new();
    let mut bundle = oci.bundle();
    for (script, status) in [
        ("true", 0),
        ("exit 7", 7),
        // The first process of a process namespace is immune against its own signals.
        ("sh -c 'kill -9 $$'; exit $?", 137),
        ("exit 300", 300 & 0xff),
    ] {
        bundle = bundle.sh(script);
        oci.oci(["run", "--bundle"])
            .arg(&bundle.path)
            .arg(oci.unique())
            .run()
            .ends(status);
    }
    assert!(oci.ids().is_empty());
    oci.assert_clean();
}

#[test]
fn run_carries_what_is_read_and_written() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("echo to stderr >&2; exec cat");
    // More than any buffer on the way.
    let input: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let output = oci
        .oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .input(input.clone())
        .run()
        .ok();
    assert!(output.stdout == input, "{} bytes", output.stdout.len());
    assert_eq!(output.error(), "to stderr\n");
}

#[test]
fn run_keep_leaves_a_stopped_container() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("exit 3");
    let init = oci.init();
    oci.oci(["run", "--keep", "--bundle"])
        .arg(&bundle.path)
        .arg(&init.id)
        .run()
        .ends(3);
    assert_eq!(init.status(), "stopped");
    init.does("delete").ok();
    oci.assert_clean();
}

#[test]
fn run_detached_returns_when_the_command_runs() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("echo up; exec sleep 1000");
    let init = oci.init();
    let out = oci.path("out");
    oci.oci(["run", "--detach", "--bundle"])
        .arg(&bundle.path)
        .arg("--pid-file")
        .arg(init.pid_file())
        .arg(&init.id)
        .output_to(&out, &oci.path("run.err"))
        .run()
        .ok();
    assert_eq!(init.status(), "running");
    eventually("it writes", Duration::from_secs(5), || {
        fs::read_to_string(&out).unwrap() == "up\n"
    });
    init.kill("9").ok();
    assert_eq!(init.ends(), 137);
}

#[test]
fn signals_to_a_foreground_run_reach_the_container() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .sh("trap 'echo got TERM; exit 9' TERM; echo up; while :; do sleep 0.1; done");
    let mut running = oci
        .oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .start();
    running.wait_for("up");
    running.signal(Signal::TERM);
    let output = running.finish().ends(9);
    assert_eq!(output.text(), "up\ngot TERM");
    oci.assert_clean();
}

#[test]
fn signals_that_come_with_the_first_output_of_a_foreground_process_reach_it() {
    let oci = Oci::new();
    let script = "trap 'echo got TERM; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    // Hooks run when the container has started; nothing forwards signals yet.
    let hook = "sleep 0.5; kill -TERM $PPID";
    let bundle = oci.bundle().sh(script).hook("poststart", hook);
    let output = oci
        .oci(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(oci.unique())
        .run()
        .ends(9);
    assert_eq!(output.text(), "up\ngot TERM");
    let init = oci.start(&oci.bundle().sh("sleep 1000"));
    for _ in 0..20 {
        let mut running = init.executing(&[], &["sh", "-c", script]).start();
        running.wait_for("up");
        running.signal(Signal::TERM);
        assert_eq!(running.finish().ends(9).text(), "up\ngot TERM");
    }
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
}

#[test]
fn the_pid_file_names_a_process_that_ends_with_the_containers_status() {
    let oci = Oci::new();
    for (script, status) in [("exit 0", 0), ("exit 42", 42)] {
        let init = oci.create(&oci.bundle().sh(script));
        assert_eq!(
            init.state()["pid"],
            init.keeper().as_raw_nonzero().get(),
            "the same as state says"
        );
        init.does("start").ok();
        assert_eq!(init.ends(), status);
        init.becomes("stopped");
        init.does("delete").ok();
    }
    oci.assert_clean();
}

#[test]
fn signals_to_the_process_that_stands_for_a_container_reach_it() {
    let oci = Oci::new();
    let script = "for s in HUP USR1 TERM; do trap \"echo got $s\" $s; done; echo up; while :; do sleep 0.1; done";
    let init = oci.start(&oci.bundle().sh(script));
    init.says("up");
    for (signal, name) in [
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
        (Signal::TERM, "TERM"),
    ] {
        kill_process(init.keeper(), signal).unwrap();
        init.says(&format!("got {name}\n"));
    }
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
}

#[test]
fn kill_takes_names_and_numbers_and_may_go_to_all_processes() {
    let oci = Oci::new();
    let script =
        "for s in 10 12 15; do trap \"echo got $s\" $s; done; echo up; while :; do sleep 0.1; done";
    let init = oci.start(&oci.bundle().sh(script));
    init.says("up");
    init.kill("SIGUSR1").ok();
    init.says("got 10\n");
    init.kill("usr2").ok();
    init.says("got 12\n");
    init.does("kill").ok();
    init.says("got 15\n");
    // Signal 0 only checks.
    init.kill("0").ok();
    let mut further = init
        .executing(&[], &["sh", "-c", "echo on; exec sleep 1000"])
        .start();
    further.wait_for("on");
    oci.oci(["kill", "--all", &init.id, "KILL"]).run().ok();
    further.finish().ends(137);
    assert_eq!(init.ends(), 137);
    init.becomes("stopped");
    init.kill("TERM").fails(1, &["container not running"]);
    oci.oci(["kill", "--all", &init.id, "TERM"]).run().ok();
}

#[test]
fn a_paused_container_does_nothing_until_it_is_resumed() {
    let oci = Oci::new();
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";
    let init = oci.start(&oci.bundle().sh(script));
    init.says("3\n");
    init.does("pause").ok();
    assert_eq!(init.status(), "paused");
    init.does("pause").fails(1, &["paused"]);
    init.sh("true").fails(255, &["paused"]);
    std::thread::sleep(Duration::from_millis(300));
    let before = init.output();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(init.output(), before);
    init.does("resume").ok();
    assert_eq!(init.status(), "running");
    eventually("it goes on", Duration::from_secs(5), || {
        init.output() != before
    });
    init.does("resume").fails(1, &["running"]);
    // A paused container can be removed.
    init.does("pause").ok();
    init.delete().ok();
    oci.assert_clean();
}

#[test]
fn the_terminal_of_a_container_is_the_engines() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("tty; stty size; read -r line; echo \"got $line\"; trap 'stty size' WINCH; while :; do sleep 0.1; done").with(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 30, "width": 90});
    });
    let (init, mut console) = oci.run_on_console(&bundle);
    console.wait_for("/dev/");
    console.wait_for("30 90\r\n");
    console.write("typed\r");
    console.wait_for("got typed\r\n");
    console.resize(50, 132);
    console.wait_for("50 132\r\n");
    // The first process is immune against signals that it has no handler for.
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
}

#[test]
fn a_hung_up_console_hangs_up_the_container() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .sh("trap 'exit 5' HUP; echo up; while :; do sleep 0.1; done")
        .with(|config| config["process"]["terminal"] = json!(true));
    let (init, console) = oci.run_on_console(&bundle);
    console.wait_for("up");
    console.hang_up();
    assert_eq!(init.ends(), 5);
}

#[test]
fn what_spec_writes_runs_on_a_terminal() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    fs::remove_file(bundle.path.join("config.json")).unwrap();
    oci.oci(["spec"])
        .with(|command| {
            command.current_dir(&bundle.path);
        })
        .run()
        .ok();
    oci.oci(["spec", "-b"])
        .arg(&bundle.path)
        .run()
        .fails(1, &["exists"]);
    let (init, mut console) = oci.run_on_console(&bundle);
    console.write("hostname; touch /x; exit 4\r");
    console.wait_for("Read-only file system");
    assert_eq!(init.ends(), 4);
}

#[test]
fn the_keeper_needs_less_than_two_megabytes_of_its_own() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let pid = init.keeper().as_raw_nonzero();
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kib: u64 = text
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Dirty:"))
        .map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
        .sum();
    assert!(kib < 2048, "{kib} KiB\n{text}");
}

#[test]
fn what_an_engine_left_open_is_closed_in_what_lives_on() {
    use std::io::Read;
    let oci = Oci::new();
    let bundle = oci.bundle();
    let init = oci.init();
    let fifo = oci.path("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
    let nonblocking = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::RDONLY;
    let mut reader =
        File::from(rustix::fs::open(&fifo, nonblocking, rustix::fs::Mode::empty()).unwrap());
    let script = format!("exec 7>{}; exec \"$@\"", fifo.display());
    oci.creating(&init, &bundle, &[])
        .under(&["sh", "-c", &script, "sh"])
        .run()
        .ok();
    init.does("start").ok();
    // The end of the file, not just nothing to read yet.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn several_containers_live_beside_each_other() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("exec sleep 1000");
    let inits: Vec<_> = (0..3).map(|_| oci.start(&bundle)).collect();
    let mut pids: Vec<_> = inits.iter().map(|init| pid_in(&init.pid_file())).collect();
    pids.dedup();
    assert_eq!(pids.len(), 3);
    inits[1].kill("KILL").ok();
    assert_eq!(inits[1].ends(), 137);
    inits[1].becomes("stopped");
    assert_eq!(inits[0].status(), "running");
    assert_eq!(inits[2].sh("echo still").ok().text(), "still");
}

#[test]
fn a_container_that_is_being_created_says_so_and_cannot_be_deleted() {
    let oci = Oci::new();
    let bundle = oci.bundle().hook("createRuntime", "sleep 0.5");
    let mut seen = Vec::new();
    let init = oci.init();
    let creating = oci.creating(&init, &bundle, &[]).start();
    loop {
        let state = init.does("state");
        if state.status != 0 {
            // There is no record yet.
            continue;
        }
        let status = state.json()["status"].as_str().unwrap().to_owned();
        if status == "created" {
            break;
        }
        if seen.is_empty() {
            init.does("delete").fails(1, &["not stopped"]);
        }
        seen.push(status);
    }
    assert!(seen.iter().all(|status| status == "creating"), "{seen:?}");
    assert!(!seen.is_empty());
    creating.finish().ok();
}

#[test]
fn a_detached_container_that_closes_its_output_ends_its_readers_pipe() {
    let oci = Oci::new();
    let bundle = oci.bundle().sh("echo hi; exec >/dev/null 2>&1; sleep 1000");
    let id = oci.unique();
    let output = oci
        .oci(["run", "--detach", "--bundle"])
        .arg(&bundle.path)
        .arg(&id)
        .limit(Duration::from_secs(20))
        .run()
        .ok();
    assert_eq!(output.text(), "hi");
    assert_eq!(oci.named(&id).status(), "running");
}

#[test]
fn a_link_to_the_runtime_is_the_runtime() {
    let oci = Oci::new();
    let link = oci.path("my-runtime");
    std::os::unix::fs::symlink(&oci.runtime.path, &link).unwrap();
    let features = hull_tests::Invocation::new(&link)
        .arg("features")
        .run()
        .ok();
    assert!(features.json()["ociVersionMax"].is_string());
}

#[test]
fn debug_output_is_in_the_log() {
    let oci = Oci::new();
    let log = oci.path("log");
    let path = log.to_str().unwrap();
    let invocation = hull_tests::Invocation::new(&oci.runtime.path);
    invocation
        .args(["--debug", "--log", path, "features"])
        .run()
        .ok();
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.contains("level=debug") && text.contains("features"),
        "{text}"
    );
}
