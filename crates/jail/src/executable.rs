//! hull's own executable, as its jailed processes have it.
//!
//! A process can open what it executes by `/proc/self/exe`. One that is root in its jail could
//! change the mode, owner and attributes of that file, which is the host's. So it is executed from
//! a mount of its own, which is attached nowhere and read-only.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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
fn by_name(executable: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    use std::os::fd::AsRawFd;
    let link = format!("/proc/self/fd/{}", executable.as_raw_fd());
    let found = open(
        readlink(link, Vec::new())?,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let (found_stat, wanted) = (fstat(&found)?, fstat(executable)?);
    match (found_stat.st_dev, found_stat.st_ino) == (wanted.st_dev, wanted.st_ino) {
        true => Ok(found),
        false => Err(Errno::NOENT),
    }
}
