//! Archives on their way into and out of containers, for `cp`. What comes out was made by a guest: it is unpacked
//! one name at a time below one directory, no symbolic link is followed, no set-user-id bit and no device is made.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use hull_image::unpack::tar_reader::{Entry, TarReader};
use hull_sandbox::Failure;
use hull_sandbox::wire::{self, Kind};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

pub use hull_image::unpack::tar_reader::Kind as EntryKind;

use crate::error::{Context, Error, Result};

/// Most bytes of an archive in one frame.
const CHUNK: usize = 64 * 1024;

/// An archive that a sandbox process sends.
pub struct ArchiveReader {
    stream: UnixStream,
    payload: Vec<u8>,
    used: usize,
    ended: bool,
    failure: Option<Failure>,
}

impl ArchiveReader {
    /// The archive that follows on this connection.
    pub fn new(stream: UnixStream) -> ArchiveReader {
        ArchiveReader {
            stream,
            payload: Vec::new(),
            used: 0,
            ended: false,
            failure: None,
        }
    }

    /// The kind of the first entry, which is what the path named that was asked for.
    pub fn first_kind(self) -> Result<EntryKind> {
        let mut archive = TarReader::new(self);
        let entry = archive.next();
        match entry {
            Ok(Some(entry)) => Ok(entry.kind),
            Ok(None) => Err(Error::new("the archive is empty")),
            Err(error) => Err(archive.get_mut().explain(&error)),
        }
    }

    /// Writes the archive as it is.
    pub fn copy_to(&mut self, to: &mut impl Write) -> Result<()> {
        let copied = io::copy(self, to).and_then(|_| to.flush());
        copied.map_err(|error| self.explain(&error))
    }

    /// The error that the guest sent says more than that the archive ended early.
    fn explain(&mut self, error: &dyn std::error::Error) -> Error {
        match self.failure.take() {
            Some(failure) => failure.into(),
            None => Error::from_chain(error),
        }
    }
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.payload.len() {
            if self.ended {
                return Ok(0);
            }
            self.used = 0;
            match wire::read_frame(&self.stream, &mut self.payload)? {
                Some(Kind::Output) => {}
                Some(Kind::Exit) => {
                    self.payload.clear();
                    self.ended = true;
                }
                Some(Kind::Failure) => {
                    let failure: Failure = wire::from_json(&self.payload)?;
                    let error = io::Error::other(failure.message.clone());
                    self.payload.clear();
                    self.failure = Some(failure);
                    return Err(error);
                }
                Some(other) => {
                    return Err(io::Error::other(format!(
                        "the sandbox process sent {other:?}"
                    )));
                }
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let length = buffer.len().min(self.payload.len() - self.used);
        buffer[..length].copy_from_slice(&self.payload[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}

/// An archive that a sandbox process takes.
pub struct ArchiveWriter {
    stream: UnixStream,
}

impl ArchiveWriter {
    /// Writes to a connection on which an archive is expected.
    pub fn new(stream: UnixStream) -> ArchiveWriter {
        ArchiveWriter { stream }
    }

    /// Passes on an archive as it is.
    pub fn copy_from(&mut self, from: &mut impl Read) -> Result<()> {
        match io::copy(from, self) {
            // The guest takes no more: why is read by `finish`.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            copied => copied.map(|_| ()).context(|| "cannot pass on the archive"),
        }
    }

    /// Says that the archive is complete, and waits for what the guest says.
    pub fn finish(self) -> Result<()> {
        // A guest that has failed meanwhile reads no more, and has said why.
        let _ = wire::write_frame(&self.stream, Kind::InputEnd, &[]);
        let mut payload = Vec::new();
        loop {
            match wire::read_frame(&self.stream, &mut payload)
                .context(|| "cannot read the answer")?
            {
                Some(Kind::Exit) => return Ok(()),
                Some(Kind::Failure) => {
                    let failure: Failure =
                        wire::from_json(&payload).context(|| "cannot read the answer")?;
                    return Err(failure.into());
                }
                Some(_) => {}
                None => return Err(hull_sandbox::client::gone().into()),
            }
        }
    }
}

impl Write for ArchiveWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(CHUNK);
        wire::write_frame(&self.stream, Kind::Input, &bytes[..length])?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a host file or directory, with all that is in it, under `name`; `.` stands for the contents alone.
/// With `keep_owners` not set, everything belongs to root in the container, as with Docker.
pub fn pack(
    to: &mut ArchiveWriter,
    source: &Path,
    name: &OsStr,
    follow: bool,
    keep_owners: bool,
) -> Result<()> {
    let mut packer = Packer {
        archive: tar::Builder::new(io::BufWriter::with_capacity(CHUNK, to)),
        keep_owners,
    };
    let packed = if name == "." {
        packer.contents(source, Path::new(""))
    } else {
        packer.add(source, Path::new(name), follow)
    };
    let packed = packed.and_then(|()| {
        let archive = packer.archive.into_inner()?;
        archive.into_inner().map_err(|error| error.into_error())?;
        Ok(())
    });
    match packed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        packed => packed.context(|| format!("cannot read {}", source.display())),
    }
}

struct Packer<W: Write> {
    archive: tar::Builder<W>,
    keep_owners: bool,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, source: &Path, name: &Path, follow: bool) -> io::Result<()> {
        let metadata = match follow {
            true => source.metadata()?,
            false => source.symlink_metadata()?,
        };
        let mut header = self.header(&metadata);
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.archive.append_data(&mut header, name, io::empty())?;
            self.contents(source, name)
        } else if kind.is_symlink() {
            self.archive
                .append_link(&mut header, name, source.read_link()?)
        } else if kind.is_file() {
            let file = File::open(source)?;
            // A file that grows or shrinks meanwhile must not upset the archive.
            let data = file.chain(io::repeat(0)).take(metadata.len());
            self.archive.append_data(&mut header, name, data)
        } else if kind.is_socket() {
            Ok(())
        } else {
            let device = metadata.rdev();
            header.set_device_major(rustix::fs::major(device))?;
            header.set_device_minor(rustix::fs::minor(device))?;
            self.archive.append_data(&mut header, name, io::empty())
        }
    }

    fn contents(&mut self, directory: &Path, name: &Path) -> io::Result<()> {
        let mut entries = std::fs::read_dir(directory)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            self.add(&directory.join(&entry), &name.join(&entry), false)?;
        }
        Ok(())
    }

    fn header(&self, metadata: &Metadata) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_metadata(metadata);
        if metadata.is_dir() || !metadata.is_file() {
            header.set_size(0);
        }
        if !self.keep_owners {
            header.set_uid(0);
            header.set_gid(0);
        }
        header
    }
}

/// Decides where the first entry goes, from its kind and name; the others go below it.
pub type Place<'a> = dyn Fn(EntryKind, &OsStr) -> std::result::Result<PathBuf, String> + 'a;

/// Unpacks the archive of one file or directory on the host.
pub fn unpack(archive: ArchiveReader, place: &Place<'_>, keep_owners: bool) -> Result<()> {
    let mut archive = TarReader::new(archive);
    let mut target: Option<Target> = None;
    loop {
        let entry = match archive.next() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(archive.get_mut().explain(&error)),
        };
        let (first, rest) = split_name(&entry.path)?;
        let target = match &mut target {
            Some(target) => target,
            None => target.insert(Target::new(
                &place(entry.kind, first).map_err(Error::new)?,
                keep_owners,
            )?),
        };
        if let Err(error) = target.add(&entry, &rest, &mut archive) {
            let failure = archive.get_mut().failure.take();
            return Err(failure.map_or(error, Error::from));
        }
    }
    match target {
        Some(target) => target.finish(),
        None => Err(Error::new("the archive is empty")),
    }
}

/// The first part of an entry's name, and the others.
fn split_name(path: &[u8]) -> Result<(&OsStr, Vec<&OsStr>)> {
    let mut parts = path
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(OsStr::from_bytes);
    // The root directory of a container has no name of its own.
    let first = parts.next().unwrap_or(OsStr::new("."));
    let rest: Vec<&OsStr> = parts.collect();
    if first == ".." || rest.iter().any(|part| *part == "..") {
        let shown = String::from_utf8_lossy(path);
        return Err(Error::new(format!(
            "the guest sent an entry that leads outside: {shown:?}"
        )));
    }
    Ok((first, rest))
}

/// Where an archive is unpacked.
struct Target {
    root: OwnedFd,
    /// Name of the first entry below the root; none when the root itself stands for it.
    name: Option<OsString>,
    /// For messages.
    shown: PathBuf,
    keep_owners: bool,
    /// Directories get their times last: what is made in them changes them.
    directories: Vec<(OwnedFd, Timestamps)>,
}

impl Target {
    fn new(path: &Path, keep_owners: bool) -> Result<Target> {
        let open = |path: &Path| {
            rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .context(|| format!("cannot open {}", path.display()))
        };
        let existing = std::fs::symlink_metadata(path)
            .is_ok_and(|there| !there.is_symlink() && there.is_dir())
            || path.file_name().is_none();
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
            name,
            shown: path.to_owned(),
            keep_owners,
            directories: Vec::new(),
        })
    }

    fn failed(&self, rest: &[&OsStr]) -> impl Fn(&dyn std::error::Error) -> Error + use<> {
        let mut path = self.shown.clone();
        path.extend(rest);
        move |error| {
            let cause = Error::from_chain(error);
            Error::new(format!(
                "cannot write {}: {}",
                path.display(),
                cause.message()
            ))
        }
    }

    /// The directory that holds an entry, which is made when it is missing, and the entry's name in it.
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
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(failed(&error)),
                }
                let directory =
                    open_directory(parent.as_fd(), &name).map_err(|error| failed(&error))?;
                rustix::fs::fchmod(&directory, mode).map_err(|error| failed(&error))?;
                if self.keep_owners {
                    self.own(&parent, &name, entry)
                        .map_err(|error| failed(&error))?;
                }
                // A bounded number of descriptors: deep trees give up the times of some directories.
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
                let (_, link) = split_name(&entry.link)?;
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
                let shown = crate::output::printable(&String::from_utf8_lossy(&entry.path));
                crate::output::note(format!(
                    "note: {shown} is left out: it is a device or of an unknown type"
                ));
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

    fn finish(self) -> Result<()> {
        for (directory, times) in self.directories.iter().rev() {
            rustix::fs::futimens(directory, times)
                .context(|| format!("cannot set times below {}", self.shown.display()))?;
        }
        Ok(())
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

fn write_data(
    file: &mut File,
    entry: &Entry,
    data: &mut TarReader<ArchiveReader>,
) -> io::Result<()> {
    let Some(sparse) = &entry.sparse else {
        return io::copy(data, file).map(|_| ());
    };
    for (offset, length) in &sparse.segments {
        file.seek(SeekFrom::Start(*offset))?;
        io::copy(&mut data.by_ref().take(*length), file)?;
    }
    file.set_len(sparse.size)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// What a sandbox process would send.
    fn sent(archive: Vec<u8>) -> ArchiveReader {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            for chunk in archive.chunks(1000) {
                wire::write_frame(&theirs, Kind::Output, chunk).unwrap();
            }
            wire::write_frame(&theirs, Kind::Exit, b"{}").unwrap();
        });
        ArchiveReader::new(ours)
    }

    fn entry(
        archive: &mut tar::Builder<Vec<u8>>,
        kind: tar::EntryType,
        name: &str,
        link: &str,
        data: &[u8],
    ) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o4755);
        header.set_size(data.len() as u64);
        if link.is_empty() {
            // Written raw: the names are what an honest archiver would refuse.
            let bytes = header.as_gnu_mut().unwrap();
            bytes.name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            archive.append(&header, data).unwrap();
        } else {
            archive.append_link(&mut header, name, link).unwrap();
        }
    }

    #[test]
    fn a_tree_goes_out_and_in_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("source");
        std::fs::create_dir_all(source.join("sub")).unwrap();
        std::fs::write(source.join("sub/file"), vec![7; 100_000]).unwrap();
        std::os::unix::fs::symlink("sub/file", source.join("link")).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let (mut archive, mut payload) = (Vec::new(), Vec::new());
            while let Some(Kind::Input) = wire::read_frame(&theirs, &mut payload).unwrap() {
                archive.extend_from_slice(&payload);
            }
            wire::write_frame(&theirs, Kind::Exit, b"{}").unwrap();
            archive
        });
        let mut writer = ArchiveWriter::new(ours);
        pack(&mut writer, &source, OsStr::new("name"), false, false).unwrap();
        writer.finish().unwrap();
        let archive = reader.join().unwrap();

        assert_eq!(
            sent(archive.clone()).first_kind().unwrap(),
            EntryKind::Directory
        );
        let copy = directory.path().join("copy");
        let place = |kind, name: &OsStr| {
            assert_eq!((kind, name), (EntryKind::Directory, OsStr::new("name")));
            Ok(copy.clone())
        };
        unpack(sent(archive), &place, false).unwrap();
        assert_eq!(
            std::fs::read(copy.join("sub/file")).unwrap(),
            vec![7; 100_000]
        );
        assert_eq!(
            copy.join("link").read_link().unwrap(),
            Path::new("sub/file")
        );
        assert_eq!(
            copy.join("sub").metadata().unwrap().mtime(),
            source.join("sub").metadata().unwrap().mtime()
        );
    }

    #[test]
    fn a_guest_cannot_write_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let copy = directory.path().join("copy");
        let place = |_, _: &OsStr| Ok(copy.clone());

        let mut archive = tar::Builder::new(Vec::new());
        entry(&mut archive, tar::EntryType::Directory, "d/", "", b"");
        entry(
            &mut archive,
            tar::EntryType::Symlink,
            "d/link",
            outside.to_str().unwrap(),
            b"",
        );
        entry(
            &mut archive,
            tar::EntryType::Regular,
            "d/link/file",
            "",
            b"x",
        );
        assert!(unpack(sent(archive.into_inner().unwrap()), &place, false).is_err());

        let mut archive = tar::Builder::new(Vec::new());
        entry(&mut archive, tar::EntryType::Directory, "d/", "", b"");
        entry(
            &mut archive,
            tar::EntryType::Regular,
            "d/../../outside/file",
            "",
            b"x",
        );
        let error = unpack(sent(archive.into_inner().unwrap()), &place, false).unwrap_err();
        assert!(
            error.message().contains("leads outside"),
            "{}",
            error.message()
        );
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn no_set_user_id_bits_and_no_devices() {
        let directory = tempfile::tempdir().unwrap();
        let copy = directory.path().join("copy");
        let mut archive = tar::Builder::new(Vec::new());
        entry(&mut archive, tar::EntryType::Directory, "d/", "", b"");
        entry(&mut archive, tar::EntryType::Regular, "d/program", "", b"x");
        entry(&mut archive, tar::EntryType::Char, "d/device", "", b"");
        entry(
            &mut archive,
            tar::EntryType::Link,
            "d/other",
            "d/program",
            b"",
        );
        let place = |_, _: &OsStr| Ok(copy.clone());
        unpack(sent(archive.into_inner().unwrap()), &place, false).unwrap();
        let program = copy.join("program").metadata().unwrap();
        assert_eq!(program.permissions().mode() & 0o7777, 0o755);
        assert_eq!(program.nlink(), 2);
        assert!(!copy.join("device").exists());
    }

    #[test]
    fn the_guests_error_is_the_one_that_is_told() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        wire::write_json(&theirs, Kind::Failure, &Failure::new("no such file: /x")).unwrap();
        let error = ArchiveReader::new(ours).first_kind().unwrap_err();
        assert_eq!(error.message(), "no such file: /x");
    }
}
