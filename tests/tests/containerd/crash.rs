//! Whatever is killed: containerd sees the truth, and nothing is left.

use std::time::Duration;

use hull_tests::shim::{kill, machine_of};
use hull_tests::{BUSYBOX, Containerd, eventually};

#[test]
fn a_containerd_that_is_killed_finds_its_containers_again() {
    let mut containerd = Containerd::new();
    let id = containerd.start_container(&[], &["sleep", "1000"]);
    let ended = containerd.start_container(&[], &["sh", "-c", "sleep 0.5; exit 9"]);
    containerd.kill();
    // One ends while nobody looks.
    std::thread::sleep(Duration::from_secs(1));
    containerd.start();
    assert_eq!(containerd.state(&id), "RUNNING");
    assert_eq!(containerd.exec(&id, "echo alive").ok().text(), "alive");
    assert_eq!(containerd.state(&ended), "STOPPED");
    assert_eq!(containerd.status(&ended), 9);
    containerd.remove(&id);
    containerd.assert_clean();
}

#[test]
fn a_container_whose_shim_is_killed_has_ended_and_leaves_nothing() {
    let containerd = Containerd::new();
    let id = containerd.start_container(&[], &["sleep", "1000"]);
    kill(containerd.shim(&id));
    eventually("the task is gone", Duration::from_secs(10), || {
        ["", "STOPPED"].contains(&containerd.state(&id).as_str())
    });
    containerd.remove(&id);
    containerd.assert_clean();
}

#[test]
fn a_container_whose_machine_is_killed_has_ended_with_a_reason() {
    let containerd = Containerd::new();
    let id = containerd.start_container(&[], &["sleep", "1000"]);
    let machine = machine_of(containerd.shim(&id)).expect("the shim has a machine");
    kill(machine);
    containerd.becomes(&id, "STOPPED");
    let log = std::fs::read_to_string(containerd.path("containerd.log")).unwrap();
    assert!(log.contains("killed"), "the reason is in containerd's log");
    containerd.remove(&id);
    containerd.assert_clean();
}

#[test]
fn what_a_killed_shim_has_left_keeps_no_id_from_being_used_again() {
    let mut containerd = Containerd::new();
    let id = containerd.start_container(&[], &["sleep", "1000"]);
    let left = containerd.state_directory().join(&id);
    let record = std::fs::read(left.join("record.json")).unwrap();
    // Nobody sees the end of the shim.
    let shim = containerd.shim(&id);
    containerd.kill();
    kill(shim);
    containerd.start();
    eventually("the task is gone", Duration::from_secs(10), || {
        ["", "STOPPED"].contains(&containerd.state(&id).as_str())
    });
    containerd.remove(&id);
    assert!(!left.exists());
    // As if that had not come to its end.
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("record.json"), record).unwrap();
    let again = containerd.ctr(["run", "--rm", "--runtime", "io.containerd.hull.v2", BUSYBOX]);
    assert_eq!(
        again.args([&id, "echo", "again"]).run().ok().text(),
        "again"
    );
    containerd.assert_clean();
}
