//! What travels between a pod's sandbox process and those who ask it.
//!
//! A connection is a socket of [`hull_ipc`]. Every request is answered by one reply, in order; a connection
//! that has made a process (`Create`, `Exec`) is its keeper's from then on, and later gets [`Reply::Exited`]. When
//! it is closed before, the process is killed.

use std::io;
use std::os::fd::AsFd;

use hull_ipc::Limits;
pub use hull_ipc::{Received, pair, send};
use hull_protocol::{SHARED_MEMORY_SOURCE, SHARES_DIR};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{DiskRequest, NetworkParameters};
use crate::error::Failure;
use crate::record::Exit;
use crate::request::NetworkLimits;
use crate::wire::{Size, Stats};

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

/// Receives one message; `None` when the peer has closed. Both ends have the same privileges.
///
/// # Errors
/// As [`hull_ipc::receive`].
pub fn receive<M: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<Received<M>>> {
    hull_ipc::receive(socket, Limits::default())
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
    fn as_many_descriptors_as_shares_pass() {
        let (a, b) = pair().unwrap();
        let fds = vec![a.as_fd(); MAX_SHARES];
        send(&a, &create(hull_ipc::MAX_INLINE), &fds).unwrap();
        assert_eq!(
            receive::<Request>(&b).unwrap().unwrap().fds.len(),
            MAX_SHARES
        );
    }
}
