//! `hull exec`, `hull top`, `hull pause` and `hull unpause`.

use std::time::Duration;

use hull_tests::{Hull, on_every_machine};

on_every_machine!(
    runs_a_command_in_a_running_container,
    pause_holds_everything_and_unpause_lets_it_go_on
);

fn runs_a_command_in_a_running_container(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(
        &["-e", "SET=run"],
        &["sh", "-c", "echo mine >/tmp/file; sleep 1000"],
    );
    container
        .exec(&["sh", "-c", "until [ -s /tmp/file ]; do sleep 0.05; done"])
        .ok();
    assert_eq!(container.exec(&["cat", "/tmp/file"]).ok().text(), "mine");
    assert_eq!(
        container.sh("echo $SET").ok().text(),
        "run",
        "the container's environment"
    );
    container.sh("exit 9").ends(9);
    let output = container.sh("echo out; echo err >&2").ok();
    assert_eq!(
        (output.text().as_str(), output.error().as_str()),
        ("out", "err\n")
    );
    assert_eq!(container.state(), "running");
}

fn pause_holds_everything_and_unpause_lets_it_go_on(machine: &'static str) {
    let hull = Hull::on(machine);
    let container = hull.start(
        &[],
        &[
            "sh",
            "-c",
            "while :; do echo >>/tmp/ticks; sleep 0.05; done",
        ],
    );
    container
        .sh("until [ -e /tmp/ticks ]; do sleep 0.05; done")
        .ok();
    container.does("pause").ok();
    assert_eq!(container.state(), "paused");
    container
        .exec(&["true"])
        .fails(1, &["paused"])
        .hint("unpause");
    container.does("pause").fails(1, &["paused"]);
    let logs = || {
        container.inspect()["Hull"]["state"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(logs(), "paused");
    container.does("unpause").ok();
    let ticks = || {
        container
            .sh("wc -l </tmp/ticks")
            .ok()
            .text()
            .parse::<u64>()
            .unwrap()
    };
    let before = ticks();
    hull_tests::eventually("it goes on", Duration::from_secs(5), || ticks() > before);
    container.does("unpause").fails(1, &["not paused"]);
}

#[test]
fn input_environment_user_and_directory_are_passed_on() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let name = container.name.as_str();
    let output = hull
        .hull(["exec", "-i", name, "cat"])
        .input("to the end")
        .run()
        .ok();
    assert_eq!(output.text(), "to the end");
    let options = ["-e", "A=b", "-u", "nobody:users", "-w", "/var"];
    assert_eq!(
        container
            .exec_with(&options, &["sh", "-c", "echo $A $(id -u):$(id -g) $PWD"])
            .ok()
            .text(),
        "b 65534:100 /var"
    );
}

#[test]
fn a_detached_command_runs_on() {
    let hull = Hull::new();
    let container = hull.sleeper();
    container
        .exec_with(&["-d"], &["sh", "-c", "sleep 0.3; echo done >/tmp/done"])
        .ok();
    assert_eq!(container.sh("cat /tmp/done 2>/dev/null").ends(1).text(), "");
    container
        .sh("until [ -s /tmp/done ]; do sleep 0.05; done")
        .ok();
}

#[test]
fn what_is_not_there_and_what_is_not_executable_are_told_apart() {
    let hull = Hull::new();
    let container = hull.sleeper();
    container
        .exec(&["no-such-command"])
        .fails(127, &["no-such-command", "not found"]);
    container
        .exec(&["/etc/passwd"])
        .fails(126, &["/etc/passwd", "permission denied"]);
    hull.hull(["exec", "nobody-there", "true"])
        .run()
        .fails(1, &["no such container", "nobody-there"]);
    container.does("stop").ok();
    container.exec(&["true"]).fails(1, &["not running"]);
}

#[test]
fn the_end_of_the_container_ends_what_was_executed_in_it() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let running = hull
        .hull(["exec", &container.name, "sleep", "1000"])
        .start();
    container
        .sh("until ps | grep -v grep | grep -q 'sleep 1000'; do :; done")
        .ok();
    container.does("kill").ok();
    running.finish().ends(137);
}

#[test]
fn top_lists_the_processes_of_the_container_and_no_others() {
    let hull = Hull::new();
    let container = hull.start(&[], &["sh", "-c", "sleep 1000 & sleep 2000; true"]);
    container
        .sh("until ps | grep -q 'sleep 200[0]'; do :; done")
        .ok();
    let output = container.does("top").ok();
    let text = output.text();
    assert!(text.lines().next().unwrap().contains("PID"), "{text}");
    assert!(
        text.contains("sleep 1000") && text.contains("sleep 2000"),
        "{text}"
    );
    assert!(!text.contains("agent"), "{text}");
    let list = hull
        .hull(["top", "--json", &container.name])
        .run()
        .ok()
        .json();
    assert_eq!(list.as_array().unwrap().len(), 3, "{list}");
    let top = |options: &[&str]| {
        let top = hull.hull(["top", &container.name]).args(options);
        top.run()
    };
    let columns = top(&["-o", "pid,ppid,comm,args"]).ok().text();
    let shell = columns.lines().nth(1).unwrap();
    assert!(shell.starts_with("1 "), "{columns}");
    assert!(shell.contains(" sh ") && shell.ends_with("sh -c sleep 1000 & sleep 2000; true"));
    let users = top(&["aux"]).ok().text();
    let sleep: Vec<&str> = users
        .lines()
        .find(|line| line.ends_with("sleep 2000"))
        .unwrap()
        .split_whitespace()
        .collect();
    let size: u64 = sleep[4].parse().unwrap();
    let resident: u64 = sleep[5].parse().unwrap();
    assert!(size >= resident && resident > 0, "{users}");
    top(&["-o", "wchan"]).fails(125, &["\"wchan\"", "ps"]);
}

#[test]
fn twenty_commands_at_once_are_all_served() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let all: Vec<_> = (0..20)
        .map(|n| {
            hull.hull([
                "exec",
                &container.name,
                "sh",
                "-c",
                &format!("echo {n}; exit {n}"),
            ])
            .start()
        })
        .collect();
    for (n, running) in all.into_iter().enumerate() {
        assert_eq!(
            running.finish().ends(i32::try_from(n).unwrap()).text(),
            n.to_string()
        );
    }
}
