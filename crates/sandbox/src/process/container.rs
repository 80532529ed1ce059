//! What the tasks of a sandbox process share: the record, the running guest, who waits for what.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use serde_json::json;
use tokio::sync::watch;

use super::agent::Agent;
use super::devices::Devices;
use super::output::Output;
use super::server::Input;
use crate::error::{Context, Failure, Result};
use crate::paths::{ContainerPaths, Paths};
use crate::record::{Exit, Record, State};
use crate::request::RunRequest;
use crate::spec;
use crate::timings::Timings;
use crate::wire::ExecRequest;

/// Waits until there is a value.
async fn value<T: Clone>(sender: &watch::Sender<Option<T>>) -> T {
    let mut receiver = sender.subscribe();
    loop {
        if let Some(value) = receiver.borrow_and_update().clone() {
            return value;
        }
        if receiver.changed().await.is_err() {
            // The sender lives at least as long as this borrow of it.
            std::future::pending::<()>().await;
        }
    }
}

/// One container in its machine, from the request to the end.
#[derive(Debug)]
pub struct Container {
    paths: Paths,
    request: RunRequest,
    record: Mutex<Record>,
    output: Output,
    input: Input,
    guest: OnceLock<Guest>,
    started: watch::Sender<Option<Result<Timings>>>,
    ended: watch::Sender<Option<Exit>>,
    abort: watch::Sender<Option<String>>,
    execs: AtomicU32,
    /// Others in its machine; nothing when it is too late to join.
    joined: Mutex<Option<Vec<Arc<Container>>>>,
}

#[derive(Debug)]
struct Guest {
    agent: Agent,
    devices: Arc<Devices>,
}

/// An OCI process object and what of it JSON cannot say.
#[derive(Debug)]
pub struct ExecProcess {
    /// The object.
    pub json: Vec<u8>,
    /// Exact arguments, when the object's are not.
    pub raw_args: Vec<Vec<u8>>,
    /// Exact environment, likewise.
    pub raw_env: Vec<Vec<u8>>,
}

impl Container {
    /// A container that is being made.
    pub fn new(paths: Paths, request: RunRequest, record: Record, output: Output) -> Self {
        Self {
            paths,
            request,
            record: Mutex::new(record),
            output,
            input: Input::default(),
            guest: OnceLock::new(),
            started: watch::Sender::new(None),
            ended: watch::Sender::new(None),
            abort: watch::Sender::new(None),
            execs: AtomicU32::new(1),
            joined: Mutex::new(Some(Vec::new())),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.request.id
    }

    /// What was asked for.
    pub fn request(&self) -> &RunRequest {
        &self.request
    }

    /// All of hull's directories.
    pub fn all_paths(&self) -> &Paths {
        &self.paths
    }

    /// Its files.
    pub fn paths(&self) -> ContainerPaths {
        self.paths.container(self.id())
    }

    /// Where init's output goes.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// Where init's input comes from.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// A copy of the record.
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Record> {
        // Nothing panics while it is held; a record is valid at any time.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the record and writes it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn update(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.lock();
        change(&mut record);
        record.store(&self.paths())
    }

    /// Changes the state and writes the record.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn set_state(&self, state: State) -> Result<()> {
        self.update(|record| record.state = state)
    }

    /// Makes the guest available to requests.
    pub fn set_guest(&self, agent: Agent, devices: Arc<Devices>) {
        // Called once.
        let _ = self.guest.set(Guest { agent, devices });
    }

    fn guest(&self) -> Result<&Guest> {
        let record = self.lock();
        match (self.guest.get(), record.state) {
            (Some(guest), State::Running | State::Paused) => Ok(guest),
            (_, state) => Err(Failure::new(format!(
                "container {} is not running: it is {state}",
                record.name
            ))
            .code(1)),
        }
    }

    /// The agent, while the container runs.
    ///
    /// # Errors
    /// It does not run.
    pub fn agent(&self) -> Result<Agent> {
        self.guest().map(|guest| guest.agent.clone())
    }

    /// The device process, while the container runs.
    ///
    /// # Errors
    /// It does not run.
    pub fn devices(&self) -> Result<&Devices> {
        self.guest().map(|guest| &*guest.devices)
    }

    /// The same, to be kept.
    ///
    /// # Errors
    /// It does not run.
    pub fn shared_devices(&self) -> Result<Arc<Devices>> {
        self.guest().map(|guest| guest.devices.clone())
    }

    /// Takes in a container that joins this one.
    ///
    /// # Errors
    /// This one is about to end.
    pub fn adopt(&self, other: &Arc<Container>) -> Result<()> {
        match &mut *self.joined() {
            Some(joined) => {
                joined.push(other.clone());
                Ok(())
            }
            None => Err(Failure::new(format!(
                "container {} is not running: it is about to end",
                self.record().name
            ))),
        }
    }

    /// Forgets a container that had joined.
    pub fn leave(&self, other: &Arc<Container>) {
        if let Some(joined) = &mut *self.joined() {
            joined.retain(|one| !Arc::ptr_eq(one, other));
        }
    }

    /// Lets nobody join any more; those that have.
    pub fn close(&self) -> Vec<Arc<Container>> {
        self.joined().take().unwrap_or_default()
    }

    fn joined(&self) -> std::sync::MutexGuard<'_, Option<Vec<Arc<Container>>>> {
        // Nothing panics while it is held.
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that init has started, or why it has not.
    pub fn set_started(&self, result: Result<Timings>) {
        self.started.send_replace(Some(result));
    }

    /// Waits until init has started.
    ///
    /// # Errors
    /// Why it has not.
    pub async fn started(&self) -> Result<Timings> {
        value(&self.started).await
    }

    /// Says how the container has ended; the last thing that happens to it.
    pub fn set_ended(&self, exit: Exit) {
        self.ended.send_replace(Some(exit));
    }

    /// Waits until the container has ended and everything of it is gone that has to go.
    pub async fn ended(&self) -> Exit {
        value(&self.ended).await
    }

    /// Ends the container by force, whatever state it is in; its machine, if that is its own.
    pub fn abort(&self, reason: &str) {
        self.abort.send_if_modified(|old| {
            let first = old.is_none();
            if first {
                *old = Some(reason.into());
            }
            first
        });
    }

    /// Waits until somebody wants that; the reason.
    pub async fn aborted(&self) -> String {
        value(&self.abort).await
    }

    /// A name for a further process.
    pub fn next_exec(&self) -> String {
        format!("exec{}", self.execs.fetch_add(1, Ordering::Relaxed))
    }

    /// Number of the signal that ends the container politely.
    pub fn stop_signal(&self) -> u32 {
        const SIGTERM: u32 = 15;
        crate::signals::parse(&self.request.stop_signal).unwrap_or(SIGTERM)
    }

    /// The OCI process object of a further process: init's, with what the request changes.
    ///
    /// # Errors
    /// The request is not one that can be carried out.
    pub fn exec_process(&self, request: &ExecRequest) -> Result<ExecProcess> {
        if request.command.is_empty() {
            return Err(Failure::new("no command to execute"));
        }
        let init = self.request.spec.process().as_ref();
        let mut process =
            serde_json::to_value(init).context(|| "read the container's process".into())?;
        let raw = |list: &[Vec<u8>]| list.iter().any(|text| std::str::from_utf8(text).is_err());
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();

        let mut environment: Vec<Vec<u8>> = if self.request.raw_env.is_empty() {
            init.and_then(|process| process.env().clone())
                .unwrap_or_default()
                .into_iter()
                .map(String::into_bytes)
                .collect()
        } else {
            self.request.raw_env.clone()
        };
        if request.terminal {
            environment.push(b"TERM=xterm".to_vec());
        }
        environment.extend(request.environment.iter().cloned());
        spec::keep_last_of_each(&mut environment);

        process["args"] = request.command.iter().map(text).collect();
        process["env"] = environment.iter().map(text).collect();
        process["terminal"] = json!(request.terminal);
        if let Some(directory) = &request.directory {
            process["cwd"] = json!(directory);
        }
        if let Some(user) = &request.user {
            process["user"] = spec::user_object(user);
        }
        Ok(ExecProcess {
            json: serde_json::to_vec(&process).context(|| "encode the process".into())?,
            raw_args: if raw(&request.command) {
                request.command.clone()
            } else {
                Vec::new()
            },
            raw_env: if raw(&environment) {
                environment
            } else {
                Vec::new()
            },
        })
    }
}
