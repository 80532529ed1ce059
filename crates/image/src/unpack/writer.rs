//! Creates a layer's entries below one directory. The rules are described in the parent module.
//!
//! Times of directories: creating an entry changes the time of its directory. The time is read
//! before the first entry of a run of entries in the same directory, and set again after the last
//! one ([`Parent::leave`]). So the file system itself keeps the times, whatever the order of the
//! archive, and memory does not grow with the number of directories.

mod parents;

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use parents::Parent;

use super::attributes::{
    Attributes, failed, mode_of, read_xattrs, set_attributes, set_opaque, show,
};
use super::device::is_harmless;
use super::lower::Lower;
use super::skeleton::Skeleton;
use super::tar_reader::{Entry, Kind, TarError};
use super::{LayerError, Unpacked, fs};
use crate::limits::{Budget, Disk, PATH_DEPTH, PATH_LENGTH};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// The kernel's limit.
const MAX_LINKS: usize = 40;
/// Time of directories and whiteouts without an entry in the archive, to be deterministic.
const NO_TIME: (i64, u32) = (0, 0);

pub(super) struct Writer<'a> {
    root: OwnedFd,
    lower: Lower<'a>,
    /// The last entry's directory: consecutive entries are often in the same directory.
    last_parent: Option<Parent>,
    budget: &'a mut Budget,
    disk: Disk,
    skeleton: Skeleton,
    buffer: Vec<u8>,
    bytes: u64,
    entries: u64,
}

/// The components of a name, without `.` and empty ones, so that one that begins with a slash means
/// what it means without, as with Docker; `None` if one is `..`.
fn parts(path: &[u8]) -> Option<Vec<&[u8]>> {
    let parts: Vec<_> = path
        .split(|&byte| byte == b'/')
        .filter(|part| !matches!(*part, b"" | b"."))
        .collect();
    if parts.contains(&&b".."[..]) {
        None
    } else {
        Some(parts)
    }
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        root: OwnedFd,
        lower: Lower<'a>,
        budget: &'a mut Budget,
        skeleton: Skeleton,
    ) -> Result<Self, LayerError> {
        let disk = rustix::io::fcntl_dupfd_cloexec(&root, 0).map_err(failed("open", b"/"))?;
        let disk = Disk::new(disk, budget.reserve());
        fs::set_dir_time(root.as_fd(), NO_TIME).map_err(failed("set the time of", b"/"))?;
        Ok(Self {
            root,
            lower,
            last_parent: None,
            budget,
            disk,
            skeleton,
            buffer: vec![0; 256 * 1024],
            bytes: 0,
            entries: 0,
        })
    }

    /// Counts bytes of the archive towards the image's limit.
    pub(super) fn count_bytes(&mut self, bytes: u64) -> Result<(), LayerError> {
        self.budget.take_bytes(bytes)
    }

    /// Creates one entry; `data` yields its stored bytes.
    pub(super) fn add(&mut self, entry: &Entry, data: &mut impl Read) -> Result<(), LayerError> {
        self.entries += 1;
        let shown = || show(&entry.path);
        let wrong = |reason: &str| LayerError::Entry {
            entry: shown(),
            reason: reason.to_owned(),
        };
        self.budget.take_inodes(1)?;
        self.disk.entry()?;
        if entry.path.len() > PATH_LENGTH || entry.link.len() > PATH_LENGTH {
            return Err(wrong(&format!("name is longer than {PATH_LENGTH} bytes")));
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(wrong("name contains a zero byte"));
        }
        let parts = parts(&entry.path).ok_or_else(|| LayerError::Escapes { entry: shown() })?;
        if parts.len() > PATH_DEPTH {
            return Err(wrong(&format!("name of more than {PATH_DEPTH} components")));
        }
        let Some((name, parents)) = parts.split_last() else {
            return match entry.kind {
                Kind::Directory => self.add_root(entry),
                _ => Err(wrong("the layer's root must be a directory")),
            };
        };
        let parent_path = parents.join(&b'/');
        let parent = self.parent(&parent_path, &entry.path)?;
        match entry.kind {
            _ if name.starts_with(WHITEOUT) => self.add_whiteout(entry, parent.as_fd(), name),
            Kind::Directory => self.add_dir(entry, parent.as_fd(), name),
            Kind::File => self.add_file(entry, &parent, name, data),
            Kind::HardLink => self.add_hard_link(entry, parent.as_fd(), name),
            Kind::Symlink => self.add_symlink(entry, parent.as_fd(), name),
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.add_special(entry, parent.as_fd(), name)
            }
            Kind::Other(kind) => Err(wrong(&format!(
                "not supported: entry type {:?}",
                char::from(kind)
            ))),
        }?;
        self.last_parent = Some(parent);
        Ok(())
    }

    /// Completes the last directory, and returns the totals.
    pub(super) fn finish(mut self) -> Result<Unpacked, LayerError> {
        self.leave_parent()?;
        Ok(Unpacked {
            bytes: self.bytes,
            entries: self.entries,
            used_lower: self.lower.used(),
        })
    }

    fn add_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        // It may be the root, whose old time must not be set again later.
        self.leave_parent()?;
        let root = fs::open_child_dir(self.root.as_fd(), ".").map_err(failed("open", b"/"))?;
        set_attributes(root.as_fd(), &entry.path, &Attributes::of(entry))?;
        fs::set_dir_time(root.as_fd(), entry.mtime).map_err(failed("set the time of", b"/"))
    }

    fn add_dir(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        match fs::stat(parent, name).map_err(failed("look at", &entry.path))? {
            Some(stat) if fs::file_type(&stat) == FileType::Directory => {}
            existing => {
                let hides = existing.as_ref().is_some_and(fs::is_whiteout);
                if existing.is_some() {
                    self.remove(entry, parent, name)?;
                }
                rustix::fs::mkdirat(parent, name, Mode::RWXU)
                    .map_err(failed("create", &entry.path))?;
                if hides {
                    let dir = fs::open_child_dir(parent, name).map_err(failed("open", name))?;
                    set_opaque(dir.as_fd(), &entry.path)?;
                }
            }
        }
        let dir = fs::open_child_dir(parent, name).map_err(failed("open", &entry.path))?;
        set_attributes(dir.as_fd(), &entry.path, &Attributes::of(entry))?;
        fs::set_dir_time(dir.as_fd(), entry.mtime).map_err(failed("set the time of", &entry.path))
    }

    fn add_file(
        &mut self,
        entry: &Entry,
        parent: &Parent,
        name: &[u8],
        data: &mut impl Read,
    ) -> Result<(), LayerError> {
        let mut file = self.create(entry, parent.as_fd(), name)?;
        let recorded = failed("record", &entry.path);
        if entry.stored > 0 {
            self.skeleton
                .file(&parent.real_path(name), file.as_fd())
                .map_err(&recorded)?;
        }
        match &entry.sparse {
            None if entry.stored == 0 => {}
            None => {
                self.skeleton.content(0, entry.stored).map_err(recorded)?;
                self.copy(entry, data, &mut file, entry.stored)?;
            }
            Some(sparse) => {
                let wrote = |doing| {
                    move |source| LayerError::Write {
                        entry: show(&entry.path),
                        doing,
                        source,
                    }
                };
                file.set_len(sparse.size)
                    .map_err(wrote("set the size of"))?;
                for &(offset, length) in &sparse.segments {
                    file.seek(SeekFrom::Start(offset))
                        .map_err(wrote("seek in"))?;
                    self.skeleton.content(offset, length).map_err(&recorded)?;
                    self.copy(entry, data, &mut file, length)?;
                }
            }
        }
        set_attributes(file.as_fd(), &entry.path, &Attributes::of(entry))?;
        rustix::fs::futimens(&file, &fs::times(entry.mtime))
            .map_err(failed("set the time of", &entry.path))
    }

    /// A new regular file, replacing an existing entry.
    fn create(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<File, LayerError> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR);
        let fd = match open() {
            Err(Errno::EXIST) => {
                self.remove(entry, parent, name)?;
                open()
            }
            result => result,
        };
        fd.map(File::from).map_err(failed("create", &entry.path))
    }

    fn copy(
        &mut self,
        entry: &Entry,
        data: &mut impl Read,
        file: &mut File,
        mut left: u64,
    ) -> Result<(), LayerError> {
        self.bytes += left;
        while left > 0 {
            let want = left.min(self.buffer.len() as u64) as usize;
            let read = match data.read(&mut self.buffer[..want]) {
                Ok(0) => return Err(TarError::Truncated.into()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TarError::from(error).into()),
            };
            self.disk.bytes(read as u64)?;
            file.write_all(&self.buffer[..read])
                .map_err(|source| LayerError::Write {
                    entry: show(&entry.path),
                    doing: "write",
                    source,
                })?;
            left -= read as u64;
        }
        Ok(())
    }

    fn add_symlink(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        if entry.link.is_empty() {
            let reason = "symbolic link without a target".to_owned();
            return Err(LayerError::Entry {
                entry: show(&entry.path),
                reason,
            });
        }
        self.replace(entry, parent, name, || {
            rustix::fs::symlinkat(entry.link.as_slice(), parent, name)
        })?;
        self.own_and_date(entry, parent, name)
    }

    fn add_special(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        let (major, minor) = entry.device;
        let (kind, device) = match entry.kind {
            Kind::Fifo => (FileType::Fifo, 0),
            Kind::CharDevice if (major, minor) == (0, 0) => {
                return self.hide(entry, parent, name);
            }
            Kind::CharDevice if is_harmless(major, minor) => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            // A container's /dev is set up anew, and hides what the image has there.
            _ if parts(&entry.path).is_some_and(|parts| parts.len() > 1 && parts[0] == b"dev") => {
                tracing::debug!(entry = show(&entry.path), "device left out");
                return Ok(());
            }
            _ => {
                let kind = if entry.kind == Kind::BlockDevice {
                    "block"
                } else {
                    "character"
                };
                return Err(LayerError::Device {
                    entry: show(&entry.path),
                    kind,
                    major,
                    minor,
                });
            }
        };
        let made = Cell::new(true);
        self.replace(entry, parent, name, || {
            let node = rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device);
            // Devices cannot be created in a user namespace. Containers do not need them: their
            // /dev is set up anew.
            made.set(!(node == Err(Errno::PERM) && kind == FileType::CharacterDevice));
            if made.get() { node } else { Ok(()) }
        })?;
        if !made.get() {
            tracing::debug!(entry = show(&entry.path), "device left out");
            return Ok(());
        }
        let owner = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(
            parent,
            name,
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed("set the owner of", &entry.path))?;
        // We created the name and nothing else runs here, so it cannot have become a symbolic link.
        rustix::fs::chmodat(parent, name, mode_of(entry.mode), AtFlags::empty())
            .map_err(failed("set the mode of", &entry.path))?;
        rustix::fs::utimensat(
            parent,
            name,
            &fs::times(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(failed("set the time of", &entry.path))
    }

    fn add_hard_link(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        let target = || show(&entry.link);
        let target_parts = parts(&entry.link).ok_or_else(|| LayerError::LinkEscapes {
            entry: show(&entry.path),
            target: target(),
        })?;
        let missing = || LayerError::LinkTarget {
            entry: show(&entry.path),
            target: target(),
        };
        let Some((target_name, target_parents)) = target_parts.split_last() else {
            return Err(missing());
        };
        let target_path = target_parents.join(&b'/');
        let mut target_dir = match fs::open_in_root(self.root.as_fd(), &target_path) {
            Ok(dir) => Some(dir),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
            Err(error) => return Err(failed("open the parent of", &entry.link)(error)),
        };
        let mut found = match &target_dir {
            Some(dir) => {
                fs::stat(dir.as_fd(), target_name).map_err(failed("look at", &entry.link))?
            }
            None => None,
        };
        if found.is_none() && self.copy_up(entry, &target_parts)? {
            let dir = fs::open_in_root(self.root.as_fd(), &target_path)
                .map_err(failed("open the parent of", &entry.link))?;
            found = fs::stat(dir.as_fd(), target_name).map_err(failed("look at", &entry.link))?;
            target_dir = Some(dir);
        }
        let (Some(target_dir), Some(found)) = (target_dir, found) else {
            return Err(missing());
        };
        if fs::is_whiteout(&found) || fs::file_type(&found) == FileType::Directory {
            return Err(missing());
        }
        let existing = fs::stat(parent, name).map_err(failed("look at", &entry.path))?;
        if let Some(existing) = existing {
            if (existing.st_dev, existing.st_ino) == (found.st_dev, found.st_ino) {
                return Ok(());
            }
            self.remove(entry, parent, name)?;
        }
        rustix::fs::linkat(&target_dir, *target_name, parent, name, AtFlags::empty())
            .map_err(failed("link", &entry.path))
    }

    /// Copies a regular file of a lower layer into this one, as overlayfs would before linking it.
    fn copy_up(&mut self, entry: &Entry, target: &[&[u8]]) -> Result<bool, LayerError> {
        let path: Vec<Vec<u8>> = target.iter().map(|part| part.to_vec()).collect();
        let shown = &entry.link;
        let Some(found) = self.lower.lookup(&path).map_err(failed("look up", shown))? else {
            return Ok(false);
        };
        if fs::file_type(&found.stat) != FileType::RegularFile {
            return Ok(false);
        }
        let Some((name, parents)) = target.split_last() else {
            return Ok(false);
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let source = rustix::fs::openat(&found.parent, *name, flags, Mode::empty())
            .map_err(failed("open", shown))?;
        let xattrs =
            read_xattrs(source.as_fd()).map_err(failed("read the attributes of", shown))?;
        let size = u64::try_from(found.stat.st_size).unwrap_or(0);
        self.budget.take_inodes(1)?;
        self.budget.take_bytes(size)?;
        // May be the directory of the link, too: this one is left first, that one last, with the
        // time that was read before anything was created in it.
        let parent = self.parent(&parents.join(&b'/'), shown)?;
        let mut file = self.create(entry, parent.as_fd(), name)?;
        let mut source = File::from(source);
        self.copy(entry, &mut source, &mut file, size)?;
        let attributes = Attributes {
            uid: found.stat.st_uid,
            gid: found.stat.st_gid,
            mode: found.stat.st_mode,
            mtime: (found.stat.st_mtime, found.stat.st_mtime_nsec as u32),
            xattrs: &xattrs,
        };
        set_attributes(file.as_fd(), shown, &attributes)?;
        rustix::fs::futimens(&file, &fs::times(attributes.mtime))
            .map_err(failed("set the time of", shown))?;
        parent.leave().map_err(failed("set the time of", shown))?;
        Ok(true)
    }

    fn add_whiteout(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        if name == WHITEOUT_OPAQUE {
            let dir = fs::open_child_dir(parent, ".")
                .map_err(failed("open the parent of", &entry.path))?;
            return set_opaque(dir.as_fd(), &entry.path);
        }
        if name.starts_with(WHITEOUT_META) {
            // Metadata of aufs, where this notation comes from.
            return Ok(());
        }
        match &name[WHITEOUT.len()..] {
            b"" | b"." | b".." => Err(LayerError::Whiteout {
                entry: show(&entry.path),
            }),
            hidden => self.hide(entry, parent, hidden),
        }
    }

    /// Hides `name` of the lower layers. Entries of this layer stay.
    fn hide(&self, entry: &Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), LayerError> {
        let existing = fs::stat(parent, name).map_err(failed("look at", &entry.path))?;
        match existing {
            None => {
                let device = FileType::CharacterDevice;
                rustix::fs::mknodat(parent, name, device, Mode::empty(), 0)
                    .map_err(failed("create", &entry.path))?;
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(parent, name, &fs::times(NO_TIME), flags)
                    .map_err(failed("set the time of", &entry.path))
            }
            Some(stat) if fs::file_type(&stat) == FileType::Directory => {
                let dir = fs::open_child_dir(parent, name).map_err(failed("open", name))?;
                set_opaque(dir.as_fd(), &entry.path)
            }
            Some(_) => Ok(()),
        }
    }

    fn own_and_date(
        &self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(), LayerError> {
        let owner = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(parent, name, Some(owner.0), Some(owner.1), flags)
            .map_err(failed("set the owner of", &entry.path))?;
        rustix::fs::utimensat(parent, name, &fs::times(entry.mtime), flags)
            .map_err(failed("set the time of", &entry.path))
    }

    /// Creates an entry at `name`, removing an existing one.
    fn replace(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
        make: impl Fn() -> rustix::io::Result<()>,
    ) -> Result<(), LayerError> {
        let result = match make() {
            Err(Errno::EXIST) => {
                self.remove(entry, parent, name)?;
                make()
            }
            result => result,
        };
        result.map_err(failed("create", &entry.path))
    }

    fn remove(&self, entry: &Entry, parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), LayerError> {
        fs::remove_all_after(parent, name, &mut |dir, name| self.skeleton.gone(dir, name))
            .map_err(failed("replace", &entry.path))
    }
}
