//! Moves bytes between the host's streams and the pipes or the terminal of a process.
//!
//! Called by `service` when it has started a process. Each function is one task and one direction; it ends when
//! its source ends, or its sink is closed. There is no polling: a relay waits for its source, or, when the sink is
//! full, for its sink only, so a slow reader on the host stops the writer in the container and nothing piles up.
//!
//! A descriptor is registered with the event loop when it first has to be waited for. Most streams never have to:
//! a short-lived command writes a few lines to a sink that takes them at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::process::Exit;

/// Largest piece moved at once: what a pipe holds.
const PIECE: usize = 64 * 1024;

/// Shared by all relays (the agent has one thread), so that memory is touched, and paid for, only once. Never held
/// across an await.
static SCRATCH: Mutex<[u8; PIECE]> = Mutex::new([0; PIECE]);

/// How far the output of a process has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// There may be more.
    Flowing,
    /// The process has ended and all that it wrote itself has been passed on; but something else still holds the
    /// other end.
    Drained,
    /// Nothing more can come.
    Ended,
}

/// A descriptor that is registered with the event loop on first use.
enum Lazy {
    Plain(OwnedFd),
    Registered(AsyncFd<OwnedFd>),
    /// Only while it changes from one into the other, and after that failed.
    Gone,
}

impl Lazy {
    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        match self {
            Self::Plain(fd) => Ok(fd.as_fd()),
            Self::Registered(fd) => Ok(fd.get_ref().as_fd()),
            Self::Gone => Err(Errno::BADF.into()),
        }
    }

    fn registered(&mut self, interest: Interest) -> io::Result<&AsyncFd<OwnedFd>> {
        if let Self::Plain(_) = self
            && let Self::Plain(fd) = std::mem::replace(self, Self::Gone)
        {
            *self = Self::Registered(AsyncFd::with_interest(fd, interest)?);
        }
        match self {
            Self::Registered(fd) => Ok(fd),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// Runs `operation` until it no longer says that it would block.
    async fn run<T>(
        &mut self,
        interest: Interest,
        mut operation: impl FnMut(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> io::Result<T> {
        loop {
            match operation(self.fd()?) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.ready(interest).await?,
                other => return Ok(other?),
            }
        }
    }

    /// Waits until the descriptor may be ready, after an operation said that it would block.
    async fn ready(&mut self, interest: Interest) -> io::Result<()> {
        if let Self::Plain(_) = self {
            // The event of the edge before registration comes again with it.
            self.registered(interest)?;
        }
        self.registered(interest)?.ready(interest).await?.clear_ready();
        Ok(())
    }
}

/// Passes on what a process writes, from `source` (a pipe or the master of its terminal) to `sink`, and then
/// half-closes it. When the host no longer takes it, the process is told as a broken pipe tells it.
pub async fn output(
    source: OwnedFd,
    sink: OwnedFd,
    mut exit: watch::Receiver<Option<Exit>>,
    progress: watch::Sender<Output>,
) {
    let mut source = Lazy::Plain(source);
    let mut sink = Lazy::Plain(sink);
    let outcome = pump_output(&mut source, &mut sink, &mut exit, &progress).await;
    if let Err(error) = &outcome
        && !is_closed(error)
    {
        crate::log::error!("cannot pass output on: {error}");
    }
    drop(source);
    if outcome.is_ok()
        && let Ok(fd) = sink.fd()
    {
        // Fails only when the host has closed it already.
        let _ = rustix::net::shutdown(fd, Shutdown::Write);
    }
    progress.send_replace(Output::Ended);
}

async fn pump_output(
    source: &mut Lazy,
    sink: &mut Lazy,
    exit: &mut watch::Receiver<Option<Exit>>,
    progress: &watch::Sender<Output>,
) -> io::Result<()> {
    loop {
        tokio::task::coop::consume_budget().await;
        let exited = exit.borrow().is_some();
        match move_piece(source.fd()?, |fd, buffer| rustix::io::read(fd, buffer), |piece| {
            rustix::net::send(sink.fd().map_err(|_| Errno::BADF)?, piece, SendFlags::NOSIGNAL)
        }) {
            Moved::All => {}
            Moved::Part(rest) => write_rest(sink, &rest, false).await?,
            Moved::Empty if exited => {
                progress.send_replace(Output::Drained);
                source.ready(Interest::READABLE).await?;
            }
            Moved::Empty => {
                tokio::select! {
                    ready = source.ready(Interest::READABLE) => ready?,
                    // Once more round, to see whether the source is empty after the end of its process.
                    _ = exit.changed() => {}
                }
            }
            Moved::End => return Ok(()),
            Moved::Failed(error) => return Err(error.into()),
        }
    }
}

/// Passes on what the host sends to a process, from the stream `source` to `sink`. Ends when the host has
/// half-closed the stream (the process then reads end of file from a pipe; a terminal knows no such thing), when
/// the process no longer reads, or when it has ended.
pub async fn input(source: OwnedFd, sink: OwnedFd, mut exit: watch::Receiver<Option<Exit>>) {
    let mut source = Lazy::Plain(source);
    let mut sink = Lazy::Plain(sink);
    let outcome = tokio::select! {
        outcome = pump_input(&mut source, &mut sink) => outcome,
        _ = exit.wait_for(Option::is_some) => Ok(()),
    };
    if let Err(error) = outcome
        && !is_closed(&error)
    {
        crate::log::error!("cannot pass input on: {error}");
    }
}

async fn pump_input(source: &mut Lazy, sink: &mut Lazy) -> io::Result<()> {
    loop {
        tokio::task::coop::consume_budget().await;
        match move_piece(source.fd()?, |fd, buffer| rustix::io::read(fd, buffer), |piece| {
            rustix::io::write(sink.fd().map_err(|_| Errno::BADF)?, piece)
        }) {
            Moved::All => {}
            Moved::Part(rest) => write_rest(sink, &rest, true).await?,
            Moved::Empty => source.ready(Interest::READABLE).await?,
            Moved::End => return Ok(()),
            Moved::Failed(error) => return Err(error.into()),
        }
    }
}

/// What one read and one write have done.
enum Moved {
    All,
    /// The sink did not take all: this is left.
    Part(Vec<u8>),
    /// The source has nothing now.
    Empty,
    End,
    Failed(Errno),
}

fn move_piece(
    source: BorrowedFd<'_>,
    mut read: impl FnMut(BorrowedFd<'_>, &mut [u8]) -> Result<usize, Errno>,
    mut write: impl FnMut(&[u8]) -> Result<usize, Errno>,
) -> Moved {
    let mut scratch = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
    let piece = loop {
        match read(source, &mut scratch[..]) {
            // The master of a terminal whose other side is closed says EIO.
            Ok(0) | Err(Errno::IO) => return Moved::End,
            Ok(n) => break &scratch[..n],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Moved::Empty,
            Err(error) => return Moved::Failed(error),
        }
    };
    match write(piece) {
        Ok(n) if n == piece.len() => Moved::All,
        Ok(n) => Moved::Part(piece[n..].to_vec()),
        Err(Errno::AGAIN | Errno::INTR) => Moved::Part(piece.to_vec()),
        Err(error) => Moved::Failed(error),
    }
}

async fn write_rest(sink: &mut Lazy, mut rest: &[u8], pipe: bool) -> io::Result<()> {
    while !rest.is_empty() {
        let written = sink
            .run(Interest::WRITABLE, |fd| {
                if pipe { rustix::io::write(fd, rest) } else { rustix::net::send(fd, rest, SendFlags::NOSIGNAL) }
            })
            .await?;
        rest = &rest[written..];
    }
    Ok(())
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN | libc::EIO)
    )
}
