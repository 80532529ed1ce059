//! What a container uses in its guest, and what its sandbox costs the host.

use std::collections::HashMap;
use std::fs;

use hull_protocol::agent as proto;
use serde::{Deserialize, Serialize};

use crate::guest::agent::printable;
use crate::store::HostProcesses;

/// Metrics of one container: see `StatsResponse` in agent.proto for the meaning of each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[serde(default)]
pub struct Metrics {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_inactive_file: u64,
    pub memory_peak: u64,
    pub oom_kills: u64,
    pub pids_current: u64,
    pub pids_limit: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    pub network_receive_bytes: u64,
    pub network_transmit_bytes: u64,
    pub guest_memory_total: u64,
    pub guest_memory_available: u64,
    /// What the sandbox costs the host.
    pub host_memory: HostMemory,
}

impl From<proto::StatsResponse> for Metrics {
    fn from(stats: proto::StatsResponse) -> Self {
        Self {
            cpu_usage_us: stats.cpu_usage_us,
            cpu_user_us: stats.cpu_user_us,
            cpu_system_us: stats.cpu_system_us,
            cpu_throttled_us: stats.cpu_throttled_us,
            memory_usage: stats.memory_usage,
            memory_limit: stats.memory_limit,
            memory_inactive_file: stats.memory_inactive_file,
            memory_peak: stats.memory_peak,
            oom_kills: stats.oom_kills,
            pids_current: stats.pids_current,
            pids_limit: stats.pids_limit,
            io_read_bytes: stats.io_read_bytes,
            io_write_bytes: stats.io_write_bytes,
            network_receive_bytes: stats.network_receive_bytes,
            network_transmit_bytes: stats.network_transmit_bytes,
            guest_memory_total: stats.guest_memory_total,
            guest_memory_available: stats.guest_memory_available,
            host_memory: HostMemory::default(),
        }
    }
}

/// One process of a container: see `ProcessInfo` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    pub terminal: String,
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
            terminal: printable(&process.terminal),
            command: printable(&process.command),
        }
    }
}

/// Proportional set size (PSS) of the host processes of one sandbox, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// The sandbox process.
    pub sandbox: u64,
    /// The device process.
    pub devices: u64,
    /// The machine: guest memory in use and what the machine itself needs.
    pub machine: u64,
}

impl HostMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.sandbox + self.devices + self.machine
    }

    /// Reads the proportional set size of every process of a sandbox. Processes that end meanwhile
    /// count nothing.
    pub fn measure(processes: &HostProcesses) -> Self {
        let children = children_by_parent();
        Self {
            sandbox: resident(processes.sandbox),
            devices: tree(processes.devices, &children),
            machine: tree(processes.machine, &children),
        }
    }
}

/// A process and all its descendants.
fn tree(root: i32, children: &HashMap<i32, Vec<i32>>) -> u64 {
    let mut total = 0;
    let mut waiting = vec![root];
    while let Some(pid) = waiting.pop() {
        if pid <= 0 {
            continue;
        }
        total += resident(pid);
        waiting.extend(children.get(&pid).into_iter().flatten());
    }
    total
}

fn children_by_parent() -> HashMap<i32, Vec<i32>> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return children;
    };
    for pid in entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
    {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        // The name in parentheses may hold anything: the fields begin after the last parenthesis.
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, fields)| fields.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            children.entry(parent).or_default().push(pid);
        }
    }
    children
}

/// Proportional set size of one process, bytes; 0 when it is gone.
fn resident(pid: i32) -> u64 {
    if pid <= 0 {
        return 0;
    }
    let Ok(text) = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else {
        return 0;
    };
    text.lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .unwrap_or(0)
        * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_costs_something_and_a_missing_one_nothing() {
        let own = i32::try_from(std::process::id()).unwrap_or_default();
        let memory = HostMemory::measure(&HostProcesses {
            sandbox: own,
            devices: 0,
            machine: i32::MAX,
        });
        assert!(memory.sandbox > 100_000, "{memory:?}");
        assert_eq!((memory.devices, memory.machine), (0, 0));
    }
}
