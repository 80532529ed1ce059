//! A request's guest buffers: resolved, checked and bounded, with a cursor over each direction.
//!
//! [`Buffers::new`] turns a [`Chain`] into slices of guest memory, once: what the guest changes in
//! its descriptors afterwards has no effect. Devices copy small parts out and in, and let the host
//! kernel move bulk data between files and guest memory directly ([`Span::read_from`],
//! [`Span::write_to`]).
#![allow(unsafe_code)]

#[cfg(test)]
mod chain_tests;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_memory::{GuestMemory, VolatileSlice};

use crate::device::{Chain, Memory};

/// More descriptors than any valid request has: 1 MiB in single pages, and headers.
const MAX_SLICES: usize = 1024;
/// Size of the host's pages.
const PAGE: usize = 4096;
/// The most `iovec`s that one system call takes (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Why a chain has no usable buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// An address or length outside guest memory.
    #[error("buffer is outside guest memory")]
    OutOfRange,
    /// More parts than [`MAX_SLICES`].
    #[error("too many buffers")]
    TooMany,
    /// A readable buffer behind a writable one.
    #[error("readable buffer behind a writable one")]
    Order,
}

/// Both directions of one request.
pub struct Buffers<'m> {
    /// What the driver wrote for the device.
    pub readable: Span<'m>,
    /// Where the device writes its answer.
    pub writable: Span<'m>,
}

impl<'m> Buffers<'m> {
    /// Resolves `chain` in `memory`.
    pub fn new(memory: &'m Memory, chain: Chain) -> Result<Self, BadChain> {
        let mut readable = Vec::with_capacity(4);
        let mut writable = Vec::with_capacity(4);
        for descriptor in chain {
            let slices = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(BadChain::Order);
            };
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|_| BadChain::OutOfRange)?;
                if slices.len() == MAX_SLICES {
                    return Err(BadChain::TooMany);
                }
                slices.push(slice);
            }
        }
        Ok(Self {
            readable: Span::new(readable),
            writable: Span::new(writable),
        })
    }
}

/// Guest memory in one direction, consumed from the front.
pub struct Span<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// Index of the cursor's slice, and the position in it.
    slice: usize,
    offset: usize,
    remaining: usize,
    consumed: usize,
}

impl<'m> Span<'m> {
    fn new(slices: Vec<VolatileSlice<'m>>) -> Self {
        // Cannot overflow: the chain ends where its descriptors' sum would exceed 32 bits.
        let remaining = slices.iter().map(VolatileSlice::len).sum();
        Self {
            slices,
            slice: 0,
            offset: 0,
            remaining,
            consumed: 0,
        }
    }

    /// Bytes from the cursor to the end.
    pub fn remaining(&self) -> usize {
        self.remaining
    }

    /// Bytes before the cursor.
    pub fn consumed(&self) -> usize {
        self.consumed
    }

    /// Drops what backs the whole pages of the rest, which the driver does not use any more: they
    /// read as zeros, or as the file that backs them.
    ///
    /// # Errors
    /// The kernel's, for example where the memory is locked. What was dropped stays so.
    pub fn discard(&self) -> Result<(), Errno> {
        for piece in self.pieces(self.remaining) {
            let pointer = piece.ptr_guard_mut();
            let start = (pointer.as_ptr() as usize).next_multiple_of(PAGE);
            let end = (pointer.as_ptr() as usize + piece.len()) / PAGE * PAGE;
            if start >= end {
                continue;
            }
            // SAFETY: the range is within a slice of guest memory, to which nothing has references
            // and whose content may change at any time.
            unsafe {
                rustix::mm::madvise(
                    start as *mut std::ffi::c_void,
                    end - start,
                    rustix::mm::Advice::LinuxDontNeed,
                )?;
            }
        }
        Ok(())
    }

    /// Splits off and returns what lies more than `length` bytes behind the cursor.
    pub fn split_off(&mut self, length: usize) -> Span<'m> {
        let mut tail = Span {
            slices: self.slices.clone(),
            slice: self.slice,
            offset: self.offset,
            remaining: self.remaining,
            consumed: 0,
        };
        tail.advance(length);
        tail.consumed = 0;
        self.remaining = self.remaining.min(length);
        tail
    }

    /// Moves the cursor, at most to the end.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.remaining);
        self.remaining -= left;
        self.consumed += left;
        while left > 0 {
            let Some(slice) = self.slices.get(self.slice) else {
                return;
            };
            let here = slice.len() - self.offset;
            if left < here {
                self.offset += left;
                return;
            }
            left -= here;
            self.slice += 1;
            self.offset = 0;
        }
    }

    /// The slices from the cursor on, at most `limit` bytes.
    fn pieces(&self, limit: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut left = limit.min(self.remaining);
        let mut offset = self.offset;
        self.slices[self.slice.min(self.slices.len())..]
            .iter()
            .map_while(move |slice| {
                if left == 0 {
                    return None;
                }
                let count = left.min(slice.len() - offset);
                // In range by the line above.
                let piece = slice.subslice(offset, count).ok()?;
                offset = 0;
                left -= count;
                Some(piece)
            })
    }

    /// Copies from the cursor into `bytes` and moves on; copies less than asked for only at the
    /// end.
    pub fn copy_to(&mut self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for piece in self.pieces(bytes.len()) {
            copied += piece.copy_to(&mut bytes[copied..]);
        }
        self.advance(copied);
        copied
    }

    /// Fills `bytes` from the cursor; `None` (and nothing consumed) when less is left.
    pub fn take_exact(&mut self, bytes: &mut [u8]) -> Option<()> {
        if self.remaining < bytes.len() {
            return None;
        }
        self.copy_to(bytes);
        Some(())
    }

    /// Copies `bytes` to the cursor and moves on; as much as fits.
    pub fn copy_from(&mut self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for piece in self.pieces(bytes.len()) {
            let count = piece.len();
            piece.copy_from(&bytes[copied..copied + count]);
            copied += count;
        }
        self.advance(copied);
        copied
    }

    /// Reads up to `count` bytes of `file` at `position` into the span; less only at the end of the
    /// file or span.
    pub fn read_from(
        &mut self,
        file: BorrowedFd<'_>,
        count: usize,
        position: u64,
    ) -> Result<usize, Errno> {
        partial(self.transfer(Transfer::Read, file, count, position))
    }

    /// As [`Span::read_from`], but without waiting for storage: `EAGAIN` if it would have to wait,
    /// `EOPNOTSUPP` if the file cannot tell. The span must not be used after such an error.
    pub fn read_cached(
        &mut self,
        file: BorrowedFd<'_>,
        count: usize,
        position: u64,
    ) -> Result<usize, Errno> {
        let (moved, end) = self.transfer(Transfer::ReadCached, file, count, position);
        end.map(|()| moved)
    }

    /// Writes up to `count` bytes of the span to `file` at `position`; less only at the span's end,
    /// or when the host takes no more (`RLIMIT_FSIZE`, no space).
    pub fn write_to(
        &mut self,
        file: BorrowedFd<'_>,
        count: usize,
        position: u64,
    ) -> Result<usize, Errno> {
        partial(self.transfer(Transfer::Write, file, count, position))
    }

    /// Writes `before` and all of the span with one call, as one message. `EMSGSIZE` if there are
    /// more pieces than one call takes.
    pub fn write_behind(&mut self, file: BorrowedFd<'_>, before: &[u8]) -> Result<usize, Errno> {
        let first = libc::iovec {
            iov_base: before.as_ptr().cast_mut().cast(),
            iov_len: before.len(),
        };
        let rest = self.pieces(usize::MAX).map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        });
        let iovecs: Vec<libc::iovec> = std::iter::once(first).chain(rest).collect();
        if iovecs.len() > MAX_IOVECS {
            return Err(Errno::MSGSIZE);
        }
        let count = iovecs.len() as libc::c_int;
        // SAFETY: the iovecs describe memory of this process and of the guest that outlives the
        // call and is only read; the guest may change its own meanwhile, which does not affect the
        // kernel.
        let written = unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count) };
        match usize::try_from(written) {
            Ok(written) => Ok(written),
            Err(_) => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }

    /// Repeats until everything is moved, nothing more moves, or it fails; returns the bytes moved
    /// and the result.
    fn transfer(
        &mut self,
        how: Transfer,
        file: BorrowedFd<'_>,
        count: usize,
        position: u64,
    ) -> (usize, Result<(), Errno>) {
        let total = count.min(self.remaining);
        let mut done = 0;
        while done < total {
            let at = position.checked_add(done as u64);
            let Some(at) = at.and_then(|at| i64::try_from(at).ok()) else {
                return (done, Err(Errno::INVAL));
            };
            let iovecs: Vec<libc::iovec> = self
                .pieces(total - done)
                .take(MAX_IOVECS)
                .map(|piece| libc::iovec {
                    iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                    iov_len: piece.len(),
                })
                .collect();
            let Ok(moved) = usize::try_from(how.call(file, &iovecs, at)) else {
                match Errno::from_io_error(&io::Error::last_os_error()) {
                    Some(Errno::INTR) => continue,
                    error => return (done, Err(error.unwrap_or(Errno::IO))),
                }
            };
            if moved == 0 {
                break;
            }
            self.advance(moved);
            done += moved;
        }
        (done, Ok(()))
    }
}

/// How bytes move between a file and guest memory.
#[derive(Clone, Copy)]
enum Transfer {
    Read,
    /// Reads what is in the page cache only.
    ReadCached,
    Write,
}

impl Transfer {
    /// One system call at `position`, with at most [`MAX_IOVECS`] pieces of guest memory.
    fn call(self, file: BorrowedFd<'_>, iovecs: &[libc::iovec], position: i64) -> isize {
        let file = file.as_raw_fd();
        let (pieces, count) = (iovecs.as_ptr(), iovecs.len() as libc::c_int);
        // SAFETY: the iovecs describe guest memory that outlives the call; the guest may change it
        // meanwhile, which does not affect the kernel, and nothing here keeps references into it.
        unsafe {
            match self {
                Self::Read => libc::preadv64(file, pieces, count, position),
                Self::ReadCached => libc::preadv2(file, pieces, count, position, libc::RWF_NOWAIT),
                Self::Write => libc::pwritev64(file, pieces, count, position),
            }
        }
    }
}

/// Bytes moved before an error take precedence; the next call reports the error.
fn partial((moved, end): (usize, Result<(), Errno>)) -> Result<usize, Errno> {
    match end {
        Err(error) if moved == 0 => Err(error),
        _ => Ok(moved),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    /// Three slices of 10 bytes, 100 apart, that count up.
    fn span(memory: &Memory) -> Span<'_> {
        let bytes: Vec<u8> = (0..30).collect();
        let slices = (0..3u8).map(|part| {
            let at = GuestAddress(u64::from(part) * 100);
            let from = usize::from(part) * 10;
            memory.write_slice(&bytes[from..from + 10], at).unwrap();
            memory.get_slice(at, 10).unwrap()
        });
        Span::new(slices.collect())
    }

    fn memory() -> Memory {
        Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap())
    }

    #[test]
    fn copies_cross_slices() {
        let memory = memory();
        let mut span = span(&memory);
        let mut bytes = [0; 12];
        span.take_exact(&mut bytes).unwrap();
        assert_eq!(bytes[11], 11);
        assert_eq!((span.remaining(), span.consumed()), (18, 12));
        assert!(span.take_exact(&mut [0; 19]).is_none());
        assert_eq!(span.remaining(), 18);
        assert_eq!(span.copy_from(&[0xff; 30]), 18);
        assert_eq!(span.copy_to(&mut bytes), 0);
        let byte: u8 = memory.read_obj(GuestAddress(101)).unwrap();
        assert_eq!(byte, 11);
        let byte: u8 = memory.read_obj(GuestAddress(102)).unwrap();
        assert_eq!(byte, 0xff);
    }

    #[test]
    fn a_split_span_is_two() {
        let memory = memory();
        let mut front = span(&memory);
        front.advance(5);
        let mut back = front.split_off(7);
        assert_eq!((front.remaining(), back.remaining()), (7, 18));
        let mut bytes = [0; 30];
        assert_eq!(back.copy_to(&mut bytes), 18);
        assert_eq!(bytes[0], 12);
        assert_eq!(front.copy_to(&mut bytes), 7);
        assert_eq!(bytes[6], 11);
        let mut none = front.split_off(100);
        assert_eq!(none.copy_to(&mut bytes), 0);
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        assert_eq!(span(&memory).write_to(file.as_fd(), 25, 3), Ok(25));
        assert_eq!(file.metadata().unwrap().len(), 28);
        let mut span = span(&memory);
        // To the end of the file and no further.
        assert_eq!(span.read_from(file.as_fd(), 30, 8), Ok(20));
        let byte: u8 = memory.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(byte, 5);
        assert_eq!(span.read_from(file.as_fd(), 1, u64::MAX), Err(Errno::INVAL));
        assert_eq!(span.read_from(file.as_fd(), 1, 1 << 40), Ok(0));
    }
}
