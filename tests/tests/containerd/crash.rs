//! Whatever is killed: containerd sees the truth, and nothing is left.

use std::time::Duration;

use hull_tests::cri::Cri;
use hull_tests::shim::{devices_of, kill, kill_if_there, machine_of, shims_at};
use hull_tests::{BUSYBOX, Containerd, eventually};

use crate::pods::{container, pod};

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

/// Kills something of each pod at later and later moments of its start; then CRI removes it.
fn dies_at_any_moment(victim: fn(shim: i32) -> Option<i32>) {
    let containerd = Containerd::with_pods();
    let cri = containerd.cri();
    let address = containerd.path("c.sock");
    let mut killed = 0;
    for step in 0..12 {
        let config = pod(&containerd, &format!("pod-{step}"));
        let (socket, of_pod) = (address.clone(), config.clone());
        let starting = std::thread::spawn(move || {
            let cri = Cri::connect(&socket);
            let id = cri.run_pod(&of_pod, "hull")?;
            let one = cri.create(&id, &of_pod, container("one", "sleep 1000"))?;
            cri.start(&one)
        });
        eventually("a shim, or an end", Duration::from_secs(20), || {
            !shims_at(&address).is_empty() || starting.is_finished()
        });
        std::thread::sleep(Duration::from_millis(20 * step));
        for shim in shims_at(&address) {
            killed += usize::from(victim(shim).is_some_and(kill_if_there));
        }
        // Whatever comes of it.
        let _ = starting.join().unwrap();
        for id in cri.pods() {
            cri.remove_pod(&id).unwrap();
        }
        containerd.assert_clean();
    }
    assert!(killed >= 6, "only {killed} were there to be killed");
}

#[test]
fn a_pod_whose_shim_dies_at_any_moment_of_its_start_can_be_removed() {
    dies_at_any_moment(Some);
}

#[test]
fn a_pod_whose_machine_dies_at_any_moment_of_its_start_can_be_removed() {
    dies_at_any_moment(machine_of);
}

#[test]
fn a_pod_whose_device_process_dies_at_any_moment_of_its_start_can_be_removed() {
    dies_at_any_moment(devices_of);
}
