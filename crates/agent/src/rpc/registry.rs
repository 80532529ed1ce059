//! The containers of this guest and their processes, by name. Called by `service`, which holds one
//! registry.
//!
//! A name is reserved before its container or process is created, so that two calls cannot create
//! the same, and released when that fails or is cancelled: nothing half created stays.

use std::collections::HashMap;
use std::collections::hash_map;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::JoinHandle;
use ttrpc::Code;

use crate::container::Container;
use crate::disks::Disks;
use crate::io::pipes::Relays;
use crate::processes::oom::OomWatch;
use crate::processes::process::Process;
use crate::rpc::status::{Failure, Result};
use crate::shared_memory::Memory;
use crate::tmpfs::Tmpfs;

/// Records of ended exec processes that a container keeps for late callers of Wait. Probes can
/// create one every second for months.
const ENDED_KEPT: usize = 256;

/// `None`: the name is reserved.
type Slots<T> = HashMap<String, Option<Arc<T>>>;

/// A process with its streams.
pub struct Running {
    /// The process.
    pub process: Process,
    /// Its streams.
    pub relays: Relays,
    /// Order in which processes were created.
    sequence: u64,
}

/// Resources of the machine that a container holds until it is deleted.
#[derive(Debug, Default)]
pub struct HeldResources {
    /// The container's disks.
    pub disks: Disks,
    /// Memory shared with other containers.
    pub _memory: Vec<Memory>,
    /// Files that the host gave it, or a container whose network it shares.
    pub _files: Vec<Arc<Tmpfs>>,
}

/// A container that has been created.
pub struct Entry {
    id: String,
    /// The container's init.
    pub init: Running,
    /// The container's control group.
    pub cgroup: PathBuf,
    /// Disks and shared memory.
    pub resources: HeldResources,
    /// OOM kills.
    pub oom: Arc<OomWatch>,
    /// Reports the OOM kills.
    oom_task: JoinHandle<()>,
    container: Mutex<Option<Container>>,
    /// `None` once the container has been started.
    gate: Mutex<Option<OwnedFd>>,
    paused: Mutex<bool>,
    execs: Mutex<Slots<Running>>,
}

/// The state of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its init waits to execute its command.
    Created,
    /// It runs.
    Running,
    /// Every process is frozen.
    Paused,
    /// Its init has ended.
    Stopped,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// Nothing panics while one of these locks is held; and a panic ends the machine anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All containers.
#[derive(Default)]
pub struct Registry {
    containers: Mutex<Slots<Entry>>,
}

/// A name that is reserved until this is dropped, or taken with `fill`.
pub struct Reservation<'a, T> {
    slots: &'a Mutex<Slots<T>>,
    name: String,
    filled: bool,
}

impl<'a, T> Reservation<'a, T> {
    fn new(slots: &'a Mutex<Slots<T>>, name: &str) -> Option<Self> {
        match lock(slots).entry(name.to_owned()) {
            hash_map::Entry::Occupied(_) => None,
            hash_map::Entry::Vacant(slot) => {
                slot.insert(None);
                Some(Self {
                    slots,
                    name: name.to_owned(),
                    filled: false,
                })
            }
        }
    }

    /// Enters what the name stands for.
    pub fn fill(mut self, value: T) -> Arc<T> {
        let value = Arc::new(value);
        lock(self.slots).insert(self.name.clone(), Some(value.clone()));
        self.filled = true;
        value
    }
}

impl<T> Drop for Reservation<'_, T> {
    fn drop(&mut self) {
        if !self.filled {
            lock(self.slots).remove(&self.name);
        }
    }
}

impl Registry {
    /// Reserves the name of a new container.
    pub fn reserve(&self, id: &str) -> Result<Reservation<'_, Entry>> {
        if id.is_empty() {
            return Err(Failure::invalid("a container needs a name"));
        }
        Reservation::new(&self.containers, id).ok_or_else(|| {
            Failure::new(
                Code::ALREADY_EXISTS,
                format!("container {id:?} exists already"),
            )
        })
    }

    /// The container of this name.
    pub fn get(&self, id: &str) -> Result<Arc<Entry>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| Failure::no_container(id))
    }

    /// Removes a container.
    pub fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
    }
}

impl Running {
    /// A process whose streams flow.
    pub fn new(process: Process, relays: Relays, sequence: u64) -> Self {
        Self {
            process,
            relays,
            sequence,
        }
    }
}

impl Entry {
    /// A container whose init waits at `gate`, or runs when there is none.
    pub fn new(
        id: &str,
        container: Container,
        resources: HeldResources,
        init: Running,
        oom: Arc<OomWatch>,
        gate: Option<OwnedFd>,
    ) -> Self {
        Self {
            id: id.to_owned(),
            init,
            cgroup: container.cgroup().to_owned(),
            resources,
            oom_task: tokio::spawn(oom.clone().run()),
            oom,
            container: Mutex::new(Some(container)),
            gate: Mutex::new(gate),
            paused: Mutex::new(false),
            execs: Mutex::default(),
        }
    }

    /// The container's state.
    pub fn state(&self) -> State {
        if self.init.process.exit().is_some() {
            State::Stopped
        } else if lock(&self.gate).is_some() {
            State::Created
        } else if *lock(&self.paused) {
            State::Paused
        } else {
            State::Running
        }
    }

    /// Fails unless it is in one of the states in which `wanted` is possible.
    pub fn require(&self, states: &[State], wanted: &str) -> Result<()> {
        let state = self.state();
        if states.contains(&state) {
            Ok(())
        } else {
            Err(Failure::wrong_state(&self.id, state.name(), wanted))
        }
    }

    /// Takes the gate, which can be opened only once.
    pub fn take_gate(&self) -> Result<OwnedFd> {
        self.require(&[State::Created], "start")?;
        lock(&self.gate)
            .take()
            .ok_or_else(|| Failure::wrong_state(&self.id, "started", "start"))
    }

    /// Records whether it is frozen.
    pub fn set_paused(&self, paused: bool) {
        *lock(&self.paused) = paused;
    }

    /// Calls `f` with the container, unless it is being deleted.
    pub fn with_container<T>(
        &self,
        f: impl FnOnce(&Container) -> crate::container::Result<T>,
    ) -> Result<T> {
        match lock(&self.container).as_ref() {
            Some(container) => Ok(f(container)?),
            None => Err(Failure::no_container(&self.id)),
        }
    }

    /// Takes the container, to destroy it.
    pub fn take_container(&self) -> Option<Container> {
        lock(&self.container).take()
    }

    /// Reserves the name of a new process.
    pub fn reserve_exec(&self, exec_id: &str) -> Result<Reservation<'_, Running>> {
        if exec_id.is_empty() {
            return Err(Failure::invalid(
                "a process needs a name: the empty one is the container's init",
            ));
        }
        self.forget_ended();
        Reservation::new(&self.execs, exec_id).ok_or_else(|| {
            Failure::new(
                Code::ALREADY_EXISTS,
                format!(
                    "process {exec_id:?} of container {:?} exists already",
                    self.id
                ),
            )
        })
    }

    fn forget_ended(&self) {
        let mut execs = lock(&self.execs);
        if execs.len() < 2 * ENDED_KEPT {
            return;
        }
        let mut ended: Vec<(u64, String)> = execs
            .iter()
            .filter_map(|(name, slot)| Some((name, slot.as_ref()?)))
            .filter(|(_, running)| running.process.exit().is_some())
            .map(|(name, running)| (running.sequence, name.clone()))
            .collect();
        ended.sort_unstable();
        for (_, name) in ended.iter().rev().skip(ENDED_KEPT) {
            execs.remove(name);
        }
    }

    /// A process of the container; its init has the empty name.
    pub fn with_process<T>(
        &self,
        exec_id: &str,
        f: impl FnOnce(&Running) -> Result<T>,
    ) -> Result<T> {
        if exec_id.is_empty() {
            return f(&self.init);
        }
        f(self.exec(exec_id)?.as_ref())
    }

    /// A process that is not the init.
    pub fn exec(&self, exec_id: &str) -> Result<Arc<Running>> {
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .flatten()
            .ok_or_else(|| Failure::no_process(&self.id, exec_id))
    }

    /// Ends the container's relays, and the reports of its OOM kills.
    pub async fn close_streams(&self) {
        self.oom_task.abort();
        self.init.relays.close().await;
        let execs: Vec<_> = lock(&self.execs).values().flatten().cloned().collect();
        for running in execs {
            running.relays.close().await;
        }
    }
}
