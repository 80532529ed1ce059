//! Pods for engines: one machine with one or more containers, whose streams belong to keepers.
//!
//! [`client`] starts and finds the sandbox process of a pod and asks it; [`wire`] is what they say to each other. The
//! sandbox process's side is `process::pod`.
//!
//! Called by crate `oci`. A pod's sandbox process keeps nothing of its containers but what runs: what an engine may
//! ask for later is in the container's own directory, which the engine's side made. There the sandbox process writes
//! one file, [`STATUS_FILE`].

pub mod client;
pub mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::record::Exit;
use crate::request::MachineRequest;

/// The file in a container's directory that says how far it is: a [`ContainerStatus`], written by rename.
pub const STATUS_FILE: &str = "status.json";

/// What a pod's sandbox process is asked to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodRequest {
    /// The machine.
    pub machine: MachineRequest,
    /// Host name of the guest itself.
    pub hostname: String,
    /// Control group directories on the host that the pod's processes belong to.
    pub cgroups: Vec<PathBuf>,
    /// The disks of the machine. The block devices travel with the request, opened, in this order.
    pub disks: Vec<DiskRequest>,
}

/// A block device of the host that is a disk of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRequest {
    /// Its major number on the host.
    pub major: u32,
    /// Its minor number on the host.
    pub minor: u32,
    /// The guest may only read.
    pub read_only: bool,
}

/// Stages of an engine's container, as the OCI specification names them; and `paused`, as runc does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Being made.
    Creating,
    /// Its init waits to be started.
    Created,
    /// Its init runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It has ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// How far a container is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// The stage.
    pub status: Status,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
}

/// The files of a pod's sandbox process.
///
/// The directory's name is made from what is the same for all containers of the pod, so that who creates the second
/// one finds the first one's machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPaths {
    /// The directory of all pods.
    pub all: PathBuf,
    /// Name of this one.
    pub id: String,
}

impl PodPaths {
    /// Paths of the pod `id` below hull's directory of run-time state.
    pub fn new(run: &Path, id: &str) -> Self {
        Self {
            all: run.join("pods"),
            id: id.to_owned(),
        }
    }

    /// The pod's files, named as those of a container of hull's own.
    pub fn files(&self) -> crate::paths::ContainerPaths {
        let run = self.all.join(&self.id);
        crate::paths::ContainerPaths {
            data: run.clone(),
            run,
        }
    }

    /// Held (flock) while somebody finds out whether the pod lives, and starts it if not.
    pub fn launch_lock(&self) -> PathBuf {
        self.all.join(format!("{}.launch", self.id))
    }
}

/// Network parameters among a container's `sysctl`, which are the guest's own when its network is.
pub type NetworkParameters = BTreeMap<String, String>;
