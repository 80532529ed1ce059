//! Layer directories: each is found, or created once by the first process that needs it.
//!
//! Called by the installation of an image. A layer is named by its diff id, so images share it; one
//! whose unpacking depended on the layers below is named by its chain id instead.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::install::LayerStream;
use super::record::{read_json, write_json};
use super::{Store, flock};
use crate::digest::{Digest, HashingReader};
use crate::error::{Error, Result, check_digest};
use crate::limits::Budget;
use crate::progress::{Event, LayerState, Progress};
use crate::unpack::process::{Content, apply};
use crate::unpack::{LayerError, fs};

/// `layers/HEX/skeleton.gz`: what the layer's archive is created from again, beside its files.
pub(super) const SKELETON: &str = "skeleton.gz";

/// `layers/HEX/compressed.json`: what the layer became when it was packed for a registry.
pub(crate) const COMPRESSED: &str = "compressed.json";

/// `layers/HEX/layer.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LayerRecord {
    diff_id: Digest,
    bytes: u64,
    entries: u64,
    /// Whether the layers below are hidden.
    #[serde(default)]
    opaque: bool,
    /// Length of its archive in bytes, if the archive can be created again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    archive: Option<u64>,
}

/// A complete layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadyLayer {
    /// Name of its directory.
    pub name: String,
    /// Bytes in its files.
    pub bytes: u64,
    /// Number of its entries.
    pub entries: u64,
    /// Whether the layers below are hidden.
    pub opaque: bool,
}

/// A layer in the store.
#[derive(Debug)]
pub(crate) struct StoredLayer {
    pub diff_id: Digest,
    /// Its directory: the layer is `diff` in it.
    pub dir: PathBuf,
    /// Bytes in its files.
    pub bytes: u64,
    /// Length of its archive in bytes, if the archive can be created again.
    pub archive: Option<u64>,
}

/// Identifies a layer to be created.
pub(crate) struct LayerId {
    /// Digest in the manifest, for messages and progress.
    pub digest: Digest,
    /// Digest of its uncompressed archive.
    pub diff_id: Digest,
    /// Digest of the stack up to this layer.
    pub chain_id: Digest,
}

impl LayerId {
    fn by_diff_id(&self) -> String {
        self.diff_id.hex()
    }

    /// The suffix tells it from the lowest layer's diff id, which equals its chain id.
    fn by_chain_id(&self) -> String {
        format!("{}-chain", self.chain_id.hex())
    }
}

/// The chain id of a layer on top of another.
pub(crate) fn chain_id(below: Option<&Digest>, diff_id: &Digest) -> Digest {
    match below {
        None => *diff_id,
        Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
    }
}

impl Store {
    /// Finds an existing layer.
    pub(crate) fn find_layer(&self, layer: &LayerId) -> Result<Option<ReadyLayer>> {
        for name in [layer.by_diff_id(), layer.by_chain_id()] {
            let path = self.layers_dir().join(&name).join("layer.json");
            if let Some(record) = read_json::<LayerRecord>(&path)? {
                if !self.layer_diff(&name).exists() {
                    // Damaged by others: it is unpacked anew, for which its name must be free.
                    let beside = [SKELETON, COMPRESSED].map(|name| path.with_file_name(name));
                    for rest in beside.into_iter().chain([path]) {
                        match std::fs::remove_file(&rest) {
                            Err(error) if error.kind() != ErrorKind::NotFound => {
                                return Err(Error::io("remove", &rest, error));
                            }
                            _ => {}
                        }
                    }
                    continue;
                }
                return Ok(Some(ReadyLayer {
                    name,
                    bytes: record.bytes,
                    entries: record.entries,
                    opaque: record.opaque,
                }));
            }
        }
        Ok(None)
    }

    /// The layers of a stack, lowest first; `None` for those that are not in the store. Where a
    /// layer exists twice, the one whose archive can be created again.
    pub(super) fn stored_layers(&self, stack: &[LayerId]) -> Result<Vec<Option<StoredLayer>>> {
        let stored = |layer: &LayerId| -> Result<Option<StoredLayer>> {
            let mut found = None;
            for name in [layer.by_diff_id(), layer.by_chain_id()] {
                let dir = self.layers_dir().join(name);
                if let Some(record) = read_json::<LayerRecord>(&dir.join("layer.json"))?
                    && record.diff_id == layer.diff_id
                {
                    let stored = StoredLayer {
                        diff_id: record.diff_id,
                        dir,
                        bytes: record.bytes,
                        archive: record.archive,
                    };
                    match stored.archive {
                        Some(_) => return Ok(Some(stored)),
                        None => found = found.or(Some(stored)),
                    }
                }
            }
            Ok(found)
        };
        stack.iter().map(stored).collect()
    }

    /// Finds or creates a layer. `lower` are the directories below it, topmost first; `open`
    /// returns its archive and is called only if the layer must be created. `budget` counts what
    /// the image takes, with layers that exist.
    pub(crate) fn ensure_layer(
        &self,
        reference: &str,
        layer: &LayerId,
        lower: &[String],
        budget: &mut Budget,
        open: impl FnOnce() -> Result<LayerStream>,
        progress: &dyn Progress,
    ) -> Result<ReadyLayer> {
        let report = |state| {
            progress.event(Event::Layer {
                digest: &layer.digest,
                state,
            })
        };
        let partial = self
            .layers_dir()
            .join(format!("{}.partial", layer.by_diff_id()));
        let lock = loop {
            if let Some(ready) = self.find_layer(layer)? {
                budget
                    .take_bytes(ready.bytes)
                    .and_then(|()| budget.take_inodes(ready.entries))
                    .map_err(|source| Error::Layer {
                        reference: reference.to_owned(),
                        layer: layer.digest.to_string(),
                        source,
                    })?;
                report(LayerState::Present);
                return Ok(ready);
            }
            match lock_partial(&partial, || report(LayerState::Waiting)) {
                Ok(Some(lock)) => break lock,
                Ok(None) => {}
                Err(error) => return Err(Error::io("lock", &partial, error)),
            }
        };
        let made = self.make_layer(
            reference, layer, lower, budget, &partial, &lock, open, progress,
        );
        // Leftovers of an error, or of a layer that another process completed.
        self.remove_partial(&partial, &lock);
        if made.is_ok() {
            report(LayerState::Done);
        }
        made
    }

    #[allow(clippy::too_many_arguments)] // one call, in the function above
    fn make_layer(
        &self,
        reference: &str,
        layer: &LayerId,
        lower: &[String],
        budget: &mut Budget,
        partial: &Path,
        lock: &OwnedFd,
        open: impl FnOnce() -> Result<LayerStream>,
        progress: &dyn Progress,
    ) -> Result<ReadyLayer> {
        let (diff, root, skeleton) = prepare(partial, lock)?;
        let lower = lower
            .iter()
            .map(|name| {
                let path = self.layer_diff(name);
                fs::open_dir(&path).map_err(|error| Error::io("open", path, error))
            })
            .collect::<Result<Vec<_>>>()?;
        let content = self
            .unpack_stream(
                reference,
                layer,
                open()?,
                (skeleton, root),
                &lower,
                budget,
                progress,
            )
            .map_err(|error| no_space(error, partial))?;
        let name = if content.unpacked.used_lower {
            layer.by_chain_id()
        } else {
            layer.by_diff_id()
        };
        self.complete(partial, &diff, content, name)
    }

    /// Creates a layer from an archive of unknown digest. Returns its digest and length.
    pub(crate) fn import_layer(&self, what: &str, archive: impl BufRead) -> Result<(Digest, u64)> {
        let partial = self
            .layers_dir()
            .join(format!("import-{}.partial", std::process::id()));
        let lock = loop {
            let lock = lock_partial(&partial, || {})
                .map_err(|error| Error::io("lock", &partial, error))?;
            if let Some(lock) = lock {
                break lock;
            }
        };
        let made = self.make_imported(what, archive, &partial, &lock);
        // Leftovers of an error, or of a layer that existed already.
        self.remove_partial(&partial, &lock);
        made
    }

    /// Removes a partial layer's directory, unless it has become the layer: another process may
    /// unpack into a new directory of this name then. Best effort: an error before matters more,
    /// and the next attempt clears the directory.
    fn remove_partial(&self, partial: &Path, lock: &OwnedFd) {
        if is_at(partial, lock).is_ok_and(|ours| ours)
            && let Ok(layers) = fs::open_dir(self.layers_dir())
        {
            let _ = fs::remove_all(layers.as_fd(), partial);
        }
    }

    fn make_imported(
        &self,
        what: &str,
        mut archive: impl BufRead,
        partial: &Path,
        lock: &OwnedFd,
    ) -> Result<(Digest, u64)> {
        let (diff, root, skeleton) = prepare(partial, lock)?;
        let failed = |source| {
            let (reference, layer) = (what.to_owned(), "to be imported".to_owned());
            no_space(
                Error::Layer {
                    reference,
                    layer,
                    source,
                },
                partial,
            )
        };
        let mut budget = Budget::new(self.limits());
        let content = apply(
            &mut archive,
            skeleton,
            root,
            &[],
            &mut budget,
            self.unpacker(),
        )
        .map_err(failed)?;
        let diff_id = content.digest;
        let id = LayerId {
            digest: diff_id,
            diff_id,
            chain_id: diff_id,
        };
        if self.find_layer(&id)?.is_none() {
            self.complete(partial, &diff, content, id.by_diff_id())?;
        }
        Ok((diff_id, content.length))
    }

    /// Renames an unpacked layer to its final name.
    fn complete(
        &self,
        partial: &Path,
        diff: &OwnedFd,
        content: Content,
        name: String,
    ) -> Result<ReadyLayer> {
        let failed = |doing| move |error: Errno| Error::io(doing, partial, error);
        let record = LayerRecord {
            diff_id: content.digest,
            bytes: content.unpacked.bytes,
            entries: content.unpacked.entries,
            opaque: fs::is_opaque(diff.as_fd()),
            archive: content.recorded.then_some(content.length),
        };
        if !content.recorded {
            let path = partial.join(SKELETON);
            std::fs::remove_file(&path).map_err(|error| Error::io("remove", path, error))?;
        }
        write_json(&partial.join("layer.json"), &record)?;
        rustix::fs::syncfs(diff).map_err(failed("flush"))?;
        let path = self.layers_dir().join(&name);
        match std::fs::rename(partial, &path) {
            // Another process imported the same layer.
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            result => result.map_err(|error| Error::io("complete", &path, error))?,
        }
        fs::sync_dir(&self.layers_dir()).map_err(failed("flush"))?;
        Ok(ReadyLayer {
            name,
            bytes: record.bytes,
            entries: record.entries,
            opaque: record.opaque,
        })
    }
}

/// Clears a partial layer's directory. Opens its new root, twice, and the file for the skeleton of
/// its archive.
fn prepare(partial: &Path, lock: &OwnedFd) -> Result<(OwnedFd, OwnedFd, File)> {
    let failed = |doing| move |error: Errno| Error::io(doing, partial, error);
    // Leftovers of an interrupted attempt.
    for rest in ["diff", "layer.json", "layer.json.tmp", SKELETON] {
        fs::remove_all(lock.as_fd(), rest).map_err(failed("clear"))?;
    }
    rustix::fs::mkdirat(lock, "diff", Mode::RWXU).map_err(failed("create"))?;
    let diff = fs::open_child_dir(lock.as_fd(), "diff").map_err(failed("open"))?;
    // Docker's default if the archive has no entry for the root.
    rustix::fs::fchmod(&diff, Mode::from_raw_mode(0o755)).map_err(failed("set the mode of"))?;
    let root = rustix::io::fcntl_dupfd_cloexec(&diff, 0).map_err(failed("open"))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let skeleton = rustix::fs::openat(lock, SKELETON, flags, Mode::RUSR | Mode::WUSR)
        .map_err(failed("create the skeleton in"))?;
    Ok((diff, root, skeleton.into()))
}

/// Reports a full disk as such, not as an error of the layer.
fn no_space(error: Error, path: &Path) -> Error {
    match error {
        Error::Layer { source, .. } if source.is_full() => Error::NoSpace {
            doing: "unpack a layer into",
            path: path.to_owned(),
        },
        Error::Layer {
            source: LayerError::Reserve(low),
            ..
        } => Error::Reserve {
            doing: "unpack a layer into",
            path: path.to_owned(),
            low,
        },
        other => other,
    }
}

/// Creates and locks the directory to unpack a layer into. `None` if it was completed or removed by
/// another process before we had the lock.
fn lock_partial(path: &Path, waiting: impl FnOnce()) -> rustix::io::Result<Option<OwnedFd>> {
    match rustix::fs::mkdir(path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        other => other?,
    };
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            waiting();
            flock(&fd, FlockOperation::LockExclusive)?;
        }
        result => result?,
    }
    Ok(is_at(path, &fd)?.then_some(fd))
}

/// Whether `path` still names the directory of `fd`.
fn is_at(path: &Path, fd: &OwnedFd) -> rustix::io::Result<bool> {
    let ours = rustix::fs::fstat(fd)?;
    match rustix::fs::statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Store {
    /// Unpacks an archive and verifies its digests.
    #[allow(clippy::too_many_arguments)] // one call, in the function above
    fn unpack_stream(
        &self,
        reference: &str,
        layer: &LayerId,
        stream: LayerStream,
        (skeleton, root): (File, OwnedFd),
        lower: &[OwnedFd],
        budget: &mut Budget,
        progress: &dyn Progress,
    ) -> Result<Content> {
        let total = stream.size.unwrap_or(0);
        let reader = ProgressReader {
            inner: stream.reader,
            digest: layer.digest,
            done: 0,
            total,
            progress,
        };
        // One byte more than announced detects excess data.
        let limit = stream.size.map_or(u64::MAX, |size| size.saturating_add(1));
        let mut archive =
            BufReader::with_capacity(256 * 1024, HashingReader::new(reader.take(limit)));
        let result = apply(&mut archive, skeleton, root, lower, budget, self.unpacker()).and_then(
            |content| match content.digest == layer.diff_id {
                true => Ok(content),
                false => Err(LayerError::DiffId {
                    expected: layer.diff_id,
                    actual: content.digest,
                }),
            },
        );
        // A damaged archive fails in many ways; report the damage rather than its consequence.
        let of_host = result.as_ref().is_err_and(LayerError::is_of_host);
        if let (Some(expected), false) = (stream.digest, of_host) {
            let mut archive = archive.into_inner();
            let drained = archive.drain();
            let (length, actual) = (archive.length(), archive.finish());
            if let Some(size) = stream
                .size
                .filter(|&size| drained.is_ok() && size != length)
            {
                return Err(Error::Truncated {
                    reference: reference.to_owned(),
                    what: "layer",
                    digest: expected,
                    expected: size,
                    actual: length,
                });
            }
            if drained.is_ok() {
                check_digest(reference, "layer", expected, actual)?;
            }
        }
        result.map_err(|source| Error::Layer {
            reference: reference.to_owned(),
            layer: layer.digest.to_string(),
            source,
        })
    }
}

/// Reports the progress of reading a layer.
struct ProgressReader<'a, R> {
    inner: R,
    digest: Digest,
    done: u64,
    total: u64,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for ProgressReader<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        let state = LayerState::Unpacking {
            done: self.done,
            total: self.total,
        };
        self.progress.event(Event::Layer {
            digest: &self.digest,
            state,
        });
        Ok(read)
    }
}
