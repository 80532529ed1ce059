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
use crate::starts::{Carrier, Coming, Pending, hung_up};

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
    let id = container.record.id.clone();
    // Before the answer: the caller goes on when it has that, and starts the container, or resizes
    // its terminal.
    let coming = container::is_idle(&container).then(|| state.starts.expect(&id));
    let window = state.windows.of(&id)?;
    let Some(hijacked) = call.take_over(kind(terminal))? else {
        return Ok(Reply::Taken);
    };
    if with_logs {
        logs::replay(&container, &hijacked.stream, options.shown)?;
    }
    if !stream {
        return Ok(Reply::Taken);
    }
    let remote = remote(hijacked, terminal, window);
    let pending = Pending { options, remote };
    match coming {
        Some(coming) => wait_for_start(state, &container, coming, pending),
        None => carry(&container, pending),
    }
}

/// The caller at the other end of a connection.
pub fn remote(hijacked: Hijacked, terminal: bool, window: Arc<Window>) -> Remote {
    Remote {
        stream: hijacked.stream.into(),
        early: hijacked.early,
        framed: !terminal,
        window,
        follows_end: false,
    }
}

/// Waits for a container to be started, by a request or by anybody else.
fn wait_for_start(
    state: &Shared,
    before: &Container,
    coming: Coming<'_>,
    pending: Pending,
) -> Result<Reply> {
    let watched = pending.remote.stream.try_clone();
    let watched = watched.context(|| "share a connection")?;
    let parked = coming.park(pending);
    let ended_ns = |container: &Container| container.status.exit.as_ref().map(|exit| exit.at_ns);
    while parked.still_waits() {
        let container = container::load(&state.config.paths(), &before.record.id)?;
        let Some(container) = container else {
            return Ok(Reply::Taken);
        };
        if container.status.state == ContainerState::Running {
            return match parked.give_up() {
                Some(pending) => carry(&container, pending),
                None => Ok(Reply::Taken),
            };
        }
        // Somebody else has started it, and it has ended already.
        let is_over = container::is_idle(&container) && ended_ns(&container) != ended_ns(before);
        if is_over || hung_up(watched.as_fd()) {
            return Ok(Reply::Taken);
        }
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
    let (mut others, is_awaited) = state.starts.take(&id);
    // One that shows something has all of it from the beginning.
    let shows = |pending: &Pending| pending.options.shown != [false; 2];
    let first = match others.iter().position(shows) {
        Some(index) => Some(others.remove(index)),
        None => others.pop(),
    };
    let first = match first {
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
        Start::Running => {
            others.extend(
                attachment
                    .and_then(Attachment::into_remote)
                    .map(|(options, remote)| Pending { options, remote }),
            );
            attach_each(state, &id, others)?;
            return Ok(false);
        }
        Start::Done(Outcome::Interrupted(_)) => return Ok(false),
        Start::Done(Outcome::Started(started)) => *started,
    };
    attach_each(state, &id, others)?;
    if let (Some(attachment), Some(carrier)) = (attachment, carrier) {
        apart(state, &id, move |_, _| {
            // If it runs on, and others wait for its end, they look by themselves.
            let told = |outcome: &Carried| {
                if let Carried::Exited(exit) = outcome {
                    carrier.ended(exit.clone());
                }
            };
            attachment.carry_and_tell(started.client, started.streams, told)?;
            Ok(())
        })?;
    }
    Ok(true)
}

/// Attaches connections to a container that runs.
fn attach_each(state: &Shared, id: &str, all: Vec<Pending>) -> Result<()> {
    for one in all {
        apart(state, id, move |state, id| {
            match container::load(&state.config.paths(), id)? {
                Some(container) => carry(&container, one).map(drop),
                None => Ok(()),
            }
        })?;
    }
    Ok(())
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
            follows_end: false,
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
