//! What the sandbox process is asked to run. Written by the command that makes the container (`request.json`),
//! read by the sandbox process; everything in it is already checked.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use hull_device_control::LinkLocal;
use hull_network::cni::PortMapping;
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
    /// How many network interfaces it can have, at most [`MAX_NETS`]; fewer where the kind of machine has no room.
    pub nets: u8,
}

/// Most network interfaces of a machine.
pub const MAX_NETS: u8 = 8;

/// Memory that the guest's kernel and the agent need beside a container that may use all of its limit, bytes.
const GUEST_OVERHEAD: u64 = 64 << 20;

impl MachineRequest {
    /// Memory of a machine for a container with this limit, bytes.
    pub fn memory_for(limit: u64) -> u64 {
        limit.saturating_add(GUEST_OVERHEAD)
    }
}

/// What holds for the network of a guest, whatever it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLimits {
    /// Frames that do not come from the guest's own addresses are dropped.
    pub filter: bool,
    /// With `filter`: the link-local addresses whose services the guest may reach.
    pub link_local: LinkLocal,
    /// Most bytes per second in each direction; 0 for no limit.
    pub rate: u64,
}

/// The network of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRequest {
    /// Its name; `none` for loopback only.
    pub name: String,
    /// How it is attached; nothing for loopback only.
    #[serde(default)]
    pub attach: Option<AttachRequest>,
    /// What holds for its frames.
    pub limits: NetworkLimits,
}

impl NetworkRequest {
    /// Ports of the host that lead to ports of the container.
    pub fn ports(&self) -> &[PortMapping] {
        match &self.attach {
            None => &[],
            Some(AttachRequest::Cni(cni)) => &cni.ports,
            Some(AttachRequest::Pasta(pasta)) => &pasta.ports,
            Some(AttachRequest::Container { .. }) => &[],
        }
    }
}

/// How a container is attached to a network.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachRequest {
    /// By plugins.
    Cni(CniRequest),
    /// By what needs no root.
    Pasta(PastaRequest),
    /// It is in the machine of another container.
    Container {
        /// That container's.
        id: String,
    },
}

/// How a container is attached to a network by CNI plugins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CniRequest {
    /// The plugins.
    pub list: hull_network::cni::List,
    /// For hull's own network, what plugins do not see to.
    #[serde(default)]
    pub own: Option<OwnNetwork>,
    /// Ports of the host that lead to ports of the container.
    pub ports: Vec<PortMapping>,
    /// Addresses asked for.
    pub ips: Vec<hull_network::cni::Address>,
    /// Hardware address asked for.
    pub mac: Option<[u8; 6]>,
}

/// What is said of hull's own network to the host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OwnNetwork {
    /// The bridge, whose packets may pass the host's packet filter.
    pub bridge: String,
    /// Its subnets, whose containers have the host's address for whom is outside.
    pub subnets: Vec<hull_network::cni::Address>,
}

/// How a container is attached to a network by pasta.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PastaRequest {
    /// Ports of the host that lead to ports of the container.
    pub ports: Vec<PortMapping>,
    /// Hardware address asked for.
    pub mac: Option<[u8; 6]>,
}

/// What becomes a container's `resolv.conf` and `hosts`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NameRequest {
    /// Name servers in place of the host's.
    pub servers: Vec<IpAddr>,
    /// Domains to search in place of the host's.
    pub search: Vec<String>,
    /// Options of the resolver in place of the host's.
    pub options: Vec<String>,
    /// Further names: their address, or nothing for the host's in the container's network.
    pub hosts: Vec<(String, Option<IpAddr>)>,
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
    /// The network that it is attached to.
    pub network: NetworkRequest,
    /// What it finds names by.
    pub names: NameRequest,
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
