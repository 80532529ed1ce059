//! Archives on their way into and out of containers, for `cp`: the connections they travel on, and with `pack` and
//! `unpack` the host's side of them.

mod pack;
mod unpack;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use hull_image::unpack::tar_reader::TarReader;
use hull_sandbox::Failure;
use hull_sandbox::wire::{self, Kind};

pub use hull_image::unpack::tar_reader::Kind as EntryKind;
pub use pack::pack;
pub use unpack::unpack;

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ffi::OsStr;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

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
