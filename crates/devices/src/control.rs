//! What the sandbox and its device process say to each other, and how it travels.
//!
//! They share one `SOCK_SEQPACKET` socket pair. Each message is one packet: JSON, at most [`MAX_MESSAGE`] bytes,
//! with at most one descriptor beside it. The sandbox sends a [`Request`], the device process answers each with
//! [`Event::Reply`] (in any order) and reports connections that the guest makes with [`Event::Incoming`].
//!
//! [`send`] and [`recv`] work on blocking and non-blocking sockets (`WouldBlock`), so the sandbox can drive its
//! end from an event loop. The sandbox must not trust what it receives further than its type says: the device
//! process parses what a guest wrote.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::net::NetOptions;

/// The longest message, in bytes of JSON.
pub const MAX_MESSAGE: usize = 8192;

/// A call of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the sandbox; the reply carries it.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What the sandbox can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Adds a directory to the root of the fs device. The descriptor beside the message is the directory
    /// (`O_PATH`); what is read-only about it is the host mount it is on.
    AddShare {
        /// Name of the directory in the device's root.
        name: String,
        /// How much the guest may cache.
        cache: Cache,
    },
    /// Takes a share away. Files in it that the guest still has open stop working (ESTALE).
    RemoveShare {
        /// Its name.
        name: String,
    },
    /// Attaches a tap to a net device; the descriptor beside the message. One that was attached before is let go.
    AttachNet {
        /// Number of the device.
        device: u8,
        /// What holds for its frames.
        options: NetOptions,
    },
    /// Changes what holds for the frames of a net device that has a tap.
    ChangeNet {
        /// Number of the device.
        device: u8,
        /// What holds from now on.
        options: NetOptions,
    },
    /// Takes a net device's tap away.
    DetachNet {
        /// Number of the device.
        device: u8,
    },
    /// Opens a vsock connection to the guest. The descriptor beside the message is one end of a connected
    /// stream socket, whose other end is the host's side of the connection from then on. Answered when the guest has
    /// accepted or refused, or did neither for too long.
    Connect {
        /// Port that the guest listens on.
        guest_port: u32,
        /// Port that the guest sees as its peer's.
        host_port: u32,
    },
    /// Answered when everything that the guest has sent over vsock is with the host's ends of its connections.
    Drain,
    /// Lets the guest connect to this port of the host. All others are refused.
    Listen {
        /// The port.
        port: u32,
    },
}

/// Who else changes the files of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// Nobody but this guest, as a rule: it may keep names and attributes for long.
    Private,
    /// Nobody but this guest, as a rule, but now and then the host does, for a person: the guest sees it a second
    /// later at most.
    Brief,
    /// The host or other guests may, at any time: the guest asks again each time it uses a file by name, and after a
    /// moment for directories.
    Shared,
}

/// What the device process tells the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The answer to a request.
    Reply {
        /// The request's.
        id: u64,
        /// Why it failed; `None` if it did not.
        error: Option<String>,
    },
    /// The guest connected to a port of the host. The descriptor beside the message is the connection's stream.
    Incoming {
        /// Port of the host.
        port: u32,
        /// Port of the guest that it connected from.
        guest_port: u32,
    },
}

/// Sends one message, with `fd` beside it.
///
/// On a non-blocking socket `WouldBlock` means that nothing was sent.
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    if text.len() > MAX_MESSAGE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "control message of {} bytes is longer than {MAX_MESSAGE}",
                text.len()
            ),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        // The buffer has room for exactly this one message.
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(
            socket.as_fd(),
            &[IoSlice::new(&text)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

/// Receives one message and the descriptor beside it.
///
/// `UnexpectedEof` when the other side closed, `InvalidData` when the message cannot be understood (it is
/// consumed then, and what came beside it is closed).
pub fn recv<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<(M, Option<OwnedFd>)> {
    let mut text = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(&mut text)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "control socket was closed by its peer",
        ));
    }
    let invalid =
        |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("control message {why}"));
    if received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(invalid(format!(
            "is longer than {MAX_MESSAGE} bytes or carries more than one descriptor"
        )));
    }
    let message = serde_json::from_slice(&text[..received.bytes])
        .map_err(|error| invalid(format!("cannot be parsed: {error}")))?;
    Ok((message, fds.pop()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair(flags: SocketFlags) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
    }

    #[test]
    fn a_message_and_its_descriptor_arrive() {
        let (a, b) = pair(SocketFlags::CLOEXEC);
        let (mut near, far) = UnixStream::pair().unwrap();
        let request = Request {
            id: 7,
            call: Call::AddShare {
                name: "rootfs".into(),
                cache: Cache::Private,
            },
        };
        send(&a, &request, Some(far.as_fd())).unwrap();
        drop(far);
        let (received, fd) = recv::<Request>(&b).unwrap();
        assert_eq!(received, request);
        let mut far = UnixStream::from(fd.unwrap());
        near.write_all(b"x").unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn closing_is_end_of_file() {
        let (a, b) = pair(SocketFlags::CLOEXEC);
        drop(a);
        assert_eq!(
            recv::<Request>(&b).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_non_blocking_socket_would_block() {
        let (_a, b) = pair(SocketFlags::NONBLOCK);
        assert_eq!(
            recv::<Event>(&b).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn what_cannot_be_understood_is_refused_and_skipped() {
        let (a, b) = pair(SocketFlags::CLOEXEC);
        for text in [
            &b"{"[..],
            b"{\"id\":1,\"call\":\"nothing\"}",
            &[b' '; MAX_MESSAGE + 1],
        ] {
            rustix::io::write(&a, text).unwrap();
        }
        let request = Request {
            id: 1,
            call: Call::Listen { port: 1024 },
        };
        send(&a, &request, None).unwrap();
        for _ in 0..3 {
            assert_eq!(
                recv::<Request>(&b).unwrap_err().kind(),
                io::ErrorKind::InvalidData
            );
        }
        assert_eq!(recv::<Request>(&b).unwrap().0, request);
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let (a, _b) = pair(SocketFlags::CLOEXEC);
        let request = Request {
            id: 1,
            call: Call::RemoveShare {
                name: "x".repeat(MAX_MESSAGE),
            },
        };
        assert_eq!(
            send(&a, &request, None).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
