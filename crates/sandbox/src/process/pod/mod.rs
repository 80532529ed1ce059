//! The life of a sandbox process that runs containers for engines: one machine, one or more containers.
//!
//! [`run`] is called by the hidden subcommand `pod-process`. The machine starts at once and boots while the first
//! caller still prepares its container; requests that need the guest wait for it. The pod ends with its last container,
//! with its machine, or when nobody is connected and no container has come.
//!
//! | module | what |
//! | --- | --- |
//! | `container` | one container: its stages, its end |
//! | `connection` | one connection: requests, and the process that it keeps |
//! | `network` | the network namespace that the guest's network is made of |
//! | `shares` | what containers see of the host |

mod connection;
mod container;
mod network;
mod shares;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::sync::{Notify, watch};

use super::agent::Agent;
use super::boot::{self, BOOT_TIME, BREAK_TIME, SHUTDOWN_TIME, told_to_end};
use super::devices::{Devices, Incoming};
use super::guest::{Disk, Guest};
use super::network::Nets;
use super::{mounts, watch as descriptors};
use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;
use crate::pod::wire::{Received, Reply, receive, send};
use crate::pod::{DiskRequest, PodPaths, PodRequest};
use container::Container;

/// How long an engine may take to read what its last container wrote.
const DRAIN_TIME: std::time::Duration = std::time::Duration::from_secs(30);

/// How long the last words to keepers may take.
const FAREWELL_TIME: std::time::Duration = std::time::Duration::from_secs(5);

/// A guest that has come up.
#[derive(Clone, Debug)]
struct Ready {
    agent: Agent,
    devices: Arc<Devices>,
}

/// What the tasks of a pod's sandbox process share.
#[derive(Debug)]
struct Pod {
    files: ContainerPaths,
    /// Where shares are added, also while the guest still boots.
    devices: Arc<Devices>,
    /// The machine's disks, in the order of their serial numbers.
    disks: Vec<DiskRequest>,
    network: tokio::sync::Mutex<network::Stage>,
    nets: Nets,
    /// The guest, or why it did not come up.
    ready: watch::Sender<Option<Result<Ready>>>,
    /// Why the guest is no more.
    broken: watch::Sender<Option<String>>,
    /// Nothing of the machine is left.
    gone: watch::Sender<bool>,
    /// A container is removed by force: its output need not be read.
    unread: watch::Sender<bool>,
    containers: Mutex<Containers>,
    connections: AtomicUsize,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Containers {
    by_id: BTreeMap<String, Arc<Container>>,
    /// Containers that have not ended.
    alive: usize,
    /// A container has been made: from now on the pod ends with the last one.
    used: bool,
    /// No further container is made.
    ending: bool,
}

/// Runs a pod's sandbox process to its end. `first` is the connection of who started it, on which the request waits with
/// the pod's lock, listening socket and disks, and who is told when the machine has been started.
///
/// Called in a process of its own, with one thread.
///
/// # Errors
/// What went wrong before the machine was started.
pub fn run(paths: &PodPaths, first: OwnedFd) -> Result<()> {
    // A process group leader cannot become a session leader: it is one already then.
    let _ = rustix::process::setsid();
    let files = paths.files();
    let Some(Received {
        message: request,
        fds,
    }) = receive::<PodRequest>(&first).context(|| "read the request".into())?
    else {
        return Err(Failure::new("nobody asks for a pod"));
    };
    let mut fds = fds.into_iter();
    let (Some(lock), Some(listener)) = (fds.next(), fds.next()) else {
        return Err(Failure::new("the pod's lock and socket did not come"));
    };
    let mut lock = File::from(lock);
    // Who has to kill this process finds out so whom to kill.
    write!(lock, "{}", std::process::id()).context(|| "write the lock".into())?;
    let disks = disks(&request.disks, fds)?;
    mounts::enter_namespace()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop".into())?;
    let outcome = runtime.block_on(serve(&files, &request, first, listener, disks));
    // While the lock is held nobody takes this directory for another pod's.
    let removed = fs::remove_dir_all(&files.run);
    drop(lock);
    outcome?;
    removed.context(|| format!("remove {}", files.run.display()))
}

/// The machine's disks: what they are and what came for them.
fn disks(
    requests: &[DiskRequest],
    fds: impl ExactSizeIterator<Item = OwnedFd>,
) -> Result<Vec<Disk>> {
    if fds.len() != requests.len() {
        return Err(Failure::new("as many descriptors as disks must come"));
    }
    let disk = |(request, file): (&DiskRequest, OwnedFd)| Disk {
        file,
        read_only: request.read_only,
    };
    Ok(requests.iter().zip(fds).map(disk).collect())
}

/// Puts the pod's processes into control groups. The kernel waits there until no processor is in the middle of a fork, 10
/// ms and more: the guest boots meanwhile, and has no further processes on the host yet.
fn join_cgroups(directories: &[PathBuf], guest: &Guest) -> Result<()> {
    let (devices, machine) = guest.pids();
    let own = std::process::id().cast_signed();
    for directory in directories {
        for pid in [machine, devices, own] {
            fs::write(directory.join("cgroup.procs"), pid.to_string())
                .context(|| format!("join the control group {}", directory.display()))?;
        }
    }
    Ok(())
}

async fn serve(
    files: &ContainerPaths,
    request: &PodRequest,
    first: OwnedFd,
    listener: OwnedFd,
    disks: Vec<Disk>,
) -> Result<()> {
    let started = Guest::start(files, &request.machine, disks).and_then(|started| {
        join_cgroups(&request.cgroups, &started.0)?;
        Ok(started)
    });
    let (guest, incoming) = match started {
        Ok(started) => started,
        Err(failure) => {
            // Who started the pod may have gone; the log has it, too.
            let _ = send(&first, &Reply::Failed(failure.clone()), &[]);
            return Err(failure);
        }
    };
    let pod = Arc::new(Pod {
        files: files.clone(),
        devices: guest.control.clone(),
        disks: request.disks.clone(),
        network: tokio::sync::Mutex::default(),
        nets: guest.nets.clone(),
        ready: watch::Sender::new(None),
        broken: watch::Sender::new(None),
        gone: watch::Sender::new(false),
        unread: watch::Sender::new(false),
        containers: Mutex::default(),
        connections: AtomicUsize::new(0),
        changed: Notify::new(),
    });
    send(&first, &Reply::Ok, &[]).context(|| "answer who started the pod".into())?;
    connection::spawn(&pod, first)?;
    tokio::spawn(accept(listener, pod.clone()));

    let booted = tokio::select! {
        biased;
        booted = boot(&guest, request, incoming) => match booted {
            // A process that died is the cause of whatever else failed.
            Err(failure) => match tokio::time::timeout(BREAK_TIME, guest.broke_down()).await {
                Ok(reason) => Err(Failure::new(format!(
                    "the guest did not come up: {reason} ({failure})"
                ))),
                Err(_) => Err(failure),
            },
            booted => booted,
        },
        reason = guest.broke_down() => {
            Err(Failure::new(format!("the guest did not come up: {reason}")))
        }
        () = told_to_end() => Err(Failure::new("the sandbox process was told to end")),
        () = pod.done() => Err(Failure::new("nobody waits for the guest any more")),
        () = tokio::time::sleep(BOOT_TIME) => Err(Failure::new(format!(
            "the guest did not come up within {} s", BOOT_TIME.as_secs()
        ))),
    };
    let reason = match booted {
        Ok(ready) => {
            let agent = ready.agent.clone();
            pod.ready.send_replace(Some(Ok(ready)));
            tokio::select! {
                biased;
                reason = guest.broke_down() => Some(reason),
                () = told_to_end() => Some("the sandbox process was told to end".into()),
                () = pod.done() => {
                    // What containers wrote is with whoever reads it, and then written back to the host's files.
                    let shutdown = async {
                        tokio::select! {
                            drained = tokio::time::timeout(DRAIN_TIME, guest.control.drain()) => {
                                if !matches!(drained, Ok(Ok(()))) {
                                    tracing::warn!("output of a container is lost: nobody has read it");
                                }
                            }
                            () = pod.is_unread() => {}
                            _ = guest.broke_down() => return,
                        }
                        tokio::select! {
                            result = agent.shutdown(SHUTDOWN_TIME) => {
                                if let Err(failure) = result {
                                    tracing::debug!("shutdown: {failure}");
                                }
                            }
                            _ = guest.broke_down() => {}
                        }
                    };
                    // Nobody in the guest needs the network for that.
                    tokio::join!(shutdown, disconnected(&pod));
                    None
                }
            }
        }
        Err(failure) => {
            let failure = failure.console(guest.console_tail());
            tracing::error!("{failure}");
            let reason = failure.message.clone();
            pod.ready.send_replace(Some(Err(failure)));
            Some(reason)
        }
    };
    pod.lock().ending = true;
    drop(guest);
    disconnected(&pod).await;
    pod.broken
        .send_replace(Some(reason.unwrap_or_else(|| "the pod has ended".into())));
    pod.gone.send_replace(true);
    // Keepers and callers have their answers, or go without.
    let _ = tokio::time::timeout(FAREWELL_TIME, pod.deserted()).await;
    Ok(())
}

/// Leaves the network namespace, if that was not done. One that answers slowly is not waited for.
async fn disconnected(pod: &Pod) {
    let _ = tokio::time::timeout(FAREWELL_TIME, pod.disconnect_network()).await;
}

async fn accept(listener: OwnedFd, pod: Arc<Pod>) {
    let listener = match descriptors::watch(listener, Interest::READABLE) {
        Ok(listener) => listener,
        Err(failure) => return tracing::error!("{failure}"),
    };
    loop {
        let flags = SocketFlags::CLOEXEC;
        let accepted = listener
            .async_io(Interest::READABLE, |listener| {
                Ok(accept_with(listener, flags)?)
            })
            .await;
        let spawned = accepted
            .context(|| "accept a connection".into())
            .and_then(|socket| connection::spawn(&pod, socket));
        if let Err(failure) = spawned {
            // Out of descriptors, most likely: others go away, so it passes.
            tracing::warn!("{failure}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
}

async fn boot(guest: &Guest, request: &PodRequest, incoming: Incoming) -> Result<Ready> {
    let agent = boot::agent_dials(incoming).await?;
    let configuration = boot::configuration(&guest.features, &request.hostname, BTreeMap::new())?;
    agent.configure(&configuration).await?;
    Ok(Ready {
        agent,
        devices: guest.control.clone(),
    })
}

impl Pod {
    fn lock(&self) -> MutexGuard<'_, Containers> {
        // Nothing panics while it is held.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest, as soon as it has come up.
    async fn ready(&self) -> Result<Ready> {
        let mut ready = self.ready.subscribe();
        match ready.wait_for(Option::is_some).await {
            Ok(ready) => match &*ready {
                Some(ready) => ready.clone(),
                None => Err(Failure::new("the guest did not come up")),
            },
            Err(_closed) => Err(Failure::new("the guest did not come up")),
        }
    }

    /// Waits for the end of the guest; why it ended.
    async fn broken(&self) -> String {
        let mut broken = self.broken.subscribe();
        match broken.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_closed) => String::new(),
        }
    }

    /// Waits until nobody wants the output of containers any more.
    async fn is_unread(&self) {
        // The sender lives as long as the pod.
        let _ = self.unread.subscribe().wait_for(|unread| *unread).await;
    }

    /// Waits until nothing of the machine is left.
    async fn gone(&self) {
        // The sender lives as long as the pod.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Waits until the pod has no reason to go on, after which no container is made any more.
    async fn done(&self) {
        loop {
            let changed = self.changed.notified();
            {
                let mut containers = self.lock();
                let wanted = containers.used || self.connections.load(Ordering::Relaxed) == 0;
                if wanted && containers.alive == 0 {
                    containers.ending = true;
                    return;
                }
            }
            changed.await;
        }
    }

    /// Waits until nobody is connected.
    async fn deserted(&self) {
        loop {
            let changed = self.changed.notified();
            if self.connections.load(Ordering::Relaxed) == 0 {
                return;
            }
            changed.await;
        }
    }

    /// The container of this id.
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock()
            .by_id
            .get(id)
            .cloned()
            .ok_or_else(|| Failure::new(format!("container {id:?} does not exist")))
    }
}
