//! Errors of image operations: what failed, on what, and why.
//!
//! `Display` is the first line that a user sees, [`Error::hint`] the second.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::limits::{DiskError, Low};
use crate::unpack::LayerError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Which way an image was to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From a registry.
    Pull,
    /// To a registry.
    Push,
    /// Neither: a registry is searched.
    Search,
}

impl std::fmt::Display for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pull => "pulled",
            Self::Push => "pushed",
            Self::Search => "searched for",
        })
    }
}

/// Why an image operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The reference is malformed.
    #[error("invalid image reference \"{reference}\": {reason}")]
    InvalidReference {
        /// The reference as written.
        reference: String,
        /// The reason.
        reason: String,
    },
    /// Not in the local store, and no registry was asked.
    #[error("image \"{reference}\" not found: no such reference in the local store{why_local}")]
    NotFound {
        /// The reference as written.
        reference: String,
        /// Why no registry was asked: empty, or a clause that begins with a comma.
        why_local: &'static str,
    },
    /// The registry does not have it.
    #[error("image \"{reference}\" not found: {local}registry {registry} answered {status}")]
    NotInRegistry {
        /// The reference as written.
        reference: String,
        /// Host and port.
        registry: String,
        /// HTTP status.
        status: u16,
        /// Empty, or a note that the local store was searched before.
        local: &'static str,
    },
    /// The registry rejects the credentials.
    #[error(
        "image \"{reference}\" may not be {transfer}: registry {registry} answered {status} {credentials}"
    )]
    Unauthorized {
        /// The reference as written.
        reference: String,
        /// Host and port.
        registry: String,
        /// HTTP status, 401 or 403.
        status: u16,
        /// Which way the image was to go.
        transfer: Transfer,
        /// Which credentials were tried.
        credentials: String,
    },
    /// The credentials were not sent, as the token service may not be the registry's.
    #[error(
        "image \"{reference}\" may not be {transfer}: registry {registry} answered {status} without \
         credentials, which were not sent to its token service {realm} in another domain"
    )]
    CredentialsWithheld {
        /// The reference as written.
        reference: String,
        /// Host and port.
        registry: String,
        /// HTTP status, 401 or 403.
        status: u16,
        /// Which way the image was to go.
        transfer: Transfer,
        /// Address of the token service, without a query.
        realm: String,
    },
    /// The registry cannot be reached.
    #[error(
        "image \"{reference}\" cannot be {transfer}: registry {registry} cannot be reached: {reason}"
    )]
    Unreachable {
        /// The reference as written.
        reference: String,
        /// Host and port.
        registry: String,
        /// Which way the image was to go.
        transfer: Transfer,
        /// The reason.
        reason: String,
    },
    /// The registry's answer is unusable.
    #[error("image \"{reference}\" cannot be {transfer}: registry {registry}: {reason}")]
    Registry {
        /// The reference as written.
        reference: String,
        /// Host and port.
        registry: String,
        /// Which way the image was to go.
        transfer: Transfer,
        /// The reason.
        reason: String,
    },
    /// The registry does not take a user name and a password, or cannot be asked.
    #[error("cannot log in to registry {registry}: {reason}")]
    Login {
        /// Host and port.
        registry: String,
        /// The reason.
        reason: String,
    },
    /// Docker's credentials cannot be read or written, or a credential helper failed.
    #[error("credentials for registry {registry}: {reason}")]
    Credentials {
        /// Host and port.
        registry: String,
        /// The reason.
        reason: String,
    },
    /// Content does not match its digest.
    #[error(
        "{what} of image \"{reference}\" is corrupt: expected digest {expected}, its content has {actual}"
    )]
    WrongDigest {
        /// The reference as written.
        reference: String,
        /// `manifest`, `config` or `layer`.
        what: &'static str,
        /// Digest in the manifest, config or reference.
        expected: Digest,
        /// Computed digest.
        actual: Digest,
    },
    /// Content is shorter (or longer) than announced.
    #[error("{what} {digest} of image \"{reference}\" is truncated: {actual} of {expected} bytes")]
    Truncated {
        /// The reference as written.
        reference: String,
        /// `manifest`, `config` or `layer`.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// Announced size in bytes.
        expected: u64,
        /// Actual size in bytes.
        actual: u64,
    },
    /// The image exists, but not for this platform.
    #[error(
        "image \"{reference}\" is not available for {wanted}: it is for {}",
        list(available)
    )]
    WrongPlatform {
        /// The reference as written.
        reference: String,
        /// This platform.
        wanted: String,
        /// Platforms that exist.
        available: Vec<String>,
    },
    /// A manifest, index or configuration is invalid.
    #[error("invalid {what} of image \"{reference}\": {reason}")]
    Invalid {
        /// The reference as written.
        reference: String,
        /// `manifest`, `index`, `config`, …
        what: &'static str,
        /// The reason.
        reason: String,
    },
    /// The image needs a feature that is not supported.
    #[error("image \"{reference}\": not supported: {what}")]
    Unsupported {
        /// The reference as written.
        reference: String,
        /// The feature.
        what: String,
    },
    /// The image is larger than the configuration permits, as was seen before unpacking it.
    #[error(
        "image \"{reference}\" is too large: {what} of {size} bytes, at most {limit} are permitted"
    )]
    TooLarge {
        /// The reference as written.
        reference: String,
        /// `archives of its layers`, …
        what: &'static str,
        /// Their size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A layer cannot be unpacked.
    #[error("layer {layer} of image \"{reference}\": {source}")]
    Layer {
        /// The reference as written.
        reference: String,
        /// The layer's digest.
        layer: String,
        /// The reason.
        source: LayerError,
    },
    /// The archive of a layer cannot be created again.
    #[error("image \"{reference}\": the archive of layer {layer} cannot be written: {reason}")]
    NoArchive {
        /// The reference as written.
        reference: String,
        /// The layer's diff id.
        layer: Digest,
        /// The reason.
        reason: String,
    },
    /// The directory, layout or archive of a reference is not usable.
    #[error("image \"{reference}\" cannot be read: {reason}")]
    Source {
        /// The reference as written.
        reference: String,
        /// The reason.
        reason: String,
    },
    /// Several images' ids start with this.
    #[error("image id \"{id}\" is ambiguous: {} images begin with it", count)]
    AmbiguousId {
        /// The id as written.
        id: String,
        /// How many.
        count: usize,
    },
    /// Containers use the image.
    #[error("image \"{reference}\" is in use by {}", list(containers))]
    InUse {
        /// The reference as written.
        reference: String,
        /// Ids of the containers.
        containers: Vec<String>,
    },
    /// Removing by id would remove several names at once.
    #[error("image {id} has several names: {}", list(names))]
    SeveralNames {
        /// The id as written.
        id: String,
        /// The names.
        names: Vec<String>,
    },
    /// A part of an image is missing from the store.
    #[error("image \"{reference}\" is damaged: {what} is missing from the store")]
    Damaged {
        /// The reference as written.
        reference: String,
        /// The missing part.
        what: String,
    },
    /// A file of the store is invalid.
    #[error("image store: {} is corrupt: {reason}", path.display())]
    CorruptStore {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// What a container uses of the store cannot be read.
    #[error(
        "image store: cannot tell which layers container {container} uses: {} is corrupt: {reason}",
        path.display()
    )]
    CorruptHold {
        /// The container's id.
        container: String,
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A file of the store was written by a newer hull.
    #[error(
        "image store: {} has format version {version}, this hull knows {known}", path.display()
    )]
    StoreVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// The newest that is known here.
        known: u32,
    },
    /// An invalid `--change` of `import`.
    #[error("invalid --change \"{change}\": {reason}")]
    InvalidChange {
        /// The change as written.
        change: String,
        /// The reason.
        reason: String,
    },
    /// The disk is full.
    #[error("no space left on device: cannot {doing} {}", path.display())]
    NoSpace {
        /// The operation.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
    },
    /// The rest of the disk is not for images.
    #[error("no space left for images: cannot {doing} {}: {low}", path.display())]
    Reserve {
        /// The operation.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// What is free, and what must stay free.
        low: Low,
    },
    /// Another I/O error.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// The operation.
        doing: &'static str,
        /// Path of the file or directory.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// Rejects content that does not have the expected digest.
pub(crate) fn check_digest(
    reference: &str,
    what: &'static str,
    expected: Digest,
    actual: Digest,
) -> Result<()> {
    if actual == expected {
        return Ok(());
    }
    Err(Error::WrongDigest {
        reference: reference.to_owned(),
        what,
        expected,
        actual,
    })
}

impl Error {
    /// What the user can do about it, if known.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "hull image ls".to_owned(),
            Self::NotInRegistry { reference, .. } => {
                format!("hull image ls; check the name and tag of \"{reference}\"")
            }
            Self::Unauthorized { registry, .. } => format!("hull login {registry}"),
            Self::CredentialsWithheld {
                registry,
                realm,
                transfer: Transfer::Pull,
                ..
            } => format!(
                "is {realm} the token service of {registry}? Then pull the image by another tool, \
                 and import it"
            ),
            Self::CredentialsWithheld {
                registry, realm, ..
            } => format!(
                "is {realm} the token service of {registry}? Then save the image, and push it by \
                 another tool"
            ),
            Self::Unreachable { registry, .. } => {
                format!("is {registry} the right registry, and is the network up?")
            }
            Self::WrongDigest { .. } | Self::Truncated { .. } => {
                "the image is damaged where it comes from: push or build it again".to_owned()
            }
            Self::WrongPlatform { wanted, .. } => format!("build or choose the image for {wanted}"),
            Self::AmbiguousId { .. } => "give more digits of the id".to_owned(),
            Self::InUse { containers, .. } => {
                format!("hull rm {}, or hull image rm -f", containers.join(" "))
            }
            Self::SeveralNames { .. } => {
                "remove the names one by one, or all of them with -f".to_owned()
            }
            Self::CorruptHold { container, .. } => format!("hull rm {container}"),
            Self::CorruptStore { path, .. } => format!(
                "mv {0} {0}.damaged, and pull the images again",
                path.display()
            ),
            Self::Damaged { reference, .. } => format!("hull image pull {reference}"),
            Self::NoArchive { reference, .. } => format!(
                "hull image rm -f {reference}, then pull, load or import it again: an older hull may \
                 have unpacked it"
            ),
            Self::NoSpace { .. } | Self::Reserve { .. } => "hull image prune".to_owned(),
            Self::TooLarge { .. }
            | Self::Layer {
                source: LayerError::TooLarge { .. },
                ..
            } => "image_max_size in the configuration permits larger images".to_owned(),
            Self::Layer {
                source: LayerError::TooManyInodes { .. },
                ..
            } => "image_max_inodes in the configuration permits more files".to_owned(),
            _ => return None,
        })
    }

    /// Whether the image does not exist, as opposed to being unusable.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NotInRegistry { .. })
    }

    pub(crate) fn disk(doing: &'static str, path: impl AsRef<Path>, error: DiskError) -> Self {
        match error {
            DiskError::Low(low) => Self::Reserve {
                doing,
                path: path.as_ref().to_owned(),
                low,
            },
            DiskError::Unknown(errno) => Self::io(doing, path, errno),
        }
    }

    pub(crate) fn io(
        doing: &'static str,
        path: impl AsRef<Path>,
        source: impl Into<io::Error>,
    ) -> Self {
        let (source, path) = (source.into(), path.as_ref().to_owned());
        match is_full(&source) {
            true => Self::NoSpace { doing, path },
            false => Self::Io {
                doing,
                path,
                source,
            },
        }
    }
}

/// Whether the disk (or the quota on it) is exhausted.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn list(items: &[String]) -> String {
    if items.is_empty() {
        "nothing known".to_owned()
    } else {
        items.join(", ")
    }
}
