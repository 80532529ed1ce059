//! The caller's side of the control protocol. Blocking: commands need no asynchronous runtime.

use std::cell::Cell;
use std::io::ErrorKind as IoErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::protocol::{Hello, OLDEST, Received, Reply, Request, receive, send};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::SandboxPath;

/// A connection to a sandbox.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// The answer to our greeting has not been read yet.
    greeting: Cell<bool>,
}

impl From<OwnedFd> for Client {
    /// A connection on which the greetings have been exchanged.
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            greeting: Cell::new(false),
        }
    }
}

impl From<Client> for OwnedFd {
    fn from(client: Client) -> Self {
        client.socket
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Client {
    /// Connects to a sandbox; `None` when it does not live.
    ///
    /// # Errors
    /// It lives and cannot be reached.
    pub fn open(path: &SandboxPath) -> Result<Option<Self>> {
        let doing = || format!("reach the sandbox process of {}", path.id);
        let flags = SocketFlags::CLOEXEC;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).context(doing)?;
        let address = SocketAddrUnix::new(path.socket()).context(doing)?;
        match connect(&socket, &address) {
            Ok(()) => Self::greet(socket).map(Some),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(error).context(doing),
        }
    }

    /// Connects to a sandbox that lives.
    ///
    /// # Errors
    /// `Gone` when it does not, or it cannot be reached.
    pub fn connect(path: &SandboxPath) -> Result<Self> {
        Self::open(path)?.ok_or_else(gone)
    }

    /// Greets on a new connection, without waiting for the answer.
    pub(super) fn greet(socket: OwnedFd) -> Result<Self> {
        match send(&socket, &Request::Hello(Hello::own()), &[]) {
            Ok(()) => Ok(Self {
                socket,
                greeting: Cell::new(true),
            }),
            Err(_) => Err(gone()),
        }
    }

    /// Whether the answer to our greeting has been read.
    pub fn is_greeted(&self) -> bool {
        !self.greeting.get()
    }

    /// Waits for the answer to our greeting: a sandbox that was just launched can be found by
    /// others then.
    ///
    /// # Errors
    /// Why the sandbox did not start, or that it speaks an older protocol than this hull does.
    pub fn wait_for_greeting(&self) -> Result<()> {
        if !self.greeting.replace(false) {
            return Ok(());
        }
        match self.receive_one()?.message {
            Reply::Hello(hello) if hello.version >= OLDEST => Ok(()),
            Reply::Hello(hello) => Err(Error::unsupported(format_args!(
                "the sandbox was started by {}, whose control protocol {} is too old for {}",
                hello.build,
                hello.version,
                Hello::own().build
            ))),
            other => Err(unexpected(&other)),
        }
    }

    /// Limits how long an answer is waited for.
    ///
    /// # Errors
    /// The timeout cannot be set.
    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        set_socket_timeout(&self.socket, Timeout::Recv, Some(timeout))
            .context(|| "set the timeout of a connection")
    }

    /// Asks, and waits for the answer. [`Reply::Failed`] comes as the error it is.
    ///
    /// # Errors
    /// What the sandbox answers; `Gone` when it has ended.
    pub fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Received<Reply>> {
        self.tell(request, fds)?;
        self.receive()
    }

    /// Asks what is answered by [`Reply::Ok`].
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn do_(&self, request: &Request) -> Result<()> {
        match self.ask(request, &[])?.message {
            Reply::Ok => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks what is answered by [`Reply::Streams`].
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn streams(&self, request: &Request) -> Result<Vec<OwnedFd>> {
        let received = self.ask(request, &[])?;
        match received.message {
            Reply::Streams => Ok(received.fds),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a request whose answer is read later, or that is not answered.
    ///
    /// # Errors
    /// `Gone`, or why the sandbox has refused our greeting.
    pub fn tell(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        send(&self.socket, request, fds).map_err(|error| match error.kind() {
            // Too much at once, or too many descriptors.
            IoErrorKind::InvalidData | IoErrorKind::InvalidInput => {
                Error::invalid(error.to_string())
            }
            // One that refuses our greeting says why before it closes the connection.
            IoErrorKind::BrokenPipe | IoErrorKind::ConnectionReset => {
                self.wait_for_greeting().err().unwrap_or_else(gone)
            }
            _ => gone(),
        })
    }

    /// Waits for the next answer.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn receive(&self) -> Result<Received<Reply>> {
        self.wait_for_greeting()?;
        self.receive_one()
    }

    fn receive_one(&self) -> Result<Received<Reply>> {
        let received = match receive(&self.socket) {
            Err(error) if error.kind() == IoErrorKind::WouldBlock => {
                return Err(Error::guest("the sandbox process does not answer"));
            }
            received => received.context(|| "read the answer of the sandbox process")?,
        };
        let received = received.ok_or_else(gone)?;
        match received.message {
            Reply::Failed(error) => Err(error),
            _ => Ok(received),
        }
    }
}

/// The sandbox process has ended without an answer.
pub fn gone() -> Error {
    Error::with_kind(
        ErrorKind::Gone,
        "the sandbox process has ended: it was killed, or it broke down",
    )
}

/// An answer to another question.
pub fn unexpected(reply: &Reply) -> Error {
    let mut text = format!("{reply:?}");
    text.truncate(80);
    Error::new(format!("the sandbox process answered {text}"))
        .hint("was hull updated while the container ran? stop it and start it again")
}
