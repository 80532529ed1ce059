//! `hull run`: what the options mean inside the container, and what comes back.

use std::fs;

use hull_tests::{Hull, guest_files, on_every_machine, usual_machine};

on_every_machine!(
    prints_what_the_command_prints_on_either_stream,
    ends_with_the_exit_status_of_the_command,
    passes_input_on_with_i,
    runs_under_a_kernel_of_its_own,
    knows_users_by_name_and_number,
    has_the_environment_directory_and_host_name_asked_for,
    is_process_one_of_its_own_namespace,
    runs_in_the_background_with_d,
);

fn prints_what_the_command_prints_on_either_stream(machine: &'static str) {
    let hull = Hull::on(machine);
    let output = hull.sh(&[], "echo out; echo err >&2").ok();
    assert_eq!(output.text(), "out");
    assert_eq!(output.error(), "err\n");
}

fn ends_with_the_exit_status_of_the_command(machine: &'static str) {
    let hull = Hull::on(machine);
    hull.sh(&[], "exit 7").ends(7);
    hull.sh(&[], "sh -c 'kill -TERM $$'; exit $?").ends(143);
    hull.run(&[], &["true"]).ends(0);
    hull.run(&[], &["false"]).ends(1);
}

fn passes_input_on_with_i(machine: &'static str) {
    let hull = Hull::on(machine);
    let output = hull
        .hull(["run", "--rm", "-i", "busybox", "cat"])
        .input("one\ntwo\n")
        .run()
        .ok();
    assert_eq!(output.stdout, b"one\ntwo\n");
    let output = hull
        .hull(["run", "--rm", "busybox", "cat"])
        .input("unread")
        .run()
        .ok();
    assert_eq!(output.stdout, b"", "without -i there is no input");
}

fn runs_under_a_kernel_of_its_own(machine: &'static str) {
    let hull = Hull::on(machine);
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let guest = hull.run(&[], &["uname", "-r"]).ok().text();
    assert_ne!(guest, host.trim());
    let architecture = if machine == "uml" {
        "um"
    } else {
        std::env::consts::ARCH
    };
    let information = fs::read(guest_files().join(format!("kernel-{architecture}.json"))).unwrap();
    let information: serde_json::Value = serde_json::from_slice(&information).unwrap();
    assert_eq!(information["version"], guest);
}

fn knows_users_by_name_and_number(machine: &'static str) {
    let hull = Hull::on(machine);
    let user = |options: &[&str]| hull.sh(options, "echo $(id -u):$(id -g)").ok().text();
    assert_eq!(user(&[]), "0:0");
    assert_eq!(user(&["-u", "nobody"]), "65534:65534");
    assert_eq!(user(&["-u", "nobody:users"]), "65534:100");
    assert_eq!(user(&["-u", "1234:5678"]), "1234:5678");
    assert_eq!(
        hull.sh(&["-u", "nobody"], "echo $HOME").ok().text(),
        "/home"
    );
    // Groups that list the user are its additional groups.
    assert_eq!(hull.sh(&["-u", "nobody"], "id -G").ok().text(), "65534 100");
    hull.run(&["-u", "somebody"], &["true"])
        .fails(125, &["somebody"]);
}

fn has_the_environment_directory_and_host_name_asked_for(machine: &'static str) {
    let hull = Hull::on(machine);
    let script = "echo $A $B $HOSTNAME $(hostname) $PWD";
    let options = [
        "-e",
        "A=one two",
        "--env",
        "B=three",
        "--hostname",
        "box.example",
        "-w",
        "/var/tmp",
    ];
    assert_eq!(
        hull.sh(&options, script).ok().text(),
        "one two three box.example box.example /var/tmp"
    );
}

fn is_process_one_of_its_own_namespace(machine: &'static str) {
    let hull = Hull::on(machine);
    assert_eq!(
        hull.sh(&[], "echo $$; echo /proc/[0-9]*").ok().text(),
        "1\n/proc/1"
    );
}

fn runs_in_the_background_with_d(machine: &'static str) {
    let hull = Hull::on(machine);
    let output = hull
        .hull([
            "run",
            "-d",
            "--name",
            "background",
            "busybox",
            "sleep",
            "1000",
        ])
        .run()
        .ok();
    let id = output.text();
    assert_eq!(id.len(), 64, "the whole id is printed: {id}");
    let container = hull.container("background");
    assert_eq!(container.inspect()["Hull"]["id"], id.as_str());
    assert_eq!(container.state(), "running");
    hull.hull(["rm", "-f", &id]).run().ok();
    hull.assert_clean();
}

#[test]
fn rm_leaves_nothing_and_without_it_the_container_stays() {
    let hull = Hull::new();
    hull.run(&[], &["true"]).ok();
    hull.assert_clean();
    hull.hull(["run", "--name", "kept", "busybox", "false"])
        .run()
        .ends(1);
    assert_eq!(hull.names(), ["kept"]);
    assert_eq!(hull.container("kept").state(), "stopped");
    hull.container("kept").does("rm").ok();
    hull.assert_clean();
}

#[test]
fn the_callers_variables_and_files_of_variables_are_passed_on() {
    let hull = Hull::new();
    let file = hull.scratch().join("variables");
    fs::write(&file, "# a comment\n\nFROM_FILE=a b\nCALLERS\nABSENT\n").unwrap();
    let file = file.to_str().unwrap();
    let output = hull
        .hull([
            "run",
            "--rm",
            "--env-file",
            file,
            "-e",
            "MINE",
            "busybox",
            "env",
        ])
        .env("CALLERS", "yes")
        .env("MINE", "too")
        .run()
        .ok();
    let text = output.text();
    let lines: Vec<&str> = text.lines().collect();
    for wanted in ["FROM_FILE=a b", "CALLERS=yes", "MINE=too"] {
        assert!(lines.contains(&wanted), "{wanted}: {text}");
    }
    assert!(!text.contains("ABSENT"), "{text}");
}

#[test]
fn entrypoint_and_arguments_combine_as_with_docker() {
    let hull = Hull::new();
    assert_eq!(
        hull.run(&["--entrypoint", "echo"], &["a", "b"]).ok().text(),
        "a b"
    );
    assert_eq!(
        hull.run(&["--entrypoint", ""], &["echo", "c"]).ok().text(),
        "c"
    );
    // The image's own command.
    let output = hull
        .hull(["run", "--rm", "-i", "busybox"])
        .input("echo from the shell\n")
        .run()
        .ok();
    assert_eq!(output.text(), "from the shell");
}

#[test]
fn a_read_only_root_takes_no_writes_but_tmpfs_does() {
    let hull = Hull::new();
    let script = "touch /file 2>/dev/null && echo wrote; touch /tmp/file && echo temporary";
    assert_eq!(
        hull.sh(&["--read-only", "--tmpfs", "/tmp"], script)
            .ok()
            .text(),
        "temporary"
    );
}

#[test]
fn tmpfs_has_the_size_asked_for_and_runs_no_programs() {
    let hull = Hull::new();
    let script = "df -k /scratch | tail -n 1 | awk '{print $2}'; cp /bin/busybox /scratch/true; /scratch/true || echo $?";
    let output = hull.sh(&["--tmpfs", "/scratch:size=4m"], script).ok();
    assert_eq!(output.text(), "4096\n126");
}

#[test]
fn capabilities_are_dockers_and_can_be_added_and_dropped() {
    let hull = Hull::new();
    let effective = |options: &[&str]| {
        let text = hull
            .run(options, &["grep", "CapEff", "/proc/self/status"])
            .ok()
            .text();
        u64::from_str_radix(text.split_whitespace().last().unwrap(), 16).unwrap()
    };
    assert_eq!(effective(&[]), 0xa804_25fb);
    assert_eq!(effective(&["--cap-drop", "ALL"]), 0);
    assert_eq!(effective(&["--cap-drop", "ALL", "--cap-add", "CHOWN"]), 1);
    assert_eq!(
        effective(&["--cap-add", "SYS_ADMIN"]),
        0xa804_25fb | 1 << 21
    );
    assert_eq!(effective(&["--cap-add", "ALL"]).count_ones(), 41);
    assert_eq!(
        effective(&["-u", "nobody"]),
        0,
        "another user than root has none in effect"
    );
    hull.run(&["--cap-add", "FLY"], &["true"])
        .fails(125, &["FLY"]);
}

#[test]
fn kernel_parameters_resource_limits_and_shared_memory_are_set() {
    let hull = Hull::new();
    let options = [
        "--sysctl",
        "net.ipv4.ip_forward=1",
        "--sysctl",
        "kernel.msgmax=12345",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--shm-size",
        "8m",
    ];
    let script = "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax; ulimit -Sn; ulimit -Hn; ulimit -c;
                  df -k /dev/shm | tail -n 1 | awk '{print $2}'";
    assert_eq!(
        hull.sh(&options, script).ok().text(),
        "1\n12345\n100\n200\n0\n8192"
    );
}

#[test]
fn init_passes_signals_on_and_reaps() {
    let hull = Hull::new();
    // An orphan of the shell becomes a child of process 1, which must collect it.
    let script = "(sleep 0.1 &) ; sleep 0.5; ps -o stat,comm | grep -c '^Z'";
    assert_eq!(hull.sh(&["--init"], script).ends(1).text(), "0");
    let container = hull.start(&["--init"], &["sleep", "1000"]);
    assert_ne!(container.sh("cat /proc/1/comm").ok().text(), "sleep");
    container.does("stop").ok();
    assert_eq!(container.wait(), 143, "the signal reached the command");
}

#[test]
fn stop_sends_the_signal_asked_for() {
    let hull = Hull::new();
    let script = "trap 'echo got USR1; exit 3' USR1; echo ready; while :; do sleep 0.05; done";
    let mut running = hull
        .hull([
            "run",
            "--name",
            "signalled",
            "--stop-signal",
            "USR1",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .start();
    running.wait_for("ready");
    hull.container("signalled").does("stop").ok();
    let output = running.finish().ends(3);
    assert!(output.text().ends_with("got USR1"), "{}", output.text());
}

#[test]
fn labels_are_kept() {
    let hull = Hull::new();
    let container = hull.start(&["--label", "a=b", "--label", "empty"], &["sleep", "1000"]);
    let labels = &container.inspect()["Hull"]["labels"];
    assert_eq!((&labels["a"], &labels["empty"]), (&"b".into(), &"".into()));
}

#[test]
fn without_a_network_only_loopback_is_there_and_up() {
    let hull = Hull::new();
    let script = "ls /sys/class/net; cat /sys/class/net/lo/operstate; ping -c 1 -q 127.0.0.1 >/dev/null && echo answers";
    let output = hull.sh(&["--network", "none"], script).ok();
    let text = output.text();
    assert!(
        text.starts_with("lo\n") && text.ends_with("answers"),
        "{text}"
    );
    assert_eq!(output.error(), "", "what was asked for needs no remark");
}

#[test]
fn the_kernel_can_be_another_one() {
    let hull = Hull::new();
    let kernel = hull.scratch().join("my-kernel");
    fs::copy(guest_files().join("kernel-um"), &kernel).unwrap();
    let container = hull.start(&["--kernel", kernel.to_str().unwrap()], &["sleep", "1000"]);
    assert_eq!(
        container.inspect()["Hull"]["kernel"],
        kernel.to_str().unwrap()
    );
}

#[test]
fn timings_name_every_step_of_the_start() {
    let hull = Hull::new();
    let output = hull.run(&["--timings"], &["sleep", "0.5"]).ok();
    let error = output.error();
    for step in ["image", "boot", "container"] {
        assert!(error.contains(step), "no step {step:?}: {error}");
    }
    assert!(error.contains("ms"), "{error}");
}

#[test]
fn the_image_is_never_changed() {
    let hull = Hull::new();
    hull.sh(&[], "echo changed >/etc/passwd; rm /bin/cat; mkdir /new")
        .ok();
    assert_eq!(
        hull.sh(&[], "head -n 1 /etc/passwd; ls -d /bin/cat /new")
            .ends(1)
            .text(),
        "root:x:0:0:root:/root:/bin/sh\n/bin/cat"
    );
}

#[test]
fn proc_and_sys_show_what_a_container_may_see() {
    let hull = Hull::new();
    let script = "cat /proc/kcore 2>/dev/null | wc -c; echo 1 2>/dev/null >/proc/sys/kernel/panic || echo read-only;
                  ls /sys/firmware | wc -l; mount | grep -c ' /dev/mqueue type mqueue'; mount | grep -c ' /dev/pts type devpts';
                  ls /dev | tr '\\n' ' '";
    let text = hull.sh(&[], script).ok().text();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(&lines[..5], ["0", "read-only", "0", "1", "1"], "{text}");
    for device in [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "fd", "shm",
    ] {
        assert!(
            lines[5].split(' ').any(|name| name == device),
            "{device}: {}",
            lines[5]
        );
    }
}

#[test]
fn arguments_environment_and_output_may_be_any_bytes() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let hull = Hull::new();
    let output = hull
        .hull(["run", "--rm", "-e"])
        .arg(OsStr::from_bytes(b"BYTES=\xff\xfe"))
        .args([
            "busybox",
            "sh",
            "-c",
            "printf '%s|%s' \"$BYTES\" \"$1\"",
            "-",
        ])
        .arg(OsStr::from_bytes(b"\x80 \xc3\n"))
        .run()
        .ok();
    assert_eq!(output.stdout, b"\xff\xfe|\x80 \xc3\n");
}

#[test]
fn hundred_megabytes_of_output_arrive_whole() {
    let hull = Hull::new();
    let output = hull
        .sh(
            &[],
            "dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' x",
        )
        .ok();
    assert_eq!(output.stdout.len(), 100 << 20);
    assert!(output.stdout.iter().all(|byte| *byte == b'x'));
}

#[test]
fn a_reader_that_sleeps_holds_the_container_up_and_loses_nothing() {
    use std::io::Read;
    use std::process::Stdio;
    use std::time::Duration;
    let hull = Hull::new();
    let script =
        "i=0; while [ $i -lt 100 ]; do dd if=/dev/zero bs=1M count=1 2>/dev/null; i=$((i+1)); done";
    let (mut command, _) = hull
        .hull([
            "run", "--rm", "--name", "slow", "busybox", "sh", "-c", script,
        ])
        .into_parts();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Long enough to write all of it, if nothing blocks it.
    std::thread::sleep(Duration::from_secs(3));
    let memory = |which: &str| {
        let pid = hull.container("slow").host_process(which).as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("RssAnon:"))
            .unwrap()
            .to_owned();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    // Where the devices are in the machine process, the guest's memory is, too.
    let without_guest = match usual_machine() {
        "kvm" => &["sandbox"][..],
        _ => &["sandbox", "devices"],
    };
    for process in without_guest {
        assert!(
            memory(process) < 16 << 10,
            "{process} keeps {} kB of what nobody reads",
            memory(process)
        );
    }
    let mut bytes = 0;
    let mut stdout = child.stdout.take().unwrap();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match stdout.read(&mut chunk).unwrap() {
            0 => break,
            n => bytes += n,
        }
    }
    assert_eq!(bytes, 100 << 20);
    assert!(child.wait().unwrap().success());
}

#[test]
fn input_ends_when_the_callers_does_and_not_before() {
    let hull = Hull::new();
    let mut running = hull
        .hull([
            "run",
            "--rm",
            "-i",
            "busybox",
            "sh",
            "-c",
            "while read line; do echo got $line; done; echo end",
        ])
        .start();
    running.write("a\n");
    running.wait_for("got a");
    running.write("b\n");
    running.wait_for("got b");
    assert!(running.is_running());
    running.close_input();
    assert_eq!(running.finish().ok().text(), "got a\ngot b\nend");
}

#[test]
fn alone_twenty_started_at_once_all_run() {
    let hull = Hull::new();
    let running: Vec<_> = (0..20)
        .map(|n| {
            hull.hull([
                "run",
                "--rm",
                "busybox",
                "sh",
                "-c",
                &format!("echo {n}; sleep 1"),
            ])
            .start()
        })
        .collect();
    for (n, running) in running.into_iter().enumerate() {
        assert_eq!(running.finish().ok().text(), n.to_string());
    }
    hull.assert_clean();
}

#[test]
fn of_two_that_want_one_name_one_gets_it() {
    let hull = Hull::new();
    let both: Vec<_> = (0..2)
        .map(|_| {
            hull.hull(["run", "-d", "--name", "one", "busybox", "sleep", "1000"])
                .start()
        })
        .collect();
    let mut statuses: Vec<i32> = both
        .into_iter()
        .map(|running| running.finish().status)
        .collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [0, 125]);
    assert_eq!(hull.names(), ["one"]);
}
