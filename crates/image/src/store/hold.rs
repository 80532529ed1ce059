//! Marks an image as needed by a container, so that it is not removed.
//!
//! Called by the sandbox. A hold is a file that lists the layers. It is valid while the process
//! that created it lives (it keeps the file locked) or the container exists (known to the code that
//! removes images). So neither a killed process nor a reboot leaves images that cannot be removed,
//! and no process has to run to keep one.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::record::read_json;
use super::{Image, Store, flock};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// `holds/ID.json`
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HoldRecord {
    /// Manifest digest of the image.
    pub manifest: Digest,
    /// Names of its layer directories.
    pub layers: Vec<String>,
}

/// Keeps an image while this value, or the container, exists. Dropping it leaves the file: the
/// container may continue without this process.
#[derive(Debug)]
pub struct Hold {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Hold {
    /// Deletes the hold, as the container is gone.
    pub fn release(self) -> Result<()> {
        remove_file(&self.path)
    }
}

impl Store {
    /// Holds an image for the container `id`. `None` for an image that is not in the store
    /// (`rootfs:`).
    ///
    /// # Errors
    /// `Damaged` if the image was removed since it was resolved: resolve it again. `Io` if `id` is
    /// not a valid file name or the hold cannot be written.
    pub fn hold(&self, image: &Image, id: &str) -> Result<Option<Hold>> {
        let Some(manifest) = image.digest else {
            return Ok(None);
        };
        let path = self.hold_path(id)?;
        let layers = image
            .layers
            .iter()
            .filter_map(|diff| diff.parent()?.file_name()?.to_str().map(str::to_owned))
            .collect();
        let record = HoldRecord { manifest, layers };
        // Removal takes this lock exclusively: either it sees the hold, or the check below finds
        // the layers missing.
        let _lock = self.lock(FlockOperation::LockShared)?;
        let hold = write_locked(&path, &record)?;
        let gone = image.layers.iter().find(|path| !path.exists());
        if let Some(gone) = gone {
            remove_file(&path)?;
            let what = format!("layer {}", gone.display());
            return Err(Error::Damaged {
                reference: image.reference.clone(),
                what,
            });
        }
        Ok(Some(Hold { path, _lock: hold }))
    }

    /// Deletes the hold of container `id`, which is gone, whichever process created it.
    pub fn release(&self, id: &str) -> Result<()> {
        remove_file(&self.hold_path(id)?)
    }

    fn hold_path(&self, id: &str) -> Result<PathBuf> {
        let path = self.root.join("holds").join(format!("{id}.json"));
        let plain = !id.is_empty()
            && id
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !id.starts_with('.');
        if plain {
            return Ok(path);
        }
        Err(Error::io(
            "use the container id in",
            path,
            rustix::io::Errno::INVAL,
        ))
    }

    /// All valid holds, with the ids of their containers. Deletes the others. The caller holds the
    /// exclusive lock.
    pub(super) fn live_holds(
        &self,
        exists: &dyn Fn(&str) -> bool,
    ) -> Result<Vec<(String, HoldRecord)>> {
        let dir = self.root.join("holds");
        let mut live = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(|error| Error::io("read", &dir, error))? {
            let name = entry
                .map_err(|error| Error::io("read", &dir, error))?
                .file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".json")) else {
                continue;
            };
            let path = dir.join(&name);
            if exists(id) || is_locked(&path) {
                // Without it nobody knows which layers are in use.
                let record = read_json(&path).map_err(|error| match error {
                    Error::CorruptStore { path, reason } => Error::CorruptHold {
                        container: id.to_owned(),
                        path,
                        reason,
                    },
                    error => error,
                })?;
                live.extend(record.map(|record| (id.to_owned(), record)));
            } else {
                remove_file(&path)?;
            }
        }
        live.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(live)
    }
}

/// Whether a live process keeps the file locked.
fn is_locked(path: &std::path::Path) -> bool {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|fd| rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive))
        .is_err_and(|error| error == rustix::io::Errno::WOULDBLOCK)
}

/// Writes a hold and keeps it locked. It is not needed after a reboot, so it is not flushed to
/// disk; readers hold the exclusive lock, so they cannot see a partial file.
fn write_locked(path: &std::path::Path, record: &HoldRecord) -> Result<OwnedFd> {
    let content = serde_json::to_vec(record).map_err(|error| Error::CorruptStore {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|error| Error::io("create", path, error))?;
    flock(&fd, FlockOperation::LockShared).map_err(|error| Error::io("lock", path, error))?;
    let mut file = File::from(fd);
    file.write_all(&content)
        .map_err(|error| Error::io("write", path, error))?;
    Ok(file.into())
}

fn remove_file(path: &std::path::Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path, error))
        }
        _ => Ok(()),
    }
}
