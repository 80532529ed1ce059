//! A pipe between two threads. Unlike one of the operating system it never raises a signal: writing
//! fails with an error when the reader is gone.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Number of buffered chunks.
const DEPTH: usize = 16;

pub(super) struct Writer(SyncSender<Vec<u8>>);

pub(super) struct Reader {
    pieces: Receiver<Vec<u8>>,
    piece: Vec<u8>,
    used: usize,
}

/// Both ends of a new pipe.
pub(super) fn pipe() -> (Writer, Reader) {
    let (sender, pieces) = sync_channel(DEPTH);
    (
        Writer(sender),
        Reader {
            pieces,
            piece: Vec::new(),
            used: 0,
        },
    )
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // An empty chunk would be read as the end.
        if !bytes.is_empty() {
            self.0
                .send(bytes.to_vec())
                .map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.piece.len() {
            match self.pieces.recv() {
                Ok(piece) => (self.piece, self.used) = (piece, 0),
                Err(_) => return Ok(0),
            }
        }
        let length = buffer.len().min(self.piece.len() - self.used);
        buffer[..length].copy_from_slice(&self.piece[self.used..self.used + length]);
        self.used += length;
        Ok(length)
    }
}
