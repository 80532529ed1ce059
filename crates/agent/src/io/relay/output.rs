//! From a process to the host. See the parent module.

use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::io::Interest;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::Instant;

use super::ended::EndedOutputs;
use super::task::Task;
use super::{Lazy, Loss};
use crate::io::replay::Replay;
use crate::processes::reaper::Exit;

/// How long an output goes on that descendants of an ended process hold open. As in Docker.
pub const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// Size of a pipe that nobody has changed, pipe(7).
const PIPE_SIZE: usize = 64 << 10;

/// Progress of a process's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More may come.
    Flowing,
    /// The process has ended and all its own output has been passed on, but another process still
    /// holds the other end.
    Drained,
    /// Nothing more can come.
    Ended,
}

/// One output of a process.
#[derive(Clone)]
pub struct Output {
    task: Arc<Task<OutputState>>,
    progress: watch::Receiver<Progress>,
}

/// A weak reference to an output.
pub struct WeakOutput(Weak<Task<OutputState>>);

impl WeakOutput {
    /// Whether the output still exists.
    pub fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Whether it refers to this output.
    pub fn is(&self, output: &Output) -> bool {
        std::ptr::eq(self.0.as_ptr(), Arc::as_ptr(&output.task))
    }

    /// Drops the bytes that an ended output keeps, unless they are being sent again.
    pub fn forget(&self) {
        if let Some(mut state) = self.0.upgrade().and_then(|task| task.idle()) {
            state.replay.clear();
        }
    }
}

/// State of the relay.
pub struct OutputState {
    /// A pipe or the master of a terminal. `None` when it has ended.
    source: Option<Lazy>,
    /// `None` when the connection has ended or is broken.
    sink: Option<Lazy>,
    replay: Replay,
    exit: watch::Receiver<Option<Exit>>,
    progress: watch::Sender<Progress>,
    ended: Arc<EndedOutputs>,
}

/// An output whose relay is stopped, until it is attached or resumed.
#[must_use]
pub struct StoppedOutput {
    output: Output,
    state: OwnedMutexGuard<OutputState>,
}

impl Output {
    /// Passes on what a process writes, from `source` to `sink`, which is half-closed after it.
    /// When the process has ended and others still hold `source` open, that is [`OUTPUT_GRACE`]
    /// later, and what they write from then on is discarded.
    pub fn start(
        source: OwnedFd,
        sink: OwnedFd,
        exit: watch::Receiver<Option<Exit>>,
        ended: Arc<EndedOutputs>,
    ) -> Self {
        let (progress, seen) = watch::channel(Progress::Flowing);
        let output = Self {
            task: Arc::new(Task::new(OutputState {
                source: Some(Lazy::Plain(source)),
                sink: Some(Lazy::Plain(sink)),
                replay: Replay::default(),
                exit,
                progress,
                ended,
            })),
            progress: seen,
        };
        if let Some(state) = output.task.idle() {
            output.run(state);
        }
        output
    }

    /// Progress of the output.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Stops the relay, to attach another connection.
    pub async fn stop(&self) -> StoppedOutput {
        StoppedOutput {
            output: self.clone(),
            state: self.task.stop().await,
        }
    }

    /// Closes the output: what has not been passed on is lost.
    pub async fn close(&self) {
        let mut state = self.task.stop().await;
        state.source = None;
        state.sink = None;
        state.replay.clear();
        state.progress.send_replace(Progress::Ended);
    }

    pub(super) fn downgrade(&self) -> WeakOutput {
        WeakOutput(Arc::downgrade(&self.task))
    }

    fn run(&self, mut state: OwnedMutexGuard<OutputState>) {
        let output = self.clone();
        self.task.start(async move {
            let ended = state.relay().await;
            if ended == Relayed::All {
                state.replay.shrink();
                let (kept, length) = (state.ended.clone(), state.replay.len());
                drop(state);
                kept.add(output, length);
            }
        });
    }
}

impl StoppedOutput {
    /// Places in the stream at which another connection can go on.
    pub fn sendable_from(&self) -> RangeInclusive<u64> {
        self.state.replay.sendable_from()
    }

    /// Continues with another connection, at a place of [`StoppedOutput::sendable_from`].
    pub fn attach(mut self, sink: OwnedFd, place: u64) {
        self.state.sink = Some(Lazy::Plain(sink));
        self.state.replay.rewind(place);
        self.resume();
    }

    /// Continues as before.
    pub fn resume(self) {
        self.output.run(self.state);
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Relayed {
    /// All has been sent.
    All,
    /// The connection is broken: there may be another one.
    UntilBroken,
    /// The host takes no more.
    Refused,
}

impl OutputState {
    async fn relay(&mut self) -> Relayed {
        let relayed = match self.pump().await {
            Ok(()) => Relayed::All,
            Err(Loss::Broken) => Relayed::UntilBroken,
            Err(Loss::Closed) => Relayed::Refused,
            Err(Loss::Failed(error)) => {
                crate::log::error!("cannot pass output on: {error}");
                Relayed::Refused
            }
        };
        match relayed {
            Relayed::All => {
                if let Some(sink) = self.sink.take() {
                    // Fails only when the host has closed it already.
                    let _ = rustix::net::shutdown(sink.fd(), Shutdown::Write);
                }
                self.progress.send_replace(Progress::Ended);
            }
            Relayed::UntilBroken => self.sink = None,
            Relayed::Refused => {
                self.sink = None;
                self.source = None;
                self.replay.clear();
                self.progress.send_replace(Progress::Ended);
            }
        }
        relayed
    }

    async fn pump(&mut self) -> Result<(), Loss> {
        let mut read_since_exit = 0;
        let mut deadline = None;
        // A new process has written nothing yet. Later, the last readiness event may not have been
        // used up.
        if let Some(source @ Lazy::Plain(_)) = &mut self.source {
            tokio::select! {
                ready = source.ready(Interest::READABLE) => ready?,
                _ = self.exit.changed() => {}
            }
        }
        loop {
            // A busy source must not starve the others.
            tokio::task::coop::consume_budget().await;
            let sink = self.sink.as_mut().ok_or(Loss::Broken)?;
            while self.replay.has_unsent() {
                match self.replay.send_to(sink.fd()) {
                    Ok(()) | Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => sink.ready(Interest::WRITABLE).await?,
                    Err(error) => return Err(error.into()),
                }
            }
            let Some(source) = &mut self.source else {
                return Ok(());
            };
            // A process that writes without end must not hide the end of another one's output.
            if deadline.is_none() && read_since_exit >= capacity(source) {
                deadline = Some(self.drained());
                continue;
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                if let Some(source) = self.source.take() {
                    tokio::spawn(discard(source));
                }
                return Ok(());
            }
            // Checked before reading: the process writes nothing after its exit.
            let exited = self.exit.borrow().is_some();
            match self.replay.read_from(source.fd()) {
                // The master of a terminal whose slave is closed fails with EIO.
                Ok(0) | Err(Errno::IO) => self.source = None,
                Ok(length) if exited => read_since_exit += length,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if exited => match deadline {
                    None => deadline = Some(self.drained()),
                    Some(deadline) => {
                        let ready = source.ready(Interest::READABLE);
                        // At the deadline, the next round ends the output.
                        if let Ok(ready) = tokio::time::timeout_at(deadline, ready).await {
                            ready?;
                        }
                    }
                },
                Err(Errno::AGAIN) => {
                    tokio::select! {
                        ready = source.ready(Interest::READABLE) => ready?,
                        // Read again after the exit: empty now means all is read.
                        _ = self.exit.changed() => {}
                    }
                }
                Err(error) => return Err(Loss::Failed(error)),
            }
        }
    }

    /// All that the process itself has written is passed on. Returns when others have to end.
    fn drained(&self) -> Instant {
        self.progress.send_replace(Progress::Drained);
        Instant::now() + OUTPUT_GRACE
    }
}

/// Most bytes that a process can have left unread.
fn capacity(source: &Lazy) -> usize {
    // A terminal holds less, and has no such number.
    rustix::pipe::fcntl_getpipe_size(source.fd()).unwrap_or(PIPE_SIZE)
}

/// Reads what nobody wants: whoever writes it goes on.
async fn discard(mut source: Lazy) {
    let mut buffer = [0; 4096];
    loop {
        tokio::task::coop::consume_budget().await;
        match rustix::io::read(source.fd(), &mut buffer) {
            Ok(0) => return,
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if source.ready(Interest::READABLE).await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}
