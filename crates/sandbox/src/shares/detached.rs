//! Detached mounts: copies of what the host has mounted, attached nowhere, which become shares of a
//! guest. They vanish with their last descriptor. With mount_setattr(2), which no library here has.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

/// A detached copy of what is at `path`, with everything mounted below it when `recursive`.
///
/// # Errors
/// The kernel's.
pub fn copy(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(open_tree(CWD, path, flags)?)
}

/// A detached copy of an open directory, without what is mounted below it.
///
/// # Errors
/// The kernel's.
pub fn copy_of(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(directory, c"", flags)?)
}

/// Attributes to be set on a mount.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    /// MOUNT_ATTR_RDONLY.
    pub read_only: bool,
    /// MOUNT_ATTR_NODEV.
    pub no_devices: bool,
    /// MOUNT_ATTR_NOSUID.
    pub no_suid: bool,
}

impl Attributes {
    fn bits(self) -> u64 {
        [
            (self.read_only, libc::MOUNT_ATTR_RDONLY),
            (self.no_devices, libc::MOUNT_ATTR_NODEV),
            (self.no_suid, libc::MOUNT_ATTR_NOSUID),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |bits, (_, bit)| bits | bit)
    }
}

/// Sets attributes on a detached tree and everything mounted in it, and makes it private.
///
/// # Errors
/// The kernel's.
pub fn set(tree: BorrowedFd<'_>, attributes: Attributes) -> io::Result<()> {
    call(tree, attributes, libc::AT_RECURSIVE)
}

/// The same for the tree's top mount alone.
///
/// # Errors
/// The kernel's.
pub fn set_top(tree: BorrowedFd<'_>, attributes: Attributes) -> io::Result<()> {
    call(tree, attributes, 0)
}

fn call(tree: BorrowedFd<'_>, attributes: Attributes, flags: libc::c_int) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes.bits(),
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open for the length of the call, the path is an empty C string, and
    // the kernel reads no more than the given size of the structure.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
