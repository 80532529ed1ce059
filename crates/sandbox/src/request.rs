//! What the sandbox process is asked to run. Written by the command that makes the container (`request.json`),
//! read by the sandbox process; everything in it is already checked.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A machine to be started. Says nothing of containers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineRequest {
    /// Kind and guest kernel, already chosen.
    pub choice: hull_machine::Choice,
    /// Initramfs file.
    pub initramfs: PathBuf,
    /// Memory of the guest, bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
}

/// Memory that the guest's kernel and the agent need beside a container that may use all of its limit, bytes.
const GUEST_OVERHEAD: u64 = 64 << 20;

impl MachineRequest {
    /// Memory of a machine for a container with this limit, bytes.
    pub fn memory_for(limit: u64) -> u64 {
        limit.saturating_add(GUEST_OVERHEAD)
    }
}

/// A container to be run, with the machine it is to be run in.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunRequest {
    /// 64 hexadecimal digits: [`crate::names::new_id`].
    pub id: String,
    /// Name, already claimed.
    pub name: String,
    /// Reference as given.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// Lower directories of the root file system, topmost first.
    pub layers: Vec<PathBuf>,
    /// OCI spec. `root.path` and the sources of [`Volume`] mounts are filled in by the sandbox process.
    pub spec: oci_spec::runtime::Spec,
    /// Exact arguments of init, when the spec's are not: see [`crate::spec::Built`].
    #[serde(default)]
    pub raw_args: Vec<Vec<u8>>,
    /// Exact environment of init, likewise.
    #[serde(default)]
    pub raw_env: Vec<Vec<u8>>,
    /// Host directories and files to share.
    pub volumes: Vec<Volume>,
    /// The machine that it runs in.
    pub machine: MachineRequest,
    /// Remove the container when it ends.
    pub auto_remove: bool,
    /// Standard input is open until its first client goes.
    pub stdin: bool,
    /// Signal for `stop`, by name.
    pub stop_signal: String,
    /// `none` or `default`.
    pub network: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Most bytes of output kept on disk.
    pub log_size: u64,
    /// Monotonic clock of the host when the command began, nanoseconds: time zero of the timings.
    pub began_ns: u64,
}

/// A host directory or file shared with the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Absolute path on the host; exists.
    pub source: PathBuf,
    /// Absolute path in the container.
    pub target: PathBuf,
    /// The host enforces it.
    pub read_only: bool,
}
