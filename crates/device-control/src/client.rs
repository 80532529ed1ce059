//! The sandbox's end: shares, net devices and vsock connections of a running device process.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_ipc::{Received, Socket};
use rustix::net::SocketType;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::{Cache, Call, EVENT_LIMITS, Event, NetOptions, Request, ServedDevice, Setup};

/// Id of requests whose errors are only logged.
const UNANSWERED: u64 = 0;

/// First host-side port of streams, above the fixed ones.
const FIRST_STREAM_PORT: u32 = 0x1_0000;

/// Limit of the guest's connections to a port that wait to be accepted. Further ones are closed.
const MAX_INCOMING: usize = 8;

/// How long a request may take. Devices reply at once unless the machine, which their threads also
/// serve, stalls them.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the opening of a stream may take: longer than the vsock device waits for a guest that
/// boots, after which it replies by itself.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(90);

const OPEN_STREAM: &str = "open a stream to the guest";

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The device process rejected the request, or a device failed.
    #[error("cannot {action}: {reason}")]
    Refused {
        /// The requested operation.
        action: String,
        /// The reason from the device process.
        reason: String,
    },
    /// The request could not be sent, or its descriptor could not be created.
    #[error("cannot {action}: {reason}")]
    Host {
        /// The requested operation.
        action: String,
        /// The host's error.
        reason: String,
    },
    /// The device process has ended.
    #[error("cannot {action}: the device process has ended")]
    Gone {
        /// The requested operation.
        action: String,
    },
    /// The device process has not replied. It may still do what was requested.
    #[error("cannot {action}: the device process has not replied for {} s", .after.as_secs())]
    TimedOut {
        /// The requested operation.
        action: String,
        /// How long the caller has waited.
        after: Duration,
    },
}

impl Error {
    fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Gone { action },
            _ => Self::Host {
                action,
                reason: error.to_string(),
            },
        }
    }
}

/// A reply of the device process.
#[derive(Debug)]
enum Answer {
    Done,
    Refused(String),
    Socket(OwnedFd),
    Devices(Vec<ServedDevice>),
}

/// Requests that wait for their reply.
type Requests = HashMap<u64, oneshot::Sender<Answer>>;

/// The same; `None` once the device process has ended.
type Pending = Arc<Mutex<Option<Requests>>>;

/// The guest's connections to one port of the host.
pub type Incoming = mpsc::Receiver<OwnedFd>;

/// Where the guest's connections go, by their port.
type Ports = Vec<(u32, mpsc::Sender<OwnedFd>)>;

/// A running device process. Every request but [`DeviceControl::drain`] fails with `TimedOut` when
/// no reply comes.
#[derive(Debug)]
pub struct DeviceControl {
    socket: Arc<Socket>,
    pending: Pending,
    next_request: AtomicU64,
    next_port: AtomicU32,
}

impl DeviceControl {
    /// Takes the control socket of a device process that was just started: configures its devices
    /// and lets the guest connect to `ports` of the host. The connections of each come by
    /// themselves.
    ///
    /// Called within a runtime, and before the machine is started, which may boot faster than the
    /// caller continues. Does not wait for the device process.
    ///
    /// # Errors
    /// `Gone` if the device process has ended, `Host` if the socket cannot be registered with the
    /// event loop.
    pub fn start<const N: usize>(
        socket: OwnedFd,
        setup: &Setup,
        descriptors: &[BorrowedFd<'_>],
        ports: [u32; N],
    ) -> Result<(Self, [Incoming; N]), Error> {
        let configure = "configure the device process";
        // The socket's buffer has room for these; otherwise blocking is fine.
        hull_ipc::send(&socket, setup, descriptors).map_err(Error::host(configure))?;
        for port in ports {
            let listen = Request {
                id: UNANSWERED,
                call: Call::Listen { port },
            };
            hull_ipc::send(&socket, &listen, &[]).map_err(Error::host(configure))?;
        }
        let socket = Arc::new(Socket::new(socket).map_err(Error::host(configure))?);
        let pending = Pending::new(Mutex::new(Some(HashMap::new())));
        let mut senders = Ports::with_capacity(N);
        let incoming = ports.map(|port| {
            let (sender, incoming) = mpsc::channel(MAX_INCOMING);
            senders.push((port, sender));
            incoming
        });
        tokio::spawn(receive(socket.clone(), pending.clone(), senders));
        let control = Self {
            socket,
            pending,
            next_request: AtomicU64::new(UNANSWERED + 1),
            next_port: AtomicU32::new(FIRST_STREAM_PORT),
        };
        Ok((control, incoming))
    }

    async fn call(
        &self,
        action: impl Into<String>,
        call: Call,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        self.call_within(CALL_TIMEOUT, action.into(), call, fd)
            .await
            .map(drop)
    }

    async fn call_within(
        &self,
        after: Duration,
        action: String,
        call: Call,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, Error> {
        let answer = self.request(action.clone(), call, fd);
        match tokio::time::timeout(after, answer).await {
            Ok(result) => result,
            Err(_) => Err(Error::TimedOut { action, after }),
        }
    }

    async fn request(
        &self,
        action: String,
        call: Call,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, Error> {
        let id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        match &mut *lock(&self.pending) {
            Some(pending) => pending.insert(id, sender),
            None => return Err(Error::Gone { action }),
        };
        // Also if this future is dropped, before or after the request is sent.
        let _forget = Forget {
            pending: &self.pending,
            id,
        };
        let request = Request { id, call };
        if let Err(error) = self.socket.send(&request, fd.as_slice()).await {
            return Err(Error::host(action)(error));
        }
        match answer.await {
            Ok(Answer::Refused(reason)) => Err(Error::Refused { action, reason }),
            Ok(answer) => Ok(answer),
            Err(_) => Err(Error::Gone { action }),
        }
    }

    /// Adds a directory to the guest's shares.
    ///
    /// # Errors
    /// `Refused` if a share with this name exists, or the name or the directory cannot be used;
    /// `Gone` if the device process has ended.
    pub async fn add_share(
        &self,
        name: &str,
        directory: BorrowedFd<'_>,
        cache: Cache,
    ) -> Result<(), Error> {
        let call = Call::AddShare {
            name: name.into(),
            cache,
        };
        let action = format!("share {name} with the guest");
        self.call(action, call, Some(directory)).await
    }

    /// Removes a directory from the guest's shares.
    ///
    /// # Errors
    /// `Refused` if there is no such share; `Gone` if the device process has ended.
    pub async fn remove_share(&self, name: &str) -> Result<(), Error> {
        let call = Call::RemoveShare { name: name.into() };
        let action = format!("remove share {name} from the guest");
        self.call(action, call, None).await
    }

    /// Attaches a tap to a net device.
    ///
    /// # Errors
    /// `Refused` if there is no such device, or the tap cannot be used; `Gone` if the device
    /// process has ended.
    pub async fn attach_net(
        &self,
        device: u8,
        tap: BorrowedFd<'_>,
        options: NetOptions,
    ) -> Result<(), Error> {
        let call = Call::AttachNet { device, options };
        self.call(format!("attach net device {device}"), call, Some(tap))
            .await
    }

    /// Gives a spare disk its file or block device. The guest can probe it then.
    ///
    /// # Errors
    /// `Refused` if there is no such spare disk, or the file cannot be used; `Gone` if the device
    /// process has ended.
    pub async fn attach_disk(
        &self,
        disk: u8,
        file: BorrowedFd<'_>,
        read_only: bool,
    ) -> Result<(), Error> {
        let call = Call::AttachDisk { disk, read_only };
        self.call(format!("attach disk {disk}"), call, Some(file))
            .await
    }

    /// Changes the options for the frames of a net device.
    ///
    /// # Errors
    /// `Refused` if it has no tap; `Gone` if the device process has ended.
    pub async fn change_net(&self, device: u8, options: NetOptions) -> Result<(), Error> {
        let call = Call::ChangeNet { device, options };
        self.call(format!("change net device {device}"), call, None)
            .await
    }

    /// Detaches the tap of a net device.
    ///
    /// # Errors
    /// `Refused` if there is no such device; `Gone` if the device process has ended.
    pub async fn detach_net(&self, device: u8) -> Result<(), Error> {
        let call = Call::DetachNet { device };
        self.call(format!("detach net device {device}"), call, None)
            .await
    }

    /// Waits until everything that the guest has sent is in the host's ends of its streams. That
    /// takes as long as their readers do: the caller bounds it.
    ///
    /// # Errors
    /// `Gone` if the device process has ended.
    pub async fn drain(&self) -> Result<(), Error> {
        let action = "wait for the guest's output".into();
        self.request(action, Call::Drain, None).await.map(drop)
    }

    /// Finds the socket that a node of the fs device is: its file (`O_PATH`). The guest names the
    /// node, and the device process the file: neither says that the guest may connect to it.
    ///
    /// # Errors
    /// `Refused` if the guest does not know such a node, or it is no socket; `Gone` if the device
    /// process has ended.
    pub async fn find_socket(&self, node: u64) -> Result<OwnedFd, Error> {
        let action = "find a socket of the host";
        let call = Call::FindSocket { node };
        match self
            .call_within(CALL_TIMEOUT, action.into(), call, None)
            .await?
        {
            Answer::Socket(file) => Ok(file),
            _ => Err(Error::Refused {
                action: action.into(),
                reason: "the device process has found none".into(),
            }),
        }
    }

    /// The devices that are served.
    ///
    /// # Errors
    /// `Gone` if the device process has ended.
    pub async fn list(&self) -> Result<Vec<ServedDevice>, Error> {
        let action = "list the devices";
        match self
            .call_within(CALL_TIMEOUT, action.into(), Call::List, None)
            .await?
        {
            Answer::Devices(devices) => Ok(devices),
            _ => Err(Error::Refused {
                action: action.into(),
                reason: "the device process has another answer".into(),
            }),
        }
    }

    /// Resets the streams of one port of the host: both ends see a connection failure.
    ///
    /// # Errors
    /// `Gone` if the device process has ended.
    pub async fn cut_stream(&self, port: u32) -> Result<(), Error> {
        let action = format!("cut the streams of host port {port}");
        self.call(action, Call::CutStream { port }, None).await
    }

    /// Ends all streams and makes the guest close its sockets. Data that the guest has sent before
    /// still reaches the host's ends.
    ///
    /// # Errors
    /// `Gone` if the device process has ended.
    pub async fn reset_streams(&self) -> Result<(), Error> {
        self.call("reset the streams of the guest", Call::ResetStreams, None)
            .await
    }

    /// Opens a stream to a port of the guest; returns the port that the guest sees as its peer's,
    /// and the host's end.
    ///
    /// # Errors
    /// `Refused` if the guest refuses or does not answer; `Host` if the stream cannot be created;
    /// `Gone` if the device process has ended.
    pub async fn connect(&self, guest_port: u32) -> Result<(u32, UnixStream), Error> {
        let (host_port, stream) = self.open(guest_port).await?;
        let stream = StdStream::from(stream);
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .map_err(Error::host("watch a stream to the guest"))?;
        Ok((host_port, stream))
    }

    /// Like [`DeviceControl::connect`], for a stream that another process will use: a blocking
    /// socket.
    ///
    /// # Errors
    /// As [`DeviceControl::connect`].
    pub async fn open(&self, guest_port: u32) -> Result<(u32, OwnedFd), Error> {
        let (ours, theirs) = StdStream::pair().map_err(Error::host(OPEN_STREAM))?;
        let host_port = self.join(theirs.as_fd(), guest_port, None).await?;
        Ok((host_port, ours.into()))
    }

    /// Opens a stream from a port of the guest to a server of the host, with which `stream` is
    /// connected; returns the port that the guest sees as its peer's. To the server, the guest's
    /// bytes come from `user`, a user and a group.
    ///
    /// # Errors
    /// As [`DeviceControl::connect`].
    pub async fn lead_to(
        &self,
        stream: BorrowedFd<'_>,
        user: (u32, u32),
        guest_port: u32,
    ) -> Result<u32, Error> {
        self.join(stream, guest_port, Some(user)).await
    }

    async fn join(
        &self,
        stream: BorrowedFd<'_>,
        guest_port: u32,
        user: Option<(u32, u32)>,
    ) -> Result<u32, Error> {
        let host_port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let call = Call::Connect {
            guest_port,
            host_port,
            user,
        };
        self.call_within(CONNECT_TIMEOUT, OPEN_STREAM.into(), call, Some(stream))
            .await?;
        Ok(host_port)
    }
}

/// Removes a request from the pending ones.
struct Forget<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(pending) = &mut *lock(self.pending) {
            pending.remove(&self.id);
        }
    }
}

fn lock(pending: &Pending) -> MutexGuard<'_, Option<Requests>> {
    // Nothing panics while it is held, and the map is always valid.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Receives events from the device process until it ends.
async fn receive(socket: Arc<Socket>, pending: Pending, ports: Ports) {
    loop {
        match socket.receive::<Event>(EVENT_LIMITS).await {
            Ok(Some(received)) => handle(received, &pending, &ports),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!("the device process sent an invalid message: {error}");
            }
            Ok(None) => break,
            Err(error) => {
                tracing::warn!("lost the device process: {error}");
                break;
            }
        }
    }
    // Dropping the senders fails all pending requests; later ones fail at once.
    lock(&pending).take();
}

fn handle(received: Received<Event>, pending: &Pending, ports: &Ports) {
    match (received.message, received.fds.into_iter().next()) {
        (Event::Reply { id, error: None }, _) => answer(pending, id, Answer::Done),
        (
            Event::Reply {
                id,
                error: Some(reason),
            },
            _,
        ) => answer(pending, id, Answer::Refused(reason)),
        (Event::Devices { id, devices }, _) => answer(pending, id, Answer::Devices(devices)),
        (Event::Socket { id }, Some(file)) => answer(pending, id, Answer::Socket(file)),
        // Must be a stream: the device process's own end of this socket, for example, would keep
        // the connection open after its end.
        (Event::Incoming { port, .. }, Some(stream)) if is_stream(&stream) => {
            // A guest that keeps connecting must not exhaust this process.
            let taken = ports
                .iter()
                .find(|(listening, _)| *listening == port)
                .is_some_and(|(_, incoming)| incoming.try_send(stream).is_ok());
            if !taken {
                tracing::debug!("refused a further connection of the guest to port {port}");
            }
        }
        (Event::Socket { .. } | Event::Incoming { .. }, _) => {
            tracing::warn!("the device process sent a message without its descriptor");
        }
    }
}

fn answer(pending: &Pending, id: u64, answer: Answer) {
    let caller = lock(pending)
        .as_mut()
        .and_then(|pending| pending.remove(&id));
    match (caller, answer) {
        // The caller may have stopped waiting.
        (Some(caller), answer) => drop(caller.send(answer)),
        (None, Answer::Refused(reason)) => tracing::error!("the device process: {reason}"),
        (None, _) => {}
    }
}

fn is_stream(fd: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_type(fd) == Ok(SocketType::STREAM)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;
    use crate::{DeviceConfig, REQUEST_LIMITS, SETUP_LIMITS};

    /// A control and the device process's end.
    async fn started() -> (DeviceControl, Incoming, Socket) {
        let (ours, theirs) = hull_ipc::pair().unwrap();
        let theirs = Socket::new(theirs).unwrap();
        let setup = Setup {
            devices: vec![DeviceConfig::Fs],
            ..Setup::default()
        };
        let fds = [theirs.as_fd()];
        let (control, [incoming]) = DeviceControl::start(ours, &setup, &fds, [7]).unwrap();
        let first = theirs
            .receive::<Setup>(SETUP_LIMITS)
            .await
            .unwrap()
            .unwrap();
        assert_eq!((first.message, first.fds.len()), (setup, 1));
        let listen = request(&theirs).await;
        assert_eq!(listen.message.call, Call::Listen { port: 7 });
        (control, incoming, theirs)
    }

    async fn request(socket: &Socket) -> Received<Request> {
        socket
            .receive::<Request>(REQUEST_LIMITS)
            .await
            .unwrap()
            .unwrap()
    }

    async fn reply(socket: &Socket, id: u64, error: Option<&str>) {
        let error = error.map(Into::into);
        socket.send(&Event::Reply { id, error }, &[]).await.unwrap();
    }

    #[tokio::test]
    async fn replies_reach_their_callers_in_any_order() {
        let (control, _incoming, theirs) = started().await;
        let device_process = async {
            let first = request(&theirs).await;
            let second = request(&theirs).await;
            assert_eq!((first.fds.len(), second.fds.len()), (0, 0));
            reply(&theirs, second.message.id, Some("no such share")).await;
            reply(&theirs, first.message.id, None).await;
        };
        let (drained, removed, ()) =
            tokio::join!(control.drain(), control.remove_share("x"), device_process);
        assert_eq!(drained, Ok(()));
        let refused = removed.unwrap_err().to_string();
        assert_eq!(
            refused,
            "cannot remove share x from the guest: no such share"
        );
    }

    #[tokio::test]
    async fn the_end_of_the_device_process_fails_every_request() {
        let (control, mut incoming, theirs) = started().await;
        let ends = async {
            request(&theirs).await;
            drop(theirs);
        };
        let (drained, ()) = tokio::join!(control.drain(), ends);
        assert!(matches!(drained, Err(Error::Gone { .. })));
        assert!(matches!(control.drain().await, Err(Error::Gone { .. })));
        assert!(incoming.recv().await.is_none());
    }

    #[tokio::test]
    async fn events_that_make_no_sense_are_skipped() {
        let (control, mut incoming, theirs) = started().await;
        theirs.send(&"nonsense", &[theirs.as_fd()]).await.unwrap();
        theirs.send(&"x".repeat(100_000), &[]).await.unwrap();
        reply(&theirs, 12345, None).await;
        let port = Event::Incoming {
            port: 7,
            guest_port: 1,
        };
        theirs.send(&port, &[]).await.unwrap();
        theirs.send(&port, &[theirs.as_fd()]).await.unwrap();
        theirs.send(&Event::Socket { id: 2 }, &[]).await.unwrap();
        let (stream, _end) = StdStream::pair().unwrap();
        for _ in 0..2 * MAX_INCOMING {
            theirs.send(&port, &[stream.as_fd()]).await.unwrap();
        }
        let other = Event::Incoming {
            port: 8,
            guest_port: 1,
        };
        theirs.send(&other, &[stream.as_fd()]).await.unwrap();
        let device_process = async {
            let drain = request(&theirs).await;
            reply(&theirs, drain.message.id, None).await;
        };
        let (drained, ()) = tokio::join!(control.drain(), device_process);
        assert_eq!(drained, Ok(()));
        for _ in 0..MAX_INCOMING {
            incoming.recv().await.unwrap();
        }
        assert!(incoming.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_socket_comes_with_its_file() {
        let (control, _incoming, theirs) = started().await;
        let (file, _end) = StdStream::pair().unwrap();
        let device_process = async {
            let find = request(&theirs).await;
            assert_eq!(find.message.call, Call::FindSocket { node: 5 });
            let found = Event::Socket {
                id: find.message.id,
            };
            theirs.send(&found, &[file.as_fd()]).await.unwrap();
            reply(&theirs, request(&theirs).await.message.id, None).await;
        };
        let asking = async {
            let file = control.find_socket(5).await.unwrap();
            assert!(is_stream(&file));
            // A reply without what was asked for.
            control.find_socket(6).await.unwrap_err();
        };
        tokio::join!(asking, device_process);
    }

    #[tokio::test]
    async fn no_request_waits_for_ever() {
        let (control, _incoming, theirs) = started().await;
        // From here on, time passes when nothing else can happen.
        tokio::time::pause();
        let (tap, _end) = StdStream::pair().unwrap();
        let failed = tokio::join!(
            control.add_share("x", tap.as_fd(), Cache::Brief),
            control.remove_share("x"),
            control.attach_net(0, tap.as_fd(), NetOptions::default()),
            control.change_net(0, NetOptions::default()),
            control.detach_net(0),
            control.cut_stream(7),
            control.reset_streams(),
            control.open(1),
        );
        for error in [
            failed.0, failed.1, failed.2, failed.3, failed.4, failed.5, failed.6,
        ] {
            assert!(matches!(error, Err(Error::TimedOut { .. })), "{error:?}");
        }
        assert_eq!(
            failed.7.unwrap_err().to_string(),
            "cannot open a stream to the guest: the device process has not replied for 90 s"
        );
        assert!(lock(&control.pending).as_ref().unwrap().is_empty());
        drop(theirs);
    }

    #[tokio::test]
    async fn a_caller_that_stops_waiting_leaves_nothing_behind() {
        let (control, _incoming, theirs) = started().await;
        let wait = tokio::time::timeout(Duration::from_millis(1), control.drain());
        assert!(wait.await.is_err());
        assert!(lock(&control.pending).as_ref().unwrap().is_empty());
        // The reply comes late.
        reply(&theirs, request(&theirs).await.message.id, Some("late")).await;
    }
}
