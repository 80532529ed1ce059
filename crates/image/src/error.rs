//! Everything that can go wrong with an image, each with what failed, on what, and why.
//!
//! `Display` is the first line that a user sees, [`Error::hint`] the second.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::unpack::LayerError;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The reference itself is malformed.
    #[error("invalid image reference \"{reference}\": {reason}")]
    InvalidReference {
        /// As written.
        reference: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not in the local store, and nobody else was asked.
    #[error("image \"{reference}\" not found: no such reference in the local store{why_local}")]
    NotFound {
        /// As written.
        reference: String,
        /// Why no registry was asked: empty, or a clause that begins with a comma.
        why_local: &'static str,
    },
    /// The registry does not have it.
    #[error("image \"{reference}\" not found: {local}registry {registry} answered {status}")]
    NotInRegistry {
        /// As written.
        reference: String,
        /// Host and port.
        registry: String,
        /// HTTP status.
        status: u16,
        /// Empty, or that the local store was searched before.
        local: &'static str,
    },
    /// The registry wants other credentials.
    #[error(
        "image \"{reference}\" may not be pulled: registry {registry} answered {status} {credentials}"
    )]
    Unauthorized {
        /// As written.
        reference: String,
        /// Host and port.
        registry: String,
        /// HTTP status, 401 or 403.
        status: u16,
        /// Which credentials were tried.
        credentials: String,
    },
    /// The registry cannot be reached.
    #[error(
        "image \"{reference}\" cannot be pulled: registry {registry} cannot be reached: {reason}"
    )]
    Unreachable {
        /// As written.
        reference: String,
        /// Host and port.
        registry: String,
        /// Why.
        reason: String,
    },
    /// The registry answered, but not with what was asked for.
    #[error("image \"{reference}\" cannot be pulled: registry {registry}: {reason}")]
    Registry {
        /// As written.
        reference: String,
        /// Host and port.
        registry: String,
        /// What it answered.
        reason: String,
    },
    /// Docker's credentials cannot be read, or a credential helper failed.
    #[error("credentials for registry {registry}: {reason}")]
    Credentials {
        /// Host and port.
        registry: String,
        /// Why.
        reason: String,
    },
    /// Content is not what its digest says.
    #[error(
        "{what} of image \"{reference}\" is corrupt: expected digest {expected}, its content has {actual}"
    )]
    WrongDigest {
        /// As written.
        reference: String,
        /// `manifest`, `config` or `layer`.
        what: &'static str,
        /// What the manifest, config or reference says.
        expected: Digest,
        /// What was computed.
        actual: Digest,
    },
    /// Content ends early (or goes on too long).
    #[error("{what} {digest} of image \"{reference}\" is truncated: {actual} of {expected} bytes")]
    Truncated {
        /// As written.
        reference: String,
        /// `manifest`, `config` or `layer`.
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// Bytes announced.
        expected: u64,
        /// Bytes there.
        actual: u64,
    },
    /// The image exists, but not for this machine.
    #[error(
        "image \"{reference}\" is not available for {wanted}: it is for {}",
        list(available)
    )]
    WrongPlatform {
        /// As written.
        reference: String,
        /// Ours.
        wanted: String,
        /// Those that exist.
        available: Vec<String>,
    },
    /// A manifest, index or configuration that makes no sense.
    #[error("invalid {what} of image \"{reference}\": {reason}")]
    Invalid {
        /// As written.
        reference: String,
        /// `manifest`, `index`, `config`, …
        what: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Known, and refused.
    #[error("image \"{reference}\": not supported: {what}")]
    Unsupported {
        /// As written.
        reference: String,
        /// What it would need.
        what: String,
    },
    /// A layer cannot be unpacked.
    #[error("layer {layer} of image \"{reference}\": {source}")]
    Layer {
        /// As written.
        reference: String,
        /// The layer's digest.
        layer: String,
        /// Why.
        source: LayerError,
    },
    /// The directory, layout or archive that a reference names is not usable.
    #[error("image \"{reference}\" cannot be read: {reason}")]
    Source {
        /// As written.
        reference: String,
        /// Why.
        reason: String,
    },
    /// An id that begins several images.
    #[error("image id \"{id}\" is ambiguous: {} images begin with it", count)]
    AmbiguousId {
        /// As written.
        id: String,
        /// How many.
        count: usize,
    },
    /// Containers need the image.
    #[error("image \"{reference}\" is in use by {}", list(containers))]
    InUse {
        /// As written.
        reference: String,
        /// Their ids.
        containers: Vec<String>,
    },
    /// Removing by id would remove several names at once.
    #[error("image {id} has several names: {}", list(names))]
    SeveralNames {
        /// As written.
        id: String,
        /// The names.
        names: Vec<String>,
    },
    /// The store lost a part of an image.
    #[error("image \"{reference}\" is damaged: {what} is missing from the store")]
    Damaged {
        /// As written.
        reference: String,
        /// The part.
        what: String,
    },
    /// A file of the store makes no sense.
    #[error("image store: {} is corrupt: {reason}", path.display())]
    CorruptStore {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A change for `import` that cannot be understood.
    #[error("invalid --change \"{change}\": {reason}")]
    InvalidChange {
        /// As written.
        change: String,
        /// Why.
        reason: String,
    },
    /// The disk is full.
    #[error("no space left on device: cannot {doing} {}", path.display())]
    NoSpace {
        /// What was done.
        doing: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// Another error of the operating system.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was done.
        doing: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Refuses content whose digest is another than the expected one.
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
    /// What the user can do about it, if anything is known.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "hull image ls".to_owned(),
            Self::NotInRegistry { reference, .. } => {
                format!("hull image ls; check the name and tag of \"{reference}\"")
            }
            Self::Unauthorized { registry, .. } => format!("docker login {registry}"),
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
            Self::Damaged { reference, .. } => format!("hull image pull {reference}"),
            Self::NoSpace { .. } => "hull image prune".to_owned(),
            _ => return None,
        })
    }

    /// Whether the image is simply not there, as opposed to there and unusable.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NotInRegistry { .. })
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
