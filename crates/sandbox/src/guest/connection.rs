//! The connection with the agent. The agent makes it, and makes it anew when it breaks: a call that
//! has no answer then is made again on the next connection, see "Connections" in agent.proto.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_protocol::agent as proto;
use hull_protocol::{CALL_ID_KEY, MAX_CALLS, PROTOCOL_VERSION};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context as CallContext;

use super::Incoming;
use super::answers::{BoundedClient, Envelopes};
use crate::error::{Context, Error, Result};

/// How long the agent may take to dial again.
const REDIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to say its version on a further connection.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Oldest version of an agent that is called.
const OLDEST_AGENT: u32 = 1;

/// Why a call has no result.
#[derive(Debug)]
pub enum Failure {
    /// The agent's answer.
    Status(ttrpc::Status),
    /// The agent does not dial again, or has ended.
    Lost(Error),
}

/// What a call does when its connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// It changes something: the agent must not execute it twice.
    ById,
    /// It changes nothing, and is simply made again.
    Freely,
    /// The end of the connection may be what it is for.
    Never,
}

/// The connection with an agent, whichever it is at the time. Clones are the same.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: watch::Receiver<State>,
    calls: AtomicU64,
    /// The agent keeps so many answers.
    room: Semaphore,
}

#[derive(Clone)]
enum State {
    /// The newest connection, which may have broken.
    Up(Up),
    /// There will be no further one.
    Gone,
}

#[derive(Clone)]
struct Up {
    /// Counts connections.
    number: u64,
    client: BoundedClient,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Up(up) => write!(f, "Up({})", up.number),
            Self::Gone => f.write_str("Gone"),
        }
    }
}

impl Up {
    fn new(number: u64, stream: OwnedFd) -> Result<Self> {
        let watching = || "watch the agent's connection";
        let stream = StdStream::from(stream);
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .context(watching)?;
        Ok(Self {
            number,
            client: BoundedClient::new(Client::new(Socket::new(Envelopes::new(stream)))),
        })
    }
}

impl Connection {
    /// Waits until the agent dials, and from then on takes every further connection of it.
    ///
    /// # Errors
    /// `GuestFailed` when the device process ends before.
    pub async fn establish(mut incoming: Incoming) -> Result<Self> {
        let stream = incoming
            .recv()
            .await
            .ok_or_else(|| Error::guest("the device process has ended"))?;
        let (sender, state) = watch::channel(State::Up(Up::new(1, stream)?));
        let connection = Self(Arc::new(Shared {
            state,
            calls: AtomicU64::new(0),
            room: Semaphore::new(MAX_CALLS),
        }));
        tokio::spawn(follow(incoming, sender));
        Ok(connection)
    }

    /// Makes a call until it has an answer. `timeout`: for all of it; none for a call that may take
    /// as long as the guest is there.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        repeat: Repeat,
        timeout: Option<Duration>,
        call: impl Fn(BoundedClient, CallContext) -> F,
    ) -> std::result::Result<T, Failure> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let shared = &self.0;
        // A semaphore that nobody closes.
        let _room = match repeat {
            Repeat::ById => shared.room.acquire().await.ok(),
            Repeat::Freely | Repeat::Never => None,
        };
        let mut context = CallContext::default();
        if repeat == Repeat::ById {
            let id = shared.calls.fetch_add(1, Ordering::Relaxed);
            context.add(CALL_ID_KEY.into(), id.to_string());
        }
        let mut last = 0;
        loop {
            let up = self.newest(last, deadline).await.map_err(Failure::Lost)?;
            last = up.number;
            if let Some(deadline) = deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                // 0 would be no timeout.
                let left = left.max(Duration::from_millis(1));
                context.timeout_nano = i64::try_from(left.as_nanos()).unwrap_or(i64::MAX);
            }
            match call(up.client, context.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(ttrpc::Error::RpcStatus(status)) => return Err(Failure::Status(status)),
                Err(_) if deadline.is_some_and(|deadline| deadline <= Instant::now()) => {
                    return Err(Failure::Lost(unanswered()));
                }
                Err(error) if repeat == Repeat::Never => {
                    return Err(Failure::Lost(Error::guest(format!("no answer: {error}"))));
                }
                Err(error) => tracing::debug!("connection {last} of the agent: {error}"),
            }
        }
    }

    /// How many connections there have been.
    pub fn count(&self) -> u64 {
        match &*self.0.state.borrow() {
            State::Up(up) => up.number,
            State::Gone => 0,
        }
    }

    /// Waits until there will be no further connection: the device process has ended.
    pub async fn gone(&self) {
        let mut state = self.0.state.clone();
        // Its sender goes only after that.
        let _ = state.wait_for(|state| matches!(state, State::Gone)).await;
    }

    /// The first connection after the one of this number.
    async fn newest(&self, after: u64, deadline: Option<Instant>) -> Result<Up> {
        let mut state = self.0.state.clone();
        let redialled = Instant::now() + REDIAL_TIMEOUT;
        let deadline = deadline.map_or(redialled, |deadline| deadline.min(redialled));
        let later = state.wait_for(|state| match state {
            State::Up(up) => up.number > after,
            State::Gone => true,
        });
        match timeout_at(deadline, later).await {
            Ok(Ok(state)) => match &*state {
                State::Up(up) => Ok(up.clone()),
                State::Gone => Err(Error::guest("the agent in the guest has ended")),
            },
            Ok(Err(_)) => Err(Error::guest("the agent in the guest has ended")),
            Err(_) if deadline < redialled => Err(unanswered()),
            Err(_) => Err(Error::guest(
                "the agent in the guest has closed its connection",
            )),
        }
    }
}

/// An answer has not come in time.
pub fn unanswered() -> Error {
    Error::guest("the agent in the guest does not answer")
}

/// Takes the connections of an agent, as long as somebody calls it.
async fn follow(mut incoming: Incoming, sender: watch::Sender<State>) {
    let mut number = 1;
    loop {
        let stream = tokio::select! {
            stream = incoming.recv() => stream,
            () = sender.closed() => return,
        };
        let Some(stream) = stream else {
            sender.send_replace(State::Gone);
            return;
        };
        number += 1;
        let greeted = async {
            let up = Up::new(number, stream)?;
            hello(&up.client).await?;
            Ok::<_, Error>(up)
        };
        match tokio::time::timeout(HELLO_TIMEOUT, greeted).await {
            Ok(Ok(up)) => {
                sender.send_replace(State::Up(up));
            }
            Ok(Err(error)) => tracing::warn!("a connection of the agent: {error}"),
            Err(_) => tracing::warn!("a connection of the agent: no answer"),
        }
    }
}

/// Exchanges versions.
async fn hello(client: &BoundedClient) -> Result<()> {
    let answer = client
        .hello(CallContext::default(), &greeting())
        .await
        .map_err(|error| Error::guest(format!("no answer to the greeting: {error}")))?;
    check(&answer)
}

/// What the host says of itself on each connection.
pub fn greeting() -> proto::HelloRequest {
    proto::HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        ..Default::default()
    }
}

/// Whether an agent that answers so can be called.
///
/// # Errors
/// `GuestFailed`, by name.
pub fn check(answer: &proto::HelloResponse) -> Result<()> {
    match answer.protocol_version {
        OLDEST_AGENT..=PROTOCOL_VERSION => Ok(()),
        other => Err(Error::guest(format!(
            "the agent speaks version {other} of its protocol, this hull {PROTOCOL_VERSION}"
        ))
        .hint("use the initramfs that belongs to this hull")),
    }
}
