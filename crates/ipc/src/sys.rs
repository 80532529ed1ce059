//! Descriptors in tokio's event loop that are neither sockets nor pipes of its own types.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the event loop.
///
/// # Errors
/// `EPERM` for a file that cannot be polled (a regular file), `ENOSPC` at the limit of watches.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives, which is what
    // `register_with_interest` asks for.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}
