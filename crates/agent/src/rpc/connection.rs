//! The connection to the host: dials, serves, and dials again when it has ended. Called by `main`.
//!
//! A connection is served by ttrpc. What was started on it goes on when it ends: calls with an id
//! (`calls`), processes and their streams.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;
use hull_protocol::NO_HOST_TIMEOUT;
use tokio::sync::mpsc;
use tokio::time::Instant;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use super::service::{self, Service};
use crate::io::streams::Streams;
use crate::io::vsock::{Connection, Link};

/// How long a connection may take to be established. The kernel gives up after two seconds.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause before the second attempt to dial; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The connections, for ttrpc, which expects to accept them.
struct Dialled(mpsc::Receiver<Connection>);

impl Stream for Dialled {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

/// Serves the host on the connections that `dial` starts; the first one is `dialled` already.
///
/// # Errors
/// If the server cannot start or ends, or no host has called for [`NO_HOST_TIMEOUT`].
pub async fn serve(
    service: Service,
    streams: &Streams,
    dialled: OwnedFd,
    mut dial: impl FnMut() -> io::Result<OwnedFd>,
) -> io::Result<Infallible> {
    let (incoming, receiver) = mpsc::channel(1);
    let mut server = Server::new()
        .add_listener(Listener::new(Dialled(receiver)))
        .register_service(service::methods(service));
    server.start().await.map_err(io::Error::other)?;

    let mut socket = Ok(dialled);
    let mut heard = Instant::now();
    let mut pause = Duration::ZERO;
    loop {
        let established = match socket {
            Ok(socket) => establish(socket).await,
            Err(error) => Err(error),
        };
        let ended = match established {
            Ok((connection, link)) => {
                let taken = incoming.send(connection).await;
                taken.map_err(|_| io::Error::other("the server has ended"))?;
                let began = Instant::now();
                link.ended().await;
                // What is accepted and closed at once is no host; without a pause it would be
                // redialled in a loop.
                if link.has_received() || began.elapsed() >= LONGEST_PAUSE {
                    heard = Instant::now();
                    pause = Duration::ZERO;
                }
                "the host has closed the connection".to_owned()
            }
            Err(error) => super::status::plain_text(&error),
        };
        if heard.elapsed() >= NO_HOST_TIMEOUT {
            return Err(io::Error::other(format!(
                "no host has called for {} seconds: {ended}",
                NO_HOST_TIMEOUT.as_secs()
            )));
        }
        if let Err(error) = streams.discard_broken() {
            crate::log::error!("cannot take streams: {error}");
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        socket = dial();
    }
}

async fn establish(socket: OwnedFd) -> io::Result<(Connection, Arc<Link>)> {
    let link = Arc::new(Link::default());
    let connection = Connection::new(socket, link.clone())?;
    tokio::time::timeout(DIAL_TIMEOUT, connection.established()).await??;
    Ok((connection, link))
}
