//! Reads the kernel's small text files through one buffer. Called by the other files of this
//! module.

use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Longest file that is read whole. A memory.stat has about 2 KiB, an io.stat with 64 devices 6.
const BUFFER: usize = 8192;

/// One buffer for all files.
pub struct Files {
    buffer: [u8; BUFFER],
}

impl Files {
    pub fn new() -> Self {
        Self {
            buffer: [0; BUFFER],
        }
    }

    /// A file that the kernel writes in one piece, as control groups' are; `None` when it is not
    /// there.
    pub fn read(&mut self, directory: BorrowedFd<'_>, name: &str) -> Option<&str> {
        self.read_with(directory, name, false)
    }

    /// A file that the kernel writes line by line, and so in several pieces.
    pub fn read_all(&mut self, directory: BorrowedFd<'_>, name: &str) -> Option<&str> {
        self.read_with(directory, name, true)
    }

    fn read_with(&mut self, directory: BorrowedFd<'_>, name: &str, pieces: bool) -> Option<&str> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
        let mut length = 0;
        loop {
            match rustix::io::read(&file, &mut self.buffer[length..]) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(Errno::INTR) => continue,
                Err(_) => return None,
            }
            if !pieces || length == BUFFER {
                break;
            }
        }
        if length == BUFFER {
            length = self.buffer.iter().rposition(|byte| *byte == b'\n')? + 1;
        }
        std::str::from_utf8(&self.buffer[..length]).ok()
    }
}

/// A file with one number; `None` for a limit that is `max`.
pub fn number(text: &str) -> Option<u64> {
    text.trim_ascii_end().parse().ok()
}

/// Lines `KEY NUMBER …`.
pub fn entries(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        Some((words.next()?, words.next()?.parse().ok()?))
    })
}
