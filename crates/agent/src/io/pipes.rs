//! Connects a new process to the host's streams: takes the streams that a call names, makes the pipes between them
//! and the process, and starts the relays. Called by `service` around the creation of a process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use hull_protocol::agent;
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::container::{ChildIo, Stdio};
use crate::io::relay::{self, Progress, Way};
use crate::io::streams::Streams;
use crate::processes::reaper::Exit;
use crate::rpc::status::{Failure, Result};

/// The agent's side of the streams of a process that is being made.
#[derive(Default)]
pub struct Plumbing {
    /// From the host, and where it goes.
    input: Option<(OwnedFd, OwnedFd)>,
    /// From the process, and where it goes.
    outputs: Vec<(OwnedFd, OwnedFd)>,
    /// Both ways. The other end is there when the process is.
    terminal: Option<OwnedFd>,
}

/// Relays at work.
#[derive(Default)]
pub struct Relays {
    /// How far each output has got.
    pub outputs: Vec<watch::Receiver<Progress>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Relays {
    /// Ends all of them; the host sees its streams closed.
    pub fn abort(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Plumbing {
    /// Takes the named streams. `terminal` is what the spec of the process says.
    pub async fn connect(
        streams: &Streams,
        names: &agent::Streams,
        terminal: bool,
    ) -> Result<(Self, ChildIo)> {
        if terminal {
            if names.terminal == 0 {
                return Err(Failure::invalid(
                    "the process has a terminal, but no terminal stream is named",
                ));
            }
            if (names.stdin, names.stdout, names.stderr) != (0, 0, 0) {
                return Err(Failure::invalid(
                    "the process has a terminal: it has no other streams",
                ));
            }
            let terminal = Some(take(streams, names.terminal).await?);
            return Ok((
                Self {
                    terminal,
                    ..Self::default()
                },
                ChildIo::Terminal,
            ));
        }
        if names.terminal != 0 {
            return Err(Failure::invalid(
                "a terminal stream is named, but the process has no terminal",
            ));
        }
        let mut plumbing = Self::default();
        let stdin = match names.stdin {
            0 => null()?,
            port => {
                let stream = take(streams, port).await?;
                let (theirs, ours) = pipe()?;
                unblock(&ours)?;
                plumbing.input = Some((stream, ours));
                theirs
            }
        };
        let stdout = plumbing.output(streams, names.stdout).await?;
        let stderr = plumbing.output(streams, names.stderr).await?;
        Ok((
            plumbing,
            ChildIo::Pipes(Stdio {
                stdin,
                stdout,
                stderr,
            }),
        ))
    }

    async fn output(&mut self, streams: &Streams, port: u32) -> Result<OwnedFd> {
        if port == 0 {
            return null();
        }
        let stream = take(streams, port).await?;
        let (ours, theirs) = pipe()?;
        unblock(&ours)?;
        self.outputs.push((ours, stream));
        Ok(theirs)
    }

    /// Starts the relays of a process that has been made. `terminal` is its master, if it has one.
    pub fn start(
        self,
        terminal: Option<&OwnedFd>,
        exit: &watch::Receiver<Option<Exit>>,
    ) -> Result<Relays> {
        let mut relays = Relays::default();
        let (mut input, mut outputs) = (self.input, self.outputs);
        // Into or out of a pipe, unless there is a terminal.
        let way = if terminal.is_some() {
            Way::Copy
        } else {
            Way::Splice
        };
        if let (Some(master), Some(stream)) = (terminal, self.terminal) {
            let duplicate = |fd: &OwnedFd| {
                fd.try_clone()
                    .map_err(|e| Failure::internal("duplicate a descriptor", &e))
            };
            input = Some((duplicate(&stream)?, duplicate(master)?));
            outputs.push((duplicate(master)?, stream));
        }
        for (source, sink) in outputs {
            let (progress, seen) = watch::channel(Progress::Flowing);
            relays.outputs.push(seen);
            relays.tasks.push(tokio::spawn(relay::output(
                way,
                source,
                sink,
                exit.clone(),
                progress,
            )));
        }
        if let Some((source, sink)) = input {
            relays
                .tasks
                .push(tokio::spawn(relay::input(way, source, sink, exit.clone())));
        }
        Ok(relays)
    }
}

async fn take(streams: &Streams, port: u32) -> Result<OwnedFd> {
    streams
        .take(port)
        .await
        .map_err(|error| Failure::internal("take a stream", &error))
}

fn null() -> Result<OwnedFd> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Failure::internal("open /dev/null", &error.into()))
}

/// Reading end, writing end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| Failure::internal("make a pipe", &error.into()))
}

/// Only the agent's end: the process expects its own to block.
fn unblock(fd: impl AsFd) -> Result<()> {
    rustix::fs::fcntl_setfl(fd, OFlags::NONBLOCK)
        .map_err(|error| Failure::internal("set up a pipe", &io::Error::from(error)))
}
