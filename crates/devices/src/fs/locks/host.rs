//! Locks of the host's kernel, by the calls that never wait.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::ranges::{Kind, Range};

/// A lock of flock(2), of the open file `file`; `None` unlocks.
pub fn flock(file: &OwnedFd, kind: Option<Kind>) -> Result<(), Errno> {
    let operation = match kind {
        Some(Kind::Read) => FlockOperation::NonBlockingLockShared,
        Some(Kind::Write) => FlockOperation::NonBlockingLockExclusive,
        None => FlockOperation::NonBlockingUnlock,
    };
    rustix::fs::flock(file, operation)
}

/// A record lock whose owner is the open file `file`; `None` unlocks.
pub fn set(file: &OwnedFd, range: Range, kind: Option<Kind>) -> Result<(), Errno> {
    control(file, libc::F_OFD_SETLK, &mut describe(range, kind))
}

/// A lock that keeps `file` from having this one.
pub fn conflict(file: &OwnedFd, range: Range, kind: Kind) -> Result<Option<(Range, Kind)>, Errno> {
    let mut lock = describe(range, Some(kind));
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    let kind = match i32::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => Kind::Read,
        _ => Kind::Write,
    };
    let start = lock.l_start.max(0).cast_unsigned();
    let end = match lock.l_len {
        ..=0 => Range::LAST,
        length => start.saturating_add(length.cast_unsigned() - 1),
    };
    Ok(Some((Range { start, end }, kind)))
}

fn describe(range: Range, kind: Option<Kind>) -> libc::flock64 {
    let kind = match kind {
        Some(Kind::Read) => libc::F_RDLCK,
        Some(Kind::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    // SAFETY: a struct of numbers.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    // Each fits: they are 0, 1 and 2.
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = range.start.cast_signed();
    // No length means up to any end of the file.
    lock.l_len = match range.end {
        Range::LAST => 0,
        end => (end - range.start + 1).cast_signed(),
    };
    lock
}

fn control(file: &OwnedFd, command: i32, lock: &mut libc::flock64) -> Result<(), Errno> {
    // SAFETY: these commands take a pointer to a `flock64`, which is valid for the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
