//! An archive of a container on the host. A guest made it: where it goes is decided by what was
//! asked for, not by its names; every name is looked up part by part below that place, no symbolic
//! link is followed, no set-user-id bit and no device is made, and a directory that was there
//! before keeps its mode, owner and times.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use hull_image::unpack::tar_reader::{Entry, TarReader};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::{ArchiveReader, EntryKind};
use crate::error::{Context, Error, Result};

/// Names of left out entries that are kept: a guest may send any number.
const MAX_LEFT_OUT: usize = 20;

/// Decides where the first entry goes, from its kind; the others go below it.
pub type Place<'a> = dyn Fn(EntryKind) -> std::result::Result<PathBuf, String> + 'a;

/// Unpacks the archive of one file or directory on the host; the names of what was left out,
/// because it is a device or of an unknown type.
///
/// # Errors
/// The guest's error, an entry that is not below the first one, or the host's file system refuses.
pub fn unpack(archive: ArchiveReader, place: &Place<'_>, keep_owners: bool) -> Result<Vec<String>> {
    let mut archive = TarReader::new(archive);
    let mut target: Option<Target> = None;
    loop {
        let entry = match archive.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(archive.get_mut().explain(&error)),
        };
        let (target, rest) = match &mut target {
            Some(target) => {
                let rest = target.label.below(&entry.path)?;
                (target, rest)
            }
            None => {
                let path = place(entry.kind).map_err(Error::new)?;
                let new = Target::new(&path, &entry, keep_owners)?;
                (target.insert(new), Vec::new())
            }
        };
        if let Err(error) = target.add(&entry, &rest, &mut archive) {
            // An archive that ended early: the guest knows why.
            return Err(match archive.get_mut().ended {
                true => archive.get_mut().explain(&error),
                false => error,
            });
        }
    }
    archive.get_mut().finish()?;
    match target {
        Some(target) => target.finish(),
        None => Err(Error::new("the archive is empty")),
    }
}

/// The name of the first entry, which all others begin with. It means nothing on the host.
struct Label {
    /// None for the root directory of a container, which has no name of its own.
    name: Option<OsString>,
    /// Nothing is below an entry that is not a directory.
    is_directory: bool,
}

impl Label {
    fn of(entry: &Entry) -> Result<Self> {
        match &parts(&entry.path)?[..] {
            [] => Ok(None),
            [name] => Ok(Some((*name).to_owned())),
            _ => Err(outside(&entry.path)),
        }
        .map(|name| Self {
            name,
            is_directory: entry.kind == EntryKind::Directory,
        })
    }

    /// The parts of a name below the first entry's.
    fn below<'a>(&self, path: &'a [u8]) -> Result<Vec<&'a OsStr>> {
        let mut rest = parts(path)?;
        if let Some(name) = &self.name {
            match rest.first() {
                Some(first) if first == name => drop(rest.remove(0)),
                _ => return Err(outside(path)),
            }
        }
        match rest.is_empty() || !self.is_directory {
            true => Err(outside(path)),
            false => Ok(rest),
        }
    }
}

/// The parts of an entry's name.
fn parts(path: &[u8]) -> Result<Vec<&OsStr>> {
    let parts: Vec<&OsStr> = path
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(OsStr::from_bytes)
        .collect();
    match parts.iter().any(|part| *part == "..") {
        true => Err(outside(path)),
        false => Ok(parts),
    }
}

fn outside(path: &[u8]) -> Error {
    let shown = String::from_utf8_lossy(path);
    Error::new(format!(
        "the guest sent an entry that leads outside: {shown:?}"
    ))
}

/// Where an archive is unpacked.
struct Target {
    root: OwnedFd,
    label: Label,
    /// Name of the first entry below the root; none when the root itself stands for it.
    name: Option<OsString>,
    /// For messages.
    shown: PathBuf,
    keep_owners: bool,
    /// Directories get their times last: what is made in them changes them.
    directories: Vec<(OwnedFd, Timestamps)>,
    /// Names of what was left out, the first [`MAX_LEFT_OUT`].
    left_out: Vec<String>,
}

impl Target {
    fn new(path: &Path, first: &Entry, keep_owners: bool) -> Result<Target> {
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .context(|| format!("open {}", path.display()))
        };
        let existing = std::fs::symlink_metadata(path)
            .is_ok_and(|there| !there.is_symlink() && there.is_dir())
            || path.file_name().is_none();
        if existing && first.kind != EntryKind::Directory {
            return Err(Error::new(format!("{} is a directory", path.display())));
        }
        let (root, name) = match (existing, path.file_name()) {
            (false, Some(name)) => {
                let parent = path
                    .parent()
                    .filter(|parent| !parent.as_os_str().is_empty());
                (
                    open(parent.unwrap_or(Path::new(".")))?,
                    Some(name.to_owned()),
                )
            }
            _ => (open(path)?, None),
        };
        Ok(Target {
            root,
            label: Label::of(first)?,
            name,
            shown: path.to_owned(),
            keep_owners,
            directories: Vec::new(),
            left_out: Vec::new(),
        })
    }

    fn failed(
        &self,
        rest: &[&OsStr],
    ) -> impl Fn(&(dyn std::error::Error + 'static)) -> Error + use<> {
        let mut path = self.shown.clone();
        path.extend(rest);
        move |error| {
            let cause = Error::from_chain(error);
            Error::new(format!(
                "cannot write {}: {}",
                path.display(),
                cause.message
            ))
        }
    }

    /// The directory that holds an entry, which is made when it is missing, and the entry's name in
    /// it.
    fn parent(&self, rest: &[&OsStr]) -> std::result::Result<(OwnedFd, OsString), Errno> {
        let mut names: Vec<&OsStr> = self.name.iter().map(OsString::as_os_str).collect();
        names.extend(rest);
        let name = names.pop().unwrap_or(OsStr::new("."));
        let mut directory = self.root.try_clone().map_err(|_| Errno::MFILE)?;
        for part in names {
            directory = open_directory(directory.as_fd(), part).or_else(|error| match error {
                Errno::NOENT => {
                    rustix::fs::mkdirat(&directory, part, Mode::from_raw_mode(0o755))?;
                    open_directory(directory.as_fd(), part)
                }
                error => Err(error),
            })?;
        }
        Ok((directory, name.to_owned()))
    }

    fn add(
        &mut self,
        entry: &Entry,
        rest: &[&OsStr],
        data: &mut TarReader<ArchiveReader>,
    ) -> Result<()> {
        let failed = self.failed(rest);
        let (parent, name) = self.parent(rest).map_err(|error| failed(&error))?;
        // A set-user-id program of a guest must not become one of the host.
        let mode = Mode::from_raw_mode(entry.mode & 0o1777);
        let times = times(entry.mtime);
        if entry.kind != EntryKind::Directory {
            match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        match entry.kind {
            EntryKind::Directory => {
                match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => {}
                    // Its owner on the host decides about it.
                    Err(Errno::EXIST) => {
                        return open_directory(parent.as_fd(), &name)
                            .map(drop)
                            .map_err(|error| failed(&error));
                    }
                    Err(error) => return Err(failed(&error)),
                }
                let directory =
                    open_directory(parent.as_fd(), &name).map_err(|error| failed(&error))?;
                rustix::fs::fchmod(&directory, mode).map_err(|error| failed(&error))?;
                if self.keep_owners {
                    self.own(&parent, &name, entry)
                        .map_err(|error| failed(&error))?;
                }
                // A bounded number of descriptors: deep trees give up the times of some
                // directories.
                if self.directories.len() < 512 {
                    self.directories.push((directory, times));
                }
                return Ok(());
            }
            EntryKind::File => {
                let flags = OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::WRONLY
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o600))
                    .map_err(|error| failed(&error))?;
                let mut file = File::from(file);
                write_data(&mut file, entry, data).map_err(|error| failed(&error))?;
                rustix::fs::fchmod(&file, mode).map_err(|error| failed(&error))?;
            }
            EntryKind::Symlink => {
                let link = OsStr::from_bytes(&entry.link);
                rustix::fs::symlinkat(link, &parent, &name).map_err(|error| failed(&error))?;
            }
            EntryKind::HardLink => {
                let link = self.label.below(&entry.link)?;
                let (from, of) = self.parent(&link).map_err(|error| failed(&error))?;
                rustix::fs::linkat(&from, &of, &parent, &name, AtFlags::empty())
                    .map_err(|error| failed(&error))?;
                return Ok(());
            }
            EntryKind::Fifo => {
                rustix::fs::mknodat(&parent, &name, FileType::Fifo, mode, 0)
                    .map_err(|error| failed(&error))?;
            }
            EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Other(_) => {
                let shown = String::from_utf8_lossy(&entry.path).into_owned();
                if self.left_out.len() < MAX_LEFT_OUT {
                    self.left_out.push(shown);
                }
                return Ok(());
            }
        }
        if self.keep_owners {
            self.own(&parent, &name, entry)
                .map_err(|error| failed(&error))?;
        }
        rustix::fs::utimensat(&parent, &name, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed(&error))
    }

    fn own(&self, parent: &OwnedFd, name: &OsStr, entry: &Entry) -> std::result::Result<(), Errno> {
        let (user, group) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(
            parent,
            name,
            Some(user),
            Some(group),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    }

    fn finish(self) -> Result<Vec<String>> {
        for (directory, times) in self.directories.iter().rev() {
            rustix::fs::futimens(directory, times)
                .context(|| format!("set times below {}", self.shown.display()))?;
        }
        Ok(self.left_out)
    }
}

fn open_directory(parent: BorrowedFd<'_>, name: &OsStr) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanoseconds),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Writes a file in which blocks of zeros take no place, as `cp` does.
fn write_sparse(file: &mut File, data: &mut impl Read) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut buffer = vec![0; 16 * BLOCK];
    let mut size = 0u64;
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match data.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if filled == 0 {
            break;
        }
        let is_empty = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        for run in buffer[..filled]
            .chunks(BLOCK)
            .collect::<Vec<_>>()
            .chunk_by(|one, other| is_empty(one) == is_empty(other))
        {
            let length: usize = run.iter().map(|block| block.len()).sum();
            if !run.first().is_some_and(|block| is_empty(block)) {
                file.seek(SeekFrom::Start(size))?;
                for block in run {
                    file.write_all(block)?;
                }
            }
            size = size.saturating_add(length as u64);
        }
    }
    file.set_len(size)
}

fn write_data(
    file: &mut File,
    entry: &Entry,
    data: &mut TarReader<ArchiveReader>,
) -> io::Result<()> {
    let Some(sparse) = &entry.sparse else {
        return write_sparse(file, data);
    };
    for (offset, length) in &sparse.segments {
        file.seek(SeekFrom::Start(*offset))?;
        io::copy(&mut data.by_ref().take(*length), file)?;
    }
    file.set_len(sparse.size)
}
