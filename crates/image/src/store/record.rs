//! The small files that describe the store's contents.
//!
//! Called by the other parts of the store only. Read on every start: they contain only what a start
//! or a list needs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Store, write_file};
use crate::config::ImageConfig;
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Version of all these files.
const FORMAT: u32 = 1;

/// `references.json`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct References {
    version: u32,
    pub names: BTreeMap<String, Named>,
}

/// Target of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    /// Manifest digest of the image.
    pub manifest: Digest,
    /// Digest by which its registry knows the name, if that is not the manifest's: of the manifest
    /// list that it was chosen from, or of the manifest that a push wrote for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Digest>,
    /// Identity of the archive that it was read from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<Stamp>,
}

impl Named {
    /// An image by itself: of no list, and of no archive.
    pub(crate) fn image(manifest: Digest) -> Self {
        Self {
            manifest,
            index: None,
            stamp: None,
        }
    }
}

/// Detects whether a file has changed since it was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    pub modified: (i64, i64),
}

/// `images/HEX.json`
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// Digest of the configuration.
    pub id: Digest,
    pub manifest: Digest,
    /// Names of layer directories, lowest first.
    pub layers: Vec<String>,
    /// Names of the layers below one that hides them all: a container does not need them, the
    /// image's archive does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden: Vec<String>,
    pub config: ImageConfig,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    pub size: u64,
}

/// An image in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Name with all defaults; `None` if its name was reassigned to another image.
    pub reference: Option<String>,
    /// Digest of the configuration.
    pub id: Digest,
    /// Digest of the manifest.
    pub digest: Digest,
    /// Digest by which its registry knows the name: of the manifest list that the image was chosen
    /// from, or else of the manifest.
    pub repo_digest: Digest,
    /// When it was created, as RFC 3339.
    pub created: Option<String>,
    /// Bytes in the files of all its layers.
    pub size: u64,
    /// Labels, for filters.
    pub labels: BTreeMap<String, String>,
}

/// Result of a removal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that were removed.
    pub untagged: Vec<String>,
    /// Ids of images that were removed.
    pub images: Vec<String>,
    /// Bytes in the files of removed layers.
    pub bytes: u64,
    /// Whether unused layers were kept, because a pull is running.
    pub layers_kept: bool,
}

impl Default for References {
    fn default() -> Self {
        Self {
            version: FORMAT,
            names: BTreeMap::new(),
        }
    }
}

impl Record {
    pub(crate) fn new(
        id: Digest,
        manifest: Digest,
        layers: Vec<String>,
        config: ImageConfig,
    ) -> Self {
        Self {
            version: FORMAT,
            id,
            manifest,
            layers,
            hidden: Vec::new(),
            config,
            created: None,
            size: 0,
        }
    }
}

impl Stamp {
    pub(crate) fn of(file: &File) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// Reads and parses a file of the store; `None` if it does not exist.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    read(path)?.map(|content| parse(path, &content)).transpose()
}

/// The same for a file with a version, which is checked before the rest: fields of a newer format
/// need not be those of this one.
fn read_versioned<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Some(content) = read(path)? else {
        return Ok(None);
    };
    match parse(path, &content)? {
        Versioned { version: FORMAT } => parse(path, &content).map(Some),
        Versioned { version } => Err(Error::StoreVersion {
            path: path.to_owned(),
            version,
            known: FORMAT,
        }),
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    match File::open(path) {
        Ok(mut file) => {
            file.read_to_end(&mut content)
                .map_err(|error| Error::io("read", path, error))?;
            Ok(Some(content))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("open", path, error)),
    }
}

fn parse<T: DeserializeOwned>(path: &Path, content: &[u8]) -> Result<T> {
    serde_json::from_slice(content).map_err(|error| corrupt(path, error.to_string()))
}

/// Writes a file of the store.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let content = serde_json::to_vec(value).map_err(|error| corrupt(path, error.to_string()))?;
    write_file(path, &content)
}

fn corrupt(path: &Path, reason: String) -> Error {
    Error::CorruptStore {
        path: path.to_owned(),
        reason,
    }
}

impl Store {
    pub(crate) fn read_references(&self) -> Result<References> {
        Ok(read_versioned(&self.references_path())?.unwrap_or_default())
    }

    /// The caller holds the exclusive lock.
    pub(crate) fn write_references(&self, references: &References) -> Result<()> {
        write_json(&self.references_path(), references)
    }

    pub(crate) fn read_record(&self, manifest: &Digest) -> Result<Option<Record>> {
        read_versioned(&self.record_path(manifest))
    }

    /// All records that can be read, ordered by digest. An image with a damaged record counts as
    /// missing: it is pulled again.
    pub(crate) fn records(&self) -> Result<Vec<Record>> {
        let all = self.all_records()?.into_iter();
        Ok(all.filter_map(|(_, record)| record.ok()).collect())
    }

    /// All records by the digest of their manifest, also those that are damaged.
    pub(super) fn all_records(&self) -> Result<Vec<(Digest, Result<Record>)>> {
        let dir = self.root.join("images");
        let mut digests = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(|error| Error::io("read", &dir, error))? {
            let name = entry
                .map_err(|error| Error::io("read", &dir, error))?
                .file_name();
            let hex = name.to_str().and_then(|name| name.strip_suffix(".json"));
            digests.extend(hex.and_then(Digest::from_hex));
        }
        digests.sort_unstable();
        let mut records = Vec::new();
        for digest in digests {
            match self.read_record(&digest) {
                Ok(Some(record)) => records.push((digest, Ok(record))),
                // It was removed meanwhile.
                Ok(None) => {}
                Err(error @ Error::CorruptStore { .. }) => records.push((digest, Err(error))),
                Err(error) => return Err(error),
            }
        }
        Ok(records)
    }

    /// All images, by name; those without a name last.
    pub fn list(&self) -> Result<Vec<Listed>> {
        self.list_with_damages().map(|(list, _)| list)
    }

    /// The same, and why records cannot be read.
    pub fn list_with_damages(&self) -> Result<(Vec<Listed>, Vec<Error>)> {
        let references = self.read_references()?;
        let (mut records, mut damages) = (Vec::new(), Vec::new());
        for (_, record) in self.all_records()? {
            match record {
                Ok(record) => records.push(record),
                Err(error) => damages.push(error),
            }
        }
        let listed = |record: &Record, named: Option<(&String, &Named)>| Listed {
            reference: named.map(|(name, _)| name.clone()),
            id: record.id,
            digest: record.manifest,
            repo_digest: named
                .and_then(|(_, named)| named.index)
                .unwrap_or(record.manifest),
            created: record.created.clone(),
            size: record.size,
            labels: record.config.labels.clone(),
        };
        let mut list = Vec::new();
        for (name, named) in &references.names {
            let record = records
                .iter()
                .find(|record| record.manifest == named.manifest);
            list.extend(record.map(|record| listed(record, Some((name, named)))));
        }
        for record in &records {
            if references
                .names
                .values()
                .all(|named| named.manifest != record.manifest)
            {
                list.push(listed(record, None));
            }
        }
        Ok((list, damages))
    }
}
