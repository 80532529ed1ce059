//! Downloads one layer archive into the store's blobs, resuming an earlier attempt.
//!
//! Called by the registry source. The archive grows in `HEX.part`, which is locked meanwhile, and
//! gets its final name only when its digest is verified and it is flushed to disk. A second process
//! that wants it waits for the lock and then finds the archive, or the layer created from it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::StatusCode;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::http::Failure;
use super::registry::Session;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result, check_digest};
use crate::limits::Disk;
use crate::manifest::Descriptor;
use crate::progress::{Event, LayerState, Progress};
use crate::store::{PlannedLayer, Store, flock};

/// Attempts without any progress before giving up.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// A locked, incomplete archive.
struct Part {
    file: File,
    path: PathBuf,
    hasher: Hasher,
    disk: Disk,
}

/// Outcome of one request.
enum Ended {
    /// The registry sent everything.
    Complete,
    /// The connection failed, or the registry had an error: retried.
    Failed(Error),
    /// The response broke off: retried.
    Cut,
    /// The registry has no bytes beyond those already here.
    NothingLeft,
}

/// Ensures that a layer's archive, or the layer itself, is in the store.
pub(super) async fn layer(
    session: &Session<'_>,
    store: &Store,
    descriptor: &Descriptor,
    planned: &PlannedLayer,
    progress: &dyn Progress,
) -> Result<()> {
    let report = |state| {
        progress.event(Event::Layer {
            digest: &descriptor.digest,
            state,
        })
    };
    let blob = store.archive_path(&descriptor.digest);
    let path = store
        .blob_path(&descriptor.digest)
        .with_added_extension("part");
    let file = loop {
        if blob.exists() {
            return Ok(());
        }
        // Check the layer second: its archive is removed only after the layer is complete.
        if store.has_layer(&planned.diff_id) {
            let _ = std::fs::remove_file(&path);
            return Ok(());
        }
        if let Some(file) = lock_part(&path, || report(LayerState::Waiting)).await? {
            break file;
        }
    };
    let mut part = Part {
        file,
        path,
        hasher: Hasher::new(),
        disk: store.disk()?,
    };
    if blob.exists() {
        return part.discard();
    }
    part.read_start(descriptor.size)?;
    let fetched = part.fetch(session, descriptor, &report).await;
    if let Err(error) = fetched {
        if matches!(
            error,
            Error::NoSpace { .. }
                | Error::Reserve { .. }
                | Error::WrongDigest { .. }
                | Error::Truncated { .. }
        ) {
            part.discard()?;
        }
        return Err(error);
    }
    part.complete(&blob)
}

/// Opens and locks the incomplete archive. `None` if `path` refers to another file by then: retry.
async fn lock_part(path: &Path, waiting: impl FnOnce()) -> Result<Option<File>> {
    let failed = |doing| move |error: io::Error| Error::io(doing, path, error);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed("open"))?;
    let file = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => file,
        Err(Errno::WOULDBLOCK) => {
            waiting();
            let blocking = move || flock(&file, FlockOperation::LockExclusive).map(|()| file);
            tokio::task::spawn_blocking(blocking)
                .await
                .map_err(|error| failed("lock")(io::Error::other(error)))?
                .map_err(|error| failed("lock")(error.into()))?
        }
        Err(error) => return Err(failed("lock")(error.into())),
    };
    let ours = file.metadata().map_err(failed("look at"))?;
    match std::fs::metadata(path) {
        Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => Ok(Some(file)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at")(error)),
    }
}

impl Part {
    fn io(&self, doing: &'static str) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.path.clone();
        move |error| Error::io(doing, &path, error)
    }

    /// Hashes the existing bytes.
    fn read_start(&mut self, size: u64) -> Result<()> {
        let length = self.file.metadata().map_err(self.io("look at"))?.len();
        if length > size {
            return self.restart();
        }
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => self.hasher.update(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io("read")(error)),
            }
        }
    }

    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(self.io("empty"))?;
        io::Seek::rewind(&mut self.file).map_err(self.io("empty"))?;
        self.hasher = Hasher::new();
        Ok(())
    }

    async fn fetch(
        &mut self,
        session: &Session<'_>,
        descriptor: &Descriptor,
        report: &impl Fn(LayerState),
    ) -> Result<()> {
        let truncated = |actual: u64| Error::Truncated {
            reference: session.name.written().to_owned(),
            what: "layer",
            digest: descriptor.digest,
            expected: descriptor.size,
            actual,
        };
        let resumed = self.hasher.length() > 0;
        let mut fruitless = 0;
        while self.hasher.length() < descriptor.size {
            let before = self.hasher.length();
            let ended = self.request(session, descriptor, report).await?;
            let grown = self.hasher.length() > before;
            fruitless = if grown { 0 } else { fruitless + 1 };
            match ended {
                Ended::NothingLeft => return Err(truncated(self.hasher.length())),
                Ended::Complete if !grown => return Err(truncated(self.hasher.length())),
                // Responses that break off at the same offset: the registry has no more, whatever
                // length it announces.
                Ended::Cut if fruitless >= ATTEMPTS => return Err(truncated(self.hasher.length())),
                Ended::Failed(error) if fruitless >= ATTEMPTS => return Err(error),
                Ended::Failed(_) | Ended::Cut => {
                    tracing::debug!(layer = %descriptor.digest, "transfer broke off, trying again");
                    tokio::time::sleep(FIRST_PAUSE * 2u32.pow(fruitless)).await;
                }
                Ended::Complete => {}
            }
        }
        let actual = self.hasher.clone().finish();
        if resumed && actual != descriptor.digest {
            // Only the bytes of the earlier attempt may be bad.
            self.restart()?;
            return Box::pin(self.fetch(session, descriptor, report)).await;
        }
        check_digest(session.name.written(), "layer", descriptor.digest, actual)
    }

    /// Sends one request, starting at the archive's end.
    async fn request(
        &mut self,
        session: &Session<'_>,
        descriptor: &Descriptor,
        report: &impl Fn(LayerState),
    ) -> Result<Ended> {
        let offset = self.hasher.length();
        let mut response = match session.http.blob(&descriptor.digest, offset).await {
            Ok(response) => response,
            Err(Failure::Status { status: 416, .. }) => return Ok(Ended::NothingLeft),
            Err(Failure::Transport(error)) if error.is_body() || error.is_decode() => {
                return Ok(Ended::Cut);
            }
            Err(failure) => {
                let passing = matches!(
                    &failure,
                    Failure::Transport(_)
                        | Failure::Slow
                        | Failure::Status {
                            status: 500.. | 429,
                            ..
                        }
                );
                let error = session.error("layer", failure).await;
                return if passing {
                    Ok(Ended::Failed(error))
                } else {
                    Err(error)
                };
            }
        };
        if response.status() != StatusCode::PARTIAL_CONTENT {
            // The registry does not support ranges.
            self.restart()?;
        }
        loop {
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Ok(Ended::Complete),
                // The error of the connection's end does not matter.
                Err(_) if self.hasher.length() == descriptor.size => return Ok(Ended::Complete),
                Err(error) => {
                    tracing::debug!(%error, layer = %descriptor.digest, "answer broke off");
                    return Ok(Ended::Cut);
                }
            };
            if self.hasher.length() + chunk.len() as u64 > descriptor.size {
                return Err(Error::Invalid {
                    reference: session.name.written().to_owned(),
                    what: "layer",
                    reason: format!(
                        "{} is longer than the {} bytes announced",
                        descriptor.digest, descriptor.size
                    ),
                });
            }
            self.disk
                .bytes(chunk.len() as u64)
                .map_err(|error| Error::disk("write", &self.path, error))?;
            self.file.write_all(&chunk).map_err(self.io("write"))?;
            self.hasher.update(&chunk);
            report(LayerState::Downloading {
                done: self.hasher.length(),
                total: descriptor.size,
            });
        }
    }

    fn complete(self, blob: &Path) -> Result<()> {
        self.file.sync_all().map_err(self.io("flush"))?;
        std::fs::rename(&self.path, blob).map_err(self.io("complete"))?;
        match blob.parent() {
            Some(dir) => {
                crate::unpack::fs::sync_dir(dir).map_err(|error| Error::io("flush", dir, error))
            }
            None => Ok(()),
        }
    }

    fn discard(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(self.io("remove"))
    }
}

impl Store {
    /// Whether the layer exists under its diff id. (If it only exists under a chain id, its archive
    /// is downloaded unnecessarily.)
    fn has_layer(&self, diff_id: &Digest) -> bool {
        self.root().join("layers").join(diff_id.hex()).exists()
    }
}
