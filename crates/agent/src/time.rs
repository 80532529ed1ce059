//! The guest's wall clock. Called by everything that reports when something happened.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970 UTC; 0 before that. From the C library: rustix needs a vDSO, which
/// user-mode Linux does not have.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| u64::try_from(time.as_nanos()).ok())
        .unwrap_or(0)
}
