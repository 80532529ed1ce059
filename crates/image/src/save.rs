//! Saves images as one archive that other tools read: an OCI image layout with Docker's
//! `manifest.json` and `repositories` in it, as Docker 25 and later write it.
//!
//! Called by `hull image save`. The archives of the layers are created again from the unpacked
//! ones, uncompressed, so that their digests are the configuration's diff ids and the image keeps
//! its id. The same images give the same archive.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};
use tar::{EntryType, Header};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{self, OCI_INDEX, OCI_MANIFEST};
use crate::progress::{Event, LayerState, Progress};
use crate::reference::{Reference, Version};
use crate::store::{Content, Image, Store, StoredLayer};

/// Annotation of Docker and containerd: an image's full name.
pub(crate) const IMAGE_NAME: &str = "io.containerd.image.name";
/// Annotation that names an image in `index.json`; here its tag.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

const BLOCK: usize = 512;

/// An image to be saved.
struct Saved {
    image: Image,
    /// Full names, with tags.
    names: BTreeSet<String>,
    content: Content,
    manifest: Vec<u8>,
}

/// A tar archive that is written piece by piece.
struct Archive<'a, W> {
    output: W,
    /// Where it goes, for messages.
    path: &'a Path,
}

impl Store {
    /// Writes images to `output`, which messages call `path`. An image that is given by name is
    /// saved with that name, one that is given without a tag with all its tags, and one that is
    /// given by id with none.
    ///
    /// # Errors
    /// `NotFound`; `NoArchive` if the archive of a layer cannot be created again; `Unsupported` for
    /// a plain directory; `Io` if the output cannot be written, which then is incomplete.
    pub fn save(
        &self,
        references: &[Reference],
        output: impl Write,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<()> {
        // Layers are not removed meanwhile.
        let _work = self.begin_work()?;
        let saved = self.to_be_saved(references)?;
        let mut archive = Archive { output, path };
        archive.directory("blobs/")?;
        archive.directory("blobs/sha256/")?;
        let mut written = BTreeSet::new();
        for one in &saved {
            let reference = &one.image.reference;
            let layers = one.content.archives(reference)?;
            progress.event(Event::Started {
                reference,
                layers: layers.len(),
            });
            for (layer, length) in layers {
                if written.insert(layer.diff_id) {
                    self.save_layer(&mut archive, reference, layer, length, progress)?;
                }
            }
            for document in [&one.content.config, &one.manifest] {
                let digest = Digest::of(document);
                if written.insert(digest) {
                    archive.file(&blob(&digest), document)?;
                }
            }
            progress.event(Event::Finished);
        }
        archive.json("index.json", &index(&saved))?;
        archive.json("manifest.json", &docker_manifest(&saved))?;
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.json("repositories", &repositories(&saved))?;
        archive.finish()
    }

    /// The images, each once, in the order of the references.
    fn to_be_saved(&self, references: &[Reference]) -> Result<Vec<Saved>> {
        let mut saved: Vec<Saved> = Vec::new();
        for reference in references {
            for (name, image) in self.named_images(reference)? {
                let known = saved.iter().position(|known| known.image.id == image.id);
                let one = match known {
                    Some(index) => &mut saved[index],
                    None => {
                        let content = self.content(&image)?;
                        let layers: Vec<(Digest, u64)> = content
                            .archives(&image.reference)?
                            .iter()
                            .map(|(layer, length)| (layer.diff_id, *length))
                            .collect();
                        let manifest = manifest::synthesize(&content.config, &layers);
                        let manifest = manifest.map_err(|error| Error::Invalid {
                            reference: image.reference.clone(),
                            what: "manifest",
                            reason: error.to_string(),
                        })?;
                        saved.push(Saved {
                            image,
                            names: BTreeSet::new(),
                            content,
                            manifest,
                        });
                        let last = saved.len() - 1;
                        &mut saved[last]
                    }
                };
                one.names.extend(name);
            }
        }
        Ok(saved)
    }

    /// What a reference means to `docker save`: images, with the name that each is saved with.
    fn named_images(&self, reference: &Reference) -> Result<Vec<(Option<String>, Image)>> {
        if let Reference::Registry(name) = reference
            && name.is_name_only()
        {
            let all = self.tags(name)?;
            if !all.is_empty() {
                return all
                    .into_iter()
                    .map(|name| Ok((Some(name.to_string()), self.inspect(&name)?)))
                    .collect();
            }
        }
        let image = self.inspect(reference)?;
        let name = match reference {
            Reference::Registry(name) if matches!(name.version, Version::Tag(_)) => {
                let name = name.to_string();
                (name == image.reference && self.named(&name)?.is_some()).then_some(name)
            }
            _ => None,
        };
        Ok(vec![(name, image)])
    }

    fn save_layer<W: Write>(
        &self,
        archive: &mut Archive<'_, W>,
        reference: &str,
        layer: &StoredLayer,
        length: u64,
        progress: &dyn Progress,
    ) -> Result<()> {
        let report = |state| {
            progress.event(Event::Layer {
                digest: &layer.diff_id,
                state,
            });
        };
        archive.header(&blob(&layer.diff_id), EntryType::Regular, length)?;
        let mut done = 0;
        self.write_archive(reference, layer, length, &mut |bytes| {
            archive.write(bytes)?;
            done += bytes.len() as u64;
            report(LayerState::Packing {
                done,
                total: length,
            });
            Ok(())
        })?;
        archive.pad(length)?;
        report(LayerState::Done);
        Ok(())
    }
}

/// The member that holds a blob.
pub(crate) fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// The short name and the tag of a full name.
fn familiar(name: &str) -> (String, String) {
    let familiar = name
        .parse::<Reference>()
        .map_or_else(|_| name.to_owned(), |name| name.familiar());
    match familiar.rsplit_once(':') {
        Some((name, tag)) => (name.to_owned(), tag.to_owned()),
        None => (familiar, "latest".to_owned()),
    }
}

fn index(saved: &[Saved]) -> Value {
    let mut entries = Vec::new();
    for one in saved {
        let entry = json!({
            "mediaType": OCI_MANIFEST,
            "digest": Digest::of(&one.manifest),
            "size": one.manifest.len(),
            "platform": one.content.document.config.platform(),
        });
        for name in &one.names {
            let mut entry = entry.clone();
            entry["annotations"] = json!({IMAGE_NAME: name, REF_NAME: familiar(name).1});
            entries.push(entry);
        }
        if one.names.is_empty() {
            entries.push(entry);
        }
    }
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
}

fn docker_manifest(saved: &[Saved]) -> Value {
    let entry = |one: &Saved| {
        let tags: Vec<String> = one
            .names
            .iter()
            .map(|name| {
                let (name, tag) = familiar(name);
                format!("{name}:{tag}")
            })
            .collect();
        let layers: Vec<String> = one.content.document.diff_ids.iter().map(blob).collect();
        json!({
            "Config": blob(&Digest::of(&one.content.config)),
            "RepoTags": if tags.is_empty() { Value::Null } else { json!(tags) },
            "Layers": layers,
        })
    };
    saved.iter().map(entry).collect()
}

fn repositories(saved: &[Saved]) -> Value {
    let mut repositories: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for one in saved {
        let Some(top) = one.content.document.diff_ids.last() else {
            continue;
        };
        for (name, tag) in one.names.iter().map(|name| familiar(name)) {
            repositories.entry(name).or_default().insert(tag, top.hex());
        }
    }
    json!(repositories)
}

impl<W: Write> Archive<'_, W> {
    fn failed(&self, error: io::Error) -> Error {
        Error::io("write", self.path, error)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.output.write_all(bytes);
        written.map_err(|error| self.failed(error))
    }

    fn header(&mut self, name: &str, kind: EntryType, size: u64) -> Result<()> {
        let mut header = Header::new_gnu();
        header
            .set_path(name)
            .map_err(|error| Error::io("name in the archive", name, error))?;
        header.set_entry_type(kind);
        header.set_mode(match kind {
            EntryType::Directory => 0o755,
            _ => 0o644,
        });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.write(header.as_bytes())
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let padding = size.wrapping_neg() % BLOCK as u64;
        self.write(&[0; BLOCK][..padding as usize])
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        self.header(name, EntryType::Directory, 0)
    }

    fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.header(name, EntryType::Regular, content.len() as u64)?;
        self.write(content)?;
        self.pad(content.len() as u64)
    }

    fn json(&mut self, name: &str, value: &Value) -> Result<()> {
        self.file(name, value.to_string().as_bytes())
    }

    fn finish(mut self) -> Result<()> {
        self.write(&[0; 2 * BLOCK])?;
        let flushed = self.output.flush();
        flushed.map_err(|error| self.failed(error))
    }
}
