//! What an image or a registry may take of the host: each bound with its reason.
//!
//! Called by the unpacker, the store and the registry source. [`Limits`] are the bounds that a
//! configuration can change; the constants are those that no usable image or registry comes near.

use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::unpack::LayerError;

/// Longest name of an entry, and longest target of a link: PATH_MAX of Linux is 4096 with the final
/// zero byte, and no system call takes more.
pub(crate) const PATH_LENGTH: usize = 4095;

/// Most components of an entry's name. Each entry costs a lookup per component; the deepest trees
/// seen in images (nested `node_modules`) have less than 100.
pub(crate) const PATH_DEPTH: usize = 512;

/// Most components that the lookup of one parent directory follows, with those of symbolic links.
/// The kernel follows 40 links; with targets of PATH_MAX they have 80,000 components.
pub(crate) const LOOKUP_STEPS: usize = 2048;

/// Most bytes of the extended attributes of one entry, names and values. The kernel's limits are 64
/// KiB for one value (XATTR_SIZE_MAX) and 64 KiB for all names (XATTR_LIST_MAX); ext4 keeps 4 KiB
/// in all. Images have capabilities (20 bytes) and access control lists.
pub(crate) const ATTRIBUTES: usize = 64 << 10;

/// Most extension headers (PAX, GNU long names, volume labels) before one entry: no writer makes
/// more than three.
pub(crate) const EXTENSIONS: usize = 16;

/// Most bytes of all extension headers before one entry: they are kept in memory until the entry.
pub(crate) const EXTENSION_BYTES: u64 = 1 << 20;

/// Most files of a layer's archive that later entries replace, whose content is kept beside the
/// layer. Archives that are made of one directory have none.
pub(crate) const GONE_FILES: usize = 10_000;

/// Most members of a docker archive, and most bytes of their names: they are kept in memory.
pub(crate) const MEMBERS: usize = 100_000;
/// See [`MEMBERS`]: 160 bytes each; those of `docker save` have less than 80.
pub(crate) const MEMBER_NAMES: usize = 16 << 20;

/// Longest answer of a token service that is read. Tokens have 1 to 10 KiB.
pub(crate) const TOKEN_ANSWER: u64 = 1 << 20;

/// Longest body of an error that is read: one line of it is shown.
pub(crate) const ERROR_BODY: u64 = 64 << 10;

/// Most tags of a repository, or repositories of a registry, that are listed; more are an error.
/// Large public repositories have thousands of tags.
pub(crate) const LISTED: usize = 50_000;

/// Most answers that such a list may come in.
pub(crate) const LIST_PAGES: usize = 1000;

/// How long all of them may take.
pub(crate) const LIST_TIMEOUT: Duration = Duration::from_secs(600);

/// Most results of a search, as in Docker.
pub const SEARCH_RESULTS: usize = 100;

/// Longest name and description of a result of a search, in characters; the rest is cut off.
pub(crate) const SEARCH_TEXT: usize = 1000;

/// Most redirects of one request. Registries redirect to a mirror and that to a CDN.
pub(crate) const REDIRECTS: usize = 5;

/// Bytes written between two looks at the file system's free space: what a layer can take of the
/// reserve.
const CHECK_BYTES: u64 = 8 << 20;
/// Entries created between two looks: a directory takes a block of the file system.
const CHECK_ENTRIES: u32 = 512;

/// The bounds of an image that can be configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Most bytes of an image: the sum of its uncompressed layer archives. Holes of sparse files
    /// take nothing. Large images of machine learning frameworks have 30 to 60 GB.
    pub size: u64,
    /// Most entries of an image's layers: files, directories, links. Each takes an inode or a
    /// directory entry. Large images have a million.
    pub inodes: u64,
    /// What must stay free on the file system of the store.
    pub reserve: Reserve,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            size: 128 << 30,
            inodes: 4_000_000,
            reserve: Reserve::default(),
        }
    }
}

impl Limits {
    /// The default limits with another size and another number of inodes; 0 is no limit.
    pub fn with(size: u64, inodes: u64) -> Self {
        let or_none = |limit| if limit == 0 { u64::MAX } else { limit };
        Self {
            size: or_none(size),
            inodes: or_none(inodes),
            ..Self::default()
        }
    }
}

/// What images leave free on a file system, so that an image cannot stop the programs that share it
/// (logs, databases, hull itself).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reserve {
    /// Part of its blocks and of its inodes, as 1 of this number.
    pub one_of: u64,
    /// But not more bytes than this.
    pub most_bytes: u64,
    /// And not more inodes than this.
    pub most_inodes: u64,
}

impl Default for Reserve {
    /// 1 %; of a large file system 1 GiB and 100,000 inodes.
    fn default() -> Self {
        Self {
            one_of: 100,
            most_bytes: 1 << 30,
            most_inodes: 100_000,
        }
    }
}

/// What one image has taken of its limits.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Used {
    size: u64,
    inodes: u64,
}

/// Counts what one image has taken of its limits.
pub(crate) struct Budget {
    limits: Limits,
    used: Used,
}

impl Budget {
    pub(crate) fn new(limits: Limits) -> Self {
        Self::restore((limits, Used::default()))
    }

    /// What [`Self::restore`] makes the same budget from.
    pub(crate) fn state(&self) -> (Limits, Used) {
        (self.limits, self.used)
    }

    pub(crate) fn restore((limits, used): (Limits, Used)) -> Self {
        Self { limits, used }
    }

    pub(crate) fn used(&self) -> Used {
        self.used
    }

    /// Takes over what another process has counted further.
    pub(crate) fn set(&mut self, used: Used) {
        self.used = used;
    }

    pub(crate) fn reserve(&self) -> Reserve {
        self.limits.reserve
    }

    /// Counts bytes of an archive, before they are written.
    pub(crate) fn take_bytes(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.used.size = self.used.size.saturating_add(bytes);
        match self.used.size <= self.limits.size {
            true => Ok(()),
            false => Err(LayerError::TooLarge {
                limit: self.limits.size,
            }),
        }
    }

    /// Counts entries, before they are created.
    pub(crate) fn take_inodes(&mut self, count: u64) -> Result<(), LayerError> {
        self.used.inodes = self.used.inodes.saturating_add(count);
        match self.used.inodes <= self.limits.inodes {
            true => Ok(()),
            false => Err(LayerError::TooManyInodes {
                limit: self.limits.inodes,
            }),
        }
    }
}

/// Why nothing more may be written to a file system.
#[derive(Debug)]
pub(crate) enum DiskError {
    /// Too little of it is free.
    Low(Low),
    /// It cannot be asked.
    Unknown(Errno),
}

/// What is free, and what must stay free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Low {
    /// `bytes` or `inodes`.
    pub unit: &'static str,
    /// How many are free.
    pub free: u64,
    /// How many must stay free.
    pub reserve: u64,
}

impl fmt::Display for Low {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            unit,
            free,
            reserve,
        } = self;
        write!(f, "{free} {unit} are free, and {reserve} must stay free")
    }
}

/// Watches the free space of a file system while it is written.
pub(crate) struct Disk {
    /// A file or directory on it.
    file: OwnedFd,
    reserve: Reserve,
    unchecked_bytes: u64,
    unchecked_entries: u32,
}

impl Disk {
    pub(crate) fn new(file: OwnedFd, reserve: Reserve) -> Self {
        Self {
            file,
            reserve,
            // The first use looks.
            unchecked_bytes: CHECK_BYTES,
            unchecked_entries: 0,
        }
    }

    /// Called before that many bytes are written.
    pub(crate) fn bytes(&mut self, count: u64) -> Result<(), DiskError> {
        self.unchecked_bytes = self.unchecked_bytes.saturating_add(count);
        self.check()
    }

    /// Called before an entry is created.
    pub(crate) fn entry(&mut self) -> Result<(), DiskError> {
        self.unchecked_entries += 1;
        self.check()
    }

    fn check(&mut self) -> Result<(), DiskError> {
        if self.unchecked_bytes < CHECK_BYTES && self.unchecked_entries < CHECK_ENTRIES {
            return Ok(());
        }
        (self.unchecked_bytes, self.unchecked_entries) = (0, 0);
        let stat = rustix::fs::fstatvfs(&self.file).map_err(DiskError::Unknown)?;
        let reserve = |all: u64, most: u64| (all / self.reserve.one_of.max(1)).min(most);
        let bytes = reserve(
            stat.f_blocks.saturating_mul(stat.f_frsize),
            self.reserve.most_bytes,
        );
        // Some file systems (btrfs) have no fixed number of inodes, and report none.
        let inodes = reserve(stat.f_files, self.reserve.most_inodes);
        for (unit, free, reserve) in [
            ("bytes", stat.f_bavail.saturating_mul(stat.f_frsize), bytes),
            ("inodes", stat.f_favail, inodes),
        ] {
            if free < reserve {
                return Err(DiskError::Low(Low {
                    unit,
                    free,
                    reserve,
                }));
            }
        }
        Ok(())
    }
}
