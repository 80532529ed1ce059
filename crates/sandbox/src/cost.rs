//! What a sandbox costs the host: memory and processor time of its processes.

use std::collections::HashMap;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::store::{HostProcesses, ProcessStat};

/// Nanoseconds of one clock tick of /proc: `sysconf(_SC_CLK_TCK)` is 100 on all Linux machines that
/// hull runs on.
const TICK_NS: u64 = 10_000_000;

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
}

/// Reads memory and processor time of every process of a sandbox. Processes that end meanwhile
/// count nothing.
pub(crate) fn measure(processes: &HostProcesses) -> (HostMemory, u64) {
    let table = ProcessTable::read();
    let memory = |root| table.tree(root).map(resident).sum();
    let memory = HostMemory {
        sandbox: resident(processes.sandbox),
        devices: memory(processes.devices),
        machine: memory(processes.machine),
    };
    // The sandbox process is the parent of the other two, but may be whichever process uses hull
    // as a library: of that only what it spends on all its sandboxes is known.
    let roots = [processes.sandbox, processes.devices, processes.machine];
    let cpu = |pid: i32| table.0.get(&pid).map_or(0, |process| process.cpu_ns);
    let cpu_ns = roots[..1]
        .iter()
        .copied()
        .chain(table.tree(processes.devices))
        .chain(table.tree(processes.machine))
        .map(cpu)
        .sum();
    (memory, cpu_ns)
}

/// The processes of the host.
struct ProcessTable(HashMap<i32, Entry>);

struct Entry {
    parent: i32,
    cpu_ns: u64,
}

impl ProcessTable {
    fn read() -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Self(pids.filter_map(|pid| Some((pid, entry(pid)?))).collect())
    }

    /// A process and all its descendants.
    fn tree(&self, root: i32) -> impl Iterator<Item = i32> {
        let mut all = Vec::from_iter(self.0.contains_key(&root).then_some(root));
        let mut next = 0;
        while let Some(parent) = all.get(next).copied() {
            next += 1;
            let children = self.0.iter().filter(|(_, entry)| entry.parent == parent);
            // The table is not of one moment: a process id may have been used again.
            let new: Vec<i32> = children
                .map(|(pid, _)| *pid)
                .filter(|pid| !all.contains(pid))
                .collect();
            all.extend(new);
        }
        all.into_iter()
    }
}

/// Parent and processor time of a process.
fn entry(pid: i32) -> Option<Entry> {
    let stat = ProcessStat::read(pid)?;
    // Its own, and that of its children which have ended and were waited for: user-mode Linux has
    // a process for each address space of the guest.
    let ticks = (14..=17)
        .map(|field| stat.number::<u64>(field))
        .sum::<Option<u64>>()?;
    Some(Entry {
        parent: stat.number(4)?,
        cpu_ns: ticks.saturating_mul(TICK_NS),
    })
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
        let (memory, _) = measure(&HostProcesses {
            sandbox: own,
            devices: 0,
            machine: i32::MAX,
        });
        assert!(memory.sandbox > 100_000, "{memory:?}");
        assert_eq!((memory.devices, memory.machine), (0, 0));
    }
}
