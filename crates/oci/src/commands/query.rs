//! `state`, `list`, `ps`, `events`.

use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::error::{Error, Result};
use hull_sandbox::metrics::Metrics;
use hull_sandbox::store::State;
use serde_json::Value;

use super::Settings;
use super::life::load;
use crate::container;

/// The OCI state of a container.
///
/// # Errors
/// `NotFound` if there is no such container.
pub fn state(settings: &Settings, id: &str) -> Result<Value> {
    let (_, record, status) = load(settings, id)?;
    let pid = match status {
        State::Stopped => 0,
        _ => record.details.keeper.pid,
    };
    Ok(container::state(&record, status, pid))
}

/// An entry of `list`.
pub type Listed = Value;

/// The states of all containers. Containers that cannot be read are reported with `warn` and left
/// out.
///
/// # Errors
/// The state directory cannot be read.
pub fn list(settings: &Settings) -> Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for container in settings.root.list()? {
        match state(settings, &container.id) {
            Ok(state) => listed.push(state),
            // It was removed meanwhile.
            Err(_) if !container.directory.is_there() => {}
            Err(failure) => (settings.warn)(&failure.message),
        }
    }
    Ok(listed)
}

/// Process ids of a container's keepers, which represent its processes on the host; none if it has
/// stopped.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if its sandbox has ended.
pub fn processes(settings: &Settings, id: &str) -> Result<Vec<i32>> {
    let (_, record, status) = load(settings, id)?;
    if status == State::Stopped {
        return Ok(Vec::new());
    }
    let request = Request::Keepers {
        container: id.to_owned(),
    };
    match container::connect(&record)?.ask(&request, &[])?.message {
        Reply::Keepers(pids) => Ok(pids),
        other => Err(unexpected(&other)),
    }
}

/// Metrics of a container.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if it has stopped.
pub fn metrics(settings: &Settings, id: &str) -> Result<Metrics> {
    let (_, record, status) = load(settings, id)?;
    if status == State::Stopped {
        return Err(Error::wrong_state(format!("container {id} is not running")));
    }
    let request = Request::Metrics {
        container: id.to_owned(),
    };
    match container::connect(&record)?.ask(&request, &[])?.message {
        Reply::Metrics(metrics) => Ok(*metrics),
        other => Err(unexpected(&other)),
    }
}
