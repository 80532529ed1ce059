//! What is done to containers that are there: start, stop, kill, pause, prune.

use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::signals;
use hull_sandbox::store::State;
use hull_sandbox::timings::Timings;

use crate::attach::Attachment;
use crate::config::Config;
use crate::container::{self, Container, Down, Removing};
use crate::error::{Error, Result};
use crate::listing::PruneFilter;
use crate::paths::Paths;
use crate::run::{Attempt, Outcome, start_again};
use crate::{supervise, usage};

const SIGKILL: u32 = 9;

const SIGTERM: u32 = 15;

/// How a start went.
#[derive(Debug)]
pub enum Start {
    /// It ran already.
    Running,
    /// It was started, or a signal came before that.
    Done(Outcome),
}

/// Starts a container, if it does not run. One that is removed when it ends is removed when it
/// cannot be started, too.
///
/// # Errors
/// It cannot be started.
pub fn start(
    config: &Config,
    name: &str,
    began_ns: u64,
    attachment: Option<&Attachment>,
) -> Result<Start> {
    let timings = Timings::default();
    match Attempt::prepare(name, config, began_ns, &timings)? {
        Attempt::Running(container) => {
            supervise::keep_up(config, &container)?;
            Ok(Start::Running)
        }
        Attempt::Again(again) => {
            let options = again.run().options().clone();
            let id = again.run().id().to_owned();
            let started = start_again(*again, config, attachment);
            if started.is_err() && options.remove {
                let removing = Removing {
                    force: false,
                    volumes: true,
                };
                if let Err(error) = container::remove(&config.paths(), &id, removing) {
                    tracing::warn!("{error}");
                }
            }
            started
                .map(Start::Done)
                .map_err(|error| options.in_users_words(error))
        }
    }
}

/// How long a stop waits for a container, as was asked for with it.
fn timeout(container: &Container, config: &Config) -> i64 {
    let options = container.record.details.options.as_ref();
    let asked = options.and_then(|options| options.stop_timeout);
    asked.unwrap_or(config.stop_timeout)
}

/// How a container is stopped.
#[derive(Debug, Default)]
pub struct Stop {
    /// How long it stays down.
    pub down: Down,
    /// How long it may take, seconds; for ever below zero. Without it, as was asked for with the
    /// container.
    pub seconds: Option<i64>,
    /// The first signal, instead of the container's.
    pub signal: Option<u32>,
}

/// Stops a container, if it runs, which then stays down. Returns what it was before.
///
/// # Errors
/// It does not stop.
pub fn stop(config: &Config, name: &str, stop: &Stop) -> Result<Container> {
    let paths = config.paths();
    let container = container::keep_down(&paths, container::find(&paths, name)?, stop.down)?;
    let seconds = stop.seconds.unwrap_or_else(|| timeout(&container, config));
    // Below zero it is waited for without an end.
    let timeout_ms = match u64::try_from(seconds) {
        Ok(seconds) => seconds.saturating_mul(1000),
        Err(_) => u64::MAX,
    };
    if !container::is_idle(&container)
        && let Err(error) = ask(&container, stop.signal, timeout_ms)
    {
        // Exited by itself meanwhile, and may have been removed: the goal is reached.
        let now = container::load(&paths, &container.record.id)?;
        if now.is_some_and(|now| !container::is_idle(&now)) {
            return Err(error);
        }
    }
    Ok(container)
}

fn ask(container: &Container, signal: Option<u32>, timeout_ms: u64) -> Result<()> {
    let own = || signals::parse(&container.record.details.stop_signal).unwrap_or(SIGTERM);
    let request = Request::Stop {
        container: container.record.id.clone(),
        signal: signal.unwrap_or_else(own),
        timeout_ms,
    };
    match container::connect(container)?.ask(&request, &[])?.message {
        Reply::Ended(_) => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Sends a signal to the init process of a container. After SIGKILL it stays down, and its end is
/// waited for: it can be removed, and its name is free if it was started with --rm.
///
/// # Errors
/// It does not run; it cannot be told.
pub fn kill(paths: &Paths, name: &str, signal: u32) -> Result<()> {
    let mut container = container::find(paths, name)?;
    let id = container.record.id.clone();
    if signal == SIGKILL {
        container = container::keep_down(paths, container, Down::ForGood)?;
    }
    let client = container::connect(&container)?;
    client.do_(&Request::Signal {
        container: id.clone(),
        signal,
        all: false,
    })?;
    match signal {
        SIGKILL => container::wait_for_end(paths, &client, &id),
        _ => Ok(()),
    }
}

/// Pauses a container, or lets it go on.
///
/// # Errors
/// It does not run, is paused already, or is not.
pub fn freeze(paths: &Paths, name: &str, frozen: bool) -> Result<()> {
    let container = container::find(paths, name)?;
    let problem = match (frozen, container.status.state) {
        (true, State::Paused) => Some("is already paused"),
        (false, State::Running) => Some("is not paused"),
        _ => None,
    };
    if let Some(problem) = problem {
        return Err(Error::wrong_state(format!("container {name} {problem}")));
    }
    container::connect(&container)?.do_(&Request::Freeze {
        container: container.record.id.clone(),
        frozen,
    })
}

/// What became of a container in [`prune`].
#[derive(Debug)]
pub enum Pruned {
    /// It had this id.
    Removed(String),
    /// It stays: its removal failed, or somebody starts it just now.
    Kept(Error),
    /// The record of the one with this id cannot be read.
    Unreadable(String, Error),
}

/// Removes all containers that do not run and that conditions select, and tells of each; the bytes
/// that they had written.
///
/// # Errors
/// The containers cannot be listed, or `tell` failed.
pub fn prune(
    paths: &Paths,
    filters: &[PruneFilter],
    mut tell: impl FnMut(Pruned) -> Result<()>,
) -> Result<u64> {
    let mut reclaimed = 0u64;
    for listed in container::list(paths)? {
        let listed = match listed {
            Ok(listed) => listed,
            Err((id, error)) => {
                tell(Pruned::Unreadable(id, error))?;
                continue;
            }
        };
        let record = &listed.record;
        let labels = &record.details.labels;
        let selected = PruneFilter::all_select(filters, record.created_ns, labels);
        if !selected || !container::is_idle(&listed) {
            continue;
        }
        let bytes = usage::of_container(listed.directory.path());
        tell(
            match container::remove(paths, &record.id, Removing::default()) {
                Ok(()) => {
                    reclaimed = reclaimed.saturating_add(bytes);
                    Pruned::Removed(record.id.clone())
                }
                Err(error) => Pruned::Kept(error),
            },
        )?;
    }
    Ok(reclaimed)
}
