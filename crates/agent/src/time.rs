//! The guest's wall clock. Called by everything that reports when something happened.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since 1970 UTC; 0 before that.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}
