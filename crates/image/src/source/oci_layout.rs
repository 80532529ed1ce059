//! `oci:DIR[:TAG]`: an image in an OCI image layout, as written by skopeo, umoci and buildah.
//!
//! Called by the store. The layout is only read, and not needed afterwards.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::config;
use crate::digest::Digest;
use crate::error::{Error, Result, check_digest};
use crate::manifest::{self, Descriptor, Document, Index, MAX_DOCUMENT, Manifest};
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Store};

/// The annotation that names an image in `index.json`.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Most levels of nested manifest lists.
const MAX_NESTING: usize = 4;

struct Layout<'a> {
    written: &'a str,
    dir: &'a Path,
}

/// Installs an image of a layout.
pub(crate) fn resolve(
    store: &Store,
    reference: &Reference,
    dir: &Path,
    tag: Option<&str>,
    progress: &dyn Progress,
) -> Result<Image> {
    let written = reference.written();
    let layout = Layout {
        written: &written,
        dir,
    };
    let top = layout.find(tag)?;
    let (digest, bytes, manifest) = layout.manifest(store, top)?;
    let key = reference.to_string();
    let named = Named {
        manifest: digest,
        index: None,
        stamp: None,
    };
    match store.image(&digest, &key) {
        Ok(image) => {
            image.config.check_platform(&written, store.platform())?;
            if store.named(&key)?.as_ref() != Some(&named) {
                store.set_name(&key, named)?;
            }
            return Ok(image);
        }
        Err(Error::Damaged { .. }) => {}
        Err(error) => return Err(error),
    }
    let _work = store.begin_work()?;
    progress.event(Event::Started {
        reference: &written,
        layers: manifest.layers.len(),
    });
    let config = layout.document("config", &manifest.config)?;
    let document = config::parse(&written, &config, manifest.layers.len())?;
    let layers = manifest.layers.iter().zip(&document.diff_ids);
    let plan = Plan {
        written: written.clone(),
        name: Some(key),
        named,
        manifest: bytes,
        config,
        layers: layers
            .map(|(layer, &diff_id)| PlannedLayer {
                digest: layer.digest,
                diff_id,
            })
            .collect(),
    };
    let mut open = |index: usize| {
        let layer = &manifest.layers[index];
        let file = layout.open("layer", &layer.digest)?;
        Ok(LayerStream {
            reader: Box::new(file),
            digest: Some(layer.digest),
            size: Some(layer.size),
        })
    };
    store.install(&plan, &mut open, progress)
}

impl Layout<'_> {
    fn failed(&self, reason: String) -> Error {
        Error::Source {
            reference: self.written.to_owned(),
            reason,
        }
    }

    /// The requested entry of `index.json`.
    fn find(&self, tag: Option<&str>) -> Result<Descriptor> {
        let path = self.dir.join("index.json");
        let mut file = File::open(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound if !self.dir.exists() => {
                self.failed(format!("{} does not exist", self.dir.display()))
            }
            ErrorKind::NotFound => self.failed(format!(
                "{} is no OCI image layout: it has no index.json",
                self.dir.display()
            )),
            _ => self.failed(format!("{}: {error}", path.display())),
        })?;
        let bytes = self.read_bounded(&mut file, &path)?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| Error::Invalid {
            reference: self.written.to_owned(),
            what: "index",
            reason: error.to_string(),
        })?;
        let name = |entry: &Descriptor| entry.annotations.as_ref()?.get(REF_NAME).cloned();
        let names: Vec<String> = index.manifests.iter().filter_map(name).collect();
        match (tag, index.manifests.as_slice()) {
            (_, []) => Err(self.failed(format!("{} holds no image", self.dir.display()))),
            (None, [only]) => Ok(only.clone()),
            (Some(tag), all) => all
                .iter()
                .find(|entry| {
                    name(entry).as_deref() == Some(tag) || entry.digest.to_string() == tag
                })
                .cloned()
                .ok_or_else(|| {
                    self.failed(format!(
                        "{} has no tag \"{tag}\", it has: {}",
                        self.dir.display(),
                        names.join(", ")
                    ))
                }),
            (None, all) => {
                // Several entries and no tag: "latest", as with registries.
                let latest = all
                    .iter()
                    .find(|entry| name(entry).as_deref() == Some("latest"));
                latest.cloned().ok_or_else(|| {
                    self.failed(format!(
                        "{} holds {} images; name one by its tag: {}",
                        self.dir.display(),
                        all.len(),
                        names.join(", ")
                    ))
                })
            }
        }
    }

    /// Resolves manifest lists to the manifest for our platform.
    fn manifest(
        &self,
        store: &Store,
        mut descriptor: Descriptor,
    ) -> Result<(Digest, Vec<u8>, Manifest)> {
        for _ in 0..MAX_NESTING {
            let bytes = self.document("manifest", &descriptor)?;
            match manifest::parse(self.written, &bytes)? {
                Document::Manifest(manifest) => return Ok((descriptor.digest, bytes, manifest)),
                Document::Index(index) => {
                    descriptor = index.choose(self.written, store.platform())?.clone();
                }
            }
        }
        Err(self.failed(format!(
            "lists of manifests are nested more than {MAX_NESTING} deep"
        )))
    }

    /// Reads a small blob and checks its digest.
    fn document(&self, what: &'static str, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let mut file = self.open(what, &descriptor.digest)?;
        let bytes = self.read_bounded(&mut file, &self.blob(&descriptor.digest))?;
        if bytes.len() as u64 != descriptor.size {
            return Err(Error::Truncated {
                reference: self.written.to_owned(),
                what,
                digest: descriptor.digest,
                expected: descriptor.size,
                actual: bytes.len() as u64,
            });
        }
        check_digest(self.written, what, descriptor.digest, Digest::of(&bytes))?;
        Ok(bytes)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    fn open(&self, what: &'static str, digest: &Digest) -> Result<File> {
        let path = self.blob(digest);
        File::open(&path)
            .map_err(|error| self.failed(format!("{what} {}: {error}", path.display())))
    }

    fn read_bounded(&self, file: &mut File, path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.failed(format!("{}: {error}", path.display())))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(self.failed(format!(
                "{} is larger than {MAX_DOCUMENT} bytes",
                path.display()
            )));
        }
        Ok(bytes)
    }
}
