//! Creates a layer's entries below one directory. The rules are described in the parent module.

mod parents;

use std::cell::Cell;
use std::collections::BTreeMap;
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
use super::tar_reader::{Entry, Kind, TarError};
use super::{LayerError, Unpacked, fs};

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_META: &[u8] = b".wh..wh.";
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// The kernel's limit.
const MAX_LINKS: usize = 40;
/// PATH_MAX of Linux, with the final NUL.
const MAX_PATH: usize = 4096;
/// Time of directories and whiteouts without an entry in the archive, to be deterministic.
const NO_TIME: (i64, u32) = (0, 0);

pub(super) struct Writer<'a> {
    root: OwnedFd,
    lower: Lower<'a>,
    /// Cache of the last file's directory: consecutive entries are often in the same directory.
    last_parent: Option<Parent>,
    /// Times of directories by their paths without symbolic links; set at the end because creating
    /// entries changes them.
    dir_times: BTreeMap<Vec<u8>, (i64, u32)>,
    buffer: Vec<u8>,
    bytes: u64,
    entries: u64,
}

/// The components of a name, without `.` and empty ones; `None` if one is `..`.
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
    pub(super) fn new(root: OwnedFd, lower: Lower<'a>) -> Self {
        Self {
            root,
            lower,
            last_parent: None,
            dir_times: BTreeMap::from([(Vec::new(), NO_TIME)]),
            buffer: vec![0; 256 * 1024],
            bytes: 0,
            entries: 0,
        }
    }

    /// Creates one entry; `data` yields its stored bytes.
    pub(super) fn add(&mut self, entry: &Entry, data: &mut impl Read) -> Result<(), LayerError> {
        self.entries += 1;
        let shown = || show(&entry.path);
        let wrong = |reason: &str| LayerError::Entry {
            entry: shown(),
            reason: reason.to_owned(),
        };
        if entry.path.len() >= MAX_PATH || entry.link.len() >= MAX_PATH {
            return Err(wrong("name is longer than 4095 bytes"));
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(wrong("name contains a zero byte"));
        }
        let parts = parts(&entry.path).ok_or_else(|| LayerError::Escapes { entry: shown() })?;
        if entry.path.starts_with(b"/") && !parts.is_empty() {
            return Err(LayerError::Absolute { entry: shown() });
        }
        let Some((name, parents)) = parts.split_last() else {
            return match entry.kind {
                Kind::Directory => self.add_root(entry),
                _ => Err(wrong("the layer's root must be a directory")),
            };
        };
        let parent_path = parents.join(&b'/');
        if name.starts_with(WHITEOUT) {
            return self.add_whiteout(entry, &parent_path, name);
        }
        let parent = self.parent(&parent_path, &entry.path)?;
        let result = match entry.kind {
            Kind::Directory => self.add_dir(entry, &parent, name),
            Kind::File => self.add_file(entry, parent.as_fd(), name, data),
            Kind::HardLink => self.add_hard_link(entry, parent.as_fd(), name),
            Kind::Symlink => self.add_symlink(entry, parent.as_fd(), name),
            Kind::CharDevice | Kind::BlockDevice | Kind::Fifo => {
                self.add_special(entry, parent.as_fd(), &parent_path, name)
            }
            Kind::Other(kind) => Err(wrong(&format!(
                "not supported: entry type {:?}",
                char::from(kind)
            ))),
        };
        if entry.kind == Kind::File {
            self.last_parent = Some(parent);
        }
        result
    }

    /// Sets the directories' times, and returns the totals.
    pub(super) fn finish(self) -> Result<Unpacked, LayerError> {
        for (path, time) in self.dir_times {
            let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
                Some(slash) => (&path[..slash], &path[slash + 1..]),
                None if path.is_empty() => (&b""[..], &b"."[..]),
                None => (&b""[..], path.as_slice()),
            };
            let dir = fs::open_real(self.root.as_fd(), parent)
                .and_then(|parent| fs::open_child_dir(parent.as_fd(), name));
            match dir {
                Ok(dir) => rustix::fs::futimens(&dir, &fs::times(time))
                    .map_err(failed("set the time of", &path))?,
                // It was replaced later in the archive.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(failed("open", &path)(error)),
            }
        }
        Ok(Unpacked {
            bytes: self.bytes,
            entries: self.entries,
            used_lower: self.lower.used(),
        })
    }

    fn add_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        let root = fs::open_child_dir(self.root.as_fd(), ".").map_err(failed("open", b"/"))?;
        set_attributes(root.as_fd(), &entry.path, &Attributes::of(entry))?;
        self.dir_times.insert(Vec::new(), entry.mtime);
        Ok(())
    }

    fn add_dir(&mut self, entry: &Entry, parent: &Parent, name: &[u8]) -> Result<(), LayerError> {
        let (parent, parent_path) = (parent.as_fd(), &parent.real);
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
        self.dir_times.insert(join(parent_path, name), entry.mtime);
        Ok(())
    }

    fn add_file(
        &mut self,
        entry: &Entry,
        parent: BorrowedFd<'_>,
        name: &[u8],
        data: &mut impl Read,
    ) -> Result<(), LayerError> {
        let mut file = self.create(entry, parent, name)?;
        match &entry.sparse {
            None => self.copy(entry, data, &mut file, entry.stored)?,
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
        parent_path: &[u8],
        name: &[u8],
    ) -> Result<(), LayerError> {
        let (major, minor) = entry.device;
        let (kind, device) = match entry.kind {
            Kind::Fifo => (FileType::Fifo, 0),
            Kind::CharDevice if (major, minor) == (0, 0) => {
                return self.hide(entry, parent_path, name);
            }
            Kind::CharDevice if is_harmless(major, minor) => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
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
        let parent = self.parent(&parents.join(&b'/'), shown)?;
        let mut file = self.create(entry, parent.as_fd(), name)?;
        let mut source = File::from(source);
        self.copy(
            entry,
            &mut source,
            &mut file,
            u64::try_from(found.stat.st_size).unwrap_or(0),
        )?;
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
        Ok(true)
    }

    fn add_whiteout(
        &mut self,
        entry: &Entry,
        parent_path: &[u8],
        name: &[u8],
    ) -> Result<(), LayerError> {
        if name == WHITEOUT_OPAQUE {
            let parent = self.parent(parent_path, &entry.path)?;
            let dir =
                fs::open_child_dir(parent.as_fd(), ".").map_err(failed("open", parent_path))?;
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
            hidden => self.hide(entry, parent_path, hidden),
        }
    }

    /// Hides `name` of the lower layers. Entries of this layer stay.
    fn hide(&mut self, entry: &Entry, parent_path: &[u8], name: &[u8]) -> Result<(), LayerError> {
        let parent = self.parent(parent_path, &entry.path)?;
        let existing = fs::stat(parent.as_fd(), name).map_err(failed("look at", &entry.path))?;
        match existing {
            None => {
                let device = FileType::CharacterDevice;
                rustix::fs::mknodat(&parent, name, device, Mode::empty(), 0)
                    .map_err(failed("create", &entry.path))?;
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(&parent, name, &fs::times(NO_TIME), flags)
                    .map_err(failed("set the time of", &entry.path))
            }
            Some(stat) if fs::file_type(&stat) == FileType::Directory => {
                let dir = fs::open_child_dir(parent.as_fd(), name).map_err(failed("open", name))?;
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
        fs::remove_all(parent, name).map_err(failed("replace", &entry.path))
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        name.to_vec()
    } else {
        [parent, b"/", name].concat()
    }
}
