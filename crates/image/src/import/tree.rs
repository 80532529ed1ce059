//! Packs a directory into a tar archive, deterministically.
//!
//! Called by `import`. Never follows a symbolic link and never leaves the file system of the
//! directory: a mounted `proc` is an empty directory in the archive. Sockets are omitted: they are
//! useless without their process.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

/// Why a directory cannot be packed.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub(super) struct PackError {
    path: PathBuf,
    source: io::Error,
}

impl PackError {
    /// Whether the reader is gone, which has its own reason.
    pub(super) fn is_broken_pipe(&self) -> bool {
        self.source.kind() == io::ErrorKind::BrokenPipe
    }
}

struct Packer<W: Write> {
    archive: Builder<W>,
    device: u64,
    /// First path of files with several links, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
}

/// Writes the archive of `root` to `output`.
pub(super) fn pack(root: &Path, output: impl Write) -> Result<(), PackError> {
    let failed = |source| PackError {
        path: root.to_owned(),
        source,
    };
    let metadata = std::fs::metadata(root).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let archive = Builder::new(BufWriter::with_capacity(64 * 1024, output));
    let mut packer = Packer {
        archive,
        device: metadata.dev(),
        linked: HashMap::new(),
    };
    packer
        .add(root, Path::new("./"), &metadata)
        .map_err(failed)?;
    // Depth first, with a list instead of recursion: trees may be deep.
    let mut todo = children(root, Path::new(""))?;
    while let Some((path, name)) = todo.pop() {
        let failed = |source| PackError {
            path: path.clone(),
            source,
        };
        let metadata = std::fs::symlink_metadata(&path).map_err(failed)?;
        packer.add(&path, &name, &metadata).map_err(failed)?;
        if metadata.is_dir() && metadata.dev() == packer.device {
            todo.extend(children(&path, &name)?);
        }
    }
    packer
        .archive
        .into_inner()
        .and_then(|mut output| output.flush())
        .map_err(failed)
}

/// The entries of a directory, last name first.
fn children(dir: &Path, name: &Path) -> Result<Vec<(PathBuf, PathBuf)>, PackError> {
    let failed = |source| PackError {
        path: dir.to_owned(),
        source,
    };
    let mut names: Vec<OsString> = std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()
        .map_err(failed)?;
    names.sort_unstable_by(|a, b| b.cmp(a));
    Ok(names
        .into_iter()
        .map(|child| (dir.join(&child), name.join(&child)))
        .collect())
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            return Ok(());
        }
        let mut header = Header::new_gnu();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(u64::from(metadata.uid()));
        header.set_gid(u64::from(metadata.gid()));
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        header.set_size(0);
        if !metadata.is_dir() && metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.linked.get(&inode) {
                header.set_entry_type(EntryType::Link);
                return self.archive.append_link(&mut header, name, first);
            }
            self.linked.insert(inode, name.to_owned());
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self
                .archive
                .append_link(&mut header, name, std::fs::read_link(path)?);
        }
        let xattrs = if kind.is_file() || kind.is_dir() {
            xattrs(path)?
        } else {
            Vec::new()
        };
        self.archive.append_pax_extensions(
            xattrs
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_slice())),
        )?;
        if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            header.set_size(metadata.len());
            // Exactly as long as announced, even if the file is modified meanwhile.
            let data = File::open(path)?.chain(io::repeat(0)).take(metadata.len());
            return self.archive.append_data(&mut header, name, data);
        }
        let entry_type = match () {
            () if kind.is_dir() => EntryType::Directory,
            () if kind.is_fifo() => EntryType::Fifo,
            () if kind.is_block_device() => EntryType::Block,
            () => EntryType::Char,
        };
        header.set_entry_type(entry_type);
        if kind.is_char_device() || kind.is_block_device() {
            header.set_device_major(rustix::fs::major(metadata.rdev()))?;
            header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
        }
        self.archive.append_data(&mut header, name, io::empty())
    }
}

/// A file's extended attributes as PAX records. The unpacker decides which of them are allowed.
fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0u8; 64 * 1024];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    names.truncate(length);
    let mut found = Vec::new();
    for name in names
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let Ok(key) = String::from_utf8(name.to_vec()) else {
            continue;
        };
        let mut value = vec![0u8; 64 * 1024];
        let name = OsString::from_vec(name.to_vec());
        let length = rustix::fs::lgetxattr(path, name.as_bytes(), &mut value[..])?;
        value.truncate(length);
        found.push((format!("SCHILY.xattr.{key}"), value));
    }
    found.sort_unstable();
    Ok(found)
}
