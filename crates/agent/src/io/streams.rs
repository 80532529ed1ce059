//! The host's streams: vsock connections to [`STREAM_PORT`] that a later call names by the port
//! they come from. Called by `service`. `relay` moves their bytes.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hull_protocol::STREAM_PORT;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::io::{reactor, vsock};

/// How long a call waits for a stream it names. The host connects before it calls, so only a host
/// in trouble is ever waited for.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that no call has named in this time is closed.
const UNCLAIMED_TIMEOUT: Duration = Duration::from_secs(60);

/// Accepts a connection of a listener, and returns the port it comes from.
type Accept = fn(BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)>;

/// Streams that have arrived and are not yet used.
pub struct Streams {
    listener: AsyncFd<OwnedFd>,
    accept: Accept,
    arrived: Mutex<HashMap<u32, (OwnedFd, Instant)>>,
    /// One waiter may accept the connection that another one waits for.
    changed: Notify,
}

impl Streams {
    /// Starts to listen.
    pub fn listen() -> io::Result<Self> {
        Self::new(vsock::listen(STREAM_PORT)?, vsock::accept)
    }

    /// Accepts connections of a listener.
    pub fn new(listener: OwnedFd, accept: Accept) -> io::Result<Self> {
        Ok(Self {
            listener: reactor::watch(listener, Interest::READABLE)?,
            accept,
            arrived: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// The stream that comes from `port` of the host, as soon as it is there.
    pub async fn take(&self, port: u32) -> io::Result<OwnedFd> {
        if let Some(stream) = self.accept_until(port)? {
            return Ok(stream);
        }
        tokio::time::timeout(STREAM_TIMEOUT, self.wait_for(port))
            .await
            .unwrap_or_else(|_elapsed| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "no stream from host port {port} within {} seconds",
                        STREAM_TIMEOUT.as_secs()
                    ),
                ))
            })
    }

    async fn wait_for(&self, port: u32) -> io::Result<OwnedFd> {
        loop {
            let changed = self.changed.notified();
            tokio::select! {
                guard = self.listener.readable() => guard?.clear_ready(),
                () = changed => {}
            }
            if let Some(stream) = self.accept_until(port)? {
                return Ok(stream);
            }
        }
    }

    /// Accepts what is pending; stops early at the wanted one.
    fn accept_until(&self, port: u32) -> io::Result<Option<OwnedFd>> {
        let mut arrived = self.arrived();
        if let Some((stream, _)) = arrived.remove(&port) {
            return Ok(Some(stream));
        }
        loop {
            match (self.accept)(self.listener.as_fd()) {
                Ok((stream, peer)) if peer == port => return Ok(Some(stream)),
                Ok((stream, peer)) => {
                    let now = Instant::now();
                    arrived.retain(|_, (_, since)| now.duration_since(*since) < UNCLAIMED_TIMEOUT);
                    arrived.insert(peer, (stream, now));
                    self.changed.notify_waiters();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The connection was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Drops streams that have arrived and are broken, as all are when the device has reset them:
    /// their ports may soon be used by other streams.
    pub fn discard_broken(&self) -> io::Result<()> {
        // All that is pending arrives: no stream comes from port 0.
        let none = self.accept_until(0)?;
        debug_assert!(none.is_none(), "a stream from port 0");
        let intact =
            |stream: &OwnedFd| matches!(rustix::net::sockopt::socket_error(stream), Ok(Ok(())));
        self.arrived().retain(|_, (stream, _)| intact(stream));
        Ok(())
    }

    fn arrived(&self) -> MutexGuard<'_, HashMap<u32, (OwnedFd, Instant)>> {
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
