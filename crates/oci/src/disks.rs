//! Opens block devices of the host that become disks of a machine.
//!
//! Called by `create` before the machine is started: the descriptors are passed to the pod's
//! sandbox process, and from there to its device process. Nothing here reads or writes a disk.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hull_sandbox::config::{ContainerDisk, DiskConfig};
use hull_sandbox::error::{Context, Error, Result};
use rustix::fs::{FileType, Mode, OFlags, Stat};

/// Opens a disk with the access that the guest may have.
///
/// # Errors
/// The device is unknown to the kernel, has no node in /dev, or cannot be opened.
pub fn open(disk: &ContainerDisk) -> Result<OwnedFd> {
    let DiskConfig {
        major,
        minor,
        read_only,
    } = disk.device;
    let node = node(major, minor)?;
    let doing = || format!("open block device {major}:{minor} ({})", node.display());
    let is_it = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice
            && stat.st_rdev == rustix::fs::makedev(major, minor)
    };
    let other = || Error::new(format!("cannot {}: it is not its node", doing()));
    // Checked before opening, which can have side effects, and blocks on some file types.
    if !is_it(&rustix::fs::stat(&node).context(doing)?) {
        return Err(other());
    }
    let access = match read_only {
        true => OFlags::RDONLY,
        false => OFlags::RDWR,
    };
    let file = rustix::fs::open(&node, access | OFlags::CLOEXEC, Mode::empty()).context(doing)?;
    match is_it(&rustix::fs::fstat(&file).context(doing)?) {
        true => Ok(file),
        false => Err(other()),
    }
}

/// Path of the device's node on the host, from the kernel's name for it.
fn node(major: u32, minor: u32) -> Result<PathBuf> {
    let doing = || format!("open block device {major}:{minor}");
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let text = text.context(doing)?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    match name {
        Some(name) => Ok(Path::new("/dev").join(name)),
        None => Err(Error::new(format!("cannot {}: it has no name", doing()))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_device_that_there_is_not_is_named() {
        let disk = ContainerDisk {
            device: DiskConfig {
                major: 4000,
                minor: 7,
                read_only: true,
            },
            path: "/dev/x".into(),
        };
        let message = open(&disk).unwrap_err().message;
        let begin = "cannot open block device 4000:7: ";
        assert!(message.starts_with(begin), "{message}");
    }
}
