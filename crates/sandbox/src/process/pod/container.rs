//! One container of a pod, from its creation to its end.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hull_device_control::disk_serial;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Pod, Ready, shares};
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::pod::wire::{CreateRequest, Disk, Reply};
use crate::pod::{ContainerStatus, DiskRequest, STATUS_FILE, Status};
use crate::process::streams;
use crate::record::Exit;

/// A container in the guest.
#[derive(Debug)]
pub struct Container {
    /// The engine's id.
    pub id: String,
    /// Its directory on the host, for the status file.
    directory: OwnedFd,
    shares: Vec<String>,
    status: Mutex<Status>,
    /// How it ended, once nothing of it is left in the guest.
    ended: watch::Sender<Option<Exit>>,
    /// Process id of its init, in the guest.
    init: u32,
    /// Keepers of its processes: the init's has the empty name.
    keepers: Mutex<BTreeMap<String, i32>>,
    execs: AtomicU32,
}

/// A place that a container has in the pod before it is there.
pub struct Place<'a> {
    pod: &'a Pod,
    filled: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if !self.filled {
            self.pod.lock().alive -= 1;
            self.pod.changed.notify_waiters();
        }
    }
}

/// Why there is no place.
pub enum NoPlace {
    /// The pod ends.
    Ending,
    /// There is a container of this id.
    Exists,
}

impl Pod {
    /// Keeps the pod from ending while a container is made.
    pub fn reserve(&self, id: &str) -> Result<Place<'_>, NoPlace> {
        let mut containers = self.lock();
        if containers.ending {
            return Err(NoPlace::Ending);
        }
        if containers.by_id.contains_key(id) {
            return Err(NoPlace::Exists);
        }
        containers.alive += 1;
        Ok(Place {
            pod: self,
            filled: false,
        })
    }

    /// Makes a container whose init waits to be started.
    ///
    /// # Errors
    /// The agent's, or that the container cannot be as its spec says.
    pub async fn create(
        self: &Arc<Self>,
        mut place: Place<'_>,
        ready: &Ready,
        request: CreateRequest,
        directory: OwnedFd,
        shares: Vec<String>,
    ) -> Result<(Arc<Container>, Vec<OwnedFd>)> {
        let mut spec = request.spec;
        self.resolve_joins(&mut spec, &request.joins)?;
        self.name_disks(&mut spec, &request.disks)?;
        self.configure_network(ready).await?;
        if !request.network.is_empty() {
            ready.agent.set_sysctls(request.network).await?;
        }
        let (ports, streams) = streams::open(&ready.devices, request.terminal).await?;
        let text = serde_json::to_vec(&spec).context(|| "encode the spec".into())?;
        let init = ready.agent.create(&request.container, text, ports).await?;
        let container = Arc::new(Container {
            id: request.container,
            directory,
            shares,
            status: Mutex::new(Status::Creating),
            ended: watch::Sender::new(None),
            init,
            keepers: Mutex::new(BTreeMap::from([(String::new(), request.keeper)])),
            execs: AtomicU32::new(1),
        });
        container.set_status(Status::Created, None)?;
        {
            let mut containers = self.lock();
            containers.used = true;
            containers
                .by_id
                .insert(container.id.clone(), container.clone());
        }
        place.filled = true;
        tokio::spawn(live(self.clone(), ready.clone(), container.clone()));
        Ok((container, streams))
    }

    /// Namespaces of other containers, by the process that stands for them on the host, become those in the guest.
    fn resolve_joins(&self, spec: &mut Value, joins: &[(String, i32)]) -> Result<()> {
        for (kind, keeper) in joins {
            let owner = self
                .lock()
                .by_id
                .values()
                .find(|container| container.is_kept_by(*keeper))
                .cloned()
                .ok_or_else(|| {
                    Failure::new(format!(
                        "not supported: the {kind} namespace of process {keeper} of the host: a guest kernel has namespaces of its own"
                    ))
                    .hint("namespaces of another container in the same pod can be joined")
                })?;
            let file = match kind.as_str() {
                "network" => "net",
                "mount" => "mnt",
                other => other,
            };
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            for namespace in namespaces.into_iter().flatten() {
                if namespace["type"] == *kind {
                    namespace["path"] = json!(format!("/proc/{}/ns/{file}", owner.init));
                }
            }
        }
        Ok(())
    }
}

impl Pod {
    /// Tells the agent which disks of the machine the block devices of the host are that the spec names.
    fn name_disks(&self, spec: &mut Value, disks: &[Disk]) -> Result<()> {
        if disks.is_empty() {
            return Ok(());
        }
        let named = disks
            .iter()
            .map(|disk| {
                let DiskRequest { major, minor, .. } = disk.device;
                let refused = |why: &str| {
                    Failure::new(format!(
                        "not supported: linux.devices: {} (b {major}:{minor}): {why}",
                        disk.path
                    ))
                };
                let same = |own: &DiskRequest| (own.major, own.minor) == (major, minor);
                let index = self.disks.iter().position(same).ok_or_else(|| {
                    refused(
                        "the machine of its pod already runs, and disks are added when it starts",
                    )
                })?;
                if self.disks[index].read_only && !disk.device.read_only {
                    return Err(refused(
                        "the machine of its pod already runs, and only reads from this disk",
                    ));
                }
                Ok(json!({"major": major, "minor": minor, "serial": disk_serial(index)}))
            })
            .collect::<Result<Vec<_>>>()?;
        spec["hullDisks"] = Value::Array(named);
        Ok(())
    }
}

/// From creation to the end of the init, and of what is left then.
async fn live(pod: Arc<Pod>, ready: Ready, container: Arc<Container>) {
    let broken = |reason: String| Exit {
        reason: Some(reason),
        ..Exit::now(EXIT_HULL)
    };
    let exit = tokio::select! {
        biased;
        reason = pod.broken() => broken(reason),
        ended = ready.agent.wait(&container.id, "") => match ended {
            Ok(ended) => ended.into(),
            // The agent went first; the kernel follows, and knows more.
            Err(failure) => {
                match tokio::time::timeout(super::boot::DEATH_TIME, pod.broken()).await {
                    Ok(reason) => broken(reason),
                    Err(_) => broken(failure.message),
                }
            }
        },
    };
    let last = {
        let mut containers = pod.lock();
        containers.alive -= 1;
        containers.alive == 0
    };
    pod.changed.notify_waiters();
    if last {
        // The machine ends with it, and with that everything.
        pod.gone().await;
    } else {
        let deleted = tokio::select! {
            deleted = ready.agent.delete(&container.id) => deleted,
            _ = pod.broken() => Ok(()),
        };
        if let Err(failure) = deleted {
            tracing::warn!("{failure}");
        }
        tokio::select! {
            () = shares::remove(&pod.devices, &pod.files, &container.shares) => {}
            _ = pod.broken() => {}
        }
    }
    // An engine that has removed the container does not want to know.
    if let Err(failure) = container.set_status(Status::Stopped, Some(exit.clone())) {
        tracing::debug!("{failure}");
    }
    container.ended.send_replace(Some(exit));
}

impl Container {
    /// How far it is.
    pub fn status(&self) -> Status {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status, and the file that says it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_status(&self, status: Status, exit: Option<Exit>) -> Result<()> {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
        let text = serde_json::to_vec(&ContainerStatus { status, exit })
            .context(|| "encode the status".into())?;
        let new = format!("{STATUS_FILE}.new");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::openat(&self.directory, new.as_str(), flags, mode)
            .map_err(std::io::Error::from)
            .and_then(|file| std::fs::File::from(file).write_all(&text))
            .and_then(|()| {
                let directory = &self.directory;
                Ok(rustix::fs::renameat(
                    directory,
                    new.as_str(),
                    directory,
                    STATUS_FILE,
                )?)
            })
            .context(|| format!("write the status of container {}", self.id))
    }

    /// Fails unless the container is in one of these stages. The words are runc's, which engines look for.
    ///
    /// # Errors
    /// It is in another one.
    pub fn require(&self, allowed: &[Status], what: &str) -> Result<()> {
        let status = self.status();
        if allowed.contains(&status) {
            return Ok(());
        }
        Err(Failure::new(match status {
            Status::Stopped => "container not running".to_owned(),
            _ => format!("cannot {what} a container that is {status}"),
        }))
    }

    /// Waits until it has ended and nothing of it is left.
    pub async fn ended(&self) -> Exit {
        let mut ended = self.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or_else(|| Exit::now(EXIT_HULL)),
            // The sender lives as long as the container.
            Err(_closed) => Exit::now(EXIT_HULL),
        }
    }

    /// A name for a further process, kept by `keeper`.
    pub fn add_exec(&self, keeper: i32) -> String {
        let name = format!("exec{}", self.execs.fetch_add(1, Ordering::Relaxed));
        self.keepers().insert(name.clone(), keeper);
        name
    }

    /// Forgets a process that has ended.
    pub fn remove_exec(&self, name: &str) {
        self.keepers().remove(name);
    }

    fn is_kept_by(&self, keeper: i32) -> bool {
        self.keepers().get("") == Some(&keeper)
    }

    fn keepers(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, i32>> {
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process ids of the keepers, the init's first.
    pub fn keeper_pids(&self) -> Vec<i32> {
        self.keepers().values().copied().collect()
    }
}

impl From<NoPlace> for Reply {
    fn from(reason: NoPlace) -> Self {
        match reason {
            NoPlace::Ending => Reply::Ending,
            NoPlace::Exists => {
                Reply::Failed(Failure::new("container with given ID already exists"))
            }
        }
    }
}
