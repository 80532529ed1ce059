//! Finds what a test's containers leave behind: processes, mounts.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions, getpid, set_child_subreaper, wait};

/// Makes this process the parent of orphans, so that [`descendants`] finds them.
pub fn adopt_orphans() {
    set_child_subreaper(Some(getpid())).unwrap();
}

/// Pid and command line of all descendants except zombies.
pub fn descendants() -> BTreeMap<i32, String> {
    let mut parents = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // The process has exited meanwhile.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The name, in parentheses, may contain anything.
        let Some((_, rest)) = stat.rsplit_once(") ") else {
            continue;
        };
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next(), fields.next());
        let Some(parent) = parent.and_then(|parent| parent.parse::<i32>().ok()) else {
            continue;
        };
        parents.insert(pid, (parent, state == Some("Z") || state == Some("X")));
    }
    let me = getpid().as_raw_nonzero().get();
    let below_me = |mut pid: i32| {
        while let Some((parent, _)) = parents.get(&pid) {
            if *parent == me {
                return true;
            }
            pid = *parent;
        }
        false
    };
    parents
        .iter()
        .filter(|(pid, (_, dead))| !dead && below_me(**pid))
        .map(|(pid, _)| {
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            (*pid, String::from_utf8_lossy(&command).replace('\0', " "))
        })
        .collect()
}

/// Waits until this process has no descendants; kills and returns those left after two seconds.
pub fn leaked_processes() -> Vec<String> {
    leaked_processes_except(Duration::from_secs(2), &[])
}

/// Waits until this process has no descendants except `except`; kills and returns those left after
/// `limit`.
pub fn leaked_processes_except(limit: Duration, except: &[i32]) -> Vec<String> {
    let begin = Instant::now();
    loop {
        if except.is_empty() {
            reap();
        }
        let mut left = descendants();
        left.retain(|pid, _| !except.contains(pid));
        if left.is_empty() {
            return Vec::new();
        }
        if begin.elapsed() > limit {
            for pid in left.keys().filter_map(|pid| Pid::from_raw(*pid)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            return left
                .into_iter()
                .map(|(pid, command)| format!("process {pid}: {command}"))
                .collect();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reaps adopted processes. Called when all commands of the test have exited.
fn reap() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

/// Mounts at or below a directory, in this mount namespace.
pub fn mounts_below(directory: &Path) -> Vec<String> {
    mounts_below_seen_by(std::process::id().cast_signed(), directory)
}

/// Mounts at or below a directory, in the mount namespace of another process.
pub fn mounts_below_seen_by(process: i32, directory: &Path) -> Vec<String> {
    let directory = directory.to_str().unwrap();
    let mounts = std::fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    mounts
        .lines()
        .filter(|line| {
            line.split(' ')
                .nth(4)
                .is_some_and(|at| Path::new(at).starts_with(directory))
        })
        .map(|line| format!("mount {line}"))
        .collect()
}
