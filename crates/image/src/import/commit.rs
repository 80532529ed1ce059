//! Creates an image from another one and a layer on top of it, as `docker commit` does.
//!
//! Called by the engine with what a container has changed. The layer is unpacked like any other.

use std::fs::File;
use std::io::Seek;

use serde_json::{Value, json};

use super::Import;
use crate::config::{self, ImageConfig};
use crate::digest::{Digest, HashingReader};
use crate::error::{Error, Result};
use crate::manifest::{self, Document};
use crate::progress::Progress;
use crate::store::{Image, LayerStream, Store};

impl Store {
    /// Creates an image of `base` and a layer, which `pack` writes as an archive. `config` are its
    /// defaults for containers, before the changes that `import` asks for.
    ///
    /// # Errors
    /// `base` is a plain directory; a change is invalid; the layer cannot be written or unpacked.
    pub fn commit(
        &self,
        base: &Image,
        mut config: ImageConfig,
        import: &Import,
        pack: impl FnOnce(&mut File) -> std::io::Result<()>,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let _work = self.begin_work()?;
        import.apply(&mut config)?;
        let what = &base.reference;
        let below = self.planned_layers(base)?;
        let mut file = self.temporary_file()?;
        pack(&mut file).map_err(|error| Error::Source {
            reference: what.clone(),
            reason: error.to_string(),
        })?;
        let read = |error| Error::io("read", self.root(), error);
        file.rewind().map_err(read)?;
        let mut reader = HashingReader::new(&mut file);
        reader.drain().map_err(read)?;
        let (size, diff_id) = (reader.length(), reader.finish());
        file.rewind().map_err(read)?;

        let created = import.created();
        let comment = import.message.clone().unwrap_or_default();
        let invalid = |error: serde_json::Error| super::invalid(what, &error);
        let written =
            config::write(&config, Vec::new(), created.clone(), &comment).map_err(invalid)?;
        let written: Value = serde_json::from_slice(&written).map_err(invalid)?;
        let mut document: Value =
            serde_json::from_slice(&self.raw_config(base)?).map_err(invalid)?;
        document["created"] = json!(created);
        document["config"] = written["config"].clone();
        // Of the container that the base was made in.
        if let Some(document) = document.as_object_mut() {
            document.remove("container");
            document.remove("container_config");
        }
        match &import.author {
            Some(author) => document["author"] = json!(author),
            // Of the base.
            None => drop(
                document
                    .as_object_mut()
                    .map(|document| document.remove("author")),
            ),
        }
        if let Some(layers) = document["rootfs"]["diff_ids"].as_array_mut() {
            layers.push(json!(diff_id));
        }
        let mut history = document["history"].as_array().cloned().unwrap_or_default();
        history.push(json!({
            "created": created,
            "created_by": config.cmd.join(" "),
            "comment": comment,
        }));
        document["history"] = Value::Array(history);
        let document = serde_json::to_vec(&document).map_err(invalid)?;

        let last = below.len();
        let mut layers = below;
        layers.push((diff_id, size));
        let plan = import.plan(what, document, &layers)?;
        let mut file = Some(file);
        let mut open = |index: usize| match file.take().filter(|_| index == last) {
            Some(file) => Ok(LayerStream {
                reader: Box::new(file),
                digest: Some(diff_id),
                size: Some(size),
            }),
            None => Err(Error::Damaged {
                reference: what.clone(),
                what: format!("layer {index}"),
            }),
        };
        self.install(&plan, &mut open, progress)
    }

    /// Digests of an image's uncompressed layers, lowest first, with the sizes that its manifest
    /// gives them.
    fn planned_layers(&self, image: &Image) -> Result<Vec<(Digest, u64)>> {
        let manifest = image.digest.ok_or_else(|| Error::Unsupported {
            reference: image.reference.clone(),
            what: "a plain directory is no image that another one can be built on".to_owned(),
        })?;
        let path = self.blob_path(&manifest);
        let bytes = std::fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
        let Document::Manifest(parsed) = manifest::parse(&image.reference, &bytes)? else {
            return Err(Error::Damaged {
                reference: image.reference.clone(),
                what: format!("manifest {manifest}"),
            });
        };
        let sizes = parsed.layers.iter().map(|layer| layer.size);
        let document = self.raw_config(image)?;
        let document = config::parse(&image.reference, &document, parsed.layers.len())?;
        Ok(document.diff_ids.into_iter().zip(sizes).collect())
    }
}
