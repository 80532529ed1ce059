//! The pod of a shim: its sandbox, which is booted for the first container, and its containers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hull_oci::container::{Container as Stored, Record};
use hull_sandbox::cgroup::Groups;
use hull_sandbox::store::Exit;
use hull_sandbox::{Context, Error, ErrorKind, EventKind, Reason, Result, Sandbox, role};
use tokio::sync::Notify;

use crate::Settings;
use crate::events::Publisher;
use crate::flags::Flags;
use crate::metrics::Spent;
use crate::process::{Process, lock};
use crate::sandbox::Holder;
use crate::stand_in::StandIn;
use crate::streaming::Streams;
use containerd_shim_protos::events::task::TaskOOM;

/// How long a sandbox without containers may take to end by itself.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A pod, or a container alone.
pub struct Pod {
    /// hull's configuration.
    pub settings: Settings,
    /// Namespace of containerd.
    pub namespace: String,
    /// Id of the pod, or of the only container.
    pub id: String,
    /// Tells containerd what happens.
    pub events: Publisher,
    /// Its own socket.
    socket: PathBuf,
    /// Held while a container is created: one at a time finds the sandbox or boots it.
    pub creating: tokio::sync::Mutex<()>,
    /// The sandbox, from the moment when its machine is started.
    sandbox: Mutex<Option<Sandbox>>,
    /// Control groups of containers that were deleted while the machine was still in them.
    groups: Mutex<Vec<Groups>>,
    /// Calls that create something.
    busy: AtomicUsize,
    /// containerd has said that the shim is to end, while such a call was under way.
    asked: AtomicBool,
    /// It ends: nothing is created any more.
    left: AtomicBool,
    /// What holds a pod of containerd's sandbox service.
    pub holder: Mutex<Option<Holder>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Processor time of its containers.
    pub spent: Mutex<Spent>,
    /// Streams that containerd has opened.
    pub streams: Arc<Streams>,
    /// The shim has nothing left to do.
    pub done: Notify,
}

/// A container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle, as containerd names it.
    pub bundle: String,
    /// The sandbox's side.
    pub inner: Arc<hull_sandbox::Container>,
    /// Its init.
    pub init: Arc<Process>,
    /// Further processes, by id.
    pub execs: Mutex<BTreeMap<String, Arc<Process>>>,
    /// What stands for it on the host.
    pub stand_in: StandIn,
    /// It holds the pod, and does nothing else.
    pub holds_pod: bool,
    /// Its directory of state.
    pub stored: Stored,
    /// What is written down of it.
    pub record: Mutex<Record>,
    /// Held while it is deleted: how it had ended, from then on.
    pub deleted: tokio::sync::Mutex<Option<Exit>>,
}

impl Pod {
    /// A pod without containers.
    pub fn new(settings: Settings, flags: &Flags, socket: PathBuf, events: Publisher) -> Self {
        Self {
            settings,
            namespace: flags.namespace.clone(),
            id: flags.id.clone(),
            events,
            socket,
            creating: tokio::sync::Mutex::default(),
            sandbox: Mutex::default(),
            groups: Mutex::default(),
            busy: AtomicUsize::new(0),
            asked: AtomicBool::new(false),
            left: AtomicBool::new(false),
            holder: Mutex::default(),
            containers: Mutex::default(),
            spent: Mutex::default(),
            streams: Arc::default(),
            done: Notify::new(),
        }
    }

    /// The container of an id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        let found = lock(&self.containers).get(id).cloned();
        found.ok_or_else(|| Error::not_found(format!("container {id:?} does not exist")))
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).values().cloned().collect()
    }

    /// A container is there.
    pub fn add(&self, container: Arc<Container>) {
        self.asked.store(false, Ordering::Relaxed);
        lock(&self.containers).insert(container.id.clone(), container);
    }

    /// A container is no more; another one of its id stays.
    pub fn remove(&self, container: &Arc<Container>) {
        let mut containers = lock(&self.containers);
        let known = containers.get(&container.id);
        if known.is_some_and(|known| Arc::ptr_eq(known, container)) {
            containers.remove(&container.id);
        }
    }

    /// Whether it has this very container.
    pub fn has(&self, container: &Arc<Container>) -> bool {
        let containers = lock(&self.containers);
        let known = containers.get(&container.id);
        known.is_some_and(|known| Arc::ptr_eq(known, container))
    }

    /// Whether it has no container, and nothing that holds it.
    pub fn is_idle(&self) -> bool {
        lock(&self.containers).is_empty() && lock(&self.holder).is_none()
    }

    /// Whether nothing is left of it that containerd has not deleted.
    pub fn is_over(&self) -> bool {
        self.busy.load(Ordering::Relaxed) == 0 && self.is_idle()
    }

    /// Somebody creates something of it, as long as the result lives.
    pub fn work(self: &Arc<Self>) -> Work {
        self.busy.fetch_add(1, Ordering::Relaxed);
        Work(self.clone())
    }

    /// The shim ends, after the answer to the call at hand. A shim that is started for the same id
    /// from now on has a socket of its own.
    pub fn leave(&self) {
        // Once: by now the socket may be another shim's.
        if !self.left.swap(true, Ordering::Relaxed) {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.socket);
            self.done.notify_one();
        }
    }

    /// containerd has nothing more to ask of the shim. It says so after each container that it
    /// deletes, and does not say it again.
    pub fn leave_if_over(&self) {
        if self.is_over() {
            self.leave();
        } else if self.is_idle() {
            self.asked.store(true, Ordering::Relaxed);
        }
    }

    /// Nothing is created any more.
    ///
    /// # Errors
    /// `Gone` when the shim ends.
    pub fn stays(&self) -> Result<()> {
        match self.left.load(Ordering::Relaxed) {
            true => Err(Error::with_kind(ErrorKind::Gone, "the shim is ending")),
            false => Ok(()),
        }
    }

    /// The sandbox, if there is one.
    pub fn sandbox(&self) -> Option<Sandbox> {
        lock(&self.sandbox).clone()
    }

    /// The sandbox is there, or is no more.
    pub fn set_sandbox(&self, sandbox: Option<Sandbox>) {
        *lock(&self.sandbox) = sandbox;
    }

    /// Ends the sandbox, if there is one, and waits until nothing of it is left: as it ends with
    /// its last container if it has none, by force after a while.
    pub async fn end(&self, reason: Reason) {
        let Some(sandbox) = self.sandbox() else {
            return;
        };
        let ended = sandbox.ended();
        if !sandbox.end_if_idle() || tokio::time::timeout(END_TIMEOUT, ended).await.is_err() {
            sandbox.shutdown(reason);
            sandbox.ended().await;
        }
    }

    /// Control groups of a container that is deleted: they go when the machine is not in them.
    pub async fn let_go_of(&self, groups: Groups) {
        lock(&self.groups).push(groups);
        let alone = lock(&self.containers).len() <= 1;
        if let Some(sandbox) = self.sandbox() {
            match alone && sandbox.is_ending() {
                // With its last container.
                true => drop(sandbox.ended().await),
                // The machine goes on, or has ended.
                false if sandbox.is_over() => {}
                false => return,
            }
        }
        self.remove_groups().await;
    }

    async fn remove_groups(&self) {
        let all = std::mem::take(&mut *lock(&self.groups));
        let removing = blocking(move || {
            let failed = all.into_iter().filter(|groups| {
                let removed = groups.remove();
                if let Err(error) = &removed {
                    tracing::warn!("{error}");
                }
                removed.is_err()
            });
            Ok(failed.collect::<Vec<_>>())
        });
        match removing.await {
            // Tried again with the next ones, and at the end.
            Ok(failed) => lock(&self.groups).extend(failed),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Removes what the containers have on the host that containerd did not delete.
    pub async fn clean_up(&self) {
        for container in self.containers() {
            self.remove(&container);
            let groups = lock(&container.record).details.groups.clone();
            lock(&self.groups).push(groups);
            if let Err(error) = container.stored.remove() {
                tracing::warn!("{error}");
            }
        }
        self.remove_groups().await;
    }
}

/// A call that creates something.
pub struct Work(Arc<Pod>);

impl Drop for Work {
    fn drop(&mut self) {
        let last = self.0.busy.fetch_sub(1, Ordering::Relaxed) == 1;
        if last && self.0.asked.load(Ordering::Relaxed) {
            self.0.leave_if_over();
        }
    }
}

/// Does what takes the host's time, or waits, beside the event loop, on which the sandbox runs.
///
/// # Errors
/// Those of the work.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let working = tokio::task::spawn_blocking(work);
    working.await.context(|| "work beside the event loop")?
}

impl Container {
    /// A process of it; with an empty id, its init.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            return Ok(self.init.clone());
        }
        let found = lock(&self.execs).get(exec).cloned();
        found.ok_or_else(|| {
            Error::not_found(format!(
                "process {exec:?} of container {:?} does not exist",
                self.id
            ))
        })
    }
}

/// Passes on what the sandbox reports, until it has ended: to containerd what only the guest knows,
/// to the log of the host everything.
pub async fn follow(pod: Arc<Pod>, sandbox: Sandbox) {
    role::log_events(sandbox, |event| match &event.kind {
        EventKind::Oom { container } => pod.events.publish_if_idle(&TaskOOM {
            container_id: container.clone(),
            ..TaskOOM::default()
        }),
        EventKind::GuestFailed { reason } => tracing::error!("{reason}"),
        _ => {}
    })
    .await;
}
