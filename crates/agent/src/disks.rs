//! The machine's disks: maps block devices of the host to those of the guest.
//!
//! A spec names devices by the host's numbers. The guest's kernel numbers its disks as it finds
//! them, so the host passes the serial number of each disk that a container may have; `service` has
//! the spec translated here before the container is created, and rules again when they change.
//! Never opens a disk.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use oci_spec::runtime::{
    HullDisk, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxResources, Spec,
};
use ttrpc::Code;

use crate::rpc::status::{Failure, Result};

/// Where the kernel shows its disks.
const DISKS: &str = "/sys/block";

/// Prefix of the serial numbers of the machine's disks.
const SERIALS: &str = "hull-disk";

/// How long a disk that the machine has may take to appear.
const DISK_TIMEOUT: Duration = Duration::from_secs(2);

/// Polling interval.
const INTERVAL: Duration = Duration::from_millis(10);

/// Major and minor.
type Numbers = (i64, i64);

/// The disks of one container: their numbers on the host and in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disks(Vec<(Numbers, Numbers)>);

impl Disks {
    /// Finds the disks that a spec names, and puts their numbers into its devices and rules.
    pub async fn translate(spec: &mut Spec) -> Result<Disks> {
        let disks = match spec.hull_disks().as_deref().unwrap_or_default() {
            [] => Disks::default(),
            wanted => find(wanted).await?,
        };
        let Some(linux) = spec.linux_mut() else {
            return Ok(disks);
        };
        for device in linux.devices_mut().iter_mut().flatten() {
            disks.device(device);
        }
        if let Some(resources) = linux.resources_mut() {
            disks.resources(resources)?;
        }
        Ok(disks)
    }

    /// Puts the guest's numbers into the rules about block devices.
    pub fn resources(&self, resources: &mut LinuxResources) -> Result<()> {
        let Some(rules) = resources.devices_mut() else {
            return Ok(());
        };
        // Usually there are none, and nothing to look up.
        if rules.iter().any(names_block_device) {
            let all = list(Path::new(DISKS))
                .map_err(|error| Failure::internal("look for the machine's disks", &error))?;
            let mut majors: Vec<i64> = all.into_iter().map(|(_, (major, _))| major).collect();
            // Also before the first disk is there, which may be added later.
            majors.extend(driver_major());
            *rules = self.rules(rules, &majors);
        }
        Ok(())
    }

    fn device(&self, device: &mut LinuxDevice) {
        let numbers = (device.major(), device.minor());
        let found = self.0.iter().find(|(host, _)| *host == numbers);
        if let Some((_, (major, minor))) = found
            && device.typ() == LinuxDeviceType::B
        {
            device.set_major(*major).set_minor(*minor);
        }
    }

    /// The rules with the guest's numbers. A rule that covers several disks by leaving a number
    /// open becomes one for each. `majors` are those of all disks of the machine: a container must
    /// not reach the disks of others by the host's numbers.
    fn rules(&self, rules: &[LinuxDeviceCgroup], majors: &[i64]) -> Vec<LinuxDeviceCgroup> {
        let mut translated = Vec::with_capacity(rules.len());
        for rule in rules {
            if !names_block_device(rule) {
                translated.push(rule.clone());
                continue;
            }
            let (major, minor) = (named(rule.major()), named(rule.minor()));
            if rule.typ() != Some(LinuxDeviceType::B) {
                let mut characters = rule.clone();
                characters.set_typ(Some(LinuxDeviceType::C));
                translated.push(characters);
            }
            let mut blocks = rule.clone();
            blocks.set_typ(Some(LinuxDeviceType::B));
            let exact = (major.zip(minor))
                .is_some_and(|numbers| self.0.iter().any(|(host, _)| *host == numbers));
            // Devices that the guest has under these numbers by itself, such as loop devices.
            if !exact && major.is_some_and(|major| !majors.contains(&major)) {
                translated.push(blocks.clone());
            }
            for (host, guest) in &self.0 {
                let covers = |named: Option<i64>, number| named.is_none_or(|named| named == number);
                if covers(major, host.0) && covers(minor, host.1) {
                    blocks.set_major(Some(guest.0)).set_minor(Some(guest.1));
                    translated.push(blocks.clone());
                }
            }
        }
        translated
    }
}

/// The major number of virtio disks, whether or not there is one.
fn driver_major() -> Option<i64> {
    let devices = fs::read_to_string("/proc/devices").ok()?;
    let mut lines = devices
        .lines()
        .filter_map(|line| line.trim().split_once(' '));
    lines
        .find(|(_, name)| *name == "virtblk")
        .and_then(|(major, _)| major.parse().ok())
}

/// A number of a rule; `None` if it matches any (-1 or left out).
fn named(number: Option<i64>) -> Option<i64> {
    number.filter(|number| *number != -1)
}

/// Whether a rule is about block devices of certain numbers.
fn names_block_device(rule: &LinuxDeviceCgroup) -> bool {
    let block = matches!(
        rule.typ(),
        None | Some(LinuxDeviceType::A | LinuxDeviceType::B)
    );
    block && (named(rule.major()).is_some() || named(rule.minor()).is_some())
}

/// Waits until the kernel has found all of them. Those that were added since it has booted are
/// plugged in.
async fn find(wanted: &[HullDisk]) -> Result<Disks> {
    let mut waited = Duration::ZERO;
    loop {
        let found = list(Path::new(DISKS))
            .map_err(|error| Failure::internal("look for the machine's disks", &error))?;
        if waited.is_zero() {
            plug(wanted, &found)?;
        }
        let missing = match resolve(wanted, &found) {
            Ok(disks) => return Ok(disks),
            Err(missing) => missing,
        };
        if waited >= DISK_TIMEOUT {
            return Err(Failure::new(
                Code::INTERNAL,
                format!(
                    "the guest kernel has found no disk {}, which is block device {}:{} of the host",
                    missing.serial(),
                    missing.major(),
                    missing.minor()
                ),
            ));
        }
        tokio::time::sleep(INTERVAL).await;
        waited += INTERVAL;
    }
}

/// Makes the kernel probe those that it has not found. Of those that it was booted with it finds
/// each by itself, and refuses to add it once more.
fn plug(wanted: &[HullDisk], found: &[(String, Numbers)]) -> Result<()> {
    let is_found = |disk: &&HullDisk| found.iter().any(|(serial, _)| serial == disk.serial());
    for disk in wanted.iter().filter(|disk| !is_found(disk)) {
        if let Some(device) = disk.plug() {
            crate::hotplug::add(device)
                .map_err(|error| Failure::internal("add a disk to the guest", &error))?;
        }
    }
    Ok(())
}

/// The disks by their serial numbers, or the first one that is not there.
fn resolve<'a>(
    wanted: &'a [HullDisk],
    found: &[(String, Numbers)],
) -> std::result::Result<Disks, &'a HullDisk> {
    let one = |disk: &'a HullDisk| {
        let host = (disk.major(), disk.minor());
        let of_serial = found.iter().find(|(serial, _)| serial == disk.serial());
        of_serial.map(|(_, guest)| (host, *guest)).ok_or(disk)
    };
    wanted
        .iter()
        .map(one)
        .collect::<std::result::Result<_, _>>()
        .map(Disks)
}

/// Serial and device numbers of the machine's disks that the kernel has found.
fn list(directory: &Path) -> io::Result<Vec<(String, Numbers)>> {
    let mut disks = Vec::new();
    for entry in fs::read_dir(directory)? {
        let disk = entry?.path();
        // Loop devices and the like have none.
        let Ok(serial) = fs::read_to_string(disk.join("serial")) else {
            continue;
        };
        let serial = serial.trim_matches(['\0', '\n', ' ']);
        if !serial.starts_with(SERIALS) {
            continue;
        }
        let numbers = fs::read_to_string(disk.join("dev"))?;
        let numbers = numbers.trim().split_once(':');
        let numbers =
            numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        disks.extend(numbers.map(|numbers| (serial.to_owned(), numbers)));
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    /// Two disks of the host, in a guest with a third one of another container.
    fn translated(json: &str) -> Vec<String> {
        let disks = Disks(vec![((7, 3), (254, 0)), ((8, 16), (254, 16))]);
        disks
            .rules(&rules(json), &[254, 254, 254])
            .iter()
            .map(|rule| {
                let number = |number| named(number).map_or("*".into(), |n| n.to_string());
                format!(
                    "{}{} {}:{} {}",
                    if rule.allow() { "+" } else { "-" },
                    rule.typ().unwrap_or_default().as_str(),
                    number(rule.major()),
                    number(rule.minor()),
                    rule.access().as_deref().unwrap_or_default()
                )
            })
            .collect()
    }

    #[test]
    fn rules_of_the_hosts_numbers_become_the_guests() {
        for (json, expected) in [
            // As engines write them.
            (
                r#"[{"allow":false,"access":"rwm"},
                    {"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"},
                    {"allow":true,"type":"b","major":7,"minor":3,"access":"r"}]"#,
                &["-a *:* rwm", "+c 1:3 rwm", "+b 254:0 r"][..],
            ),
            (
                r#"[{"allow":true,"type":"b","major":8,"minor":-1,"access":"rw"}]"#,
                &["+b 8:* rw", "+b 254:16 rw"],
            ),
            // A device of the host does not become another container's disk.
            (
                r#"[{"allow":true,"type":"b","major":254,"minor":32,"access":"rw"},
                    {"allow":true,"type":"b","major":254,"access":"rw"}]"#,
                &[],
            ),
            (
                r#"[{"allow":true,"type":"b","minor":3,"access":"rw"}]"#,
                &["+b 254:0 rw"],
            ),
            (
                r#"[{"allow":true,"major":7,"minor":3,"access":"rw"}]"#,
                &["+c 7:3 rw", "+b 254:0 rw"],
            ),
            (
                r#"[{"allow":true,"type":"b","major":7,"minor":4,"access":"rw"},
                    {"allow":true,"type":"c","major":8,"minor":16,"access":"rw"},
                    {"allow":true,"type":"b","access":"m"}]"#,
                &["+b 7:4 rw", "+c 8:16 rw", "+b *:* m"],
            ),
        ] {
            assert_eq!(translated(json), expected, "{json}");
        }
    }

    #[test]
    fn nodes_get_the_guests_numbers_when_they_are_block_devices() {
        let disks = Disks(vec![((7, 3), (254, 0))]);
        for (kind, expected) in [("b", (254, 0)), ("c", (7, 3))] {
            let json = format!(r#"{{"path":"/dev/x","type":"{kind}","major":7,"minor":3}}"#);
            let mut device: LinuxDevice = serde_json::from_str(&json).unwrap();
            disks.device(&mut device);
            assert_eq!((device.major(), device.minor()), expected);
        }
    }

    #[test]
    fn disks_are_known_by_their_serial_numbers() {
        let directory = tempfile::tempdir().unwrap();
        for (name, serial, dev) in [
            ("vda", Some("hull-disk1\n"), "254:0\n"),
            ("vdb", Some("hull-disk0"), "254:16\n"),
            ("vdc", Some("other"), "254:32\n"),
            ("loop0", None, "7:0\n"),
        ] {
            let disk = directory.path().join(name);
            fs::create_dir(&disk).unwrap();
            fs::write(disk.join("dev"), dev).unwrap();
            if let Some(serial) = serial {
                fs::write(disk.join("serial"), serial).unwrap();
            }
        }
        let found = list(directory.path()).unwrap();
        assert_eq!(found.len(), 2);
        let wanted: Vec<HullDisk> = serde_json::from_str(
            r#"[{"major":7,"minor":3,"serial":"hull-disk0"},{"major":7,"minor":4,"serial":"hull-disk1"}]"#,
        )
        .unwrap();
        let expected = Disks(vec![((7, 3), (254, 16)), ((7, 4), (254, 0))]);
        assert_eq!(resolve(&wanted, &found), Ok(expected));
        let missing: Vec<HullDisk> =
            serde_json::from_str(r#"[{"major":7,"minor":5,"serial":"hull-disk2"}]"#).unwrap();
        assert_eq!(resolve(&missing, &found), Err(&missing[0]));
    }
}
