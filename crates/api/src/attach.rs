//! `attach`, and `start` with what is attached: streams of a container on a connection.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use hull_engine::attach::{Attachment, Options, Outcome as Carried, Remote, Window};
use hull_engine::container::{self, Container};
use hull_engine::error::{Context, Error};
use hull_engine::lifecycle::{self, Start};
use hull_engine::run::Outcome;
use hull_engine::values::{self, DetachKeys};
use hull_sandbox::config::TerminalSize;
use hull_sandbox::control::protocol::{AttachRequest, Request};
use hull_sandbox::store::State as ContainerState;
use hull_sandbox::timings::now_ns;
use hyper::StatusCode;

use crate::Shared;
use crate::call::{Call, Hijacked, Query, Reply};
use crate::containers::{find, logs};
use crate::failure::{Failure, Result};
use crate::starts::{Carrier, Pending, hung_up};

/// Content type of the streams of a terminal, or of one stream.
pub const RAW: &str = "application/vnd.docker.raw-stream";

/// Content type of streams that share a connection.
pub const FRAMED: &str = "application/vnd.docker.multiplexed-stream";

/// The content type for a process.
pub fn kind(terminal: bool) -> &'static str {
    match terminal {
        true => RAW,
        false => FRAMED,
    }
}

/// The keys that detach.
pub fn detach_keys(state: &Shared, asked: Option<&str>) -> Result<DetachKeys> {
    match asked {
        Some(text) => values::detach_keys(text).map_err(Failure::bad),
        None => Ok(state.config.detach_keys.clone()),
    }
}

/// A size in a query.
fn size(query: &Query) -> Result<Option<TerminalSize>> {
    let (rows, columns) = (query.number("h")?, query.number("w")?);
    Ok(match (rows, columns) {
        (Some(rows @ 1..), Some(columns @ 1..)) => Some(TerminalSize { rows, columns }),
        _ => None,
    })
}

/// Attaches the caller to a container, which may be one that is still to be started.
pub fn attach(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let details = &container.record.details;
    let query = &call.query;
    let terminal = details.terminal;
    let options = Options {
        input: query.flag("stdin") && details.stdin,
        shown: [query.flag("stdout"), query.flag("stderr")],
        terminal,
        forward_signals: false,
        detach_keys: detach_keys(state, query.get("detachKeys"))?,
    };
    if container.status.state == ContainerState::Paused {
        return Err(Error::wrong_state(format!("container {} is paused", details.name)).into());
    }
    let (stream, with_logs) = (query.flag("stream"), query.flag("logs"));
    let Some(hijacked) = call.upgrade(kind(terminal))? else {
        return Ok(Reply::Taken);
    };
    if with_logs {
        logs::replay(&container, &hijacked.stream, terminal)?;
    }
    if !stream {
        return Ok(Reply::Taken);
    }
    let id = container.record.id.clone();
    let window = state.windows.of(&id)?;
    let remote = remote(hijacked, terminal, window);
    let pending = Pending { options, remote };
    match container::is_idle(&container) {
        true => wait_for_start(state, &id, pending),
        false => carry(&container, pending),
    }
}

/// The caller at the other end of a connection.
pub fn remote(hijacked: Hijacked, terminal: bool, window: Arc<Window>) -> Remote {
    Remote {
        stream: hijacked.stream.into(),
        early: hijacked.early,
        framed: !terminal,
        window,
    }
}

/// Waits for a container to be started, by a request or by anybody else.
fn wait_for_start(state: &Shared, id: &str, pending: Pending) -> Result<Reply> {
    let watched = pending.remote.stream.try_clone();
    let watched = watched.context(|| "share a connection")?;
    let number = state.starts.park(id, pending);
    let paths = state.config.paths();
    while state.starts.still_waits(id, number) {
        let container = container::load(&paths, id)?;
        let runs = container
            .as_ref()
            .is_some_and(|container| container.status.state == ContainerState::Running);
        if !runs && container.is_some() && !hung_up(watched.as_fd()) {
            continue;
        }
        return match (state.starts.give_up(id, number), container) {
            (Some(pending), Some(container)) if runs => carry(&container, pending),
            _ => Ok(Reply::Taken),
        };
    }
    Ok(Reply::Taken)
}

/// Carries the streams of a container that runs.
fn carry(container: &Container, pending: Pending) -> Result<Reply> {
    let client = container::connect(container)?;
    let attachment = Attachment::remote(pending.options, pending.remote);
    let streams = client.streams(&Request::Attach(AttachRequest {
        container: container.record.id.clone(),
        options: attachment.request(),
    }))?;
    attachment.carry(client, streams)?;
    Ok(Reply::Taken)
}

/// Starts a container; false when it ran already. What waits for it is attached.
pub fn start(state: &Shared, container: &Container) -> Result<bool> {
    let id = container.record.id.clone();
    let (mut pending, is_awaited) = state.starts.take(&id);
    let others = pending.split_off(pending.len().min(1));
    let first = match pending.pop() {
        None if is_awaited => {
            let (ours, theirs) = UnixStream::pair().context(|| "create a stream")?;
            state.starts.keep(&id, theirs);
            Some(unread(container, ours)?)
        }
        first => first,
    };
    let attachment = first.map(|first| Attachment::remote(first.options, first.remote));
    let carrier = attachment.as_ref().map(|_| Carrier::new(state, &id));
    // A thread of its own: in rootless mode it is left in a mount namespace of the container's.
    let outcome = lifecycle::start(&state.config, &id, now_ns(), attachment.as_ref())?;
    let started = match outcome {
        Start::Running => return Ok(false),
        Start::Done(Outcome::Interrupted(_)) => return Ok(false),
        Start::Done(Outcome::Started(started)) => *started,
    };
    for other in others {
        apart(state, &id, move |state, id| {
            match container::load(&state.config.paths(), id)? {
                Some(container) => carry(&container, other).map(drop),
                None => Ok(()),
            }
        })?;
    }
    if let (Some(attachment), Some(carrier)) = (attachment, carrier) {
        apart(state, &id, move |_, _| {
            let carried = attachment.carry(started.client, started.streams);
            // If it runs on, and others wait for its end, they look by themselves.
            if let Carried::Exited(exit) = carried? {
                carrier.ended(exit);
            }
            Ok(())
        })?;
    }
    Ok(true)
}

/// Does something about a container on a thread of its own, for as long as it takes.
fn apart(
    state: &Shared,
    id: &str,
    work: impl FnOnce(&Shared, &str) -> Result<()> + Send + 'static,
) -> Result<()> {
    let (state, id, counted) = (state.clone(), id.to_owned(), state.busy.count());
    std::thread::Builder::new()
        .name("attached".to_owned())
        .spawn(move || {
            if let Err(failure) = work(&state, &id) {
                tracing::debug!("container {id}: {}", failure.message);
            }
            drop(counted);
        })
        .map(drop)
        .context(|| "start a thread")?;
    Ok(())
}

/// An attachment for its end only.
fn unread(container: &Container, stream: UnixStream) -> Result<Pending> {
    Ok(Pending {
        options: Options {
            input: false,
            shown: [false; 2],
            terminal: container.record.details.terminal,
            forward_signals: false,
            detach_keys: DetachKeys(Vec::new()),
        },
        remote: Remote {
            stream: stream.into(),
            early: Vec::new(),
            framed: false,
            window: Window::new(None)?,
        },
    })
}

/// Gives the terminal of a container another size.
pub fn resize(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let size = size(&call.query)?.ok_or_else(|| Failure::bad("h and w: two numbers are needed"))?;
    if container::is_idle(&container) {
        return Err(
            container::not_running(&container.record.details.name, container.status.state).into(),
        );
    }
    state.windows.of(&container.record.id)?.resize(size);
    Ok(Reply::Empty(StatusCode::OK))
}

/// The size that a request names, for an execution.
pub fn asked_size(query: &Query) -> Result<Option<TerminalSize>> {
    size(query)
}
