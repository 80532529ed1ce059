//! Unpacks one layer into one directory that can be a lower directory of an overlay.
//!
//! Called by the store (pull, import). A layer is data from strangers, so:
//!
//! - Every path is resolved by the kernel below the layer's directory (`openat2`,
//!   `RESOLVE_IN_ROOT`): a symbolic link leads at most to the layer's own root, as it would in the
//!   container. The last part of a name is never followed: what is there is replaced.
//! - Names with `..` and absolute names are refused. Targets of symbolic links are only text and
//!   may be anything; targets of hard links may begin with a slash (some tools write that), which
//!   means the layer's root.
//! - Device nodes: the harmless pseudo devices that distributions put into `/dev` (null, zero, tty,
//!   …) are created, block devices and all others are refused by name. A character device 0:0 is a
//!   whiteout, as in overlayfs.
//! - Extended attributes: `user.*`, `security.capability` and POSIX ACLs are kept. `trusted.*` and
//!   `user.overlay.*` are dropped: in an overlay they would redirect directories.
//! - The size of an unpacked layer is bounded by the disk; what is kept in memory is bounded by
//!   [`tar_reader`].
//!
//! Whiteouts (`.wh.name`) become character devices 0:0, opaque directories (`.wh..wh..opq`) get the
//! attribute `trusted.overlay.opaque`. Both hide only what lower layers hold, wherever in the
//! archive they are written.
//!
//! The result depends on the archive alone. Only an archive that leaves out parent directories, or
//! has hard links to files of lower layers, makes the unpacker look at those; it says so in
//! [`Unpacked::used_lower`].

mod attributes;
pub(crate) mod compression;
mod device;
pub(crate) mod fs;
pub(crate) mod lower;
pub mod tar_reader;
mod writer;

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

pub use tar_reader::TarError;

use lower::Lower;
use tar_reader::TarReader;

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The archive itself.
    #[error("{0}")]
    Tar(#[from] TarError),
    /// A name with `..` in it.
    #[error("entry \"{entry}\" leads outside of the layer")]
    Escapes {
        /// Its name.
        entry: String,
    },
    /// A name that begins with a slash.
    #[error("entry \"{entry}\" has an absolute name")]
    Absolute {
        /// Its name.
        entry: String,
    },
    /// A hard link to something outside.
    #[error("hard link \"{entry}\" to \"{target}\" leads outside of the layer")]
    LinkEscapes {
        /// Its name.
        entry: String,
        /// Where it leads.
        target: String,
    },
    /// A hard link to something that is not there.
    #[error("hard link \"{entry}\" to \"{target}\", which neither this layer nor a lower one has")]
    LinkTarget {
        /// Its name.
        entry: String,
        /// Where it leads.
        target: String,
    },
    /// A device node of a real device.
    #[error("entry \"{entry}\" is {kind} device {major}:{minor}, which images may not bring")]
    Device {
        /// Its name.
        entry: String,
        /// `block` or `character`.
        kind: &'static str,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A whiteout of nothing.
    #[error("entry \"{entry}\" is no valid whiteout")]
    Whiteout {
        /// Its name.
        entry: String,
    },
    /// A file below something that is no directory, or a loop of symbolic links.
    #[error("entry \"{entry}\": {parent} is no directory")]
    Parent {
        /// Its name.
        entry: String,
        /// What should be a directory.
        parent: String,
    },
    /// Empty or overlong names, entry types that layers do not have.
    #[error("entry \"{entry}\": {reason}")]
    Entry {
        /// Its name.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The digest of the uncompressed archive is not the one in the image's configuration.
    #[error(
        "its uncompressed content has digest {actual}, the image's configuration says {expected}"
    )]
    DiffId {
        /// As configured.
        expected: crate::Digest,
        /// As computed.
        actual: crate::Digest,
    },
    /// A compression that is not known.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// Writing failed.
    #[error("cannot {doing} \"{entry}\": {source}")]
    Write {
        /// Its name.
        entry: String,
        /// What was done.
        doing: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl LayerError {
    /// Whether the disk is full.
    pub(crate) fn is_full(&self) -> bool {
        matches!(self, Self::Write { source, .. } if crate::error::is_full(source))
    }
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Bytes in files.
    pub bytes: u64,
    /// Entries in the archive.
    pub entries: u64,
    /// Whether lower layers had a say in the result, so that it fits only on top of them.
    pub used_lower: bool,
}

/// Unpacks the tar archive `archive` (not compressed) into the empty directory `root`. `lower` are
/// the directories of the layers below it, topmost first.
///
/// After an error `root` holds part of the layer; the caller removes it.
pub(crate) fn unpack(
    archive: impl Read,
    root: OwnedFd,
    lower: &[OwnedFd],
) -> Result<Unpacked, LayerError> {
    let lower = Lower::new(lower.iter().map(AsFd::as_fd).collect());
    let mut writer = writer::Writer::new(root, lower);
    let mut reader = TarReader::new(archive);
    while let Some(entry) = reader.next()? {
        writer.add(&entry, &mut reader)?;
    }
    writer.finish()
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
