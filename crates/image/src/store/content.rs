//! What an image in the store consists of: its configuration, its layers and its history.
//!
//! Called by `hull image history`, and by all that writes images elsewhere: `save` and `push`.

use std::fs::File;

use super::install::{PlannedLayer, layer_ids};
use super::layers::{SKELETON, StoredLayer};
use super::{Image, Store};
use crate::config;
use crate::digest::Hasher;
use crate::error::{Error, Result};
use crate::unpack::fs;
use crate::unpack::rebuild::{RebuildError, rebuild};

/// A step of an image's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// When it was created, as RFC 3339.
    pub created: Option<String>,
    /// The instruction.
    pub created_by: String,
    /// A comment.
    pub comment: String,
    /// Bytes in the files of its layer; 0 without a layer.
    pub size: u64,
    /// Whether it changed the configuration only.
    pub empty_layer: bool,
}

/// An image's configuration and its layers, lowest first; `None` for those that are not in the
/// store.
pub(crate) struct Content {
    pub config: Vec<u8>,
    pub document: config::Document,
    pub layers: Vec<Option<StoredLayer>>,
}

impl Store {
    pub(crate) fn content(&self, image: &Image) -> Result<Content> {
        let bytes = self.raw_config(image)?;
        let document = config::parse_any(&image.reference, &bytes)?;
        let stack: Vec<PlannedLayer> = document
            .diff_ids
            .iter()
            .map(|diff_id| PlannedLayer::uncompressed(*diff_id))
            .collect();
        let layers = self.stored_layers(&layer_ids(&stack))?;
        Ok(Content {
            config: bytes,
            document,
            layers,
        })
    }

    /// How a local image was made, newest step first. An image without a history has one step for
    /// each layer.
    ///
    /// # Errors
    /// `Unsupported` for a plain directory, `Io` or `Invalid` if its configuration is damaged.
    pub fn history(&self, image: &Image) -> Result<Vec<HistoryEntry>> {
        let Content {
            document, layers, ..
        } = self.content(image)?;
        let mut sizes = layers
            .iter()
            .map(|layer| layer.as_ref().map_or(0, |layer| layer.bytes));
        let mut history: Vec<HistoryEntry> = document
            .history
            .into_iter()
            .map(|step| HistoryEntry {
                size: match step.empty_layer {
                    true => 0,
                    false => sizes.next().unwrap_or(0),
                },
                created: step.created,
                created_by: step.created_by.unwrap_or_default(),
                comment: step.comment.unwrap_or_default(),
                empty_layer: step.empty_layer,
            })
            .collect();
        history.extend(sizes.map(|size| HistoryEntry {
            created: document.created.clone(),
            created_by: String::new(),
            comment: String::new(),
            size,
            empty_layer: false,
        }));
        history.reverse();
        Ok(history)
    }
}

impl Content {
    /// The layers, all of which must be there with what their archives are created from; with the
    /// length of each archive.
    pub(crate) fn archives(&self, reference: &str) -> Result<Vec<(&StoredLayer, u64)>> {
        (0..self.layers.len())
            .map(|index| self.archive(reference, index))
            .collect()
    }

    /// The same for one layer.
    pub(crate) fn archive(&self, reference: &str, index: usize) -> Result<(&StoredLayer, u64)> {
        let missing = |reason: &str| Error::NoArchive {
            reference: reference.to_owned(),
            layer: self.document.diff_ids[index],
            reason: reason.to_owned(),
        };
        let layer = self.layers[index].as_ref();
        let layer = layer.ok_or_else(|| missing("it is not in the store"))?;
        let length = layer.archive;
        let length = length.ok_or_else(|| missing("how it was packed is not recorded"))?;
        Ok((layer, length))
    }
}

impl Store {
    /// Passes the archive of a layer to `receive`, piece by piece. `length` is that of
    /// [`Content::archives`]. When this returns, what was passed had the layer's diff id.
    ///
    /// # Errors
    /// `NoArchive` if files of the layer or what was recorded of its archive are damaged, and what
    /// `receive` returns.
    pub(crate) fn write_archive(
        &self,
        reference: &str,
        layer: &StoredLayer,
        length: u64,
        receive: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let failed = |reason: String| Error::NoArchive {
            reference: reference.to_owned(),
            layer: layer.diff_id,
            reason,
        };
        let path = layer.dir.join(SKELETON);
        let skeleton = File::open(&path).map_err(|error| Error::io("open", &path, error))?;
        let path = layer.dir.join("diff");
        let root = fs::open_dir(&path).map_err(|error| Error::io("open", &path, error))?;
        let mut hasher = Hasher::new();
        let mut checked = |bytes: &[u8]| {
            hasher.update(bytes);
            // What was recorded may be anything: it must not write without an end.
            if hasher.length() > length {
                return Err(failed("it is longer than it was".to_owned()));
            }
            receive(bytes)
        };
        let spool = || self.temporary_file();
        rebuild(&skeleton, &root, length, spool, &mut checked).map_err(|error| match error {
            RebuildError::Damaged(reason) => failed(reason),
            RebuildError::Receiver(error) => error,
        })?;
        match hasher.finish() == layer.diff_id {
            true => Ok(()),
            false => Err(failed("its files are not those of the image".to_owned())),
        }
    }
}
