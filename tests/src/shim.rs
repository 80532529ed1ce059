//! Processes of containerd's shim, for tests that kill them.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// The shim that containerd has started for an id in one of its namespaces.
pub fn shim_of(namespace: &str, id: &str) -> Option<i32> {
    let wanted = format!("\0-namespace\0{namespace}\0-id\0{id}\0");
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(&wanted)
        })
}

/// The machine of kind `uml` of a shim.
pub fn machine_of(shim: i32) -> Option<i32> {
    fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))
        .ok()?
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .find(|pid: &i32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.starts_with("kernel-um"))
        })
}

/// Kills a process.
pub fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}
