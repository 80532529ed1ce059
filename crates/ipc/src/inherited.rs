//! Descriptors that a process inherits from the one that started it.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{Errno, FdFlags};

/// Takes an inherited descriptor, which then does not survive an exec. Called once for each, before
/// the process opens any descriptor of its own, which could get that number.
///
/// # Errors
/// EBADF: it is not open.
pub fn inherited(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: borrowed only to find out whether it is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and inherited, so it has no other owner in this process; the caller calls
    // this once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
