//! Whether there is anything to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Connections, requests and what goes on after them.
#[derive(Debug, Default)]
pub struct Busy(Arc<AtomicUsize>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Busy {
    /// One more.
    pub fn count(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self.0.clone())
    }

    /// Whether there are any.
    pub fn is_any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
