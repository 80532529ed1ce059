//! Stops a user-mode kernel and its guest's processes.
//!
//! The kernel runs guest user space in processes that it traces, one of which can be computing
//! while the kernel waits for it. So the kernel is stopped first, with SIGSTOP: then it starts
//! nothing. A traced process that still runs gets SIGALRM, with which the kernel itself interrupts
//! it at the end of a time slice: it enters a ptrace stop and stays there, because nothing
//! continues it. To the resumed kernel this looks like the end of a time slice. A process that is
//! not traced yet runs the kernel's startup code; it ends up waiting for the kernel and gets no
//! signal, because it cannot handle one.
//!
//! Neither a pidfd nor a signal reports that another process's child has stopped, so process states
//! are polled from /proc until all have stopped, or [`STOP_TIMEOUT`] has passed.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::process::Process;

/// Timeout for stopping all processes of a machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval of polling process states.
const INTERVAL: Duration = Duration::from_micros(200);

/// A stopped kernel.
#[derive(Debug, Clone, Copy)]
pub struct Stopped {
    /// When it was seen stopped: the guest's clock has not advanced beyond this.
    at: Instant,
}

impl Stopped {
    /// Time since it stopped.
    pub fn elapsed(self) -> Duration {
        self.at.elapsed()
    }
}

/// Stops a kernel and all its descendants.
///
/// # Errors
/// The reason, and since when the kernel may have been stopped: the caller must resume it.
pub fn stop(kernel: &Process) -> Result<Stopped, (Stopped, String)> {
    let deadline = Instant::now() + STOP_TIMEOUT;
    let failed = |why| (Stopped { at: Instant::now() }, why);
    pidfd_send_signal(&kernel.pidfd, Signal::STOP).map_err(|errno| failed(errno.to_string()))?;
    loop {
        match Task::of(kernel.pid) {
            Ok(tasks) if tasks.iter().all(Task::is_stopped) => break,
            Ok(_) => {}
            Err(error) => return Err(failed(error.to_string())),
        }
        if Instant::now() >= deadline {
            return Err(failed("its kernel does not stop".into()));
        }
        std::thread::sleep(INTERVAL);
    }
    let stopped = Stopped { at: Instant::now() };
    let mut before = BTreeSet::new();
    loop {
        let processes = descendants(kernel.pid).map_err(|error| (stopped, error.to_string()))?;
        let mut all = true;
        for pid in &processes {
            all &= interrupt(*pid).map_err(|errno| (stopped, errno.to_string()))?;
        }
        // The same set twice: no process that was started meanwhile is missed.
        if all && processes == before {
            return Ok(stopped);
        }
        if Instant::now() >= deadline {
            return Err((stopped, "a process of the guest does not stop".into()));
        }
        if !all {
            std::thread::sleep(INTERVAL);
        }
        before = processes;
    }
}

/// Resumes a kernel, which continues the processes of its guest itself.
///
/// # Errors
/// ESRCH if it has ended.
pub fn resume(kernel: &Process) -> Result<(), Errno> {
    pidfd_send_signal(&kernel.pidfd, Signal::CONT)
}

/// Interrupts a descendant of the kernel if it runs. `true` if it does not run.
fn interrupt(pid: i32) -> Result<bool, Errno> {
    // Opened before reading its state, so that the signal cannot go to another process.
    let Some(id) = Pid::from_raw(pid) else {
        return Ok(true);
    };
    let pidfd = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(Errno::SRCH) => return Ok(true),
        Err(errno) => return Err(errno),
    };
    let Ok(tasks) = Task::of(pid) else {
        // It has ended.
        return Ok(true);
    };
    if tasks.iter().all(Task::is_stopped) {
        return Ok(true);
    }
    if tasks.iter().all(|task| task.traced) {
        match pidfd_send_signal(pidfd.as_fd(), Signal::ALARM) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(errno),
        }
        return Ok(false);
    }
    Ok(tasks
        .iter()
        .all(|task| task.is_stopped() || task.is_asleep()))
}

/// A thread, as /proc shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Task {
    /// State letter of /proc.
    state: char,
    traced: bool,
    parent: i32,
}

impl Task {
    /// The threads of a process.
    fn of(pid: i32) -> io::Result<Vec<Self>> {
        let mut tasks = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            match fs::read_to_string(entry?.path().join("status")) {
                Ok(text) => tasks.extend(Self::parse(&text)),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(tasks)
    }

    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let mut lines = status.lines();
            Some(lines.find_map(|line| line.strip_prefix(name))?.trim())
        };
        Some(Self {
            state: field("State:")?.chars().next()?,
            traced: field("TracerPid:")? != "0",
            parent: field("PPid:")?.parse().ok()?,
        })
    }

    /// Stopped by a signal or its tracer, or ended.
    fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't' | 'Z' | 'X')
    }

    fn is_asleep(&self) -> bool {
        matches!(self.state, 'S' | 'D' | 'I')
    }
}

/// All descendants of a process.
fn descendants(root: i32) -> io::Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    let mut waiting = vec![root];
    while let Some(pid) = waiting.pop() {
        for child in children(pid)? {
            if found.insert(child) {
                waiting.push(child);
            }
        }
    }
    Ok(found)
}

fn children(pid: i32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    let tasks = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) if is_gone(&error) => return Ok(found),
        Err(error) => return Err(error),
    };
    for task in tasks {
        match fs::read_to_string(task?.path().join("children")) {
            Ok(text) => found.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            ),
            // No CONFIG_PROC_CHILDREN, or the thread has ended: the slow search covers both.
            Err(error) if is_gone(&error) => return children_by_parent(pid),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn children_by_parent(pid: i32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(other) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        match fs::read_to_string(format!("/proc/{other}/status")) {
            Ok(text) if Task::parse(&text).is_some_and(|task| task.parent == pid) => {
                found.push(other);
            }
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Whether an error means that the process or thread has ended.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn states_are_read() {
        let text = "Name:\tuml-userspace\nState:\tt (tracing stop)\nPPid:\t7\nTracerPid:\t7\n";
        let task = Task::parse(text).unwrap();
        assert!(task.is_stopped() && task.traced && task.parent == 7);
        let task = Task::parse("State:\tR (running)\nPPid:\t1\nTracerPid:\t0\n").unwrap();
        assert!(!task.is_stopped() && !task.is_asleep() && !task.traced);
        assert_eq!(Task::parse("Name:\tx\n"), None);
    }

    #[test]
    fn children_are_found_both_ways() {
        let mut child = Command::new("sleep")
            .arg("30")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(children(own).unwrap().contains(&pid));
        assert!(children_by_parent(own).unwrap().contains(&pid));
        assert!(descendants(own).unwrap().contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(children(pid).unwrap().is_empty());
    }
}
