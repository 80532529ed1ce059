//! A bundle: the directory with `config.json`; read, and checked as far as the host is concerned.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use hull_sandbox::error::{Context, Error, Result};
use oci_spec::runtime::{Capability, Spec};
use serde::Deserialize;
use serde_json::{Value, json};

/// Longest configuration that is read, bytes.
const MAX_CONFIG: u64 = 32 << 20;

/// A bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Its directory, absolute.
    pub path: PathBuf,
    /// `root.path`, absolute.
    pub rootfs: PathBuf,
    /// `ociVersion`.
    pub version: String,
    /// `annotations`.
    pub annotations: BTreeMap<String, String>,
    /// The configuration, parsed.
    pub spec: Spec,
    /// The configuration as raw JSON, for the guest.
    pub config: Value,
    /// Warnings for the user: what was ignored.
    pub notes: Vec<String>,
}

impl Bundle {
    /// Reads and checks a bundle. Error messages that engines and users know are runc's.
    ///
    /// # Errors
    /// `config.json` is missing, not valid, or of another version than 1.x; the root file system is
    /// not a directory, or is the host's `/`.
    pub fn load(path: &Path) -> Result<Bundle> {
        let path = fs::canonicalize(path).context(|| format!("use bundle {}", path.display()))?;
        let file = path.join("config.json");
        let text = read(&file)?;
        let invalid = |error: serde_json::Error| {
            Error::new(format!("cannot use {}: {error}", file.display()))
        };
        let mut config: Value = serde_json::from_slice(&text).map_err(invalid)?;
        let version = match config.get("ociVersion") {
            Some(Value::String(version)) => version.clone(),
            _ => {
                return Err(Error::new(format!(
                    "cannot use {}: ociVersion is missing",
                    file.display()
                )));
            }
        };
        check_version(&version)?;
        let mut notes = Vec::new();
        if let Some(process) = config.get_mut("process") {
            notes = leave_out_unknown_capabilities(process);
            complete_process(process);
        }
        let spec: Spec = Spec::deserialize(&config).map_err(invalid)?;
        let root = spec
            .root()
            .as_ref()
            .ok_or_else(|| Error::new(format!("cannot use {}: root is missing", file.display())))?;
        let rootfs = path.join(root.path());
        match fs::metadata(&rootfs) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => {
                return Err(Error::new(format!(
                    "invalid rootfs: {} is not a directory",
                    rootfs.display()
                )));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(Error::new(format!(
                    "invalid rootfs: stat {}: no such file or directory",
                    rootfs.display()
                )));
            }
            Err(error) => {
                return Err(error).context(|| format!("use rootfs {}", rootfs.display()));
            }
        }
        let rootfs =
            fs::canonicalize(&rootfs).context(|| format!("use rootfs {}", rootfs.display()))?;
        if rootfs == Path::new("/") {
            return Err(Error::new(
                "invalid rootfs: the host's own root directory cannot be a container's",
            ));
        }
        Ok(Bundle {
            path,
            rootfs,
            version,
            annotations: spec
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            spec,
            config,
            notes,
        })
    }
}

/// Makes a further process one of the guest's: completed, and without labels of the host's security
/// modules (see `guest_spec`). Warnings for the user.
pub fn process_for_guest(process: &mut Value) -> Vec<String> {
    let notes = leave_out_unknown_capabilities(process);
    complete_process(process);
    if let Some(object) = process.as_object_mut() {
        object.remove("apparmorProfile");
        object.remove("selinuxLabel");
    }
    notes
}

/// Completes a process as runc does, and writes its words as those read them who parse it.
fn complete_process(process: &mut Value) {
    let Some(process) = process.as_object_mut() else {
        return;
    };
    // Without a user it is root.
    let user = process.entry("user").or_insert(Value::Null);
    if user.is_null() {
        *user = json!({"uid": 0, "gid": 0});
    }
    let flags = process
        .get_mut("scheduler")
        .and_then(|scheduler| scheduler.get_mut("flags"))
        .and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        // The specification's names; the others are those of the crate that parses it.
        let known = match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
            Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
            _ => continue,
        };
        *flag = json!(known);
    }
}

/// The specification requires only a warning for a capability that the runtime does not know.
fn leave_out_unknown_capabilities(process: &mut Value) -> Vec<String> {
    let mut unknown = BTreeSet::new();
    let sets = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()) {
        if let Some(names) = set.as_array_mut() {
            names.retain(|name| {
                let known = !name.is_string() || Capability::deserialize(name).is_ok();
                if !known {
                    unknown.insert(name.to_string());
                }
                known
            });
        }
    }
    unknown
        .into_iter()
        .map(|name| format!("unknown capability {name} is left out"))
        .collect()
}

fn read(file: &Path) -> Result<Vec<u8>> {
    let open = fs::File::open(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(format!(
            "JSON specification file {} not found",
            file.display()
        )),
        _ => Error::new(format!("cannot read {}: {error}", file.display())),
    })?;
    let mut text = Vec::new();
    open.take(MAX_CONFIG + 1)
        .read_to_end(&mut text)
        .context(|| format!("read {}", file.display()))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(Error::new(format!(
            "{} is longer than {} MiB",
            file.display(),
            MAX_CONFIG >> 20
        )));
    }
    Ok(text)
}

/// Any 1.x is accepted: later minor versions add fields, and the agent refuses those that it does
/// not know where the specification requires that. Versions before 1.0.0 are incompatible.
fn check_version(version: &str) -> Result<()> {
    let unknown = || {
        Error::new(format!(
            "unsupported ociVersion {version:?}: hull knows 1.0.0 to 1.2.x"
        ))
    };
    let number = version.split(['-', '+']).next().unwrap_or_default();
    let mut parts = number.split('.').map(str::parse::<u32>);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(Ok(1)), Some(Ok(_)), Some(Ok(_)), None) => Ok(()),
        _ => Err(unknown()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn bundle(config: &str) -> (tempfile::TempDir, Result<Bundle>) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        fs::write(directory.path().join("config.json"), config).unwrap();
        let bundle = Bundle::load(directory.path());
        (directory, bundle)
    }

    #[test]
    fn a_bundle_is_read() {
        let (directory, bundle) = bundle(
            r#"{"ociVersion":"1.0.2-dev","root":{"path":"rootfs"},"annotations":{"a":"b"}}"#,
        );
        let bundle = bundle.unwrap();
        let path = fs::canonicalize(directory.path()).unwrap();
        assert_eq!(bundle.rootfs, path.join("rootfs"));
        assert_eq!(bundle.annotations["a"], "b");
    }

    #[test]
    fn a_capability_of_the_future_is_left_out_and_named() {
        let (_directory, bundle) = bundle(
            r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"cwd":"/","user":{"uid":0,"gid":0},
                "args":["a"],"capabilities":{"bounding":["CAP_KILL","CAP_TEST"],"permitted":["CAP_TEST"]}}}"#,
        );
        let bundle = bundle.unwrap();
        assert_eq!(
            bundle.notes,
            [r#"unknown capability "CAP_TEST" is left out"#]
        );
        let sets = &bundle.config["process"]["capabilities"];
        assert_eq!(sets["bounding"], serde_json::json!(["CAP_KILL"]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (config, words) in [
            ("{", "config.json"),
            (r#"{"root":{"path":"rootfs"}}"#, "ociVersion is missing"),
            (
                r#"{"ociVersion":"2.0.0","root":{"path":"rootfs"}}"#,
                "unsupported ociVersion",
            ),
            (
                r#"{"ociVersion":"1.0","root":{"path":"rootfs"}}"#,
                "unsupported ociVersion",
            ),
            (r#"{"ociVersion":"1.0.0"}"#, "root is missing"),
            (
                r#"{"ociVersion":"1.0.0","root":{"path":"nothing"}}"#,
                "no such file or directory",
            ),
            (
                r#"{"ociVersion":"1.0.0","root":{"path":"config.json"}}"#,
                "is not a directory",
            ),
            (
                r#"{"ociVersion":"1.0.0","root":{"path":"/"}}"#,
                "own root directory",
            ),
            (
                r#"{"ociVersion":"1.0.0","root":{"path":"rootfs"},"mounts":3}"#,
                "config.json",
            ),
        ] {
            let error = bundle(config).1.unwrap_err();
            assert!(error.message.contains(words), "{config}: {error}");
        }
        let nothing = tempfile::tempdir().unwrap();
        let error = Bundle::load(nothing.path()).unwrap_err();
        assert!(error.message.ends_with("config.json not found"), "{error}");
    }
}
