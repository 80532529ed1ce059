//! One container of a sandbox, from its creation to its end.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_device_control::disk_serial;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::config::{ContainerConfig, DiskConfig, ProcessConfig, Removal, Stdio};
use crate::control::protocol::AttachOptions;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::guest::boot::MACHINE_EXIT_GRACE;
use crate::guest::hub::{Carriers, Hub};
use crate::guest::streams;
use crate::log;
use crate::metrics::{Metrics, ProcessInfo};
use crate::network;
use crate::process::Process;
use crate::sandbox::{Ready, Reason, Sandbox};
use crate::store::{Directory, Exit, State, Status, remove_all, unix_time_ns};

const SIGKILL: u32 = 9;

/// How long a container that is removed by force may take to pass on what it wrote.
const UNREAD_GRACE: Duration = Duration::from_secs(1);

/// How long the guest may take to end a container that is removed by force.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a container may take to end after SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How far a container is, beside what [`State`] says of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Stage {
    /// Its init waits to be started.
    Created,
    /// Its init runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its init has ended, and its end is written down; something of it is still there.
    Ending(Exit),
    /// It has ended, and nothing of it is left but its directory.
    Stopped(Exit),
}

impl Stage {
    fn state(&self) -> State {
        match self {
            Stage::Created => State::Created,
            Stage::Running => State::Running,
            Stage::Paused => State::Paused,
            Stage::Ending(_) | Stage::Stopped(_) => State::Stopped,
        }
    }
}

/// A container in the guest.
#[derive(Debug)]
pub struct Container {
    id: String,
    sandbox: Sandbox,
    directory: Directory,
    shares: Vec<String>,
    stage: watch::Sender<Stage>,
    started_ns: Mutex<Option<u64>>,
    /// Process id of its init, in the guest.
    init: u32,
    terminal: bool,
    hub: Option<Arc<Hub>>,
    removal: Option<Removal>,
    /// Somebody deletes it.
    deleted: AtomicBool,
    /// It is removed by force: its output need not be read.
    unread: watch::Sender<bool>,
    /// Processes that stand for its own on the host: the init's has the empty name.
    keepers: Mutex<BTreeMap<String, i32>>,
    execs: AtomicU32,
    /// Processes killed for lack of memory that an event was sent for.
    oom_kills: AtomicU64,
}

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
        let ready = self.ready().await?;
        let spec = self.guest_spec(&config)?;
        self.configure_network(&ready).await?;
        if !config.sysctl.is_empty() {
            ready.agent.set_sysctls(config.sysctl).await?;
        }
        let hub = match config.stdio {
            Stdio::Hub {
                terminal,
                log_limit,
                ..
            } => {
                let log = log::Writer::create(directory.try_clone()?, log_limit)
                    .context(|| format!("create the log of container {}", config.id))?;
                Some(Hub::new(log, terminal))
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
        let creating = ready
            .agent
            .create(&config.id, spec, config.raw, ports, config.start);
        let init = timings.measure("create the container", creating).await?;
        let container = Arc::new(Container {
            id: config.id,
            sandbox: self.clone(),
            directory,
            shares,
            stage: watch::Sender::new(Stage::Created),
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
        let (streams, carriers) = match &container.hub {
            Some(hub) => (Vec::new(), Some(hub.carry(streams).await?)),
            None => (streams, None),
        };
        let id = container.id.clone();
        self.emit(EventKind::Created {
            container: id.clone(),
        });
        if config.start {
            container.set_started()?;
        } else {
            container.write_status()?;
        }
        self.change(|containers| {
            containers.used = true;
            containers.kept |= !config.volatile;
            containers.unconcluded += 1;
            containers.by_id.insert(id, container.clone());
        });
        slot.filled = true;
        tokio::spawn(live(ready, container.clone(), carriers));
        let process = Process::init(container, streams);
        if let Some(size) = attach.and_then(|options| options.size)
            && let Err(error) = process.resize(size).await
        {
            tracing::debug!("cannot set the size of a terminal: {error}");
        }
        Ok((process, attached))
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

    /// The spec with what only the sandbox knows: namespaces of its other containers, and which
    /// disks of the machine the block devices are. Left alone when there is nothing to add.
    fn guest_spec(&self, config: &ContainerConfig) -> Result<Box<RawValue>> {
        if config.joins.is_empty() && config.disks.is_empty() {
            return Ok(config.spec.clone());
        }
        let mut spec: Value =
            serde_json::from_str(config.spec.get()).context(|| "read the container's spec")?;
        for (kind, keeper) in &config.joins {
            self.resolve_join(&mut spec, kind, *keeper)?;
        }
        if !config.disks.is_empty() {
            let named = config.disks.iter().map(|disk| {
                let DiskConfig { major, minor, .. } = disk.device;
                let index = self.disk(&disk.path, disk.device)?;
                Ok(json!({"major": major, "minor": minor, "serial": disk_serial(index)}))
            });
            spec["hullDisks"] = Value::Array(named.collect::<Result<Vec<_>>>()?);
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

    /// Which disk of the machine a block device is.
    fn disk(&self, path: &str, device: DiskConfig) -> Result<usize> {
        let DiskConfig { major, minor, .. } = device;
        let refused = |why: &str| {
            Error::unsupported(format_args!(
                "linux.devices: {path} (b {major}:{minor}): {why}"
            ))
        };
        let disks = &self.0.disks;
        let same = |own: &DiskConfig| (own.major, own.minor) == (major, minor);
        let index = disks.iter().position(same).ok_or_else(|| {
            refused("the machine of its pod already runs, and disks are added when it starts")
        })?;
        match disks[index].read_only && !device.read_only {
            true => Err(refused(
                "the machine of its pod already runs, and only reads from this disk",
            )),
            false => Ok(index),
        }
    }
}

/// From creation to the end of the init, and of what is left then.
async fn live(ready: Ready, container: Arc<Container>, mut carriers: Option<Carriers>) {
    let sandbox = &container.sandbox;
    let exit = tokio::select! {
        biased;
        down = sandbox.down() => Exit::because(down.status, down.reason),
        exit = ended_in_guest(&ready, &container) => exit,
    };
    if let Some(carriers) = &mut carriers {
        let mut unread = container.unread.subscribe();
        tokio::select! {
            () = carriers.done() => {}
            _ = sandbox.down() => {}
            // Output that nobody reads must not keep a container that is removed.
            _ = unread.wait_for(|unread| *unread) => {}
        }
        // Finished, or stuck with a client that does not read from a container that is no more.
        carriers.abort();
    }
    let last = sandbox.change(|containers| {
        containers.alive -= 1;
        containers.alive == 0
    });
    if last && sandbox.ends_with_last_container() {
        // The machine ends with it, and with that everything.
        sandbox.down().await;
    } else {
        let leaving = async {
            sandbox
                .release_network_of(&container.id, &ready.agent)
                .await;
            if let Err(error) = ready.agent.delete(&container.id).await {
                tracing::debug!("{error}");
            }
            sandbox.remove_shares(&container.shares).await;
        };
        tokio::select! {
            () = leaving => {}
            _ = sandbox.down() => {}
        }
    }
    container.emit_exit("", &exit);
    container.conclude(&exit);
    if container.removal.is_some() || container.deleted.load(Ordering::Relaxed) {
        container.forget();
    }
    container.stage.send_replace(Stage::Ending(exit.clone()));
    sandbox.change(|containers| containers.unconcluded -= 1);
    if sandbox.is_down_now() {
        // Who learns of the end finds nothing of the sandbox left.
        sandbox.gone().await;
    }
    if let Some(hub) = &container.hub {
        hub.finish().await;
    }
    container.stage.send_replace(Stage::Stopped(exit));
}

async fn ended_in_guest(ready: &Ready, container: &Container) -> Exit {
    match ready.agent.wait(&container.id, "").await {
        Ok(exit) => exit,
        // The agent went first; the machine follows, and knows more.
        Err(error) => {
            let down = container.sandbox.down();
            match tokio::time::timeout(MACHINE_EXIT_GRACE, down).await {
                Ok(down) => Exit::because(down.status, down.reason),
                Err(_) => Exit::because(crate::store::EXIT_SANDBOX_FAILED, error.message),
            }
        }
    }
}

impl Container {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its sandbox.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// Its directory on the host.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Whether its init has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.terminal
    }

    /// How far it is.
    pub fn state(&self) -> State {
        self.stage.borrow().state()
    }

    /// What it writes down of itself.
    pub fn status(&self) -> Status {
        let stage = self.stage.borrow().clone();
        let started_ns = *self.started();
        let alive = stage.state() != State::Stopped;
        Status {
            started_ns,
            exit: match &stage {
                Stage::Ending(exit) | Stage::Stopped(exit) => Some(exit.clone()),
                _ => None,
            },
            addresses: self.sandbox.addresses(),
            processes: match alive {
                true => self.sandbox.processes(),
                false => Default::default(),
            },
            ..Status::new(stage.state())
        }
    }

    fn write_status(&self) -> Result<()> {
        self.status().write(&self.directory)
    }

    fn started(&self) -> MutexGuard<'_, Option<u64>> {
        // A number is valid at any time.
        self.started_ns
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves from one stage to another, unless it has ended meanwhile.
    fn advance(&self, to: Stage) -> Result<()> {
        let moved = self.stage.send_if_modified(|stage| {
            let alive = stage.state() != State::Stopped;
            if alive {
                *stage = to;
            }
            alive
        });
        match moved {
            true => self.write_status(),
            false => Ok(()),
        }
    }

    fn set_started(&self) -> Result<()> {
        *self.started() = Some(unix_time_ns());
        self.advance(Stage::Running)?;
        self.sandbox.emit(EventKind::Started {
            container: self.id.clone(),
        });
        Ok(())
    }

    /// Leaves of a container that has ended what is to be left.
    fn conclude(&self, exit: &Exit) {
        if let Some(removal) = &self.removal {
            // Its removal by hand undoes what plugins could not.
            if !network::is_attached(&self.directory) {
                return remove(&self.id, removal);
            }
        }
        let mut status = self.status();
        status.state = State::Stopped;
        status.exit = Some(exit.clone());
        status.processes = Default::default();
        // An engine that has removed the container does not want to know.
        if let Err(error) = status.write(&self.directory)
            && self.directory.is_there()
        {
            tracing::error!("{error}");
        }
    }

    /// Fails unless the container is in one of these states. The words are runc's, which engines
    /// look for.
    fn require(&self, allowed: &[State], what: &str) -> Result<()> {
        let state = self.state();
        if allowed.contains(&state) {
            return Ok(());
        }
        Err(Error::wrong_state(match state {
            State::Stopped => "container not running".to_owned(),
            _ => format!("cannot {what} a container that is {state}"),
        }))
    }

    fn require_alive(&self, what: &str) -> Result<()> {
        self.require(&[State::Created, State::Running, State::Paused], what)
    }

    /// Lets the init of a created container run.
    ///
    /// # Errors
    /// `WrongState` when it was started before; `CommandNotFound` and `NotExecutable`.
    pub async fn start(&self) -> Result<()> {
        self.require(&[State::Created], "start")?;
        self.sandbox.look_for_resolver().await;
        let agent = self.sandbox.ready().await?.agent;
        agent.start(&self.id).await?;
        self.set_started()
    }

    /// Executes a further process. With [`Stdio::Handover`] its streams are with the process.
    ///
    /// # Errors
    /// `WrongState` when the container does not run; `CommandNotFound` and `NotExecutable`.
    pub async fn exec(self: &Arc<Self>, config: ProcessConfig) -> Result<Process> {
        self.require(&[State::Running], "exec in")?;
        let ready = self.sandbox.ready().await?;
        let (ports, streams) = streams::open(&ready.devices, config.stdio).await?;
        let exec = format!("exec{}", self.execs.fetch_add(1, Ordering::Relaxed));
        let event = |kind: fn(String, String) -> EventKind| {
            self.sandbox.emit(kind(self.id.clone(), exec.clone()));
        };
        event(|container, exec| EventKind::ExecAdded { container, exec });
        if let Some(keeper) = config.keeper {
            self.keepers().insert(exec.clone(), keeper);
        }
        let process = config.process.get().as_bytes().to_vec();
        let started = ready
            .agent
            .exec(&self.id, &exec, process, config.raw, ports)
            .await;
        if let Err(error) = started {
            self.forget_exec(&exec);
            return Err(error);
        }
        event(|container, exec| EventKind::ExecStarted { container, exec });
        if let Some(size) = config.size
            && let Err(error) = ready.agent.resize(&self.id, &exec, size).await
        {
            tracing::debug!("cannot set the size of a terminal: {error}");
        }
        Ok(Process::exec(
            self.clone(),
            exec,
            streams,
            config.stdio.terminal(),
        ))
    }

    /// Attaches to the streams of an init that has a hub: a terminal, or input, output and error.
    ///
    /// # Errors
    /// `Unsupported` when somebody else has its streams.
    pub async fn attach(&self, input: bool) -> Result<Vec<OwnedFd>> {
        let hub = self.hub.as_ref().ok_or_else(|| {
            Error::unsupported(format_args!(
                "attaching to container {}: its engine has its streams",
                self.id
            ))
        })?;
        hub.attach(input).await
    }

    /// Waits until the clients of its hub have read all output.
    pub async fn drained(&self) {
        if let Some(hub) = &self.hub {
            hub.drained().await;
        }
    }

    /// Sends a signal to its init, or to all its processes.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn signal(&self, signal: u32, all: bool) -> Result<()> {
        self.require_alive("signal")?;
        let agent = self.sandbox.ready().await?.agent;
        agent.signal(&self.id, "", signal, all).await
    }

    /// Sends the stop signal, and SIGKILL when it has not ended in time; the machine is ended when
    /// that has no effect.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn stop(&self, signal: u32, timeout: Duration) -> Result<Exit> {
        self.require_alive("stop")?;
        if self.state() == State::Paused {
            self.set_frozen(false).await?;
        }
        // A container that ends just now cannot be signalled, and need not be.
        if let Err(error) = self.signal(signal, false).await {
            tracing::debug!("stop signal: {error}");
        }
        if let Ok(exit) = tokio::time::timeout(timeout, self.ended()).await {
            return Ok(exit);
        }
        let killing = async {
            if let Err(error) = self.signal(SIGKILL, true).await {
                tracing::debug!("{error}");
            }
            self.ended().await
        };
        if let Ok(exit) = tokio::time::timeout(KILL_GRACE, killing).await {
            return Ok(exit);
        }
        // A guest that does not react even to that loses its machine.
        self.sandbox.shutdown(Reason::Unresponsive);
        Ok(self.ended().await)
    }

    /// Freezes or thaws its processes.
    ///
    /// # Errors
    /// `WrongState` when it is not running, or not frozen.
    pub async fn set_frozen(&self, frozen: bool) -> Result<()> {
        let (from, to, what) = match frozen {
            true => (State::Running, Stage::Paused, "pause"),
            false => (State::Paused, Stage::Running, "resume"),
        };
        self.require(&[from], what)?;
        let agent = self.sandbox.ready().await?.agent;
        agent.freeze(&self.id, frozen).await?;
        self.advance(to)?;
        let container = self.id.clone();
        self.sandbox.emit(match frozen {
            true => EventKind::Paused { container },
            false => EventKind::Resumed { container },
        });
        Ok(())
    }

    /// Changes limits: the spec's `linux.resources`.
    ///
    /// # Errors
    /// `WrongState` when it does not run; the agent cannot set one.
    pub async fn update(&self, resources: &RawValue) -> Result<()> {
        self.require_alive("update")?;
        let agent = self.sandbox.ready().await?.agent;
        agent.update(&self.id, resources).await
    }

    /// What it uses, and what its sandbox costs the host.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn metrics(&self) -> Result<Metrics> {
        self.require_alive("measure")?;
        let agent = self.sandbox.ready().await?.agent;
        let (host_memory, host_cpu_ns) = self.sandbox.cost();
        Ok(Metrics {
            host_memory,
            host_cpu_ns,
            ..agent.metrics(&self.id).await?
        })
    }

    /// Its processes.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn process_list(&self) -> Result<Vec<ProcessInfo>> {
        self.require_alive("list the processes of")?;
        let agent = self.sandbox.ready().await?.agent;
        agent.processes(&self.id).await
    }

    /// A process of it has ended; its init has the empty name.
    pub(crate) fn emit_exit(&self, exec: &str, exit: &Exit) {
        if exit.oom_killed {
            // The event of the guest may not have come in time.
            self.oom_killed(1);
        }
        self.sandbox.emit(EventKind::Exited {
            container: self.id.clone(),
            exec: exec.to_owned(),
            exit: exit.clone(),
        });
    }

    /// The guest's kernel has killed so many processes of it in all for lack of memory, or more.
    pub(crate) fn oom_killed(&self, total: u64) {
        if self.oom_kills.fetch_max(total, Ordering::Relaxed) < total {
            self.sandbox.emit(EventKind::Oom {
                container: self.id.clone(),
            });
        }
    }

    /// Waits until it has ended and nothing of it is left but its directory.
    pub async fn ended(&self) -> Exit {
        let mut stage = self.stage.subscribe();
        let stage = stage.wait_for(|stage| matches!(stage, Stage::Stopped(_)));
        match stage.await.as_deref() {
            Ok(Stage::Stopped(exit)) => exit.clone(),
            // The sender lives as long as the container.
            _ => Exit::now(crate::store::EXIT_SANDBOX_FAILED),
        }
    }

    /// Forgets the container. One that has not ended is killed.
    ///
    /// # Errors
    /// None today; the sandbox is ended when its guest does not react.
    pub async fn delete(&self) -> Result<()> {
        self.deleted.store(true, Ordering::Relaxed);
        if self.state() != State::Stopped {
            // Nobody wants to know any more what it has said.
            self.unread.send_replace(true);
            if self.sandbox.lock().alive <= 1 {
                self.sandbox.0.unread.send_replace(true);
            }
            let ending = self.end_by_force();
            if tokio::time::timeout(DELETE_TIMEOUT, ending).await.is_err() {
                self.sandbox.shutdown(Reason::Removed);
                self.ended().await;
            }
        }
        self.forget();
        Ok(())
    }

    /// The sandbox has it no more, once.
    fn forget(&self) {
        let known = self
            .sandbox
            .change(|containers| containers.by_id.remove(&self.id));
        if known.is_some() {
            self.sandbox.emit(EventKind::Deleted {
                container: self.id.clone(),
            });
        }
    }

    async fn end_by_force(&self) {
        let Ok(ready) = self.sandbox.ready().await else {
            self.ended().await;
            return;
        };
        // It may be ending by itself.
        if let Err(error) = ready.agent.signal(&self.id, "", SIGKILL, true).await {
            tracing::debug!("{error}");
        }
        let ended = tokio::time::timeout(UNREAD_GRACE, self.ended()).await;
        if ended.is_err() {
            // Nobody takes what it wrote: the agent lets go of that with the container.
            if let Err(error) = ready.agent.delete(&self.id).await {
                tracing::debug!("{error}");
            }
            self.ended().await;
        }
    }

    pub(crate) fn forget_exec(&self, name: &str) {
        self.keepers().remove(name);
    }

    fn keepers(&self) -> MutexGuard<'_, BTreeMap<String, i32>> {
        // A map is valid at any time.
        self.keepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process ids of those that stand for its processes on the host, the init's first.
    pub fn keeper_pids(&self) -> Vec<i32> {
        self.keepers().values().copied().collect()
    }
}

/// Removes what is left of a container.
fn remove(id: &str, removal: &Removal) {
    let mut errors = Vec::new();
    errors.extend(remove_all(&removal.directory).err());
    for link in &removal.links {
        let leads_to_it = std::fs::read_link(link).is_ok_and(|to| to == Path::new(id));
        if leads_to_it && let Err(error) = std::fs::remove_file(link) {
            errors.push(Error::new(format!(
                "cannot remove {}: {error}",
                link.display()
            )));
        }
    }
    for error in errors {
        tracing::error!("{error}");
    }
}

/// Whether an error says that a container is not there any more.
pub(crate) fn has_ended(error: &Error) -> bool {
    matches!(
        error.kind,
        ErrorKind::NotFound | ErrorKind::WrongState | ErrorKind::Gone
    )
}
