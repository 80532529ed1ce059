//! What a container costs the host in memory: proportional set sizes of its processes.

use std::collections::HashMap;
use std::fs;

use crate::record::Processes;
use crate::wire::HostMemory;

/// Reads the proportional set size of every process of a container. Processes that end meanwhile count nothing.
pub fn measure(processes: &Processes) -> HostMemory {
    let children = children_by_parent();
    HostMemory {
        sandbox: resident(processes.sandbox),
        devices: tree(processes.devices, &children),
        machine: tree(processes.machine, &children),
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
        let memory = measure(&Processes {
            sandbox: own,
            devices: 0,
            machine: i32::MAX,
        });
        assert!(memory.sandbox > 100_000, "{memory:?}");
        assert_eq!((memory.devices, memory.machine), (0, 0));
    }
}
