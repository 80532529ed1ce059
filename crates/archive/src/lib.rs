//! Packs a file tree into a tar archive, and unpacks one, for `hull cp`. Numeric owners, all mode
//! bits, times (in seconds), symbolic and hard links, devices and FIFOs are kept; sockets, which
//! mean nothing elsewhere, are left out, and so is what is in file systems of the kernel's own
//! (/proc, /sys).
//!
//! Called by the agent for a container that runs, and by the engine for one that is stopped, both
//! in a process or thread whose root is the container's. Relies on that root to confine symbolic
//! links, and on nothing else: names in an archive cannot climb out of the directory it is unpacked
//! into. Never prints, and never changes the root.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Metadata};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, mknodat, utimensat};
use tar::{Archive, Builder, Entry, EntryType, Header};

/// Size of reads and writes.
const PIECE: usize = 256 * 1024;

/// Writes the file or directory at `path` as an archive. Entries are named relative to its parent.
pub fn pack(path: &Path, follow: bool, stream: impl Write) -> io::Result<()> {
    let metadata = if follow {
        fs::metadata(path)
    } else {
        fs::symlink_metadata(path)
    }?;
    // The root directory has no name of its own.
    let name = path
        .file_name()
        .map_or_else(|| PathBuf::from("."), PathBuf::from);
    let mut packer = Packer {
        archive: Builder::new(BufWriter::with_capacity(PIECE, stream)),
        linked: HashMap::new(),
    };
    packer.append(path, &name, &metadata)?;
    packer.archive.into_inner()?.flush()
}

/// Appends a link whose target is kept byte by byte: the library would write `/` as `//`, and
/// `a//b` as `a/b`.
///
/// # Errors
/// The archive cannot be written.
pub fn append_link(
    archive: &mut Builder<impl Write>,
    header: &mut Header,
    name: &Path,
    target: &Path,
) -> io::Result<()> {
    // Longer ones are written as they are, in an extension.
    match header.set_link_name_literal(target.as_os_str().as_bytes()) {
        Ok(()) => archive.append_data(header, name, io::empty()),
        Err(_) => archive.append_link(header, name, target),
    }
}

struct Packer<W: Write> {
    archive: Builder<W>,
    /// Names of files with several links, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Packer<W> {
    /// Appends what is at `path` and, for a directory, all that is in it.
    fn append(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        // An explicit stack: a tree may be too deep for recursion.
        let mut waiting = vec![(path.to_owned(), name.to_owned(), Some(metadata.clone()))];
        let mut first = true;
        while let Some((path, name, metadata)) = waiting.pop() {
            let metadata = match metadata {
                Some(metadata) => metadata,
                None => match fs::symlink_metadata(&path) {
                    Ok(metadata) => metadata,
                    // Removed since its directory was read.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(of(&path, error)),
                },
            };
            match self.append_one(&path, &name, &metadata) {
                Ok(()) => {}
                // Removed since it was looked at. The first one is what was asked for.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !first => continue,
                Err(error) => return Err(of(&path, error)),
            }
            first = false;
            if metadata.is_dir() && !is_kernels_own(&path) {
                let mut entries = fs::read_dir(&path)
                    .and_then(Iterator::collect::<io::Result<Vec<_>>>)
                    .map_err(|e| of(&path, e))?;
                // The last one pushed comes first.
                entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.file_name()));
                waiting.extend(
                    entries
                        .iter()
                        .map(|e| (e.path(), name.join(e.file_name()), None)),
                );
            }
        }
        Ok(())
    }

    fn append_one(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        let mut header = Header::new_gnu();
        header.set_metadata(metadata);
        header.set_size(0);
        if !kind.is_dir() && metadata.nlink() > 1 {
            let inode = (metadata.dev(), metadata.ino());
            if let Some(first) = self.linked.get(&inode) {
                header.set_entry_type(EntryType::Link);
                return append_link(&mut self.archive, &mut header, name, first);
            }
            self.linked.insert(inode, name.to_owned());
        }
        if kind.is_symlink() {
            return append_link(&mut self.archive, &mut header, name, &fs::read_link(path)?);
        }
        if kind.is_file() {
            let size = metadata.len();
            header.set_size(size);
            let file = File::open(path)?;
            // A file that shrinks meanwhile is padded: its header has been sent already.
            let content = BufReader::with_capacity(PIECE, file)
                .take(size)
                .chain(io::repeat(0))
                .take(size);
            return self.archive.append_data(&mut header, name, content);
        }
        if kind.is_char_device() || kind.is_block_device() {
            header.set_device_major(rustix::fs::major(metadata.rdev()))?;
            header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
        } else if !kind.is_dir() && !kind.is_fifo() {
            return Ok(());
        }
        self.archive.append_data(&mut header, name, io::empty())
    }
}

/// Whether a directory belongs to a file system whose files are the kernel's state, not data.
fn is_kernels_own(path: &Path) -> bool {
    // linux/magic.h
    const PROC_SUPER_MAGIC: i64 = 0x9fa0;
    const SYSFS_MAGIC: i64 = 0x6265_6572;
    const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
    const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    const KERNELS: [i64; 5] = [
        PROC_SUPER_MAGIC,
        SYSFS_MAGIC,
        CGROUP2_SUPER_MAGIC,
        DEVPTS_SUPER_MAGIC,
        MQUEUE_MAGIC,
    ];
    // One that cannot be asked is read, which says why.
    rustix::fs::statfs(path).is_ok_and(|info| KERNELS.contains(&info.f_type))
}

/// Unpacks an archive into an existing directory.
pub fn unpack(directory: &Path, stream: impl Read) -> io::Result<()> {
    if !fs::metadata(directory)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let mut archive = Archive::new(BufReader::with_capacity(PIECE, stream));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    // Unpacking into a directory changes its time: times are set at the end.
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path()?.into_owned();
        let Some(inside) = inside(&name)? else {
            continue;
        };
        let target = directory.join(inside);
        unpack_one(directory, &mut entry, &target).map_err(|error| of(&target, error))?;
        if entry.header().entry_type().is_dir() {
            directories.push((target, modified(entry.header())));
        }
    }
    // What follows the end of the archive belongs to the stream: a sender blocks until it is read.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    for (directory, time) in directories.iter().rev() {
        File::open(directory)
            .and_then(|directory| directory.set_times(FileTimes::new().set_modified(*time)))
            .map_err(|error| of(directory, error))?;
    }
    Ok(())
}

fn unpack_one<R: Read>(
    directory: &Path,
    entry: &mut Entry<'_, R>,
    target: &Path,
) -> io::Result<()> {
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let header = entry.header();
    let kind = header.entry_type();
    match kind {
        EntryType::Directory => {
            match fs::create_dir(target) {
                // A link to a directory is accepted as well.
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists
                        && fs::metadata(target)?.is_dir() => {}
                other => other?,
            }
            std::os::unix::fs::chown(target, Some(id(header.uid()?)?), Some(id(header.gid()?)?))?;
            fs::set_permissions(target, fs::Permissions::from_mode(header.mode()? & 0o7777))
        }
        EntryType::Link => {
            let first = entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?;
            let first = inside(&first)?.ok_or(io::ErrorKind::InvalidData)?;
            make_room(target)?;
            fs::hard_link(directory.join(first), target)
        }
        EntryType::Symlink => {
            let (uid, gid) = (id(header.uid()?)?, id(header.gid()?)?);
            let time = Timespec {
                tv_sec: header.mtime()? as i64,
                tv_nsec: 0,
            };
            make_room(target)?;
            std::os::unix::fs::symlink(
                entry.link_name()?.ok_or(io::ErrorKind::InvalidData)?,
                target,
            )?;
            lchown(target, Some(uid), Some(gid))?;
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            Ok(utimensat(CWD, target, &times, AtFlags::SYMLINK_NOFOLLOW)?)
        }
        EntryType::Fifo | EntryType::Char | EntryType::Block => {
            make_room(target)?;
            let file_type = match kind {
                EntryType::Fifo => FileType::Fifo,
                EntryType::Char => FileType::CharacterDevice,
                _ => FileType::BlockDevice,
            };
            let device = match kind {
                EntryType::Fifo => 0,
                _ => rustix::fs::makedev(
                    header.device_major()?.unwrap_or_default(),
                    header.device_minor()?.unwrap_or_default(),
                ),
            };
            let mode = header.mode()? & 0o7777;
            mknodat(CWD, target, file_type, Mode::from_raw_mode(mode), device)?;
            lchown(target, Some(id(header.uid()?)?), Some(id(header.gid()?)?))?;
            fs::set_permissions(target, fs::Permissions::from_mode(mode))?;
            let time = Timespec {
                tv_sec: header.mtime()? as i64,
                tv_nsec: 0,
            };
            let times = Timestamps {
                last_access: time,
                last_modification: time,
            };
            Ok(utimensat(CWD, target, &times, AtFlags::SYMLINK_NOFOLLOW)?)
        }
        // A name with a slash at its end was a directory before POSIX.
        EntryType::Regular | EntryType::Continuous if !entry.path_bytes().ends_with(b"/") => {
            make_room(target)?;
            unpack_file(entry, target)
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            make_room(target)?;
            entry.unpack(target).map(|_| ())
        }
        // Global headers describe no file.
        EntryType::XGlobalHeader => Ok(()),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "not supported: tar entries of type {:?}",
                other.as_byte() as char
            ),
        )),
    }
}

/// Removes what is in the way, unless it is a directory.
fn make_room(target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(target) {
        Ok(metadata) if metadata.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(_) => fs::remove_file(target),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// A name in an archive, relative to the directory; an error if it leads out. `None` for the
/// directory itself, which is left unchanged.
fn inside(name: &Path) -> io::Result<Option<PathBuf>> {
    let mut inside = PathBuf::new();
    for component in name.components() {
        match component {
            Component::Normal(part) => inside.push(part),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
            Component::ParentDir => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{name:?} leads out of the archive"),
                ));
            }
        }
    }
    Ok((!inside.as_os_str().is_empty()).then_some(inside))
}

fn id(number: u64) -> io::Result<u32> {
    u32::try_from(number).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Unpacks a file. In the guest a write costs more than its bytes: the crate tar writes 8 KiB at a
/// time.
fn unpack_file<R: Read>(entry: &mut Entry<'_, R>, target: &Path) -> io::Result<()> {
    let header = entry.header();
    let (uid, gid) = (id(header.uid()?)?, id(header.gid()?)?);
    let mode = fs::Permissions::from_mode(header.mode()? & 0o7777);
    let times = FileTimes::new().set_modified(modified(header));
    let mut file = File::create_new(target)?;
    let at_once = |left: u64| usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
    let mut left = entry.size();
    let mut piece = vec![0; at_once(left)];
    while left > 0 {
        let length = at_once(left);
        entry.read_exact(&mut piece[..length])?;
        file.write_all(&piece[..length])?;
        left -= length as u64;
    }
    // A change of owner takes the set-id bits.
    std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
    file.set_permissions(mode)?;
    file.set_times(times)
}

fn modified(header: &Header) -> SystemTime {
    SystemTime::UNIX_EPOCH
        + Duration::from_secs(header.mtime().unwrap_or(0).min(i64::MAX as u64 / 2))
}

fn of(path: &Path, error: io::Error) -> io::Error {
    // The crate tar says what it was doing, and its cause says why that failed.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    io::Error::new(error.kind(), format!("{}: {cause}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::symlink;

    fn packed(path: &Path, follow: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        pack(path, follow, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_tree_comes_back_as_it_was() {
        let from = tempfile::tempdir().unwrap();
        let tree = from.path().join("tree");
        fs::create_dir_all(tree.join("sub/empty")).unwrap();
        fs::write(tree.join("sub/file"), b"content").unwrap();
        fs::set_permissions(tree.join("sub/file"), fs::Permissions::from_mode(0o4750)).unwrap();
        fs::hard_link(tree.join("sub/file"), tree.join("second")).unwrap();
        symlink("../nowhere", tree.join("link")).unwrap();
        fs::write(tree.join("long").with_file_name("x".repeat(200)), b"").unwrap();
        mknodat(
            CWD,
            tree.join("fifo"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        File::open(tree.join("sub"))
            .unwrap()
            .set_times(FileTimes::new().set_modified(old))
            .unwrap();

        let to = tempfile::tempdir().unwrap();
        unpack(to.path(), &packed(&tree, false)[..]).unwrap();
        let copy = to.path().join("tree");
        assert_eq!(fs::read(copy.join("sub/file")).unwrap(), b"content");
        let metadata = fs::metadata(copy.join("sub/file")).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o4750);
        assert_eq!(
            metadata.ino(),
            fs::metadata(copy.join("second")).unwrap().ino()
        );
        assert_eq!(
            fs::read_link(copy.join("link")).unwrap(),
            Path::new("../nowhere")
        );
        assert!(
            fs::symlink_metadata(copy.join("fifo"))
                .unwrap()
                .file_type()
                .is_fifo()
        );
        assert_eq!(
            fs::metadata(copy.join("sub")).unwrap().modified().unwrap(),
            old
        );
        assert!(copy.join("sub/empty").is_dir());
    }

    #[test]
    fn a_link_is_followed_only_when_asked() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("file"), b"x").unwrap();
        symlink("file", from.path().join("link")).unwrap();
        let kind = |follow| {
            let bytes = packed(&from.path().join("link"), follow);
            let mut archive = Archive::new(&bytes[..]);
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.path().unwrap(), Path::new("link"));
            entry.header().entry_type()
        };
        assert_eq!(kind(false), EntryType::Symlink);
        assert_eq!(kind(true), EntryType::Regular);
    }

    #[test]
    fn what_is_there_is_replaced_but_never_a_directory() {
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("a"), b"new").unwrap();
        let bytes = packed(&from.path().join("a"), false);
        let to = tempfile::tempdir().unwrap();
        symlink("b", to.path().join("a")).unwrap();
        fs::write(to.path().join("b"), b"old").unwrap();
        unpack(to.path(), &bytes[..]).unwrap();
        assert_eq!(fs::read(to.path().join("a")).unwrap(), b"new");
        assert_eq!(fs::read(to.path().join("b")).unwrap(), b"old");

        let to = tempfile::tempdir().unwrap();
        fs::create_dir(to.path().join("a")).unwrap();
        assert_eq!(
            unpack(to.path(), &bytes[..]).unwrap_err().kind(),
            io::ErrorKind::IsADirectory
        );
    }

    #[test]
    fn names_cannot_climb_out() {
        assert!(inside(Path::new("a/../../b")).is_err());
        assert_eq!(
            inside(Path::new("/etc/x")).unwrap(),
            Some(PathBuf::from("etc/x"))
        );
        assert_eq!(inside(Path::new("./")).unwrap(), None);
    }

    #[test]
    fn the_target_must_be_a_directory() {
        let to = tempfile::tempdir().unwrap();
        fs::write(to.path().join("f"), b"").unwrap();
        assert_eq!(
            unpack(&to.path().join("f"), io::empty())
                .unwrap_err()
                .kind(),
            io::ErrorKind::NotADirectory
        );
        assert_eq!(
            unpack(&to.path().join("g"), io::empty())
                .unwrap_err()
                .kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            pack(&to.path().join("g"), false, io::sink())
                .unwrap_err()
                .kind(),
            io::ErrorKind::NotFound
        );
    }
}
