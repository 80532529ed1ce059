//! What is known of a container from its creation on: `record.json` in its directory. Written by
//! the front end that creates the container; what only that front end knows is its own part of it.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::process::ProcessId;
use super::sandbox_dir::SandboxPath;
use super::status::{EXIT_SANDBOX_FAILED, Exit, State, Status};
use super::{Directory, versioned};
use crate::error::{Context, Error, Result};

/// Version of the file's format.
pub const VERSION: u32 = 1;

/// Name of the file.
pub const FILE: &str = "record.json";

/// Name of the file with the OCI configuration, in the front end's words.
pub const CONFIG_FILE: &str = "config.json";

/// Why a container has ended whose sandbox process is no more and left no word.
const SANDBOX_KILLED: &str = "the sandbox process was killed";

/// What is known of a container. `D` is what its front end adds: any JSON object to those who do
/// not care.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record<D = Value> {
    /// Format of this file: [`VERSION`].
    pub version: u32,
    /// Its id: unique among the containers of one front end's directory.
    pub id: String,
    /// The front end that wrote it: `hull`, or the engine that called `hull-oci`.
    pub engine: String,
    /// When it was created, nanoseconds since 1970 UTC.
    pub created_ns: u64,
    /// The process that creates it, or started it last: as long as it lives, a container without a
    /// status is being created.
    pub creator: ProcessId,
    /// The sandbox that it is in. `None` until that is known.
    #[serde(default)]
    pub sandbox: Option<SandboxPath>,
    /// Arguments of its init, for people.
    #[serde(default)]
    pub command: Vec<String>,
    /// What the front end adds.
    pub details: D,
}

impl<D: Serialize + DeserializeOwned> Record<D> {
    /// A record of a container that this process is about to create.
    pub fn new(id: &str, engine: &str, details: D) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            engine: engine.to_owned(),
            created_ns: super::status::unix_time_ns(),
            creator: ProcessId::own(),
            sandbox: None,
            command: Vec::new(),
            details,
        }
    }

    /// Reads the record of a container; `None` when there is none yet.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or was written by a newer hull.
    pub fn read(directory: &Directory) -> Result<Option<Self>> {
        versioned::read(directory, FILE, VERSION)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, directory: &Directory) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context(|| "encode a record")?;
        directory.write(FILE, &text)
    }

    /// How far the container is: what its sandbox wrote, corrected when that was killed.
    ///
    /// # Errors
    /// The status cannot be read, or is damaged.
    pub fn status(&self, directory: &Directory) -> Result<Status> {
        let read = Status::read(directory)?;
        if let Some(status) = &read
            && (status.state == State::Stopped || self.waits(status) || self.lives_in(status))
        {
            // One that ends just now writes its last word before it lets go of its lock.
            return Ok(read.unwrap_or_else(|| Status::new(State::Stopped)));
        }
        match read {
            None if self.creator.lives() => Ok(Status::new(State::Creating)),
            None => Ok(Status::new(State::Stopped)),
            Some(stale) => match Status::read(directory)? {
                Some(last) if last.state == State::Stopped => Ok(last),
                Some(last) if matches!(last.state, State::Creating | State::Created) => {
                    Ok(before_its_start(last))
                }
                _ => Ok(killed(stale)),
            },
        }
    }

    /// Whether a container needs no sandbox for what is said of it: it waits to be started, or the
    /// process lives that starts it.
    fn waits(&self, status: &Status) -> bool {
        match status.state {
            State::Created => self.sandbox.is_none(),
            State::Creating => self.creator.lives(),
            State::Running | State::Paused | State::Stopped => false,
        }
    }

    /// Whether the sandbox process lives that wrote a status: after it was killed, another one may
    /// have its name, that of a container which this one has joined.
    fn lives_in(&self, status: &Status) -> bool {
        self.sandbox.as_ref().is_some_and(|sandbox| {
            let another = match (status.processes.sandbox, sandbox.pid()) {
                (0, _) | (_, None) => false,
                (writer, Some(holder)) => writer != holder,
            };
            !another && sandbox.is_alive()
        })
    }

    /// Whether the sandbox process that the container is in lives.
    pub fn sandbox_lives(&self) -> bool {
        self.sandbox.as_ref().is_some_and(SandboxPath::is_alive)
    }

    /// The sandbox.
    ///
    /// # Errors
    /// The container was never in one.
    pub fn sandbox(&self) -> Result<&SandboxPath> {
        self.sandbox
            .as_ref()
            .ok_or_else(|| Error::wrong_state(format!("container {} is not running", self.id)))
    }
}

/// A container whose start was interrupted is as it was before.
fn before_its_start(status: Status) -> Status {
    let state = match status.exit {
        Some(_) => State::Stopped,
        None => State::Created,
    };
    Status { state, ..status }
}

fn killed(status: Status) -> Status {
    Status {
        state: State::Stopped,
        exit: Some(Exit {
            status: EXIT_SANDBOX_FAILED,
            reason: Some(SANDBOX_KILLED.into()),
            oom_killed: false,
            at_ns: status.started_ns.unwrap_or_default(),
        }),
        processes: Default::default(),
        ..status
    }
}

/// A container's directory with what it says.
#[derive(Debug)]
pub struct Stored<D = Value> {
    /// The directory.
    pub directory: Directory,
    /// What is known of the container.
    pub record: Record<D>,
    /// How far it is.
    pub status: Status,
}

impl<D: Serialize + DeserializeOwned> Stored<D> {
    /// Reads what a directory says of its container; `None` when there is none, or it is not there
    /// to be seen yet.
    ///
    /// # Errors
    /// A file cannot be read, is damaged, or was written by a newer hull.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        let directory = match Directory::open(path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(|| format!("open {}", path.display())),
        };
        let Some(record) = Record::read(&directory)? else {
            return Ok(None);
        };
        let status = record.status(&directory)?;
        Ok(Some(Self {
            directory,
            record,
            status,
        }))
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.directory.path().to_owned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn directory() -> (tempfile::TempDir, Directory) {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::create(&parent.path().join("c")).unwrap();
        (parent, directory)
    }

    #[test]
    fn a_container_is_being_created_as_long_as_its_creator_lives() {
        let (_parent, directory) = directory();
        let mut record = Record::new("c", "hull", Value::Null);
        record.write(&directory).unwrap();
        assert_eq!(record.status(&directory).unwrap().state, State::Creating);
        record.creator.started += 1;
        assert_eq!(record.status(&directory).unwrap().state, State::Stopped);
    }

    #[test]
    fn a_running_container_without_a_sandbox_was_killed() {
        let (parent, directory) = directory();
        let mut record = Record::new("c", "hull", Value::Null);
        record.sandbox = Some(SandboxPath::new(parent.path(), "gone"));
        Status::new(State::Running).write(&directory).unwrap();
        let status = record.status(&directory).unwrap();
        assert_eq!(status.state, State::Stopped);
        let exit = status.exit.unwrap();
        assert_eq!(exit.status, EXIT_SANDBOX_FAILED);
        assert_eq!(exit.reason.as_deref(), Some(SANDBOX_KILLED));
    }

    #[test]
    fn a_container_that_was_not_started_waits_for_that() {
        let (parent, directory) = directory();
        let mut record = Record::new("c", "hull", Value::Null);
        Status::new(State::Created).write(&directory).unwrap();
        record.creator.started += 1;
        assert_eq!(record.status(&directory).unwrap().state, State::Created);

        // Its start was interrupted.
        record.sandbox = Some(SandboxPath::new(parent.path(), "gone"));
        let mut starting = Status::new(State::Creating);
        starting.write(&directory).unwrap();
        assert_eq!(record.status(&directory).unwrap().state, State::Created);
        starting.exit = Some(Exit::now(3));
        starting.write(&directory).unwrap();
        let status = record.status(&directory).unwrap();
        assert_eq!(
            (status.state, status.exit),
            (State::Stopped, starting.exit.clone())
        );

        // It goes on.
        record.creator = ProcessId::own();
        assert_eq!(record.status(&directory).unwrap().state, State::Creating);
    }

    #[test]
    fn files_of_a_newer_hull_are_refused_by_name_and_unknown_fields_ignored() {
        let (parent, directory) = directory();
        let record = Record::new("c", "hull", Value::Null);
        let mut text = serde_json::to_value(&record).unwrap();
        text["flavour"] = "sweet".into();
        directory.write(FILE, text.to_string().as_bytes()).unwrap();
        assert_eq!(Record::<Value>::read(&directory).unwrap().unwrap(), record);
        text["version"] = (VERSION + 1).into();
        directory.write(FILE, text.to_string().as_bytes()).unwrap();
        let error = Stored::<Value>::load(&parent.path().join("c")).unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Unsupported);
        assert!(
            error.message.contains("record.json has version 2"),
            "{error}"
        );
        directory.write(FILE, b"{").unwrap();
        let error = Stored::<Value>::load(&parent.path().join("c")).unwrap_err();
        assert!(error.message.contains("damaged"), "{error}");
    }
}
