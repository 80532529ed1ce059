//! The merged view of the layers below the one being unpacked.
//!
//! Called by the writer for the few incomplete archives: parent directories missing in the archive
//! take owner and mode from lower layers, and hard links may refer to lower files.

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

/// An entry of a lower layer.
pub(crate) struct Found {
    /// The directory it is in.
    pub parent: OwnedFd,
    /// Its stat.
    pub stat: Stat,
}

impl<'a> Lower<'a> {
    pub(crate) fn new(layers: Vec<BorrowedFd<'a>>) -> Self {
        Self {
            layers,
            used: Cell::new(false),
        }
    }

    /// Whether any lookup accessed the layers.
    pub(crate) fn used(&self) -> bool {
        self.used.get()
    }

    /// Looks up `path` (its components, without `.` and `..`) in the merged view. Symbolic links
    /// are not followed.
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
