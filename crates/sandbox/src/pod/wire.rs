//! What travels between a pod's sandbox process and those who ask it.
//!
//! A connection is a SEQPACKET socket. Each message is JSON with descriptors beside it; a long one is a file in memory
//! instead, which is then the first of the descriptors. Every request is answered by one reply, in order; a connection
//! that has made a process (`Create`, `Exec`) is its keeper's from then on, and later gets [`Reply::Exited`]. When
//! it is closed before, the process is killed.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_protocol::{SHARED_MEMORY_SOURCE, SHARES_DIR};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DiskRequest, NetworkParameters};
use crate::error::Failure;
use crate::record::Exit;
use crate::request::NetworkLimits;
use crate::wire::{Size, Stats};

/// Longest message that is sent as it is.
const MAX_INLINE: usize = 16 << 10;

/// Longest message at all: a spec of 10 MB must pass.
const MAX_MESSAGE: u64 = 64 << 20;

/// Most descriptors beside one message, the memory file included: the kernel's limit (SCM_MAX_FD, net/scm.h).
const MAX_FDS: usize = 253;

/// Most directories and files of one [`Request::AddShares`].
pub const MAX_SHARES: usize = 200;

/// What a sandbox process can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Directories and files of the host for a container that is to be created on the same connection. A descriptor
    /// of a detached mount beside it for each.
    AddShares {
        /// The container.
        container: String,
        /// What they are, in the order of the descriptors.
        shares: Vec<Share>,
    },
    /// Connects a network namespace of the host, whose descriptor is beside it, with the guest's own network. One that
    /// is connected already is fine; a second one is refused.
    Network(NetworkLimits),
    /// Makes a container up to the point where its init waits. Beside it: the container's directory.
    /// Answered by [`Reply::Streams`].
    Create(CreateRequest),
    /// Lets a container's init run.
    Start {
        /// The container.
        container: String,
    },
    /// Starts a further process. Answered by [`Reply::Streams`].
    Exec(ExecRequest),
    /// Sends a signal to a container's init, or to all its processes.
    Signal {
        /// The container.
        container: String,
        /// Number of the signal.
        signal: u32,
        /// To all.
        all: bool,
    },
    /// On a keeper's connection: a signal for its process.
    Forward(u32),
    /// On a keeper's connection: the size of its terminal.
    Resize(Size),
    /// Forgets a container; one that has not ended is killed. Answered when nothing of it is left; by
    /// [`Reply::Ending`] when the pod ends with it.
    Delete {
        /// The container.
        container: String,
    },
    /// Freezes or thaws a container.
    Freeze {
        /// The container.
        container: String,
        /// Freeze.
        frozen: bool,
    },
    /// Changes limits: the spec's `linux.resources`.
    Update {
        /// The container.
        container: String,
        /// The OCI object.
        resources: serde_json::Value,
    },
    /// Figures of a container's control group.
    Stats {
        /// The container.
        container: String,
    },
    /// The keepers of a container's processes.
    Keepers {
        /// The container.
        container: String,
    },
}

/// One share of [`Request::AddShares`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Share {
    /// Its name in the guest: a directory of the shares, or the only file in it.
    pub name: String,
    /// It is not a directory.
    pub is_file: bool,
    /// It is the root file system, whose files nobody but the guest changes as a rule.
    pub is_root: bool,
}

impl Share {
    /// Where it is in the guest.
    pub fn path(&self) -> String {
        if self.is_file {
            format!("{SHARES_DIR}/{}/{FILE_NAME}", self.name)
        } else {
            format!("{SHARES_DIR}/{}", self.name)
        }
    }
}

/// Name of the only entry in the share of something that is not a directory.
pub const FILE_NAME: &str = "file";

/// The source of a bind mount that stands for memory which containers of a guest share: the agent makes a tmpfs for
/// each `identity`. The mount's options `size=`, `mode=`, `uid=` and `gid=` are that file system's.
pub fn shared_memory(identity: u64) -> String {
    format!("{SHARED_MEMORY_SOURCE}{identity:016x}")
}

/// See [`Request::Create`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The container.
    pub container: String,
    /// Its OCI spec, for the guest.
    pub spec: serde_json::Value,
    /// Process id of its keeper.
    pub keeper: i32,
    /// With a terminal instead of three streams.
    pub terminal: bool,
    /// Network parameters of the guest's own.
    pub network: NetworkParameters,
    /// Namespaces of other containers of this pod: kind and process id of the keeper that stands for the owner.
    pub joins: Vec<(String, i32)>,
    /// Disks of the machine among the spec's devices.
    pub disks: Vec<Disk>,
}

/// A disk of the machine as a container has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The block device on the host, whose numbers the spec names.
    #[serde(flatten)]
    pub device: DiskRequest,
    /// Its path in the container.
    pub path: String,
}

/// See [`Request::Exec`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The container.
    pub container: String,
    /// OCI process object.
    pub process: serde_json::Value,
    /// Process id of its keeper.
    pub keeper: i32,
    /// With a terminal instead of three streams.
    pub terminal: bool,
}

/// What a sandbox process answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok,
    /// The process is there. Beside it its streams: terminal, or standard input, output and error.
    Streams,
    /// Figures.
    Stats(Box<Stats>),
    /// Process ids of keepers, the init's first.
    Keepers(Vec<i32>),
    /// The process has ended, and all that it wrote has been written to its streams.
    Exited(Exit),
    /// It cannot be done.
    Failed(Failure),
    /// The pod is about to end: ask again when it has, and start it anew.
    Ending,
}

/// A message and what came beside it.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

/// Two connected sockets for messages.
///
/// # Errors
/// The kernel's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Sends one message. `WouldBlock` on a non-blocking socket means that nothing was sent.
///
/// # Errors
/// The socket's, or no memory for a long message.
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let file;
    let mut all = Vec::with_capacity(fds.len() + 1);
    let inline: &[u8] = if text.len() <= MAX_INLINE {
        &text
    } else {
        file = memory_file(&text)?;
        all.push(file.as_fd());
        // Not JSON: the message is in the file.
        b"@"
    };
    all.extend_from_slice(fds);
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !all.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&all)) {
        return Err(invalid(format!("{} descriptors are too many", all.len())));
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(
            socket.as_fd(),
            &[IoSlice::new(inline)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

fn memory_file(text: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("hull-message", MemfdFlags::CLOEXEC)?);
    file.write_all(text)?;
    file.rewind()?;
    Ok(file)
}

/// Receives one message; `None` when the other side has closed.
///
/// # Errors
/// The socket's; `InvalidData` for what cannot be understood.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<Received<M>>> {
    let mut text = vec![0; MAX_INLINE];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut text)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let received = match received {
        Ok(received) => received,
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(invalid("a message was cut".into()));
    }
    text.truncate(received.bytes);
    if text == b"@" {
        if fds.is_empty() {
            return Err(invalid("a long message came without its file".into()));
        }
        let mut file = File::from(fds.remove(0));
        file.rewind()?;
        text.clear();
        if Read::by_ref(&mut file)
            .take(MAX_MESSAGE)
            .read_to_end(&mut text)? as u64
            == MAX_MESSAGE
        {
            return Err(invalid(format!(
                "a message is longer than {MAX_MESSAGE} bytes"
            )));
        }
    }
    let message = serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
    Ok(Some(Received { message, fds }))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn create(padding: usize) -> Request {
        Request::Update {
            container: "c".into(),
            resources: serde_json::json!({"padding": "x".repeat(padding)}),
        }
    }

    #[test]
    fn short_and_long_messages_arrive_with_their_descriptors() {
        let (a, b) = pair().unwrap();
        let (near, far) = pair().unwrap();
        for padding in [0, MAX_INLINE, 10 << 20] {
            send(&a, &create(padding), &[near.as_fd(), far.as_fd()]).unwrap();
            let received = receive::<Request>(&b).unwrap().unwrap();
            assert_eq!(received.fds.len(), 2);
            match received.message {
                Request::Update { resources, .. } => {
                    assert_eq!(resources["padding"].as_str().unwrap().len(), padding);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn as_many_descriptors_as_shares_pass() {
        let (a, b) = pair().unwrap();
        let fds = vec![a.as_fd(); MAX_SHARES];
        send(&a, &create(MAX_INLINE), &fds).unwrap();
        assert_eq!(
            receive::<Request>(&b).unwrap().unwrap().fds.len(),
            MAX_SHARES
        );
    }

    #[test]
    fn the_end_is_no_message_and_nonsense_is_an_error() {
        let (a, b) = pair().unwrap();
        rustix::io::write(&a, b"{").unwrap();
        rustix::io::write(&a, b"@").unwrap();
        for _ in 0..2 {
            let error = receive::<Request>(&b).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        drop(a);
        assert!(receive::<Request>(&b).unwrap().is_none());
    }
}
