//! Creates the archive of an unpacked layer again, from its skeleton and its files.
//!
//! Called by the store, which checks the digest of what comes out. The skeleton may be anything: it
//! was written by a process that parsed a hostile archive. So nothing outside of the layer is
//! opened, symbolic links are not followed, and memory does not grow with it, except for
//! [`GONE_FILES`] numbers.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use flate2::read::GzDecoder;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::attributes::show;
use super::fs;
use super::skeleton::{CONTENT, END, FILE, GONE, LITERAL, PIECE};
use crate::limits::{GONE_FILES, PATH_LENGTH};

/// Why an archive cannot be created again.
#[derive(Debug)]
pub(crate) enum RebuildError<E> {
    /// The skeleton or a file of the layer is damaged; the reason.
    Damaged(String),
    /// The receiver of the bytes failed.
    Receiver(E),
}

/// Content of a file that a later entry replaced.
struct Gone {
    inode: u64,
    /// How many files the skeleton names before.
    files: u64,
    /// Where the content is in the spool.
    offset: u64,
    size: u64,
}

/// Where the content of the current file is.
enum Source {
    None,
    File { file: File, path: String },
    Spool { offset: u64, size: u64 },
}

struct Records {
    reader: BufReader<GzDecoder<BufReader<File>>>,
}

/// Passes the archive of the layer in the directory `root`, of `length` bytes, to `receive`, piece
/// by piece. `spool` returns an empty temporary file, and is called only if files of the archive
/// have gone.
pub(crate) fn rebuild<E>(
    skeleton: &File,
    root: &OwnedFd,
    length: u64,
    spool: impl FnOnce() -> Result<File, E>,
    receive: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), RebuildError<E>> {
    let (gone, spool) = collect_gone(skeleton, length, spool)?;
    let mut records = Records::open(skeleton)?;
    let mut source = Source::None;
    let mut files = 0u64;
    let mut piece = vec![0; PIECE];
    loop {
        match records.byte()? {
            LITERAL => {
                let length = records.literal_length()?;
                records.fill(&mut piece[..length])?;
                receive(&piece[..length]).map_err(RebuildError::Receiver)?;
            }
            FILE => {
                let (inode, path) = records.file()?;
                files += 1;
                source = match gone
                    .iter()
                    .find(|gone| gone.inode == inode && gone.files >= files)
                {
                    Some(gone) => Source::Spool {
                        offset: gone.offset,
                        size: gone.size,
                    },
                    None => open(root, &path)?,
                };
            }
            CONTENT => {
                let (mut offset, mut left) = (records.number()?, records.number()?);
                while left > 0 {
                    let want = left.min(PIECE as u64) as usize;
                    let read = source.read(spool.as_ref(), offset, &mut piece[..want])?;
                    receive(&piece[..read]).map_err(RebuildError::Receiver)?;
                    offset = offset.saturating_add(read as u64);
                    left -= read as u64;
                }
            }
            GONE => {
                records.number()?;
                let size = records.number()?;
                records.copy(size, &mut io::sink())?;
            }
            END => return Ok(()),
            _ => return Err(damaged("a record of unknown type")),
        }
    }
}

/// Copies the contents that have gone into the spool.
fn collect_gone<E>(
    skeleton: &File,
    most: u64,
    spool: impl FnOnce() -> Result<File, E>,
) -> Result<(Vec<Gone>, Option<File>), RebuildError<E>> {
    let mut records = Records::open(skeleton)?;
    let (mut gone, mut files, mut offset) = (Vec::new(), 0, 0u64);
    let (mut file, mut spool) = (None, Some(spool));
    loop {
        match records.byte()? {
            LITERAL => {
                let length = records.literal_length()?;
                records.copy(length as u64, &mut io::sink())?;
            }
            FILE => {
                records.file()?;
                files += 1;
            }
            CONTENT => {
                records.number()?;
                records.number()?;
            }
            GONE => {
                if gone.len() == GONE_FILES {
                    return Err(damaged("it has too many replaced files"));
                }
                if let Some(spool) = spool.take() {
                    file = Some(spool().map_err(RebuildError::Receiver)?);
                }
                let Some(file) = &mut file else { continue };
                let (inode, size) = (records.number()?, records.number()?);
                if size > most.saturating_mul(2).saturating_sub(offset) {
                    return Err(damaged("its replaced files are larger than the archive"));
                }
                records.copy(size, file)?;
                gone.push(Gone {
                    inode,
                    files,
                    offset,
                    size,
                });
                offset = offset.saturating_add(size);
            }
            END => return Ok((gone, file)),
            _ => return Err(damaged("a record of unknown type")),
        }
    }
}

fn open<E>(root: &OwnedFd, path: &[u8]) -> Result<Source, RebuildError<E>> {
    let shown = show(path);
    let failed = |reason: String| RebuildError::Damaged(format!("file \"{shown}\": {reason}"));
    // Not blocked by a pipe that has the file's name by now.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::io::retry_on_intr(|| {
        rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)
    })
    .map_err(|errno| failed(errno.to_string()))?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| failed(errno.to_string()))?;
    match fs::file_type(&stat) {
        rustix::fs::FileType::RegularFile => Ok(Source::File {
            file: file.into(),
            path: shown,
        }),
        _ => Err(failed("it is no regular file any more".to_owned())),
    }
}

impl Source {
    /// Reads at least one byte.
    fn read<E>(
        &self,
        spool: Option<&File>,
        offset: u64,
        piece: &mut [u8],
    ) -> Result<usize, RebuildError<E>> {
        let (file, offset, want, name) = match (self, spool) {
            (Self::File { file, path }, _) => (file, offset, piece.len(), path.as_str()),
            (
                Self::Spool {
                    offset: start,
                    size,
                },
                Some(spool),
            ) => {
                let left = size.saturating_sub(offset).min(piece.len() as u64);
                let offset = start.saturating_add(offset);
                (spool, offset, left as usize, "of a replaced entry")
            }
            _ => return Err(damaged("content of no file")),
        };
        loop {
            match file.read_at(&mut piece[..want], offset) {
                Ok(0) => {
                    return Err(RebuildError::Damaged(format!(
                        "file \"{name}\" is shorter than it was"
                    )));
                }
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(RebuildError::Damaged(format!("file \"{name}\": {error}")));
                }
            }
        }
    }
}

impl Records {
    fn open<E>(file: &File) -> Result<Self, RebuildError<E>> {
        let open = || -> io::Result<File> {
            let mut file = file.try_clone()?;
            file.rewind()?;
            Ok(file)
        };
        let file = open().map_err(broken)?;
        Ok(Self {
            reader: BufReader::with_capacity(PIECE, GzDecoder::new(BufReader::new(file))),
        })
    }

    fn fill<E>(&mut self, bytes: &mut [u8]) -> Result<(), RebuildError<E>> {
        self.reader.read_exact(bytes).map_err(broken)
    }

    fn byte<E>(&mut self) -> Result<u8, RebuildError<E>> {
        let mut byte = [0];
        self.fill(&mut byte).map(|()| byte[0])
    }

    fn number<E>(&mut self) -> Result<u64, RebuildError<E>> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes).map(|()| u64::from_le_bytes(bytes))
    }

    fn length<E>(&mut self, most: usize) -> Result<usize, RebuildError<E>> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        match u32::from_le_bytes(bytes) as usize {
            length if length <= most => Ok(length),
            _ => Err(damaged("a record is too long")),
        }
    }

    fn literal_length<E>(&mut self) -> Result<usize, RebuildError<E>> {
        self.length(PIECE)
    }

    fn file<E>(&mut self) -> Result<(u64, Vec<u8>), RebuildError<E>> {
        let inode = self.number()?;
        let mut path = vec![0; self.length(PATH_LENGTH)?];
        self.fill(&mut path)?;
        Ok((inode, path))
    }

    fn copy<E>(&mut self, size: u64, to: &mut impl Write) -> Result<(), RebuildError<E>> {
        let copied = io::copy(&mut (&mut self.reader).take(size), to).map_err(broken)?;
        match copied == size {
            true => Ok(()),
            false => Err(broken(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn broken<E>(error: io::Error) -> RebuildError<E> {
    RebuildError::Damaged(format!("its skeleton: {error}"))
}

fn damaged<E>(reason: &str) -> RebuildError<E> {
    RebuildError::Damaged(format!("its skeleton: {reason}"))
}
