//! Configuration of a guest's devices, and their descriptors.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// Most disks of a guest.
pub const MAX_DISKS: usize = 16;

/// Most net devices of a guest.
pub const MAX_NETS: usize = 16;

/// Fs, vsock, entropy and balloon, net devices, and disks with two descriptors each.
pub(crate) const MAX_DESCRIPTORS: usize = 4 + MAX_NETS + 2 * MAX_DISKS;

/// The serial number of the machine's disk `index` in the guest.
pub fn disk_serial(index: usize) -> String {
    format!("hull-disk{index}")
}

/// A type of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceType {
    /// Directories of the host.
    Fs,
    /// Byte streams to the host.
    Vsock,
    /// Random numbers.
    Entropy,
    /// A network interface.
    Net,
    /// A block device.
    Disk,
    /// Memory that the guest does not use.
    Balloon,
}

impl DeviceType {
    /// The device ID of the virtio specification, section 5.
    pub const fn virtio_id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Disk => 2,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Fs => 26,
        }
    }

    /// Its name, for messages and thread names.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fs => "fs",
            Self::Vsock => "vsock",
            Self::Entropy => "entropy",
            Self::Net => "net",
            Self::Disk => "disk",
            Self::Balloon => "balloon",
        }
    }

    /// The name of device `number` of this type, without the number where a guest has only one.
    pub fn unique_name(self, number: usize) -> String {
        match self {
            Self::Net | Self::Disk => self.instance_name(number),
            Self::Fs | Self::Vsock | Self::Entropy | Self::Balloon => self.name().to_owned(),
        }
    }

    /// The name of a device of this type with a number.
    pub fn instance_name(self, number: usize) -> String {
        format!("{}{number}", self.name())
    }
}

/// Devices with their numbers, which count those of each type.
pub fn numbered<T>(
    devices: impl IntoIterator<Item = T>,
    device_type: impl Fn(&T) -> DeviceType,
) -> impl Iterator<Item = (usize, T)> {
    let mut counts = HashMap::<DeviceType, usize>::new();
    devices.into_iter().map(move |device| {
        let count = counts.entry(device_type(&device)).or_default();
        let number = *count;
        *count += 1;
        (number, device)
    })
}

/// A device of a guest. Its descriptors are, in this order: with [`Transport::VhostUser`], the
/// listening socket; for a disk, the file or block device, opened with the guest's access mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceConfig {
    /// See [`DeviceType::Fs`].
    Fs,
    /// See [`DeviceType::Vsock`].
    Vsock,
    /// See [`DeviceType::Entropy`].
    Entropy,
    /// See [`DeviceType::Balloon`]. For guest memory that only this guest maps.
    Balloon,
    /// See [`DeviceType::Net`].
    Net {
        /// Hardware address that the driver reads.
        mac: [u8; 6],
        /// The front end is QEMU's net device, which enables rings before it has set features.
        early_enable: bool,
    },
    /// See [`DeviceType::Disk`].
    Disk {
        /// The guest may only read.
        read_only: bool,
    },
    /// A disk whose file comes later, by [`crate::Call::AttachDisk`]. The guest probes it after
    /// that.
    SpareDisk,
}

impl DeviceConfig {
    /// Type of the device.
    pub const fn device_type(&self) -> DeviceType {
        match self {
            Self::Fs => DeviceType::Fs,
            Self::Vsock => DeviceType::Vsock,
            Self::Entropy => DeviceType::Entropy,
            Self::Balloon => DeviceType::Balloon,
            Self::Net { .. } => DeviceType::Net,
            Self::Disk { .. } | Self::SpareDisk => DeviceType::Disk,
        }
    }
}

/// How a guest's driver reaches its devices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// The machine is another process, which connects to a socket for each device.
    #[default]
    VhostUser,
    /// The devices are in the machine process.
    Mmio,
}

/// The first message to the process that holds the devices: which ones. Net devices and disks are
/// numbered in order of appearance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// How they are reached.
    pub transport: Transport,
    /// The devices.
    pub devices: Vec<DeviceConfig>,
}

/// The descriptors of a device.
#[derive(Debug)]
pub struct Resources {
    /// Listening socket of [`Transport::VhostUser`].
    pub socket: Option<OwnedFd>,
    /// The file or block device of a disk.
    pub file: Option<OwnedFd>,
}

/// Why a [`Setup`] is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSetup {
    /// Too many devices of a type.
    #[error("a machine has {most} {} devices at most", .device.name())]
    TooMany {
        /// The type.
        device: DeviceType,
        /// The limit.
        most: usize,
    },
    /// The number of descriptors is wrong.
    #[error("the devices need {needed} descriptors, and {given} were given")]
    Descriptors {
        /// Number that the devices need.
        needed: usize,
        /// Number received.
        given: usize,
    },
}

impl Setup {
    /// The devices' names, in order: `fs`, `net0`, `net1`, `disk0`, ….
    pub fn names(&self) -> impl Iterator<Item = String> {
        numbered(&self.devices, |device| device.device_type())
            .map(|(number, device)| device.device_type().unique_name(number))
    }

    /// Assigns the descriptors to the devices.
    ///
    /// # Errors
    /// [`InvalidSetup`] if there are too many devices of a type, or the number of descriptors is
    /// wrong.
    pub fn assign(
        self,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Vec<(DeviceConfig, Resources)>, InvalidSetup> {
        self.check()?;
        let (needed, given) = (self.descriptors(), descriptors.len());
        let wrong = || InvalidSetup::Descriptors { needed, given };
        if needed != given {
            return Err(wrong());
        }
        let sockets = self.transport == Transport::VhostUser;
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(wrong);
        self.devices
            .into_iter()
            .map(|device| {
                let resources = Resources {
                    socket: sockets.then(&mut next).transpose()?,
                    file: match device {
                        DeviceConfig::Disk { .. } => Some(next()?),
                        _ => None,
                    },
                };
                Ok((device, resources))
            })
            .collect()
    }

    /// Number of descriptors that the devices need.
    fn descriptors(&self) -> usize {
        let files = self.devices.iter();
        let files = files.filter(|device| matches!(device, DeviceConfig::Disk { .. }));
        match self.transport {
            Transport::VhostUser => self.devices.len() + files.count(),
            Transport::Mmio => files.count(),
        }
    }

    fn check(&self) -> Result<(), InvalidSetup> {
        for (device, most) in [
            (DeviceType::Fs, 1),
            (DeviceType::Vsock, 1),
            (DeviceType::Entropy, 1),
            (DeviceType::Balloon, 1),
            (DeviceType::Net, MAX_NETS),
            (DeviceType::Disk, MAX_DISKS),
        ] {
            let count = self
                .devices
                .iter()
                .filter(|config| config.device_type() == device)
                .count();
            if count > most {
                return Err(InvalidSetup::TooMany { device, most });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;

    fn descriptors(count: usize) -> Vec<OwnedFd> {
        let (fd, _) = hull_ipc::pair().unwrap();
        (0..count)
            .map(|_| fd.as_fd().try_clone_to_owned().unwrap())
            .collect()
    }

    const NET: DeviceConfig = DeviceConfig::Net {
        mac: [2, 0, 0, 0, 0, 1],
        early_enable: true,
    };
    const DISK: DeviceConfig = DeviceConfig::Disk { read_only: true };

    #[test]
    fn each_device_gets_its_descriptors_in_order() {
        let setup = Setup {
            devices: vec![DeviceConfig::Fs, DISK, NET, DISK],
            ..Setup::default()
        };
        let given = descriptors(6);
        let numbers: Vec<_> = given.iter().map(AsRawFd::as_raw_fd).collect();
        let assigned = setup.clone().assign(given).unwrap();
        let seen: Vec<_> = assigned
            .iter()
            .flat_map(|(_, has)| [has.socket.as_ref(), has.file.as_ref()])
            .flatten()
            .map(AsRawFd::as_raw_fd)
            .collect();
        assert_eq!(seen, numbers);
        let devices: Vec<_> = assigned.into_iter().map(|(device, _)| device).collect();
        assert_eq!(devices, setup.devices);
        let names: Vec<_> = setup.names().collect();
        assert_eq!(names, ["fs", "disk0", "net0", "disk1"]);
    }

    #[test]
    fn the_number_of_descriptors_must_be_right() {
        for given in [0, 1, 2, 4] {
            let setup = Setup {
                devices: vec![DeviceConfig::Vsock, DISK],
                ..Setup::default()
            };
            assert_eq!(
                setup.assign(descriptors(given)).unwrap_err(),
                InvalidSetup::Descriptors { needed: 3, given }
            );
        }
    }

    #[test]
    fn devices_in_the_machine_process_have_no_sockets() {
        let setup = Setup {
            devices: vec![DeviceConfig::Vsock, DISK, NET],
            transport: Transport::Mmio,
        };
        let assigned = setup.clone().assign(descriptors(1)).unwrap();
        assert!(assigned.iter().all(|(_, has)| has.socket.is_none()));
        let disk = assigned.iter().find(|(device, _)| *device == DISK);
        assert!(disk.unwrap().1.file.is_some());
        assert!(setup.assign(descriptors(3)).is_err());
    }

    #[test]
    fn the_number_of_devices_is_bounded() {
        for (device, most) in [(DeviceConfig::Fs, 1), (NET, MAX_NETS), (DISK, MAX_DISKS)] {
            let setup = |count| Setup {
                devices: vec![device.clone(); count],
                ..Setup::default()
            };
            let fine = setup(most);
            let needed = fine.descriptors();
            assert!(fine.assign(descriptors(needed)).is_ok());
            let refused = setup(most + 1).assign(Vec::new()).unwrap_err();
            assert!(matches!(refused, InvalidSetup::TooMany { .. }), "{refused}");
        }
    }

    #[test]
    fn the_largest_setup_fits_its_limits() {
        let mut devices = vec![
            DeviceConfig::Fs,
            DeviceConfig::Vsock,
            DeviceConfig::Entropy,
            DeviceConfig::Balloon,
        ];
        devices.extend(vec![
            DeviceConfig::Net {
                mac: [255; 6],
                early_enable: false,
            };
            MAX_NETS
        ]);
        devices.extend(vec![DeviceConfig::Disk { read_only: false }; MAX_DISKS]);
        let setup = Setup {
            devices,
            ..Setup::default()
        };
        let text = serde_json::to_vec(&setup).unwrap();
        assert!(text.len() <= crate::SETUP_LIMITS.bytes);
        assert!(setup.descriptors() <= crate::SETUP_LIMITS.fds);
        assert_eq!(serde_json::from_slice::<Setup>(&text).unwrap(), setup);
    }
}
