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

use crate::event;
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
            *self = Self::Registered(event::watch(fd, interest)?);
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
        self.registered(interest)?
            .ready(interest)
            .await?
            .clear_ready();
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
        match move_piece(
            source.fd()?,
            |fd, buffer| rustix::io::read(fd, buffer),
            |piece| {
                rustix::net::send(
                    sink.fd().map_err(|_| Errno::BADF)?,
                    piece,
                    SendFlags::NOSIGNAL,
                )
            },
        ) {
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
        match move_piece(
            source.fd()?,
            |fd, buffer| rustix::io::read(fd, buffer),
            |piece| rustix::io::write(sink.fd().map_err(|_| Errno::BADF)?, piece),
        ) {
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
                if pipe {
                    rustix::io::write(fd, rest)
                } else {
                    rustix::net::send(fd, rest, SendFlags::NOSIGNAL)
                }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::fs::OFlags;
    use rustix::pipe::PipeFlags;

    use super::*;

    type ExitSender = watch::Sender<Option<Exit>>;

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(20), test)
                .await
                .unwrap()
        });
    }

    /// The agent's end, non-blocking, and the other one.
    fn stream() -> (OwnedFd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours.into(), theirs)
    }

    /// Reading end, writing end.
    fn pipe() -> (OwnedFd, OwnedFd) {
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    fn unblocked(fd: OwnedFd) -> OwnedFd {
        rustix::fs::fcntl_setfl(&fd, OFlags::NONBLOCK).unwrap();
        fd
    }

    struct Outgoing {
        process: std::fs::File,
        host: UnixStream,
        exit: ExitSender,
        progress: watch::Receiver<Output>,
    }

    fn outgoing() -> Outgoing {
        let (source, process) = pipe();
        let (sink, host) = stream();
        let (exit, exit_seen) = watch::channel(None);
        let (progress, progress_seen) = watch::channel(Output::Flowing);
        tokio::spawn(output(unblocked(source), sink, exit_seen, progress));
        Outgoing {
            process: process.into(),
            host,
            exit,
            progress: progress_seen,
        }
    }

    async fn reach(progress: &mut watch::Receiver<Output>, wanted: Output) {
        progress.wait_for(|output| *output == wanted).await.unwrap();
    }

    #[test]
    fn output_arrives_and_then_its_end() {
        run(async {
            let mut out = outgoing();
            out.process.write_all(b"hello").unwrap();
            drop(out.process);
            reach(&mut out.progress, Output::Ended).await;
            let mut text = String::new();
            out.host.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        });
    }

    #[test]
    fn a_slow_host_stops_the_process_and_loses_nothing() {
        run(async {
            const LENGTH: usize = 8 << 20;
            let mut out = outgoing();
            let mut process = out.process;
            let writer = std::thread::spawn(move || {
                let pattern: Vec<u8> = (0..=250u8).cycle().take(LENGTH).collect();
                process.write_all(&pattern).unwrap();
            });
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!writer.is_finished());
            let mut host = out.host;
            let reader = std::thread::spawn(move || {
                let mut bytes = Vec::new();
                host.read_to_end(&mut bytes).unwrap();
                bytes
            });
            reach(&mut out.progress, Output::Ended).await;
            writer.join().unwrap();
            let bytes = reader.join().unwrap();
            assert_eq!(bytes.len(), LENGTH);
            assert!(bytes.iter().copied().eq((0..=250u8).cycle().take(LENGTH)));
        });
    }

    #[test]
    fn output_that_others_hold_open_is_drained_when_the_process_has_ended() {
        run(async {
            let mut out = outgoing();
            out.process.write_all(b"mine").unwrap();
            tokio::task::yield_now().await;
            assert_eq!(*out.progress.borrow(), Output::Flowing);
            out.exit.send_replace(Some(Exit { status: 0 }));
            reach(&mut out.progress, Output::Drained).await;
            let mut text = [0; 4];
            out.host.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"mine");
            out.process.write_all(b"descendant's").unwrap();
            drop(out.process);
            reach(&mut out.progress, Output::Ended).await;
            let mut rest = String::new();
            out.host.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "descendant's");
        });
    }

    #[test]
    fn a_host_that_has_gone_breaks_the_pipe() {
        run(async {
            let mut out = outgoing();
            drop(out.host);
            out.process.write_all(b"x").unwrap();
            reach(&mut out.progress, Output::Ended).await;
            assert_eq!(
                out.process.write_all(b"x").unwrap_err().kind(),
                io::ErrorKind::BrokenPipe
            );
        });
    }

    #[test]
    fn input_arrives_and_then_its_end() {
        run(async {
            let (process, sink) = pipe();
            let (source, mut host) = stream();
            let (_exit, exit_seen) = watch::channel(None);
            let relay = tokio::spawn(input(source, unblocked(sink), exit_seen));
            host.write_all(b"hello").unwrap();
            host.shutdown(std::net::Shutdown::Write).unwrap();
            relay.await.unwrap();
            let mut text = String::new();
            std::fs::File::from(process)
                .read_to_string(&mut text)
                .unwrap();
            assert_eq!(text, "hello");
        });
    }

    #[test]
    fn input_ends_with_its_process() {
        run(async {
            let (process, sink) = pipe();
            let (source, mut host) = stream();
            let (exit, exit_seen) = watch::channel(None);
            let relay = tokio::spawn(input(source, unblocked(sink), exit_seen));
            tokio::task::yield_now().await;
            exit.send_replace(Some(Exit { status: 0 }));
            relay.await.unwrap();
            drop(process);
            assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        });
    }
}
