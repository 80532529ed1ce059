//! A user at a terminal: `-t`, resizing, Ctrl-C, detaching, a window that is closed.

use hull_tests::{Hull, Terminal, on_every_machine};

on_every_machine!(a_shell_on_a_terminal_works_as_one_expects);

fn a_shell_on_a_terminal_works_as_one_expects(machine: &'static str) {
    let hull = Hull::on(machine);
    let mut terminal = Terminal::start(hull.hull(["run", "--rm", "-it", "busybox", "sh"]), 33, 101);
    terminal.wait_for("# ");
    terminal.write("tty; stty size; echo $TERM\r");
    terminal.wait_for("/dev/");
    terminal.wait_for("33 101");
    terminal.wait_for("xterm");
    assert!(
        !terminal.echoes(),
        "the terminal is raw while the container has it"
    );
    terminal.write("exit 7\r");
    assert_eq!(terminal.wait(), 7);
    assert!(terminal.echoes(), "and as before afterwards");
}

#[test]
fn a_window_that_changes_its_size_is_noticed_inside() {
    let hull = Hull::new();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut terminal = Terminal::start(
        hull.hull([
            "run", "--rm", "-it", "--name", "sized", "busybox", "sh", "-c", script,
        ]),
        24,
        80,
    );
    terminal.wait_for("ready");
    terminal.resize(50, 132);
    terminal.wait_for("50 132");
    hull.container("sized").does("kill").ok();
    assert_eq!(terminal.wait(), 137);
}

/// Presses Ctrl-C while a command runs that notices it, with these options of `run`.
fn ctrl_c_is_noticed(options: &[&str]) {
    let hull = Hull::new();
    let script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.05; done";
    let arguments = [&["run", "--rm"], options, &["busybox", "sh", "-c", script]].concat();
    let mut terminal = Terminal::start(hull.hull(arguments), 24, 80);
    terminal.wait_for("ready");
    terminal.write(b"\x03");
    terminal.wait_for("interrupted");
    assert_eq!(terminal.wait(), 9);
}

#[test]
fn ctrl_c_interrupts_the_command_not_hull() {
    ctrl_c_is_noticed(&["-it"]);
}

#[test]
fn ctrl_c_without_a_terminal_in_the_container_is_passed_on_as_a_signal() {
    ctrl_c_is_noticed(&[]);
}

#[test]
fn the_detach_keys_leave_the_container_running_and_attach_returns_to_it() {
    let hull = Hull::new();
    let mut terminal = Terminal::start(
        hull.hull(["run", "-it", "--name", "left", "busybox", "sh"]),
        24,
        80,
    );
    terminal.wait_for("# ");
    terminal.write(b"\x10\x11");
    assert_eq!(terminal.wait(), 0);
    let container = hull.container("left");
    assert_eq!(container.state(), "running");
    let mut terminal = Terminal::start(hull.hull(["attach", "left"]), 24, 80);
    terminal.write("echo here $((6*7))\r");
    terminal.wait_for("here 42");
    terminal.write("exit 5\r");
    assert_eq!(terminal.wait(), 5);
    assert_eq!(container.wait(), 5);
}

#[test]
fn other_detach_keys_can_be_chosen() {
    let hull = Hull::new();
    let mut terminal = Terminal::start(
        hull.hull([
            "run",
            "-it",
            "--name",
            "keys",
            "--detach-keys",
            "ctrl-a,d",
            "busybox",
            "sh",
        ]),
        24,
        80,
    );
    terminal.wait_for("# ");
    terminal.write(b"\x01d");
    assert_eq!(terminal.wait(), 0);
    assert_eq!(hull.container("keys").state(), "running");
}

#[test]
fn a_closed_window_ends_hull_and_leaves_the_container_running() {
    let hull = Hull::new();
    let mut terminal = Terminal::start(
        hull.hull(["run", "-it", "--name", "left", "busybox", "sh"]),
        24,
        80,
    );
    terminal.wait_for("# ");
    terminal.hang_up();
    terminal.wait();
    let container = hull.container("left");
    // As with Docker: the container's terminal still exists.
    assert_eq!(container.state(), "running");
    container.exec(&["true"]).ok();
}

#[test]
fn a_command_can_have_a_terminal_too() {
    let hull = Hull::new();
    let container = hull.sleeper();
    let mut terminal = Terminal::start(hull.hull(["exec", "-it", &container.name, "sh"]), 40, 90);
    terminal.wait_for("# ");
    terminal.write("stty size; exit 3\r");
    terminal.wait_for("40 90");
    assert_eq!(terminal.wait(), 3);
    assert_eq!(container.state(), "running");
}

#[test]
fn a_terminal_that_is_not_there_is_an_error() {
    let hull = Hull::new();
    hull.run(&["-it"], &["true"]).fails(125, &["not a TTY"]);
    // Without -i there is nothing to read from: the container has a terminal all the same.
    let output = hull.sh(&["-t"], "tty; echo line").ok();
    assert!(
        output.text().contains("/dev/") && output.text().contains("line\r"),
        "{:?}",
        output.text()
    );
}

#[test]
fn signals_that_end_hull_reach_the_container() {
    let hull = Hull::new();
    let script = "trap 'echo terminated; exit 8' TERM; echo ready; while :; do sleep 0.05; done";
    let mut running = hull
        .hull(["run", "--rm", "busybox", "sh", "-c", script])
        .start();
    running.wait_for("ready");
    running.signal(rustix::process::Signal::TERM);
    assert!(running.finish().ends(8).text().ends_with("terminated"));
}
