//! What every sandbox process does between starting a machine and the first container in it, and how long anything
//! may take.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use hull_machine::Features;
use hull_protocol::AGENT_PORT;
use hull_protocol::agent as proto;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::signal::unix::{SignalKind, signal};

use super::agent::Agent;
use super::devices::Incoming;
use crate::error::{Context, Failure, Result};

/// Longest boot. Emulation on a busy host needs its time; beyond this nothing comes any more.
pub const BOOT_TIME: Duration = Duration::from_secs(90);

/// How long a guest may take to write its file systems back when its container has ended.
pub const SHUTDOWN_TIME: Duration = Duration::from_secs(10);

/// How long the end of a process may follow what it makes fail.
pub const BREAK_TIME: Duration = Duration::from_millis(50);

/// How long the end of a machine may follow the loss of its agent.
pub const DEATH_TIME: Duration = Duration::from_millis(500);

/// Waits until the agent dials home.
///
/// # Errors
/// The device process has ended.
pub async fn agent_dials(mut incoming: Incoming) -> Result<Agent> {
    loop {
        match incoming.recv().await {
            Some((AGENT_PORT, stream)) => return Agent::new(stream),
            Some(_) => {}
            None => return Err(Failure::new("the device process has ended")),
        }
    }
}

/// Whether a kernel parameter belongs to a network namespace. Those of the guest's own are set by [`configuration`].
pub fn is_network_sysctl(name: &str) -> bool {
    name.starts_with("net.")
}

/// The parameters among `sysctl` that belong to a network namespace.
pub fn network_sysctls(sysctl: Option<&HashMap<String, String>>) -> BTreeMap<String, String> {
    sysctl
        .into_iter()
        .flatten()
        .filter(|(name, _)| is_network_sysctl(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

/// What a booted guest is told before its first container.
///
/// # Errors
/// The host has no random numbers.
pub fn configuration(
    features: &Features,
    hostname: &str,
    sysctl: BTreeMap<String, String>,
) -> Result<proto::ConfigureRequest> {
    let mut entropy = vec![0; 64];
    getrandom(&mut entropy[..], GetRandomFlags::empty()).context(|| "get random numbers".into())?;
    let clock_ns = match features.host_clock {
        true => 0,
        false => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or_default()),
    };
    Ok(proto::ConfigureRequest {
        sysctl: sysctl.into_iter().collect(),
        hostname: hostname.into(),
        clock_ns,
        entropy,
        ..Default::default()
    })
}

/// Waits for SIGTERM.
pub async fn told_to_end() {
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(error) => {
            tracing::error!("cannot listen for SIGTERM: {error}");
            std::future::pending().await
        }
    }
}
