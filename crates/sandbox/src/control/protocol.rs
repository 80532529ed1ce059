//! The control protocol of a sandbox.
//!
//! A connection is a SEQPACKET socket. Each message is JSON with descriptors beside it; a long one
//! is a file in memory instead, which is then the first of the descriptors. The first message of a
//! client is [`Request::Hello`]; it need not wait for the answer. Every request is answered by one
//! reply, in order, but for those that say otherwise.
//!
//! A connection that has created a process (`Create`, `Exec`, `Attach`) keeps it from then on:
//! `Forward` and `Resize` are for that process, and [`Reply::Exited`] comes when it has ended. What
//! happens to the process when the connection is closed before depends on its configuration.
//!
//! Compatibility (docs/compatibility.md): a client of an older version is answered, or refused by
//! name; fields that the other side does not know are ignored; a call that this hull does not know is
//! answered `Unsupported`.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::config::{
    ContainerConfig, NetworkAddresses, NetworkConfig, ProcessConfig, Share, TerminalSize,
};
use crate::error::Error;
use crate::events::Event;
use crate::metrics::{Metrics, ProcessInfo};
use crate::store::{Exit, Status};
use crate::timings::Step;

/// Version of the protocol.
pub const VERSION: u32 = 1;

/// Oldest version of a client that is answered.
pub const OLDEST: u32 = 1;

/// Longest message that is sent as it is.
const MAX_INLINE: usize = 16 << 10;

/// Longest message at all: a spec of 10 MB must pass.
const MAX_MESSAGE: u64 = 64 << 20;

/// Most descriptors beside one message, the memory file included: the kernel's limit (SCM_MAX_FD,
/// net/scm.h).
const MAX_FDS: usize = 253;

/// Most directories and files of one [`Request::AddShares`].
pub const MAX_SHARES: usize = 200;

/// Who speaks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the protocol.
    pub version: u32,
    /// The build, for messages.
    pub build: String,
}

impl Hello {
    /// This hull's.
    pub fn own() -> Self {
        Self {
            version: VERSION,
            build: format!("hull {}", env!("CARGO_PKG_VERSION")),
        }
    }
}

/// What a sandbox can be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// The first message. Answered by [`Reply::Hello`].
    Hello(Hello),
    /// Directories and files of the host for a container that is to be created on the same
    /// connection. Beside it: a detached mount for each.
    AddShares {
        /// What they are, in the order of the descriptors.
        shares: Vec<Share>,
    },
    /// Connects the sandbox with a network. Beside it: what its source asks for. Answered by
    /// [`Reply::Network`].
    Network(NetworkConfig),
    /// Creates a container. Beside it: the container's directory. Answered by [`Reply::Streams`].
    Create(Box<CreateRequest>),
    /// Lets a container's init run.
    Start {
        /// The container.
        container: String,
    },
    /// Executes a further process. Answered by [`Reply::Streams`].
    Exec(Box<ProcessConfig>),
    /// Attaches to the streams of an init. Answered by [`Reply::Streams`].
    Attach(AttachRequest),
    /// Sends a signal to a container's init, or to all its processes.
    Signal {
        /// The container.
        container: String,
        /// Number of the signal.
        signal: u32,
        /// To all.
        all: bool,
    },
    /// A signal for the process that this connection keeps. Not answered.
    Forward(u32),
    /// The size of the terminal of the process that this connection keeps. Not answered.
    Resize(TerminalSize),
    /// The stop signal, then SIGKILL after the timeout. Answered by [`Reply::Ended`].
    Stop {
        /// The container.
        container: String,
        /// Signal to send first.
        signal: u32,
        /// Time before SIGKILL, milliseconds.
        timeout_ms: u64,
    },
    /// Answered by [`Reply::Ended`] when the container has ended.
    Wait {
        /// The container.
        container: String,
    },
    /// Forgets a container; one that has not ended is killed. Answered when nothing of it is left;
    /// by [`Reply::Ending`] when the sandbox ends with it.
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
    /// Changes limits.
    Update {
        /// The container.
        container: String,
        /// OCI `linux.resources`.
        resources: Box<RawValue>,
    },
    /// Answered by [`Reply::Metrics`].
    Metrics {
        /// The container.
        container: String,
    },
    /// Answered by [`Reply::Processes`].
    Processes {
        /// The container.
        container: String,
    },
    /// Answered by [`Reply::Keepers`].
    Keepers {
        /// The container.
        container: String,
    },
    /// Copies out of a container, or into it: a tar archive on a stream. Answered by
    /// [`Reply::Streams`] and, when the copy has ended, by [`Reply::Ok`] or [`Reply::Failed`].
    Copy(CopyRequest),
    /// Answered by [`Reply::Containers`].
    Containers,
    /// Answered by [`Reply::Timings`].
    Timings,
    /// Answered by [`Reply::Ok`], and from then on by [`Reply::Event`] for each event.
    Events,
}

/// Names of all requests: what is not among them is a newer hull's.
const NAMES: [&str; 22] = [
    "hello",
    "add_shares",
    "network",
    "create",
    "start",
    "exec",
    "attach",
    "signal",
    "forward",
    "resize",
    "stop",
    "wait",
    "delete",
    "freeze",
    "update",
    "metrics",
    "processes",
    "keepers",
    "copy",
    "containers",
    "timings",
    "events",
];

/// See [`Request::Create`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CreateRequest {
    /// The container.
    pub container: ContainerConfig,
    /// Attach this connection to its hub before it starts.
    #[serde(default)]
    pub attach: Option<AttachOptions>,
}

/// How a client is attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachOptions {
    /// What it writes is the init's input.
    pub stdin: bool,
    /// Size of its terminal.
    pub size: Option<TerminalSize>,
}

/// See [`Request::Attach`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AttachRequest {
    /// The container.
    pub container: String,
    /// How.
    pub options: AttachOptions,
}

/// See [`Request::Copy`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyRequest {
    /// The container.
    pub container: String,
    /// Absolute path in the container: what is copied out, or the directory to unpack in.
    pub path: String,
    /// Follow a symbolic link at the end of the path.
    pub follow: bool,
    /// Into the container.
    pub into: bool,
}

/// What a sandbox answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Who answers.
    Hello(Hello),
    /// Done.
    Ok,
    /// Done. Beside it the streams: a terminal, or standard input (if there is one), output and
    /// error; of a copy, its archive.
    Streams,
    /// The sandbox has this network.
    Network(NetworkAddresses),
    /// What a container uses.
    Metrics(Box<Metrics>),
    /// Processes of a container.
    Processes(Vec<ProcessInfo>),
    /// Process ids of keepers, the init's first.
    Keepers(Vec<i32>),
    /// How a container has ended.
    Ended(Exit),
    /// The process that this connection keeps has ended, and all that it wrote has been written to
    /// its streams.
    Exited(Exit),
    /// Containers of the sandbox.
    Containers(Vec<Listed>),
    /// Where the time of the start went.
    Timings(Vec<Step>),
    /// Something has happened.
    Event(Event),
    /// It cannot be done.
    Failed(Error),
    /// The sandbox is about to end: ask again when it has, and start it anew.
    Ending,
}

/// A container in [`Reply::Containers`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// Its directory on the host.
    pub directory: PathBuf,
    /// How far it is.
    pub status: Status,
    /// Addresses of the sandbox.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// Reads a request; what a newer hull may ask is `Unsupported`.
///
/// # Errors
/// `Unsupported` for an unknown call, `InvalidArgument` for a known one that cannot be read.
pub fn parse(message: &RawValue) -> Result<Request, Error> {
    let text = message.get();
    let error = match serde_json::from_str(text) {
        Ok(request) => return Ok(request),
        Err(error) => error,
    };
    let name = serde_json::from_str::<String>(text).ok().or_else(|| {
        serde_json::from_str::<std::collections::BTreeMap<String, IgnoredAny>>(text)
            .ok()?
            .into_keys()
            .next()
    });
    Err(match name {
        Some(name) if !NAMES.contains(&&*name) => {
            Error::unsupported(format_args!(
                "call {name:?}: this sandbox was started by {}",
                Hello::own().build
            ))
            .hint("start the container anew to use what a newer hull can do")
        }
        _ => Error::invalid(format!("cannot read a request: {error}")),
    })
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
/// `InvalidData` for what cannot be understood, or an error of the socket.
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
    use crate::error::ErrorKind;

    fn long(padding: usize) -> serde_json::Value {
        serde_json::json!({"padding": "x".repeat(padding)})
    }

    #[test]
    fn short_and_long_messages_arrive_with_their_descriptors() {
        let (a, b) = pair().unwrap();
        let (near, far) = pair().unwrap();
        for padding in [0, MAX_INLINE, 10 << 20] {
            send(&a, &long(padding), &[near.as_fd(), far.as_fd()]).unwrap();
            let received = receive::<serde_json::Value>(&b).unwrap().unwrap();
            assert_eq!(received.fds.len(), 2);
            let text = received.message["padding"].as_str().unwrap();
            assert_eq!(text.len(), padding);
        }
    }

    #[test]
    fn as_many_descriptors_as_shares_pass() {
        let (a, b) = pair().unwrap();
        let fds = vec![a.as_fd(); MAX_SHARES];
        send(&a, &long(MAX_INLINE), &fds).unwrap();
        let received = receive::<serde_json::Value>(&b).unwrap().unwrap();
        assert_eq!(received.fds.len(), MAX_SHARES);
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

    fn read(text: &str) -> Result<Request, Error> {
        parse(&RawValue::from_string(text.to_owned()).unwrap())
    }

    #[test]
    fn a_call_of_a_newer_hull_is_unsupported_and_a_newer_field_is_ignored() {
        let error = read(r#"{"levitate":{"container":"c"}}"#).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(error.message.contains("levitate"), "{error}");
        assert_eq!(read(r#""levitate""#).unwrap_err().kind, ErrorKind::Unsupported);
        let error = read(r#"{"start":{}}"#).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        let request = read(r#"{"start":{"container":"c","gently":true}}"#).unwrap();
        assert!(matches!(request, Request::Start { container } if container == "c"));
        assert!(matches!(read(r#""events""#), Ok(Request::Events)));
    }

    #[test]
    fn all_requests_are_known_by_name() {
        for name in NAMES {
            // A known call without its arguments is a bad one, or one without arguments.
            let outcome = read(&format!("{{{name:?}:[]}}"));
            let unsupported = |error: &Error| error.kind == ErrorKind::Unsupported;
            assert!(!outcome.as_ref().err().is_some_and(unsupported), "{name}");
            let text = format!("{outcome:?}");
            assert!(!text.contains("unknown variant"), "{name}: {text}");
        }
    }
}
