//! Whatever is killed: containerd sees the truth, and nothing is left.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_tests::cri::{Cri, container};
use hull_tests::shim::{devices_of, kill, kill_if_there, machine_of, shims_at};
use hull_tests::{BUSYBOX, Containerd, eventually, executable};

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

#[test]
fn a_shim_that_containerd_was_not_told_of_ends() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let (told, tell) = std::io::pipe().unwrap();
    let mut shim = Command::new(executable().with_file_name("containerd-shim-hull-v2"))
        .args(["-namespace", "tests", "-id", "x", "-address"])
        .arg(directory.path().join("c.sock"))
        .current_dir(directory.path())
        .stdin(OwnedFd::from(listener))
        .stdout(told)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // As long as `start` lives it may still be told.
    std::thread::sleep(Duration::from_millis(500));
    assert!(shim.try_wait().unwrap().is_none());
    drop(tell);
    eventually("the shim ends", Duration::from_secs(20), || {
        shim.try_wait().unwrap().is_some()
    });
    assert!(!socket.exists());
}

/// Kills something of each pod at later and later moments of its start; then CRI removes it.
fn dies_at_any_moment(victims: fn(shim: i32) -> Option<i32>) {
    const MOMENTS: u32 = 12;
    let containerd = Containerd::with_pods();
    let address = containerd.path("c.sock");
    let start = |name: &str| {
        let config = containerd.pod(name);
        let address = address.clone();
        std::thread::spawn(move || -> Result<Duration, String> {
            let begun = Instant::now();
            let cri = Cri::connect(&address);
            let id = cri.run_pod(&config, "hull")?;
            let one = cri.create(&id, &config, container("one", "sleep 1000"))?;
            cri.start(&one)?;
            Ok(begun.elapsed())
        })
    };
    let cri = containerd.cri();
    let remove_all = || {
        for id in cri.pods() {
            // containerd 2 takes a container for running until it has seen the end of its shim; the
            // kubelet asks again.
            eventually("the pod is removed", Duration::from_secs(10), || {
                cri.remove_pod(&id).is_ok()
            });
        }
        containerd.assert_clean();
    };
    let takes = start("undisturbed").join().unwrap().unwrap();
    remove_all();
    for moment in 0..MOMENTS {
        let starting = start(&format!("pod-{moment}"));
        let found = || -> Vec<i32> {
            let shims = shims_at(&address);
            shims.into_iter().filter_map(victims).collect()
        };
        eventually("what is to be killed", Duration::from_secs(20), || {
            !found().is_empty()
        });
        std::thread::sleep(takes * moment / MOMENTS);
        for victim in found() {
            kill_if_there(victim);
        }
        // Whatever comes of it.
        let _ = starting.join().unwrap();
        remove_all();
    }
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
