//! Packs a directory into a tar archive, deterministically: as it is, or as the upper directory of
//! an overlay, whose marks of what is gone become those of a layer (OCI image specification,
//! "Whiteouts").
//!
//! Called by `import` and `commit`. Never follows a symbolic link and never leaves the file system
//! of the directory: a mounted `proc` is an empty directory in the archive. Sockets are omitted:
//! they are useless without their process.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hull_archive::append_link;
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

/// Whether something is left out: a path below the directory.
pub type Hidden<'a> = &'a dyn Fn(&Path, &Metadata) -> bool;

/// Marks of layers.
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

struct Packer<'a, W: Write> {
    archive: Builder<W>,
    device: u64,
    /// It is the upper directory of an overlay.
    upper: Option<Hidden<'a>>,
    /// First path of files with several links, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
}

/// Writes the archive of `root` to `output`.
pub(super) fn pack(root: &Path, output: impl Write) -> Result<(), PackError> {
    pack_with(root, None, output)
}

/// Writes the archive of what a container has changed, by the upper directory of its overlay. Names
/// in it may be anything: the caller sees to it that no link in it leads out of `root`.
///
/// # Errors
/// A file cannot be read, or `output` not be written.
pub fn pack_changes(root: &Path, hidden: Hidden<'_>, output: impl Write) -> io::Result<()> {
    pack_with(root, Some(hidden), output).map_err(io::Error::other)
}

fn pack_with(root: &Path, upper: Option<Hidden<'_>>, output: impl Write) -> Result<(), PackError> {
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
        upper,
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
        let metadata = match std::fs::symlink_metadata(&path) {
            // Removed since its directory was read, by a container that runs.
            Err(error) if upper.is_some() && error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata.map_err(failed)?,
        };
        if upper.is_some_and(|hidden| hidden(&name, &metadata)) {
            continue;
        }
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

/// Whether this is how an overlay says that a name is gone
/// (Documentation/filesystems/overlayfs.rst).
pub fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Whether an overlay shows nothing of lower directories in this one.
pub fn is_opaque(path: &Path) -> bool {
    let says = |name: &str| {
        let mut value = [0; 2];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]);
        length.is_ok_and(|length| &value[..length] == b"y")
    };
    says("trusted.overlay.opaque") || says("user.overlay.opaque")
}

impl<W: Write> Packer<'_, W> {
    /// An empty file whose name is a mark.
    fn mark(&mut self, name: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(0);
        self.archive.append_data(&mut header, name, io::empty())
    }

    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            return Ok(());
        }
        if self.upper.is_some() && is_whiteout(metadata) {
            let mut gone = OsString::from(WHITEOUT);
            gone.push(name.file_name().unwrap_or_default());
            return self.mark(&name.with_file_name(gone));
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
                return append_link(&mut self.archive, &mut header, name, first);
            }
            self.linked.insert(inode, name.to_owned());
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let target = std::fs::read_link(path)?;
            return append_link(&mut self.archive, &mut header, name, &target);
        }
        let xattrs = if kind.is_file() || kind.is_dir() {
            xattrs(path)?
        } else {
            Vec::new()
        };
        let overlays = |name: &str| {
            let name = name.strip_prefix("SCHILY.xattr.").unwrap_or(name);
            name.starts_with("trusted.overlay.") || name.starts_with("user.overlay.")
        };
        self.archive.append_pax_extensions(
            xattrs
                .iter()
                .filter(|(name, _)| self.upper.is_none() || !overlays(name))
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
        self.archive.append_data(&mut header, name, io::empty())?;
        match self.upper.is_some() && kind.is_dir() && is_opaque(path) {
            true => self.mark(&name.join(OPAQUE)),
            false => Ok(()),
        }
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
