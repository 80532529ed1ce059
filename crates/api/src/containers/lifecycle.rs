//! What is done to a container: started, stopped, waited for.

use std::os::fd::AsFd;

use hull_engine::container::{self, Down};
use hull_engine::lifecycle::{self, Stop};
use hull_engine::update::Update;
use hull_engine::values;
use hull_sandbox::timings::now_ns;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::create::cpus_milli;
use super::description::{RestartPolicy, parse_given};
use super::find;
use crate::Shared;
use crate::call::{Call, JSON, Reply};
use crate::failure::{Failure, Result};
use crate::starts::Condition;

/// Starts a container; connections that wait for it are attached from its first output on.
pub fn start(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    if call.query.get("checkpoint").is_some() {
        return Err(Failure::unsupported("checkpoints"));
    }
    let container = find(state, id)?;
    match crate::attach::start(state, &container)? {
        true => Ok(Reply::done()),
        false => Ok(Reply::Empty(StatusCode::NOT_MODIFIED)),
    }
}

fn how(call: &Call) -> Result<Stop> {
    let signal = call.query.get("signal");
    Ok(Stop {
        down: Down::ForGood,
        seconds: call.query.number("t")?,
        signal: signal
            .map(values::signal)
            .transpose()
            .map_err(Failure::bad)?,
    })
}

/// Stops a container.
pub fn stop(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let was_idle = container::is_idle(&container);
    lifecycle::stop(&state.config, &container.record.id, &how(call)?)?;
    Ok(match was_idle {
        true => Reply::Empty(StatusCode::NOT_MODIFIED),
        false => Reply::done(),
    })
}

/// Stops a container, if it runs, and starts it.
pub fn restart(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let id = &container.record.id;
    lifecycle::stop(&state.config, id, &how(call)?)?;
    lifecycle::start(&state.config, id, now_ns(), None)?;
    Ok(Reply::done())
}

/// Sends a signal.
pub fn kill(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let signal = call.query.get("signal").unwrap_or("KILL");
    let signal = values::signal(signal).map_err(Failure::bad)?;
    lifecycle::kill(&state.config.paths(), &container.record.id, signal)?;
    Ok(Reply::done())
}

/// Pauses a container, or lets it go on.
pub fn freeze(state: &Shared, id: &str, frozen: bool) -> Result<Reply> {
    let container = find(state, id)?;
    lifecycle::freeze(
        &state.config.paths(),
        &container.record.details.name,
        frozen,
    )?;
    Ok(Reply::done())
}

/// Gives a container another name.
pub fn rename(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let name = call.query.get("name").unwrap_or_default();
    let name = values::container_name(name.trim_start_matches('/')).map_err(Failure::bad)?;
    container::rename(&state.config.paths(), &container.record.id, &name)?;
    Ok(Reply::done())
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Changes {
    memory: i64,
    memory_swap: i64,
    nano_cpus: i64,
    cpu_shares: i64,
    cpu_period: i64,
    cpu_quota: i64,
    cpuset_mems: String,
    memory_reservation: i64,
    blkio_weight: i64,
    pids_limit: i64,
    cpuset_cpus: String,
    restart_policy: RestartPolicy,
}

/// Changes limits of a container.
pub fn update(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let changes: Changes = call.json()?;
    let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
    for (what, asked) in [
        ("CpusetMems", !changes.cpuset_mems.is_empty()),
        ("MemoryReservation", changes.memory_reservation > 0),
        ("BlkioWeight", changes.blkio_weight > 0),
    ] {
        if asked {
            return Err(Failure::unsupported(format_args!(
                "{what} of a container that is there: create it anew"
            )));
        }
    }
    let update = Update {
        memory: positive(changes.memory),
        cpus_milli: cpus_milli(changes.nano_cpus, changes.cpu_quota, changes.cpu_period),
        cpu_shares: positive(changes.cpu_shares),
        memory_swap: Some(changes.memory_swap).filter(|both| *both != 0),
        host_cpus: parse_given(&changes.cpuset_cpus, values::cpu_list)?,
        pids_limit: Some(changes.pids_limit).filter(|limit| *limit != 0),
        restart: changes.restart_policy.policy()?,
    };
    update.apply(&state.config, &container.record.id)?;
    Ok(Reply::ok(json!({"Warnings": []})))
}

/// Waits for the end of a container. The head of the answer is sent at once: clients start the
/// container when they have it.
pub fn wait(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let condition = match call.query.get("condition") {
        None | Some("not-running") => Condition::NotRunning,
        Some("next-exit") => Condition::NextExit,
        Some("removed") => Condition::Removed,
        Some(other) => return Err(Failure::bad(format!("invalid condition: {other:?}"))),
    };
    let waiter = state.starts.wait_for(&container);
    let mut stream = call.stream(JSON)?;
    let exit = waiter.wait(&state.config.paths(), condition, stream.as_fd());
    let answer = match exit {
        Ok(Some(exit)) => json!({"StatusCode": exit.status}),
        Ok(None) => return Ok(Reply::Taken),
        Err(error) => json!({"StatusCode": 125, "Error": {"Message": error.message}}),
    };
    // The caller may have gone.
    if stream.line(&answer).is_ok() {
        stream.finish();
    }
    Ok(Reply::Taken)
}
