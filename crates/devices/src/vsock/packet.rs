//! vsock packets: the header as plain values, and a packet's place in guest memory as a list of
//! slices.
//!
//! The header is copied out of guest memory once, so nothing can change between check and use. Data
//! stays where it is: [`Slices`] locates it, whatever the descriptors look like (header and data
//! merged in one, apart, or data in many as the driver does for zero-copy sends). Used by the
//! device and the multiplexer; no I/O here.

use vm_memory::{GuestMemory, VolatileSlice};

use crate::device::{Chain, Memory};

/// Bytes of a header in guest memory: `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6).
pub const HEADER_SIZE: usize = 44;

/// The host's context ID, by definition.
pub const HOST_CID: u64 = 2;
/// The guest's context ID: a sandbox has one guest.
pub const GUEST_CID: u64 = 3;

/// The only socket type offered; sequenced packets are not negotiated.
pub const TYPE_STREAM: u16 = 1;

/// Operations of a packet.
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses, aborts, or confirms the end of a connection.
    pub const RST: u16 = 3;
    /// Announces that the sender will not send, or not receive, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Carries nothing but the sender's credit, which is in every header.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a `CREDIT_UPDATE`.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `SHUTDOWN`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `SHUTDOWN`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// `SHUTDOWN`: both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// More slices than any driver needs for a packet of 64 KiB; a chain beyond that is malformed.
const MAX_SLICES: usize = 256;

/// Header of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data that follow.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, see [`op`].
    pub op: u16,
    /// Meaning depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that have left the sender's receive buffer.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the wire format, little endian.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Writes the wire format.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// A sequence of bytes in guest memory (or, in tests, in any memory), as the pieces it lies in.
#[derive(Clone, Debug, Default)]
pub struct Slices<'a> {
    pieces: Vec<VolatileSlice<'a, ()>>,
    len: usize,
}

impl<'a> Slices<'a> {
    /// What the chain's descriptors cover. `None` when the chain is malformed: it mixes directions,
    /// points outside of guest memory, or has too many pieces.
    pub fn of_chain(memory: &'a Memory, chain: Chain, writable: bool) -> Option<Self> {
        let mut slices = Self::default();
        for descriptor in chain {
            if descriptor.is_write_only() != writable {
                return None;
            }
            for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                if slices.pieces.len() == MAX_SLICES {
                    return None;
                }
                slices.push(piece.ok()?);
            }
        }
        Some(slices)
    }

    /// Appends a piece.
    pub fn push(&mut self, piece: VolatileSlice<'a, ()>) {
        self.len = self.len.saturating_add(piece.len());
        self.pieces.push(piece);
    }

    /// The pieces, in order.
    pub fn pieces(&self) -> &[VolatileSlice<'a, ()>] {
        &self.pieces
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        if count >= self.len {
            return;
        }
        let mut left = count;
        self.pieces.retain_mut(|piece| {
            let take = left.min(piece.len());
            left -= take;
            // `take` is at most the piece's length, so the first half always exists.
            match piece.split_at(take) {
                Ok((head, _)) if take > 0 => {
                    *piece = head;
                    true
                }
                _ => false,
            }
        });
        self.len = count;
    }

    /// Drops the first `count` bytes.
    pub fn skip(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        self.pieces.retain_mut(|piece| {
            let drop = left.min(piece.len());
            left -= drop;
            match piece.offset(drop) {
                Ok(rest) if drop < piece.len() => {
                    *piece = rest;
                    true
                }
                _ => false,
            }
        });
    }

    /// Copies the first bytes out and drops them; false, with nothing dropped, when there are
    /// fewer.
    pub fn take(&mut self, bytes: &mut [u8]) -> bool {
        if self.len < bytes.len() {
            return false;
        }
        let mut at = 0;
        for piece in &self.pieces {
            at += piece.copy_to(&mut bytes[at..]);
        }
        self.skip(bytes.len());
        true
    }

    /// Copies `bytes` over the first bytes; false, with nothing written, when there are fewer.
    pub fn put(&self, bytes: &[u8]) -> bool {
        if self.len < bytes.len() {
            return false;
        }
        let mut at = 0;
        for piece in &self.pieces {
            let count = piece.len().min(bytes.len() - at);
            piece.copy_from(&bytes[at..at + count]);
            at += count;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn slices(parts: &mut [Vec<u8>]) -> Slices<'_> {
        let mut slices = Slices::default();
        for part in parts {
            slices.push(VolatileSlice::from(part.as_mut_slice()));
        }
        slices
    }

    fn content(slices: &Slices<'_>) -> Vec<u8> {
        let mut bytes = vec![0; slices.len()];
        assert!(slices.clone().take(&mut bytes));
        bytes
    }

    #[test]
    fn header_keeps_every_field() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 0x1112_1314_1516_1718,
            src_port: 0x2122_2324,
            dst_port: 0x3132_3334,
            len: 0x4142_4344,
            kind: 0x5152,
            op: 0x6162,
            flags: 0x7172_7374,
            buf_alloc: 0x8182_8384,
            fwd_cnt: 0x9192_9394,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[0], 8, "little endian");
        assert_eq!(bytes[30], 0x62, "operation is at offset 30");
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn slices_cut_anywhere() {
        let whole: Vec<u8> = (0..30).collect();
        for cut in 0..=31usize {
            let mut parts = vec![
                (0..10).collect(),
                vec![],
                (10..13).collect(),
                (13..30).collect(),
            ];
            let mut head = slices(&mut parts);
            let mut tail = head.clone();
            head.truncate(cut);
            tail.skip(cut);
            let at = cut.min(30);
            assert_eq!(content(&head), whole[..at]);
            assert_eq!(content(&tail), whole[at..]);
            assert_eq!((head.len(), tail.len()), (at, 30 - at));
        }
    }

    #[test]
    fn put_and_take_cross_pieces() {
        let mut parts = vec![vec![0; 3], vec![0; 40], vec![0; 10]];
        let mut all = slices(&mut parts);
        assert!(all.put(&[7; 44]));
        assert!(!all.put(&[7; 54]));
        let mut bytes = [0; 44];
        assert!(all.take(&mut bytes));
        assert_eq!(bytes, [7; 44]);
        assert_eq!(content(&all), [0; 9]);
        assert!(!all.take(&mut [0; 10]));
        assert_eq!(all.len(), 9);
    }
}
