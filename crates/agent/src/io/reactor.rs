//! Registers descriptors with the event loop. Called by everything that waits for one.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor for the lifetime of the result. Do not replace it there (`get_mut`).
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open, and owned by the result, out of which the agent never takes
    // it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// As [`watch`], for a descriptor that stays with its owner.
pub fn watch_borrowed(
    fd: BorrowedFd<'_>,
    interest: Interest,
) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    // SAFETY: the descriptor is open for as long as it is borrowed, and so longer than the result
    // lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
