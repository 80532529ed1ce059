//! Further processes with `hull-oci exec`, and what `hull-oci` reports of a container: ps, list,
//! state, events, features.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hull_tests::{Bundle, Console, Invocation, Oci, Terminal, end_of, eventually, pid_in};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

#[test]
fn exec_ends_with_the_status_of_the_command_and_carries_its_streams() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let output = init
        .executing(&[], &["sh", "-c", "tr a-z A-Z; echo oops >&2; exit 7"])
        .input("hello\n")
        .run()
        .ends(7);
    assert_eq!(output.text(), "HELLO");
    assert_eq!(output.error(), "oops\n");
    init.sh("kill -9 $$").ends(137);
    init.sh("kill $$").ends(143);
}

#[test]
fn exec_that_cannot_begin_ends_with_255() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    init.exec(&[], &["no-such-command"])
        .fails(255, &["no-such-command", "not found"]);
    init.exec(&[], &["/etc/passwd"])
        .fails(255, &["/etc/passwd", "permission denied"]);
    init.exec(&["--cwd", "relative"], &["true"])
        .fails(255, &["relative"]);
    oci.named("nobody")
        .sh("true")
        .fails(255, &["container does not exist"]);
    init.kill("KILL").ok();
    init.becomes("stopped");
    init.sh("true").fails(255, &["stopped"]);
}

#[test]
fn exec_options_change_what_the_command_sees() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let output = init
        .exec(
            &[
                "--env",
                "A=1",
                "-e",
                "B=two words",
                "--cwd",
                "/etc",
                "--user",
                "12:34",
                "-g",
                "56",
            ],
            &["sh", "-c", "echo $A $B; pwd; id -u; id -G"],
        )
        .ok();
    assert_eq!(output.text(), "1 two words\n/etc\n12\n34 56");
    let output = init.sh("echo $TERM; pwd; id -u").ok();
    assert_eq!(
        output.text(),
        "xterm\n/\n0",
        "without options: the container's own"
    );
}

#[test]
fn exec_capabilities_are_the_containers_and_those_added() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let script = [
        "sh",
        "-c",
        "sed -n 's/^Cap[EB][fn][fd]:\t//p' /proc/self/status",
    ];
    let effective = |options: &[&str]| {
        let text = init.exec(options, &script).ok().text();
        u64::from_str_radix(text.lines().next().unwrap(), 16).unwrap()
    };
    let usual = effective(&[]);
    let net_raw = 1 << 13;
    assert_eq!(usual & net_raw, 0);
    assert_eq!(effective(&["--cap", "CAP_NET_RAW"]), usual | net_raw);
    // One of the future is left out, as in config.json.
    assert_eq!(effective(&["--cap", "CAP_OF_THE_FUTURE"]), usual);
}

#[test]
fn exec_new_privileges_can_be_forbidden() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .with(|config| config["process"]["noNewPrivileges"] = json!(false));
    let init = oci.start(&bundle);
    let script = ["sed", "-n", "s/^NoNewPrivs:\t//p", "/proc/self/status"];
    assert_eq!(init.exec(&[], &script).ok().text(), "0");
    assert_eq!(init.exec(&["--no-new-privs"], &script).ok().text(), "1");
}

#[test]
fn exec_takes_the_process_of_a_file() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let init = oci.start(&bundle);
    let mut process = bundle.config["process"].clone();
    process["args"] = json!(["sh", "-c", "echo $FROM; exit 5"]);
    process["env"] = json!(["PATH=/bin", "FROM=file"]);
    let file = oci.path("process.json");
    fs::write(&file, process.to_string()).unwrap();
    let output = init
        .exec(&["--process", file.to_str().unwrap()], &[])
        .ends(5);
    assert_eq!(output.text(), "file");
    fs::write(&file, "{").unwrap();
    init.exec(&["--process", file.to_str().unwrap()], &[])
        .fails(255, &["process.json"]);
}

#[test]
fn a_detached_exec_is_a_process_that_ends_with_the_commands_status() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let (out, pid_file) = (oci.path("exec.out"), oci.path("exec.pid"));
    let script = "echo up; trap 'echo got it; exit 6' USR1; while :; do sleep 0.1; done";
    init.executing(
        &["--detach", "--pid-file", pid_file.to_str().unwrap()],
        &["sh", "-c", script],
    )
    .output_to(&out, &oci.path("exec.err"))
    .run()
    .ok();
    let said = |text: &str| {
        eventually(text, Duration::from_secs(10), || {
            fs::read_to_string(&out).unwrap().contains(text)
        });
    };
    said("up\n");
    let pid = pid_in(&pid_file);
    let listed = oci
        .oci(["ps", "--format", "json", &init.id])
        .run()
        .ok()
        .json();
    let expected = json!([
        init.keeper().as_raw_nonzero().get(),
        pid.as_raw_nonzero().get()
    ]);
    assert_eq!(listed, expected);
    kill_process(pid, Signal::USR1).unwrap();
    said("got it\n");
    assert_eq!(end_of(pid), 6);
    assert_eq!(init.status(), "running");
}

#[test]
fn a_detached_exec_ends_with_its_container() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let pid_file = oci.path("exec.pid");
    init.executing(
        &["-d", "--pid-file", pid_file.to_str().unwrap()],
        &["sleep", "1000"],
    )
    .output_to(&oci.path("exec.out"), &oci.path("exec.err"))
    .run()
    .ok();
    let pid = pid_in(&pid_file);
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
    assert_eq!(end_of(pid), 137);
}

#[test]
fn the_terminal_of_an_exec_is_the_engines() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let (listener, socket) = oci.console_socket();
    let pid_file = oci.path("exec.pid");
    let receiving = std::thread::spawn(move || Console::receive(&listener));
    let script = "tty; read -r line; echo \"got $line\"; trap 'stty size' WINCH; trap 'exit 8' INT; echo ready; while :; do sleep 0.1; done";
    init.executing(
        &[
            "--tty",
            "--detach",
            "--console-socket",
            socket.to_str().unwrap(),
            "--pid-file",
            pid_file.to_str().unwrap(),
        ],
        &["sh", "-c", script],
    )
    .output_to(&oci.path("exec.out"), &oci.path("exec.err"))
    .run()
    .ok();
    let mut console = receiving.join().unwrap();
    console.wait_for("/dev/pts/");
    console.write("typed\r");
    console.wait_for("got typed\r\n");
    console.wait_for("ready");
    console.resize(41, 123);
    console.wait_for("41 123\r\n");
    console.write("\x03");
    assert_eq!(end_of(pid_in(&pid_file)), 8);
    assert_eq!(fs::read_to_string(oci.path("exec.out")).unwrap(), "");
}

#[test]
fn ps_shows_processes_of_the_host_that_stand_for_the_containers() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().args(&["sleep", "1234"]));
    let pid = init.keeper().as_raw_nonzero().to_string();
    let table = oci.oci(["ps", &init.id]).run().ok().text();
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 2, "{table}");
    assert!(lines[0].contains("PID") && lines[0].contains("CMD"));
    assert!(lines[1].contains(&pid) && lines[1].contains("sleep 1234"));
    let own = oci
        .oci(["ps", &init.id, "-o", "pid,args"])
        .run()
        .ok()
        .text();
    assert!(
        own.lines()
            .nth(1)
            .unwrap()
            .trim_start()
            .starts_with(pid.as_str()),
        "{own}"
    );
    let listed = oci.oci(["ps", "-f", "json", &init.id]).run().ok().json();
    assert_eq!(listed, json!([pid.parse::<i32>().unwrap()]));
}

#[test]
fn list_and_state_say_the_same() {
    let oci = Oci::new();
    assert_eq!(oci.oci(["list", "-f", "json"]).run().ok().json(), json!([]));
    let bundle = oci
        .bundle()
        .with(|config| config["annotations"] = json!({"org.example": "value"}));
    let (one, two) = (oci.create(&bundle), oci.start(&bundle));
    let state = one.state();
    assert_eq!(state["ociVersion"], bundle.config["ociVersion"]);
    assert_eq!(state["bundle"], bundle.path.to_str().unwrap());
    assert_eq!(
        state["rootfs"],
        bundle.root("").to_str().unwrap().trim_end_matches('/')
    );
    assert_eq!(state["annotations"], json!({"org.example": "value"}));
    assert_eq!(state["owner"], "root");
    assert!(state["created"].as_str().unwrap().ends_with('Z'));
    let listed = oci.oci(["list", "-f", "json"]).run().ok();
    assert_eq!(listed.json(), json!([one.state(), two.state()]));
    // As runc's, which scripts search as text: one line, in this order.
    let text = listed.text();
    assert!(
        text.starts_with(r#"[{"ociVersion":"#) && !text.contains('\n'),
        "{text}"
    );
    assert_eq!(oci.ids(), [one.id.clone(), two.id.clone()]);
    let table = oci.oci(["list"]).run().ok().text();
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines[0].ends_with("OWNER"));
    assert!(lines[1].contains("created") && lines[2].contains("running"));
}

#[test]
fn events_tell_figures_of_the_container_until_it_ends() {
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .resources("memory", json!({"limit": 64 << 20}))
        .resources("pids", json!({"limit": 30}));
    let init = oci.start(&bundle.sh("while :; do sleep 0.01; done"));
    let once = oci.oci(["events", "--stats", &init.id]).run().ok();
    assert_eq!(once.text().lines().count(), 1);
    let event = once.json();
    let begin = format!(r#"{{"type":"stats","id":"{}","data":"#, init.id);
    assert!(once.text().starts_with(&begin), "{}", once.text());
    assert_eq!(
        (&event["type"], &event["id"]),
        (&json!("stats"), &json!(init.id))
    );
    let data = &event["data"];
    assert_eq!(data["memory"]["usage"]["limit"], 64 << 20);
    assert!(data["memory"]["usage"]["usage"].as_u64().unwrap() > 0);
    assert_eq!(data["pids"]["limit"], 30);
    assert!(data["pids"]["current"].as_u64().unwrap() >= 1);
    // It may not have run yet.
    eventually("processor time", Duration::from_secs(5), || {
        let event = oci.oci(["events", "--stats", &init.id]).run().ok().json();
        event["data"]["cpu"]["usage"]["total"].as_u64().unwrap() > 0
    });

    let mut watching = oci.oci(["events", "--interval", "100ms", &init.id]).start();
    eventually("three lines", Duration::from_secs(10), || {
        watching.so_far().lines().count() >= 3
    });
    assert!(watching.is_running());
    init.kill("KILL").ok();
    let output = watching.finish().ok();
    let total = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap();
        event["data"]["cpu"]["usage"]["total"].as_u64().unwrap()
    };
    let totals: Vec<u64> = output.text().lines().map(total).collect();
    assert!(totals.is_sorted(), "{totals:?}");
    oci.oci(["events", "--stats", &init.id])
        .run()
        .fails(1, &["not running"]);
}

#[test]
fn features_tell_what_engines_ask_for() {
    let oci = Oci::new();
    let features = oci.oci(["features"]).run().ok().json();
    assert_eq!(features["ociVersionMin"], "1.0.0");
    assert!(
        features["ociVersionMax"]
            .as_str()
            .unwrap()
            .starts_with("1.2")
    );
    let has = |list: &Value, name: &str| list.as_array().unwrap().iter().any(|one| one == name);
    assert!(has(&features["hooks"], "createRuntime"));
    assert!(has(&features["mountOptions"], "rbind"));
    assert!(has(&features["linux"]["namespaces"], "time"));
    assert!(has(&features["linux"]["capabilities"], "CAP_SYS_ADMIN"));
    assert_eq!(features["linux"]["seccomp"]["enabled"], true);
}

#[test]
fn the_version_names_that_of_the_specification() {
    let oci = Oci::new();
    let text = oci.oci(["--version"]).run().ok().text();
    assert!(
        text.lines().any(|line| line.starts_with("spec: 1.")),
        "{text}"
    );
}

#[test]
fn errors_are_logged_in_the_form_that_engines_parse() {
    let oci = Oci::new();
    let log = oci.path("log.json");
    let logged = |format: &str, arguments: &[&str]| {
        let output = oci
            .oci(["--log", log.to_str().unwrap(), "--log-format", format])
            .args(arguments)
            .run();
        assert_ne!(output.status, 0);
        fs::read_to_string(&log).unwrap()
    };
    logged("json", &["state", "nobody"]);
    let text = logged("json", &["start", "nobody"]);
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2, "{text}");
    for line in &lines {
        assert_eq!(line["level"], "error");
        assert_eq!(line["msg"], "container does not exist");
        assert!(line["time"].as_str().unwrap().contains('T'));
    }
    let text = logged("text", &["state", "nobody"]);
    let line = text.lines().last().unwrap();
    assert!(
        line.contains("level=error") && line.contains("msg=\"container does not exist\""),
        "{line}"
    );
}

/// `run`, in the foreground, whose output is not read yet.
fn run_into_a_pipe(oci: &Oci, bundle: &Bundle, id: &str) -> Child {
    let bundle = bundle.path.to_str().unwrap();
    let (mut command, _) = oci.oci(["run", "--bundle", bundle, id]).into_parts();
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn what_a_container_wrote_arrives_whole_however_slowly_it_is_read() {
    const LENGTH: usize = 700_000;
    let oci = Oci::new();
    let bundle = oci
        .bundle()
        .args(&["head", "-c", &LENGTH.to_string(), "/dev/zero"]);
    let id = oci.unique();
    let mut running = run_into_a_pipe(&oci, &bundle, &id);
    let mut stdout = running.stdout.take().unwrap();
    let mut arrived = 0;
    let mut piece = vec![0; 16 << 10];
    loop {
        match std::io::Read::read(&mut stdout, &mut piece).unwrap() {
            0 => break,
            length => arrived += length,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(arrived, LENGTH);
    assert!(running.wait().unwrap().success());
}

#[test]
fn a_container_whose_output_nobody_reads_is_deleted_by_force_at_once() {
    let oci = Oci::new();
    let bundle = oci.bundle().args(&["head", "-c", "700000", "/dev/zero"]);
    let id = oci.unique();
    let mut running = run_into_a_pipe(&oci, &bundle, &id);
    let state = || oci.oci(["state", &id]).run();
    eventually("it runs", Duration::from_secs(10), || {
        let state = state();
        state.status == 0 && state.json()["status"] == "running"
    });
    std::thread::sleep(Duration::from_millis(300));
    let deleted = oci.oci(["delete", "--force", &id]).run().ok();
    assert!(deleted.took < Duration::from_secs(10), "{:?}", deleted.took);
    running.kill().unwrap();
    running.wait().unwrap();
    oci.assert_clean();
}

#[test]
fn exec_ends_with_its_process_and_not_with_what_that_left_in_the_background() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let begin = Instant::now();
    let output = init
        .sh("sleep 1000 & echo out; echo err >&2; exit 7")
        .ends(7);
    assert_eq!(
        (output.text(), output.error()),
        ("out".into(), "err\n".into())
    );
    // The background process writes without end, and what came before it is not lost.
    let script = "head -c 300000 /dev/zero; (while :; do echo more; done) & exit 3";
    let output = init.executing(&[], &["sh", "-c", script]).run().ends(3);
    assert!(output.stdout.starts_with(&[0; 300_000]));
    assert!(begin.elapsed() < Duration::from_secs(20));
    // It goes on.
    init.sh("ps | grep 'while [:]'").ok();
}

#[test]
fn exec_works_in_a_container_that_was_created_and_not_started() {
    let oci = Oci::new();
    let init = oci.create(&oci.bundle().sh("echo started; exec sleep 1000"));
    assert_eq!(init.sh("echo before").ok().text(), "before");
    init.does("start").ok();
    init.says("started");
}

#[test]
fn exec_with_a_terminal_has_its_size_from_the_beginning() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    for _ in 0..5 {
        let mut terminal = Terminal::start(init.executing(&["--tty"], &["stty", "size"]), 33, 77);
        terminal.wait_for("33 77");
        terminal.wait();
    }
    let process = oci.path("process.json");
    let config = json!({
        "terminal": true, "consoleSize": {"height": 12, "width": 34},
        "args": ["stty", "size"], "cwd": "/", "env": ["PATH=/bin"],
    });
    fs::write(&process, config.to_string()).unwrap();
    let (listener, path) = oci.console_socket();
    let console = std::thread::spawn(move || Console::receive(&listener));
    let options = [
        "--detach",
        "--process",
        process.to_str().unwrap(),
        "--console-socket",
        path.to_str().unwrap(),
    ];
    init.exec(&options, &[]).ok();
    console.join().unwrap().wait_for("12 34");
}

#[test]
fn exec_with_a_terminal_needs_one_among_the_standard_streams_only() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let command = format!(
        "{} --root {} exec --tty {} tty </dev/null; echo status $?",
        oci.runtime.path.display(),
        oci.path("state").display(),
        init.id
    );
    let shell = Invocation::new("sh").args(["-c", &command]);
    let mut terminal = Terminal::start(shell, 24, 80);
    terminal.wait_for("/dev/pts/");
    terminal.wait_for("status 0");
    terminal.wait();
    init.executing(&["--tty"], &["tty"])
        .under(&["setsid", "--wait"])
        .run()
        .fails(255, &["started without one"]);
}
