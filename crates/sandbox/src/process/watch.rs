//! Descriptors in the event loop that are neither sockets nor pipes of tokio's own types.

use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Context, Result};

/// Registers a descriptor with the event loop.
///
/// # Errors
/// As [`hull_ipc::watch`].
pub fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    hull_ipc::watch(fd, interest).context(|| "watch a descriptor".into())
}
