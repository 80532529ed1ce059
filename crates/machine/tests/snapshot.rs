//! A busy guest of kind `kvm` is saved, and continues in new machines. Needs what the test of
//! pauses does; a test that cannot run here prints the reason.

#![allow(clippy::unwrap_used)]

mod busy;
mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use busy::{Guest, LONG_PAUSE, LONGEST_STEP};
use hull_machine::{Kind, Snapshot};

/// In an emulated host, a guest does in seconds what takes it milliseconds elsewhere.
const TIMEOUT: Duration = Duration::from_secs(60);

fn disk(word: &str) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    set(&file, word);
    file
}

/// Sets the first word on a disk.
fn set(disk: &File, word: &str) {
    disk.write_all_at(format!("{word}\n").as_bytes(), 0)
        .unwrap();
}

fn snapshot() -> (Snapshot, File, File) {
    let (state, memory) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let snapshot = Snapshot {
        memory: memory.try_clone().unwrap().into(),
        state: state.try_clone().unwrap().into(),
    };
    (snapshot, state, memory)
}

/// It runs: all that it does goes on, and it reads `word` from its disk.
fn goes_on(guest: &Guest, word: &str) {
    let before = {
        let mut printed = guest.printed.lock().unwrap();
        printed.random.clear();
        printed.disk.clear();
        (printed.now.len(), printed.slept.len())
    };
    guest.until(TIMEOUT, |printed| {
        let (now, slept) = before;
        printed.now.len() > now + 5
            && printed.slept.len() > slept + 2
            && printed.random.len() > 2
            && printed.disk.iter().filter(|found| *found == word).count() > 2
    });
    let printed = guest.printed.lock().unwrap();
    assert_ne!(printed.random[0], printed.random[1]);
    printed.check_clock();
}

#[test]
fn a_saved_kvm_continues_where_it_was_also_twice() {
    let first = disk("first");
    let Some(mut guest) = Guest::with_devices(&first) else {
        return;
    };
    goes_on(&guest, "first");
    let error = guest.machine.save(&snapshot().0).unwrap_err().to_string();
    assert!(error.contains("not paused"), "{error}");

    guest.machine.pause().unwrap();
    // What was printed before is still on its way.
    std::thread::sleep(Duration::from_millis(50));
    let saved_at = guest.printed.lock().unwrap().now.last().unwrap().1;
    let (snapshot, _, memory) = snapshot();
    guest.machine.save(&snapshot).unwrap();
    let metadata = memory.metadata().unwrap();
    assert_eq!(metadata.len(), 128 << 20);
    assert!(
        metadata.blocks() * 512 < 100 << 20,
        "memory that was never used has holes: {}",
        metadata.blocks()
    );
    // It was not harmed.
    guest.machine.resume().unwrap();
    goes_on(&guest, "first");
    drop(guest);

    // Time passes for the host only.
    std::thread::sleep(LONG_PAUSE);
    for round in 0..2 {
        let names = [format!("one-{round}"), format!("two-{round}")];
        let disks = [disk(&names[0]), disk(&names[1])];
        let mut guests: Vec<Guest> = disks
            .iter()
            .map(|disk| Guest::restored(&snapshot, disk))
            .collect();
        for (guest, name) in guests.iter_mut().zip(&names) {
            assert_eq!(guest.lines(), 0, "it is paused");
            guest.machine.resume().unwrap();
            goes_on(guest, name);
            let continued_at = guest.printed.lock().unwrap().now[0].1;
            let step = continued_at - saved_at;
            assert!((0.0..LONGEST_STEP).contains(&step), "{step} s later");
            // It can be paused like any other.
            guest.machine.pause().unwrap();
            guest.machine.resume().unwrap();
            goes_on(guest, name);
        }
    }
}

#[test]
fn a_restored_kvm_can_be_saved_again() {
    let first = disk("first");
    let Some(mut guest) = Guest::with_devices(&first) else {
        return;
    };
    for round in 0..3 {
        guest.machine.pause().unwrap();
        let (snapshot, _, _) = snapshot();
        guest.machine.save(&snapshot).unwrap();
        drop(guest);
        let word = format!("round-{round}");
        set(&first, &word);
        guest = Guest::restored(&snapshot, &first);
        guest.machine.resume().unwrap();
        goes_on(&guest, &word);
    }
}

#[test]
fn a_damaged_snapshot_of_kvm_is_named() {
    let first = disk("first");
    let Some(mut guest) = Guest::with_devices(&first) else {
        return;
    };
    guest.machine.pause().unwrap();
    let (saved, state, memory) = snapshot();
    guest.machine.save(&saved).unwrap();
    drop(guest);
    let mut text = vec![0; state.metadata().unwrap().len() as usize];
    state.read_exact_at(&mut text, 0).unwrap();
    let text = String::from_utf8(text).unwrap();

    let restored = |text: &str, memory: &File| {
        let mut state = tempfile::tempfile().unwrap();
        state.write_all(text.as_bytes()).unwrap();
        let snapshot = Snapshot {
            memory: memory.try_clone().unwrap().into(),
            state: state.into(),
        };
        let mut guest = Guest::restored(&snapshot, &first);
        guest.machine.resume().unwrap_err().to_string()
    };
    let short = tempfile::tempfile().unwrap();
    for (text, memory) in [
        (&text[..text.len() / 2], &memory),
        ("", &memory),
        (
            &text.replacen("\"version\":1", "\"version\":99", 1),
            &memory,
        ),
        (&text, &short),
    ] {
        let error = restored(text, memory);
        assert!(error.contains("the machine process failed"), "{error}");
    }
    assert!(Kind::Uml.backend().restore(&saved, wiring()).is_err());
}

fn wiring() -> hull_machine::Wiring {
    let (devices, _) = common::no_devices(Kind::Uml);
    hull_machine::Wiring {
        console: std::io::pipe().unwrap().1.into(),
        devices,
        uid: 60_000,
    }
}
