//! hull's own executable, as its jailed processes have it.
//!
//! A process can open what it executes by `/proc/self/exe`. One that is root in its jail could
//! change the mode, owner and attributes of that file, which is the host's. So it is executed from
//! a mount of its own, which is attached nowhere and read-only.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fstat, open, readlink};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::root::clone_tree;
use crate::sys;

/// The executable on a read-only mount of its own.
///
/// # Errors
/// The kernel's, for example ENOENT: it was removed, and is open from another mount namespace.
pub fn sealed(executable: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mount = match clone_tree(executable) {
        // It was opened in another mount namespace.
        Err(Errno::INVAL) => clone_tree(by_name(executable)?.as_fd())?,
        cloned => cloned?,
    };
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    sys::set_mount_attributes(mount.as_fd(), attributes.bits().into(), false)?;
    Ok(mount)
}

/// The same file by its name in this mount namespace.
///
/// The kernel shows the name from the root of the namespace where the file was opened. In a chroot
/// that is longer than the name here, by the directories above the process's root.
fn by_name(executable: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let link = format!("/proc/self/fd/{}", executable.as_raw_fd());
    let name = readlink(link, Vec::new())?;
    let wanted = fstat(executable)?;
    let starts = name.to_bytes().iter().enumerate();
    let starts = starts.filter(|(_, byte)| **byte == b'/');
    for (start, _) in starts {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let Ok(found) = open(&name.to_bytes()[start..], flags, Mode::empty()) else {
            continue;
        };
        let stat = fstat(&found)?;
        if (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino) {
            return Ok(found);
        }
    }
    Err(Errno::NOENT)
}
