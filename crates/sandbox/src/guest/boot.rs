//! From a started machine to an agent that is configured, and how long anything may take.

use std::time::Duration;

use hull_machine::Features;
use hull_protocol::agent as proto;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Context, Result};
use crate::store::unix_time_ns;

/// Longest boot. Emulation on a busy host needs its time; beyond this nothing comes any more.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a guest may take to write its file systems back when its container has ended.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// The death of a process may be reported this long after the errors that it causes.
pub const EXIT_GRACE: Duration = Duration::from_millis(300);

/// The end of a machine may be reported this long after the loss of its agent: networks are left
/// before.
pub const MACHINE_EXIT_GRACE: Duration = Duration::from_secs(5);

/// What a booted guest is told before its first container.
///
/// # Errors
/// The host has no random numbers.
pub fn configuration(features: &Features, hostname: &str) -> Result<proto::ConfigureRequest> {
    let mut entropy = vec![0; 64];
    getrandom(&mut entropy[..], GetRandomFlags::empty()).context(|| "get random numbers")?;
    let clock_ns = match features.host_clock {
        true => 0,
        false => unix_time_ns(),
    };
    Ok(proto::ConfigureRequest {
        hostname: hostname.into(),
        clock_ns,
        entropy,
        ..Default::default()
    })
}
