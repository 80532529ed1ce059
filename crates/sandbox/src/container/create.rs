//! The creation of a container: its spec as the guest knows things, its streams, its init.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex};

use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::end::live;
use super::{Container, Stage};
use crate::config::{ContainerConfig, Stdio, TerminalSize};
use crate::control::protocol::AttachOptions;
use crate::error::{Context, Error, Result};
use crate::events::EventKind;
use crate::guest::agent::NewContainer;
use crate::guest::hub::{Carriers, Hub};
use crate::guest::streams;
use crate::journal::Journal;
use crate::log;
use crate::process::Process;
use crate::sandbox::{Ready, Sandbox};
use crate::shares;
use crate::store::Directory;

/// A place for a container that is being created: keeps the sandbox from ending.
struct Slot<'a> {
    sandbox: &'a Sandbox,
    filled: bool,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.filled {
            self.sandbox.change(|containers| containers.alive -= 1);
        }
    }
}

impl Sandbox {
    /// Creates a container whose init waits to be started, or runs at once. `directory` is where
    /// its status and log are written; `shares` are those that were added for it, and go with it.
    /// With [`Stdio::Handover`] its streams are with the process.
    ///
    /// # Errors
    /// `Exists`; `WrongState` when the sandbox is ending; `CommandNotFound` and `NotExecutable` for
    /// its command; the agent refuses its spec; the guest is not there.
    pub async fn create(
        &self,
        config: ContainerConfig,
        directory: Directory,
        shares: Vec<String>,
    ) -> Result<Process> {
        let (process, _) = self
            .create_attached(config, directory, shares, None)
            .await?;
        Ok(process)
    }

    /// The same, with a client attached to its hub before it can write anything; the client's
    /// streams.
    pub(crate) async fn create_attached(
        &self,
        config: ContainerConfig,
        directory: Directory,
        shares: Vec<String>,
        attach: Option<AttachOptions>,
    ) -> Result<(Process, Vec<OwnedFd>)> {
        let mut slot = self.reserve(&config.id)?;
        let slot = &mut slot;
        self.in_guest(async |ready| {
            self.create_in(ready, slot, config, directory, shares, attach)
                .await
        })
        .await
    }

    async fn create_in(
        &self,
        ready: Ready,
        slot: &mut Slot<'_>,
        config: ContainerConfig,
        directory: Directory,
        shares: Vec<String>,
        attach: Option<AttachOptions>,
    ) -> Result<(Process, Vec<OwnedFd>)> {
        let size = attach.and_then(|options| options.size);
        let disks = self.0.disks.describe(&config.disks).await?;
        let spec = self.guest_spec(&config, disks, size.filter(|_| config.stdio.terminal()))?;
        self.configure_network(&ready).await?;
        if !config.sysctl.is_empty() {
            ready.agent.set_sysctls(config.sysctl).await?;
        }
        let hub = match config.stdio {
            Stdio::Hub {
                terminal,
                stdin_stays,
                log_limit,
                ..
            } => {
                let log = match log_limit {
                    0 => None,
                    limit => Some(
                        log::Writer::open(directory.try_clone()?, limit)
                            .context(|| format!("open the log of container {}", config.id))?,
                    ),
                };
                let journal = config.journal.as_deref().map(Journal::new).transpose()?;
                Some(Hub::new(log, journal, terminal, stdin_stays))
            }
            Stdio::Null | Stdio::Handover { .. } => None,
        };
        let attached = match (&hub, attach) {
            (Some(hub), Some(options)) => hub.attach(options.stdin).await?,
            _ => Vec::new(),
        };
        let timings = &self.0.timings;
        let (ports, streams) = timings
            .measure("open streams", streams::open(&ready.devices, config.stdio))
            .await?;
        let spec = spec.get().as_bytes().to_vec();
        let unsealed = self.take_unsealed(&shares);
        let creating = ready.agent.create(NewContainer {
            id: &config.id,
            spec_json: spec,
            raw: config.raw,
            files: config.files,
            streams: ports,
            host_sockets: self.0.sockets.are_among(&shares),
            start: config.start && unsealed.is_empty(),
        });
        let init = timings.measure("create the container", creating).await?;
        if !unsealed.is_empty()
            && let Err(error) = seal(&ready, &config.id, config.start, &unsealed).await
        {
            delete(&ready, &config.id).await;
            return Err(error);
        }
        let container = Arc::new(Container {
            id: config.id,
            sandbox: self.clone(),
            directory,
            shares,
            stage: watch::Sender::new(Stage::Created),
            exited: watch::Sender::new(false),
            started_ns: Mutex::new(None),
            init,
            terminal: config.stdio.terminal(),
            hub,
            removal: config.removal,
            deleted: AtomicBool::new(false),
            unread: watch::Sender::new(false),
            keepers: Mutex::new(
                config
                    .keeper
                    .into_iter()
                    .map(|pid| (String::new(), pid))
                    .collect(),
            ),
            execs: AtomicU32::new(1),
            oom_kills: AtomicU64::new(0),
        });
        let (streams, carriers) = match container.enter(streams, config.start, config.again).await {
            Ok(entered) => entered,
            Err(error) => {
                delete(&ready, &container.id).await;
                return Err(error);
            }
        };
        let id = container.id.clone();
        self.change(|containers| {
            containers.used = true;
            containers.kept |= !config.volatile;
            containers.unconcluded += 1;
            containers.by_id.insert(id, container.clone());
        });
        slot.filled = true;
        tokio::spawn(live(ready, container.clone(), carriers));
        Ok((Process::init(container, streams), attached))
    }

    fn reserve(&self, id: &str) -> Result<Slot<'_>> {
        self.change(|containers| {
            if containers.ending {
                return Err(Error::wrong_state("the sandbox is ending"));
            }
            if containers.by_id.contains_key(id) {
                return Err(Error::exists("container with given ID already exists"));
            }
            containers.alive += 1;
            Ok(())
        })?;
        Ok(Slot {
            sandbox: self,
            filled: false,
        })
    }

    /// The spec with what only the sandbox knows: namespaces of its other containers, which disks
    /// of the machine the block devices are, and the size of the terminal of who attaches. Left
    /// alone when there is nothing to add.
    fn guest_spec(
        &self,
        config: &ContainerConfig,
        disks: Vec<Value>,
        size: Option<TerminalSize>,
    ) -> Result<Box<RawValue>> {
        if config.joins.is_empty() && disks.is_empty() && size.is_none() {
            return Ok(config.spec.clone());
        }
        let mut spec: Value =
            serde_json::from_str(config.spec.get()).context(|| "read the container's spec")?;
        for (kind, keeper) in &config.joins {
            self.resolve_join(&mut spec, kind, *keeper)?;
        }
        if let Some(size) = size {
            spec["process"]["consoleSize"] = size.to_oci();
        }
        if !disks.is_empty() {
            spec["hullDisks"] = Value::Array(disks);
        }
        to_raw_value(&spec).context(|| "encode the container's spec")
    }

    /// A namespace of another container, named by the process that stands for it on the host,
    /// becomes that in the guest.
    fn resolve_join(&self, spec: &mut Value, kind: &str, keeper: i32) -> Result<()> {
        let owner = self
            .containers()
            .into_iter()
            .find(|container| container.keepers().get("") == Some(&keeper))
            .ok_or_else(|| {
                Error::unsupported(format_args!(
                    "the {kind} namespace of process {keeper} of the host: a guest kernel has \
                     namespaces of its own"
                ))
                .hint("namespaces of another container in the same pod can be joined")
            })?;
        let file = match kind {
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
        Ok(())
    }
}

/// Makes the mounts of a container read-only, in which the guest has made its mount points, and
/// starts it if that is wanted.
async fn seal(ready: &Ready, container: &str, start: bool, mounts: &[OwnedFd]) -> Result<()> {
    for mount in mounts {
        shares::seal(mount)
            .await
            .context(|| format!("make what is read-only in container {} so", container))?;
    }
    match start {
        true => ready.agent.start(container).await,
        false => Ok(()),
    }
}

/// Removes a container whose creation fails when it is in the guest already.
async fn delete(ready: &Ready, container: &str) {
    if let Err(error) = ready.agent.delete(container).await {
        tracing::debug!("{error}");
    }
}

impl Container {
    /// Begins with its streams, and writes down that it is there, `again` if it was before. The
    /// streams that its caller has, and those who carry the others.
    async fn enter(
        &self,
        streams: Vec<OwnedFd>,
        start: bool,
        again: bool,
    ) -> Result<(Vec<OwnedFd>, Option<Carriers>)> {
        let entered = match &self.hub {
            Some(hub) => (Vec::new(), Some(hub.carry(streams).await?)),
            None => (streams, None),
        };
        match start {
            true => self.mark_started()?,
            false => self.write_status()?,
        }
        let container = || self.id.clone();
        if !again {
            self.sandbox.emit(EventKind::Created {
                container: container(),
            });
        }
        if start {
            self.sandbox.emit(EventKind::Started {
                container: container(),
            });
        }
        Ok(entered)
    }
}
