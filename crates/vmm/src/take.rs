//! Descriptors that the process inherits.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags};

/// Takes an inherited descriptor, which then does not survive an exec. The caller calls this once
/// for each, before anything else opens descriptors.
///
/// # Errors
/// EBADF: it is not open.
pub fn inherited(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: borrowed only to find out whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and inherited, so it has no other owner in this process.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
