//! `state`, `list`, `ps`, `events`.

use hull_sandbox::error::{Failure, Result};
use hull_sandbox::pod::Status;
use hull_sandbox::pod::wire::{Reply, Request};
use hull_sandbox::wire::Stats;
use serde_json::Value;

use super::Settings;
use super::life::load;
use crate::container;

/// The state of a container, as the specification writes it.
///
/// # Errors
/// There is no such container.
pub fn state(settings: &Settings, id: &str) -> Result<Value> {
    let (_, record, status) = load(settings, id)?;
    let pid = match status {
        Status::Stopped => 0,
        _ => record.keeper,
    };
    Ok(container::state(&record, status, pid))
}

/// A line of `list`.
pub type Listed = Value;

/// The states of all containers. One that cannot be read is named on `warn` and does not hide the others.
///
/// # Errors
/// The state directory cannot be read.
pub fn list(settings: &Settings) -> Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for container in settings.root.list()? {
        match state(settings, &container.id) {
            Ok(state) => listed.push(state),
            // One that is just being removed.
            Err(_) if !container.directory.exists() => {}
            Err(failure) => (settings.warn)(&failure.message),
        }
    }
    Ok(listed)
}

/// Process ids on the host that stand for a container's processes: its keepers.
///
/// # Errors
/// It does not run.
pub fn processes(settings: &Settings, id: &str) -> Result<Vec<i32>> {
    let (_, record, status) = load(settings, id)?;
    if status == Status::Stopped {
        return Ok(Vec::new());
    }
    let request = Request::Keepers {
        container: id.to_owned(),
    };
    match record.connect()?.ask(&request, &[])?.message {
        Reply::Keepers(pids) => Ok(pids),
        other => Err(unexpected(&other)),
    }
}

/// Figures of a container.
///
/// # Errors
/// It does not run.
pub fn stats(settings: &Settings, id: &str) -> Result<Stats> {
    let (_, record, status) = load(settings, id)?;
    if status == Status::Stopped {
        return Err(Failure::new(format!("container {id} is not running")));
    }
    let request = Request::Stats {
        container: id.to_owned(),
    };
    match record.connect()?.ask(&request, &[])?.message {
        Reply::Stats(stats) => Ok(*stats),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> Failure {
    Failure::new(format!("the sandbox process answered {reply:?}"))
}
