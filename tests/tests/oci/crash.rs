//! Processes killed at the wrong moment, at each stage of a container's lifecycle: soon `state`
//! reports stopped or that there is no such container, `delete --force` succeeds, and again, and
//! nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_tests::{Bundle, Init, Oci, Running, descendants, eventually};
use rustix::process::{Pid, Signal, kill_process};

/// The host processes of a container.
const PROCESSES: [&str; 4] = ["keeper", "pod", "devices", "machine"];

/// How long others may wait for a process that has been killed.
const SOON: Duration = Duration::from_secs(10);

/// A hook that reports when it has started, and waits for permission to continue.
struct Block {
    begun: PathBuf,
    go: PathBuf,
}

impl Block {
    fn new(oci: &Oci) -> Block {
        let name = oci.unique();
        Block {
            begun: oci.path(&format!("{name}.begun")),
            go: oci.path(&format!("{name}.go")),
        }
    }

    fn in_hook(&self, bundle: Bundle, kind: &str) -> Bundle {
        // The keeper's process id is not in a file yet.
        let script = format!(
            "sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' >{begun}.new; mv {begun}.new {begun}; until [ -e {go} ]; do sleep 0.02; done",
            begun = self.begun.display(),
            go = self.go.display()
        );
        bundle.hook(kind, &script)
    }

    fn wait(&self) {
        eventually("the hook has begun", SOON, || self.begun.exists());
    }

    /// The process that stands for the container, as passed to the hook.
    fn keeper(&self) -> Pid {
        let text = fs::read_to_string(&self.begun).unwrap();
        Pid::from_raw(text.trim().parse().unwrap()).unwrap()
    }

    fn go_on(&self) {
        fs::write(&self.go, "").unwrap();
    }
}

fn kill(pid: Pid) {
    kill_process(pid, Signal::KILL).unwrap();
}

/// Kills the runtime's own process below a script that has become it.
fn kill_command(running: &Running) {
    kill(running.pid());
}

#[test]
fn whatever_is_killed_during_create_create_fails_and_nothing_is_left() {
    for process in PROCESSES {
        let oci = Oci::new();
        let block = Block::new(&oci);
        let bundle = block.in_hook(oci.bundle(), "createRuntime");
        let init = oci.init();
        let creating = oci.creating(&init, &bundle, &[]).start();
        block.wait();
        match process {
            "keeper" => kill(block.keeper()),
            other => {
                eventually(other, SOON, || init.host_process(other).is_some());
                init.kill_host_process(other);
            }
        }
        block.go_on();
        let output = creating.finish();
        println!("{process}: {}", output.error());
        assert_eq!(output.status, 1, "{process}: {}", output.error());
        assert!(output.error().starts_with("error: "), "{}", output.error());
        init.does("state").fails(1, &["container does not exist"]);
        oci.assert_clean();
        init.is_gone_after_delete();
    }
}

#[test]
fn a_create_that_is_killed_leaves_nothing_but_what_delete_removes() {
    let oci = Oci::new();
    let block = Block::new(&oci);
    let bundle = block.in_hook(oci.bundle(), "prestart");
    let init = oci.init();
    let creating = oci.creating(&init, &bundle, &[]).start();
    block.wait();
    kill_command(&creating);
    creating.finish().ends(137);
    block.go_on();
    init.is_gone_after_delete();
}

#[test]
fn a_create_that_is_killed_at_any_moment_leaves_nothing_but_what_delete_removes() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let early = (0..40).map(|half| 500 * half);
    let late = [30, 40, 60, 80, 100, 130].map(|millis| 1000 * millis);
    for wait in early.chain(late) {
        let init = oci.init();
        let creating = oci.creating(&init, &bundle, &[]).start();
        std::thread::sleep(Duration::from_micros(wait));
        // It may have ended already.
        let _ = kill_process(creating.pid(), Signal::KILL);
        creating.finish();
        init.is_gone_after_a_kill();
    }
}

#[test]
fn a_process_killed_at_any_moment_of_create_leaves_nothing_but_what_delete_removes() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    for process in ["sandbox-process", "device-process", "linux mem="] {
        for wait in [10, 30, 60, 100] {
            let init = oci.init();
            let creating = oci.creating(&init, &bundle, &[]).start();
            std::thread::sleep(Duration::from_millis(wait));
            for (pid, command) in descendants() {
                if command.contains(process) {
                    // It may be on its way already.
                    let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
                }
            }
            let output = creating.finish();
            assert!(
                output.status == 0 || output.error().starts_with("error: "),
                "{}",
                output.error()
            );
            init.is_gone_after_a_kill();
        }
    }
}

#[test]
fn whatever_is_killed_after_create_the_container_is_stopped_and_can_be_deleted() {
    for process in PROCESSES {
        let oci = Oci::new();
        let init = oci.create(&oci.bundle());
        init.kill_host_process(process);
        assert_ne!(init.ends(), 0, "{process}");
        init.becomes("stopped");
        init.does("start").fails(1, &["stopped"]);
        init.is_gone_after_delete();
    }
}

#[test]
fn whatever_is_killed_after_start_the_container_is_stopped_and_can_be_deleted() {
    for process in PROCESSES {
        let oci = Oci::new();
        let init = oci.start(&oci.bundle());
        init.kill_host_process(process);
        assert_ne!(init.ends(), 0, "{process}");
        init.becomes("stopped");
        init.kill("TERM").fails(1, &["container not running"]);
        init.sh("true").fails(255, &["stopped"]);
        init.does("delete").ok();
        init.is_gone_after_delete();
    }
}

#[test]
fn whatever_is_killed_during_exec_those_who_wait_are_told() {
    for process in PROCESSES {
        let oci = Oci::new();
        let init = oci.start(&oci.bundle());
        let mut foreground = init
            .executing(&[], &["sh", "-c", "echo on; exec sleep 1000"])
            .start();
        foreground.wait_for("on");
        let pid_file = oci.path("exec.pid");
        init.executing(
            &["-d", "--pid-file", pid_file.to_str().unwrap()],
            &["sleep", "1000"],
        )
        .output_to(&oci.path("exec.out"), &oci.path("exec.error"))
        .run()
        .ok();
        init.kill_host_process(process);
        assert_ne!(foreground.finish().status, 0, "{process}");
        assert_ne!(hull_tests::end_of(hull_tests::pid_in(&pid_file)), 0);
        assert_ne!(init.ends(), 0);
        init.is_gone_after_delete();
    }
}

#[test]
fn a_killed_exec_ends_its_process_and_nothing_else() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    let mut foreground = init
        .executing(&[], &["sh", "-c", "echo on; exec sleep 1234"])
        .start();
    foreground.wait_for("on");
    kill_command(&foreground);
    foreground.finish().ends(137);
    eventually("the process in the guest is gone", SOON, || {
        !init.sh("ps").ok().text().contains("sleep 1234")
    });
    assert_eq!(init.status(), "running");
}

#[test]
fn whatever_is_killed_during_delete_delete_succeeds() {
    // By then the keeper and the machine have ended.
    let oci = Oci::new();
    let block = Block::new(&oci);
    let bundle = block.in_hook(oci.bundle(), "poststop");
    let init = oci.start(&bundle);
    let deleting = oci.oci(["delete", "--force", &init.id]).start();
    block.wait();
    kill_command(&deleting);
    deleting.finish().ends(137);
    assert_eq!(init.status(), "stopped");
    block.go_on();
    init.is_gone_after_delete();
}

#[test]
fn a_delete_that_is_killed_at_any_moment_can_be_repeated() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    for wait in [1, 3, 6, 10, 15, 25, 40] {
        let init = oci.start(&bundle);
        let deleting = oci.oci(["delete", "--force", &init.id]).start();
        std::thread::sleep(Duration::from_millis(wait));
        // It may have ended already.
        let _ = kill_process(deleting.pid(), Signal::KILL);
        deleting.finish();
        init.delete().ok();
        init.is_gone_after_delete();
    }
}

#[test]
fn a_process_killed_while_delete_waits_for_it_does_not_keep_it() {
    for process in ["keeper", "pod", "devices", "machine"] {
        let oci = Oci::new();
        let init = oci.start(&oci.bundle());
        let pid = match process {
            "keeper" => init.keeper(),
            other => init.host_process(other).unwrap(),
        };
        let deleting = oci.oci(["delete", "--force", &init.id]).start();
        std::thread::sleep(Duration::from_millis(5));
        // It may be on its way already.
        let _ = kill_process(pid, Signal::KILL);
        deleting.finish().ok();
        init.is_gone_after_delete();
    }
}

#[test]
fn a_stopped_machine_does_not_keep_delete_from_its_end() {
    let oci = Oci::new();
    let init = oci.start(&oci.bundle());
    kill_process(init.host_process("machine").unwrap(), Signal::STOP).unwrap();
    let output = init.delete().ok();
    println!("deleted after {:?}", output.took);
    init.is_gone_after_delete();
}

#[test]
fn a_damaged_state_file_is_named_and_hides_no_other_container() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let (init, other) = (oci.start(&bundle), oci.start(&bundle));
    let file = oci.path("state").join(&init.id).join("record.json");
    let whole = fs::read(&file).unwrap();
    for text in ["", "{", "[]", "{\"version\": 99}"] {
        fs::write(&file, text).unwrap();
        init.does("state")
            .fails(1, &["state file", file.to_str().unwrap()]);
        assert_eq!(oci.ids(), [other.id.as_str()]);
    }
    fs::write(&file, whole).unwrap();
    assert_eq!(init.sh("echo well").ok().text(), "well");
}

#[test]
fn a_container_with_a_damaged_or_lost_state_file_can_be_deleted_whole() {
    for damage in [Some("{"), None] {
        let oci = Oci::new();
        let init = oci.start(&oci.bundle());
        let file = oci.path("state").join(&init.id).join("record.json");
        match damage {
            Some(text) => fs::write(&file, text).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        init.does("delete").fails(1, &[]);
        init.delete().ok();
        init.delete().ok();
        oci.assert_clean();
    }
}

#[test]
fn a_create_that_fails_at_once_leaves_nothing() {
    // While the sandbox process has barely started.
    let oci = Oci::new();
    let bundle = oci.bundle().with(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = serde_json::json!("/no/such");
            }
        }
    });
    for _ in 0..30 {
        let output = oci.creates(&oci.init(), &bundle, &[]);
        assert_eq!(output.status, 1);
        let error = output.error();
        assert!(error.starts_with("error: "), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        oci.assert_clean();
    }
}

/// The machine's available memory, MiB.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() >> 10
}

/// Control groups of the host, in all hierarchies.
fn groups(below: &Path) -> usize {
    let entries = fs::read_dir(below).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| 1 + groups(&entry.path()))
        .sum()
}

#[test]
fn alone_two_hundred_lives_leave_nothing() {
    let oci = Oci::new();
    let bundle = oci.bundle();
    let life = |init: &Init<'_>| {
        init.does("start").ok();
        init.kill("KILL").ok();
        assert_eq!(init.ends(), 137);
        init.becomes("stopped");
        init.does("delete").ok();
    };
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let mounts = || {
        fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .lines()
            .count()
    };
    let seen = || {
        (
            mounts(),
            count("/proc/self/fd"),
            count(oci.path("run/sandboxes").to_str().unwrap()),
            count(oci.path("state").to_str().unwrap()),
            count("/dev/shm"),
            count("/run"),
        )
    };
    for _ in 0..5 {
        life(&oci.create(&bundle));
    }
    oci.assert_clean();
    let hierarchies = Path::new("/sys/fs/cgroup");
    let (before, memory, cgroups) = (seen(), available(), groups(hierarchies));
    let tmp = count("/tmp");
    for _ in 0..200 {
        life(&oci.create(&bundle));
    }
    oci.assert_clean();
    assert_eq!(seen(), before);
    let (memory_after, cgroups_after) = (available(), groups(hierarchies));
    println!(
        "MiB available: {memory} before, {memory_after} after; groups: {cgroups}, {cgroups_after}"
    );
    // Others use this machine too: a leak per cycle is 200 times as large here.
    assert!(
        memory_after + 300 > memory,
        "{memory} MiB, {memory_after} MiB"
    );
    assert!(cgroups_after < cgroups + 100, "{cgroups}, {cgroups_after}");
    assert!(count("/tmp") < tmp + 100);
}

#[test]
fn an_engine_deletes_a_container_as_soon_as_its_process_has_died() {
    let oci = Oci::new();
    for _ in 0..5 {
        let init = oci.start(&oci.bundle());
        let keeper = init.keeper();
        kill_process(keeper, Signal::KILL).unwrap();
        let stat = format!("/proc/{}/stat", keeper.as_raw_nonzero());
        eventually("the keeper is dead", SOON, || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
        // The guest may not have ended it yet.
        assert_eq!(init.does("state").ok().json()["status"], "stopped");
        init.does("delete").ok();
    }
}
