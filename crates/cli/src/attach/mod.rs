//! Carries bytes between a process in a container and the caller's standard input and output: the attached forms
//! of run, exec and attach. One thread, one poll loop, bounded memory: output is read from the sandbox process only
//! when the last was written out, input from the caller only when the last was sent.

mod keys;

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use hull_sandbox::wire::{self, Kind, Size};
use hull_sandbox::{Exit, Failure, client};
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;

use self::keys::KeyWatch;
use crate::error::{Context, Error, Result};
use crate::signals::{self, Signals};
use crate::terminal::{self, RawMode};
use crate::values::DetachKeys;

/// Most bytes of input in one frame.
const INPUT: usize = 32 * 1024;
/// Most bytes that are read from the sandbox process at once.
const RECEIVE: usize = 64 * 1024;

/// What the caller's side of an attachment is like.
#[derive(Debug)]
pub struct Options {
    /// Send the caller's standard input.
    pub input: bool,
    /// The process has a terminal.
    pub terminal: bool,
    /// Pass signals for this command on to the container: to its sandbox process, which listens here. Not by the
    /// attachment's own connection, where they would wait behind input that nobody reads.
    pub forward_signals: Option<PathBuf>,
    /// Bytes that detach, typed one after the other.
    pub detach_keys: DetachKeys,
}

/// How an attachment ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The process ended.
    Exited(Exit),
    /// The user typed the detach keys; the process goes on.
    Detached,
    /// A signal ended this command, not the process.
    Interrupted(i32),
    /// Nobody reads our output any more; the process goes on.
    OutputClosed,
}

/// An attachment that is set up: signals taken, terminal raw where it has to be.
#[derive(Debug)]
pub struct Attachment {
    options: Options,
    signals: Signals,
    raw: Option<RawMode>,
}

impl Attachment {
    /// Takes the signals. Before any thread is started, and before the process can end.
    pub fn prepare(options: Options) -> Result<Attachment> {
        let mut wanted = vec![Signal::SIGWINCH];
        if options.forward_signals.is_some() && !options.terminal {
            wanted.extend(signals::FORWARDED);
        } else if options.terminal {
            // Not passed on, but the terminal has to be restored before they end us.
            wanted.extend([Signal::SIGTERM, Signal::SIGHUP]);
        }
        Ok(Attachment {
            options,
            signals: Signals::take(&wanted)?,
            raw: None,
        })
    }

    /// Size of the caller's terminal, for a process that has one.
    pub fn size(&self) -> Option<Size> {
        if !self.options.terminal {
            return None;
        }
        let size = terminal::size(io::stdout()).or_else(|| terminal::size(io::stdin()));
        size.map(|(rows, columns)| Size { rows, columns })
    }

    /// Waits for the first answer on `stream`; a signal that comes before it is returned instead.
    pub fn wait_for_reply(
        &self,
        stream: &UnixStream,
    ) -> Result<std::result::Result<wire::Reply, i32>> {
        loop {
            let mut descriptors = [
                PollFd::new(stream, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            poll_until_ready(&mut descriptors)?;
            let (answered, signalled) = (
                !descriptors[0].revents().is_empty(),
                !descriptors[1].revents().is_empty(),
            );
            if signalled
                && let Some(signal) = self.signals.next()
                && signal != Signal::SIGWINCH
            {
                return Ok(Err(signal as i32));
            }
            if answered {
                return Ok(Ok(client::read_reply(stream)?));
            }
        }
    }

    /// Carries bytes until the process ends or the user goes.
    pub fn carry(mut self, stream: UnixStream) -> Result<Outcome> {
        stream
            .set_nonblocking(true)
            .context(|| "cannot set up the connection to the sandbox process")?;
        let stdin = io::stdin();
        if self.options.terminal && self.options.input && rustix::termios::isatty(&stdin) {
            self.raw = Some(
                RawMode::enable(stdin.as_fd()).context(|| "cannot set the terminal to raw mode")?,
            );
        }
        let mut pump = Pump::new(stream, &self.options);
        if let Some(size) = self.size() {
            pump.queue_json(Kind::Resize, &size)?;
        }
        loop {
            if let Some(outcome) = pump.step(&self)? {
                return Ok(outcome);
            }
        }
    }
}

fn poll_until_ready(descriptors: &mut [PollFd<'_>]) -> Result<()> {
    loop {
        match poll(descriptors, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "cannot wait for input and output"),
        }
    }
}

/// One of the caller's outputs.
#[derive(Debug, Clone, Copy)]
struct Output {
    /// Most bytes that a write takes without blocking, once poll says that it takes any.
    chunk: usize,
    open: bool,
}

impl Output {
    fn new(descriptor: BorrowedFd<'_>) -> Output {
        let kind = rustix::fs::fstat(descriptor).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let chunk = match kind {
            // A pipe that is ready has room for a page; terminals and sockets promise less, or nothing.
            Ok(FileType::Fifo) => 4096,
            Ok(FileType::RegularFile) => usize::MAX,
            Ok(FileType::CharacterDevice) if !rustix::termios::isatty(descriptor) => usize::MAX,
            _ => 512,
        };
        Output { chunk, open: true }
    }
}

struct Pump {
    stream: UnixStream,
    keys: KeyWatch,
    reading_input: bool,
    /// Frames for the sandbox process, and how much of them is sent.
    to_send: Vec<u8>,
    sent: usize,
    /// What came from the sandbox process, and how much of it is used up.
    received: Vec<u8>,
    used: usize,
    /// The frame that is being read, and how much of its payload is still to be used.
    frame: Option<(Kind, usize)>,
    stdout: Output,
    stderr: Output,
}

/// What the next bytes from the sandbox process ask for.
enum Next {
    /// More bytes.
    Read,
    /// This many of them written to an output.
    Write(Kind, usize),
    /// The end.
    End(Outcome),
}

#[derive(Clone, Copy)]
enum Ready {
    Signals,
    Stream,
    Input,
    Output,
}

impl Pump {
    fn new(stream: UnixStream, options: &Options) -> Pump {
        Pump {
            stream,
            keys: KeyWatch::new(options),
            reading_input: options.input,
            to_send: Vec::new(),
            sent: 0,
            received: Vec::with_capacity(2 * RECEIVE),
            used: 0,
            frame: None,
            stdout: Output::new(io::stdout().as_fd()),
            stderr: Output::new(io::stderr().as_fd()),
        }
    }

    /// Waits until something can be done, and does it.
    fn step(&mut self, attachment: &Attachment) -> Result<Option<Outcome>> {
        let next = match self.next()? {
            Next::End(outcome) => return Ok(Some(outcome)),
            next => next,
        };
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        let mut stream_events = PollFlags::empty();
        if matches!(next, Next::Read) {
            stream_events |= PollFlags::IN;
        }
        if self.is_sending() {
            stream_events |= PollFlags::OUT;
        }
        // Only what is wanted: poll would report the hang-up of any other again and again.
        let mut wanted = Vec::with_capacity(4);
        wanted.push((
            Ready::Signals,
            PollFd::new(&attachment.signals, PollFlags::IN),
        ));
        if !stream_events.is_empty() {
            wanted.push((Ready::Stream, PollFd::new(&self.stream, stream_events)));
        }
        if self.reading_input && !self.is_sending() {
            wanted.push((Ready::Input, PollFd::new(&stdin, PollFlags::IN)));
        }
        match next {
            Next::Write(Kind::ErrorOutput, _) => {
                wanted.push((Ready::Output, PollFd::new(&stderr, PollFlags::OUT)));
            }
            Next::Write(..) => wanted.push((Ready::Output, PollFd::new(&stdout, PollFlags::OUT))),
            _ => {}
        }
        let (tags, mut descriptors): (Vec<Ready>, Vec<PollFd<'_>>) = wanted.into_iter().unzip();
        poll_until_ready(&mut descriptors)?;
        let ready: Vec<Ready> = std::iter::zip(tags, &descriptors)
            .filter(|(_, descriptor)| !descriptor.revents().is_empty())
            .map(|(tag, _)| tag)
            .collect();
        for tag in ready {
            match (tag, &next) {
                (Ready::Signals, _) => {
                    if let Some(outcome) = self.take_signals(attachment)? {
                        return Ok(Some(outcome));
                    }
                }
                (Ready::Stream, _) => {
                    self.send();
                    if matches!(next, Next::Read) {
                        self.receive()?;
                    }
                }
                (Ready::Input, _) => {
                    if self.read_input()? {
                        return Ok(Some(Outcome::Detached));
                    }
                    self.send();
                }
                (Ready::Output, Next::Write(kind, length)) => {
                    if !self.write(*kind, *length)? {
                        return Ok(Some(Outcome::OutputClosed));
                    }
                }
                (Ready::Output, _) => {}
            }
        }
        Ok(None)
    }

    fn is_sending(&self) -> bool {
        self.sent < self.to_send.len()
    }

    /// Looks at what was received.
    fn next(&mut self) -> Result<Next> {
        loop {
            let available = self.received.len() - self.used;
            let Some((kind, left)) = self.frame else {
                let Some(head) = self.received[self.used..].first_chunk::<5>() else {
                    return Ok(Next::Read);
                };
                self.frame =
                    Some(wire::parse_head(*head).context(|| "the sandbox process sent nonsense")?);
                self.used += head.len();
                continue;
            };
            match kind {
                Kind::Output | Kind::ErrorOutput if left == 0 => self.frame = None,
                Kind::Output | Kind::ErrorOutput if available == 0 => return Ok(Next::Read),
                Kind::Output | Kind::ErrorOutput => {
                    return Ok(Next::Write(kind, left.min(available)));
                }
                _ if available < left => return Ok(Next::Read),
                Kind::Exit => {
                    let payload = &self.received[self.used..self.used + left];
                    let exit =
                        wire::from_json(payload).context(|| "the sandbox process sent nonsense")?;
                    return Ok(Next::End(Outcome::Exited(exit)));
                }
                Kind::Failure => {
                    let payload = &self.received[self.used..self.used + left];
                    let failure: Failure =
                        wire::from_json(payload).context(|| "the sandbox process sent nonsense")?;
                    return Err(failure.into());
                }
                _ => {
                    let what = format!("the sandbox process sent a frame {kind:?} out of place");
                    return Err(Error::new(what));
                }
            }
        }
    }

    /// Reads what the sandbox process sent.
    fn receive(&mut self) -> Result<()> {
        self.received.drain(..self.used);
        self.used = 0;
        let begin = self.received.len();
        self.received.resize(begin + RECEIVE, 0);
        let outcome = self.stream.read(&mut self.received[begin..]);
        self.received
            .truncate(begin + *outcome.as_ref().unwrap_or(&0));
        match outcome {
            Ok(0) => Err(client::gone().into()),
            Ok(_) => Ok(()),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(client::gone().into()),
            Err(error) => Err(error).context(|| "cannot read from the sandbox process"),
        }
    }

    /// Writes a piece of output; false when nobody reads it any more.
    fn write(&mut self, kind: Kind, length: usize) -> Result<bool> {
        let (output, name) = match kind {
            Kind::ErrorOutput => (&mut self.stderr, "standard error"),
            _ => (&mut self.stdout, "standard output"),
        };
        let bytes = &self.received[self.used..self.used + length.min(output.chunk)];
        let outcome = match kind {
            _ if !output.open => Ok(bytes.len()),
            Kind::ErrorOutput => rustix::io::write(io::stderr(), bytes),
            _ => rustix::io::write(io::stdout(), bytes),
        };
        let written = match outcome {
            Ok(written) => written,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::IO) if kind == Kind::ErrorOutput => {
                output.open = false;
                0
            }
            // EIO is what a terminal says that was closed.
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::IO) => return Ok(false),
            Err(error) => return Err(error).context(|| format!("cannot write to {name}")),
        };
        self.used += written;
        if let Some((_, left)) = &mut self.frame {
            *left -= written;
        }
        Ok(true)
    }

    /// Reads the caller's input into a frame; true when the user typed the detach keys.
    fn read_input(&mut self) -> Result<bool> {
        let mut buffer = [0; INPUT];
        match rustix::io::read(io::stdin(), &mut buffer) {
            // EIO is the end of a terminal that was closed.
            Ok(0) | Err(rustix::io::Errno::IO) => {
                self.reading_input = false;
                let rest = self.keys.rest();
                if !rest.is_empty() {
                    self.queue(Kind::Input, &rest);
                }
                self.queue(Kind::InputEnd, &[]);
                Ok(false)
            }
            Ok(length) => {
                let (typed, detached) = self.keys.filter(&buffer[..length]);
                if !typed.is_empty() {
                    self.queue(Kind::Input, &typed);
                }
                Ok(detached)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error).context(|| "cannot read standard input"),
        }
    }

    fn queue(&mut self, kind: Kind, payload: &[u8]) {
        if !self.is_sending() {
            self.to_send.clear();
            self.sent = 0;
        }
        self.to_send
            .extend_from_slice(&wire::head(kind, payload.len()));
        self.to_send.extend_from_slice(payload);
    }

    fn queue_json(&mut self, kind: Kind, value: &impl serde::Serialize) -> Result<()> {
        let payload = serde_json::to_vec(value).context(|| "cannot write JSON")?;
        self.queue(kind, &payload);
        Ok(())
    }

    /// Sends what the connection takes. A sandbox process that takes no more has still output for us.
    fn send(&mut self) {
        while self.is_sending() {
            match self.stream.write(&self.to_send[self.sent..]) {
                Ok(length) => self.sent += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.sent = self.to_send.len();
                    self.reading_input = false;
                }
            }
        }
    }

    fn take_signals(&mut self, attachment: &Attachment) -> Result<Option<Outcome>> {
        while let Some(signal) = attachment.signals.next() {
            if signal == Signal::SIGWINCH {
                if let Some(size) = attachment.size() {
                    self.queue_json(Kind::Resize, &size)?;
                }
            } else if attachment.options.terminal {
                return Ok(Some(Outcome::Interrupted(signal as i32)));
            } else {
                forward(attachment.options.forward_signals.as_deref(), signal)?;
            }
        }
        self.send();
        Ok(None)
    }
}

/// Sends a signal to a container's init, without waiting for the answer: the end of the container is one.
fn forward(socket: Option<&Path>, signal: Signal) -> Result<()> {
    let request = wire::Request::Signal {
        signal: signal as u32,
        all: false,
    };
    if let Some(socket) = socket
        && let Ok(stream) = UnixStream::connect(socket)
    {
        wire::write_json(&stream, Kind::Request, &request).context(|| "cannot pass on a signal")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn options() -> Options {
        Options {
            input: true,
            terminal: true,
            forward_signals: None,
            detach_keys: DetachKeys(vec![16, 17]),
        }
    }

    fn pump() -> (Pump, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Pump::new(ours, &options()), theirs)
    }

    #[test]
    fn frames_are_taken_apart_however_they_arrive() {
        let (mut pump, theirs) = pump();
        let mut bytes = Vec::new();
        wire::write_frame(&mut bytes, Kind::Output, b"").unwrap();
        wire::write_frame(&mut bytes, Kind::Output, b"abc").unwrap();
        let exit = Exit {
            status: 3,
            reason: None,
            oom_killed: false,
            at: 0,
        };
        wire::write_json(&mut bytes, Kind::Exit, &exit).unwrap();
        let mut output = 0;
        for byte in bytes {
            assert!(matches!(pump.next().unwrap(), Next::Read));
            (&theirs).write_all(&[byte]).unwrap();
            pump.receive().unwrap();
            if let Next::Write(Kind::Output, length) = pump.next().unwrap() {
                output += length;
                pump.used += length;
                pump.frame = pump.frame.map(|(kind, left)| (kind, left - length));
            }
        }
        assert_eq!(output, 3);
        let Next::End(Outcome::Exited(seen)) = pump.next().unwrap() else {
            panic!()
        };
        assert_eq!(seen, exit);
    }

    #[test]
    fn a_sandbox_process_that_is_gone_is_an_error() {
        let (mut pump, theirs) = pump();
        drop(theirs);
        assert!(
            pump.receive()
                .unwrap_err()
                .message()
                .contains("sandbox process")
        );
    }

    #[test]
    fn nonsense_is_an_error() {
        let (mut pump, theirs) = pump();
        (&theirs).write_all(&[99, 0, 0, 0, 0]).unwrap();
        pump.receive().unwrap();
        assert!(pump.next().is_err());
    }
}
