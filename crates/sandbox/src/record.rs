//! The record of one container (`state.json`): what `ps` and `inspect` show, and what outlives the sandbox process.
//!
//! Only the sandbox process writes it, always by rename. Everybody else reads, and learns from the lock beside it
//! whether the writer still lives: a record that says "running" without a live writer is a container that was
//! killed, and reads as stopped.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;

/// Version of the file's format. A reader refuses any other.
pub const VERSION: u32 = 1;

/// State of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The machine is starting, or the container is being made.
    Creating,
    /// The container's init runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// It has ended.
    Stopped,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            State::Creating => "creating",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
        })
    }
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0–255 as a shell would see it; 128+n after signal n; 125 when hull or the machine failed.
    pub status: i32,
    /// Why, when it did not simply end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The guest's kernel killed a process of it for lack of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Unix time, seconds.
    pub at: u64,
}

impl Exit {
    /// An end right now, by itself.
    pub fn now(status: i32) -> Self {
        Self {
            status,
            reason: None,
            oom_killed: false,
            at: unix_time(),
        }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// Host processes of a container, by process id; 0 where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The sandbox process.
    pub sandbox: i32,
    /// The device process.
    pub devices: i32,
    /// The machine process.
    pub machine: i32,
}

/// What is known of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Format of this file: [`VERSION`].
    pub version: u32,
    /// 64 hexadecimal digits.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// Image reference as given.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// Arguments of init.
    pub command: Vec<String>,
    /// Unix time of creation, seconds.
    pub created: u64,
    /// Unix time of the start of init, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// State.
    pub state: State,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Machine kind.
    pub machine: hull_machine::Kind,
    /// Kernel file.
    pub kernel: String,
    /// Memory of the guest, bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Init has a terminal.
    pub terminal: bool,
    /// Init's standard input is open.
    pub stdin: bool,
    /// Removed when it ends.
    pub auto_remove: bool,
    /// Signal that `stop` sends first.
    pub stop_signal: String,
    /// Name of the network; `none` for loopback only.
    pub network: String,
    /// Addresses in the network, without one of loopback.
    #[serde(default)]
    pub addresses: Vec<std::net::IpAddr>,
    /// Ports of the host that lead to ports of the container.
    #[serde(default)]
    pub ports: Vec<hull_network::cni::PortMapping>,
    /// Labels of image and command line.
    pub labels: BTreeMap<String, String>,
    /// Volumes, as given.
    pub volumes: Vec<String>,
    /// Host processes.
    pub processes: Processes,
    /// Layers that make up the root file system, topmost first.
    pub layers: Vec<std::path::PathBuf>,
}

impl Record {
    /// Reads the record and corrects it when its writer is dead.
    ///
    /// # Errors
    /// No such file, not readable, not a record, or of another version.
    pub fn load(paths: &ContainerPaths) -> Result<Self> {
        let path = paths.state();
        let text = fs::read(&path).context(|| format!("read {}", path.display()))?;
        let mut record: Record = serde_json::from_slice(&text).map_err(|error| {
            Failure::new(format!("state file {} is damaged: {error}", path.display()))
                .hint("hull rm -f removes the container and the file")
        })?;
        if record.version != VERSION {
            return Err(Failure::new(format!(
                "state file {} has version {}, this hull knows {VERSION}",
                path.display(),
                record.version
            )));
        }
        if record.state != State::Stopped && !is_alive(paths) {
            let at = fs::metadata(&path)
                .and_then(|m| m.modified())
                .ok()
                .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
                .map_or(0, |d| d.as_secs());
            record.state = State::Stopped;
            record.exit = Some(Exit {
                status: crate::error::EXIT_HULL,
                reason: Some("the sandbox process was killed".into()),
                oom_killed: false,
                at,
            });
            record.processes = Processes::default();
        }
        Ok(record)
    }

    /// Writes the record so that a reader sees either the old or the new one.
    ///
    /// # Errors
    /// The directory is not writable or the disk is full.
    pub fn store(&self, paths: &ContainerPaths) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).context(|| "encode the state".into())?;
        write_by_rename(&paths.state(), &text)
    }

    /// The first twelve digits of the id.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

/// Writes a file so that no reader ever sees half of it.
pub(crate) fn write_by_rename(path: &Path, text: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    File::create(&new)
        .and_then(|mut file| file.write_all(text))
        .and_then(|()| fs::rename(&new, path))
        .context(|| format!("write {}", path.display()))
}

/// Whether the container lives: its sandbox process holds the lock until it has ended.
pub fn is_alive(paths: &ContainerPaths) -> bool {
    let Ok(file) = File::open(paths.lock()) else {
        return false;
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => false,
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    }
}

/// Takes the lock that says "the sandbox process lives". Held until the file is closed.
pub(crate) fn lock(paths: &ContainerPaths) -> Result<File> {
    let path = paths.lock();
    let file = File::create(&path).context(|| format!("create {}", path.display()))?;
    // Nobody else wants it for long: who asks whether the process lives holds it for a moment.
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
        .context(|| format!("lock {}", path.display()))?;
    Ok(file)
}
