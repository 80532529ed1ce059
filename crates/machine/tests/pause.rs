//! A guest that computes, sleeps and starts programs is paused and resumed. Needs root, a kernel in
//! the cache of guest/kernel/build, and a static busybox; a test that cannot run here prints the
//! reason.

#![allow(clippy::unwrap_used)]

mod common;

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Archive, kernel, no_devices};
use hull_machine::{Kind, Machine, MachineConfig, Wiring};

const BUSYBOX: &str = "/bin/busybox";

/// One process computes, one starts programs, one sleeps, and one prints the time since boot all
/// the time.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
(while :; do :; done) &
(while :; do /bin/busybox true; done) &
(while :; do
  read before rest </proc/uptime
  /bin/busybox sleep 0.2
  read after rest </proc/uptime
  echo "slept $before $after"
done) &
while :; do
  read now rest </proc/uptime
  echo "now $now"
done
"#;

/// Seconds, as a guest prints them.
type Seconds = f64;

#[derive(Debug, Default)]
struct Printed {
    /// When a line came, and the guest's time in it.
    now: Vec<(Instant, Seconds)>,
    /// Begin and end of each sleep.
    slept: Vec<(Seconds, Seconds)>,
    other: Vec<String>,
}

struct Guest {
    machine: Box<dyn Machine>,
    printed: Arc<Mutex<Printed>>,
    _control: Option<OwnedFd>,
}

impl Guest {
    /// Boots, if that can be done here.
    fn start(kind: Kind) -> Option<Self> {
        let kernel = kernel(kind)?;
        let Ok(busybox) = std::fs::read(BUSYBOX) else {
            eprintln!("skipped: no {BUSYBOX}");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let initramfs = directory.path().join("initramfs");
        let archive = Archive::default()
            .add("bin", 0o040_755, &[])
            .add("dev", 0o040_755, &[])
            .add("proc", 0o040_755, &[])
            .device("dev/console", 5, 1)
            .device("dev/null", 1, 3)
            .add("bin/busybox", 0o100_755, &busybox)
            .add("init", 0o100_755, INIT.as_bytes());
        std::fs::write(&initramfs, archive.finish()).unwrap();
        let (read, write) = std::io::pipe().unwrap();
        let config = MachineConfig {
            kernel,
            initramfs,
            memory: 128 << 20,
            vcpus: kind.backend().features().vcpus(2),
            hardware: false,
        };
        let (devices, control) = no_devices(kind);
        let wiring = Wiring {
            console: OwnedFd::from(write),
            devices,
            uid: 60_000,
        };
        let machine = kind.backend().start(&config, wiring).unwrap();
        let printed: Arc<Mutex<Printed>> = Arc::default();
        let to = printed.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(read).lines().map_while(Result::ok) {
                let mut printed = to.lock().unwrap();
                let words: Vec<&str> = line.split_whitespace().collect();
                let time = |index: usize| words[index].parse::<Seconds>().ok();
                match words.as_slice() {
                    ["now", _] => printed.now.extend(time(1).map(|at| (Instant::now(), at))),
                    ["slept", _, _] => printed.slept.extend(time(1).zip(time(2))),
                    _ => printed.other.push(line),
                }
            }
        });
        let guest = Self {
            machine,
            printed,
            _control: control,
        };
        guest.until(Duration::from_secs(60), |printed| printed.slept.len() > 2);
        Some(guest)
    }

    fn until(&self, timeout: Duration, condition: impl Fn(&Printed) -> bool) {
        let start = Instant::now();
        while !condition(&self.printed.lock().unwrap()) {
            let printed = self.printed.lock().unwrap();
            let (now, slept) = (printed.now.len(), &printed.slept);
            assert!(
                start.elapsed() < timeout,
                "{now} {slept:?} {:#?}",
                printed.other
            );
            drop(printed);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

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

    fn lines(&self) -> usize {
        self.printed.lock().unwrap().now.len()
    }
}

/// How far the guest's time may advance between two of its lines: other processes have their turns,
/// and the host may be busy. Shorter than the longest pause.
const LONGEST_STEP: Seconds = 2.0;

fn a_paused_guest_stands_still(kind: Kind) {
    let Some(mut guest) = Guest::start(kind) else {
        return;
    };
    let mut paused = guest.pause_for(Duration::from_secs(3));
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
    let steps = printed.now.windows(2).map(|pair| pair[1].1 - pair[0].1);
    let (shortest, longest) = steps.fold((0.0, 0.0), |(low, high): (Seconds, Seconds), step| {
        (low.min(step), high.max(step))
    });
    assert!(shortest >= 0.0, "the guest's clock went back by {shortest}");
    assert!(
        longest < LONGEST_STEP,
        "the guest's clock jumped by {longest}"
    );
    for (before, after) in &printed.slept {
        // The clock shows hundredths.
        let slept = after - before;
        assert!(slept >= 0.19, "a sleep of 0.2 s took {slept}");
        assert!(slept < 0.2 + LONGEST_STEP, "a sleep of 0.2 s took {slept}");
    }
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
