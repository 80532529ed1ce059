//! Archives on their way into and out of containers, for `cp`: the streams they travel on, and with
//! `pack` and `unpack` the host's side of them.

mod pack;
mod stopped;
mod unpack;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use hull_image::unpack::tar_reader::TarReader;
use hull_sandbox::control::client::{Client, unexpected};
use hull_sandbox::control::protocol::{CopyRequest, Reply, Request};

pub use hull_image::unpack::tar_reader::{Entry, Kind as EntryKind};
pub use pack::pack;
pub use unpack::unpack;

use self::stopped::Worker;
use crate::container::{self, Container};
use crate::error::{Context, Error, Result};
use crate::paths::Paths;

/// Bytes of an archive that are buffered.
const CHUNK: usize = 64 * 1024;

/// A copy that has begun: an archive on a stream, and where its result comes from.
struct Copy {
    // Closed first: the worker may wait for it.
    stream: UnixStream,
    other: OtherSide,
}

/// What is at the other end of the stream.
enum OtherSide {
    /// A guest, whose result comes on the control connection.
    Guest(Client),
    /// A thread of this process.
    Worker(Worker),
}

impl Copy {
    fn begin(client: Client, request: CopyRequest) -> Result<Self> {
        let mut streams = client.streams(&Request::Copy(request))?.into_iter();
        let stream = streams
            .next()
            .ok_or_else(|| Error::new("the sandbox handed over no stream"))?;
        Ok(Self {
            stream: stream.into(),
            other: OtherSide::Guest(client),
        })
    }

    /// With a container, which is asked or, when it has stopped, entered.
    fn with(paths: &Paths, container: &Container, request: CopyRequest) -> Result<Self> {
        if !container::is_idle(container) {
            return Self::begin(container::connect(container)?, request);
        }
        let (stream, theirs) = UnixStream::pair().context(|| "create a stream")?;
        let worker = Worker::start(paths, container, request, theirs)?;
        Ok(Self {
            stream,
            other: OtherSide::Worker(worker),
        })
    }

    /// Waits for the result of the other side.
    fn result(&mut self) -> Result<()> {
        match &mut self.other {
            OtherSide::Guest(client) => match client.receive()?.message {
                Reply::Ok => Ok(()),
                other => Err(unexpected(&other)),
            },
            OtherSide::Worker(worker) => worker.result(),
        }
    }
}

/// An archive that a container sends.
pub struct ArchiveReader {
    copy: Copy,
    /// The container has closed it.
    ended: bool,
}

impl From<Copy> for ArchiveReader {
    fn from(copy: Copy) -> Self {
        Self { copy, ended: false }
    }
}

impl ArchiveReader {
    /// Of an archive and the connection on which the result comes, for the fuzz targets.
    #[cfg(fuzzing)]
    pub fn of(stream: UnixStream, client: Client) -> Self {
        let other = OtherSide::Guest(client);
        Copy { stream, other }.into()
    }

    /// Asks for the archive of a path in a container, whether or not it runs.
    ///
    /// # Errors
    /// The container is just being created, or its sandbox cannot be reached.
    pub fn ask(paths: &Paths, container: &Container, path: String, follow: bool) -> Result<Self> {
        let request = CopyRequest {
            container: container.record.id.clone(),
            path,
            follow,
            into: false,
        };
        Ok(Copy::with(paths, container, request)?.into())
    }

    /// The first entry, which is what the path named that was asked for.
    ///
    /// # Errors
    /// There is no such path, or the archive is damaged.
    pub fn first(self) -> Result<Entry> {
        let mut archive = TarReader::new(self);
        let entry = archive.next();
        match entry {
            Ok(Some(entry)) => Ok(entry),
            Ok(None) => match archive.get_mut().copy.result() {
                Ok(()) => Err(Error::new("the archive is empty")),
                Err(error) => Err(error),
            },
            Err(error) => Err(archive.get_mut().explain(&error)),
        }
    }

    /// Writes the archive as it is.
    ///
    /// # Errors
    /// The guest's error, or that of the output.
    pub fn copy_to(&mut self, to: &mut impl Write) -> Result<()> {
        match io::copy(self, to).and_then(|_| to.flush()) {
            Ok(()) => self.finish(),
            Err(error) => Err(Error::from_chain(&error)),
        }
    }

    /// Waits for the result of the other side, after the end of the archive.
    ///
    /// # Errors
    /// The guest's error.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.copy.result()
    }

    /// The guest's error says more than that the archive ended early.
    pub(crate) fn explain(&mut self, error: &(dyn std::error::Error + 'static)) -> Error {
        // What is still to come is of no use, and the guest may be waiting for us to take it.
        let _ = self.copy.stream.shutdown(Shutdown::Both);
        match self.copy.result() {
            Ok(()) => Error::from_chain(error),
            Err(error) => error,
        }
    }
}

impl Read for ArchiveReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.copy.stream.read(buffer)?;
        self.ended |= length == 0 && !buffer.is_empty();
        Ok(length)
    }
}

/// An archive that a container takes.
pub struct ArchiveWriter(Copy);

impl ArchiveWriter {
    /// Asks for an archive to be unpacked in a directory of a container, whether or not it runs.
    ///
    /// # Errors
    /// The container is just being created, or its sandbox cannot be reached.
    pub fn ask(paths: &Paths, container: &Container, directory: String) -> Result<Self> {
        let request = CopyRequest {
            container: container.record.id.clone(),
            path: directory,
            follow: false,
            into: true,
        };
        Copy::with(paths, container, request).map(Self)
    }

    /// Passes on an archive as it is.
    ///
    /// # Errors
    /// The archive cannot be read.
    pub fn copy_from(&mut self, from: &mut impl Read) -> Result<()> {
        match io::copy(from, self) {
            // The guest takes no more: why is learned by `finish`.
            Err(error) if is_closed(&error) => Ok(()),
            copied => copied.map(|_| ()).context(|| "pass on the archive"),
        }
    }

    /// Says that the archive is complete, and waits for the guest's result.
    ///
    /// # Errors
    /// The guest's error.
    pub fn finish(mut self) -> Result<()> {
        // A guest that has failed meanwhile reads no more, and has said why.
        let _ = self.0.stream.shutdown(Shutdown::Write);
        self.0.result()
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

impl Write for ArchiveWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ffi::OsStr;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use hull_sandbox::control::protocol::{pair, send};

    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A copy, with the sandbox's ends of its stream and of its control connection.
    fn copy() -> (Copy, UnixStream, OwnedFd) {
        let (stream, theirs) = UnixStream::pair().unwrap();
        let (ours, sandbox) = pair().unwrap();
        let client = Client::from(ours);
        let other = OtherSide::Guest(client);
        (Copy { stream, other }, theirs, sandbox)
    }

    /// What a guest would send.
    fn sent(archive: Vec<u8>) -> ArchiveReader {
        let (copy, mut theirs, sandbox) = copy();
        std::thread::spawn(move || {
            // A reader that has seen enough goes away.
            let _ = theirs.write_all(&archive);
            drop(theirs);
            send(&sandbox, &Reply::Ok, &[]).unwrap();
        });
        copy.into()
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
        let (copy, mut theirs, sandbox) = copy();
        let reader = std::thread::spawn(move || {
            let mut archive = Vec::new();
            theirs.read_to_end(&mut archive).unwrap();
            send(&sandbox, &Reply::Ok, &[]).unwrap();
            archive
        });
        let mut writer = ArchiveWriter(copy);
        pack(&mut writer, &source, OsStr::new("name"), false, false).unwrap();
        writer.finish().unwrap();
        let archive = reader.join().unwrap();

        assert_eq!(
            sent(archive.clone())
                .first()
                .map(|entry| entry.kind)
                .unwrap(),
            EntryKind::Directory
        );
        let copy = directory.path().join("copy");
        let place = |kind| {
            assert_eq!(kind, EntryKind::Directory);
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
        let place = |_| Ok(copy.clone());

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
        assert!(error.message.contains("leads outside"), "{}", error.message);
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn a_guest_names_nothing_on_the_host_and_changes_no_directory_that_was_there() {
        use tar::EntryType::{Directory, Link, Regular};
        let home = tempfile::tempdir().unwrap();
        std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let kept = home.path().join("kept");
        std::fs::create_dir(&kept).unwrap();
        std::fs::set_permissions(&kept, std::fs::Permissions::from_mode(0o750)).unwrap();
        let before = kept.metadata().unwrap().mtime();
        let send = |entries: &[(tar::EntryType, &str, &str)], to: &Path| {
            let mut archive = tar::Builder::new(Vec::new());
            for (kind, name, link) in entries {
                entry(&mut archive, *kind, name, link, b"");
            }
            unpack(
                sent(archive.into_inner().unwrap()),
                &|_| Ok(to.to_owned()),
                false,
            )
        };
        // Its name for a file is not used.
        send(&[(Regular, ".bashrc", "")], &home.path().join("log.txt")).unwrap();
        // Nor is more than was asked for.
        for more in [".bashrc", "log.txt", "log.txt/x", "other"] {
            let entries = [(Regular, "log.txt", ""), (Regular, more, "")];
            let error = send(&entries, &home.path().join("log.txt")).unwrap_err();
            assert!(error.message.contains("leads outside"), "{error}");
        }
        // A directory instead of a file goes below the name that was asked for.
        let entries = [(Directory, ".", ""), (Regular, "./.bashrc", "")];
        send(&entries, &home.path().join("as-directory")).unwrap();
        for first in ["d", "d/e", ".", "../d"] {
            let entries = [(Directory, first, ""), (Regular, "x", "")];
            let sent = send(&entries, &kept);
            assert_eq!(sent.is_ok(), first == ".", "{first}");
        }
        let entries = [(Directory, "d", ""), (Link, "d/hosts", "../../etc/hosts")];
        send(&entries, &kept).unwrap_err();
        // What was there is as it was.
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(home.path()), mode(&kept)), (0o700, 0o750));
        assert!(kept.metadata().unwrap().mtime() >= before);
        // A file is not written over a directory.
        let error = send(&[(Regular, "x", "")], &kept).unwrap_err();
        assert!(error.message.contains("is a directory"), "{error}");
        let mut names: Vec<_> = std::fs::read_dir(home.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["as-directory", "kept", "log.txt"]);
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
        let place = |_| Ok(copy.clone());
        unpack(sent(archive.into_inner().unwrap()), &place, false).unwrap();
        let program = copy.join("program").metadata().unwrap();
        assert_eq!(program.permissions().mode() & 0o7777, 0o755);
        assert_eq!(program.nlink(), 2);
        assert!(!copy.join("device").exists());
    }

    #[test]
    fn the_guests_error_is_the_one_that_is_told() {
        let (copy, theirs, sandbox) = copy();
        let failed = Reply::Failed(Error::new("no such file: /x"));
        send(&sandbox, &failed, &[]).unwrap();
        drop(theirs);
        let error = ArchiveReader::from(copy)
            .first()
            .map(|entry| entry.kind)
            .unwrap_err();
        assert_eq!(error.message, "no such file: /x");
    }
}
