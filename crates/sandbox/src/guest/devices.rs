//! The sandbox's end of the device process: shares and vsock connections.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use hull_devices::control::{self, Cache, Call, Event, Request};
use hull_devices::net::NetOptions;
use hull_protocol::AGENT_PORT;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::watch::watch;
use crate::error::{Context, Error, Result};

/// Number of the request that nobody waits for.
const UNASKED: u64 = 0;

/// Host-side ports of streams begin here, above the fixed ones.
const FIRST_STREAM_PORT: u32 = 0x1_0000;

/// How many unread connections of the guest are kept: there is one listener, and it takes one connection.
const MAX_INCOMING: usize = 4;

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Option<String>>>>>;

/// A running device process.
#[derive(Debug)]
pub struct Devices {
    socket: Arc<AsyncFd<OwnedFd>>,
    pending: Pending,
    next_request: AtomicU64,
    next_port: AtomicU32,
}

/// Connections that the guest made to ports of the host: port and stream.
pub type Incoming = mpsc::Receiver<(u32, OwnedFd)>;

impl Devices {
    /// Takes over the control socket of a device process, and lets the guest connect to the host's port for the agent.
    ///
    /// Called before there is a machine: one that comes up faster than this process goes on must not dial in vain.
    ///
    /// # Errors
    /// The device process has ended, or the socket cannot be registered with the event loop.
    pub fn new(socket: OwnedFd) -> Result<(Self, Incoming)> {
        let listen = Request {
            id: UNASKED,
            call: Call::Listen { port: AGENT_PORT },
        };
        control::send(socket.as_fd(), &listen, None).context(|| "listen for the guest")?;
        rustix::io::ioctl_fionbio(&socket, true).context(|| "prepare the control socket")?;
        let socket = Arc::new(watch(socket, Interest::READABLE | Interest::WRITABLE)?);
        let pending = Pending::default();
        let (sender, incoming) = mpsc::channel(MAX_INCOMING);
        tokio::spawn(receive(socket.clone(), pending.clone(), sender));
        Ok((
            Self {
                socket,
                pending,
                next_request: AtomicU64::new(UNASKED + 1),
                next_port: AtomicU32::new(FIRST_STREAM_PORT),
            },
            incoming,
        ))
    }

    async fn call(&self, doing: &str, call: Call, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.lock().insert(id, sender);
        let request = Request { id, call };
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |socket| {
                control::send(socket.as_fd(), &request, fd)
            })
            .await;
        if let Err(error) = sent {
            self.lock().remove(&id);
            return Err(error).context(|| doing);
        }
        match answer.await {
            Ok(None) => Ok(()),
            Ok(Some(error)) => Err(Error::new(format!("cannot {doing}: {error}"))),
            Err(_) => Err(Error::guest(format!(
                "cannot {doing}: the device process has ended"
            ))),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Option<String>>>> {
        // Nothing panics while it is held, and a map of answers is valid at any time.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a directory to the guest's shares.
    ///
    /// # Errors
    /// The device process refuses, or has ended.
    pub async fn add_share(
        &self,
        name: &str,
        directory: BorrowedFd<'_>,
        cache: Cache,
    ) -> Result<()> {
        let call = Call::AddShare {
            name: name.into(),
            cache,
        };
        self.call(
            &format!("share {name} with the guest"),
            call,
            Some(directory),
        )
        .await
    }

    /// Takes a directory away from the guest's shares.
    ///
    /// # Errors
    /// There is no such share, or the device process has ended.
    pub async fn remove_share(&self, name: &str) -> Result<()> {
        let call = Call::RemoveShare { name: name.into() };
        self.call(
            &format!("take share {name} away from the guest"),
            call,
            None,
        )
        .await
    }

    /// Attaches a tap to a net device.
    ///
    /// # Errors
    /// There is no such device, the tap cannot be used, or the device process has ended.
    pub async fn attach_net(
        &self,
        device: u8,
        tap: BorrowedFd<'_>,
        options: NetOptions,
    ) -> Result<()> {
        let call = Call::AttachNet { device, options };
        self.call(&format!("attach net device {device}"), call, Some(tap))
            .await
    }

    /// Changes what holds for the frames of a net device.
    ///
    /// # Errors
    /// It has no tap, or the device process has ended.
    pub async fn change_net(&self, device: u8, options: NetOptions) -> Result<()> {
        let call = Call::ChangeNet { device, options };
        self.call(&format!("change net device {device}"), call, None)
            .await
    }

    /// Takes the tap of a net device away.
    ///
    /// # Errors
    /// There is no such device, or the device process has ended.
    pub async fn detach_net(&self, device: u8) -> Result<()> {
        let call = Call::DetachNet { device };
        self.call(&format!("detach net device {device}"), call, None)
            .await
    }

    /// Waits until everything that the guest has sent is with those who read it, or in their sockets.
    ///
    /// # Errors
    /// The device process has ended.
    pub async fn drain(&self) -> Result<()> {
        self.call("wait for the guest's output", Call::Drain, None)
            .await
    }

    /// Opens a stream to the guest; its name there is the port that is returned with it.
    ///
    /// # Errors
    /// The guest refuses, or the device process has ended.
    pub async fn connect(&self, guest_port: u32) -> Result<(u32, UnixStream)> {
        let (host_port, stream) = self.open(guest_port).await?;
        let stream = StdStream::from(stream);
        stream
            .set_nonblocking(true)
            .context(|| "prepare a stream")?;
        let stream = UnixStream::from_std(stream).context(|| "watch a stream")?;
        Ok((host_port, stream))
    }

    /// The same for a stream that somebody else will carry: a blocking socket.
    ///
    /// # Errors
    /// As [`Devices::connect`].
    pub async fn open(&self, guest_port: u32) -> Result<(u32, OwnedFd)> {
        let host_port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let (ours, theirs) = StdStream::pair().context(|| "make a socket pair")?;
        let call = Call::Connect {
            guest_port,
            host_port,
        };
        self.call("open a stream to the guest", call, Some(theirs.as_fd()))
            .await?;
        Ok((host_port, ours.into()))
    }
}

/// Reads what the device process says until it ends.
async fn receive(
    socket: Arc<AsyncFd<OwnedFd>>,
    pending: Pending,
    incoming: mpsc::Sender<(u32, OwnedFd)>,
) {
    loop {
        let received = socket
            .async_io(Interest::READABLE, |socket| {
                control::recv::<Event>(socket.as_fd())
            })
            .await;
        match received {
            Ok((Event::Reply { id, error }, _)) => {
                let waiting = pending
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&id);
                match (waiting, error) {
                    // Whoever asked may have gone.
                    (Some(waiting), error) => drop(waiting.send(error)),
                    (None, Some(error)) => tracing::error!("the device process: {error}"),
                    (None, None) => {}
                }
            }
            Ok((Event::Incoming { port, .. }, Some(stream))) => {
                // A guest that connects again and again is not waited for.
                if incoming.try_send((port, stream)).is_err() {
                    tracing::debug!("refused a further connection of the guest to port {port}");
                }
            }
            Ok((Event::Incoming { .. }, None)) => {
                tracing::warn!("the device process announced a connection without one");
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!("the device process sent something unreadable: {error}");
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::warn!("lost the device process: {error}");
                }
                // Dropping the answers tells everyone who waits.
                pending
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
                return;
            }
        }
    }
}
