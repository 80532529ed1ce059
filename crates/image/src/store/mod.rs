//! The store: which images exist, and where their parts are.
//!
//! Called by the command line and the sandbox, by several processes at once. The layout below the
//! root:
//!
//! | path | what |
//! | --- | --- |
//! | `references.json` | name → manifest digest; replaced by rename, under the exclusive lock |
//! | `images/HEX.json` | one record per image (by manifest digest): all that a start needs |
//! | `blobs/sha256/HEX` | manifests and configurations |
//! | `blobs/sha256/HEX.archive` | a layer's archive, while a pull lasts |
//! | `blobs/sha256/HEX.part` | a layer archive being downloaded; locked by its writer |
//! | `layers/HEX/diff` | a layer, ready to be a lower directory; `layer.json` beside it |
//! | `layers/HEX/skeleton.gz` | its archive without the content of its files, see `unpack::skeleton` |
//! | `layers/HEX/compressed.json` | digest and size of its archive when that was last pushed |
//! | `layers/HEX.partial` | a layer being unpacked; locked by its writer |
//! | `holds/ID.json` | a container that uses layers, see [`Hold`] |
//! | `lock` | exclusive for changes of references, records and holds' layers; shared while a hold is created |
//! | `busy` | shared while anything is fetched or unpacked; exclusive for removing unused layers |
//!
//! Locks are `flock`s, so a killed process leaves none behind. A file with its final name is
//! complete and was flushed to disk before.

mod content;
mod hold;
mod install;
mod layers;
mod record;
mod remove;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

pub(crate) use content::Content;
pub use content::HistoryEntry;
pub use hold::Hold;
pub(crate) use install::{LayerStream, Plan, PlannedLayer};
pub(crate) use layers::{COMPRESSED, StoredLayer};
pub use record::{Listed, Removed};
pub(crate) use record::{Named, Stamp};
use record::{Record, References};
pub(crate) use record::{read_json, write_json};

use crate::config::ImageConfig;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::{Disk, Limits};
use crate::manifest::Platform;
use crate::progress::Progress;
use crate::reference::{Reference, RegistryReference};
use crate::source;
use crate::unpack::fs;
use crate::unpack::process::Unpacker;

/// When to ask a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pull {
    /// Each time; existing layers are not downloaded again.
    Always,
    /// If the image is missing.
    #[default]
    Missing,
    /// Never.
    Never,
}

/// An image that is ready for use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of its configuration, as in Docker; for `rootfs:` the reference itself.
    pub id: String,
    /// Its name with all defaults filled in.
    pub reference: String,
    /// Digest of its manifest; `None` for `rootfs:`.
    pub digest: Option<Digest>,
    /// Its defaults for containers.
    pub config: ImageConfig,
    /// Read-only lower directories, topmost first.
    pub layers: Vec<PathBuf>,
    /// When it was created, as RFC 3339.
    pub created: Option<String>,
    /// Bytes in the files of all its layers.
    pub size: u64,
}

/// The store below one directory. Cheap to create; holds no descriptors.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    platform: Platform,
    limits: Limits,
    unpacker: Option<Arc<dyn Unpacker>>,
}

impl Store {
    /// Opens the store in `root`, which is created if missing (mode 0700: layers contain suid
    /// executables).
    pub fn open(root: impl Into<PathBuf>) -> Result<Self> {
        let root = root.into();
        let store = Self {
            root,
            platform: Platform::host(),
            limits: Limits::default(),
            unpacker: None,
        };
        // The file created last: if it exists, the others do.
        if !store.root.join("busy").exists() {
            store.create()?;
        }
        Ok(store)
    }

    /// Uses images for another platform than this machine's.
    pub fn with_platform(mut self, platform: Platform) -> Self {
        self.platform = platform;
        self
    }

    /// Accepts images within these limits.
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Unpacks layers in processes that are started so.
    pub fn with_unpacker(mut self, unpacker: Arc<dyn Unpacker>) -> Self {
        self.unpacker = Some(unpacker);
        self
    }

    fn unpacker(&self) -> Option<&dyn Unpacker> {
        self.unpacker.as_deref()
    }

    /// Root directory of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn create(&self) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for dir in ["", "images", "blobs/sha256", "layers", "holds"] {
            let path = self.root.join(dir);
            builder
                .create(&path)
                .map_err(|error| Error::io("create", &path, error))?;
        }
        for file in ["lock", "busy"] {
            self.open_lock_file(file)?;
        }
        Ok(())
    }

    /// Makes an image available: finds it here, or downloads and unpacks it, according to `pull`.
    ///
    /// Blocks, possibly for long with a registry; may be called from within a tokio runtime only
    /// where blocking is allowed. A local image takes a few system calls.
    pub fn resolve(
        &self,
        reference: &Reference,
        pull: Pull,
        credentials: &Credentials,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let (written, missing) = (reference.written(), |why_local| Error::NotFound {
            reference: reference.written(),
            why_local,
        });
        match reference {
            Reference::Rootfs { dir } => source::rootfs::image(&written, dir),
            Reference::OciLayout { dir, tag } => {
                source::oci_layout::resolve(self, reference, dir, tag.as_deref(), progress)
            }
            Reference::DockerArchive { file, tag } => {
                source::docker_archive::resolve(self, reference, file, tag.as_deref(), progress)
            }
            Reference::Id(_) => self.inspect(reference),
            Reference::Registry(name) => {
                if pull != Pull::Always {
                    match self.find(reference) {
                        Ok(Some(image)) => {
                            image.config.check_platform(&written, &self.platform)?;
                            return Ok(image);
                        }
                        Ok(None) => {}
                        // A damaged image can be downloaded again.
                        Err(Error::Damaged { .. }) if pull == Pull::Missing => {}
                        Err(error) => return Err(error),
                    }
                }
                if pull == Pull::Never {
                    return Err(missing(", and pulling is off"));
                }
                source::registry::pull(self, name, pull, credentials, progress)
            }
        }
    }

    /// Finds a local image. Never asks a registry.
    pub fn inspect(&self, reference: &Reference) -> Result<Image> {
        match reference {
            Reference::Rootfs { dir } => source::rootfs::image(&reference.written(), dir),
            _ => self.find(reference)?.ok_or_else(|| Error::NotFound {
                reference: reference.written(),
                why_local: "",
            }),
        }
    }

    /// The raw configuration document of a local image, for `inspect`.
    pub fn raw_config(&self, image: &Image) -> Result<Vec<u8>> {
        let blob = image.id.parse::<Digest>().map(|id| self.blob_path(&id));
        let path = blob.map_err(|_| Error::Unsupported {
            reference: image.reference.clone(),
            what: "a plain directory has no configuration".to_owned(),
        })?;
        std::fs::read(&path).map_err(|error| Error::io("read", path, error))
    }

    fn find(&self, reference: &Reference) -> Result<Option<Image>> {
        let references = self.read_references()?;
        let found = self.locate(reference, &references)?;
        found
            .map(|(manifest, name)| self.image(&manifest, &name))
            .transpose()
    }

    /// Looks up a name, a digest, or a prefix of an id. Returns the manifest and the image's name.
    fn locate(
        &self,
        reference: &Reference,
        references: &References,
    ) -> Result<Option<(Digest, String)>> {
        let key = reference.to_string();
        if let Some(named) = references.names.get(&key) {
            return Ok(Some((named.manifest, key)));
        }
        match reference {
            Reference::Registry(name) => {
                let Some(digest) = name.digest() else {
                    return self.locate_id(name.written(), references);
                };
                let prefix = name.name();
                let found = references.names.iter().find(|(key, named)| {
                    (named.manifest == *digest || named.index == Some(*digest))
                        && key
                            .strip_prefix(&prefix)
                            .is_some_and(|rest| rest.starts_with([':', '@']))
                });
                Ok(found.map(|(_, named)| (named.manifest, key)))
            }
            Reference::Id(id) => self.locate_id(&id.hex(), references),
            _ => Ok(None),
        }
    }

    fn locate_id(&self, id: &str, references: &References) -> Result<Option<(Digest, String)>> {
        const SHORTEST: usize = 4;
        let digits = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if id.len() < SHORTEST || !id.bytes().all(digits) {
            return Ok(None);
        }
        let mut found: Vec<Record> = Vec::new();
        for record in self.records()? {
            if record.id.hex().starts_with(id) && found.iter().all(|known| known.id != record.id) {
                found.push(record);
            }
        }
        match found.as_slice() {
            [] => Ok(None),
            [record] => {
                let name = references
                    .names
                    .iter()
                    .find(|(_, named)| named.manifest == record.manifest);
                let name = name.map_or_else(|| record.id.to_string(), |(name, _)| name.clone());
                Ok(Some((record.manifest, name)))
            }
            several => Err(Error::AmbiguousId {
                id: id.to_owned(),
                count: several.len(),
            }),
        }
    }

    /// The image of a manifest, with the paths of its layers, which must exist.
    pub(crate) fn image(&self, manifest: &Digest, reference: &str) -> Result<Image> {
        let damaged = |what: String| Error::Damaged {
            reference: reference.to_owned(),
            what,
        };
        let record = match self.read_record(manifest) {
            Err(Error::CorruptStore { .. }) | Ok(None) => {
                return Err(damaged(format!("the record of manifest {manifest}")));
            }
            Ok(Some(record)) => record,
            Err(error) => return Err(error),
        };
        let layers: Vec<PathBuf> = record
            .layers
            .iter()
            .rev()
            .map(|name| self.layer_diff(name))
            .collect();
        for (path, name) in layers.iter().zip(record.layers.iter().rev()) {
            if rustix::fs::access(path, rustix::fs::Access::EXISTS).is_err() {
                return Err(damaged(format!("layer {name}")));
            }
        }
        Ok(Image {
            id: record.id.to_string(),
            reference: reference.to_owned(),
            digest: Some(record.manifest),
            config: record.config,
            layers,
            created: record.created,
            size: record.size,
        })
    }

    /// The entry of a name.
    pub(crate) fn named(&self, key: &str) -> Result<Option<Named>> {
        Ok(self.read_references()?.names.remove(key))
    }

    /// Assigns a name to a local image.
    pub(crate) fn set_name(&self, key: &str, named: Named) -> Result<()> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut references = self.read_references()?;
        // It may have been removed since it was found.
        if self.read_record(&named.manifest)?.is_none() {
            return Err(Error::Damaged {
                reference: key.to_owned(),
                what: "the image, which was removed meanwhile".to_owned(),
            });
        }
        if references.names.get(key) == Some(&named) {
            return Ok(());
        }
        references.names.insert(key.to_owned(), named);
        self.write_references(&references)
    }

    /// Notes under which digest a registry has an image that a name stands for.
    pub(crate) fn set_repo_digest(
        &self,
        key: &str,
        manifest: Digest,
        digest: Digest,
    ) -> Result<()> {
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut references = self.read_references()?;
        match references.names.get_mut(key) {
            // Unless the name was given to another image meanwhile.
            Some(named) if named.manifest == manifest => {
                named.index = (digest != manifest).then_some(digest);
                self.write_references(&references)
            }
            _ => Ok(()),
        }
    }

    /// All local names with tags of a repository.
    pub fn tags(&self, name: &RegistryReference) -> Result<Vec<Reference>> {
        let prefix = format!("{}:", name.name());
        let references = self.read_references()?;
        let names = references.names.keys();
        let names = names.filter(|known| known.starts_with(&prefix));
        names.map(|known| known.parse()).collect()
    }

    /// Adds a name to a local image, as `docker tag` does.
    ///
    /// # Errors
    /// `NotFound` if there is no such image, `Unsupported` for a plain directory and for a name
    /// with a digest.
    pub fn tag(&self, reference: &Reference, name: &RegistryReference) -> Result<()> {
        let image = self.inspect(reference)?;
        let manifest = image.digest.ok_or_else(|| Error::Unsupported {
            reference: reference.written(),
            what: "a plain directory cannot be given a name".to_owned(),
        })?;
        if name.digest().is_some() {
            return Err(Error::InvalidReference {
                reference: name.written().to_owned(),
                reason: "a name to give has a tag, no digest".to_owned(),
            });
        }
        self.set_name(&name.to_string(), Named::image(manifest))
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// The free space of the store's file system.
    pub(crate) fn disk(&self) -> Result<Disk> {
        let root =
            fs::open_dir(&self.root).map_err(|error| Error::io("open", &self.root, error))?;
        Ok(Disk::new(root, self.limits.reserve))
    }

    pub(crate) fn platform(&self) -> &Platform {
        &self.platform
    }

    fn references_path(&self) -> PathBuf {
        self.root.join("references.json")
    }

    fn record_path(&self, manifest: &Digest) -> PathBuf {
        self.root
            .join("images")
            .join(format!("{}.json", manifest.hex()))
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    /// Where the archive of a layer is while it is pulled. Apart from documents: a manifest may
    /// call anything a layer, and archives are removed at the end of a pull.
    pub(crate) fn archive_path(&self, digest: &Digest) -> PathBuf {
        self.blob_path(digest).with_added_extension("archive")
    }

    fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    fn layer_diff(&self, name: &str) -> PathBuf {
        self.root.join("layers").join(name).join("diff")
    }

    /// An unnamed file, on the store's disk: nothing is left of it whatever happens.
    ///
    /// # Errors
    /// The disk does not take it.
    pub fn temporary_file(&self) -> Result<File> {
        // Not O_TMPFILE, which not every file system supports.
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self
            .root
            .join(format!("tmp-{}-{number}", std::process::id()));
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::TRUNC;
        rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|fd| rustix::fs::unlink(&path).map(|()| File::from(fd)))
            .map_err(|error| Error::io("create", path, error))
    }

    fn open_lock_file(&self, name: &str) -> Result<std::os::fd::OwnedFd> {
        let path = self.root.join(name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|error| Error::io("open", path, error))
    }

    /// Takes the lock on names and records, until the returned value is dropped.
    fn lock(&self, operation: FlockOperation) -> Result<FileLock> {
        let fd = self.open_lock_file("lock")?;
        flock(&fd, operation).map_err(|error| Error::io("lock", self.root.join("lock"), error))?;
        Ok(FileLock { _fd: fd })
    }

    /// Marks that layers are being created, so that layers not yet used by an image are not
    /// removed.
    pub(crate) fn begin_work(&self) -> Result<FileLock> {
        let fd = self.open_lock_file("busy")?;
        flock(&fd, FlockOperation::LockShared)
            .map_err(|error| Error::io("lock", self.root.join("busy"), error))?;
        Ok(FileLock { _fd: fd })
    }
}

/// A lock that is released when this is dropped, or when the process ends in any way.
#[derive(Debug)]
pub(crate) struct FileLock {
    _fd: std::os::fd::OwnedFd,
}

/// `flock`, retried after signals.
pub(crate) fn flock(fd: impl AsFd, operation: FlockOperation) -> rustix::io::Result<()> {
    loop {
        match rustix::fs::flock(fd.as_fd(), operation) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Replaces a file's content atomically, even if the machine crashes.
pub(crate) fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = path.with_added_extension("tmp");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(content)?;
        file.sync_data()
    };
    let result = write()
        .map_err(|error| Error::io("write", &temporary, error))
        .and_then(|()| {
            std::fs::rename(&temporary, path).map_err(|error| Error::io("replace", path, error))
        })
        .and_then(|()| match path.parent() {
            Some(dir) => fs::sync_dir(dir).map_err(|error| Error::io("flush", dir, error)),
            None => Ok(()),
        });
    if result.is_err() {
        // Best effort: the original error matters more.
        let _ = std::fs::remove_file(&temporary);
    }
    result
}
