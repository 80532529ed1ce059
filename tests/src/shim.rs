//! Processes of containerd's shim, for tests that kill them.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

/// The shim that containerd has started for an id in one of its namespaces.
pub fn shim_of(namespace: &str, id: &str) -> Option<i32> {
    called_with(&format!("\0-namespace\0{namespace}\0-id\0{id}\0")).pop()
}

/// All shims of a containerd, by its socket.
pub fn shims_at(address: &Path) -> Vec<i32> {
    called_with(&format!("\0-address\0{}\0", address.display()))
}

fn called_with(words: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&command).contains(words)
        })
        .collect()
}

/// The machine of kind `uml` of a shim.
pub fn machine_of(shim: i32) -> Option<i32> {
    child_of(shim, "comm", "kernel-um")
}

/// The device process of a shim.
pub fn devices_of(shim: i32) -> Option<i32> {
    child_of(shim, "cmdline", "hull\0device-process")
}

/// The child of a shim in whose file of /proc this is first.
fn child_of(shim: i32, file: &str, first: &str) -> Option<i32> {
    fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))
        .ok()?
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .find(|pid: &i32| {
            let found = fs::read_to_string(format!("/proc/{pid}/{file}"));
            found.is_ok_and(|found| found.starts_with(first))
        })
}

/// Kills a process.
pub fn kill(pid: i32) {
    assert!(kill_if_there(pid), "process {pid} has ended by itself");
}

/// Kills a process that may have ended by itself.
pub fn kill_if_there(pid: i32) -> bool {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).is_ok()
}
