//! Memory of a control group and of the guest. Called by this module.

use std::os::fd::BorrowedFd;

use hull_protocol::agent::MemoryStats;

use super::files::{Files, entries, number};
use super::parse_pressure;

/// Memory of the group in a directory; `None` without the controller.
pub fn read(files: &mut Files, group: BorrowedFd<'_>) -> Option<MemoryStats> {
    let mut memory = parse_stat(files.read(group, "memory.stat")?);
    let mut one = |name: &str| files.read(group, name).and_then(number);
    memory.usage = one("memory.current").unwrap_or(0);
    memory.limit = one("memory.max");
    memory.peak = one("memory.peak");
    memory.swap_usage = one("memory.swap.current");
    if memory.swap_usage.is_some() {
        memory.swap_limit = one("memory.swap.max");
        memory.swap_peak = one("memory.swap.peak");
    }
    if let Some(text) = files.read(group, "memory.events") {
        parse_events(text, &mut memory);
    }
    memory.pressure = files
        .read(group, "memory.pressure")
        .map(parse_pressure)
        .into();
    Some(memory)
}

/// memory.stat. What newer kernels split into anonymous memory and files is summed.
pub fn parse_stat(text: &str) -> MemoryStats {
    let mut memory = MemoryStats::new();
    for (key, value) in entries(text) {
        let field = match key {
            "anon" => &mut memory.anon,
            "file" => &mut memory.file,
            "kernel_stack" => &mut memory.kernel_stack,
            "slab" => &mut memory.slab,
            "sock" => &mut memory.sock,
            "shmem" => &mut memory.shmem,
            "file_mapped" => &mut memory.file_mapped,
            "file_dirty" => &mut memory.file_dirty,
            "file_writeback" => &mut memory.file_writeback,
            "anon_thp" => &mut memory.anon_thp,
            "inactive_anon" => &mut memory.inactive_anon,
            "active_anon" => &mut memory.active_anon,
            "inactive_file" => &mut memory.inactive_file,
            "active_file" => &mut memory.active_file,
            "unevictable" => &mut memory.unevictable,
            "slab_reclaimable" => &mut memory.slab_reclaimable,
            "slab_unreclaimable" => &mut memory.slab_unreclaimable,
            "pgfault" => &mut memory.pgfault,
            "pgmajfault" => &mut memory.pgmajfault,
            "workingset_refault" | "workingset_refault_anon" | "workingset_refault_file" => {
                &mut memory.workingset_refault
            }
            "workingset_activate" | "workingset_activate_anon" | "workingset_activate_file" => {
                &mut memory.workingset_activate
            }
            "workingset_nodereclaim" => &mut memory.workingset_nodereclaim,
            "pgrefill" => &mut memory.pgrefill,
            "pgscan" => &mut memory.pgscan,
            "pgsteal" => &mut memory.pgsteal,
            "pgactivate" => &mut memory.pgactivate,
            "pgdeactivate" => &mut memory.pgdeactivate,
            "pglazyfree" => &mut memory.pglazyfree,
            "pglazyfreed" => &mut memory.pglazyfreed,
            "thp_fault_alloc" => &mut memory.thp_fault_alloc,
            "thp_collapse_alloc" => &mut memory.thp_collapse_alloc,
            _ => continue,
        };
        *field = field.saturating_add(value);
    }
    memory
}

/// memory.events.
pub fn parse_events(text: &str, memory: &mut MemoryStats) {
    for (key, value) in entries(text) {
        match key {
            "low" => memory.low_events = value,
            "high" => memory.high_events = value,
            "max" => memory.max_events = value,
            "oom" => memory.oom_events = value,
            "oom_kill" => memory.oom_kills = value,
            _ => {}
        }
    }
}

/// Total and available bytes of the guest, from /proc/meminfo.
pub fn guest(meminfo: &str) -> (u64, u64) {
    let mut memory = (0, 0);
    for (key, kib) in entries(meminfo) {
        match key {
            "MemTotal:" => memory.0 = kib.saturating_mul(1024),
            "MemAvailable:" => {
                memory.1 = kib.saturating_mul(1024);
                break;
            }
            _ => {}
        }
    }
    memory
}
