//! A process of a container, as the host calls it: signals, terminal, exit status.
//!
//! What `Wait` guarantees: it returns when the process has ended and its output has been handed to
//! the host. Other processes may have inherited its output (`sh -c 'sleep 1000 &'`). When the
//! process is the first of its PID namespace, the kernel ends them with it, and the output ends on
//! its own. Else the output goes on for [`OUTPUT_GRACE`] from the moment at which everything that
//! the process itself wrote has been passed on; then the host sees its end, `Wait` returns, and
//! what the others write is discarded. A host that does not read holds `Wait` up: nothing that the
//! process itself wrote is ever dropped.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::sync::watch;

use super::reaper::Exit;
use crate::io::relay::{OUTPUT_GRACE, Progress};

/// A container's init or a process that was executed in it.
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// The master of the terminal it runs on.
    terminal: Option<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    outputs: Vec<watch::Receiver<Progress>>,
}

impl Process {
    /// Describes a child that is registered with the [`Reaper`](super::reaper::Reaper).
    pub fn new(
        pid: u32,
        pidfd: OwnedFd,
        terminal: Option<OwnedFd>,
        exit: watch::Receiver<Option<Exit>>,
        outputs: Vec<watch::Receiver<Progress>>,
    ) -> Self {
        Self {
            pid,
            pidfd,
            terminal,
            exit,
            outputs,
        }
    }

    /// In the guest's root PID namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, when it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// The master of its terminal, when it has one.
    pub fn terminal(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(value) => value.unwrap_or(Exit::UNKNOWN),
            // The reaper drops a sender only after it has sent.
            Err(_closed) => Exit::UNKNOWN,
        }
    }

    /// Waits until it has ended and its output has been passed on; see the top of this file.
    pub async fn finished(&self) -> Exit {
        let exit = self.ended().await;
        for output in &self.outputs {
            let _ = output
                .clone()
                .wait_for(|output| *output != Progress::Flowing)
                .await;
        }
        let rest = async {
            for output in &self.outputs {
                let _ = output
                    .clone()
                    .wait_for(|output| *output == Progress::Ended)
                    .await;
            }
        };
        if self
            .outputs
            .iter()
            .any(|output| *output.borrow() != Progress::Ended)
        {
            let _ = tokio::time::timeout(OUTPUT_GRACE, rest).await;
        }
        exit
    }

    /// Sends a signal, of any number. `NotFound` when it has ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        if self.exit().is_some() {
            return Err(io::ErrorKind::NotFound.into());
        }
        // SAFETY: only numbers and a null pointer are passed; the descriptor is open.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => {
                    Err(io::ErrorKind::NotFound.into())
                }
                error => Err(error),
            },
        }
    }
}
