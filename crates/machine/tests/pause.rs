//! A guest that computes, sleeps and starts programs is paused and resumed. Needs root, a kernel in
//! the cache of guest/kernel/build, and a static busybox; a test that cannot run here prints the
//! reason.

#![allow(clippy::unwrap_used)]

mod busy;
mod common;

use std::time::{Duration, Instant};

use busy::{Guest, LONG_PAUSE, LONGEST_STEP};
use hull_machine::Kind;

impl Guest {
    /// Ticks of processor time that the machine's processes have used.
    fn ticks(&self) -> u64 {
        let mut waiting: Vec<i32> = self
            .machine
            .processes()
            .iter()
            .map(|process| process.pid)
            .collect();
        let mut ticks = 0;
        while let Some(pid) = waiting.pop() {
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
                continue;
            };
            let fields: Vec<&str> = stat
                .rsplit_once(')')
                .unwrap()
                .1
                .split_whitespace()
                .collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
            let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let children = children.unwrap_or_default();
            waiting.extend(
                children
                    .split_whitespace()
                    .map(|pid| pid.parse::<i32>().unwrap()),
            );
        }
        ticks
    }

    /// Pauses for so long, and for how long it was.
    fn pause_for(&mut self, duration: Duration) -> Duration {
        self.machine.pause().unwrap();
        let begin = Instant::now();
        // What was printed before is still on its way.
        std::thread::sleep(Duration::from_millis(50));
        let (lines, ticks) = (self.lines(), self.ticks());
        std::thread::sleep(duration);
        assert_eq!(self.lines(), lines, "the guest printed while it was paused");
        let used = self.ticks() - ticks;
        assert!(
            used <= 2,
            "{used} ticks of processor time while it was paused"
        );
        let paused = begin.elapsed();
        self.machine.resume().unwrap();
        // It goes on.
        let lines = self.lines();
        self.until(Duration::from_secs(20), |printed| {
            printed.now.len() > lines + 5
        });
        paused
    }
}

fn a_paused_guest_stands_still(kind: Kind) {
    let Some(mut guest) = Guest::start(kind) else {
        return;
    };
    let mut paused = guest.pause_for(LONG_PAUSE);
    for round in 0..20 {
        std::thread::sleep(Duration::from_millis(7 * round));
        paused += guest.pause_for(Duration::from_millis(100));
    }
    // Asked for again, nothing happens.
    guest.machine.pause().unwrap();
    guest.machine.pause().unwrap();
    guest.machine.resume().unwrap();
    guest.machine.resume().unwrap();
    let sleeps = guest.printed.lock().unwrap().slept.len();
    guest.until(Duration::from_secs(20), |printed| {
        printed.slept.len() > sleeps + 2
    });

    let printed = guest.printed.lock().unwrap();
    printed.check_clock();
    // On the whole it is late by the pauses.
    let (first, last) = (printed.now[0], printed.now[printed.now.len() - 1]);
    let host = (last.0 - first.0).as_secs_f64();
    let late = host - (last.1 - first.1) - paused.as_secs_f64();
    assert!(late.abs() < LONGEST_STEP, "{late} s late beside the pauses");
}

#[test]
fn a_paused_uml_stands_still() {
    a_paused_guest_stands_still(Kind::Uml);
}

#[test]
fn a_paused_qemu_stands_still() {
    a_paused_guest_stands_still(Kind::Qemu);
}

#[test]
fn a_paused_kvm_stands_still() {
    a_paused_guest_stands_still(Kind::Kvm);
}

fn a_paused_guest_ends(kind: Kind) {
    let Some(mut guest) = Guest::start(kind) else {
        return;
    };
    guest.machine.pause().unwrap();
    assert_eq!(guest.machine.exit(), None);
    let pid = guest.machine.processes()[0].pid;
    drop(guest.machine);
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_paused_uml_ends_with_its_handle() {
    a_paused_guest_ends(Kind::Uml);
}

#[test]
fn a_paused_qemu_ends_with_its_handle() {
    a_paused_guest_ends(Kind::Qemu);
}

#[test]
fn a_paused_kvm_ends_with_its_handle() {
    a_paused_guest_ends(Kind::Kvm);
}

fn an_ended_guest_cannot_be_paused(kind: Kind) {
    let Some(mut guest) = Guest::start(kind) else {
        return;
    };
    let process = &guest.machine.processes()[0];
    let signal = rustix::process::Signal::KILL;
    rustix::process::pidfd_send_signal(&process.pidfd, signal).unwrap();
    let mut events = [rustix::event::PollFd::new(
        &process.pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut events, None).unwrap();
    let error = guest.machine.pause().unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot pause the machine: the machine process was killed by SIGKILL"
    );
}

#[test]
fn an_ended_uml_cannot_be_paused() {
    an_ended_guest_cannot_be_paused(Kind::Uml);
}

#[test]
fn an_ended_qemu_cannot_be_paused() {
    an_ended_guest_cannot_be_paused(Kind::Qemu);
}

#[test]
fn an_ended_kvm_cannot_be_paused() {
    an_ended_guest_cannot_be_paused(Kind::Kvm);
}
