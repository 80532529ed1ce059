//! Collects every process of the guest that ends: PID 1 inherits all orphans.
//!
//! The exit of a registered process goes to those that wait for it, and, if it belongs to a
//! container, into the events of the guest. Called by `rpc::service` and `copy`.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_protocol::agent::ProcessExit;
use hull_protocol::agent::event::What;
use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::io::Interest;
use tokio::sync::watch;

use super::oom::OomWatch;
use crate::io::reactor;
use crate::time;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0–255, or 128+n when signal n ended it.
    pub status: i32,
    /// The kernel had killed a process of its container for lack of memory.
    pub oom_killed: bool,
    /// Wall clock, nanoseconds.
    pub at_ns: u64,
}

impl Exit {
    /// Exit of a process whose status is not available.
    pub const UNKNOWN: Self = Self {
        status: 255,
        oom_killed: false,
        at_ns: 0,
    };

    fn now(status: i32) -> Self {
        Self {
            status,
            oom_killed: false,
            at_ns: time::now_ns(),
        }
    }
}

fn exit_status(status: WaitStatus) -> i32 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code & 0xff,
        (None, Some(signal)) => 128 + signal,
        // wait returns ended processes only.
        (None, None) => Exit::UNKNOWN.status,
    }
}

/// The process of a container as events name it.
pub struct Identity {
    /// OOM watch of its container.
    pub oom: Arc<OomWatch>,
    /// Empty for the container's init.
    pub exec_id: String,
}

impl Identity {
    /// Reports the exit; OOM kills first.
    fn report(&self, pid: u32, exit: &mut Exit) {
        exit.oom_killed = self.oom.check() > 0;
        let what = ProcessExit {
            container_id: self.oom.container_id().to_owned(),
            exec_id: self.exec_id.clone(),
            exit_status: exit.status,
            oom_killed: exit.oom_killed,
            pid,
            ..Default::default()
        };
        self.oom.events().add(exit.at_ns, What::Exit(what));
    }
}

/// Collects ended processes.
#[derive(Clone, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    registered: HashMap<u32, Registered>,
    /// Calls that are creating a process right now, which may end and be collected before it is
    /// registered.
    spawning: usize,
    /// Exits collected meanwhile.
    unclaimed: HashMap<u32, Exit>,
}

struct Registered {
    exit: watch::Sender<Option<Exit>>,
    identity: Option<Identity>,
}

/// While one exists, the exit of a process that is not registered yet is kept.
pub struct SpawnGuard {
    table: Arc<Mutex<Table>>,
}

impl Drop for SpawnGuard {
    fn drop(&mut self) {
        let mut table = lock(&self.table);
        table.spawning -= 1;
        if table.spawning == 0 {
            table.unclaimed = HashMap::new();
        }
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    // Nothing panics while the lock is held; and a panic ends the machine anyway.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reaper {
    /// Hold it from before a child is created until it is registered.
    pub fn spawn_guard(&self) -> SpawnGuard {
        lock(&self.table).spawning += 1;
        SpawnGuard {
            table: self.table.clone(),
        }
    }

    /// Registers a child; one with an identity is reported as an event when it ends.
    pub fn register(&self, pid: u32, identity: Option<Identity>) -> watch::Receiver<Option<Exit>> {
        let (exit, receiver) = watch::channel(None);
        let mut table = lock(&self.table);
        let registered = Registered { exit, identity };
        match table.unclaimed.remove(&pid) {
            Some(exit) => registered.ended(pid, exit),
            None => drop(table.registered.insert(pid, registered)),
        }
        receiver
    }

    /// Starts collecting; the result must be run for ever.
    pub fn start(&self) -> io::Result<impl Future<Output = ()> + use<>> {
        let signals = reactor::watch(child_signals()?, Interest::READABLE)?;
        let reaper = self.clone();
        Ok(async move {
            loop {
                match signals.readable().await {
                    Ok(mut guard) => guard.clear_ready(),
                    Err(error) => panic!("cannot wait for child processes: {error}"),
                }
                // The signal means "one or more have ended". It is taken; its content is not
                // needed.
                let mut record = [0u8; size_of::<libc::signalfd_siginfo>()];
                while rustix::io::read(signals.get_ref(), &mut record).is_ok() {}
                reaper.collect();
            }
        })
    }

    fn collect(&self) {
        // ECHILD if there are no children, None if none has ended.
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            self.ended(pid, Exit::now(exit_status(status)));
        }
    }

    fn ended(&self, pid: u32, exit: Exit) {
        let mut table = lock(&self.table);
        match table.registered.remove(&pid) {
            Some(registered) => registered.ended(pid, exit),
            None if table.spawning > 0 => drop(table.unclaimed.insert(pid, exit)),
            None => {}
        }
    }
}

impl Registered {
    fn ended(self, pid: u32, mut exit: Exit) {
        if let Some(identity) = &self.identity {
            identity.report(pid, &mut exit);
        }
        self.exit.send_replace(Some(exit));
    }
}

/// A descriptor that is readable when a child has ended. The signal is blocked from here on; code
/// that creates a child for another executable unblocks it there.
fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set lives across the three calls, and the first one initializes it. signalfd
    // returns a new descriptor without another owner.
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::events::Events;

    fn identity(events: &Arc<Events>, exec_id: &str) -> Option<Identity> {
        let nowhere = std::path::Path::new("/nowhere");
        Some(Identity {
            oom: Arc::new(OomWatch::new("c1", nowhere, events.clone())),
            exec_id: exec_id.to_owned(),
        })
    }

    fn status(exit: &watch::Receiver<Option<Exit>>) -> Option<i32> {
        exit.borrow().map(|exit| exit.status)
    }

    #[test]
    fn the_exit_of_a_registered_process_is_passed_on() {
        let reaper = Reaper::default();
        let exit = reaper.register(7, None);
        assert_eq!(status(&exit), None);
        reaper.ended(7, Exit::now(3));
        assert_eq!(status(&exit), Some(3));
    }

    #[test]
    fn a_process_may_end_before_it_is_registered() {
        let reaper = Reaper::default();
        let guard = reaper.spawn_guard();
        reaper.ended(7, Exit::now(137));
        assert_eq!(status(&reaper.register(7, None)), Some(137));
        reaper.ended(8, Exit::now(1));
        drop(guard);
        // Orphans of other processes are not kept.
        assert_eq!(status(&reaper.register(8, None)), None);
    }

    #[tokio::test]
    async fn exits_of_container_processes_are_events() {
        let reaper = Reaper::default();
        let events = Arc::new(Events::default());
        let guard = reaper.spawn_guard();
        reaper.ended(8, Exit::now(9));
        drop(reaper.register(7, identity(&events, "")));
        drop(reaper.register(8, identity(&events, "e1")));
        drop(reaper.register(9, None));
        drop(guard);
        reaper.ended(7, Exit::now(3));
        reaper.ended(9, Exit::now(4));
        let told = events.after(0).await.unwrap().events;
        let told: Vec<_> = told
            .iter()
            .map(|event| (event.exit().exec_id.as_str(), event.exit().exit_status))
            .collect();
        assert_eq!(told, [("e1", 9), ("", 3)]);
    }
}
