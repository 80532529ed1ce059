//! The bytes that ended outputs keep for connections that may still break, bounded over all of
//! them. Called by `output`.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use hull_protocol::ENDED_REPLAY;

use super::output::{Output, WeakOutput};

/// Outputs that have ended and keep bytes, the oldest first.
#[derive(Default)]
pub struct EndedOutputs {
    kept: Mutex<VecDeque<(WeakOutput, usize)>>,
}

impl EndedOutputs {
    /// Adds an output that keeps `length` bytes. The oldest ones drop theirs to make room.
    pub(super) fn add(&self, output: Output, length: usize) {
        if length == 0 {
            return;
        }
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        // An output may end again, after another attach.
        kept.retain(|(other, _)| other.is_alive() && !other.is(&output));
        kept.push_back((output.downgrade(), length));
        let mut total: usize = kept.iter().map(|(_, length)| length).sum();
        while total > ENDED_REPLAY
            && let Some((oldest, length)) = kept.pop_front()
        {
            oldest.forget();
            total -= length;
        }
    }
}
