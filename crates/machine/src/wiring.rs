//! The connections of a machine: its console and its devices, as descriptors.
//!
//! A foreign executable (a user-mode kernel, QEMU) takes the socket of a device as a path on its
//! command line, so each socket needs a path that the executable can open. The caller's path is not
//! used: [`place`] has the jail mount the socket of each descriptor at a path chosen by this
//! module. So the jail contains only these sockets, and the directory that they were created in is
//! not visible there.

use std::os::fd::OwnedFd;

use hull_device_control::{DeviceConfig, numbered};
use hull_jail::{Bind, Source};
use rustix::fs::{AtFlags, Gid, Uid};

use crate::{Error, Features, Kind};

/// A device and its back end.
#[derive(Debug)]
pub struct DeviceWiring {
    /// The device.
    pub config: DeviceConfig,
    /// The device process's listening vhost-user socket in the file system, opened with `O_PATH`.
    pub socket: OwnedFd,
}

/// Where the devices of a machine are.
#[derive(Debug)]
pub enum Devices {
    /// In a device process. The guest probes them in this order, by which net devices and disks are
    /// numbered.
    Sockets(Vec<DeviceWiring>),
    /// In the machine process ([`Features::own_devices`]).
    Own {
        /// The machine's end of the socket that controls them (see [`hull_device_control`]).
        control: OwnedFd,
        /// hull's executable, which the machine process runs.
        executable: OwnedFd,
    },
}

impl Devices {
    /// The devices of a kind that has them in a device process.
    pub(crate) fn sockets(self, kind: Kind) -> Result<Vec<DeviceWiring>, Error> {
        match self {
            Self::Sockets(devices) => Ok(devices),
            Self::Own { .. } => Err(Error::Wiring { kind }),
        }
    }
}

/// The connections of a machine.
///
/// Guest memory is not among them. A user-mode kernel creates its memory file itself, in the `/tmp`
/// of its jail, and maps it at offsets that it chooses; QEMU creates a memfd. Both pass it to the
/// device process over vhost-user; kind `kvm` needs no file, and maps that of a snapshot. The
/// sandbox process never maps it.
#[derive(Debug)]
pub struct Wiring {
    /// The write end of a pipe for the output of the guest kernel and the machine process. At end
    /// of file the machine has ended.
    pub console: OwnedFd,
    /// The devices.
    pub devices: Devices,
    /// User and group of the machine process.
    pub uid: u32,
}

/// A device with the name of its socket in the jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) config: DeviceConfig,
    pub(crate) name: String,
}

impl Placed {
    /// Path of the socket in the jail.
    pub(crate) fn path(&self) -> String {
        socket_path(&self.name)
    }
}

/// Path of a device's socket in the jail.
pub(crate) fn socket_path(name: &str) -> String {
    format!("/sockets/{name}")
}

/// Names devices by type and a number per type.
pub(crate) fn names(devices: impl IntoIterator<Item = DeviceConfig>) -> Vec<Placed> {
    numbered(devices, DeviceConfig::device_type)
        .map(|(number, config)| Placed {
            name: config.device_type().instance_name(number),
            config,
        })
        .collect()
}

/// Changes the owner of the sockets to the machine's user and has the jail mount them.
pub(crate) fn place(
    kind: Kind,
    features: &Features,
    devices: Vec<DeviceWiring>,
    uid: u32,
) -> Result<(Vec<Placed>, Vec<Bind>), Error> {
    let placed = names(devices.iter().map(|device| device.config.clone()));
    if let Some(most) = features.max_devices
        && placed.len() > most
    {
        let disk = |device: &&Placed| matches!(device.config, DeviceConfig::Disk { .. });
        return Err(Error::Devices {
            kind,
            disks: placed.iter().filter(disk).count(),
            count: placed.len(),
            most,
        });
    }
    let mut binds = Vec::new();
    for (DeviceWiring { socket, .. }, device) in devices.into_iter().zip(&placed) {
        let (user, group) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)));
        rustix::fs::chownat(&socket, "", user, group, AtFlags::EMPTY_PATH).map_err(|errno| {
            Error::Socket {
                device: device.name.clone(),
                errno,
            }
        })?;
        binds.push(Bind {
            source: Source::Descriptor(socket),
            target: device.path().into(),
            executable: false,
        });
    }
    Ok((placed, binds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_one_kind_are_numbered() {
        let net = |last| DeviceConfig::Net {
            mac: [2, 0, 0, 0, 0, last],
            early_enable: false,
        };
        let devices = [
            DeviceConfig::Vsock,
            net(1),
            DeviceConfig::Disk { read_only: false },
            net(2),
            DeviceConfig::Disk { read_only: false },
        ];
        let names: Vec<String> = names(devices)
            .into_iter()
            .map(|device| device.name)
            .collect();
        assert_eq!(names, ["vsock0", "net0", "disk0", "net1", "disk1"]);
    }
}
