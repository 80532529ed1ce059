//! The total pause time of a user-mode kernel: a number that the kernel subtracts from the host's
//! monotonic clock, on which its own is based (guest/kernel/patches/um-paused-time.patch).
//!
//! The number is in a file that the kernel maps read-only, and is written while the kernel is
//! stopped. So the guest never sees an uncorrected clock. With a message or a signal it could: a
//! timer that expired during the pause would be handled first.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

/// Size of the file: a page, as it is mapped.
const SIZE: u64 = 4096;

/// The file and its content.
#[derive(Debug)]
pub struct PausedTime {
    file: OwnedFd,
    nanoseconds: u64,
}

impl PausedTime {
    /// Creates the file. Returns also a read-only descriptor for the kernel.
    ///
    /// # Errors
    /// EMFILE, ENOMEM; ENOENT without /proc.
    pub fn new() -> Result<(Self, OwnedFd), Errno> {
        use std::os::fd::AsRawFd;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"paused-time", flags)?;
        rustix::fs::ftruncate(&file, SIZE)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let reader = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok((
            Self {
                file,
                nanoseconds: 0,
            },
            reader,
        ))
    }

    /// Adds a pause. The kernel must be stopped: otherwise it could read during the write.
    ///
    /// # Errors
    /// Those of pwrite; the number is then unchanged.
    pub fn add(&mut self, pause: Duration) -> Result<(), Errno> {
        let pause = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        let nanoseconds = self.nanoseconds.saturating_add(pause);
        // Cannot be a short write: the file has a page and cannot shrink.
        rustix::io::pwrite(&self.file, &nanoseconds.to_ne_bytes(), 0)?;
        self.nanoseconds = nanoseconds;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pauses_add_up_and_the_reader_cannot_change_them() {
        let (mut time, reader) = PausedTime::new().unwrap();
        let read = || {
            let mut bytes = [0; 8];
            assert_eq!(rustix::io::pread(&reader, &mut bytes, 0), Ok(8));
            u64::from_ne_bytes(bytes)
        };
        assert_eq!(read(), 0);
        time.add(Duration::from_millis(1)).unwrap();
        time.add(Duration::from_secs(3)).unwrap();
        assert_eq!(read(), 3_001_000_000);
        assert!(rustix::io::pwrite(&reader, &[1], 0).is_err());
        assert!(rustix::fs::ftruncate(&reader, 0).is_err());
        assert!(rustix::fs::ftruncate(&time.file, 0).is_err());
    }
}
