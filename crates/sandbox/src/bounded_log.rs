//! Messages of the internal processes, which go to a file on the host or to an engine's log: a
//! guest that provokes messages cannot fill the host's disk or memory with them.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of messages of one process: some 7,000 messages.
const MAX_LOG: u64 = 1 << 20;

/// The same when the administrator has asked for more than warnings (`HULL_LOG`).
const MAX_VERBOSE_LOG: u64 = 64 << 20;

/// Last line of a log that is full.
const FULL: &[u8] = b"further messages of this process are left out: its log is full\n";

/// A writer that drops what is beyond its limit, and what cannot be written: a process does not end
/// for its log.
#[derive(Debug)]
pub struct BoundedLog {
    /// Standard error when absent.
    file: Option<File>,
    limit: u64,
    written: AtomicU64,
}

impl BoundedLog {
    /// A log on standard error; `verbose` when the administrator has asked for more than warnings.
    pub fn new(verbose: bool) -> Self {
        Self::on(None, verbose)
    }

    /// The same, on another file if there is one.
    pub fn on(file: Option<File>, verbose: bool) -> Self {
        Self {
            file,
            limit: if verbose { MAX_VERBOSE_LOG } else { MAX_LOG },
            written: AtomicU64::new(0),
        }
    }

    fn write_to(&self, mut output: impl Write, message: &[u8]) {
        let length = message.len() as u64;
        let before = self.written.fetch_add(length, Ordering::Relaxed);
        if before < self.limit {
            // There is nowhere to tell of it.
            let _ = output.write_all(message);
            if before.saturating_add(length) >= self.limit {
                let _ = output.write_all(FULL);
            }
        }
    }
}

impl Write for &BoundedLog {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        match &self.file {
            Some(file) => self.write_to(file, message),
            None => self.write_to(io::stderr(), message),
        }
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_log_ends_at_its_limit_with_a_word() {
        let log = BoundedLog {
            file: None,
            limit: 100,
            written: AtomicU64::new(0),
        };
        let mut file = Vec::new();
        for _ in 0..1000 {
            log.write_to(&mut file, b"a message of the guest\n");
        }
        let text = String::from_utf8(file).unwrap();
        assert_eq!(text.matches("a message").count(), 5);
        assert!(text.ends_with("its log is full\n"), "{text}");
    }
}
