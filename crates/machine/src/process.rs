//! The processes of a machine.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use hull_jail::{Started, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

/// Role of a process of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProcessRole {
    /// Runs the guest kernel.
    Machine,
    /// Serves the devices.
    Devices,
}

/// A process of a machine.
#[derive(Debug)]
pub struct Process {
    /// Its role.
    pub role: ProcessRole,
    /// Its pid, in the caller's pid namespace.
    pub pid: i32,
    /// Readable after it has ended.
    pub pidfd: OwnedFd,
}

/// A jailed machine process, which is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Jailed {
    process: [Process; 1],
    /// Its exit status, once known: a process can be reaped only once.
    ended: Option<Result<Status, Errno>>,
}

impl Jailed {
    pub(crate) fn new(started: Started) -> Self {
        Self {
            process: [Process {
                role: ProcessRole::Machine,
                pid: started.pid,
                pidfd: started.pidfd,
            }],
            ended: None,
        }
    }

    pub(crate) fn all(&self) -> &[Process] {
        &self.process
    }

    pub(crate) fn process(&self) -> &Process {
        let [process] = &self.process;
        process
    }

    /// Waits until it has ended, but not longer than `limit`.
    pub(crate) fn wait(&self, limit: Duration) {
        let limit = timespec(limit);
        let mut ready = [PollFd::new(&self.process().pidfd, PollFlags::IN)];
        // Whether it has ended is asked elsewhere.
        let _ = retry_on_intr(|| poll(&mut ready, Some(&limit)));
    }

    /// Its exit status; `None` while it is running. The error is that of waiting for it.
    pub(crate) fn ended(&mut self) -> Option<Result<Status, Errno>> {
        if self.ended.is_none() {
            self.ended = Status::reap(self.process().pidfd.as_fd()).transpose();
        }
        self.ended
    }
}

/// A timeout of whole seconds.
pub(crate) fn timespec(limit: Duration) -> Timespec {
    Timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: 0,
    }
}

impl Drop for Jailed {
    fn drop(&mut self) {
        if self.ended().is_some() {
            return;
        }
        let pidfd = self.process().pidfd.as_fd();
        // Fails if it has ended meanwhile.
        let _ = pidfd_send_signal(pidfd, Signal::KILL);
        // Returns quickly: SIGKILL also ends a stopped process.
        let _ = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED);
    }
}
