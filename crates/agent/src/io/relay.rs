//! Moves bytes between the host's streams and the pipes or the terminal of a process.
//!
//! Called by `service` when it has started a process. Each function is one task and one direction; it ends when
//! its source ends, or its sink is closed. There is no polling: a relay waits for its source, or, when the sink is
//! full, for its sink only, so a slow reader on the host stops the writer in the container and nothing piles up.
//!
//! A descriptor is registered with the event loop when it first has to be waited for. Most sinks never have to: they
//! take at once the few lines that a short-lived command writes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::{SpliceFlags, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::io::reactor;
use crate::processes::reaper::Exit;

/// Largest piece moved at once: what a pipe holds.
const PIECE: usize = 64 * 1024;

/// Shared by all relays that copy (the agent has one thread), so that memory is touched, and paid for, only once.
/// Never held across an await.
static SCRATCH: Mutex<[u8; PIECE]> = Mutex::new([0; PIECE]);

/// How far the output of a process has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
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
            *self = Self::Registered(reactor::watch(fd, interest)?);
        }
        match self {
            Self::Registered(fd) => Ok(fd),
            _ => Err(Errno::BADF.into()),
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

/// How bytes get from one descriptor to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Inside the kernel. One of the two is a pipe.
    Splice,
    /// Through the agent's memory.
    Copy,
}

/// Passes on what a process writes, from `source` (a pipe or the master of its terminal) to `sink`, and then
/// half-closes it. When the host no longer takes it, the process is told as a broken pipe tells it.
pub async fn output(
    way: Way,
    source: OwnedFd,
    sink: OwnedFd,
    mut exit: watch::Receiver<Option<Exit>>,
    progress: watch::Sender<Progress>,
) {
    let mut source = Lazy::Plain(source);
    let mut sink = Lazy::Plain(sink);
    let outcome = pump_output(way, &mut source, &mut sink, &mut exit, &progress).await;
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
    progress.send_replace(Progress::Ended);
}

async fn pump_output(
    way: Way,
    source: &mut Lazy,
    sink: &mut Lazy,
    exit: &mut watch::Receiver<Option<Exit>>,
    progress: &watch::Sender<Progress>,
) -> io::Result<()> {
    tokio::select! {
        ready = source.ready(Interest::READABLE) => ready?,
        _ = exit.changed() => {}
    }
    loop {
        let exited = exit.borrow().is_some();
        match step(way, source, sink).await? {
            Step::Moved => {}
            Step::Empty if exited => {
                progress.send_replace(Progress::Drained);
                source.ready(Interest::READABLE).await?;
            }
            Step::Empty => {
                tokio::select! {
                    ready = source.ready(Interest::READABLE) => ready?,
                    // Once more round, to see whether the source is empty after the end of its process.
                    _ = exit.changed() => {}
                }
            }
            Step::End => return Ok(()),
        }
    }
}

/// Passes on what the host sends to a process, from the stream `source` to `sink`. Ends when the host has
/// half-closed the stream (the process then reads end of file from a pipe; a terminal knows no such thing), when
/// the process no longer reads, or when it has ended.
pub async fn input(
    way: Way,
    source: OwnedFd,
    sink: OwnedFd,
    mut exit: watch::Receiver<Option<Exit>>,
) {
    let mut source = Lazy::Plain(source);
    let mut sink = Lazy::Plain(sink);
    let pump = async {
        source.ready(Interest::READABLE).await?;
        loop {
            match step(way, &mut source, &mut sink).await? {
                Step::Moved => {}
                Step::Empty => source.ready(Interest::READABLE).await?,
                Step::End => return Ok(()),
            }
        }
    };
    let outcome: io::Result<()> = tokio::select! {
        outcome = pump => outcome,
        _ = exit.wait_for(Option::is_some) => Ok(()),
    };
    if let Err(error) = outcome
        && !is_closed(&error)
    {
        crate::log::error!("cannot pass input on: {error}");
    }
}

/// What one step of a relay has found.
enum Step {
    Moved,
    /// The source has nothing now.
    Empty,
    End,
}

/// Moves one piece; waits for the sink if that is full, but never for the source.
async fn step(way: Way, source: &mut Lazy, sink: &mut Lazy) -> io::Result<Step> {
    // A busy source must not keep the others from their turn.
    tokio::task::coop::consume_budget().await;
    match way {
        Way::Splice => splice_piece(source, sink).await,
        Way::Copy => copy_piece(source, sink).await,
    }
}

async fn splice_piece(source: &mut Lazy, sink: &mut Lazy) -> io::Result<Step> {
    match splice(
        source.fd()?,
        None,
        sink.fd()?,
        None,
        PIECE,
        SpliceFlags::NONBLOCK,
    ) {
        Ok(0) => return Ok(Step::End),
        Ok(_) | Err(Errno::INTR) => return Ok(Step::Moved),
        Err(Errno::AGAIN) => {}
        Err(error) => return Err(error.into()),
    }
    // One of the two is not ready; which one, it does not say.
    let (readable, writable) = {
        let mut fds = [
            PollFd::from_borrowed_fd(source.fd()?, PollFlags::IN),
            PollFd::from_borrowed_fd(sink.fd()?, PollFlags::OUT),
        ];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )?;
        (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
    };
    match (readable, writable) {
        (false, _) => Ok(Step::Empty),
        (true, false) => sink.ready(Interest::WRITABLE).await.map(|()| Step::Moved),
        // It has become ready since.
        (true, true) => Ok(Step::Moved),
    }
}

async fn copy_piece(source: &mut Lazy, sink: &mut Lazy) -> io::Result<Step> {
    let rest = {
        let mut scratch = SCRATCH.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = match rustix::io::read(source.fd()?, &mut scratch[..]) {
            // The master of a terminal whose other side is closed says EIO.
            Ok(0) | Err(Errno::IO) => return Ok(Step::End),
            Ok(n) => &scratch[..n],
            Err(Errno::INTR) => return Ok(Step::Moved),
            Err(Errno::AGAIN) => return Ok(Step::Empty),
            Err(error) => return Err(error.into()),
        };
        match rustix::io::write(sink.fd()?, piece) {
            Ok(n) => piece[n..].to_vec(),
            Err(Errno::AGAIN | Errno::INTR) => piece.to_vec(),
            Err(error) => return Err(error.into()),
        }
    };
    let mut rest = &rest[..];
    while !rest.is_empty() {
        match rustix::io::write(sink.fd()?, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => sink.ready(Interest::WRITABLE).await?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Step::Moved)
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
        progress: watch::Receiver<Progress>,
    }

    fn outgoing(way: Way) -> Outgoing {
        let (source, process) = pipe();
        let (sink, host) = stream();
        let (exit, exit_seen) = watch::channel(None);
        let (progress, progress_seen) = watch::channel(Progress::Flowing);
        tokio::spawn(output(way, unblocked(source), sink, exit_seen, progress));
        Outgoing {
            process: process.into(),
            host,
            exit,
            progress: progress_seen,
        }
    }

    async fn reach(progress: &mut watch::Receiver<Progress>, wanted: Progress) {
        progress.wait_for(|output| *output == wanted).await.unwrap();
    }

    #[test]
    fn output_arrives_and_then_its_end() {
        run(async {
            let mut out = outgoing(Way::Splice);
            out.process.write_all(b"hello").unwrap();
            drop(out.process);
            reach(&mut out.progress, Progress::Ended).await;
            let mut text = String::new();
            out.host.read_to_string(&mut text).unwrap();
            assert_eq!(text, "hello");
        });
    }

    #[test]
    fn a_slow_host_stops_the_process_and_loses_nothing() {
        slow_host(Way::Splice);
        slow_host(Way::Copy);
    }

    fn slow_host(way: Way) {
        run(async {
            const LENGTH: usize = 8 << 20;
            let mut out = outgoing(way);
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
            reach(&mut out.progress, Progress::Ended).await;
            writer.join().unwrap();
            let bytes = reader.join().unwrap();
            assert_eq!(bytes.len(), LENGTH);
            assert!(bytes.iter().copied().eq((0..=250u8).cycle().take(LENGTH)));
        });
    }

    #[test]
    fn output_that_others_hold_open_is_drained_when_the_process_has_ended() {
        run(async {
            let mut out = outgoing(Way::Splice);
            out.process.write_all(b"mine").unwrap();
            tokio::task::yield_now().await;
            assert_eq!(*out.progress.borrow(), Progress::Flowing);
            out.exit.send_replace(Some(Exit::UNKNOWN));
            reach(&mut out.progress, Progress::Drained).await;
            let mut text = [0; 4];
            out.host.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"mine");
            out.process.write_all(b"descendant's").unwrap();
            drop(out.process);
            reach(&mut out.progress, Progress::Ended).await;
            let mut rest = String::new();
            out.host.read_to_string(&mut rest).unwrap();
            assert_eq!(rest, "descendant's");
        });
    }

    #[test]
    fn a_host_that_has_gone_breaks_the_pipe() {
        run(async {
            let mut out = outgoing(Way::Splice);
            drop(out.host);
            out.process.write_all(b"x").unwrap();
            reach(&mut out.progress, Progress::Ended).await;
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
            let relay = tokio::spawn(input(Way::Splice, source, unblocked(sink), exit_seen));
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
            let relay = tokio::spawn(input(Way::Splice, source, unblocked(sink), exit_seen));
            tokio::task::yield_now().await;
            exit.send_replace(Some(Exit::UNKNOWN));
            relay.await.unwrap();
            drop(process);
            assert_eq!(host.read(&mut [0; 1]).unwrap(), 0);
        });
    }
}
