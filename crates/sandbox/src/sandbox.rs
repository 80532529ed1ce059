//! A sandbox: one guest and the containers in it, from the start of its machine to the moment when
//! nothing of it is left on the host.
//!
//! [`Sandbox::boot`] starts the machine and returns; the guest boots while the caller opens shares
//! and sets up networks. What needs the guest waits for it. A task of the sandbox's own watches the
//! machine and takes everything down in one place, whatever ends it: see [`Stage`].

mod run;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_machine::Features;
use hull_protocol::AGENT_PORT;
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::JoinHandle;

use crate::cgroup;
use crate::config::{DiskConfig, EndPolicy, SandboxConfig, Share};
use crate::container::{Container, NOT_RUNNING};
use crate::core_scheduling;
use crate::cost::{self, HostMemory};
use crate::disks::Disks;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::events::{Event, EventKind};
use crate::guest::boot::{EXIT_GRACE, MACHINE_EXIT_GRACE};
use crate::guest::processes::{Disk, Guest, MachineHandle};
use crate::guest::{Agent, Devices, Dials};
use crate::network::{self, Nets};
use crate::reach::{self, GuestDevice};
use crate::shares;
use crate::shares::sockets::Sockets;
use crate::store::{
    EXIT_SANDBOX_FAILED, Exit, HostProcesses, SandboxDir, SandboxPath, unix_time_ns,
};
use crate::timings::{Step, Timings, now_ns};

/// How long the end of a connection may take to be noticed.
const UNUSED_GRACE: Duration = Duration::from_secs(1);

/// Events that a slow receiver may be behind before it misses some.
const EVENTS_AHEAD: usize = 1024;

/// A sandbox. A handle: clones are the same sandbox, and dropping all of them does not end it.
#[derive(Debug, Clone)]
pub struct Sandbox(pub(crate) Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    dir: SandboxDir,
    /// Where shares are added, also while the guest still boots.
    pub devices: Arc<Devices>,
    pub disks: Disks,
    pub network: tokio::sync::Mutex<network::Stage>,
    pub nets: Nets,
    features: Features,
    pub processes: HostProcesses,
    machine: MachineHandle,
    stage: watch::Sender<Stage>,
    /// Somebody wants the end of the sandbox, whatever runs in it.
    abort: watch::Sender<Option<Down>>,
    /// A container is removed by force: its output need not be read.
    pub unread: watch::Sender<bool>,
    containers: Mutex<Containers>,
    /// The mounts of shares that become read-only with the creation of their container, by name.
    unsealed: Mutex<BTreeMap<String, OwnedFd>>,
    pub sockets: Sockets,
    addresses: Mutex<Vec<IpAddr>>,
    changed: Notify,
    events: broadcast::Sender<Event>,
    pub timings: Timings,
    end: EndPolicy,
}

/// How far a sandbox is.
///
/// ```text
/// Booting → Ready ─→ Down → Gone
///         ↘────────↗
/// ```
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    /// The guest comes up.
    Booting,
    /// The guest answers.
    Ready(Ready),
    /// The machine is no more: containers write down how they have ended.
    Down(Down),
    /// Nothing of the sandbox is left on the host.
    Gone(Down),
}

/// A guest that has come up.
#[derive(Clone, Debug)]
pub(crate) struct Ready {
    pub agent: Agent,
    pub devices: Arc<Devices>,
}

/// Why a machine is no more.
#[derive(Debug, Clone)]
pub(crate) struct Down {
    /// For people.
    pub reason: String,
    /// Exit status of containers that it took along.
    pub status: i32,
    /// What calls that need the guest fail with.
    pub error: Error,
}

impl Down {
    fn broken(reason: impl Into<String>) -> Self {
        let reason = reason.into();
        Self {
            error: Error::guest(reason.clone()),
            reason,
            status: EXIT_SANDBOX_FAILED,
        }
    }

    fn because(reason: &Reason) -> Self {
        let text = reason.to_string();
        Self {
            status: match reason {
                Reason::Terminated => 128 + 15,
                Reason::Removed | Reason::Unresponsive => 128 + 9,
            },
            error: Error::wrong_state(text.clone()),
            reason: text,
        }
    }

    fn ended() -> Self {
        let reason = "the sandbox has ended";
        Self {
            reason: reason.into(),
            status: EXIT_SANDBOX_FAILED,
            error: Error::wrong_state(reason),
        }
    }
}

/// Why a sandbox is shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its process was told to end.
    Terminated,
    /// A container of it is removed, and its guest does not answer.
    Removed,
    /// A container did not react to SIGKILL.
    Unresponsive,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Reason::Terminated => "the sandbox process was told to end",
            Reason::Removed => "it was removed",
            Reason::Unresponsive => "it did not react to SIGKILL, so its machine was ended",
        })
    }
}

/// How a sandbox has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxExit {
    /// Why, for people.
    pub reason: String,
}

#[derive(Debug, Default)]
pub(crate) struct Containers {
    pub by_id: BTreeMap<String, Arc<Container>>,
    /// Containers that have not ended.
    pub alive: usize,
    /// Containers that have not written down how they have ended.
    pub unconcluded: usize,
    /// Those who may still bring a container.
    pub holds: usize,
    /// There was a container: from now on the sandbox ends with the last one.
    pub used: bool,
    /// A container wrote what has to survive.
    pub kept: bool,
    /// No further container is created.
    pub ending: bool,
}

/// Keeps a sandbox that has had no container yet from ending.
#[derive(Debug)]
pub struct Hold(Sandbox);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.change(|containers| containers.holds -= 1);
    }
}

impl Sandbox {
    /// Starts the machine of a sandbox, whose guest then boots. `disks` are the opened block
    /// devices of the configuration's disks. Must be called on a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// A process of the machine cannot be started.
    pub async fn boot(
        config: SandboxConfig,
        dir: SandboxDir,
        disks: Vec<OwnedFd>,
    ) -> Result<Sandbox> {
        Self::boot_then(config, dir, disks, || Ok(())).await
    }

    /// The same; `started` is called when the machine's processes have been started, and before
    /// this one has further threads.
    pub(crate) async fn boot_then(
        config: SandboxConfig,
        dir: SandboxDir,
        disks: Vec<OwnedFd>,
        started: impl FnOnce() -> Result<()>,
    ) -> Result<Sandbox> {
        let timings = Timings::default();
        if config.began_ns > 0 {
            timings.step("start the sandbox process", config.began_ns);
        }
        let begin = now_ns();
        let disks = with_files(&config.disks, disks)?;
        let (guest, dials) =
            Guest::start(dir.path(), &config.machine, config.core_scheduling, disks)?;
        let processes = guest.processes();
        started()?;
        if config.core_scheduling {
            core_scheduling::isolate(processes.guest())?;
        }
        let (cgroup, bounds) = (config.cgroup.clone(), config.bounds.clone());
        let directory = dir.path().directory();
        let confining = tokio::task::spawn_blocking(move || {
            cgroup::machine::confine(&cgroup, &bounds, &directory, processes)
        });
        timings.step("start device process and machine", begin);
        Ok(Self::around(config, dir, guest, dials, confining, timings))
    }

    /// A sandbox whose guest has been started, and whose processes are being put into control
    /// groups.
    pub(crate) fn around(
        config: SandboxConfig,
        dir: SandboxDir,
        guest: Guest,
        dials: Dials,
        confining: JoinHandle<Result<()>>,
        timings: Timings,
    ) -> Sandbox {
        let sandbox = Sandbox(Arc::new(Inner {
            devices: guest.control.clone(),
            disks: Disks::new(
                config.disks.clone(),
                guest.spare_disks,
                guest.features.disks,
            ),
            network: tokio::sync::Mutex::default(),
            nets: guest.nets.clone(),
            features: guest.features,
            processes: guest.processes(),
            machine: guest.handle(),
            stage: watch::Sender::new(Stage::Booting),
            abort: watch::Sender::new(None),
            unread: watch::Sender::new(false),
            containers: Mutex::default(),
            unsealed: Mutex::default(),
            sockets: Sockets::default(),
            addresses: Mutex::default(),
            changed: Notify::new(),
            events: broadcast::Sender::new(EVENTS_AHEAD),
            timings,
            end: config.end,
            dir,
        }));
        // Until the caller has said what it wants.
        let hold = sandbox.hold();
        tokio::spawn(run::run(sandbox.clone(), guest, dials, confining, config));
        drop(hold);
        sandbox
    }

    /// Where it is on the host.
    pub fn path(&self) -> &SandboxPath {
        self.0.dir.path()
    }

    /// Its events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.0.events.subscribe()
    }

    /// Where the time of its start went so far.
    pub fn timings(&self) -> Vec<Step> {
        self.0.timings.steps()
    }

    /// Its host processes.
    pub fn processes(&self) -> HostProcesses {
        self.0.processes
    }

    /// What the guest can reach: its devices.
    ///
    /// # Errors
    /// The process that holds them has ended.
    pub async fn reach(&self) -> Result<Vec<GuestDevice>> {
        let served = self.0.devices.list().await?;
        let (features, processes) = (&self.0.features, &self.0.processes);
        Ok(reach::devices(features, served, processes))
    }

    /// What it costs the host: memory, and processor time in nanoseconds.
    pub fn cost(&self) -> (HostMemory, u64) {
        cost::measure(&self.0.processes)
    }

    /// Stops the guest and everything in it: no code of it runs when this returns. Processes on the
    /// host that talk to it find that it does not answer.
    ///
    /// # Errors
    /// Why the guest is not there, or does not stop.
    pub async fn pause(&self) -> Result<()> {
        self.in_guest(async |_| self.0.machine.pause().await).await
    }

    /// Lets a paused guest go on: its monotonic clock from where it stopped, its wall clock with
    /// the time of now.
    ///
    /// # Errors
    /// Why the guest is not there, or does not go on.
    pub async fn resume(&self) -> Result<()> {
        self.in_guest(async |guest| {
            self.0.machine.resume().await?;
            guest.agent.set_clock(unix_time_ns()).await
        })
        .await
    }

    /// Ends the connection with the agent, which dials again: what a snapshot or the vsock device
    /// does to it. Containers, processes and their streams go on. Returns the number of connections
    /// so far.
    ///
    /// # Errors
    /// Why the guest is not there.
    pub async fn reconnect(&self) -> Result<u64> {
        self.in_guest(async |guest| {
            guest.devices.cut_stream(AGENT_PORT).await?;
            guest.agent.hello().await?;
            Ok(guest.agent.connections())
        })
        .await
    }

    /// Keeps it from ending for lack of containers as long as the result lives.
    pub fn hold(&self) -> Hold {
        self.change(|containers| containers.holds += 1);
        Hold(self.clone())
    }

    /// Adds directories and files of the host for a container that is to be created.
    ///
    /// # Errors
    /// `InvalidArgument` when not as many mounts as shares come; the host's kernel or the fs device
    /// refuses one. Those before it are there.
    pub async fn add_shares(&self, shares: &[Share], mounts: Vec<OwnedFd>) -> Result<()> {
        if shares.len() != mounts.len() {
            return Err(Error::invalid("as many mounts as shares must come"));
        }
        for (share, mount) in shares.iter().zip(mounts) {
            let unsealed = match share.sealed {
                true => Some(mount.try_clone().context(|| "keep the mount of a share")?),
                false => None,
            };
            if share.is_file {
                let looked = self.0.sockets.add(&share.name, &mount);
                looked.context(|| format!("share {}", share.name))?;
            }
            let added = shares::add(&self.0.devices, self.path(), share, mount).await;
            if let Err(error) = added {
                self.0.sockets.remove(std::slice::from_ref(&share.name));
                // Shares are added while the guest boots: there may be no agent yet.
                return Err(self.cause_of(error, async {}).await);
            }
            if let Some(mount) = unsealed {
                self.unsealed().insert(share.name.clone(), mount);
            }
        }
        Ok(())
    }

    /// Takes shares away that no container uses.
    pub async fn remove_shares(&self, names: &[String]) {
        self.unsealed().retain(|name, _| !names.contains(name));
        self.0.sockets.remove(names);
        shares::remove(&self.0.devices, self.path(), names).await;
    }

    /// The mounts of these shares that are to become read-only.
    pub(crate) fn take_unsealed(&self, names: &[String]) -> Vec<OwnedFd> {
        let mut unsealed = self.unsealed();
        names
            .iter()
            .filter_map(|name| unsealed.remove(name))
            .collect()
    }

    fn unsealed(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        // A map of descriptors is valid at any time.
        let unsealed = &self.0.unsealed;
        unsealed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All containers that were not deleted.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().by_id.values().cloned().collect()
    }

    /// The container of this id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        self.lock()
            .by_id
            .get(id)
            .cloned()
            .ok_or_else(|| Error::not_found(format!("container {id:?} does not exist")))
    }

    /// Ends the sandbox by force, with all that is in it. Returns at once: see [`Sandbox::ended`].
    pub fn shutdown(&self, reason: Reason) {
        self.0.abort.send_if_modified(|abort| {
            let first = abort.is_none();
            if first {
                *abort = Some(Down::because(&reason));
            }
            first
        });
    }

    /// Ends a sandbox that would go on without containers, as one ends with its last container;
    /// whether it has none that lives. Returns at once: see [`Sandbox::ended`].
    pub fn end_if_idle(&self) -> bool {
        self.change(|containers| {
            let idle = containers.alive == 0;
            containers.ending |= idle;
            idle
        })
    }

    /// Whether no further container is created.
    pub fn is_ending(&self) -> bool {
        self.lock().ending
    }

    /// Whether nothing of it is left on the host.
    pub fn is_over(&self) -> bool {
        matches!(*self.0.stage.borrow(), Stage::Gone(_))
    }

    /// Lets a sandbox end that nobody has anything to do with but `holds` of its own: it was
    /// started by a process that has gone before there was a container. Connections of such a
    /// process may be noticed to be closed only within a moment. Whether it ends.
    pub async fn end_if_unused(&self, holds: usize) -> bool {
        let unused = async {
            loop {
                let changed = self.0.changed.notified();
                {
                    let mut containers = self.lock();
                    if containers.alive == 0 && (containers.used || containers.holds <= holds) {
                        containers.ending = true;
                    }
                    if containers.ending || containers.used {
                        break containers.ending;
                    }
                }
                changed.await;
            }
        };
        let ending = tokio::time::timeout(UNUSED_GRACE, unused).await;
        self.0.changed.notify_waiters();
        ending.unwrap_or(false)
    }

    /// Waits until nothing of the sandbox is left on the host.
    pub async fn ended(&self) -> SandboxExit {
        let down = self.gone().await;
        SandboxExit {
            reason: down.reason,
        }
    }

    /// The guest, as soon as it has come up.
    ///
    /// # Errors
    /// Why it is not there.
    pub(crate) async fn ready(&self) -> Result<Ready> {
        let mut stage = self.0.stage.subscribe();
        let stage = stage.wait_for(|stage| !matches!(stage, Stage::Booting));
        match stage.await.as_deref() {
            Ok(Stage::Ready(ready)) => Ok(ready.clone()),
            Ok(Stage::Down(down) | Stage::Gone(down)) => Err(down.error.clone()),
            // The sender lives as long as the sandbox.
            Ok(Stage::Booting) | Err(_) => Err(Error::guest("the guest did not come up")),
        }
    }

    /// The guest, if it is there now.
    pub(crate) fn ready_now(&self) -> Option<Ready> {
        match &*self.0.stage.borrow() {
            Stage::Ready(ready) => Some(ready.clone()),
            _ => None,
        }
    }

    /// Waits for the end of the machine.
    pub(crate) async fn down(&self) -> Down {
        let mut stage = self.0.stage.subscribe();
        let stage = stage.wait_for(|stage| matches!(stage, Stage::Down(_) | Stage::Gone(_)));
        match stage.await.as_deref() {
            Ok(Stage::Down(down) | Stage::Gone(down)) => down.clone(),
            _ => Down::ended(),
        }
    }

    /// The same, or until somebody wants that end.
    pub(crate) async fn is_down(&self) {
        tokio::select! {
            _ = self.down() => {}
            _ = self.aborted() => {}
            () = self.is_ending_now() => {}
        }
    }

    async fn is_ending_now(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.lock().ending {
                return;
            }
            changed.await;
        }
    }

    /// Whether the machine is no more.
    pub(crate) fn is_down_now(&self) -> bool {
        matches!(*self.0.stage.borrow(), Stage::Down(_) | Stage::Gone(_))
    }

    pub(crate) fn ends_with_last_container(&self) -> bool {
        self.0.end == EndPolicy::LastContainer
    }

    /// Waits until nothing is left of the sandbox.
    pub(crate) async fn gone(&self) -> Down {
        let mut stage = self.0.stage.subscribe();
        let stage = stage.wait_for(|stage| matches!(stage, Stage::Gone(_)));
        match stage.await.as_deref() {
            Ok(Stage::Gone(down)) => down.clone(),
            _ => Down::ended(),
        }
    }

    async fn aborted(&self) -> Down {
        let mut abort = self.0.abort.subscribe();
        let down = match abort.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(down)) => Some(down.clone()),
            // The sender lives as long as the sandbox.
            _ => None,
        };
        match down {
            Some(down) => down,
            None => std::future::pending().await,
        }
    }

    /// Waits until nobody wants the output of containers any more.
    async fn is_unread(&self) {
        // The sender lives as long as the sandbox.
        let _ = self.0.unread.subscribe().wait_for(|unread| *unread).await;
    }

    /// Waits until the sandbox has no reason to go on, after which no container is created any
    /// more.
    async fn done(&self) {
        loop {
            let changed = self.0.changed.notified();
            {
                let mut containers = self.lock();
                let done = match self.0.end {
                    EndPolicy::LastContainer => {
                        containers.alive == 0 && (containers.used || containers.holds == 0)
                    }
                    EndPolicy::Explicit => false,
                };
                if done || containers.ending {
                    containers.ending = true;
                    return;
                }
            }
            changed.await;
        }
    }

    /// Waits until all containers have written down how they have ended.
    async fn concluded(&self) {
        loop {
            let changed = self.0.changed.notified();
            if self.lock().unconcluded == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Makes calls into the guest, as soon as it has come up. When it breaks down meanwhile, they
    /// fail with the reason of that.
    ///
    /// # Errors
    /// Why the guest is not there; those of the calls.
    pub(crate) async fn in_guest<T>(
        &self,
        calls: impl AsyncFnOnce(Ready) -> Result<T>,
    ) -> Result<T> {
        let ready = self.ready().await?;
        let agent = ready.agent.clone();
        match calls(ready).await {
            Err(error) => Err(self.cause_of(error, agent.gone()).await),
            done => done,
        }
    }

    /// Sends a signal to a process of a container, or with `all` to every one.
    ///
    /// # Errors
    /// `WrongState`: it has ended, be it with its guest meanwhile.
    pub(crate) async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let sent = self.in_guest(async |guest| guest.agent.signal(id, exec, signal, all).await);
        match sent.await {
            Err(_) if self.is_down_now() => Err(Error::wrong_state(NOT_RUNNING)),
            sent => sent,
        }
    }

    /// The cause of an error. When its guest is `gone` at the same time, the end of that follows,
    /// and says more.
    async fn cause_of(&self, error: Error, gone: impl Future<Output = ()>) -> Error {
        if error.kind != ErrorKind::GuestFailed
            || tokio::time::timeout(EXIT_GRACE, gone).await.is_err()
        {
            return error;
        }
        match tokio::time::timeout(MACHINE_EXIT_GRACE, self.down()).await {
            Ok(down) => down.error,
            Err(_) => error,
        }
    }

    /// How a process has ended whose guest does not answer any more.
    pub(crate) async fn exit_without_answer(&self, error: Error) -> Exit {
        match tokio::time::timeout(MACHINE_EXIT_GRACE, self.down()).await {
            Ok(down) => Exit::because(down.status, down.reason),
            Err(_) => Exit::because(EXIT_SANDBOX_FAILED, error.message),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Containers> {
        // Nothing panics while it is held.
        let containers = &self.0.containers;
        containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known of containers, and tells those who wait for it.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Containers) -> T) -> T {
        let result = change(&mut self.lock());
        self.0.changed.notify_waiters();
        result
    }

    pub(crate) fn emit(&self, kind: EventKind) {
        // Without receivers nobody wants to know.
        let _ = self.0.events.send(Event::now(&self.path().id, kind));
    }

    pub(crate) fn set_addresses(&self, addresses: Vec<IpAddr>) {
        *self.addresses_mut() = addresses;
    }

    pub(crate) fn addresses(&self) -> Vec<IpAddr> {
        self.addresses_mut().clone()
    }

    fn addresses_mut(&self) -> MutexGuard<'_, Vec<IpAddr>> {
        // A list is valid at any time.
        let addresses = &self.0.addresses;
        addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The machine's disks with their files.
fn with_files(disks: &[DiskConfig], files: Vec<OwnedFd>) -> Result<Vec<Disk>> {
    if files.len() != disks.len() {
        return Err(Error::invalid("as many descriptors as disks must come"));
    }
    let disk = |(config, file): (&DiskConfig, OwnedFd)| Disk {
        file,
        read_only: config.read_only,
    };
    Ok(disks.iter().zip(files).map(disk).collect())
}
