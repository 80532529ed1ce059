//! What a container uses in its guest.

use hull_protocol::agent as proto;
use serde::{Deserialize, Serialize};

use crate::cost::HostMemory;
use crate::guest::agent::printable;

/// Metrics of one container: those of `io.containerd.cgroups.v2.Metrics`, by the names of
/// agent.proto, and what its sandbox costs the host. Sizes in bytes; what the guest kernel does not
/// have is absent, a limit also when there is none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// When these were read, nanoseconds since 1970 UTC by the guest's clock.
    pub time_ns: u64,
    /// Processors.
    pub cpu: Cpu,
    /// Memory.
    pub memory: Memory,
    /// Processes and threads.
    pub pids: Pids,
    /// Block devices.
    pub io: Io,
    /// Huge pages, by their size.
    pub hugetlb: Vec<Hugetlb>,
    /// Network interfaces but loopback.
    pub network: Vec<Network>,
    /// Memory of the guest as a whole.
    pub guest_memory_total: u64,
    /// Memory that the guest can still give out.
    pub guest_memory_available: u64,
    /// What the sandbox costs the host in memory.
    pub host_memory: HostMemory,
    /// Processor time of the sandbox's processes on the host, nanoseconds.
    pub host_cpu_ns: u64,
}

/// See `CpuStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Cpu {
    pub usage_ns: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    pub periods: Option<u64>,
    pub throttled_periods: Option<u64>,
    pub throttled_ns: Option<u64>,
    pub pressure: Option<Pressure>,
}

/// See `MemoryStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Memory {
    pub usage: u64,
    pub limit: Option<u64>,
    pub peak: Option<u64>,
    pub swap_usage: Option<u64>,
    pub swap_limit: Option<u64>,
    pub swap_peak: Option<u64>,
    pub low_events: u64,
    pub high_events: u64,
    pub max_events: u64,
    pub oom_events: u64,
    pub oom_kills: u64,
    /// Counters of memory.stat.
    pub stat: MemoryStat,
    pub pressure: Option<Pressure>,
}

/// See `MemoryStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct MemoryStat {
    pub anon: u64,
    pub file: u64,
    pub kernel_stack: u64,
    pub slab: u64,
    pub sock: u64,
    pub shmem: u64,
    pub file_mapped: u64,
    pub file_dirty: u64,
    pub file_writeback: u64,
    pub anon_thp: u64,
    pub inactive_anon: u64,
    pub active_anon: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub unevictable: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub pgfault: u64,
    pub pgmajfault: u64,
    pub workingset_refault: u64,
    pub workingset_activate: u64,
    pub workingset_nodereclaim: u64,
    pub pgrefill: u64,
    pub pgscan: u64,
    pub pgsteal: u64,
    pub pgactivate: u64,
    pub pgdeactivate: u64,
    pub pglazyfree: u64,
    pub pglazyfreed: u64,
    pub thp_fault_alloc: u64,
    pub thp_collapse_alloc: u64,
}

/// See `PidsStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Pids {
    pub current: u64,
    pub limit: Option<u64>,
}

/// See `IoStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Io {
    /// The guest's devices: their numbers mean nothing on the host.
    pub devices: Vec<IoDevice>,
    pub pressure: Option<Pressure>,
}

/// See `IoDeviceStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct IoDevice {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// See `HugetlbStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Hugetlb {
    pub page_size: String,
    pub usage: u64,
    pub limit: Option<u64>,
    pub max_events: u64,
}

/// See `NetworkStats` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Network {
    pub name: String,
    pub receive_bytes: u64,
    pub receive_packets: u64,
    pub receive_errors: u64,
    pub receive_dropped: u64,
    pub transmit_bytes: u64,
    pub transmit_packets: u64,
    pub transmit_errors: u64,
    pub transmit_dropped: u64,
}

/// Pressure stall information (PSI) of a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pressure {
    /// Some tasks are stalled.
    pub some: PressureLine,
    /// All are.
    pub full: PressureLine,
}

/// Part of the last 10, 60 and 300 seconds in hundredths of a percent, and the time in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct PressureLine {
    pub avg10: u32,
    pub avg60: u32,
    pub avg300: u32,
    pub total_ns: u64,
}

/// Most entries of a list that a guest reports: as many as the agent sends.
const MAX_ENTRIES: usize = 64;

impl Metrics {
    /// Bytes that interfaces have received and sent.
    pub fn network_bytes(&self) -> (u64, u64) {
        self.network.iter().fold((0, 0), |(received, sent), one| {
            (
                received.saturating_add(one.receive_bytes),
                sent.saturating_add(one.transmit_bytes),
            )
        })
    }

    /// Bytes that block devices have read and written.
    pub fn io_bytes(&self) -> (u64, u64) {
        self.io.devices.iter().fold((0, 0), |(read, written), one| {
            (
                read.saturating_add(one.read_bytes),
                written.saturating_add(one.write_bytes),
            )
        })
    }
}

impl From<proto::StatsResponse> for Metrics {
    fn from(stats: proto::StatsResponse) -> Self {
        let hugetlb = stats.hugetlb.into_iter().take(MAX_ENTRIES);
        let network = stats.network.into_iter().take(MAX_ENTRIES);
        Self {
            time_ns: stats.time_ns,
            cpu: stats.cpu.into_option().map(Cpu::from).unwrap_or_default(),
            memory: stats
                .memory
                .into_option()
                .map(Memory::from)
                .unwrap_or_default(),
            pids: stats
                .pids
                .into_option()
                .map_or_else(Pids::default, |pids| Pids {
                    current: pids.current,
                    limit: pids.limit,
                }),
            io: stats.io.into_option().map(Io::from).unwrap_or_default(),
            hugetlb: hugetlb.map(Hugetlb::from).collect(),
            network: network.map(Network::from).collect(),
            guest_memory_total: stats.guest_memory_total,
            guest_memory_available: stats.guest_memory_available,
            host_memory: HostMemory::default(),
            host_cpu_ns: 0,
        }
    }
}

impl From<proto::CpuStats> for Cpu {
    fn from(cpu: proto::CpuStats) -> Self {
        Self {
            usage_ns: cpu.usage_ns,
            user_ns: cpu.user_ns,
            system_ns: cpu.system_ns,
            periods: cpu.periods,
            throttled_periods: cpu.throttled_periods,
            throttled_ns: cpu.throttled_ns,
            pressure: cpu.pressure.into_option().map(Pressure::from),
        }
    }
}

impl From<proto::MemoryStats> for Memory {
    fn from(memory: proto::MemoryStats) -> Self {
        Self {
            usage: memory.usage,
            limit: memory.limit,
            peak: memory.peak,
            swap_usage: memory.swap_usage,
            swap_limit: memory.swap_limit,
            swap_peak: memory.swap_peak,
            low_events: memory.low_events,
            high_events: memory.high_events,
            max_events: memory.max_events,
            oom_events: memory.oom_events,
            oom_kills: memory.oom_kills,
            stat: MemoryStat {
                anon: memory.anon,
                file: memory.file,
                kernel_stack: memory.kernel_stack,
                slab: memory.slab,
                sock: memory.sock,
                shmem: memory.shmem,
                file_mapped: memory.file_mapped,
                file_dirty: memory.file_dirty,
                file_writeback: memory.file_writeback,
                anon_thp: memory.anon_thp,
                inactive_anon: memory.inactive_anon,
                active_anon: memory.active_anon,
                inactive_file: memory.inactive_file,
                active_file: memory.active_file,
                unevictable: memory.unevictable,
                slab_reclaimable: memory.slab_reclaimable,
                slab_unreclaimable: memory.slab_unreclaimable,
                pgfault: memory.pgfault,
                pgmajfault: memory.pgmajfault,
                workingset_refault: memory.workingset_refault,
                workingset_activate: memory.workingset_activate,
                workingset_nodereclaim: memory.workingset_nodereclaim,
                pgrefill: memory.pgrefill,
                pgscan: memory.pgscan,
                pgsteal: memory.pgsteal,
                pgactivate: memory.pgactivate,
                pgdeactivate: memory.pgdeactivate,
                pglazyfree: memory.pglazyfree,
                pglazyfreed: memory.pglazyfreed,
                thp_fault_alloc: memory.thp_fault_alloc,
                thp_collapse_alloc: memory.thp_collapse_alloc,
            },
            pressure: memory.pressure.into_option().map(Pressure::from),
        }
    }
}

impl From<proto::IoStats> for Io {
    fn from(io: proto::IoStats) -> Self {
        let devices = io.devices.into_iter().take(MAX_ENTRIES);
        Self {
            devices: devices
                .map(|device| IoDevice {
                    major: device.major,
                    minor: device.minor,
                    read_bytes: device.read_bytes,
                    write_bytes: device.write_bytes,
                    reads: device.reads,
                    writes: device.writes,
                })
                .collect(),
            pressure: io.pressure.into_option().map(Pressure::from),
        }
    }
}

impl From<proto::HugetlbStats> for Hugetlb {
    fn from(pages: proto::HugetlbStats) -> Self {
        Self {
            page_size: printable(&pages.page_size),
            usage: pages.usage,
            limit: pages.limit,
            max_events: pages.max_events,
        }
    }
}

impl From<proto::NetworkStats> for Network {
    fn from(interface: proto::NetworkStats) -> Self {
        Self {
            name: printable(&interface.name),
            receive_bytes: interface.receive_bytes,
            receive_packets: interface.receive_packets,
            receive_errors: interface.receive_errors,
            receive_dropped: interface.receive_dropped,
            transmit_bytes: interface.transmit_bytes,
            transmit_packets: interface.transmit_packets,
            transmit_errors: interface.transmit_errors,
            transmit_dropped: interface.transmit_dropped,
        }
    }
}

impl From<proto::Pressure> for Pressure {
    fn from(pressure: proto::Pressure) -> Self {
        let line = |line: protobuf::MessageField<proto::PressureLine>| {
            line.into_option()
                .map(|line| PressureLine {
                    avg10: line.avg10,
                    avg60: line.avg60,
                    avg300: line.avg300,
                    total_ns: line.total_ns,
                })
                .unwrap_or_default()
        };
        Self {
            some: line(pressure.some),
            full: line(pressure.full),
        }
    }
}

/// One process of a container: see `ProcessInfo` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct ProcessInfo {
    pub pid: u32,
    pub container_pid: u32,
    pub parent_pid: u32,
    pub uid: u32,
    pub gid: u32,
    pub state: String,
    pub cpu_time_us: u64,
    pub resident_bytes: u64,
    pub started_at: u64,
    pub virtual_bytes: u64,
    pub terminal: String,
    pub name: String,
    pub command: String,
}

impl From<proto::ProcessInfo> for ProcessInfo {
    fn from(process: proto::ProcessInfo) -> Self {
        Self {
            pid: process.pid,
            container_pid: process.container_pid,
            parent_pid: process.parent_pid,
            uid: process.uid,
            gid: process.gid,
            state: printable(&process.state),
            cpu_time_us: process.cpu_time_us,
            resident_bytes: process.resident_bytes,
            started_at: process.started_at,
            virtual_bytes: process.virtual_bytes,
            terminal: printable(&process.terminal),
            name: printable(&process.name),
            command: printable(&process.command),
        }
    }
}
