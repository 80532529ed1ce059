//! Moves bytes between the host's streams and the pipes or the terminal of a process.
//!
//! `pipes` starts one [`Output`] or [`Input`] for each direction when a process has been created.
//! Each has one task at most, which ends when its source ends, its sink is closed, or its
//! connection breaks. There is no polling: a relay waits for its source, or, when the sink is full,
//! for its sink only, so a slow reader on the host stops the writer in the container and nothing
//! piles up.
//!
//! # How a stream ends
//!
//! | result on the socket | means | then |
//! | --- | --- | --- |
//! | end of file | the host has half-closed it | input ends: the process reads end of file |
//! | EPIPE | the host has closed it | output ends: the process gets SIGPIPE |
//! | ECONNRESET, ENOTCONN | the device has reset it | the relay stops until it is attached again |
//!
//! The state of a relay is behind a lock that its task holds as long as it runs, and is consistent
//! whenever the task waits. So a relay is stopped by aborting its task, and its state changed when
//! the lock is free: [`Output::stop`], [`Input::stop`]. Dropping what these return starts it again.

mod ended;
mod input;
mod output;
mod task;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::reactor;

pub use ended::EndedOutputs;
pub use input::{Input, Way};
pub use output::{OUTPUT_GRACE, Output, Progress};

/// A descriptor that is registered with the event loop when it first has to be waited for. Most
/// sinks never have to: they take at once the few lines that a short-lived command writes.
enum Lazy {
    Plain(OwnedFd),
    Registered(AsyncFd<OwnedFd>),
    /// Only while one turns into the other, and after that has failed.
    Gone,
}

impl Lazy {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Plain(fd) => fd.as_fd(),
            Self::Registered(fd) => fd.get_ref().as_fd(),
            // Not an open descriptor: any use fails with EBADF.
            Self::Gone => rustix::fs::CWD,
        }
    }

    fn registered(&mut self, interest: Interest) -> io::Result<&AsyncFd<OwnedFd>> {
        if let Self::Plain(_) = self
            && let Self::Plain(fd) = std::mem::replace(self, Self::Gone)
        {
            *self = Self::Registered(reactor::watch(fd, interest)?);
        }
        match self {
            Self::Registered(fd) => Ok(fd),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// Waits until the descriptor may be ready, after an operation would have blocked.
    async fn ready(&mut self, interest: Interest) -> io::Result<()> {
        // Registration reports what is ready already.
        self.registered(interest)?
            .ready(interest)
            .await?
            .clear_ready();
        Ok(())
    }
}

/// Why the host's end of a stream moves no more bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// The other side has closed it in order.
    Closed,
    /// The connection has been reset; see the module.
    Broken,
    /// Anything else.
    Failed(Errno),
}

impl From<Errno> for Loss {
    fn from(error: Errno) -> Self {
        match error {
            Errno::PIPE | Errno::IO => Self::Closed,
            Errno::CONNRESET | Errno::NOTCONN => Self::Broken,
            error => Self::Failed(error),
        }
    }
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        Errno::from_io_error(&error).map_or(Self::Failed(Errno::IO), Self::from)
    }
}
