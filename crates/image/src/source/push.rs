//! Sends an image of the store to a registry.
//!
//! Called by `hull image push`. Layers are unpacked in the store, so each is packed again, unless
//! the registry has it: as it came (its digest in the image's manifest), or as it was packed for an
//! earlier push. If the registry has all layers as they came, the image's own manifest is sent, and
//! its digest stays. Otherwise a manifest is made for what was packed; the image's id stays.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::http::{Access, Failure, Upload};
use super::registry::Session;
use crate::credentials::Credentials;
use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::manifest::{self, Descriptor, Document, Manifest};
use crate::progress::{Event, LayerState, Progress};
use crate::reference::{Reference, RegistryReference, Version};
use crate::store::{COMPRESSED, Content, Store, StoredLayer, read_json, write_json};

/// Attempts of one request before giving up.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Time between two looks at how far an upload is.
const TICK: Duration = Duration::from_millis(200);

/// What was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The tag.
    pub tag: String,
    /// Digest of the manifest in the registry.
    pub digest: Digest,
    /// Bytes of the manifest.
    pub size: u64,
}

/// `layers/HEX/compressed.json`: what a layer becomes when it is packed.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Compressed {
    digest: Digest,
    size: u64,
}

/// A layer that was packed.
struct Packed {
    file: File,
    compressed: Compressed,
}

struct Pusher<'a> {
    store: &'a Store,
    session: Session<'a>,
    runtime: Runtime,
    progress: &'a dyn Progress,
}

impl Store {
    /// Sends the local image `name` to its registry, under its tag.
    ///
    /// # Errors
    /// `NotFound` if there is no local image of this name; `NoArchive` if a layer cannot be packed;
    /// `Unauthorized`, `Unreachable` and `Registry` for what the registry answers.
    pub fn push(
        &self,
        name: &RegistryReference,
        credentials: &Credentials,
        progress: &dyn Progress,
    ) -> Result<Pushed> {
        let Version::Tag(tag) = &name.version else {
            return Err(Error::InvalidReference {
                reference: name.written().to_owned(),
                reason: "an image is pushed by its tag".to_owned(),
            });
        };
        // An id, or the beginning of one, is no name that a registry can have.
        if self.named(&name.to_string())?.is_none() {
            return Err(Error::NotFound {
                reference: name.written().to_owned(),
                why_local: "",
            });
        }
        let _work = self.begin_work()?;
        let image = self.inspect(&Reference::Registry(name.clone()))?;
        let content = self.content(&image)?;
        let (bytes, original) = self.manifest_of(&image)?;
        let found = credentials.find(&name.registry)?;
        let session = Session::new(name, found, Access::Push, "")?;
        let runtime = session.runtime()?;
        let pusher = Pusher {
            store: self,
            session,
            runtime,
            progress,
        };
        progress.event(Event::Started {
            reference: name.written(),
            layers: content.layers.len(),
        });
        let layers = pusher.layers(&content, &original)?;
        pusher.config(&content.config)?;
        let same = layers.iter().map(|layer| layer.digest);
        let (media_type, bytes) = if same.eq(original.layers.iter().map(|layer| layer.digest)) {
            let media_type = original.media_type.as_deref();
            (media_type.unwrap_or(manifest::OCI_MANIFEST), bytes)
        } else {
            let bytes = manifest::describe(&content.config, layers);
            let bytes = bytes.map_err(|error| pusher.session.failed(error.to_string()))?;
            (manifest::OCI_MANIFEST, bytes)
        };
        pusher.send("manifest", || {
            pusher.session.http.put_manifest(tag, media_type, &bytes)
        })?;
        progress.event(Event::Finished);
        let digest = Digest::of(&bytes);
        if let Some(manifest) = image.digest {
            self.set_repo_digest(&name.to_string(), manifest, digest)?;
        }
        Ok(Pushed {
            tag: tag.clone(),
            digest,
            size: bytes.len() as u64,
        })
    }

    /// The manifest of an image, as it is in the store.
    fn manifest_of(&self, image: &crate::store::Image) -> Result<(Vec<u8>, Manifest)> {
        let damaged = || Error::Damaged {
            reference: image.reference.clone(),
            what: "its manifest".to_owned(),
        };
        let path = self.blob_path(&image.digest.ok_or_else(damaged)?);
        let bytes = std::fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
        match manifest::parse(&image.reference, &bytes)? {
            Document::Manifest(manifest) => Ok((bytes, manifest)),
            Document::Index(_) => Err(damaged()),
        }
    }
}

impl Pusher<'_> {
    /// Sends the layers that the registry does not have; what they are there.
    fn layers(&self, content: &Content, original: &Manifest) -> Result<Vec<Descriptor>> {
        let written = self.session.name.written();
        let mut known: BTreeMap<Digest, Descriptor> = BTreeMap::new();
        let mut layers = Vec::new();
        for (index, diff_id) in content.document.diff_ids.iter().enumerate() {
            if let Some(descriptor) = known.get(diff_id) {
                layers.push(descriptor.clone());
                continue;
            }
            let original = original.layers.get(index);
            let descriptor = match original {
                Some(original) if self.has(&original.digest, original.size)? => {
                    self.report(diff_id, LayerState::Present);
                    original.as_oci_layer()
                }
                _ => {
                    let (layer, length) = content.archive(written, index)?;
                    self.layer(layer, length)?
                }
            };
            known.insert(*diff_id, descriptor.clone());
            layers.push(descriptor);
        }
        Ok(layers)
    }

    /// Packs a layer and sends it, unless the registry has it.
    fn layer(&self, layer: &StoredLayer, length: u64) -> Result<Descriptor> {
        let described =
            |compressed: Compressed| Descriptor::gzip_layer(compressed.digest, compressed.size);
        let path = layer.dir.join(COMPRESSED);
        // Only a hint: a damaged one is written again.
        if let Ok(Some(compressed)) = read_json::<Compressed>(&path)
            && self.has(&compressed.digest, compressed.size)?
        {
            self.report(&layer.diff_id, LayerState::Present);
            return Ok(described(compressed));
        }
        let packed = self.pack(layer, length)?;
        let Compressed { digest, size } = packed.compressed;
        if let Err(error) = write_json(&path, &packed.compressed) {
            tracing::debug!("the next push packs layer {} again: {error}", layer.diff_id);
        }
        match self.has(&digest, size)? {
            true => self.report(&layer.diff_id, LayerState::Present),
            false => {
                let open = || packed.file.try_clone();
                self.upload("layer", &digest, size, &open, &|done| {
                    let state = LayerState::Uploading { done, total: size };
                    self.report(&layer.diff_id, state);
                })?;
                self.report(&layer.diff_id, LayerState::Done);
            }
        }
        Ok(described(packed.compressed))
    }

    fn report(&self, digest: &Digest, state: LayerState) {
        self.progress.event(Event::Layer { digest, state });
    }

    fn pack(&self, layer: &StoredLayer, total: u64) -> Result<Packed> {
        const DOING: &str = "pack a layer into a temporary file in";
        let root = self.store.root();
        let failed = |error: io::Error| Error::io(DOING, root, error);
        let output = Hashing {
            file: self.store.temporary_file()?,
            hasher: Hasher::new(),
        };
        let mut output = GzEncoder::new(output, Compression::default());
        let mut disk = self.store.disk()?;
        let mut done = 0;
        let written = self.session.name.written();
        self.store
            .write_archive(written, layer, total, &mut |bytes| {
                disk.bytes(bytes.len() as u64)
                    .map_err(|error| Error::disk(DOING, root, error))?;
                output.write_all(bytes).map_err(failed)?;
                done += bytes.len() as u64;
                self.report(&layer.diff_id, LayerState::Packing { done, total });
                Ok(())
            })?;
        let Hashing { file, hasher } = output.finish().map_err(failed)?;
        let compressed = Compressed {
            size: hasher.length(),
            digest: hasher.finish(),
        };
        Ok(Packed { file, compressed })
    }

    fn config(&self, config: &[u8]) -> Result<()> {
        let (digest, size) = (Digest::of(config), config.len() as u64);
        if self.has(&digest, size)? {
            return Ok(());
        }
        let open = || {
            let mut file = self.store.temporary_file().map_err(io::Error::other)?;
            file.write_all(config)?;
            Ok(file)
        };
        self.upload("config", &digest, size, &open, &|_| {})
    }

    /// Whether the registry has a blob.
    fn has(&self, digest: &Digest, size: u64) -> Result<bool> {
        let found = self.send("blob", || self.session.http.blob_size(digest))?;
        Ok(found.is_some_and(|found| found.is_none_or(|found| found == size)))
    }

    /// Sends a blob, again if that fails for a reason that passes. `open` gives its file.
    fn upload(
        &self,
        what: &'static str,
        digest: &Digest,
        size: u64,
        open: &dyn Fn() -> io::Result<File>,
        report: &dyn Fn(u64),
    ) -> Result<()> {
        let attempt = || async move {
            let sent = Arc::new(AtomicU64::new(0));
            let file = open()
                .and_then(|mut file| file.rewind().map(|()| file))
                .map_err(|error| Failure::Refused(format!("{what}: {error}")))?;
            let upload = Upload {
                file,
                size,
                sent: sent.clone(),
            };
            let sending = self.session.http.upload(digest, upload);
            tokio::pin!(sending);
            let mut ticks = tokio::time::interval(TICK);
            loop {
                tokio::select! {
                    sent = &mut sending => return sent,
                    _ = ticks.tick() => report(sent.load(Ordering::Relaxed)),
                }
            }
        };
        self.send(what, attempt)
    }

    /// Makes a request, again if that fails for a reason that passes.
    fn send<T, F>(&self, what: &'static str, request: impl Fn() -> F) -> Result<T>
    where
        F: Future<Output = std::result::Result<T, Failure>>,
    {
        self.runtime.block_on(async {
            let mut attempt = 0;
            loop {
                let failure = match request().await {
                    Ok(done) => return Ok(done),
                    Err(failure) => failure,
                };
                attempt += 1;
                if attempt >= ATTEMPTS || !passes(&failure) {
                    return Err(self.session.error(what, failure).await);
                }
                tracing::debug!(what, ?failure, "request failed, trying again");
                tokio::time::sleep(FIRST_PAUSE * 2u32.pow(attempt - 1)).await;
            }
        })
    }
}

/// Whether a request may succeed when it is made again.
fn passes(failure: &Failure) -> bool {
    match failure {
        Failure::Transport(error) => !error.is_connect(),
        Failure::Slow => true,
        Failure::Status { status, .. } => matches!(status, 500.. | 429),
        _ => false,
    }
}

/// Hashes what is written to a file.
struct Hashing {
    file: File,
    hasher: Hasher,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
