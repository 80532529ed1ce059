//! The bytes of one output between the process and the host: read and not yet sent, and the last
//! ones that were sent, kept to be sent again when the connection breaks with them on their way.
//!
//! A ring that knows the place of each byte in the stream. Called by `relay`, one per output. It
//! takes memory as the output needs it, and at most [`MAX_SIZE`].

use std::io::IoSliceMut;
use std::os::fd::BorrowedFd;

use hull_protocol::STREAM_REPLAY;
use rustix::io::Result;
use rustix::net::SendFlags;

/// Most bytes that are read at once: the capacity of a pipe.
const PIECE: usize = 64 << 10;

/// First size: enough for the few lines of a short-lived command.
const FIRST_SIZE: usize = 512;

const MAX_SIZE: usize = STREAM_REPLAY + PIECE;

/// See the module. Places in the stream are counted from its beginning.
#[derive(Debug, Default)]
pub struct Replay {
    /// The byte at place `p` is at `p % ring.len()`.
    ring: Vec<u8>,
    /// Place of the oldest byte that is kept.
    start: u64,
    /// Place of the first byte that has not been sent.
    sent: u64,
    /// Place after the last byte.
    end: u64,
}

impl Replay {
    /// Whether there are bytes to be sent.
    pub fn has_unsent(&self) -> bool {
        self.sent < self.end
    }

    /// How many bytes are kept.
    pub fn len(&self) -> usize {
        // Never more than the ring has.
        (self.end - self.start) as usize
    }

    /// Reads once from `source`; 0 at its end. To be called when all has been sent.
    pub fn read_from(&mut self, source: BorrowedFd<'_>) -> Result<usize> {
        debug_assert!(!self.has_unsent(), "what is read would pile up");
        self.make_room();
        let free = self.ring.len() - self.len();
        let tail = self.index(self.end);
        let (front, back) = self.ring.split_at_mut(tail);
        let behind = back.len().min(free);
        let wrapped = free - behind;
        let mut slices = [
            IoSliceMut::new(&mut back[..behind]),
            IoSliceMut::new(&mut front[..wrapped]),
        ];
        let count = if wrapped == 0 { 1 } else { 2 };
        let length = rustix::io::readv(source, &mut slices[..count])?;
        self.end += length as u64;
        Ok(length)
    }

    /// Sends once what is unsent.
    pub fn send_to(&mut self, sink: BorrowedFd<'_>) -> Result<()> {
        let from = self.index(self.sent);
        let unsent = (self.end - self.sent) as usize;
        let piece = &self.ring[from..self.ring.len().min(from + unsent)];
        let length = rustix::net::send(sink, piece, SendFlags::NOSIGNAL)?;
        self.sent += length as u64;
        Ok(())
    }

    /// The places at which sending can go on: from the oldest byte kept to the first one unsent.
    pub fn sendable_from(&self) -> std::ops::RangeInclusive<u64> {
        self.start..=self.sent
    }

    /// Goes back (never forward) to a place, one of [`Replay::sendable_from`].
    pub fn rewind(&mut self, place: u64) {
        debug_assert!(self.sendable_from().contains(&place));
        self.sent = place.clamp(self.start, self.sent);
    }

    /// Keeps the bytes, and no more memory than they need: nothing will be read any more.
    pub fn shrink(&mut self) {
        self.resize(self.len());
    }

    /// Keeps no bytes.
    pub fn clear(&mut self) {
        self.ring = Vec::new();
        self.start = self.end;
        self.sent = self.end;
    }

    /// Drops what need not be kept, and grows if that frees too little.
    fn make_room(&mut self) {
        self.start = self
            .start
            .max(self.sent.saturating_sub(STREAM_REPLAY as u64));
        let size = self.ring.len();
        if size < MAX_SIZE && size - self.len() <= size / 4 {
            self.resize((size * 4).clamp(FIRST_SIZE, MAX_SIZE));
        }
    }

    /// Moves the bytes into a ring of another size, which has room for them.
    fn resize(&mut self, size: usize) {
        let mut ring = vec![0; size];
        let mut place = self.start;
        while place < self.end {
            let from = self.index(place);
            let to = (place % size as u64) as usize;
            let length = ((self.end - place) as usize)
                .min(self.ring.len() - from)
                .min(size - to);
            ring[to..to + length].copy_from_slice(&self.ring[from..from + length]);
            place += length as u64;
        }
        self.ring = ring;
    }

    fn index(&self, place: u64) -> usize {
        match self.ring.len() {
            0 => 0,
            size => (place % size as u64) as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pattern(range: std::ops::Range<u64>) -> Vec<u8> {
        range.map(|place| (place % 251) as u8).collect()
    }

    /// Passes `length` bytes of the pattern through a ring, in pieces, and checks what arrives.
    fn pass(replay: &mut Replay, length: u64, piece: u64) {
        let (mut process, source) = UnixStream::pair().unwrap();
        let (sink, mut host) = UnixStream::pair().unwrap();
        let end = replay.end + length;
        while replay.end < end {
            let from = replay.end;
            let until = end.min(from + piece);
            process.write_all(&pattern(from..until)).unwrap();
            while replay.end < until {
                replay.read_from(source.as_fd()).unwrap();
                send_all(replay, &sink);
            }
            assert_eq!(received(&mut host, until - from), pattern(from..until));
        }
    }

    fn send_all(replay: &mut Replay, sink: &UnixStream) {
        while replay.has_unsent() {
            replay.send_to(sink.as_fd()).unwrap();
        }
    }

    fn received(host: &mut UnixStream, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        host.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_was_sent_can_be_sent_again() {
        for (length, piece) in [
            (5, 5),
            (511, 7),
            (3000, 1000),
            (900_000, 60_000),
            (400_000, 999),
        ] {
            let mut replay = Replay::default();
            pass(&mut replay, length, piece);
            let kept = length.min(STREAM_REPLAY as u64);
            assert!(*replay.sendable_from().start() <= length - kept);
            assert_eq!(*replay.sendable_from().end(), length);
            for back in [0, 1, kept / 2, kept] {
                let (sink, mut host) = UnixStream::pair().unwrap();
                let place = length - back;
                replay.rewind(place);
                let reader = std::thread::spawn(move || received(&mut host, back));
                send_all(&mut replay, &sink);
                assert_eq!(reader.join().unwrap(), pattern(place..length));
            }
            // It continues from there.
            pass(&mut replay, 1000, 100);
        }
    }

    #[test]
    fn little_output_takes_little_memory_and_much_is_bounded() {
        let mut replay = Replay::default();
        pass(&mut replay, 100, 10);
        assert_eq!(replay.ring.len(), FIRST_SIZE);
        replay.shrink();
        assert_eq!((replay.ring.len(), replay.len()), (100, 100));
        assert_eq!(replay.sendable_from(), 0..=100);
        let mut replay = Replay::default();
        pass(&mut replay, 3 << 20, 50_000);
        assert_eq!(replay.ring.len(), MAX_SIZE);
        replay.clear();
        assert_eq!((replay.ring.len(), replay.len()), (0, 0));
        assert_eq!(replay.sendable_from(), 3 << 20..=3 << 20);
    }
}
