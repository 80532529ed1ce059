//! Removes names, images, and data that neither an image nor a container uses any more.
//!
//! Called by `hull image rm` and `prune`. Names and records are removed at once, under the
//! exclusive lock; layers that only they used are moved aside under the same lock and deleted after
//! it, so that nobody waits for a big tree.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::hold::HoldRecord;
use super::record::{Record, Removed, read_json};
use super::{FileLock, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;
use crate::unpack::fs;

/// Prefix of directories that are being deleted.
const TRASH: &str = "trash-";

impl Store {
    /// Removes a name, and the image if that was its last one. By id, removes the image with its
    /// name; with several names, or with containers that use it, only if `force` is set. An image
    /// that containers use loses its names only: they can be started again.
    ///
    /// `container_exists` reports whether the container with an id still exists.
    pub fn remove(
        &self,
        reference: &Reference,
        force: bool,
        container_exists: &dyn Fn(&str) -> bool,
    ) -> Result<Removed> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let mut references = self.read_references()?;
        let written = reference.written();
        let key = reference.to_string();
        let mut removed = Removed::default();
        let (manifest, names) = match references.names.get(&key) {
            Some(named) => (named.manifest, vec![key]),
            None => {
                // Also works for an image that lost layers, so that it can be removed.
                let found = self.locate(reference, &references)?;
                let (manifest, _) = found.ok_or_else(|| Error::NotFound {
                    reference: written.clone(),
                    why_local: "",
                })?;
                let same = |(_, named): &(&String, &super::Named)| named.manifest == manifest;
                let names: Vec<String> = references
                    .names
                    .iter()
                    .filter(same)
                    .map(|(name, _)| name.clone())
                    .collect();
                if names.len() > 1 && !force {
                    return Err(Error::SeveralNames { id: written, names });
                }
                (manifest, names)
            }
        };
        let last = references
            .names
            .iter()
            .all(|(name, named)| named.manifest != manifest || names.contains(name));
        let holds = self.live_holds(container_exists)?;
        let users: Vec<String> = holds
            .iter()
            .filter(|(_, hold)| last && hold.manifest == manifest)
            .map(|(id, _)| id.clone())
            .collect();
        let used = !users.is_empty();
        if used && (!force || names.is_empty()) {
            return Err(Error::InUse {
                reference: written,
                containers: users,
            });
        }
        references.names.retain(|name, _| !names.contains(name));
        self.write_references(&references)?;
        removed.untagged = names;
        if last && !used {
            self.remove_record(&manifest, &mut removed)?;
        }
        self.collect(lock, &holds, &mut removed)?;
        Ok(removed)
    }

    /// Removes images that no container uses: those without a name, with `all` also those with one.
    /// Also removes leftovers of interrupted pulls.
    pub fn prune(&self, all: bool, container_exists: &dyn Fn(&str) -> bool) -> Result<Removed> {
        self.prune_some(all, container_exists, &|_| true)
    }

    /// The same of images that `selects` says yes to, by the digests of their manifests.
    pub fn prune_some(
        &self,
        all: bool,
        container_exists: &dyn Fn(&str) -> bool,
        selects: &dyn Fn(&Digest) -> bool,
    ) -> Result<Removed> {
        let lock = self.lock(FlockOperation::LockExclusive)?;
        let mut references = self.read_references()?;
        let holds = self.live_holds(container_exists)?;
        let mut removed = Removed::default();
        for (manifest, _) in self.all_records()? {
            let used = holds.iter().any(|(_, hold)| hold.manifest == manifest);
            let named = references
                .names
                .values()
                .any(|named| named.manifest == manifest);
            if used || (named && !all) || !selects(&manifest) {
                continue;
            }
            references.names.retain(|name, named| {
                let keep = named.manifest != manifest;
                if !keep {
                    removed.untagged.push(name.clone());
                }
                keep
            });
            self.write_references(&references)?;
            self.remove_record(&manifest, &mut removed)?;
        }
        self.collect(lock, &holds, &mut removed)?;
        Ok(removed)
    }

    /// The layers of the image with this manifest: their names, and the bytes in their files.
    ///
    /// # Errors
    /// The image's record cannot be read.
    pub fn layers_of(&self, manifest: &Digest) -> Result<Vec<(String, u64)>> {
        let record = self.read_record(manifest)?;
        let layers = record.map(|record| record.layers).unwrap_or_default();
        let with_bytes = |name: String| {
            let bytes = layer_bytes(&self.layers_dir().join(&name));
            (name, bytes)
        };
        Ok(layers.into_iter().map(with_bytes).collect())
    }

    fn remove_record(&self, manifest: &Digest, removed: &mut Removed) -> Result<()> {
        match self.read_record(manifest) {
            Ok(Some(record)) => {
                // Another manifest may describe the same image.
                let same = |other: &Record| other.id == record.id && other.manifest != *manifest;
                if !self.records()?.iter().any(same) {
                    removed.images.push(record.id.to_string());
                }
            }
            Ok(None) | Err(Error::CorruptStore { .. }) => {}
            Err(error) => return Err(error),
        }
        let path = self.record_path(manifest);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", path, error))
            }
            _ => Ok(()),
        }
    }

    /// Removes unreferenced blobs and layers.
    fn collect(
        &self,
        lock: FileLock,
        holds: &[(String, HoldRecord)],
        removed: &mut Removed,
    ) -> Result<()> {
        // A pull's layers and blobs are not referenced until it ends.
        let busy = self.open_lock_file("busy")?;
        match super::flock(&busy, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                removed.layers_kept = true;
                return Ok(());
            }
            Err(error) => return Err(Error::io("lock", self.root.join("busy"), error)),
        }
        let records = self.records()?;
        self.collect_blobs(&records)?;
        let trash = self.trash_layers(&records, holds, removed)?;
        // The trash is unreachable, so nobody has to wait.
        drop((lock, busy));
        let layers = self.layers_dir();
        let dir = fs::open_dir(&layers).map_err(|error| Error::io("open", &layers, error))?;
        for path in trash {
            fs::remove_all(dir.as_fd(), &path)
                .map_err(|error| Error::io("remove", &path, error))?;
        }
        Ok(())
    }

    fn collect_blobs(&self, records: &[Record]) -> Result<()> {
        let used: BTreeSet<String> = records
            .iter()
            .flat_map(|record| [record.id.hex(), record.manifest.hex()])
            .collect();
        let dir = self.root.join("blobs/sha256");
        for name in self.names_in(&dir)? {
            if !used.contains(&name) {
                let path = dir.join(&name);
                std::fs::remove_file(&path).map_err(|error| Error::io("remove", path, error))?;
            }
        }
        Ok(())
    }

    /// Moves aside the layer directories that neither an image nor a container uses, complete or
    /// not.
    fn trash_layers(
        &self,
        records: &[Record],
        holds: &[(String, HoldRecord)],
        removed: &mut Removed,
    ) -> Result<Vec<PathBuf>> {
        let used: BTreeSet<&String> = records
            .iter()
            .flat_map(|record| record.layers.iter().chain(&record.hidden))
            .chain(holds.iter().flat_map(|(_, hold)| &hold.layers))
            .collect();
        let dir = self.layers_dir();
        let mut trash = Vec::new();
        for name in self.names_in(&dir)? {
            let path = dir.join(&name);
            if name.starts_with(TRASH) {
                // Its deletion was interrupted, or is still running.
                trash.push(path);
            } else if !used.contains(&name) {
                removed.bytes += layer_bytes(&path);
                let aside = dir.join(format!("{TRASH}{name}"));
                std::fs::rename(&path, &aside).map_err(|error| Error::io("remove", path, error))?;
                trash.push(aside);
            }
        }
        Ok(trash)
    }

    fn names_in(&self, dir: &std::path::Path) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|error| Error::io("read", dir, error))? {
            let entry = entry.map_err(|error| Error::io("read", dir, error))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }
}

fn layer_bytes(layer: &std::path::Path) -> u64 {
    #[derive(serde::Deserialize)]
    struct Bytes {
        bytes: u64,
    }
    let bytes = read_json::<Bytes>(&layer.join("layer.json"));
    bytes.ok().flatten().map_or(0, |layer| layer.bytes)
}
