//! `oci:DIR[:TAG]`: an image in an OCI image layout, as written by skopeo, umoci and buildah.
//!
//! Called by the store, and by `load` for the images of a layout in an archive. The layout is only
//! read, and not needed afterwards.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use crate::config;
use crate::digest::Digest;
use crate::error::{Error, Result, check_digest};
use crate::manifest::{self, Descriptor, Document, Index, MAX_DOCUMENT, Manifest};
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::save::{REF_NAME, blob};
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Store};

/// The file that lists the images.
pub(super) const INDEX: &str = "index.json";
/// Most levels of nested manifest lists.
const MAX_NESTING: usize = 4;

/// The files of a layout, by their paths in it.
pub(super) trait Files {
    fn open(&self, path: &str) -> io::Result<Box<dyn Read>>;
    /// Whether there is a layout at all.
    fn exists(&self) -> bool;
}

struct Directory<'a>(&'a Path);

impl Files for Directory<'_> {
    fn open(&self, path: &str) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(File::open(self.0.join(path))?))
    }

    fn exists(&self) -> bool {
        self.0.exists()
    }
}

pub(super) struct Layout<'a> {
    pub written: &'a str,
    /// Where it is, for messages.
    pub place: String,
    pub files: &'a dyn Files,
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
        place: dir.display().to_string(),
        files: &Directory(dir),
    };
    let top = layout.find(tag)?;
    let _work = store.begin_work()?;
    install(store, &layout, top, Some(reference.to_string()), progress)
}

/// Installs an image of a layout, with a name if it is to have one. The caller holds the lock of
/// [`Store::begin_work`].
pub(super) fn install(
    store: &Store,
    layout: &Layout<'_>,
    top: Descriptor,
    name: Option<String>,
    progress: &dyn Progress,
) -> Result<Image> {
    let written = layout.written;
    let (digest, bytes, manifest) = layout.manifest(store, top)?;
    let key = name.as_deref().unwrap_or(written);
    let named = Named::image(digest);
    match store.image(&digest, key) {
        Ok(image) => {
            image.config.check_platform(written, store.platform())?;
            if let Some(name) = name
                && store.named(&name)?.as_ref() != Some(&named)
            {
                store.set_name(&name, named)?;
            }
            return Ok(image);
        }
        Err(Error::Damaged { .. }) => {}
        Err(error) => return Err(error),
    }
    progress.event(Event::Started {
        reference: written,
        layers: manifest.layers.len(),
    });
    let config = layout.document("config", &manifest.config)?;
    let document = config::parse(written, &config, manifest.layers.len())?;
    let layers = manifest.layers.iter().zip(&document.diff_ids);
    let plan = Plan {
        written: written.to_owned(),
        name,
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
        Ok(LayerStream {
            reader: layout.open("layer", &layer.digest)?,
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

    /// The entries of `index.json`.
    pub(super) fn entries(&self) -> Result<Vec<Descriptor>> {
        let file = self.files.open(INDEX).map_err(|error| match error.kind() {
            ErrorKind::NotFound if !self.files.exists() => {
                self.failed(format!("{} does not exist", self.place))
            }
            ErrorKind::NotFound => self.failed(format!(
                "{} is no OCI image layout: it has no {INDEX}",
                self.place
            )),
            _ => self.failed(format!("{}/{INDEX}: {error}", self.place)),
        })?;
        let bytes = self.read_bounded(file, INDEX)?;
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| Error::Invalid {
            reference: self.written.to_owned(),
            what: "index",
            reason: error.to_string(),
        })?;
        Ok(index.manifests)
    }

    /// The requested entry of `index.json`.
    fn find(&self, tag: Option<&str>) -> Result<Descriptor> {
        let entries = self.entries()?;
        let name = |entry: &Descriptor| entry.annotations.as_ref()?.get(REF_NAME).cloned();
        let names: Vec<String> = entries.iter().filter_map(name).collect();
        match (tag, entries.as_slice()) {
            (_, []) => Err(self.failed(format!("{} holds no image", self.place))),
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
                        self.place,
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
                        self.place,
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
        let file = self.open(what, &descriptor.digest)?;
        let bytes = self.read_bounded(file, &blob(&descriptor.digest))?;
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

    fn open(&self, what: &'static str, digest: &Digest) -> Result<Box<dyn Read>> {
        let path = blob(digest);
        self.files
            .open(&path)
            .map_err(|error| self.failed(format!("{what} {}/{path}: {error}", self.place)))
    }

    fn read_bounded(&self, file: impl Read, path: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| self.failed(format!("{}/{path}: {error}", self.place)))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(self.failed(format!(
                "{}/{path} is larger than {MAX_DOCUMENT} bytes",
                self.place
            )));
        }
        Ok(bytes)
    }
}
