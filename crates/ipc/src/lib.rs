//! Messages with descriptors between hull's host processes.
//!
//! Used by `sandbox` and `oci` for the control protocol, by `device-control` and `devices` for the
//! device process, and by `oci` to pass terminals; by `vmm` and `machine` for the monitor of kind
//! `kvm`. It is independent of these protocols.
//!
//! # Format
//!
//! A connection is a `SOCK_SEQPACKET` socket. Each message is one packet of JSON with descriptors
//! beside it ([`message`]). A message longer than [`MAX_INLINE`] travels as a sealed memory file,
//! which is then the first of the descriptors, and the packet holds [`LONG_MESSAGE`] only.
//! [`packet`] is the layer below: bytes and descriptors, on stream sockets as well.
//!
//! # Untrusted peers
//!
//! A receiver limits what it accepts ([`Limits`]): bytes of JSON and number of descriptors. A
//! message above these limits, or one that was truncated, is consumed and rejected, and all its
//! descriptors are closed. A memory file is accepted only if it is sealed, so its length is known
//! before it is read, and reading it neither blocks nor sees later changes.
//!
//! The agent has a few lines of its own for the one descriptor that a container's first process
//! passes to it (`agent/src/container/clone.rs`): guest code does not depend on host crates, and
//! there the sender is a process under construction that may only make plain system calls.

mod inherited;
pub mod message;
pub mod packet;
#[cfg(feature = "tokio")]
mod sys;
#[cfg(feature = "tokio")]
pub mod watched;

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

pub use inherited::inherited;
pub use message::{
    LONG_MESSAGE, Limits, MAX_INLINE, MAX_MESSAGE, Prepared, Received, receive, send,
};
pub use packet::MAX_FDS;
#[cfg(feature = "tokio")]
pub use sys::watch;
#[cfg(feature = "tokio")]
pub use watched::Socket;

/// Two connected sockets for messages.
///
/// # Errors
/// `EMFILE` or `ENFILE` if there are too many open files.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}
