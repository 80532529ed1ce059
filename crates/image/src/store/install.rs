//! Installs an image into the store: its layers from the bottom up, then its record, then its name.
//!
//! Called by the sources (registry, layout, archive, import), which supply the image's parts.

use std::io::Read;

use rustix::fs::FlockOperation;

use super::layers::{LayerId, chain_id};
use super::record::{Named, Record, write_json};
use super::{Image, Store, write_file};
use crate::config;
use crate::digest::Digest;
use crate::error::Result;
use crate::limits::Budget;
use crate::progress::{Event, Progress};

/// The parts of an image. Digests of manifest and configuration are already verified.
pub(crate) struct Plan {
    /// The user's reference, for messages.
    pub written: String,
    /// Name for the image, if any.
    pub name: Option<String>,
    pub named: Named,
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    /// Lowest first.
    pub layers: Vec<PlannedLayer>,
}

/// One layer of a plan.
#[derive(Debug, Clone)]
pub(crate) struct PlannedLayer {
    /// Digest in the manifest.
    pub digest: Digest,
    /// Digest of the uncompressed archive.
    pub diff_id: Digest,
}

impl PlannedLayer {
    /// One whose archive is as it is unpacked.
    pub(crate) fn uncompressed(diff_id: Digest) -> Self {
        Self {
            digest: diff_id,
            diff_id,
        }
    }
}

/// The archive of a layer.
pub(crate) struct LayerStream {
    pub reader: Box<dyn Read>,
    /// Digest of the bytes of `reader`, if known. (The uncompressed archive is always checked.)
    pub digest: Option<Digest>,
    pub size: Option<u64>,
}

impl Plan {
    fn layer_ids(&self) -> Vec<LayerId> {
        layer_ids(&self.layers)
    }
}

/// What identifies the layers of a stack, lowest first.
pub(super) fn layer_ids(layers: &[PlannedLayer]) -> Vec<LayerId> {
    let mut below: Option<Digest> = None;
    layers
        .iter()
        .map(|layer| {
            let chain_id = chain_id(below.as_ref(), &layer.diff_id);
            below = Some(chain_id);
            LayerId {
                digest: layer.digest,
                diff_id: layer.diff_id,
                chain_id,
            }
        })
        .collect()
}

impl Store {
    /// Which layers of a plan are missing.
    pub(crate) fn missing_layers(&self, plan: &Plan) -> Result<Vec<bool>> {
        plan.layer_ids()
            .iter()
            .map(|layer| Ok(self.find_layer(layer)?.is_none()))
            .collect()
    }

    /// Installs what is missing. `open` returns the archive of layer `index` and is called, in
    /// ascending order, only for missing layers. The caller holds the lock of
    /// [`Store::begin_work`].
    pub(crate) fn install(
        &self,
        plan: &Plan,
        open: &mut dyn FnMut(usize) -> Result<LayerStream>,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let document = config::parse(&plan.written, &plan.config, plan.layers.len())?;
        document
            .config
            .check_platform(&plan.written, self.platform())?;
        let mut names: Vec<String> = Vec::new();
        let mut hidden: Vec<String> = Vec::new();
        let mut size = 0;
        let mut budget = Budget::new(self.limits());
        for (index, layer) in plan.layer_ids().iter().enumerate() {
            let lower: Vec<String> = names.iter().rev().cloned().collect();
            let ready = self.ensure_layer(
                &plan.written,
                layer,
                &lower,
                &mut budget,
                || open(index),
                progress,
            )?;
            if ready.opaque {
                hidden.append(&mut names);
                size = 0;
            }
            size += ready.bytes;
            names.push(ready.name);
        }
        let mut record = Record::new(
            Digest::of(&plan.config),
            plan.named.manifest,
            names,
            document.config,
        );
        record.created = document.created;
        record.size = size;
        record.hidden = hidden;
        {
            let _lock = self.lock(FlockOperation::LockExclusive)?;
            write_file(&self.blob_path(&record.manifest), &plan.manifest)?;
            write_file(&self.blob_path(&record.id), &plan.config)?;
            write_json(&self.record_path(&record.manifest), &record)?;
            if let Some(name) = &plan.name {
                let mut references = self.read_references()?;
                references.names.insert(name.clone(), plan.named.clone());
                self.write_references(&references)?;
            }
        }
        progress.event(Event::Finished);
        let name = plan.name.clone().unwrap_or_else(|| record.id.to_string());
        self.image(&record.manifest, &name)
    }
}
