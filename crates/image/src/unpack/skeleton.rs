//! The skeleton of a layer's archive: all of its bytes except the content of regular files, which
//! the unpacked layer has. With both the archive can be created again, byte by byte (`rebuild`).
//!
//! Called while a layer is unpacked: [`Recorder`] sits between the uncompressed archive and the
//! parser, and the writer says which bytes are content of which file.
//!
//! A skeleton is a gzip stream of records. (Not zstd: the process that reads it is not jailed, and
//! one that unpacked a hostile layer could have written anything. flate2 with zlib-rs is Rust.)
//! Numbers are little endian:
//!
//! | first byte | then | meaning |
//! | --- | --- | --- |
//! | [`LITERAL`] | length (4), bytes | bytes of the archive |
//! | [`FILE`] | inode (8), length (4), path | the file that [`CONTENT`] is about from now on |
//! | [`CONTENT`] | offset (8), length (8) | bytes of the archive that this part of the file has |
//! | [`GONE`] | inode (8), size (8), bytes | content of a file, written before it was removed |
//! | [`END`] | | the archive's end |
//!
//! A file goes when a later entry of the archive has its name. The last file with that inode number
//! before the record is meant. Files are named by their paths without symbolic links: directories
//! are never renamed, so a path keeps its meaning until the file goes.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{LayerError, fs};
use crate::limits::{Disk, GONE_FILES};

pub(super) const LITERAL: u8 = 1;
pub(super) const FILE: u8 = 2;
pub(super) const CONTENT: u8 = 3;
pub(super) const GONE: u8 = 4;
pub(super) const END: u8 = 5;

/// Longest literal, bytes.
pub(super) const PIECE: usize = 64 << 10;

/// Where a skeleton goes; nowhere if none is wanted. Clones write the same one.
#[derive(Clone, Default)]
pub(crate) struct Skeleton(Option<Rc<RefCell<Sink>>>);

struct Sink {
    out: GzEncoder<BufWriter<File>>,
    disk: Disk,
    literal: Vec<u8>,
    /// Bytes to come that are content.
    content: u64,
    /// Bytes of content so far.
    contents: u64,
    /// Bytes and number of files that have gone.
    gone: (u64, usize),
    /// Much more has gone than there was: names are replaced again and again.
    given_up: bool,
    failed: Option<LayerError>,
}

impl Skeleton {
    /// Writes to `file`; `disk` is its file system.
    pub(crate) fn write_to(file: File, disk: Disk) -> Self {
        let out = GzEncoder::new(BufWriter::new(file), Compression::fast());
        Self(Some(Rc::new(RefCell::new(Sink {
            out,
            disk,
            literal: Vec::with_capacity(PIECE),
            content: 0,
            contents: 0,
            gone: (0, 0),
            given_up: false,
            failed: None,
        }))))
    }

    /// Calls `write`, unless there is nothing to write; keeps why it fails.
    fn with(&self, write: impl FnOnce(&mut Sink) -> Result<(), LayerError>) -> Result<(), Errno> {
        let Some(sink) = &self.0 else { return Ok(()) };
        let mut sink = sink.borrow_mut();
        if sink.given_up {
            return Ok(());
        }
        write(&mut sink).map_err(|error| {
            sink.failed = Some(error);
            Errno::IO
        })
    }

    /// The content that follows is that of the file at `path`, which has no symbolic links.
    pub(super) fn file(&self, path: &[u8], file: BorrowedFd<'_>) -> Result<(), Errno> {
        self.with(|sink| {
            let inode = rustix::fs::fstat(file).map_err(failed)?.st_ino;
            let length = u32::try_from(path.len()).map_err(|_| failed(Errno::NAMETOOLONG))?;
            sink.flush()?;
            sink.put(&[FILE])?;
            sink.put(&inode.to_le_bytes())?;
            sink.put(&length.to_le_bytes())?;
            sink.put(path)
        })
    }

    /// The next `length` bytes of the archive are the file's, from `offset` on.
    pub(super) fn content(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.with(|sink| {
            sink.flush()?;
            sink.content = length;
            sink.contents = sink.contents.saturating_add(length);
            sink.put(&[CONTENT])?;
            sink.put(&offset.to_le_bytes())?;
            sink.put(&length.to_le_bytes())
        })
    }

    /// The file `name` in `dir` is about to be removed.
    pub(super) fn gone(
        &self,
        dir: BorrowedFd<'_>,
        name: impl rustix::path::Arg + Copy,
    ) -> Result<(), Errno> {
        self.with(|sink| {
            let stat = match rustix::fs::statat(dir, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if fs::file_type(&stat) == FileType::RegularFile => stat,
                Ok(_) | Err(Errno::NOENT) => return Ok(()),
                Err(errno) => return Err(failed(errno)),
            };
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            if size == 0 {
                return Ok(());
            }
            sink.gone.0 = sink.gone.0.saturating_add(size);
            sink.gone.1 += 1;
            // A file with several names may go several times.
            let most = sink.contents.saturating_mul(2);
            if sink.gone.0 > most || sink.gone.1 > GONE_FILES {
                sink.given_up = true;
                return Ok(());
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(dir, name, flags, Mode::empty()).map_err(failed)?;
            sink.flush()?;
            sink.put(&[GONE])?;
            sink.put(&stat.st_ino.to_le_bytes())?;
            sink.put(&size.to_le_bytes())?;
            sink.copy(file, size)
        })
    }

    /// Writes the end. Returns whether the skeleton is complete.
    ///
    /// # Errors
    /// `Write` or `Reserve`, also of an earlier call.
    pub(super) fn finish(&self) -> Result<bool, LayerError> {
        let Some(sink) = &self.0 else {
            return Ok(false);
        };
        let mut sink = sink.borrow_mut();
        if let Some(error) = sink.failed.take() {
            return Err(error);
        }
        if sink.given_up {
            return Ok(false);
        }
        sink.flush()?;
        sink.put(&[END])?;
        sink.out.try_finish().map_err(written)?;
        sink.out.get_mut().flush().map_err(written)?;
        Ok(true)
    }

    /// Why recording failed, if that made the caller fail.
    pub(super) fn failure(&self) -> Option<LayerError> {
        self.0.as_ref()?.borrow_mut().failed.take()
    }
}

impl Sink {
    fn put(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.out.write_all(bytes).map_err(written)
    }

    /// Records bytes of the archive, except those that are content.
    fn bytes(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        let content = self.content.min(bytes.len() as u64);
        self.content -= content;
        bytes = &bytes[content as usize..];
        while !bytes.is_empty() {
            let fits = bytes.len().min(PIECE - self.literal.len());
            self.literal.extend_from_slice(&bytes[..fits]);
            bytes = &bytes[fits..];
            if self.literal.len() == PIECE {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), LayerError> {
        if self.literal.is_empty() {
            return Ok(());
        }
        self.disk.bytes(self.literal.len() as u64)?;
        // At most `PIECE`.
        let length = self.literal.len() as u32;
        self.put(&[LITERAL])?;
        self.put(&length.to_le_bytes())?;
        self.out.write_all(&self.literal).map_err(written)?;
        self.literal.clear();
        Ok(())
    }

    fn copy(&mut self, file: OwnedFd, size: u64) -> Result<(), LayerError> {
        let mut file = File::from(file).take(size);
        let mut piece = vec![0; PIECE];
        let mut left = size;
        while left > 0 {
            match file.read(&mut piece) {
                Ok(0) => return Err(written(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    self.disk.bytes(read as u64)?;
                    self.put(&piece[..read])?;
                    left -= read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(written(error)),
            }
        }
        Ok(())
    }
}

fn written(source: io::Error) -> LayerError {
    LayerError::Write {
        entry: "the archive's skeleton".to_owned(),
        doing: "write",
        source,
    }
}

fn failed(errno: Errno) -> LayerError {
    written(errno.into())
}

/// Passes an archive on and records its skeleton.
pub(super) struct Recorder<R> {
    inner: R,
    skeleton: Skeleton,
}

impl<R: Read> Recorder<R> {
    pub(super) fn new(inner: R, skeleton: Skeleton) -> Self {
        Self { inner, skeleton }
    }
}

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.skeleton.with(|sink| sink.bytes(&buffer[..read]))?;
        Ok(read)
    }
}
