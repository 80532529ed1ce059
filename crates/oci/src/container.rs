//! The containers of a state directory (`--root`), one directory each, owned by the command that
//! creates it. For their contents see `hull_sandbox::store`.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hull_sandbox::control::client::Client;
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::store::{
    self, CONFIG_FILE, Directory, ProcessId, SandboxPath, State, Status, remove_all,
};
use oci_spec::runtime::{Hooks, LinuxResources};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use hull_sandbox::cgroup::{Bounds, Groups};

/// A state directory.
#[derive(Debug, Clone)]
pub struct Root {
    /// Its path.
    pub path: PathBuf,
}

/// Record of a container, written when it is created.
pub type Record = store::Record<Details>;

/// What `hull-oci` records of a container in addition to the common fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// Version of the specification that the bundle follows.
    pub oci_version: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// The user who created it.
    pub owner: String,
    /// The bundle's annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its keeper.
    pub keeper: ProcessId,
    /// Its control groups on the host.
    pub groups: Groups,
    /// What the machine in its control groups may take of the host, if that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bounds: Option<Bounds>,
    /// Memory limit at creation, bytes; 0 if none.
    pub memory: u64,
    /// Its network namespace is a new one in another container's machine: nothing of the host's
    /// network reaches it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub apart: bool,
    /// Limits since the last `update`; if absent, the configuration's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<LinuxResources>,
}

/// A container's directory.
#[derive(Debug)]
pub struct Container {
    /// The directory, open.
    pub directory: Directory,
    /// The engine's id.
    pub id: String,
}

/// Whether an id is valid, by runc's rules.
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
        Err(Error::invalid(format!(
            "invalid container id format: {id:?}"
        )))
    }
}

impl Root {
    /// Creates the directory of a new container.
    ///
    /// # Errors
    /// `InvalidArgument` if the id is invalid; `Exists` if it is taken; `Host` if the directory
    /// cannot be created.
    pub fn claim(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        let path = self.path.join(id);
        match Directory::create_new(&path) {
            Ok(directory) => Ok(Container {
                directory,
                id: id.to_owned(),
            }),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Error::exists("container with given ID already exists"))
            }
            Err(error) => Err(error).context(|| format!("create {}", path.display())),
        }
    }

    /// Opens a container by id. The error messages are runc's.
    ///
    /// # Errors
    /// `InvalidArgument` if the id is invalid; `NotFound` if there is no such container.
    pub fn find(&self, id: &str) -> Result<Container> {
        check_id(id)?;
        match Directory::open(&self.path.join(id)) {
            Ok(directory) => Ok(Container {
                directory,
                id: id.to_owned(),
            }),
            Err(_) => Err(does_not_exist()),
        }
    }

    /// All containers, sorted by id.
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
            .filter(|id| is_valid_id(id))
            .collect();
        ids.sort_unstable();
        Ok(ids
            .into_iter()
            .filter_map(|id| self.find(&id).ok())
            .filter(Container::is_known)
            .collect())
    }
}

fn does_not_exist() -> Error {
    Error::not_found("container does not exist")
}

/// The record of a new container.
pub fn new_record(container: &Container, bundle: &crate::bundle::Bundle, root: &Path) -> Record {
    let mut record = Record::new(
        &container.id,
        engine(&bundle.annotations, root),
        Details {
            oci_version: bundle.version.clone(),
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            owner: owner(),
            annotations: bundle.annotations.clone(),
            ..Details::default()
        },
    );
    record.command = bundle
        .spec
        .process()
        .as_ref()
        .and_then(|process| process.args().clone())
        .unwrap_or_default();
    record
}

/// A record in place of one that is missing or damaged: what `delete` needs to remove the
/// container.
pub fn recovered_record(
    container: &Container,
    groups: Groups,
    kept: Option<(ProcessId, SandboxPath)>,
) -> Record {
    let (keeper, sandbox) = kept.unzip();
    let mut record = Record::new(
        &container.id,
        "oci",
        Details {
            keeper: keeper.unwrap_or_default(),
            groups,
            ..Details::default()
        },
    );
    record.sandbox = sandbox;
    record
}

/// Identifies the engine by its annotations in the bundle or by its state directory.
fn engine(annotations: &BTreeMap<String, String>, root: &Path) -> &'static str {
    let has = |prefix: &str| annotations.keys().any(|key| key.starts_with(prefix));
    let root = root.to_string_lossy();
    if has("io.kubernetes.cri-o.") {
        "cri-o"
    } else if has("io.kubernetes.cri.") {
        "containerd"
    } else if has("io.podman.") || has("org.opencontainers.image.stopSignal") {
        "podman"
    } else if root.contains("/docker/") || root.ends_with("/moby") {
        "docker"
    } else {
        "oci"
    }
}

/// The sandbox of a container.
///
/// # Errors
/// `WrongState` if it never had one; the message is runc's.
pub fn sandbox(record: &Record) -> Result<&SandboxPath> {
    record.sandbox.as_ref().ok_or_else(not_running)
}

/// Connects to the sandbox of a container.
///
/// # Errors
/// `WrongState` if the sandbox has ended; the message is runc's.
pub fn connect(record: &Record) -> Result<Client> {
    Client::open(sandbox(record)?)?.ok_or_else(not_running)
}

fn not_running() -> Error {
    Error::wrong_state("container not running")
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
    /// Whether there is a record, readable or not; without one, a command is still creating the
    /// container.
    fn is_known(&self) -> bool {
        matches!(
            self.record(),
            Ok(_)
                | Err(Error {
                    kind: hull_sandbox::ErrorKind::Host,
                    ..
                })
        )
    }

    /// Reads the record.
    ///
    /// # Errors
    /// `NotFound` if there is none yet; `Host` if it is damaged or was written by a newer hull.
    pub fn record(&self) -> Result<Record> {
        Record::read(&self.directory)?.ok_or_else(does_not_exist)
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, record: &Record) -> Result<()> {
        record.write(&self.directory)
    }

    /// Stores the bundle's configuration.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store_config(&self, config: &[u8]) -> Result<()> {
        self.directory.write(CONFIG_FILE, config)
    }

    /// The configuration at creation.
    ///
    /// # Errors
    /// The file is missing, cannot be read, or is not JSON.
    pub fn config(&self) -> Result<Value> {
        let path = self.directory.path().join(CONFIG_FILE);
        let text = self
            .directory
            .read(CONFIG_FILE)?
            .ok_or_else(|| Error::new(format!("there is no {}", path.display())))?;
        serde_json::from_slice(&text).context(|| format!("read {}", path.display()))
    }

    /// The hooks of its configuration.
    ///
    /// # Errors
    /// Those of [`Container::config`]; hooks that are none.
    pub fn hooks(&self) -> Result<Option<Hooks>> {
        match self.config()?.get("hooks") {
            None | Some(Value::Null) => Ok(None),
            Some(hooks) => serde_json::from_value(hooks.clone()).context(|| "read hooks"),
        }
    }

    /// Its limits now: those of the last update, or of its configuration.
    ///
    /// # Errors
    /// Those of [`Container::config`]; limits that are none.
    pub fn resources(&self, record: &Record) -> Result<LinuxResources> {
        if let Some(current) = &record.details.resources {
            return Ok(current.clone());
        }
        match self.config()?["linux"].get("resources") {
            None | Some(Value::Null) => Ok(LinuxResources::default()),
            Some(resources) => {
                serde_json::from_value(resources.clone()).context(|| "read resources")
            }
        }
    }

    /// Its status; stopped if the sandbox was killed, or the keeper: an engine that has seen the
    /// end of the process that it knows deletes the container at once, while the guest still ends
    /// it.
    ///
    /// # Errors
    /// The status is damaged, or was written by a newer hull.
    pub fn status(&self, record: &Record) -> Result<Status> {
        let mut status = record.status(&self.directory)?;
        let keeper = record.details.keeper;
        let has_keeper = matches!(
            status.state,
            State::Created | State::Running | State::Paused
        );
        if has_keeper && keeper.pid > 0 && !keeper.lives() {
            status.state = State::Stopped;
        }
        Ok(status)
    }

    /// Removes its directory.
    ///
    /// # Errors
    /// A file in it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        remove_all(self.directory.path())
    }
}

/// The OCI state of a container: what `state` prints and hooks read.
pub fn state(record: &Record, state: State, pid: i32) -> Value {
    let details = &record.details;
    // In runc's order: scripts look for parts of the text.
    let mut printed = serde_json::json!({
        "ociVersion": details.oci_version,
        "id": record.id,
        "pid": pid,
        "status": state,
        "bundle": details.bundle,
        "rootfs": details.rootfs,
        "created": rfc3339(record.created_ns),
    });
    if !details.annotations.is_empty() {
        printed["annotations"] = serde_json::json!(details.annotations);
    }
    printed["owner"] = serde_json::json!(details.owner);
    printed
}

fn rfc3339(nanoseconds: u64) -> String {
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(nanoseconds);
    humantime::format_rfc3339_nanos(time).to_string()
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
    fn an_id_belongs_to_the_first_that_claims_it() {
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
    fn engines_are_told_by_what_they_leave() {
        let annotated = |key: &str| BTreeMap::from([(key.to_owned(), "x".to_owned())]);
        let root = Path::new("/run/hull");
        assert_eq!(
            engine(&annotated("io.kubernetes.cri-o.SandboxID"), root),
            "cri-o"
        );
        assert_eq!(
            engine(&annotated("io.kubernetes.cri.sandbox-id"), root),
            "containerd"
        );
        assert_eq!(
            engine(&annotated("io.podman.annotations.init"), root),
            "podman"
        );
        let docker = Path::new("/var/run/docker/runtime-hull/moby");
        assert_eq!(engine(&BTreeMap::new(), docker), "docker");
        assert_eq!(engine(&BTreeMap::new(), root), "oci");
    }
}
