//! Descriptors in the event loop that are neither sockets nor pipes of tokio's own kinds.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};

/// Registers a descriptor with the event loop.
///
/// # Errors
/// The kernel refuses.
pub fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives, which is what `register` asks for.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
        .map_err(|error| Error::new(format!("cannot watch a descriptor: {error}")))
}
