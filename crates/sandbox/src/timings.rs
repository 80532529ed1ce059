//! Where the time of a start goes: what `hull run --timings` prints.
//!
//! Times are taken from the host's monotonic clock, which front end and sandbox process share.

use std::sync::{Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One step of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// When it began: monotonic clock, nanoseconds.
    pub begin_ns: u64,
    /// How long it took, nanoseconds.
    pub took_ns: u64,
}

/// The steps of one start, in the order in which they ended. Several tasks may add to it.
#[derive(Debug, Default)]
pub struct Timings(Mutex<Vec<Step>>);

/// The monotonic clock, nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The monotonic clock counts from boot: neither part is ever negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

impl Timings {
    /// Keeps a step that began at `begin_ns` and ends now.
    pub fn step(&self, name: &str, begin_ns: u64) {
        let step = Step {
            name: name.into(),
            begin_ns,
            took_ns: now_ns().saturating_sub(begin_ns),
        };
        self.steps_mut().push(step);
    }

    /// Measures something.
    pub async fn measure<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let begin = now_ns();
        let result = work.await;
        self.step(name, begin);
        result
    }

    /// The steps so far.
    pub fn steps(&self) -> Vec<Step> {
        self.steps_mut().clone()
    }

    fn steps_mut(&self) -> std::sync::MutexGuard<'_, Vec<Step>> {
        // A list of steps is valid at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
