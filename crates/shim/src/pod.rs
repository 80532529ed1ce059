//! The pod of a shim: its sandbox, which is booted for the first container, and its containers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hull_oci::container::{Container as Stored, Record};
use hull_sandbox::events::EventLog;
use hull_sandbox::{Error, EventKind, Reason, Result, Sandbox};
use tokio::sync::{Notify, broadcast};

use crate::Settings;
use crate::events::Publisher;
use crate::process::{Process, lock};
use crate::sandbox::Holder;
use crate::stand_in::StandIn;
use containerd_shim_protos::events::task::TaskOOM;

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
    /// Held while a container is created: one at a time finds the sandbox or boots it.
    pub sandbox: tokio::sync::Mutex<Option<Sandbox>>,
    /// What holds a pod of containerd's sandbox service.
    pub holder: Mutex<Option<Holder>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
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
    /// Its directory of state.
    pub stored: Stored,
    /// What is written down of it.
    pub record: Mutex<Record>,
}

impl Pod {
    /// A pod without containers.
    pub fn new(settings: Settings, namespace: String, id: String, events: Publisher) -> Self {
        Self {
            settings,
            namespace,
            id,
            events,
            sandbox: tokio::sync::Mutex::default(),
            holder: Mutex::default(),
            containers: Mutex::default(),
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
        lock(&self.containers).insert(container.id.clone(), container);
    }

    /// A container is no more.
    pub fn remove(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    /// Whether nothing is left of it that containerd has not deleted.
    pub fn is_over(&self) -> bool {
        lock(&self.containers).is_empty() && lock(&self.holder).is_none()
    }

    /// Ends the sandbox, if there is one, and waits until nothing of it is left.
    pub async fn end(&self, reason: Reason) {
        // Not held while the sandbox ends: others ask for it.
        let sandbox = self.sandbox.lock().await.clone();
        if let Some(sandbox) = sandbox {
            sandbox.shutdown(reason);
            sandbox.ended().await;
        }
    }
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
    let mut events = sandbox.events();
    let log = EventLog::of(sandbox.path());
    let mut ended = std::pin::pin!(sandbox.ended());
    loop {
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            _ = &mut ended => match events.try_recv() {
                Ok(event) => Ok(event),
                Err(_) => return,
            },
        };
        match event {
            Ok(event) => {
                if let EventKind::Oom { container } = &event.kind {
                    pod.events.publish(&TaskOOM {
                        container_id: container.clone(),
                        ..TaskOOM::default()
                    });
                }
                if let EventKind::GuestFailed { reason } = &event.kind {
                    tracing::error!("{reason}");
                }
                if let Some(log) = &log
                    && let Err(error) = log.append(&event)
                {
                    tracing::warn!("cannot write {}: {error}", log.path().display());
                }
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!("{missed} events are not logged");
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}
