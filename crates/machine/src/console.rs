//! The console of a guest kernel: read from a pipe, its last part kept in a file, sanitized for
//! display.
//!
//! The sandbox owns a [`ConsoleRing`], waits in its event loop for [`ConsoleRing::fd`] to be
//! readable, and calls [`ConsoleRing::drain`]. The output is untrusted: it is never interpreted,
//! and displayed only through [`ConsoleRing::tail`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::pipe::PipeFlags;

use crate::text::printable;

/// Number of bytes kept.
pub const CAPACITY: usize = 64 << 10;

/// The end of a console's output, in memory and in a file that outlives the machine.
pub struct ConsoleRing {
    pipe: OwnedFd,
    file: File,
    kept: VecDeque<u8>,
    /// Bytes at the end of `kept` that are not in the file.
    unwritten: usize,
    /// Length of the file's content.
    written: u64,
}

impl ConsoleRing {
    /// Creates the ring's file and the pipe. Returns the ring and the pipe's write end, for the
    /// machine.
    pub fn create(file: &Path) -> io::Result<(Self, OwnedFd)> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        // Only this end: the machine's may block.
        rustix::io::ioctl_fionbio(&read, true)?;
        let ring = Self {
            pipe: read,
            file: File::options()
                .create(true)
                .truncate(true)
                .read(true)
                .write(true)
                .open(file)?,
            kept: VecDeque::new(),
            unwritten: 0,
            written: 0,
        };
        Ok((ring, write))
    }

    /// The pipe's read end, non-blocking. At end of file the machine has ended.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Reads and keeps the pipe's content. `false` if the machine has closed its end.
    pub fn drain(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        // Bounded: a guest that prints faster than this reads must not block the sandbox.
        for _ in 0..16 {
            match rustix::io::read(&self.pipe, &mut buffer) {
                Ok(0) => {
                    self.flush()?;
                    return Ok(false);
                }
                Ok(length) => self.push(&buffer[..length]),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        self.flush()?;
        Ok(true)
    }

    /// Keeps `bytes` and drops the oldest ones beyond the capacity.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (self.kept.len() + bytes.len()).saturating_sub(CAPACITY);
        self.kept.drain(..excess);
        self.kept.extend(bytes);
        self.unwritten = (self.unwritten + bytes.len()).min(self.kept.len());
    }

    /// Writes new output to the file. The file is appended to until it reaches twice the capacity
    /// and then rewritten, so each byte is written at most twice.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unwritten == 0 {
            return Ok(());
        }
        let from = if self.written + self.unwritten as u64 > 2 * CAPACITY as u64 {
            self.file.set_len(0)?;
            self.written = 0;
            0
        } else {
            self.kept.len() - self.unwritten
        };
        let (first, second) = self.kept.as_slices();
        for part in [
            first.get(from..).unwrap_or_default(),
            &second[from.saturating_sub(first.len())..],
        ] {
            self.file.write_all_at(part, self.written)?;
            self.written += part.len() as u64;
        }
        self.unwritten = 0;
        Ok(())
    }

    /// The last `lines` lines, sanitized.
    pub fn tail(&self, lines: usize) -> Vec<String> {
        let (first, second) = self.kept.as_slices();
        tail(&[first, second].concat(), lines)
    }
}

/// The last `lines` lines of a ring's file, sanitized, for use after the sandbox has ended.
pub fn tail_of_file(file: &Path, lines: usize) -> io::Result<Vec<String>> {
    let file = File::open(file)?;
    let length = file.metadata()?.len();
    let kept = length.min(CAPACITY as u64);
    let mut bytes = vec![0; kept as usize];
    file.read_exact_at(&mut bytes, length - kept)?;
    Ok(tail(&bytes, lines))
}

/// Maximum length of a displayed line, in characters.
const LONGEST_LINE: usize = 400;

/// The last lines of guest output, without characters that control a terminal.
pub fn tail(bytes: &[u8], lines: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let mut shown: Vec<String> = text
        .lines()
        .rev()
        .map(clean)
        .filter(|line| !line.is_empty())
        .take(lines)
        .collect();
    shown.reverse();
    shown
}

fn clean(line: &str) -> String {
    let kept: String = line.chars().take(LONGEST_LINE).collect();
    printable(&kept).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tail_shows_the_last_lines_without_controls() {
        let lines = tail(b"one\r\ntwo \x1b[2Jred\n\nthree\xff\n", 2);
        assert_eq!(lines, ["two \u{fffd}[2Jred", "three\u{fffd}"]);
    }

    #[test]
    fn memory_and_file_stay_bounded_and_agree() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let (mut ring, _write) = ConsoleRing::create(&path).unwrap();
        for number in 0..50_000 {
            ring.push(format!("line {number}\n").as_bytes());
            if number % 7 == 0 {
                ring.flush().unwrap();
            }
        }
        ring.flush().unwrap();
        assert!(ring.kept.len() <= CAPACITY);
        assert!(std::fs::metadata(&path).unwrap().len() <= 2 * CAPACITY as u64);
        assert_eq!(ring.tail(3), ["line 49997", "line 49998", "line 49999"]);
        assert_eq!(tail_of_file(&path, 1000).unwrap(), ring.tail(1000));
    }

    #[test]
    fn a_push_larger_than_the_ring_keeps_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let (mut ring, _write) = ConsoleRing::create(&path).unwrap();
        let mut big = vec![b'x'; 3 * CAPACITY];
        big.extend(b"\nend\n");
        ring.push(&big);
        ring.flush().unwrap();
        assert_eq!(ring.tail(1), ["end"]);
        assert_eq!(tail_of_file(&path, 1).unwrap(), ["end"]);
    }

    #[test]
    fn drain_reads_the_pipe_and_notices_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let (mut ring, write) = ConsoleRing::create(&directory.path().join("console")).unwrap();
        assert!(ring.drain().unwrap());
        rustix::io::write(&write, b"hello\n").unwrap();
        assert!(ring.drain().unwrap());
        drop(write);
        assert!(!ring.drain().unwrap());
        assert_eq!(ring.tail(5), ["hello"]);
    }
}
