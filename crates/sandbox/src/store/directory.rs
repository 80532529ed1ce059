//! A directory of hull's own, opened once and used by descriptor: no path below it is walked again,
//! so nothing that is renamed or linked in between can lead elsewhere.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

use crate::error::{Context, Error, Result};

/// Largest file that is read whole, bytes: a container's configuration.
const MAX_FILE: u64 = 64 << 20;

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    /// For messages, and for removing it.
    path: PathBuf,
}

impl AsFd for Directory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Directory {
    /// Opens a directory that exists.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self::from_fd(fd, path))
    }

    /// Creates a directory that nobody but its owner may enter, with all above it, and opens it.
    ///
    /// # Errors
    /// It cannot be created, or what is there is no directory.
    pub fn create(path: &Path) -> Result<Self> {
        let doing = || format!("create {}", path.display());
        create_private(path).context(doing)?;
        Self::open(path).context(doing)
    }

    /// Creates a directory that must not exist yet; what is above it is created as well.
    ///
    /// # Errors
    /// `AlreadyExists`, or it cannot be created.
    pub fn create_new(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            create_private(parent)?;
        }
        fs::DirBuilder::new().mode(0o700).create(path)?;
        Self::open(path)
    }

    /// Moves it to another path of the same file system.
    pub fn rename_to(self, path: &Path) -> io::Result<Self> {
        fs::rename(&self.path, path)?;
        Ok(Self::from_fd(self.fd, path))
    }

    /// A directory that somebody else has opened.
    pub fn from_fd(fd: OwnedFd, path: impl Into<PathBuf>) -> Self {
        Self {
            fd,
            path: path.into(),
        }
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A descriptor of it for another process.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn share(&self) -> Result<OwnedFd> {
        self.fd
            .try_clone()
            .context(|| format!("share {}", self.path.display()))
    }

    /// A second handle.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self::from_fd(self.share()?, self.path.clone()))
    }

    fn message(&self, verb: &str, name: &str) -> String {
        format!("{verb} {}", self.path.join(name).display())
    }

    /// Reads a small file; `None` when there is none. A symbolic link is not followed.
    ///
    /// # Errors
    /// It cannot be read, or is larger than any of hull's.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let doing = || self.message("read", name);
        let file = match self.open_file(name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(doing),
        };
        let mut text = Vec::new();
        file.take(MAX_FILE + 1)
            .read_to_end(&mut text)
            .context(doing)?;
        match text.len() as u64 > MAX_FILE {
            true => Err(Error::new(format!("cannot {}: it is too long", doing()))),
            false => Ok(Some(text)),
        }
    }

    /// Writes a file so that a reader sees either the old or the new one. Not synced to disk: what
    /// a power failure takes with it is also the container.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, name: &str, text: &[u8]) -> Result<()> {
        let new = format!("{name}.new");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        self.open_file(&new, flags)
            .and_then(|mut file| file.write_all(text))
            .and_then(|()| Ok(renameat(&self.fd, new.as_str(), &self.fd, name)?))
            .context(|| self.message("write", name))
    }

    /// Opens a file in it, private to its owner when it is created.
    pub fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(&self.fd, name, flags, Mode::from_raw_mode(0o600))?;
        Ok(File::from(file))
    }

    /// Another descriptor of it, with locks of its own.
    pub fn reopen(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(&self.fd, ".", flags, Mode::empty())?)
    }

    /// Renames a file in it.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(renameat(&self.fd, from, &self.fd, to)?)
    }

    /// The number of a file, if there is one: tells whether it is still the one that was opened.
    pub fn inode(&self, name: &str) -> io::Result<Option<u64>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.st_ino)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a file, if there is one.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove_file(&self, name: &str) -> Result<()> {
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error).context(|| self.message("remove", name)),
        }
    }

    /// Whether the directory at its path is still this one.
    pub fn is_there(&self) -> bool {
        let own = rustix::fs::fstat(&self.fd).map(|stat| (stat.st_dev, stat.st_ino));
        let there = fs::symlink_metadata(&self.path);
        matches!((own, there), (Ok(own), Ok(there)) if own == (there.dev(), there.ino()))
    }
}

/// Creates a directory, and what is missing above it, for its owner alone.
fn create_private(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Removes a directory with everything in it; one that is not there is fine.
///
/// # Errors
/// Something in it cannot be removed.
pub fn remove_all(path: &Path) -> Result<()> {
    /// Another process may be writing its last word into it.
    const ATTEMPTS: u32 = 16;
    let mut attempt = 1;
    let removed = loop {
        match unless_missing(fs::remove_dir_all(path)) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty && attempt < ATTEMPTS => {
                attempt += 1;
            }
            removed => break removed,
        }
    };
    removed.context(|| format!("remove {}", path.display()))
}

/// What is gone already is as good as removed.
pub(super) fn unless_missing(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_written_whole_and_read_back() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::create(&parent.path().join("a/b")).unwrap();
        assert_eq!(directory.read("x").unwrap(), None);
        directory.write("x", b"one").unwrap();
        directory.write("x", b"two").unwrap();
        assert_eq!(directory.read("x").unwrap().unwrap(), b"two");
        assert_eq!(directory.inode("x.new").unwrap(), None);
        let mode = fs::metadata(directory.path().join("x")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_link_is_not_followed_and_a_moved_directory_is_noticed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a");
        let directory = Directory::create(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path.join("link")).unwrap();
        directory.read("link").unwrap_err();
        assert!(directory.is_there());
        fs::rename(&path, parent.path().join("b")).unwrap();
        assert!(!directory.is_there());
        // What is written goes to the directory that was opened.
        directory.write("x", b"1").unwrap();
        assert!(parent.path().join("b/x").exists());
    }

    #[test]
    fn a_new_directory_must_not_exist() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("a/b");
        Directory::create_new(&path).unwrap();
        let error = Directory::create_new(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        remove_all(&path).unwrap();
        remove_all(&path).unwrap();
    }
}
