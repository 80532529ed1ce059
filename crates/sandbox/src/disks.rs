//! The disks of a machine: those that it was started with, and those added while it runs.

use std::os::fd::{AsFd, OwnedFd};

use hull_device_control::disk_serial;
use serde_json::{Value, json};

use crate::config::{ContainerDisk, DiskConfig};
use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// The disks of a machine.
#[derive(Debug)]
pub(crate) struct Disks {
    /// In the order of their serial numbers.
    known: tokio::sync::Mutex<Vec<DiskConfig>>,
    /// How many the machine was started with: those its guest finds by itself.
    at_boot: usize,
    /// How many there can be.
    room: usize,
    kind: hull_machine::Disks,
}

impl Disks {
    /// Those of a machine that was just started, which has room for `spare` more.
    pub(crate) fn new(known: Vec<DiskConfig>, spare: usize, kind: hull_machine::Disks) -> Self {
        Self {
            at_boot: known.len(),
            room: known.len().saturating_add(spare),
            known: tokio::sync::Mutex::new(known),
            kind,
        }
    }

    /// What the guest is told of the disks of a container: see `HullDisk` in the crate
    /// `agent-spec`.
    ///
    /// # Errors
    /// `Unsupported` for one that the machine does not have, or only reads.
    pub(crate) async fn describe(&self, disks: &[ContainerDisk]) -> Result<Vec<Value>> {
        if disks.is_empty() {
            return Ok(Vec::new());
        }
        let known = self.known.lock().await;
        let describe = |disk: &ContainerDisk| {
            let DiskConfig { major, minor, .. } = disk.device;
            let index = find(&known, disk)?.ok_or_else(|| self.no_room(disk))?;
            let number = u8::try_from(index).unwrap_or(u8::MAX);
            let mut described =
                json!({"major": major, "minor": minor, "serial": disk_serial(index)});
            let added = index >= self.at_boot;
            if let Some(parameter) = self.kind.hotplug_parameter(number).filter(|_| added) {
                described["plug"] = Value::String(parameter);
            }
            Ok(described)
        };
        disks.iter().map(describe).collect()
    }

    fn no_room(&self, disk: &ContainerDisk) -> Error {
        let running = "the machine of its pod already runs, and";
        match self.room == self.at_boot {
            true => refused(
                disk,
                &format!("{running} its disks are those it was started with"),
            )
            .hint("name the device in the first container of the pod"),
            false => refused(disk, &format!("{running} has no room for another disk"))
                .hint(format!("a pod has {} at most", self.room)),
        }
    }
}

/// Which one of the machine's disks a block device is.
fn find(known: &[DiskConfig], disk: &ContainerDisk) -> Result<Option<usize>> {
    let DiskConfig {
        major,
        minor,
        read_only,
    } = disk.device;
    let same = |own: &DiskConfig| (own.major, own.minor) == (major, minor);
    match known.iter().position(same) {
        Some(index) if known[index].read_only && !read_only => Err(refused(
            disk,
            "the machine of its pod already runs, and only reads from this disk",
        )),
        found => Ok(found),
    }
}

fn refused(disk: &ContainerDisk, why: &str) -> Error {
    let DiskConfig { major, minor, .. } = disk.device;
    Error::unsupported(format_args!(
        "linux.devices: {} (b {major}:{minor}): {why}",
        disk.path
    ))
}

impl Sandbox {
    /// Adds block devices of the host to the machine, for a container that is to be created. Those
    /// that it has stay as they are.
    ///
    /// # Errors
    /// `InvalidArgument` when not as many files as disks come; `Unsupported` when the machine has
    /// no room for one, or has it for reading only; what the device process says. Those before it
    /// are there.
    pub async fn add_disks(&self, disks: &[ContainerDisk], files: Vec<OwnedFd>) -> Result<()> {
        if disks.len() != files.len() {
            return Err(Error::invalid("as many descriptors as disks must come"));
        }
        // Held: two containers that are created at once do not get the same number.
        let mut known = self.0.disks.known.lock().await;
        for (disk, file) in disks.iter().zip(files) {
            if find(&known, disk)?.is_some() {
                continue;
            }
            let number = u8::try_from(known.len()).unwrap_or(u8::MAX);
            if known.len() >= self.0.disks.room {
                return Err(self.0.disks.no_room(disk));
            }
            let read_only = disk.device.read_only;
            let attached = self.0.devices.attach_disk(number, file.as_fd(), read_only);
            attached.await?;
            known.push(disk.device);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(minor: u32, read_only: bool) -> ContainerDisk {
        ContainerDisk {
            path: format!("/dev/d{minor}"),
            device: DiskConfig {
                major: 7,
                minor,
                read_only,
            },
        }
    }

    #[tokio::test]
    async fn a_disk_is_named_by_its_place_and_by_how_the_guest_finds_it() {
        let kind = hull_machine::Disks::HotPlug {
            parameter: |number| format!("plug {number}"),
        };
        let disks = Disks::new(vec![disk(0, true).device], 1, kind);
        disks.known.lock().await.push(disk(1, false).device);
        let described = disks.describe(&[disk(1, true)]).await.unwrap_or_default();
        assert_eq!(
            described,
            [json!({"major": 7, "minor": 1, "serial": "hull-disk1", "plug": "plug 1"})]
        );
        let described = disks.describe(&[disk(0, true)]).await.unwrap_or_default();
        assert_eq!(described[0]["plug"], Value::Null);
        for (wanted, why) in [(disk(0, false), "only reads"), (disk(2, false), "no room")] {
            let error = disks.describe(&[wanted]).await.map(drop);
            assert!(error.is_err_and(|error| error.message.contains(why)));
        }
    }
}
