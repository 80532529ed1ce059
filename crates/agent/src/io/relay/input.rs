//! From the host to a process. See the parent module.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use tokio::io::Interest;
use tokio::sync::{OwnedMutexGuard, watch};

use super::task::Task;
use super::{Lazy, Loss};
use crate::processes::reaper::Exit;

/// Most bytes that are spliced at once: the capacity of a pipe.
const SPLICE_PIECE: usize = 64 << 10;

/// Most bytes that are copied at once: more than a terminal takes.
const COPY_PIECE: usize = 4 << 10;

/// How bytes are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Inside the kernel. One of the two is a pipe.
    Splice,
    /// Through the agent's memory.
    Copy,
}

/// The input of a process.
#[derive(Clone)]
pub struct Input {
    task: Arc<Task<InputState>>,
}

/// State of the relay.
pub struct InputState {
    way: Way,
    /// `None` when the connection has ended or is broken.
    source: Option<Lazy>,
    /// A pipe or the master of a terminal. `None` when the input has ended.
    sink: Option<Lazy>,
    /// Received, and not yet taken by the sink. Only with [`Way::Copy`].
    pending: Vec<u8>,
    /// Bytes taken from the host.
    received: u64,
    exit: watch::Receiver<Option<Exit>>,
}

/// An input whose relay is stopped, until it is attached or resumed.
#[must_use]
pub struct StoppedInput {
    input: Input,
    state: OwnedMutexGuard<InputState>,
}

impl Input {
    /// Passes on what the host sends to a process, from the stream `source` to `sink`. Ends when
    /// the host has half-closed the stream (the process then reads end of file from a pipe; a
    /// terminal has none, and waits for another stream), when the process no longer reads, or when
    /// it has ended.
    pub fn start(
        way: Way,
        source: OwnedFd,
        sink: OwnedFd,
        exit: watch::Receiver<Option<Exit>>,
    ) -> Self {
        let input = Self {
            task: Arc::new(Task::new(InputState {
                way,
                source: Some(Lazy::Plain(source)),
                sink: Some(Lazy::Plain(sink)),
                pending: Vec::new(),
                received: 0,
                exit,
            })),
        };
        if let Some(state) = input.task.idle() {
            input.run(state);
        }
        input
    }

    /// Stops the relay, to attach another connection.
    pub async fn stop(&self) -> StoppedInput {
        StoppedInput {
            input: self.clone(),
            state: self.task.stop().await,
        }
    }

    /// Closes the input.
    pub async fn close(&self) {
        self.task.stop().await.close();
    }

    fn run(&self, mut state: OwnedMutexGuard<InputState>) {
        self.task.start(async move { state.relay().await });
    }
}

impl StoppedInput {
    /// How many bytes have been taken from the host.
    pub fn received(&self) -> u64 {
        self.state.received
    }

    /// Whether the process's side has taken all of it.
    #[cfg(test)]
    pub fn is_taken(&self) -> bool {
        self.state.pending.is_empty()
    }

    /// Continues with another connection, which is closed if the input has ended.
    pub fn attach(mut self, source: OwnedFd) {
        self.state.source = self.state.sink.is_some().then_some(Lazy::Plain(source));
        self.resume();
    }

    /// Continues as before.
    pub fn resume(self) {
        self.input.run(self.state);
    }
}

impl InputState {
    fn close(&mut self) {
        self.source = None;
        self.sink = None;
        self.pending = Vec::new();
    }

    async fn relay(&mut self) {
        let mut exit = self.exit.clone();
        let lost = tokio::select! {
            lost = self.pump() => lost,
            _ = exit.wait_for(Option::is_some) => Loss::Closed,
        };
        match lost {
            Loss::Broken => self.source = None,
            Loss::Closed => self.close(),
            Loss::Failed(error) => {
                crate::log::error!("cannot pass input on: {error}");
                self.close();
            }
        }
    }

    async fn pump(&mut self) -> Loss {
        match self.steps().await {
            Ok(()) => Loss::Closed,
            Err(lost) => lost,
        }
    }

    /// Moves bytes until the stream has ended in order.
    async fn steps(&mut self) -> Result<(), Loss> {
        let (Some(source), Some(sink)) = (&mut self.source, &mut self.sink) else {
            return Err(Loss::Broken);
        };
        // A new stream has no bytes yet. Later, its last readiness event may not have been used up.
        let mut ready = matches!(source, Lazy::Registered(_));
        loop {
            // A busy source must not starve the others.
            tokio::task::coop::consume_budget().await;
            while !self.pending.is_empty() {
                match rustix::io::write(sink.fd(), &self.pending) {
                    Ok(n) => drop(self.pending.drain(..n)),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => sink.ready(Interest::WRITABLE).await?,
                    Err(error) => return Err(error.into()),
                }
            }
            if !ready {
                source.ready(Interest::READABLE).await?;
                ready = true;
            }
            let moved = match self.way {
                Way::Splice => splice_piece(source, sink, &mut ready).await?,
                Way::Copy => copy_piece(source, &mut self.pending, &mut ready)?,
            };
            match moved {
                // A terminal has no end of file: its input may go on with another connection.
                Some(0) if self.way == Way::Copy => return Err(Loss::Broken),
                Some(0) => return Ok(()),
                Some(n) => self.received += n as u64,
                None => {}
            }
        }
    }
}

/// Moves one piece. Returns the number of bytes, 0 at the end; clears `ready` if the source has no
/// more.
async fn splice_piece(
    source: &Lazy,
    sink: &mut Lazy,
    ready: &mut bool,
) -> Result<Option<usize>, Loss> {
    let flags = SpliceFlags::NONBLOCK;
    match splice(source.fd(), None, sink.fd(), None, SPLICE_PIECE, flags) {
        Ok(n) => return Ok(Some(n)),
        Err(Errno::INTR) => return Ok(None),
        Err(Errno::AGAIN) => {}
        Err(error) => return Err(error.into()),
    }
    // One of the two is not ready; splice does not report which.
    let (readable, writable) = {
        let mut fds = [
            PollFd::from_borrowed_fd(source.fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(sink.fd(), PollFlags::OUT),
        ];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now))?;
        (!fds[0].revents().is_empty(), !fds[1].revents().is_empty())
    };
    match (readable, writable) {
        (false, _) => *ready = false,
        (true, false) => sink.ready(Interest::WRITABLE).await?,
        // It has become ready since.
        (true, true) => {}
    }
    Ok(None)
}

/// As [`splice_piece`], into `pending`, which is empty.
fn copy_piece(
    source: &Lazy,
    pending: &mut Vec<u8>,
    ready: &mut bool,
) -> Result<Option<usize>, Loss> {
    let mut piece = [0; COPY_PIECE];
    match rustix::io::read(source.fd(), &mut piece) {
        Ok(n) => {
            pending.extend_from_slice(&piece[..n]);
            Ok(Some(n))
        }
        Err(Errno::INTR) => Ok(None),
        Err(Errno::AGAIN) => {
            *ready = false;
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
