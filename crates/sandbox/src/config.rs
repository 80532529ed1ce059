//! What a front end asks of a sandbox: its machine, its network, its containers and their
//! processes. Plain data, which also travels over the control protocol; descriptors travel beside.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use hull_device_control::LinkLocal;
use hull_network::cni::PortMapping;
use hull_protocol::{GIVEN_FILES_SOURCE, POD_MEMORY_SOURCE, SHARED_MEMORY_SOURCE, SHARES_DIR};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::cgroup::Bounds;

/// Most network interfaces of a machine.
pub const MAX_NETS: u8 = 8;

/// Memory that the guest's kernel and the agent need beside a container that may use all of its
/// limit, bytes.
const GUEST_OVERHEAD: u64 = 64 << 20;

/// Memory of the host that a sandbox may take beside its guest's, bytes: its processes have some 20
/// MiB, a device process for a guest with many open files more; the rest is page cache of files
/// that the guest reads.
const HOST_OVERHEAD: u64 = 64 << 20;

/// Threads of the device process and of the sandbox process, with programs that they run for a
/// moment: some 30 were seen.
const HOST_PROCESSES: u64 = 256;

/// Processors that devices may take beside the virtual processors: file server and network at once.
const DEVICE_CPUS: u32 = 2;

/// A machine to be started. Says nothing of containers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineConfig {
    /// Kind and guest kernel, already chosen.
    pub choice: hull_machine::Choice,
    /// Initramfs file.
    pub initramfs: PathBuf,
    /// Memory of the guest, bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// How many network interfaces it can have, at most [`MAX_NETS`]; fewer where the kind of
    /// machine has no room.
    pub nets: u8,
    /// How many disks can be added while it runs; fewer where the kind of machine has no room.
    #[serde(default)]
    pub spare_disks: u8,
    /// The executable `hull`, which is the device process; this process's own when absent.
    #[serde(default)]
    pub hull: Option<PathBuf>,
}

impl MachineConfig {
    /// How many block devices containers of a pod may have that come when its machine runs. Each
    /// costs a start some 20 µs.
    pub const POD_SPARE_DISKS: u8 = 8;

    /// Memory of a machine for a container with this limit, bytes.
    pub fn memory_for(limit: u64) -> u64 {
        limit.saturating_add(GUEST_OVERHEAD)
    }

    /// The most that the host processes of a container with a memory limit may use beside that,
    /// bytes.
    pub const OVERHEAD: u64 = GUEST_OVERHEAD + HOST_OVERHEAD;

    /// What to reserve on a host for a machine beside the limits of its containers, bytes: what the
    /// guest itself may take, what the machine needs, and its processes, which take `processes`.
    pub fn reserve(&self, processes: u64) -> u64 {
        let own = self.choice.backend().own_memory();
        GUEST_OVERHEAD.saturating_add(own).saturating_add(processes)
    }

    /// The most that this machine and its devices may take of the host.
    pub fn bounds(&self) -> Bounds {
        let backend = self.choice.backend();
        let processes = backend.max_processes(self.memory, self.cpus);
        let own = backend.own_memory().saturating_add(HOST_OVERHEAD);
        Bounds {
            memory: Some(self.memory.saturating_add(own)),
            swap: None,
            host_cpus: Vec::new(),
            processes: Some(processes.saturating_add(HOST_PROCESSES)),
            cpus: Some(self.cpus.saturating_add(DEVICE_CPUS)),
        }
    }
}

/// A sandbox to be booted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxConfig {
    /// Its machine.
    pub machine: MachineConfig,
    /// Host name of the guest itself; containers have their own.
    pub hostname: String,
    /// Its control groups on the host.
    #[serde(default)]
    pub cgroup: CgroupConfig,
    /// The most that its machine may take of the host; needs control groups.
    #[serde(default)]
    pub bounds: Bounds,
    /// Processors of one core run its machine and nothing else at the same time.
    #[serde(default)]
    pub core_scheduling: bool,
    /// The disks of the machine. Their opened block devices come beside, in this order.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// When the sandbox ends by itself.
    pub end: EndPolicy,
    /// Monotonic clock of the host when the caller began, nanoseconds: time zero of the timings.
    #[serde(default)]
    pub began_ns: u64,
}

impl SandboxConfig {
    /// A sandbox without control groups, disks and a name of its own.
    pub fn new(machine: MachineConfig, end: EndPolicy) -> Self {
        Self {
            machine,
            hostname: "hull".to_owned(),
            cgroup: CgroupConfig::None,
            bounds: Bounds::default(),
            core_scheduling: false,
            disks: Vec::new(),
            end,
            began_ns: 0,
        }
    }
}

/// The control groups of a sandbox on the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CgroupConfig {
    /// It stays in the caller's.
    #[default]
    None,
    /// All its processes join these directories, which somebody else has made.
    Join(Vec<PathBuf>),
    /// The same, but for the process that owns the sandbox: it outlives the groups.
    JoinMachine(Vec<PathBuf>),
    /// It makes and removes a group, named as itself, which machine and devices join. On a host
    /// that does not allow it there is none.
    Own {
        /// The group above it, an absolute path below the mount of each hierarchy. Not used in a
        /// user namespace: then it is beside the caller's group.
        parent: PathBuf,
    },
}

/// When a sandbox ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndPolicy {
    /// With its last container, or when it has had none and nobody holds it.
    LastContainer,
    /// Only when it is shut down, or its guest breaks.
    Explicit,
}

/// A block device of the host that is a disk of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its major number on the host.
    pub major: u32,
    /// Its minor number on the host.
    pub minor: u32,
    /// The guest may only read.
    pub read_only: bool,
}

/// A disk of the machine as a container has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerDisk {
    /// The block device on the host, whose numbers the spec names.
    #[serde(flatten)]
    pub device: DiskConfig,
    /// Its path in the container.
    pub path: String,
}

/// Limits on the frames of a guest's network, however that is attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLimits {
    /// Frames that do not come from the guest's own addresses are dropped.
    pub filter: bool,
    /// With `filter`: the link-local addresses whose services the guest may reach.
    pub link_local: LinkLocal,
    /// Most bytes per second in each direction; 0 for no limit.
    pub rate: u64,
}

/// The network of a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Where it comes from.
    pub source: NetworkSource,
    /// Limits on its frames.
    pub limits: NetworkLimits,
    /// The container with whose end the network is taken down; until the sandbox's end when absent.
    #[serde(default)]
    pub owner: Option<String>,
}

/// Where the network of a sandbox comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkSource {
    /// A network namespace that somebody else has set up. Its descriptor comes beside.
    Namespace,
    /// A new namespace, attached by CNI plugins. Beside: the container's directory, in which what
    /// is to be undone is written down, and the sockets that hold published ports.
    Cni(CniConfig),
    /// A new namespace, attached by pasta, which needs no root.
    Pasta(PastaConfig),
}

/// How a network namespace is attached by CNI plugins.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CniConfig {
    /// The container id that plugins are given.
    pub id: String,
    /// The networks, each with an interface of its own (`eth0` and so on), at most [`MAX_NETS`].
    pub networks: Vec<CniNetwork>,
    /// Ports of the host that lead to ports of the container. At the start the plugins of the first
    /// network see to them that can.
    pub ports: Vec<PortMapping>,
}

impl CniConfig {
    /// The network whose plugins see to published ports at the start, as an index.
    pub(crate) fn publishes(&self) -> Option<usize> {
        let can = |network: &CniNetwork| network.list.has_capability("portMappings");
        let is_of_host = |network: &CniNetwork| network.own.is_none();
        let mut networks = self.networks.iter();
        // One of the host's that cannot says so.
        networks.position(|network| can(network) || is_of_host(network))
    }
}

/// A network of a namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CniNetwork {
    /// The plugins.
    pub list: hull_network::cni::List,
    /// For hull's own network, what plugins do not see to.
    pub own: Option<OwnNetwork>,
    /// Addresses asked for.
    pub ips: Vec<hull_network::cni::Address>,
    /// Hardware address asked for.
    pub mac: Option<[u8; 6]>,
    /// Names in the network.
    pub names: Option<NamesConfig>,
}

impl CniNetwork {
    /// Whether it leads outside, and it is hull that sees to that.
    pub(crate) fn leads_outside(&self) -> bool {
        self.own.as_ref().is_some_and(|own| !own.internal)
    }
}

/// hull's own bridge network, as the host's packet filter has to know it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OwnNetwork {
    /// The bridge, whose packets may pass the host's packet filter.
    pub bridge: String,
    /// Its subnets, which are masqueraded.
    pub subnets: Vec<hull_network::cni::Address>,
    /// Nothing leaves it.
    #[serde(default)]
    pub internal: bool,
}

/// How containers of a network are found by their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesConfig {
    /// The directory of the network's names.
    pub directory: PathBuf,
    /// The network's name, which may follow a container's: `web.backend`.
    #[serde(default)]
    pub network: String,
    /// Those of the container.
    pub names: Vec<String>,
    /// Further names by which this container alone finds others: a name, and another's own.
    #[serde(default)]
    pub links: BTreeMap<String, String>,
    /// Name servers for everything else, asked from the host's network.
    pub upstream: Vec<IpAddr>,
}

/// How a network namespace is attached by pasta.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PastaConfig {
    /// Ports of the host that lead to ports of the container.
    pub ports: Vec<PortMapping>,
    /// Hardware address asked for.
    pub mac: Option<[u8; 6]>,
}

/// The addresses that a sandbox's network gave it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAddresses {
    /// The guest's addresses.
    pub addresses: Vec<IpAddr>,
    /// Its gateways, which are the host's addresses in networks of its own.
    pub gateways: Vec<IpAddr>,
}

/// A directory or file of the host that the guest sees. A detached mount comes beside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Its name in the guest: a directory of the shares, or the directory of the only file. It is
    /// unique in the sandbox and does not begin with a dot.
    pub name: String,
    /// It is not a directory.
    pub is_file: bool,
    /// Who else changes it.
    pub writers: Writers,
    /// It becomes read-only when the guest has made the mount points of its container in it, before
    /// that is started. Only for a share of a container that is created after it was added.
    #[serde(default)]
    pub sealed: bool,
}

/// Who changes the files of a share beside the guest: decides how long the guest may cache them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writers {
    /// Nobody.
    Guest,
    /// The host now and then (`docker cp`).
    HostRarely,
    /// The host and other guests.
    Anyone,
}

/// Name of the only entry in the share of something that is not a directory.
pub const FILE_NAME: &str = "file";

impl Share {
    /// Where it is in the guest.
    pub fn path(&self) -> String {
        match self.is_file {
            true => format!("{SHARES_DIR}/{}/{FILE_NAME}", self.name),
            false => format!("{SHARES_DIR}/{}", self.name),
        }
    }
}

/// Name of a share of a container: no other container of the sandbox has it.
pub fn share_name(container: &str, what: &str) -> String {
    format!("c-{container}-{what}")
}

/// The source of a bind mount that stands for memory which containers of a guest share: the agent
/// makes a tmpfs for each `identity`. The mount's options `size=`, `mode=`, `uid=` and `gid=` are
/// that file system's.
pub fn shared_memory(identity: u64) -> String {
    format!("{SHARED_MEMORY_SOURCE}{identity:016x}")
}

/// The same for memory of the pod, which lasts as long as its guest.
pub fn pod_memory(identity: u64) -> String {
    format!("{POD_MEMORY_SOURCE}{identity:016x}")
}

/// The source of a bind mount that stands for a file which was given to a container with its
/// creation ([`ContainerConfig::files`]).
pub fn given_file(container: &str, name: &str) -> String {
    format!("{GIVEN_FILES_SOURCE}{container}/{name}")
}

/// Whether a kernel parameter belongs to a network namespace, in either notation (`net.` or
/// `net/`). The guest's own network has those of its containers.
pub fn is_network_sysctl(name: &str) -> bool {
    name.starts_with("net.") || name.starts_with("net/")
}

/// Arguments and environment of a process, exact, where JSON cannot say them (not UTF-8); empty
/// where the OCI object has them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawArgs {
    /// `argv`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub args: Vec<Vec<u8>>,
    /// `envp`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<Vec<u8>>,
}

/// Who has the streams of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stdio {
    /// Nobody: input is empty, output is discarded.
    Null,
    /// The caller, as descriptors: a terminal, or standard input (if it has one), output and error.
    Handover {
        /// One stream instead of three.
        terminal: bool,
        /// With standard input.
        stdin: bool,
    },
    /// The sandbox: output goes to a log and to the clients that are attached. For an init only.
    Hub {
        /// One stream instead of three.
        terminal: bool,
        /// Standard input is open until its first client goes; with a terminal, for ever.
        stdin: bool,
        /// It is open for ever without a terminal, too.
        #[serde(default)]
        stdin_stays: bool,
        /// Most bytes of the log, which is in the container's directory; 0 for no log.
        log_limit: u64,
    },
}

impl Stdio {
    /// Whether the process has a terminal.
    pub fn terminal(self) -> bool {
        match self {
            Stdio::Null => false,
            Stdio::Handover { terminal, .. } | Stdio::Hub { terminal, .. } => terminal,
        }
    }
}

/// A container to be created. Its directory comes beside: there its status and log are written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerConfig {
    /// Its id: no other container of the sandbox has it.
    pub id: String,
    /// Its OCI spec, with paths of the guest.
    pub spec: Box<RawValue>,
    /// Exact arguments and environment of its init.
    #[serde(default)]
    pub raw: RawArgs,
    /// Who has the streams of its init.
    pub stdio: Stdio,
    /// Start it at once: one call into the guest instead of two.
    #[serde(default)]
    pub start: bool,
    /// Process that stands for its init on the host.
    #[serde(default)]
    pub keeper: Option<i32>,
    /// It was created before, which has been reported: no event says so again.
    #[serde(default)]
    pub again: bool,
    /// Fields, names and values, of its output's lines in the host's journal; nothing goes there
    /// if absent. With [`Stdio::Hub`] only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<Vec<(String, String)>>,
    /// Kernel parameters of the guest's own network.
    #[serde(default)]
    pub sysctl: BTreeMap<String, String>,
    /// Files that live in the guest: name and content. Mounts of the spec name them: see
    /// [`given_file`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<(String, String)>,
    /// Namespaces of other containers of this sandbox: kind and process id of the owner's keeper.
    #[serde(default)]
    pub joins: Vec<(String, i32)>,
    /// Disks of the machine among the spec's devices.
    #[serde(default)]
    pub disks: Vec<ContainerDisk>,
    /// Nothing that it writes has to survive its end.
    #[serde(default)]
    pub volatile: bool,
    /// Remove it when it has ended.
    #[serde(default)]
    pub removal: Option<Removal>,
}

impl ContainerConfig {
    /// A container that is started at once, with nobody at its streams and nothing beside its spec.
    pub fn new(id: impl Into<String>, spec: Box<RawValue>) -> Self {
        Self {
            id: id.into(),
            spec,
            raw: RawArgs::default(),
            stdio: Stdio::Null,
            start: true,
            keeper: None,
            again: false,
            journal: None,
            sysctl: BTreeMap::new(),
            files: Vec::new(),
            joins: Vec::new(),
            disks: Vec::new(),
            volatile: false,
            removal: None,
        }
    }
}

/// What is removed with a container that removes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Its directory.
    pub directory: PathBuf,
    /// Symbolic links that lead to its id; one that leads elsewhere is left.
    pub links: Vec<PathBuf>,
}

/// A further process in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessConfig {
    /// The container.
    pub container: String,
    /// OCI process object.
    pub process: Box<RawValue>,
    /// Exact arguments and environment.
    #[serde(default)]
    pub raw: RawArgs,
    /// Who has its streams: [`Stdio::Null`] or [`Stdio::Handover`].
    pub stdio: Stdio,
    /// Process that stands for it on the host. It is killed when that lets go of it; without one it
    /// goes on, and its output is discarded then.
    #[serde(default)]
    pub keeper: Option<i32>,
    /// First size of its terminal.
    #[serde(default)]
    pub size: Option<TerminalSize>,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

impl TerminalSize {
    /// As `process.consoleSize` of the OCI specification.
    pub fn to_oci(self) -> serde_json::Value {
        serde_json::json!({"height": self.rows, "width": self.columns})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_parameters_are_told_in_both_notations() {
        assert!(is_network_sysctl("net.ipv4.ip_forward"));
        assert!(is_network_sysctl("net/ipv4/conf/eth0.1/rp_filter"));
        assert!(!is_network_sysctl("kernel.shmmax"));
        assert!(!is_network_sysctl("network.x"));
    }
}
