//! Makes OCI containers, and more processes in them, for one kind of guest: the caller is its single-threaded
//! PID 1, root, with cgroup v2 alone at /sys/fs/cgroup.
//!
//! The agent's service calls this. Because no other thread exists, the agent clones itself once per container and
//! the clone, still running this code, makes itself the container's init: no re-execution, no helper process. The
//! agent prepares what it can before the clone ([`plan`]), because every page the clone touches for the first time
//! costs it a page fault.
//!
//! Between agent and clone there is the *gate*, a pair of SEQPACKET sockets:
//!
//! | direction | message | meaning |
//! | --- | --- | --- |
//! | → child | `m` | its ids are mapped (only with a new user namespace) |
//! | → agent | `R`, with the terminal's master as a descriptor if there is one | all is prepared |
//! | → child | any byte | execute |
//! | → agent | end of file | `execve` succeeded (or the process died) |
//! | → agent, at any time | kind and text | failed; the child exits |
//!
//! Nothing here touches the asynchronous runtime, and nothing here reads or writes the container's streams.
#![allow(unsafe_code)]

mod error;

pub use error::{CreateError, Result};

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{LinuxResources, Process, Spec};

/// The child's ends of its streams: pipes, sockets, or /dev/null.
pub struct Stdio {
    /// Becomes descriptor 0.
    pub stdin: OwnedFd,
    /// Becomes descriptor 1.
    pub stdout: OwnedFd,
    /// Becomes descriptor 2.
    pub stderr: OwnedFd,
}

/// Where a new process reads and writes.
pub enum ChildIo {
    /// Three descriptors. The spec's `process.terminal` must be false.
    Pipes(Stdio),
    /// A terminal in the container's own devpts; its master comes back in [`Child::terminal`].
    Terminal,
}

/// A process that waits at its gate.
pub struct Child {
    /// In the agent's PID namespace.
    pub pid: u32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
    /// Master of the terminal, with [`ChildIo::Terminal`]. Non-blocking.
    pub terminal: Option<OwnedFd>,
    /// Write one byte to let the process execute its command. Then read once: end of file means that it does so,
    /// a message is an error for [`CreateError::decode`]. Closing it unused ends the process.
    pub gate: OwnedFd,
}

/// A process that is still preparing itself. Dropping it ends the process.
///
/// For callers that must not block (hooks and slow file systems take their time): wait until it is readable, then
/// call [`PendingChild::finish`].
pub struct PendingChild {}

impl AsFd for PendingChild {
    fn as_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }
}

impl PendingChild {
    /// The process, ready to execute; blocks until it is. On failure the process is dead and reaped.
    pub fn finish(self) -> Result<Child> {
        todo!()
    }
}

/// A container whose init has been made.
pub struct Container {}

impl Container {
    /// Builds a container up to the point where its init waits at the gate. Blocks for that long. Nothing is left
    /// behind on failure.
    pub fn create(id: &str, spec: &Spec, io: ChildIo) -> Result<(Container, Child)> {
        todo!("{id} {spec:?} {}", matches!(io, ChildIo::Terminal))
    }

    /// As [`Container::create`], without waiting. If [`PendingChild::finish`] fails, the container must be given to
    /// [`Container::destroy`].
    pub fn begin_create(id: &str, spec: &Spec, io: ChildIo) -> Result<(Container, PendingChild)> {
        todo!("{id} {spec:?} {}", matches!(io, ChildIo::Terminal))
    }

    /// Makes another process in the running container, up to its gate.
    pub fn exec(&self, process: &Process, io: ChildIo) -> Result<Child> {
        self.begin_exec(process, io)?.finish()
    }

    /// As [`Container::exec`], without waiting.
    pub fn begin_exec(&self, process: &Process, io: ChildIo) -> Result<PendingChild> {
        todo!("{process:?} {}", matches!(io, ChildIo::Terminal))
    }

    /// Changes limits while the container runs. What `resources` does not name stays as it is.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        todo!("{resources:?}")
    }

    /// Freezes or thaws every process of the container; returns when the kernel says it is so.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        todo!("{frozen}")
    }

    /// Sends a signal to every process of the container.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        todo!("{signal}")
    }

    /// Directory of the container's control group.
    pub fn cgroup(&self) -> &Path {
        todo!()
    }

    /// Kills what still runs and removes the control group. The container's mounts end with its last process.
    pub fn destroy(self) -> Result<()> {
        todo!()
    }
}
