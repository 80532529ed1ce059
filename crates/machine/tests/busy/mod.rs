//! A guest that computes, sleeps, starts programs and uses devices, and prints what it sees.

#![allow(dead_code)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hull_device_control::DeviceConfig;
use hull_machine::{Devices, Kind, Machine, MachineConfig, Snapshot, Wiring};

use crate::common::{Archive, kernel, no_devices, own_devices};

const BUSYBOX: &str = "/bin/busybox";

/// One process computes, one starts programs, one sleeps, one uses devices where there are some,
/// and one prints the time since boot all the time.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
(while :; do :; done) &
(while :; do /bin/busybox true; done) &
(while :; do
  read before rest </proc/uptime
  /bin/busybox sleep 0.2
  read after rest </proc/uptime
  echo "slept $before $after"
done) &
[ ! -b /dev/vda ] || (while :; do
  /bin/busybox sleep 0.1
  set -- $(/bin/busybox head -c 16 /dev/hwrng | /bin/busybox md5sum)
  echo "random $1"
  read word </dev/vda
  echo "disk $word"
  echo 1 >/proc/sys/vm/drop_caches
done) &
while :; do
  read now rest </proc/uptime
  echo "now $now"
done
"#;

/// Seconds, as a guest prints them.
pub type Seconds = f64;

/// How far the guest's time may advance between two of its lines: other processes have their turns,
/// and the host may be busy. Shorter than [`LONG_PAUSE`].
pub const LONGEST_STEP: Seconds = 5.0;

/// A pause that would show in the guest's time.
pub const LONG_PAUSE: Duration = Duration::from_secs(8);

/// What a guest has printed.
#[derive(Debug, Default)]
pub struct Printed {
    /// When a line came, and the guest's time in it.
    pub now: Vec<(Instant, Seconds)>,
    /// Begin and end of each sleep.
    pub slept: Vec<(Seconds, Seconds)>,
    /// Sums of what the entropy device gave.
    pub random: Vec<String>,
    /// The first word on the disk.
    pub disk: Vec<String>,
    /// Everything else.
    pub other: Vec<String>,
}

impl Printed {
    fn add(&mut self, line: String) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let time = |index: usize| words[index].parse::<Seconds>().ok();
        match words.as_slice() {
            ["now", _] => self.now.extend(time(1).map(|at| (Instant::now(), at))),
            ["slept", _, _] => self.slept.extend(time(1).zip(time(2))),
            ["random", sum] => self.random.push((*sum).to_owned()),
            ["disk", word] => self.disk.push((*word).to_owned()),
            _ => self.other.push(line),
        }
    }

    /// The guest's clock neither jumped nor went back, and no sleep was too short or too long.
    pub fn check_clock(&self) {
        let steps = self.now.windows(2).map(|pair| pair[1].1 - pair[0].1);
        let (shortest, longest) = steps
            .fold((0.0, 0.0), |(low, high): (Seconds, Seconds), step| {
                (low.min(step), high.max(step))
            });
        assert!(shortest >= 0.0, "the guest's clock went back by {shortest}");
        assert!(
            longest < LONGEST_STEP,
            "the guest's clock jumped by {longest}"
        );
        for (before, after) in &self.slept {
            // The clock shows hundredths.
            let slept = after - before;
            assert!(slept >= 0.19, "a sleep of 0.2 s took {slept}");
            assert!(slept < 0.2 + LONGEST_STEP, "a sleep of 0.2 s took {slept}");
        }
    }
}

/// A running guest.
pub struct Guest {
    pub machine: Box<dyn Machine>,
    pub printed: Arc<Mutex<Printed>>,
    _control: Option<OwnedFd>,
}

/// Devices of a guest that uses some: all that need nothing else of the sandbox.
fn devices(disk: &File) -> (Devices, OwnedFd) {
    let devices = vec![
        DeviceConfig::Vsock,
        DeviceConfig::Entropy,
        DeviceConfig::Balloon,
        DeviceConfig::Disk { read_only: false },
    ];
    own_devices(devices, &[disk.as_fd()])
}

impl Guest {
    /// Boots, if that can be done here.
    pub fn start(kind: Kind) -> Option<Self> {
        let kernel = kernel(kind)?;
        let (devices, control) = no_devices(kind);
        Self::boot(kind, kernel, devices, control)
    }

    /// The same with devices, on kind `kvm`.
    pub fn with_devices(disk: &File) -> Option<Self> {
        let kernel = kernel(Kind::Kvm)?;
        let (devices, control) = devices(disk);
        Self::boot(Kind::Kvm, kernel, devices, Some(control))
    }

    fn boot(
        kind: Kind,
        kernel: std::path::PathBuf,
        devices: Devices,
        control: Option<OwnedFd>,
    ) -> Option<Self> {
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
        let config = MachineConfig {
            kernel,
            initramfs,
            memory: 128 << 20,
            vcpus: kind.backend().features().vcpus(2),
            hardware: false,
            isolate_branches: false,
        };
        let guest = Self::wired(devices, control, |wiring| {
            kind.backend().start(&config, wiring).unwrap()
        });
        guest.until(Duration::from_secs(60), |printed| printed.slept.len() > 2);
        Some(guest)
    }

    /// A guest that continues from a snapshot; it is paused.
    pub fn restored(snapshot: &Snapshot, disk: &File) -> Self {
        let (devices, control) = devices(disk);
        Self::wired(devices, Some(control), |wiring| {
            Kind::Kvm.backend().restore(snapshot, wiring).unwrap()
        })
    }

    fn wired(
        devices: Devices,
        control: Option<OwnedFd>,
        start: impl FnOnce(Wiring) -> Box<dyn Machine>,
    ) -> Self {
        let (read, write) = std::io::pipe().unwrap();
        let machine = start(Wiring {
            console: OwnedFd::from(write),
            devices,
            uid: 60_000,
        });
        let printed: Arc<Mutex<Printed>> = Arc::default();
        let to = printed.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(read).lines().map_while(Result::ok) {
                to.lock().unwrap().add(line);
            }
        });
        Self {
            machine,
            printed,
            _control: control,
        }
    }

    /// Waits until it has printed something.
    pub fn until(&self, timeout: Duration, condition: impl Fn(&Printed) -> bool) {
        let start = Instant::now();
        while !condition(&self.printed.lock().unwrap()) {
            let printed = self.printed.lock().unwrap();
            let (now, slept) = (printed.now.len(), &printed.slept);
            assert!(
                start.elapsed() < timeout,
                "{now} {slept:?} {:?} {:?} {:#?}",
                printed.random,
                printed.disk,
                printed.other
            );
            drop(printed);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How often it has printed the time.
    pub fn lines(&self) -> usize {
        self.printed.lock().unwrap().now.len()
    }
}
