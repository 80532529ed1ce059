//! What a guest can reach: its devices, and the threads of the host that serve them.

use std::fs;
use std::ops::RangeInclusive;

use hull_device_control::ServedDevice;
use hull_machine::{Features, FixedDevice};
use serde::{Deserialize, Serialize};

use crate::store::HostProcesses;

/// A device of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDevice {
    /// What it is: a type of virtio device, or a name of another one.
    pub device: String,
    /// Number among those of its type.
    pub number: usize,
    /// Ports of a processor, in hexadecimal, first and last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<String>,
    /// Guest addresses, in hexadecimal, first and last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Number of its interrupt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interrupt: Option<u32>,
    /// Sizes of its queues.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queues: Vec<u16>,
    /// The process that serves it; 0 for the host's kernel.
    pub process: i32,
    /// Ids of that process's threads that do.
    pub threads: Vec<i32>,
}

/// All devices of a guest.
pub(crate) fn devices(
    features: &Features,
    served: Vec<ServedDevice>,
    processes: &HostProcesses,
) -> Vec<GuestDevice> {
    let holder = match processes.devices {
        0 => processes.machine,
        devices => devices,
    };
    let threads = threads(holder);
    let served = served.into_iter().map(|served| {
        let place = (features.place)(served.device, served.number);
        let thread = served.thread();
        let further = format!("{thread}-");
        GuestDevice {
            device: served.device.name().to_owned(),
            number: served.number,
            ports: None,
            memory: place.as_ref().map(|place| range(&place.memory)),
            interrupt: place.map(|place| place.interrupt),
            queues: served.queues,
            process: holder,
            threads: of(&threads, |name| {
                name == thread || name.starts_with(&further)
            }),
        }
    });
    let fixed = features
        .fixed
        .iter()
        .map(|device: &FixedDevice| GuestDevice {
            device: device.name.to_owned(),
            number: 0,
            ports: device.ports.as_ref().map(range),
            memory: device.memory.as_ref().map(range),
            interrupt: None,
            queues: Vec::new(),
            process: device.threads.map_or(0, |_| processes.machine),
            threads: device.threads.map_or_else(Vec::new, |prefix| {
                of(&threads, |name| name.starts_with(prefix))
            }),
        });
    served.chain(fixed).collect()
}

fn range(range: &RangeInclusive<impl std::fmt::LowerHex>) -> String {
    format!("{:#x}-{:#x}", range.start(), range.end())
}

/// Ids and names of a process's threads; none if it has ended.
fn threads(process: i32) -> Vec<(i32, String)> {
    let entries = fs::read_dir(format!("/proc/{process}/task"));
    let found = entries.into_iter().flatten().flatten().filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        Some((id, name.trim_end().to_owned()))
    });
    let mut found: Vec<_> = found.collect();
    found.sort_unstable();
    found
}

fn of(threads: &[(i32, String)], is_it: impl Fn(&str) -> bool) -> Vec<i32> {
    let found = threads.iter().filter(|(_, name)| is_it(name));
    found.map(|(id, _)| *id).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_device_control::DeviceType;
    use hull_machine::Kind;

    use super::*;

    #[test]
    fn every_device_is_listed_with_its_place_and_threads() {
        let processes = HostProcesses {
            sandbox: 0,
            devices: 0,
            machine: std::process::id().cast_signed(),
        };
        let served = vec![ServedDevice {
            device: DeviceType::Net,
            number: 1,
            queues: vec![256, 256],
        }];
        let name = served[0].thread();
        let (wait, ready) = std::sync::mpsc::channel::<()>();
        let (started, running) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            started.send(rustix::thread::gettid().as_raw_pid()).unwrap();
            ready.recv().unwrap_err();
        });
        let id = running.recv().unwrap();
        let features = Kind::Kvm.backend().features();
        let found = devices(&features, served.clone(), &processes);
        drop(wait);
        thread.unwrap().join().unwrap();
        assert_eq!(found[0].memory.as_deref(), Some("0xd0005000-0xd0005fff"));
        assert_eq!(found[0].interrupt, Some(10));
        assert_eq!(found[0].threads, [id]);
        let serial = found.iter().find(|device| device.device == "serial port");
        assert_eq!(serial.unwrap().ports.as_deref(), Some("0x3f8-0x3ff"));

        let features = Kind::Uml.backend().features();
        let found = devices(&features, served, &processes);
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].memory, found[0].interrupt), (&None, None));
    }
}
