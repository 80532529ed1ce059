//! Processes killed at the wrong moment: within a second the container is seen as stopped with the
//! reason, and `hull rm` leaves nothing.

use std::time::Duration;

use hull_tests::{Hull, Running, eventually, on_every_machine};

on_every_machine!(
    a_killed_machine_stops_the_container_with_a_reason,
    a_killed_device_process_stops_the_container_with_a_reason,
    a_killed_sandbox_process_stops_the_container_with_a_reason,
);

/// `hull run` of a container that keeps running; it has started.
fn in_the_foreground(hull: &Hull, name: &str) -> Running {
    let script = "echo up; sleep 1000";
    let mut running = hull
        .hull(["run", "--name", name, "busybox", "sh", "-c", script])
        .start();
    running.wait_for("up");
    running
}

fn stopped_within_a_second_of_killing(machine: &'static str, process: &str) {
    let hull = Hull::on(machine);
    let foreground = in_the_foreground(&hull, "victim");
    let container = hull.container("victim");
    container.kill_host_process(process);
    let took = eventually("the container is stopped", Duration::from_secs(5), || {
        container.state() == "stopped"
    });
    assert!(took < Duration::from_secs(1), "seen after {took:?}");
    let output = foreground.finish().ends(125);
    assert!(
        output.error().contains("error: "),
        "the one who waited is told: {}",
        output.error()
    );
    let exit = container.inspect()["Hull"]["exit"].clone();
    assert_eq!(exit["status"], 125, "{exit}");
    assert!(
        exit["reason"]
            .as_str()
            .is_some_and(|reason| !reason.is_empty()),
        "{exit}"
    );
    assert_eq!(container.wait(), 125);
    container.exec(&["true"]).fails(1, &["not running"]);
    container.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn a_container_is_removed_while_its_sandbox_process_dies() {
    let hull = Hull::new();
    for _ in 0..8 {
        let container = hull.sleeper();
        container.kill_host_process("sandbox");
        container.is_removed_by_force();
        hull.assert_clean();
    }
}

fn a_killed_machine_stops_the_container_with_a_reason(machine: &'static str) {
    stopped_within_a_second_of_killing(machine, "machine");
}

fn a_killed_device_process_stops_the_container_with_a_reason(machine: &'static str) {
    stopped_within_a_second_of_killing(machine, "devices");
}

fn a_killed_sandbox_process_stops_the_container_with_a_reason(machine: &'static str) {
    stopped_within_a_second_of_killing(machine, "sandbox");
}

#[test]
fn a_guest_kernel_that_panics_stops_the_container_with_a_reason() {
    let hull = Hull::new();
    let container = hull.start(&["--cap-add", "ALL"], &["sleep", "1000"]);
    // A container with all rights can make its guest's kernel panic where it would kill a process.
    let script =
        "mkdir /p && mount -t proc proc /p && echo 2 >/p/sys/vm/panic_on_oom && tail /dev/zero";
    let _ = container.sh(script);
    eventually("the container is stopped", Duration::from_secs(5), || {
        container.state() == "stopped"
    });
    let exit = container.inspect()["Hull"]["exit"].clone();
    assert_eq!(exit["status"], 125, "{exit}");
    assert!(
        exit["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains("panic")),
        "{exit}"
    );
    // Its last words are kept until it is removed.
    let console = container.inspect()["Hull"]["files"]["console"].clone();
    let console = std::fs::read_to_string(console.as_str().unwrap()).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
    container.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn a_guest_that_does_not_come_up_is_an_error_with_its_last_words() {
    let guest = tempfile::tempdir().unwrap();
    for file in ["kernel-um", "kernel-um.json"] {
        std::fs::copy(
            hull_tests::guest_files().join(file),
            guest.path().join(file),
        )
        .unwrap();
    }
    // A program that ends at once instead of the agent: the kernel panics.
    hull_tests::Invocation::new(hull_tests::repository().join("guest/initramfs/build"))
        .arg(hull_tests::posix_program())
        .arg(guest.path().join("initramfs"))
        .run()
        .ok();
    let hull = Hull::with(hull_tests::Options {
        configuration: format!("guest_dir = {:?}", guest.path()),
        ..hull_tests::Options::default()
    });
    let output = hull.run(&[], &["true"]).ends(125);
    let error = output.error();
    assert!(
        error.contains("error: the guest did not come up") && error.contains("Kernel panic"),
        "{error}"
    );
    hull.assert_clean();
}

#[test]
fn a_killed_command_leaves_the_container_running() {
    let hull = Hull::new();
    let foreground = in_the_foreground(&hull, "orphan");
    foreground.signal(rustix::process::Signal::KILL);
    foreground.finish().ends(137);
    let container = hull.container("orphan");
    assert_eq!(container.state(), "running");
    container.exec(&["true"]).ok();
    container.does("stop").ok();
    container.does("rm").ok();
    hull.assert_clean();
}

#[test]
fn a_command_killed_at_any_moment_of_the_start_leaves_nothing_that_rm_does_not_remove() {
    let hull = Hull::new();
    for wait in [1, 5, 10, 20, 35, 50, 75, 100, 150] {
        let starting = hull.hull(["run", "-d", "busybox", "sleep", "1000"]).start();
        std::thread::sleep(Duration::from_millis(wait));
        // It may have ended already.
        let _ = rustix::process::kill_process(starting.pid(), rustix::process::Signal::KILL);
        starting.finish();
        remove_all(&hull);
    }
}

/// A sandbox notices by itself that its command has gone, unless that had done its work.
fn remove_all(hull: &Hull) {
    hull_tests::eventually("nothing is left", Duration::from_secs(10), || {
        let names = hull.names();
        if !names.is_empty() {
            hull.hull(["rm", "-f"]).args(&names).run().ok();
        }
        hull.is_clean()
    });
}

#[test]
fn a_sandbox_killed_at_any_moment_of_the_start_leaves_nothing_that_rm_does_not_remove() {
    let hull = Hull::new();
    for wait in [2, 10, 30, 50, 80, 120] {
        let name = format!("victim-{wait}");
        let starting = hull
            .hull(["run", "--name", &name, "busybox", "sleep", "1000"])
            .start();
        std::thread::sleep(Duration::from_millis(wait));
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            if command.contains("sandbox-process")
                && command.contains(hull.path("run").to_str().unwrap())
            {
                let pid = process.file_name().to_str().unwrap().parse().unwrap();
                let pid = rustix::process::Pid::from_raw(pid).unwrap();
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        if starting.so_far().is_empty() {
            // Too early: no sandbox process exists yet. Kill the command itself then.
            std::thread::sleep(Duration::from_millis(500));
            let _ = rustix::process::kill_process(starting.pid(), rustix::process::Signal::KILL);
        }
        starting.finish();
        remove_all(&hull);
    }
}
