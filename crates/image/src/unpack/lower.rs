//! The merged view of the layers below the one that is unpacked.
//!
//! Called by the writer for the few archives that are incomplete by themselves: parent directories
//! that are not in the archive take owner and mode from below, and hard links may point to files
//! below.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::fs;

/// Lower layers, topmost first.
pub(crate) struct Lower<'a> {
    layers: Vec<BorrowedFd<'a>>,
    used: Cell<bool>,
}

/// Something that a lower layer holds.
pub(crate) struct Found {
    /// The directory it is in.
    pub parent: OwnedFd,
    /// What it is.
    pub stat: Stat,
}

impl<'a> Lower<'a> {
    pub(crate) fn new(layers: Vec<BorrowedFd<'a>>) -> Self {
        Self {
            layers,
            used: Cell::new(false),
        }
    }

    /// Whether any lookup asked the layers.
    pub(crate) fn used(&self) -> bool {
        self.used.get()
    }

    /// What the merged view shows at `path` (its parts, without `.` and `..`). Symbolic links are
    /// not followed.
    pub(crate) fn lookup(&self, path: &[Vec<u8>]) -> Result<Option<Found>, Errno> {
        let Some((last, parents)) = path.split_last() else {
            return Ok(None);
        };
        if !self.layers.is_empty() {
            self.used.set(true);
        }
        'layers: for layer in &self.layers {
            let mut dir = rustix::fs::openat(
                layer,
                ".",
                OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            let mut opaque = fs::is_opaque(dir.as_fd());
            for part in parents {
                match fs::stat(dir.as_fd(), part)? {
                    None if opaque => return Ok(None),
                    None => continue 'layers,
                    Some(stat) if fs::file_type(&stat) == FileType::Directory => {
                        dir = fs::open_child_dir(dir.as_fd(), part.as_slice())?;
                        opaque |= fs::is_opaque(dir.as_fd());
                    }
                    Some(_) => return Ok(None),
                }
            }
            match fs::stat(dir.as_fd(), last)? {
                None if opaque => return Ok(None),
                None => {}
                Some(stat) if fs::is_whiteout(&stat) => return Ok(None),
                Some(stat) => return Ok(Some(Found { parent: dir, stat })),
            }
        }
        Ok(None)
    }
}
