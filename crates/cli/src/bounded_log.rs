//! Standard error of the internal processes, which is a file on the host: a guest that provokes
//! messages cannot fill the host's disk or memory with it.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of messages of one process: some 7,000 messages.
const MAX_LOG: u64 = 1 << 20;

/// The same when the administrator has asked for more than warnings (`HULL_LOG`).
const MAX_VERBOSE_LOG: u64 = 64 << 20;

/// Last line of a log that is full.
const FULL: &[u8] = b"further messages of this process are left out: its log is full\n";

/// A writer that drops what is beyond its limit.
#[derive(Debug)]
pub struct BoundedLog {
    limit: u64,
    written: AtomicU64,
}

impl BoundedLog {
    /// A log for messages of this level and above.
    pub fn new(verbose: bool) -> Self {
        Self {
            limit: if verbose { MAX_VERBOSE_LOG } else { MAX_LOG },
            written: AtomicU64::new(0),
        }
    }

    fn write_to(&self, mut output: impl Write, message: &[u8]) -> io::Result<usize> {
        let length = message.len() as u64;
        let before = self.written.fetch_add(length, Ordering::Relaxed);
        if before < self.limit {
            output.write_all(message)?;
            if before.saturating_add(length) >= self.limit {
                output.write_all(FULL)?;
            }
        }
        Ok(message.len())
    }
}

impl Write for &BoundedLog {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        self.write_to(io::stderr(), message)
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
            limit: 100,
            written: AtomicU64::new(0),
        };
        let mut file = Vec::new();
        for _ in 0..1000 {
            assert_eq!(
                log.write_to(&mut file, b"a message of the guest\n")
                    .unwrap(),
                23
            );
        }
        let text = String::from_utf8(file).unwrap();
        assert_eq!(text.matches("a message").count(), 5);
        assert!(text.ends_with("its log is full\n"), "{text}");
    }
}
