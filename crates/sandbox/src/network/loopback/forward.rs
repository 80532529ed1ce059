//! Carries connections that are made in a network namespace to its own addresses into the guest.
//! The rules are made while the guest boots, and connections are carried when it is there.
//!
//! Whoever dials has been connected by the host's kernel before the guest is asked, so that a port
//! at which nobody listens shows as a connection that is reset.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_network::Namespace;
use hull_network::redirect::{Accepted, Redirect};
use hull_protocol::{MAX_FORWARDS, STREAM_PORT};
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::Result;
use crate::guest::{Agent, Devices};

/// How long nothing may move when one direction has ended: then the connection ends.
const PATIENCE: Duration = Duration::from_secs(300);

/// Largest piece moved at once.
const PIECE: usize = 16 * 1024;

/// Connections on their way into the guest.
#[derive(Debug)]
pub struct Forwarder {
    redirect: Arc<Redirect>,
}

impl Forwarder {
    /// Leads connections here; they wait until there is a guest. `None`, and a line in the log,
    /// where the host's kernel cannot do it: everything else works without.
    pub fn open(namespace: &Namespace) -> Option<Self> {
        match Redirect::open(namespace) {
            Ok(redirect) => Some(Self {
                redirect: Arc::new(redirect),
            }),
            Err(error) => {
                let hint = error.hint().map(|hint| format!(" ({hint})"));
                tracing::warn!("no port-forward: {error}{}", hint.unwrap_or_default());
                None
            }
        }
    }

    /// Carries connections into the guest from now on.
    pub fn start(&self, devices: &Arc<Devices>, agent: &Agent) {
        let redirect = self.redirect.clone();
        tokio::spawn(accept(redirect, devices.clone(), agent.clone()));
    }

    /// Leaves the namespace as it was, at the end of this process.
    pub fn end(&self) {
        self.redirect.end();
    }
}

async fn accept(redirect: Arc<Redirect>, devices: Arc<Devices>, agent: Agent) {
    let places = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        // Further ones wait in the kernel's queue.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let accepted = match redirect.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: others go away, so it passes.
                tracing::warn!("a connection to the loopback address was not taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (devices, agent) = (devices.clone(), agent.clone());
        tokio::spawn(async move {
            forward(accepted, &devices, &agent).await;
            drop(place);
        });
    }
}

async fn forward(accepted: Accepted, devices: &Devices, agent: &Agent) {
    let Accepted { stream, to } = accepted;
    let reached: Result<_> = async {
        let (name, guest) = devices.connect(STREAM_PORT).await?;
        agent.forward(name, to).await?;
        Ok(guest)
    }
    .await;
    match reached {
        Ok(guest) => {
            // Small messages do not wait for each other.
            let _ = stream.set_nodelay(true);
            let (mut stream, mut guest) = (stream, guest);
            let (from_host, to_host) = stream.split();
            let (from_guest, to_guest) = guest.split();
            let half = AtomicBool::new(false);
            let carried = tokio::try_join!(
                pass(from_host, to_guest, &half),
                pass(from_guest, to_host, &half)
            );
            if let Err(error) = carried {
                tracing::debug!("a connection to {to} in the guest ended: {error}");
                reset(stream);
            }
        }
        Err(failure) => {
            tracing::debug!("{failure}");
            reset(stream);
        }
    }
}

/// Closes a connection as a server does that is not there.
fn reset(stream: TcpStream) {
    // At worst it is closed in the usual way.
    let _ = set_socket_linger(&stream, Some(Duration::ZERO));
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    half: &AtomicBool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = moving(from.read(&mut piece), half).await?;
        if length == 0 {
            break;
        }
        moving(to.write_all(&piece[..length]), half).await?;
    }
    half.store(true, Ordering::Relaxed);
    to.shutdown().await
}

/// Waits for a step: for ever while both directions are open.
async fn moving<T>(step: impl Future<Output = io::Result<T>>, half: &AtomicBool) -> io::Result<T> {
    let mut step = pin!(step);
    loop {
        match timeout(PATIENCE, step.as_mut()).await {
            Ok(done) => return done,
            Err(_elapsed) if half.load(Ordering::Relaxed) => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(_elapsed) => {}
        }
    }
}
