//! Connects a process to the host's streams: takes the streams that a call names, creates the pipes
//! between them and the process, starts the relays, and attaches other streams to them. Called by
//! `rpc::service`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_protocol::agent::{self, ReattachStreamsRequest};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::PipeFlags;
use tokio::sync::watch;
use ttrpc::Code;

use crate::container::{ChildIo, Stdio};
use crate::io::relay::{EndedOutputs, Input, Output, Progress, Way};
use crate::io::streams::Streams;
use crate::processes::reaper::Exit;
use crate::rpc::status::{Failure, Result};

/// The agent's side of the streams of a process that is being created.
#[derive(Default)]
pub struct Pipes {
    stdin: Option<Ends>,
    stdout: Option<Ends>,
    stderr: Option<Ends>,
    /// Both directions. The slave exists once the process does.
    terminal: Option<OwnedFd>,
}

/// The two descriptors of a relay.
struct Ends {
    stream: OwnedFd,
    pipe: OwnedFd,
}

/// The relays of a process.
#[derive(Default)]
pub struct Relays {
    input: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    terminal: Option<Output>,
}

impl Relays {
    /// Progress of each output.
    pub fn progress(&self) -> Vec<watch::Receiver<Progress>> {
        self.outputs().map(Output::progress).collect()
    }

    /// Closes all of them; the host sees its streams closed.
    pub async fn close(&self) {
        if let Some(input) = &self.input {
            input.close().await;
        }
        for output in self.outputs() {
            output.close().await;
        }
    }

    fn outputs(&self) -> impl Iterator<Item = &Output> {
        let outputs = [&self.stdout, &self.stderr, &self.terminal];
        outputs.into_iter().flatten()
    }

    /// Gives relays new streams, all or none; returns how many bytes of the input have been taken.
    /// Must run to its end: relays that it has stopped would stay stopped.
    pub async fn reattach(
        &self,
        streams: &Streams,
        request: &ReattachStreamsRequest,
    ) -> Result<u64> {
        let ports: &agent::Streams = &request.streams;
        let input = match (ports.terminal, ports.stdin) {
            (0, 0) => None,
            (0, port) if self.terminal.is_none() => {
                require("stdin", self.input.as_ref())?;
                Some(take(streams, port).await?)
            }
            _ => None,
        };
        let mut outputs = Vec::new();
        for (name, port, output, received) in [
            (
                "stdout",
                ports.stdout,
                &self.stdout,
                request.stdout_received,
            ),
            (
                "stderr",
                ports.stderr,
                &self.stderr,
                request.stderr_received,
            ),
            (
                "terminal",
                ports.terminal,
                &self.terminal,
                request.terminal_received,
            ),
        ] {
            if port != 0 {
                let output = require(name, output.as_ref())?;
                outputs.push((name, output, take(streams, port).await?, received));
            }
        }
        let input = match (input, outputs.last()) {
            (None, Some(("terminal", _, stream, _))) => Some(duplicate(stream)?),
            (input, _) => input,
        };

        let mut stopped = Vec::new();
        for (name, output, stream, received) in outputs {
            stopped.push((name, output.stop().await, stream, received));
        }
        let missing = stopped
            .iter()
            .find(|(_, output, _, received)| !output.sendable_from().contains(received));
        if let Some((name, output, _, received)) = missing {
            let kept = output.sendable_from();
            let failure = Failure::new(
                Code::OUT_OF_RANGE,
                format!(
                    "cannot send {name} on from byte {received}: bytes {} to {} are kept",
                    kept.start(),
                    kept.end()
                ),
            );
            for (_, output, _, _) in stopped {
                output.resume();
            }
            return Err(failure);
        }
        for (_, output, stream, received) in stopped {
            output.attach(stream, received);
        }
        let Some(relay) = &self.input else {
            return Ok(0);
        };
        let relay = relay.stop().await;
        let received = relay.received();
        match input {
            Some(stream) => relay.attach(stream),
            None => relay.resume(),
        }
        Ok(received)
    }
}

/// A relay that the host names.
fn require<'a, T>(name: &str, relay: Option<&'a T>) -> Result<&'a T> {
    relay.ok_or_else(|| {
        Failure::new(
            Code::FAILED_PRECONDITION,
            format!("the process was started without a {name} stream"),
        )
    })
}

impl Pipes {
    /// Takes the named streams. `terminal` is as in the spec of the process.
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
        let mut pipes = Self::default();
        let stdin = match names.stdin {
            0 => null()?,
            port => {
                let stream = take(streams, port).await?;
                let (theirs, pipe) = pipe()?;
                unblock(&pipe)?;
                pipes.stdin = Some(Ends { stream, pipe });
                theirs
            }
        };
        let (stdout, ends) = output(streams, names.stdout).await?;
        pipes.stdout = ends;
        let (stderr, ends) = output(streams, names.stderr).await?;
        pipes.stderr = ends;
        Ok((
            pipes,
            ChildIo::Pipes(Stdio {
                stdin,
                stdout,
                stderr,
            }),
        ))
    }

    /// Starts the relays of a process that has been created. `terminal` is its master, if it has
    /// one.
    pub fn start(
        self,
        terminal: Option<&OwnedFd>,
        exit: &watch::Receiver<Option<Exit>>,
        ended: &Arc<EndedOutputs>,
    ) -> Result<Relays> {
        let output = |source, sink| Output::start(source, sink, exit.clone(), ended.clone());
        if let (Some(master), Some(stream)) = (terminal, self.terminal) {
            let (source, sink) = (duplicate(&stream)?, duplicate(master)?);
            return Ok(Relays {
                input: Some(Input::start(Way::Copy, source, sink, exit.clone())),
                terminal: Some(output(duplicate(master)?, stream)),
                ..Relays::default()
            });
        }
        Ok(Relays {
            input: self
                .stdin
                .map(|ends| Input::start(Way::Splice, ends.stream, ends.pipe, exit.clone())),
            stdout: self.stdout.map(|ends| output(ends.pipe, ends.stream)),
            stderr: self.stderr.map(|ends| output(ends.pipe, ends.stream)),
            terminal: None,
        })
    }
}

/// The process's end of an output, and the agent's ends if there is a stream.
async fn output(streams: &Streams, port: u32) -> Result<(OwnedFd, Option<Ends>)> {
    if port == 0 {
        return Ok((null()?, None));
    }
    let stream = take(streams, port).await?;
    let (pipe, theirs) = pipe()?;
    unblock(&pipe)?;
    Ok((theirs, Some(Ends { stream, pipe })))
}

fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone()
        .map_err(|error| Failure::internal("duplicate a descriptor", &error))
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

/// Reading end and writing end.
fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|error| Failure::internal("make a pipe", &error.into()))
}

/// Makes the agent's end non-blocking; the process expects its own to block.
fn unblock(fd: impl AsFd) -> Result<()> {
    rustix::fs::fcntl_setfl(fd, OFlags::NONBLOCK)
        .map_err(|error| Failure::internal("set up a pipe", &io::Error::from(error)))
}
