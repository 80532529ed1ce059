//! How far a container is: `status.json` in its directory. Written by the sandbox that the
//! container is in, always whole; everybody else reads it, and learns from the sandbox's lock
//! whether the writer still lives.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::{Directory, versioned};
use crate::error::{Context, Result};

/// Version of the file's format. An older one is read, a newer one is a named error.
pub const VERSION: u32 = 1;

/// Name of the file.
pub const FILE: &str = "status.json";

/// Exit status of a container whose machine or sandbox failed; Docker's code for an engine's
/// failure.
pub const EXIT_SANDBOX_FAILED: i32 = 125;

/// Stage of a container, as the OCI specification names them; and `paused`, as runc does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being created.
    Creating,
    /// Its init waits to be started.
    Created,
    /// Its init runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It has ended.
    Stopped,
}

impl State {
    /// Whether it has processes in a guest.
    pub fn is_alive(self) -> bool {
        matches!(self, State::Created | State::Running | State::Paused)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Creating => "creating",
            State::Created => "created",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        })
    }
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0–255 as a shell would see it; 128+n after signal n; [`EXIT_SANDBOX_FAILED`] when the
    /// sandbox or its machine failed.
    pub status: i32,
    /// Why, when it did not simply end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The guest's kernel killed a process of it for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Nanoseconds since 1970 UTC.
    pub at_ns: u64,
}

impl Exit {
    /// An end right now, by itself.
    pub fn now(status: i32) -> Self {
        Self {
            status,
            reason: None,
            oom_killed: false,
            at_ns: unix_time_ns(),
        }
    }

    /// An end right now, for a reason.
    pub fn because(status: i32, reason: impl Into<String>) -> Self {
        Self {
            reason: Some(reason.into()),
            ..Self::now(status)
        }
    }
}

/// Nanoseconds since 1970 UTC.
pub fn unix_time_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

/// Host processes of a sandbox, by process id; 0 where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProcesses {
    /// The sandbox process.
    pub sandbox: i32,
    /// The device process, of a kind of machine that has one.
    pub devices: i32,
    /// The machine process.
    pub machine: i32,
}

impl HostProcesses {
    /// Those that process what the guest does.
    pub fn guest(&self) -> Vec<i32> {
        let pids = [self.devices, self.machine].into_iter();
        pids.filter(|pid| *pid != 0).collect()
    }
}

/// How far a container is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Format of the file: [`VERSION`].
    #[serde(default)]
    pub version: u32,
    /// The stage.
    pub state: State,
    /// When its init was started, nanoseconds since 1970 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_ns: Option<u64>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Addresses of its network, without one of loopback.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Host processes of its sandbox.
    #[serde(default)]
    pub processes: HostProcesses,
}

impl Status {
    /// A stage and nothing more.
    pub fn new(state: State) -> Self {
        Self {
            version: VERSION,
            state,
            started_ns: None,
            exit: None,
            addresses: Vec::new(),
            processes: HostProcesses::default(),
        }
    }

    /// Reads the file as it is; `None` when there is none yet.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or was written by a newer hull.
    pub fn read(directory: &Directory) -> Result<Option<Self>> {
        versioned::read(directory, FILE, VERSION)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, directory: &Directory) -> Result<()> {
        let text = serde_json::to_vec(self).context(|| "encode a status")?;
        directory.write(FILE, &text)
    }
}
