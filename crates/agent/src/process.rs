//! Processes that the agent has started, and the end of all others.
//!
//! PID 1 inherits every orphan of the guest. [`Reaper`] takes the status of each process that ends; for one that it
//! has been told of, the status goes to whoever waits for it. Called by `service` and `copy`.
//!
//! What `Wait` promises: it returns when the process has ended and what it wrote has been handed to the host. Other
//! processes may have inherited its output (`sh -c 'sleep 1000 &'`). When the process is the first of its PID
//! namespace, the kernel ends them with it, and the output ends on its own. Else `Wait` gives them [`GRACE`] from
//! the moment at which everything that the process itself wrote has been passed on, and returns; the relays go on for
//! as long as the host keeps the streams open. A host that does not read holds `Wait` up: nothing is ever dropped.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::io::Interest;
use tokio::sync::watch;

use crate::event;
use crate::relay::Output;

/// How long `Wait` waits for the end of output that descendants of an ended process hold open. As Docker's.
const GRACE: Duration = Duration::from_secs(2);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0–255, or 128+n when signal n ended it.
    pub status: i32,
}

impl Exit {
    fn of(status: WaitStatus) -> Self {
        let status = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code & 0xff,
            (None, Some(signal)) => 128 + signal,
            // wait was asked for ended processes only.
            (None, None) => 255,
        };
        Self { status }
    }
}

/// Collects ended processes.
#[derive(Clone, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    expected: HashMap<u32, watch::Sender<Option<Exit>>>,
    /// Calls that are making a process right now. Until it is announced it may end, and be collected.
    births: usize,
    /// What was collected meanwhile.
    strays: HashMap<u32, Exit>,
}

/// While one exists, the end of a process that is not yet announced is not forgotten.
pub struct Births {
    table: Arc<Mutex<Table>>,
}

impl Drop for Births {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        table.births -= 1;
        if table.births == 0 {
            table.strays = HashMap::new();
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // Nothing panics while the lock is held; and a panic ends the machine anyway.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reaper {
    /// To be held from before a child is made until it is announced.
    pub fn births(&self) -> Births {
        lock(&self.table).births += 1;
        Births {
            table: self.table.clone(),
        }
    }

    /// Announces a child.
    pub fn expect(&self, pid: u32) -> watch::Receiver<Option<Exit>> {
        let mut table = lock(&self.table);
        let (sender, receiver) = watch::channel(None);
        match table.strays.remove(&pid) {
            Some(exit) => drop(sender.send_replace(Some(exit))),
            None => drop(table.expected.insert(pid, sender)),
        }
        receiver
    }

    /// Starts to collect. Returns only what is left to run for ever.
    pub fn start(&self) -> io::Result<impl Future<Output = ()> + use<>> {
        let signals = event::watch(child_signals()?, Interest::READABLE)?;
        let reaper = self.clone();
        Ok(async move {
            loop {
                match signals.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(error) => panic!("cannot wait for child processes: {error}"),
                }
                // The signal says "one or more have ended"; its content is of no interest, only that it is taken.
                let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
                while rustix::io::read(signals.get_ref(), &mut record).is_ok() {}
                reaper.collect();
            }
        })
    }

    fn collect(&self) {
        // Fails with ECHILD when there are no children, and says None when none has ended.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.ended(pid.as_raw_nonzero().get().unsigned_abs(), Exit::of(status));
        }
    }

    fn ended(&self, pid: u32, exit: Exit) {
        let mut table = lock(&self.table);
        match table.expected.remove(&pid) {
            Some(sender) => drop(sender.send_replace(Some(exit))),
            None if table.births > 0 => drop(table.strays.insert(pid, exit)),
            None => {}
        }
    }
}

/// A descriptor that is readable when a child has ended. The signal is blocked from here on; who makes a child that
/// executes something else unblocks it there.
fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set lives across the three calls, and the first one initializes it. signalfd returns a new
    // descriptor that nobody else owns.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// A container's init or a process that was executed in it.
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    /// The master of the terminal it runs on.
    terminal: Option<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    outputs: Vec<watch::Receiver<Output>>,
}

impl Process {
    /// Describes a child that is expected by the [`Reaper`].
    pub fn new(
        pid: u32,
        pidfd: OwnedFd,
        terminal: Option<OwnedFd>,
        exit: watch::Receiver<Option<Exit>>,
        outputs: Vec<watch::Receiver<Output>>,
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
            Ok(value) => value.unwrap_or(Exit { status: 255 }),
            // The reaper drops a sender only after it has sent.
            Err(_closed) => Exit { status: 255 },
        }
    }

    /// Waits until it has ended and its output has been passed on; see the top of this file.
    pub async fn finished(&self) -> Exit {
        let exit = self.ended().await;
        for output in &self.outputs {
            let _ = output
                .clone()
                .wait_for(|output| *output != Output::Flowing)
                .await;
        }
        let rest = async {
            for output in &self.outputs {
                let _ = output
                    .clone()
                    .wait_for(|output| *output == Output::Ended)
                    .await;
            }
        };
        if self
            .outputs
            .iter()
            .any(|output| *output.borrow() != Output::Ended)
        {
            let _ = tokio::time::timeout(GRACE, rest).await;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_end_of_an_announced_process_is_told() {
        let reaper = Reaper::default();
        let exit = reaper.expect(7);
        assert_eq!(*exit.borrow(), None);
        reaper.ended(7, Exit { status: 3 });
        assert_eq!(*exit.borrow(), Some(Exit { status: 3 }));
    }

    #[test]
    fn a_process_may_end_before_it_is_announced() {
        let reaper = Reaper::default();
        let births = reaper.births();
        reaper.ended(7, Exit { status: 137 });
        let exit = reaper.expect(7);
        assert_eq!(*exit.borrow(), Some(Exit { status: 137 }));
        reaper.ended(8, Exit { status: 1 });
        drop(births);
        // Orphans of other processes are forgotten.
        assert_eq!(*reaper.expect(8).borrow(), None);
    }
}
