//! What a pull reports while it works, so that a command line can draw bars.
//!
//! The store calls it, from several threads at once; the callee must be quick and must not call the
//! store. An image that is already here reports nothing.

use crate::digest::Digest;

/// Receives reports. `()` ignores them.
pub trait Progress: Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

impl Progress for () {
    fn event(&self, _: Event<'_>) {}
}

/// One report.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The image is not here; it is being fetched. Sent once, first.
    Started {
        /// The image, as the user wrote it.
        reference: &'a str,
        /// How many layers it has.
        layers: usize,
    },
    /// A layer moved on.
    Layer {
        /// The layer, by the digest that the manifest gives it.
        digest: &'a Digest,
        /// What happens with it.
        state: LayerState,
    },
    /// The image is complete. Sent once, last; never after an error.
    Finished,
}

/// What happens with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// It was unpacked here before.
    Present,
    /// Another process works on it; this one waits for the result.
    Waiting,
    /// Bytes arrived.
    Downloading {
        /// So far, those of an interrupted pull included.
        done: u64,
        /// In all.
        total: u64,
    },
    /// Files are written.
    Unpacking {
        /// Bytes of the (compressed) layer read so far.
        done: u64,
        /// In all; 0 when unknown.
        total: u64,
    },
    /// It is ready.
    Done,
}
