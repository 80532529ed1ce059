//! Unpacks one layer into one directory that can be a lower directory of an overlay.
//!
//! Called by the store (pull, import). A layer is untrusted data, so:
//!
//! - Every path is resolved by the kernel below the layer's directory (`openat2`,
//!   `RESOLVE_IN_ROOT`): a symbolic link leads at most to the layer's own root, as it would in the
//!   container. The last component of a name is never followed: an existing file is replaced.
//! - Names with `..` and absolute names are rejected. Targets of symbolic links are text and may be
//!   anything; targets of hard links may begin with a slash (some tools write that), which means
//!   the layer's root.
//! - Device nodes: the harmless pseudo devices that distributions include in `/dev` (null, zero,
//!   tty, …) are created. Block devices and all others are left out below `/dev`, which a container
//!   has anew, and rejected by name elsewhere. A character device 0:0 is a whiteout, as in
//!   overlayfs.
//! - Extended attributes: `user.*`, `security.capability` and POSIX ACLs are kept. `trusted.*` and
//!   `user.overlay.*` are dropped: in an overlay they would redirect directories.
//! - Bytes and entries are counted towards the image's limits before they are written, and a part
//!   of the file system stays free ([`crate::Limits`]). Memory does not grow with the archive:
//!   names, attributes and extension headers of one entry are bounded (`crate::limits`).
//!
//! Whiteouts (`.wh.name`) become character devices 0:0, opaque directories (`.wh..wh..opq`) get the
//! attribute `trusted.overlay.opaque`. Both hide only entries of lower layers, regardless of their
//! order in the archive.
//!
//! The result depends only on the archive, unless that omits parent directories or has hard links
//! to files of lower layers. Then the unpacker accesses the lower layers, and sets
//! [`Unpacked::used_lower`].

mod attributes;
pub(crate) mod compression;
mod device;
pub(crate) mod fs;
pub(crate) mod lower;
pub mod process;
pub(crate) mod rebuild;
pub(crate) mod skeleton;
pub mod tar_reader;
mod writer;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

pub use compression::uncompress;
pub use tar_reader::TarError;

use crate::limits::{Budget, DiskError, Low};
use lower::Lower;
use skeleton::{Recorder, Skeleton};
use tar_reader::TarReader;

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The archive is unreadable.
    #[error("{0}")]
    Tar(#[from] TarError),
    /// A name contains `..`.
    #[error("entry \"{entry}\" leads outside of the layer")]
    Escapes {
        /// Name of the entry.
        entry: String,
    },
    /// A hard link's target is outside of the layer.
    #[error("hard link \"{entry}\" to \"{target}\" leads outside of the layer")]
    LinkEscapes {
        /// Name of the entry.
        entry: String,
        /// Target of the link.
        target: String,
    },
    /// A hard link's target does not exist.
    #[error("hard link \"{entry}\" to \"{target}\", which neither this layer nor a lower one has")]
    LinkTarget {
        /// Name of the entry.
        entry: String,
        /// Target of the link.
        target: String,
    },
    /// A device node of a real device.
    #[error("entry \"{entry}\" is {kind} device {major}:{minor}, which images may not bring")]
    Device {
        /// Name of the entry.
        entry: String,
        /// `block` or `character`.
        kind: &'static str,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// An invalid whiteout.
    #[error("entry \"{entry}\" is no valid whiteout")]
    Whiteout {
        /// Name of the entry.
        entry: String,
    },
    /// The parent is not a directory, or a loop of symbolic links.
    #[error("entry \"{entry}\": {parent} is no directory")]
    Parent {
        /// Name of the entry.
        entry: String,
        /// The parent.
        parent: String,
    },
    /// An empty or overlong name, or an entry type that layers cannot contain.
    #[error("entry \"{entry}\": {reason}")]
    Entry {
        /// Name of the entry.
        entry: String,
        /// The reason.
        reason: String,
    },
    /// The digest of the uncompressed archive is not the one in the image's configuration.
    #[error(
        "its uncompressed content has digest {actual}, the image's configuration says {expected}"
    )]
    DiffId {
        /// Digest in the configuration.
        expected: crate::Digest,
        /// Computed digest.
        actual: crate::Digest,
    },
    /// The image has more bytes than the configuration permits.
    #[error("the image has more than {limit} bytes uncompressed")]
    TooLarge {
        /// The limit.
        limit: u64,
    },
    /// The image has more entries than the configuration permits.
    #[error("the image has more than {limit} files, directories and links")]
    TooManyInodes {
        /// The limit.
        limit: u64,
    },
    /// The file system of the store has too little left.
    #[error("no space left on its file system: {0}")]
    Reserve(Low),
    /// What the process that unpacks it found.
    #[error("{message}")]
    Reported {
        /// One of the others.
        message: String,
        /// The disk is full.
        full: bool,
        /// It is about the host rather than the archive.
        of_host: bool,
    },
    /// The process that unpacks it cannot be started, or ended without an answer.
    #[error("the process that unpacks it: {0}")]
    Process(String),
    /// An unsupported compression.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Writing failed.
    #[error("cannot {doing} \"{entry}\": {source}")]
    Write {
        /// Name of the entry.
        entry: String,
        /// The operation.
        doing: &'static str,
        /// The error.
        source: io::Error,
    },
}

impl From<DiskError> for LayerError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::Low(low) => Self::Reserve(low),
            DiskError::Unknown(errno) => {
                attributes::failed("look at the free space for", b"/")(errno)
            }
        }
    }
}

impl LayerError {
    /// Whether it is about the host rather than the archive.
    pub(crate) fn is_of_host(&self) -> bool {
        matches!(
            self,
            Self::Write { .. }
                | Self::TooLarge { .. }
                | Self::TooManyInodes { .. }
                | Self::Reserve(_)
                | Self::Process(_)
                | Self::Reported { of_host: true, .. }
        )
    }

    /// Whether the disk is full.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::Write { source, .. } => crate::error::is_full(source),
            Self::Reported { full, .. } => *full,
            _ => false,
        }
    }
}

/// Result of unpacking.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Bytes in files.
    pub bytes: u64,
    /// Number of entries in the archive.
    pub entries: u64,
    /// Whether lower layers influenced the result, so that it is valid only on top of them.
    pub used_lower: bool,
}

/// Unpacks the tar archive `archive` (uncompressed) into the empty directory `root`. `lower` are
/// the directories of the layers below it, topmost first. `budget` counts what the image takes.
///
/// On failure `root` contains part of the layer; the caller removes it.
#[cfg(any(test, fuzzing))]
pub(crate) fn unpack(
    archive: impl Read,
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
) -> Result<Unpacked, LayerError> {
    unpack_recorded(archive, root, lower, budget, Skeleton::default()).map(|(unpacked, _)| unpacked)
}

/// The same for all of `archive`, also what follows its end; writes its skeleton. Returns whether
/// that is complete, too.
pub(crate) fn unpack_recorded(
    archive: impl Read,
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
    skeleton: Skeleton,
) -> Result<(Unpacked, bool), LayerError> {
    let unpacked = unpack_all(archive, root, lower, budget, &skeleton);
    // What kept the skeleton from being written is the cause of what the caller saw.
    unpacked.map_err(|error| skeleton.failure().unwrap_or(error))
}

fn unpack_all(
    archive: impl Read,
    root: OwnedFd,
    lower: &[OwnedFd],
    budget: &mut Budget,
    skeleton: &Skeleton,
) -> Result<(Unpacked, bool), LayerError> {
    let lower = Lower::new(lower.iter().map(AsFd::as_fd).collect());
    let mut writer = writer::Writer::new(root, lower, budget, skeleton.clone())?;
    let mut reader = TarReader::new(Recorder::new(archive, skeleton.clone()));
    let mut counted = 0u64;
    while let Some(entry) = reader.next()? {
        // Its headers, and its data before that is written.
        let end = reader.position().saturating_add(entry.stored);
        writer.count_bytes(end.saturating_sub(counted))?;
        counted = end;
        writer.add(&entry, &mut reader)?;
    }
    let unpacked = writer.finish()?;
    drain(reader.into_inner(), budget)?;
    Ok((unpacked, skeleton.finish()?))
}

/// Reads what follows the archive's end, which belongs to its digest and counts as the rest does.
fn drain(mut archive: impl Read, budget: &mut Budget) -> Result<(), LayerError> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match archive.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => budget.take_bytes(read as u64)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(TarError::from(error).into()),
        }
    }
}

#[cfg(test)]
mod limits_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod skeleton_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
