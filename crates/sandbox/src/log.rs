//! The output of a container on disk: what `logs` shows.
//!
//! A log is a sequence of entries: nanoseconds since 1970 (u64), stream (u8: 1 output, 2 error
//! output), length (u32), all big endian, then the bytes exactly as the container wrote them. When
//! the file has reached half of its limit it becomes `log.1` and a new one begins, so at least half
//! of the limit is always there.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};

use rustix::fs::OFlags;

use crate::store::{Directory, unix_time_ns};

/// Name of the file in a container's directory.
pub const FILE: &str = "log";

/// Name of the older part of a log.
const ROTATED: &str = "log.1";

/// Name of a file that is there when output was lost: the log had its size.
const CUT: &str = "log.cut";

const HEAD: usize = 13;

/// Largest entry that a reader takes memory for. A writer never makes a larger one.
pub const MAX_ENTRY: usize = 256 * 1024;

/// Which stream an entry is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// Standard output, or the terminal.
    Output = 1,
    /// Standard error.
    Error = 2,
}

/// One piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Stream.
    pub stream: Stream,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Appends to a log.
#[derive(Debug)]
pub struct Writer {
    directory: Directory,
    file: File,
    size: u64,
    limit: u64,
}

impl Writer {
    /// Opens a log that keeps at most `limit` bytes on disk, and goes on where it ends. What was
    /// written of an entry by a process that was killed goes.
    ///
    /// # Errors
    /// The file cannot be made or read.
    pub fn open(directory: Directory, limit: u64) -> io::Result<Self> {
        let mut file = directory.open_file(FILE, OFlags::RDWR | OFlags::CREATE)?;
        let size = whole_entries(&mut file)?;
        file.set_len(size)?;
        file.seek(SeekFrom::Start(size))?;
        Ok(Self {
            directory,
            file,
            size,
            limit,
        })
    }

    /// Appends one piece of at most [`MAX_ENTRY`] bytes.
    ///
    /// # Errors
    /// The disk is full; the entry is then lost, the log stays readable.
    pub fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        if self.size > self.limit / 2 {
            if self.directory.inode(ROTATED)?.is_some() && self.directory.inode(CUT)?.is_none() {
                self.directory
                    .open_file(CUT, OFlags::WRONLY | OFlags::CREATE)?;
            }
            self.directory.rename(FILE, ROTATED)?;
            self.file = create(&self.directory)?;
            self.size = 0;
        }
        let time = unix_time_ns();
        let length = u32::try_from(bytes.len()).map_err(|_| ErrorKind::InvalidInput)?;
        let mut entry = Vec::with_capacity(HEAD + bytes.len());
        entry.extend_from_slice(&time.to_be_bytes());
        entry.push(stream as u8);
        entry.extend_from_slice(&length.to_be_bytes());
        entry.extend_from_slice(bytes);
        if let Err(error) = self.file.write_all(&entry) {
            // No half entry may stay behind: what follows would be unreadable.
            self.file.set_len(self.size)?;
            self.file.seek(SeekFrom::Start(self.size))?;
            return Err(error);
        }
        self.size += entry.len() as u64;
        Ok(())
    }
}

/// Whether the beginning of a log was lost.
pub fn is_cut(directory: &Directory) -> bool {
    directory.inode(CUT).is_ok_and(|there| there.is_some())
}

/// Bytes of a log that are whole entries.
fn whole_entries(file: &mut File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut reader = BufReader::new(file);
    let mut whole = 0;
    loop {
        let mut head = [0; HEAD];
        match reader.read_exact(&mut head) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(whole),
            read => read?,
        }
        let bytes = u32::from_be_bytes([head[9], head[10], head[11], head[12]]);
        let end = whole + HEAD as u64 + u64::from(bytes);
        if end > length {
            return Ok(whole);
        }
        reader.seek_relative(i64::from(bytes))?;
        whole = end;
    }
}

fn create(directory: &Directory) -> io::Result<File> {
    directory.open_file(FILE, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC)
}

fn open(directory: &Directory, name: &str) -> io::Result<BufReader<File>> {
    Ok(BufReader::new(directory.open_file(name, OFlags::RDONLY)?))
}

/// Reads a log from its beginning; can be asked again when it has grown.
#[derive(Debug)]
pub struct Reader {
    directory: Directory,
    parts: Vec<BufReader<File>>,
}

impl Reader {
    /// Opens a log, with its older part.
    ///
    /// # Errors
    /// There is none.
    pub fn open(directory: Directory) -> io::Result<Self> {
        let mut parts = vec![open(&directory, FILE)?];
        if let Ok(old) = open(&directory, ROTATED) {
            parts.push(old);
        }
        Ok(Self { directory, parts })
    }

    /// The next entry; `None` when there is no whole one yet.
    ///
    /// # Errors
    /// The file cannot be read, or is not a log.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        loop {
            let Some(part) = self.parts.last_mut() else {
                return Ok(None);
            };
            if let Some(entry) = read_entry(part)? {
                return Ok(Some(entry));
            }
            if self.parts.len() > 1 {
                self.parts.pop();
                continue;
            }
            // At the end of the newest file this reader knows: has it been rotated away?
            if !self.is_current()? {
                // Whatever the writer added before it rotated is complete now.
                if let Some(part) = self.parts.last_mut()
                    && let Some(entry) = read_entry(part)?
                {
                    return Ok(Some(entry));
                }
                self.parts = vec![open(&self.directory, FILE)?];
                continue;
            }
            return Ok(None);
        }
    }

    fn is_current(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(part) = self.parts.last() else {
            return Ok(true);
        };
        match self.directory.inode(FILE)? {
            Some(there) => Ok(there == part.get_ref().metadata()?.ino()),
            // Between rename and create, or removed: nothing newer to read.
            None => Ok(true),
        }
    }
}

/// Reads one entry, or leaves the reader where it was when the entry is not complete.
fn read_entry(reader: &mut BufReader<File>) -> io::Result<Option<Entry>> {
    let mut head = [0; HEAD];
    let got = read_up_to(reader, &mut head)?;
    if got < HEAD {
        reader.seek_relative(-(got as i64))?;
        return Ok(None);
    }
    let (time, rest) = head.split_at(8);
    let stream = match rest[0] {
        1 => Stream::Output,
        2 => Stream::Error,
        _ => return Err(io::Error::new(ErrorKind::InvalidData, "the log is damaged")),
    };
    let length = u32::from_be_bytes([rest[1], rest[2], rest[3], rest[4]]) as usize;
    if length > MAX_ENTRY {
        return Err(io::Error::new(ErrorKind::InvalidData, "the log is damaged"));
    }
    let mut bytes = vec![0; length];
    let got = read_up_to(reader, &mut bytes)?;
    if got < length {
        reader.seek_relative(-((HEAD + got) as i64))?;
        return Ok(None);
    }
    let mut nanoseconds = [0; 8];
    nanoseconds.copy_from_slice(time);
    Ok(Some(Entry {
        time: u64::from_be_bytes(nanoseconds),
        stream,
        bytes,
    }))
}

fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match reader.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::path::Path;

    use super::*;

    fn in_(directory: &Path) -> Directory {
        Directory::open(directory).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_in_order_with_its_stream() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut writer = Writer::open(in_(path), 1 << 20).unwrap();
        writer.append(Stream::Output, b"one").unwrap();
        let mut reader = Reader::open(in_(path)).unwrap();
        assert_eq!(reader.next_entry().unwrap().unwrap().bytes, b"one");
        assert_eq!(reader.next_entry().unwrap(), None);
        writer.append(Stream::Error, b"\xff\x00").unwrap();
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!(
            (entry.stream, &entry.bytes[..]),
            (Stream::Error, &b"\xff\x00"[..])
        );
    }

    #[test]
    fn the_size_on_disk_is_bounded_and_a_follower_misses_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut writer = Writer::open(in_(path), 4096).unwrap();
        let mut reader = Reader::open(in_(path)).unwrap();
        for i in 0..1000u32 {
            writer.append(Stream::Output, &i.to_be_bytes()).unwrap();
            let entry = reader.next_entry().unwrap().unwrap();
            assert_eq!(entry.bytes, i.to_be_bytes());
        }
        let size = fs::metadata(path.join(FILE)).unwrap().len()
            + fs::metadata(path.join(ROTATED)).unwrap().len();
        assert!(size <= 4096 + 2 * 17, "{size}");
    }

    #[test]
    fn half_an_entry_is_not_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let mut writer = Writer::open(in_(path), 4096).unwrap();
        writer.append(Stream::Output, b"whole").unwrap();
        fs::OpenOptions::new()
            .append(true)
            .open(path.join(FILE))
            .unwrap()
            .write_all(&[0; 10])
            .unwrap();
        let mut reader = Reader::open(in_(path)).unwrap();
        assert!(reader.next_entry().unwrap().is_some());
        assert_eq!(reader.next_entry().unwrap(), None);
    }
}
