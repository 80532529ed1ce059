//! The containers of one state directory (`--root`): a directory each, which whoever makes it first owns.
//!
//! ```text
//! ROOT/<id>/state.json    what is known of the container from its creation on: a `Record`
//! ROOT/<id>/config.json   the bundle's, as it was then: hooks and `exec` need it
//! ROOT/<id>/status.json   how far it is; written by the pod's sandbox process
//! ```

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hull_sandbox::error::{Context, Failure, Result};
use hull_sandbox::pod::client::{self, Connection};
use hull_sandbox::pod::{ContainerStatus, PodPaths, STATUS_FILE, Status};
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cgroup::Groups;

/// Version of the record's format.
const VERSION: u32 = 1;

/// A state directory.
#[derive(Debug, Clone)]
pub struct Root {
    /// Where it is.
    pub path: PathBuf,
}

/// What is known of a container from its creation on.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    version: u32,
    /// Of the specification that the bundle follows.
    pub oci_version: String,
    /// The engine's id.
    pub id: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// The user who created it.
    pub owner: String,
    /// The bundle's.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
    /// Its keeper, and when that was started (field 22 of proc_pid_stat(5)), which tells whether it still is the same.
    pub keeper: i32,
    /// See `keeper`.
    pub keeper_started: u64,
    /// Directory of all pods, and the name of its pod.
    pub pods: PathBuf,
    /// See `pods`.
    pub pod: String,
    /// Its control groups on the host.
    #[serde(default)]
    pub groups: Groups,
    /// The limit of memory that it was created with, bytes; 0 for none.
    pub memory: u64,
    /// Limits as they are since the last `update`; the configuration's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<LinuxResources>,
}

/// A container's directory.
#[derive(Debug, Clone)]
pub struct Container {
    /// Where it is.
    pub directory: PathBuf,
    /// The engine's id.
    pub id: String,
}

/// Whether a text may be an id, by runc's rules.
pub fn is_valid_id(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 200
        && id != "."
        && id != ".."
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte))
}

fn check_id(id: &str) -> Result<()> {
    if is_valid_id(id) {
        Ok(())
    } else {
        Err(Failure::new(format!("invalid container id format: {id:?}")))
    }
}

impl Root {
    /// Makes the directory of a new container.
    ///
    /// # Errors
    /// The id is not one, there is a container of this id, or the directory cannot be made.
    pub fn claim(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        fs::create_dir_all(&self.path).context(|| format!("create {}", self.path.display()))?;
        let directory = self.path.join(id);
        match fs::create_dir(&directory) {
            Ok(()) => Ok(Container {
                directory,
                id: id.to_owned(),
            }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Failure::new("container with given ID already exists"))
            }
            Err(error) => Err(error).context(|| format!("create {}", directory.display())),
        }
    }

    /// The container of this id. The words of the error are runc's.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        let directory = self.path.join(id);
        if !directory.is_dir() {
            return Err(Failure::new("container does not exist"));
        }
        Ok(Container {
            directory,
            id: id.to_owned(),
        })
    }

    /// All containers, by id.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn list(&self) -> Result<Vec<Container>> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(|| format!("read {}", self.path.display())),
        };
        let mut ids: Vec<String> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|id| is_valid_id(id) && self.path.join(id).join("state.json").exists())
            .collect();
        ids.sort_unstable();
        Ok(ids
            .into_iter()
            .map(|id| Container {
                directory: self.path.join(&id),
                id,
            })
            .collect())
    }
}

/// When a process was started, in ticks since the host's boot; `None` when there is no such process.
pub fn process_started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything: the fields begin after the last parenthesis, with the third.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    // A process that has ended and was not waited for yet is not there any more.
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl Record {
    /// A record of a container that is being made.
    pub fn new(container: &Container, bundle: &crate::bundle::Bundle) -> Self {
        Self {
            version: VERSION,
            oci_version: bundle.version.clone(),
            id: container.id.clone(),
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            created: crate::time::now(),
            owner: owner(),
            annotations: bundle.annotations.clone(),
            keeper: 0,
            keeper_started: 0,
            pods: PathBuf::new(),
            pod: String::new(),
            groups: Groups::default(),
            memory: 0,
            resources: None,
        }
    }

    /// A record of a container whose own is not there or damaged: what `delete` needs to remove it. `kept`: a
    /// keeper of one of its processes, and its pod.
    pub fn recovered(container: &Container, groups: Groups, kept: Option<(i32, PodPaths)>) -> Self {
        let (keeper, pod) = kept.unzip();
        let keeper = keeper.unwrap_or_default();
        let (pods, pod) = pod.map(|pod| (pod.all, pod.id)).unwrap_or_default();
        Self {
            version: VERSION,
            oci_version: String::new(),
            id: container.id.clone(),
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            created: String::new(),
            owner: String::new(),
            annotations: HashMap::new(),
            keeper,
            keeper_started: process_started(keeper).unwrap_or_default(),
            pods,
            pod,
            groups,
            memory: 0,
            resources: None,
        }
    }

    /// The files of its pod.
    pub fn pod_paths(&self) -> PodPaths {
        PodPaths {
            all: self.pods.clone(),
            id: self.pod.clone(),
        }
    }

    /// Connects to its pod.
    ///
    /// # Errors
    /// The pod is no more; the words are runc's.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(&self.pod_paths())?.ok_or_else(|| Failure::new("container not running"))
    }

    /// Whether the keeper still is the process that it was.
    pub fn keeper_lives(&self) -> bool {
        self.keeper > 0 && process_started(self.keeper) == Some(self.keeper_started)
    }
}

fn owner() -> String {
    let uid = rustix::process::getuid().as_raw();
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| uid.to_string())
}

impl Container {
    /// Its record.
    ///
    /// # Errors
    /// There is none yet, or it is damaged.
    pub fn record(&self) -> Result<Record> {
        let path = self.directory.join("state.json");
        let text = fs::read(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Failure::new("container does not exist"),
            _ => Failure::new(format!("cannot read {}: {error}", path.display())),
        })?;
        let record: Record = serde_json::from_slice(&text).map_err(|error| {
            Failure::new(format!("state file {} is damaged: {error}", path.display()))
                .hint(format!("hull-oci delete --force {}", self.id))
        })?;
        if record.version != VERSION {
            return Err(Failure::new(format!(
                "state file {} has version {}, this hull knows {VERSION}",
                path.display(),
                record.version
            )));
        }
        Ok(record)
    }

    /// Writes the record, so that a reader sees either the old or the new one.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record).context(|| "encode the state".into())?;
        self.write("state.json", &text)
    }

    /// Keeps the bundle's configuration.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store_config(&self, config: &[u8]) -> Result<()> {
        self.write("config.json", config)
    }

    /// The configuration as it was when the container was created.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn config(&self) -> Result<Value> {
        let path = self.directory.join("config.json");
        let text = fs::read(&path).context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).context(|| format!("read {}", path.display()))
    }

    fn write(&self, name: &str, text: &[u8]) -> Result<()> {
        let path = self.directory.join(name);
        let new = path.with_extension("new");
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &path))
            .context(|| format!("write {}", path.display()))
    }

    /// Its directory, for the sandbox process.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self) -> Result<OwnedFd> {
        File::open(&self.directory)
            .map(OwnedFd::from)
            .context(|| format!("open {}", self.directory.display()))
    }

    /// How far it is, corrected when the pod was killed.
    pub fn status(&self, record: &Record) -> ContainerStatus {
        let stopped = ContainerStatus {
            status: Status::Stopped,
            exit: None,
        };
        let said = fs::read(self.directory.join(STATUS_FILE))
            .ok()
            .and_then(|text| serde_json::from_slice::<ContainerStatus>(&text).ok());
        match said {
            Some(said) if said.status == Status::Stopped => said,
            Some(said) if client::is_alive(&record.pod_paths()) => said,
            Some(_) => stopped,
            None if record.keeper_lives() => ContainerStatus {
                status: Status::Creating,
                exit: None,
            },
            None => stopped,
        }
    }

    /// Removes its directory.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).context(|| format!("remove {}", self.directory.display()))
            }
            _ => Ok(()),
        }
    }
}

/// The OCI state of a container: what `state` prints and hooks read.
pub fn state(record: &Record, status: Status, pid: i32) -> Value {
    serde_json::json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": pid,
        "status": status,
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": record.created,
        "owner": record.owner,
        "annotations": record.annotations,
    })
}

/// Where the record's directory of pods is.
pub fn pods_directory(run: &Path) -> PathBuf {
    PodPaths::new(run, "").all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ids_are_runcs() {
        for good in ["a", "A_b-c.d+e", "0", "...", &"x".repeat(200)] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\n", &"x".repeat(201)] {
            assert!(!is_valid_id(bad), "{bad}");
        }
    }

    #[test]
    fn an_id_belongs_to_whoever_claims_it_first() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root {
            path: directory.path().join("root"),
        };
        assert!(root.list().unwrap().is_empty());
        let container = root.claim("one").unwrap();
        let error = root.claim("one").unwrap_err();
        assert_eq!(error.message, "container with given ID already exists");
        container.remove().unwrap();
        container.remove().unwrap();
        assert_eq!(
            root.find("one").unwrap_err().message,
            "container does not exist"
        );
        root.claim("one").unwrap();
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_the_same_id() {
        let own = std::process::id().cast_signed();
        assert!(process_started(own).is_some_and(|started| started > 0));
        assert_eq!(process_started(i32::MAX), None);
    }
}
