//! A caller at the other end of a socket: Docker's streams, of which output and error share one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use hull_sandbox::config::TerminalSize;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::Target;
use crate::error::{Context, Result};

/// Bytes before each piece of output: which stream it is of, three zeros, its length (big endian).
pub(super) const HEAD: usize = 8;

/// The head of a piece of this length.
pub(super) fn head(target: Target, length: usize) -> [u8; HEAD] {
    let stream = match target {
        Target::Output => 1,
        Target::Error => 2,
    };
    // Pieces are short.
    let [a, b, c, d] = (length as u32).to_be_bytes();
    [stream, 0, 0, 0, a, b, c, d]
}

/// A caller at the other end of a socket.
#[derive(Debug)]
pub struct Remote {
    /// The socket.
    pub stream: OwnedFd,
    /// Input that has come already.
    pub early: Vec<u8>,
    /// Each piece of output says which stream it is of; those of a terminal do not.
    pub framed: bool,
    /// The caller's terminal.
    pub window: Arc<Window>,
    /// Wait for the process's end also when the caller has gone; its output is discarded then.
    pub follows_end: bool,
}

impl Remote {
    /// Tells the caller something, as if the process had written it, and that there is no more.
    pub fn say(&self, text: &str) {
        let mut piece = Vec::new();
        if self.framed {
            piece.extend(head(Target::Output, text.len()));
        }
        piece.extend(text.as_bytes());
        // The caller may have gone. A line fits into any socket.
        let _ = send(&self.stream, &piece, SendFlags::NOSIGNAL);
        self.end();
    }

    /// Tells the caller that there is no more. Input that nobody has read would look as if the
    /// connection had broken.
    pub(super) fn end(&self) {
        // The caller may have gone.
        let _ = shutdown(&self.stream, Shutdown::Write);
        let mut rest = [0; 4096];
        for _ in 0..1024 {
            match recv(&self.stream, &mut rest[..], RecvFlags::DONTWAIT) {
                Ok((1.., _)) => {}
                _ => return,
            }
        }
    }
}

/// The terminal of a caller elsewhere, whose size comes by another way than its bytes.
#[derive(Debug)]
pub struct Window {
    size: Mutex<Option<TerminalSize>>,
    changed: OwnedFd,
}

impl Window {
    /// One that has this size, if it is known.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new(size: Option<TerminalSize>) -> Result<Arc<Self>> {
        let changed = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .context(|| "make an event of a terminal's size")?;
        Ok(Arc::new(Self {
            size: Mutex::new(size),
            changed,
        }))
    }

    /// Its size.
    pub fn size(&self) -> Option<TerminalSize> {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives it another size.
    pub fn resize(&self, size: TerminalSize) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        // Fails only if it is told already.
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }

    /// Its size, when that has changed.
    pub(super) fn changed(&self) -> Option<TerminalSize> {
        let mut count = [0; 8];
        rustix::io::read(&self.changed, &mut count[..]).ok()?;
        self.size()
    }
}

impl AsFd for Window {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }
}
