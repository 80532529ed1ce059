//! `docker-archive:FILE[:TAG]`: archives of `docker save`, old and new style, plain or compressed.
//!
//! Called by the store, and by `load` for the images of one.

use std::fs::File;
use std::path::Path;

use serde::Deserialize;

use super::archive::{Archive, Member};
use crate::config;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest;
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::store::{Image, LayerStream, Named, Plan, PlannedLayer, Stamp, Store};

/// The member that lists the images.
pub(super) const MANIFEST: &str = "manifest.json";

/// One image of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Saved {
    pub config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Saved {
    /// Its names, as they are in the archive.
    pub(super) fn tags(&self) -> &[String] {
        self.repo_tags.as_deref().unwrap_or_default()
    }
}

/// Installs an image of an archive.
pub(crate) fn resolve(
    store: &Store,
    reference: &Reference,
    path: &Path,
    tag: Option<&str>,
    progress: &dyn Progress,
) -> Result<Image> {
    let written = reference.written();
    let failed = |reason: String| Error::Source {
        reference: written.clone(),
        reason,
    };
    let file = File::open(path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    let stamp = Stamp::of(&file).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    let key = reference.to_string();
    if let Some(named) = store.named(&key)?
        && named.stamp.as_ref() == Some(&stamp)
    {
        match store.image(&named.manifest, &key) {
            Err(Error::Damaged { .. }) => {}
            Err(error) => return Err(error),
            Ok(image) => {
                image.config.check_platform(&written, store.platform())?;
                return Ok(image);
            }
        }
    }
    let _work = store.begin_work()?;
    let archive = Archive::open(&written, store, file)?;
    let saved = find(&archive, tag)?;
    install(store, &archive, &saved, Some((key, stamp)), progress)
}

/// Installs an image of an archive, with a name and the archive's identity if it is to have one.
/// The caller holds the lock of [`Store::begin_work`].
pub(super) fn install(
    store: &Store,
    archive: &Archive<'_>,
    saved: &Saved,
    name: Option<(String, Stamp)>,
    progress: &dyn Progress,
) -> Result<Image> {
    let written = archive.written;
    progress.event(Event::Started {
        reference: written,
        layers: saved.layers.len(),
    });
    let config = archive.document(&saved.config)?;
    let document = config::parse(written, &config, saved.layers.len())?;
    let members: Vec<Member> = saved
        .layers
        .iter()
        .map(|layer| archive.member(layer))
        .collect::<Result<_>>()?;
    let contents: Vec<(Digest, u64)> = document
        .diff_ids
        .iter()
        .zip(&members)
        .map(|(&diff_id, member)| (diff_id, member.size))
        .collect();
    let manifest = manifest::synthesize(&config, &contents)
        .map_err(|error| archive.failed(error.to_string()))?;
    let (name, stamp) = name.unzip();
    let named = Named {
        stamp,
        ..Named::image(Digest::of(&manifest))
    };
    let layers = document
        .diff_ids
        .iter()
        .map(|diff_id| PlannedLayer::uncompressed(*diff_id))
        .collect();
    let plan = Plan {
        written: written.to_owned(),
        name,
        named,
        manifest,
        config,
        layers,
    };
    let mut open = |index: usize| {
        let member = members[index];
        // The layer may be compressed, and only the digest of the uncompressed archive is known.
        Ok(LayerStream {
            reader: Box::new(archive.read(member)?),
            digest: None,
            size: Some(member.size),
        })
    };
    store.install(&plan, &mut open, progress)
}

/// The images of an archive.
pub(super) fn images(archive: &Archive<'_>) -> Result<Vec<Saved>> {
    if !archive.has(MANIFEST) {
        return Err(archive.failed("it is no docker archive: it has no manifest.json".to_owned()));
    }
    let bytes = archive.document(MANIFEST)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Invalid {
        reference: archive.written.to_owned(),
        what: MANIFEST,
        reason: error.to_string(),
    })
}

fn find(archive: &Archive<'_>, tag: Option<&str>) -> Result<Saved> {
    let saved = images(archive)?;
    let all: Vec<String> = saved
        .iter()
        .flat_map(|saved| saved.tags().to_vec())
        .collect();
    let count = saved.len();
    let mut matching = saved.into_iter().filter(|saved| match tag {
        None => true,
        Some(tag) => saved.tags().iter().any(|known| same_name(known, tag)),
    });
    match (matching.next(), matching.next(), tag) {
        (Some(only), None, _) => Ok(only),
        (Some(first), Some(_), Some(_)) => Ok(first),
        (Some(_), Some(_), None) => Err(archive.failed(format!(
            "it holds {count} images; name one by its tag: {}",
            all.join(", ")
        ))),
        (None, _, Some(tag)) => Err(archive.failed(format!(
            "it has no tag \"{tag}\", it has: {}",
            all.join(", ")
        ))),
        (None, _, None) => Err(archive.failed("it holds no image".to_owned())),
    }
}

/// Whether the user's reference matches the name in the archive: the same name, or only its tag.
fn same_name(known: &str, wanted: &str) -> bool {
    let full = |name: &str| {
        name.parse::<Reference>()
            .map(|reference| reference.to_string())
    };
    known == wanted
        || matches!((full(known), full(wanted)), (Ok(a), Ok(b)) if a == b)
        || known.rsplit_once(':').is_some_and(|(_, tag)| tag == wanted)
}
