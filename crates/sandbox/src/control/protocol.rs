//! The control protocol of a sandbox.
//!
//! A connection is a socket of [`hull_ipc`]: messages of JSON with descriptors beside them. The
//! first message of a client is [`Request::Hello`]; it need not wait for the answer. Every request
//! is answered by one reply, in order, but for those that say otherwise.
//!
//! A connection that has created a process (`Create`, `Exec`, `Attach`) keeps it from then on:
//! `Forward` and `Resize` are for that process, and [`Reply::Exited`] comes when it has ended. What
//! happens to the process when the connection is closed before depends on its configuration.
//!
//! Compatibility (docs/compatibility.md): a client of an older version is answered, or refused by
//! name; fields that the other side does not know are ignored; a call that this hull does not know
//! is answered `Unsupported`.

use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use hull_ipc::Limits;
pub use hull_ipc::{Received, pair, send};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::config::{
    CniConfig, ContainerConfig, NetworkAddresses, NetworkConfig, ProcessConfig, Share, TerminalSize,
};
use crate::cost::HostMemory;
use crate::error::Error;
use crate::events::Event;
use crate::metrics::{Metrics, ProcessInfo};
use crate::reach::GuestDevice;
use crate::store::{Exit, Status};
use crate::timings::Step;

/// Version of the protocol.
pub const VERSION: u32 = 1;

/// Oldest version of a client that is answered.
pub const OLDEST: u32 = 1;

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
    Network(Box<NetworkConfig>),
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
    /// Makes the networks of a running container these. Answered by [`Reply::Network`].
    ChangeNetworks(Box<CniConfig>),
    /// Gives files that a container was created with ([`ContainerConfig::files`]) other contents.
    UpdateFiles {
        /// The container.
        container: String,
        /// Name and content.
        files: Vec<(String, String)>,
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
    /// Answered by [`Reply::Ok`] when the guest has come up.
    Ready,
    /// What the sandbox costs the host. Answered by [`Reply::Cost`].
    Cost,
    /// What the guest can reach. Answered by [`Reply::Reach`].
    Reach,
    /// Answered by [`Reply::Ok`], and from then on by [`Reply::Event`] for each event.
    Events,
}

/// Names of all requests: what is not among them is a newer hull's.
const NAMES: [&str; 27] = [
    "change_networks",
    "update_files",
    "reach",
    "cost",
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
    "ready",
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
    /// What the sandbox costs the host: memory, and processor time in nanoseconds.
    Cost(HostMemory, u64),
    /// The devices of the guest.
    Reach(Vec<GuestDevice>),
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
        Some(name) if !NAMES.contains(&&*name) => Error::unsupported(format_args!(
            "call {name:?}: this sandbox was started by {}",
            Hello::own().build
        ))
        .hint("start the container anew to use what a newer hull can do"),
        _ => Error::invalid(format!("cannot read a request: {error}")),
    })
}

/// Receives one message; `None` when the other side has closed and all that it sent was received.
///
/// # Errors
/// `InvalidData` for what cannot be understood, or an error of the socket.
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<Received<M>>> {
    hull_ipc::receive(socket, Limits::default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::ErrorKind;

    fn read(text: &str) -> Result<Request, Error> {
        parse(&RawValue::from_string(text.to_owned()).unwrap())
    }

    #[test]
    fn a_call_of_a_newer_hull_is_unsupported_and_a_newer_field_is_ignored() {
        let error = read(r#"{"levitate":{"container":"c"}}"#).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unsupported);
        assert!(error.message.contains("levitate"), "{error}");
        assert_eq!(
            read(r#""levitate""#).unwrap_err().kind,
            ErrorKind::Unsupported
        );
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
