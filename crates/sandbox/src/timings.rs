//! Where the time of a start goes: what `hull run --timings` prints.
//!
//! Times are taken from the host's monotonic clock, which the command and the sandbox process share.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// One step of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub name: String,
    /// Microseconds from the beginning of the command to the beginning of the step.
    pub begin_us: u64,
    /// Microseconds that the step took.
    pub took_us: u64,
}

/// The steps of one start, in the order in which they ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Monotonic clock at time zero, nanoseconds.
    pub began_ns: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

/// The monotonic clock, nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The monotonic clock counts from boot: neither part is ever negative.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

impl Timings {
    /// Timings with their zero at `began_ns`.
    pub fn since(began_ns: u64) -> Self {
        Self {
            began_ns,
            steps: Vec::new(),
        }
    }

    /// Keeps a step that began at `begin_ns` and ends now.
    pub fn step(&mut self, name: &str, begin_ns: u64) {
        self.steps.push(Step {
            name: name.into(),
            begin_us: begin_ns.saturating_sub(self.began_ns) / 1000,
            took_us: now_ns().saturating_sub(begin_ns) / 1000,
        });
    }
}
