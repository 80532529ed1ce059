//! Progress reports of a pull, a push or an archive, for progress bars.
//!
//! Called by the store, from several threads at once; the callee must be quick and must not call
//! the store. An image that is already present reports nothing.

use crate::digest::Digest;

/// Receives progress events. `()` ignores them.
pub trait Progress: Sync {
    /// An event.
    fn event(&self, event: Event<'_>);
}

impl Progress for () {
    fn event(&self, _: Event<'_>) {}
}

/// A progress event.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The image is being fetched, or given away. Sent once, first.
    Started {
        /// The image, as the user wrote it.
        reference: &'a str,
        /// How many layers it has.
        layers: usize,
    },
    /// A layer's state changed.
    Layer {
        /// Digest of the layer in the manifest; of its uncompressed archive when it is given away.
        digest: &'a Digest,
        /// The layer's new state.
        state: LayerState,
    },
    /// The image is complete. Sent once, last; never after an error.
    Finished,
}

/// State of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// It is there already.
    Present,
    /// Another process is creating it; this one waits.
    Waiting,
    /// The layer is being downloaded.
    Downloading {
        /// Bytes so far, including those of an interrupted pull.
        done: u64,
        /// Size in bytes.
        total: u64,
    },
    /// The layer is being unpacked.
    Unpacking {
        /// Bytes of the (compressed) layer read so far.
        done: u64,
        /// Size in bytes; 0 if unknown.
        total: u64,
    },
    /// The layer's archive is being created again, to be saved or pushed.
    Packing {
        /// Bytes so far.
        done: u64,
        /// Size in bytes.
        total: u64,
    },
    /// The layer is being sent to a registry.
    Uploading {
        /// Bytes so far.
        done: u64,
        /// Size in bytes.
        total: u64,
    },
    /// It is ready.
    Done,
}
