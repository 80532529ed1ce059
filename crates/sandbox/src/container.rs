//! One container of a sandbox, from its creation to its end.

mod create;
mod end;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use serde_json::value::RawValue;
use tokio::sync::watch;

use crate::config::{ProcessConfig, Removal, TerminalSize};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::guest::hub::Hub;
use crate::guest::streams;
use crate::metrics::{Metrics, ProcessInfo};
use crate::process::Process;
use crate::sandbox::{Ready, Reason, Sandbox};
use crate::store::{Directory, Exit, State, Status, unix_time_ns};

const SIGKILL: u32 = 9;

/// runc's words, which engines look for.
pub(crate) const NOT_RUNNING: &str = "container not running";

/// How long a container that is removed by force may take to pass on what it wrote.
const UNREAD_GRACE: Duration = Duration::from_secs(1);

/// How long the guest may take to end a container that is removed by force.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a container that is stopped may take to end after SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// How long the init of a container that was only sent SIGKILL may live. More than for a stop: it
/// may be in the middle of something that the kernel does not interrupt.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long what a killed container wrote may stay unread.
const KILLED_DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

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
    /// Its init has ended, as far as the guest says; what it wrote may still be on its way.
    exited: watch::Sender<bool>,
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

/// A process whose terminal has this size from the beginning.
fn with_size(process: &str, size: TerminalSize) -> Result<Vec<u8>> {
    let mut process: Value = serde_json::from_str(process).context(|| "read the process")?;
    process["consoleSize"] = size.to_oci();
    serde_json::to_vec(&process).context(|| "encode the process")
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

    /// Writes it down again, because something about the sandbox has changed.
    pub(crate) fn refresh_status(&self) -> Result<()> {
        loop {
            let status = self.status();
            status.write(&self.directory)?;
            // What it moved on to meanwhile was written before this.
            if self.status().state == status.state {
                return Ok(());
            }
        }
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

    fn mark_started(&self) -> Result<()> {
        *self.started() = Some(unix_time_ns());
        self.advance(Stage::Running)
    }

    /// Fails unless the container is in one of these states.
    fn require(&self, allowed: &[State], what: &str) -> Result<()> {
        let state = self.state();
        if allowed.contains(&state) {
            return Ok(());
        }
        Err(Error::wrong_state(match state {
            State::Stopped => NOT_RUNNING.to_owned(),
            _ => format!("cannot {what} a container that is {state}"),
        }))
    }

    fn require_alive(&self, what: &str) -> Result<()> {
        self.require(&[State::Created, State::Running, State::Paused], what)
    }

    /// Lets the init of a created container run.
    ///
    /// # Errors
    /// `WrongState` when it was started before; `CommandNotFound` and `NotExecutable`; the network
    /// that an engine has set up since `create` cannot be the guest's.
    pub async fn start(&self) -> Result<()> {
        self.require(&[State::Created], "start")?;
        self.sandbox.refresh_network().await?;
        self.sandbox
            .in_guest(async |guest| guest.agent.start(&self.id).await)
            .await?;
        self.mark_started()?;
        self.sandbox.emit(EventKind::Started {
            container: self.id.clone(),
        });
        Ok(())
    }

    /// Executes a further process. With [`Handover`](crate::config::Stdio::Handover), its streams
    /// are with the process.
    ///
    /// # Errors
    /// `WrongState` when the container does not run; `CommandNotFound` and `NotExecutable`.
    pub async fn exec(self: &Arc<Self>, config: ProcessConfig) -> Result<Process> {
        self.require(&[State::Created, State::Running], "exec in")?;
        self.sandbox
            .in_guest(async |guest| self.exec_in(guest, config).await)
            .await
    }

    async fn exec_in(self: &Arc<Self>, guest: Ready, config: ProcessConfig) -> Result<Process> {
        let (ports, streams) = streams::open(&guest.devices, config.stdio).await?;
        let exec = format!("exec{}", self.execs.fetch_add(1, Ordering::Relaxed));
        let event = |kind: fn(String, String) -> EventKind| {
            self.sandbox.emit(kind(self.id.clone(), exec.clone()));
        };
        event(|container, exec| EventKind::ExecAdded { container, exec });
        if let Some(keeper) = config.keeper {
            self.keepers().insert(exec.clone(), keeper);
        }
        let process = match config.size.filter(|_| config.stdio.terminal()) {
            None => config.process.get().as_bytes().to_vec(),
            Some(size) => with_size(config.process.get(), size)?,
        };
        let started = guest
            .agent
            .exec(&self.id, &exec, process, config.raw, ports)
            .await;
        if let Err(error) = started {
            self.forget_exec(&exec);
            return Err(error);
        }
        event(|container, exec| EventKind::ExecStarted { container, exec });
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
        if signal == SIGKILL {
            self.expect_end();
        }
        self.sandbox.signal(&self.id, "", signal, all).await
    }

    /// After SIGKILL the container ends, whatever its guest does: at the latest with its machine.
    fn expect_end(&self) {
        let sandbox = self.sandbox.clone();
        let (mut exited, mut stage) = (self.exited.subscribe(), self.stage.subscribe());
        let id = self.id.clone();
        tokio::spawn(async move {
            let is_over = |stage: &Stage| stage.state() == State::Stopped;
            let exited = async {
                tokio::select! {
                    _ = exited.wait_for(|exited| *exited) => {}
                    _ = stage.wait_for(is_over) => {}
                }
            };
            let in_time = tokio::time::timeout(KILL_TIMEOUT, exited).await.is_ok();
            let mut over = async |time| {
                let over = stage.wait_for(is_over);
                tokio::time::timeout(time, over).await.is_ok()
            };
            if in_time && over(KILLED_DRAIN_TIMEOUT).await {
                return;
            }
            if in_time
                && let Some(ready) = sandbox.ready_now()
                && let Ok(Ok(())) =
                    tokio::time::timeout(DELETE_TIMEOUT, ready.agent.delete(&id)).await
                && over(UNREAD_GRACE).await
            {
                return;
            }
            sandbox.shutdown(Reason::Unresponsive);
        });
    }

    /// Its init has ended, as the guest says.
    pub(crate) fn init_has_exited(&self) {
        self.exited.send_replace(true);
    }

    /// Sends the stop signal, and SIGKILL when it has not ended in time; the machine is ended when
    /// that has no effect.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn stop(&self, signal: u32, timeout: Duration) -> Result<Exit> {
        self.require_alive("stop")?;
        let asking = async {
            if self.state() == State::Paused
                && let Err(error) = self.set_frozen(false).await
            {
                tracing::debug!("{error}");
            }
            // A container that ends just now cannot be signalled, and need not be.
            if let Err(error) = self.signal(signal, false).await {
                tracing::debug!("stop signal: {error}");
            }
            self.ended().await
        };
        if let Ok(exit) = tokio::time::timeout(timeout, asking).await {
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
        self.sandbox
            .in_guest(async |guest| guest.agent.freeze(&self.id, frozen).await)
            .await?;
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
        self.sandbox
            .in_guest(async |guest| guest.agent.update(&self.id, resources).await)
            .await
    }

    /// Gives files that it was created with other contents. What a process has changed stays.
    ///
    /// # Errors
    /// `WrongState` when it does not run; it was given none.
    pub async fn update_files(&self, files: Vec<(String, String)>) -> Result<()> {
        self.require_alive("update files of")?;
        self.sandbox
            .in_guest(async |guest| guest.agent.update_files(&self.id, files).await)
            .await
    }

    /// What it uses in the guest.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn metrics(&self) -> Result<Metrics> {
        self.require_alive("measure")?;
        self.sandbox
            .in_guest(async |guest| guest.agent.metrics(&self.id).await)
            .await
    }

    /// Its processes.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub async fn process_list(&self) -> Result<Vec<ProcessInfo>> {
        self.require_alive("list the processes of")?;
        self.sandbox
            .in_guest(async |guest| guest.agent.processes(&self.id).await)
            .await
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

/// Whether an error says that a container is not there any more.
pub(crate) fn has_ended(error: &Error) -> bool {
    matches!(
        error.kind,
        ErrorKind::NotFound | ErrorKind::WrongState | ErrorKind::Gone
    )
}
