//! A process of a container as containerd knows it: its init, or a further one that is added first
//! and started later.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::events::task::TaskExit;
use hull_sandbox::store::Exit;
use protobuf::MessageField;
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::bootstrap::timestamp;
use crate::events::Publisher;
use crate::stand_in::StandIn;
use crate::stdio::{Io, Paths};

/// Exit status of a process that could not be started.
pub const NOT_STARTED: i32 = 255;

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its container's id.
    pub container: String,
    /// Its own; empty for the init.
    pub exec: String,
    /// What containerd knows as its process id.
    pub pid: i32,
    /// What has that id, of a further process.
    pub stand_in: Option<StandIn>,
    /// Where its streams lead.
    pub paths: Paths,
    /// Its OCI process object, of one that is added and not started.
    pub added: Mutex<Option<Box<RawValue>>>,
    /// The guest's side, once it is there.
    inner: Mutex<Option<Arc<hull_sandbox::Process>>>,
    io: Mutex<Option<Arc<Io>>>,
    /// Held while it is started, until that is announced: its end is announced after it.
    pub announcing: tokio::sync::Mutex<()>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// One that is not there yet.
    pub fn new(container: &str, exec: &str, pid: i32, paths: Paths) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            pid,
            stand_in: None,
            paths,
            added: Mutex::default(),
            inner: Mutex::default(),
            io: Mutex::default(),
            announcing: tokio::sync::Mutex::default(),
            exit: watch::Sender::new(None),
        }
    }

    /// Whether it is its container's init.
    pub fn is_init(&self) -> bool {
        self.exec.is_empty()
    }

    /// It is in the guest, and its streams are copied.
    pub fn enter(&self, process: hull_sandbox::Process, io: Io) -> Arc<hull_sandbox::Process> {
        let process = Arc::new(process);
        *lock(&self.inner) = Some(process.clone());
        *lock(&self.io) = Some(Arc::new(io));
        process
    }

    /// The guest's side, if it is there.
    pub fn inner(&self) -> Option<Arc<hull_sandbox::Process>> {
        lock(&self.inner).clone()
    }

    /// Its streams, if they are copied.
    pub fn io(&self) -> Option<Arc<Io>> {
        lock(&self.io).clone()
    }

    /// How it has ended.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exit)) => exit.clone(),
            // The sender lives as long as the process.
            _ => Exit::now(NOT_STARTED),
        }
    }

    /// It could not be started.
    pub fn failed(&self) {
        self.exit.send_replace(Some(Exit::now(NOT_STARTED)));
    }

    /// It has ended: containerd is told, then those who wait.
    pub async fn conclude(&self, exit: Exit, events: &Publisher) {
        if let Some(io) = self.io() {
            io.ends().await;
        }
        events.publish(&TaskExit {
            container_id: self.container.clone(),
            id: match self.is_init() {
                true => self.container.clone(),
                false => self.exec.clone(),
            },
            pid: self.pid.unsigned_abs(),
            exit_status: exit.status.unsigned_abs(),
            exited_at: MessageField::some(timestamp(exit.at_ns)),
            ..TaskExit::default()
        });
        self.exit.send_replace(Some(exit));
    }

    /// Waits until what it wrote is with those who read it, or they do not take it.
    pub async fn drained(&self) {
        let io = self.io();
        if let Some(io) = io {
            io.drained().await;
        }
    }
}

/// What a mutex guards is valid at any time here.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
