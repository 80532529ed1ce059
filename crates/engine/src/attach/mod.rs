//! Carries bytes between a process in a container and its caller: the attached forms of run, exec
//! and attach. The caller is a command, with its standard input and output, or a program at the
//! other end of a socket. One thread, one poll loop, bounded memory: output is read only when the
//! last was written out, input only when the last was sent.
//!
//! The process's streams are descriptors that the sandbox handed over; its end, signals and the
//! size of its terminal travel on the control connection that keeps it.

mod keys;
mod remote;
mod signals;
mod terminal;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sandbox::config::TerminalSize;
use hull_sandbox::control::client::{Client, gone};
use hull_sandbox::control::protocol::{AttachOptions, Received, Reply, Request};
use hull_sandbox::store::Exit;
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::stdio::{stderr, stdin, stdout};

use self::keys::KeyWatch;
use self::signals::Signals;
use self::terminal::RawMode;
use crate::error::{Context, Error, Result};
use crate::values::DetachKeys;

pub use self::remote::{Remote, Window};
pub use self::signals::unblock_all;

/// So many SIGINT and SIGTERM end this command as well, as Docker's: a process that ignores them
/// must not keep a terminal.
const PATIENCE: u32 = 3;

/// Most bytes carried at once.
const PIECE: usize = 64 * 1024;

/// What the caller's side of an attachment is like.
#[derive(Debug)]
pub struct Options {
    /// Send the caller's standard input.
    pub input: bool,
    /// Show what the process writes, output and error; a terminal's is output.
    pub shown: [bool; 2],
    /// The process has a terminal.
    pub terminal: bool,
    /// Pass signals for this command on to the process.
    pub forward_signals: bool,
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
    /// So did one that came again and again while the process did not end.
    GaveUp(i32),
    /// Nobody reads our output any more; the process goes on.
    OutputClosed,
}

/// An attachment that is set up: signals taken, terminal raw where it has to be.
#[derive(Debug)]
pub struct Attachment {
    options: Options,
    caller: Caller,
    raw: Option<RawMode>,
}

/// Who is attached.
#[derive(Debug)]
enum Caller {
    /// The command that this process is.
    Own(Signals),
    /// A program at the other end of a socket.
    Remote(Remote),
}

impl Caller {
    /// What tells that there is a signal, or another size of the terminal.
    fn events(&self) -> BorrowedFd<'_> {
        match self {
            Caller::Own(signals) => signals.as_fd(),
            Caller::Remote(remote) => remote.window.as_fd(),
        }
    }

    fn input(&self) -> BorrowedFd<'_> {
        match self {
            Caller::Own(_) => stdin(),
            Caller::Remote(remote) => remote.stream.as_fd(),
        }
    }

    fn output(&self, target: Target) -> BorrowedFd<'_> {
        match (self, target) {
            (Caller::Own(_), Target::Output) => stdout(),
            (Caller::Own(_), Target::Error) => stderr(),
            (Caller::Remote(remote), _) => remote.stream.as_fd(),
        }
    }

    /// Whether outputs share a stream, on which each piece says whose it is.
    fn is_framed(&self) -> bool {
        matches!(self, Caller::Remote(remote) if remote.framed)
    }

    fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Caller::Own(_) => rustix::io::read(stdin(), buffer),
            Caller::Remote(remote) => {
                recv(&remote.stream, buffer, RecvFlags::DONTWAIT).map(|(_, length)| length)
            }
        }
    }

    fn write(&self, target: Target, bytes: &[u8]) -> rustix::io::Result<usize> {
        match self {
            Caller::Own(_) => rustix::io::write(self.output(target), bytes),
            Caller::Remote(remote) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                send(&remote.stream, bytes, flags)
            }
        }
    }

    /// Most bytes that a write takes without blocking, once poll says that it takes any.
    fn chunk(&self, target: Target) -> usize {
        match self {
            Caller::Own(_) => chunk(self.output(target)),
            Caller::Remote(_) => usize::MAX,
        }
    }
}

impl Attachment {
    /// Takes the signals. Before any thread is started, and before the process can end.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn prepare(options: Options) -> Result<Attachment> {
        let mut wanted = vec![Signal::SIGWINCH];
        if options.forward_signals && !options.terminal {
            wanted.extend(signals::FORWARDED);
        } else if options.terminal {
            // Not passed on, but the terminal has to be restored before they end us.
            wanted.extend([Signal::SIGTERM, Signal::SIGHUP]);
        }
        Ok(Attachment {
            options,
            caller: Caller::Own(Signals::take(&wanted)?),
            raw: None,
        })
    }

    /// Attaches a program at the other end of a socket.
    pub fn remote(options: Options, remote: Remote) -> Attachment {
        Attachment {
            options,
            caller: Caller::Remote(remote),
            raw: None,
        }
    }

    /// The caller elsewhere, when nothing was carried after all.
    pub fn into_remote(self) -> Option<(Options, Remote)> {
        match self.caller {
            Caller::Own(_) => None,
            Caller::Remote(remote) => Some((self.options, remote)),
        }
    }

    /// Whether the process's end is waited for after its caller has gone.
    fn follows_end(&self) -> bool {
        matches!(&self.caller, Caller::Remote(remote) if remote.follows_end)
    }

    /// Size of the caller's terminal, for a process that has one.
    pub fn size(&self) -> Option<TerminalSize> {
        if !self.options.terminal {
            return None;
        }
        match &self.caller {
            Caller::Own(_) => {
                let size = terminal::size(stdout()).or_else(|| terminal::size(stdin()));
                size.map(|(rows, columns)| TerminalSize { rows, columns })
            }
            Caller::Remote(remote) => remote.window.size(),
        }
    }

    /// How the sandbox is asked to attach us.
    pub fn request(&self) -> AttachOptions {
        AttachOptions {
            stdin: self.options.input,
            size: self.size(),
        }
    }

    /// Waits for the next answer; a signal that comes before it is returned instead.
    ///
    /// # Errors
    /// What the sandbox answered.
    pub fn receive(&self, client: &Client) -> Result<std::result::Result<Received<Reply>, i32>> {
        let Caller::Own(signals) = &self.caller else {
            return client.receive().map(Ok);
        };
        loop {
            let mut descriptors = [
                PollFd::new(client, PollFlags::IN),
                PollFd::new(signals, PollFlags::IN),
            ];
            poll_until_ready(&mut descriptors)?;
            let (answered, signalled) = (
                !descriptors[0].revents().is_empty(),
                !descriptors[1].revents().is_empty(),
            );
            if signalled
                && let Some(signal) = signals.next()
                && signal != Signal::SIGWINCH
            {
                return Ok(Err(signal as i32));
            }
            match answered {
                // Its greeting comes first, and may be all that has come.
                true if !client.is_greeted() => client.wait_for_greeting()?,
                true => return client.receive().map(Ok),
                false => {}
            }
        }
    }

    /// Carries bytes until the process ends or the user goes. `streams` are a terminal, or input
    /// (if the process has one), output and error.
    ///
    /// # Errors
    /// The sandbox has ended, or the caller's streams cannot be used.
    pub fn carry(self, client: Client, streams: Vec<OwnedFd>) -> Result<Outcome> {
        self.carry_and_tell(client, streams, |_| ())
    }

    /// The same; `tell` learns how it ended before a caller elsewhere does.
    ///
    /// # Errors
    /// As [`Attachment::carry`].
    pub fn carry_and_tell(
        mut self,
        client: Client,
        streams: Vec<OwnedFd>,
        tell: impl FnOnce(&Outcome),
    ) -> Result<Outcome> {
        if self.options.terminal
            && self.options.input
            && matches!(self.caller, Caller::Own(_))
            && rustix::termios::isatty(stdin())
        {
            self.raw = Some(RawMode::enable(stdin()).context(|| "set the terminal to raw mode")?);
        }
        let mut pump = Pump::new(client, streams, &self.options, &self.caller)?;
        if let Some(size) = self.size() {
            pump.tell(&Request::Resize(size));
        }
        loop {
            if let Some(outcome) = pump.step(&self)? {
                tell(&outcome);
                if let Caller::Remote(remote) = &self.caller {
                    remote.end();
                }
                return Ok(outcome);
            }
        }
    }
}

fn poll_until_ready(descriptors: &mut [PollFd<'_>]) -> Result<()> {
    loop {
        match poll(descriptors, None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "wait for input and output"),
        }
    }
}

/// One of the caller's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Output = 0,
    Error = 1,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Target::Output => "standard output",
            Target::Error => "standard error",
        }
    }
}

/// One stream of the process on its way to one of the caller's outputs.
#[derive(Debug)]
struct OutputStream {
    /// Gone at its end.
    from: Option<OwnedFd>,
    target: Target,
    /// Most bytes that a write takes without blocking, once poll says that it takes any.
    chunk: usize,
    /// Nobody reads it: what comes is discarded.
    closed: bool,
    /// Each piece begins with a head that says whose it is.
    framed: bool,
    buffer: Vec<u8>,
    written: usize,
}

impl OutputStream {
    fn new(from: OwnedFd, target: Target, caller: &Caller) -> Self {
        Self {
            from: Some(from),
            target,
            chunk: caller.chunk(target),
            closed: false,
            framed: caller.is_framed(),
            buffer: Vec::new(),
            written: 0,
        }
    }

    fn is_pending(&self) -> bool {
        !self.closed && self.written < self.buffer.len()
    }

    fn is_done(&self) -> bool {
        self.from.is_none() && !self.is_pending()
    }

    /// Whether nothing else may be written to the same stream now.
    fn is_within_frame(&self) -> bool {
        self.framed && self.written > 0 && self.is_pending()
    }

    /// Reads what has come.
    fn read(&mut self) {
        let Some(from) = &self.from else { return };
        let head = if self.framed { remote::HEAD } else { 0 };
        self.buffer.resize(head + PIECE, 0);
        self.written = 0;
        let length = match recv(from, &mut self.buffer[head..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => {
                self.from = None;
                0
            }
            Ok((_, length)) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            // The machine has gone; why is on the control connection.
            Err(_) => {
                self.from = None;
                0
            }
        };
        if length == 0 {
            self.buffer.clear();
            return;
        }
        self.buffer.truncate(head + length);
        if self.framed {
            self.buffer[..head].copy_from_slice(&remote::head(self.target, length));
        }
    }

    /// Writes a piece; false when nobody reads the caller's standard output any more.
    fn write(&mut self, caller: &Caller) -> Result<bool> {
        let end = self
            .buffer
            .len()
            .min(self.written.saturating_add(self.chunk));
        let bytes = &self.buffer[self.written..end];
        match caller.write(self.target, bytes) {
            Ok(written) => self.written += written,
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The other end of a socket has gone, for both.
            Err(Errno::PIPE | Errno::CONNRESET) if matches!(caller, Caller::Remote(_)) => {
                return Ok(false);
            }
            // EIO is what a terminal says that was closed.
            Err(Errno::PIPE | Errno::IO) if self.target == Target::Error => self.closed = true,
            Err(Errno::PIPE | Errno::IO) => return Ok(false),
            Err(error) => {
                return Err(error).context(|| format!("write to {}", self.target.name()));
            }
        }
        Ok(true)
    }
}

fn chunk(descriptor: BorrowedFd<'_>) -> usize {
    let kind = rustix::fs::fstat(descriptor).map(|stat| FileType::from_raw_mode(stat.st_mode));
    match kind {
        // A pipe that is ready has room for a page; terminals and sockets promise less, or nothing.
        Ok(FileType::Fifo) => 4096,
        Ok(FileType::RegularFile) => usize::MAX,
        Ok(FileType::CharacterDevice) if !rustix::termios::isatty(descriptor) => usize::MAX,
        _ => 512,
    }
}

/// The caller's input on its way to the process.
#[derive(Debug, Default)]
struct InputStream {
    /// Gone when the process reads no more.
    to: Option<OwnedFd>,
    reading: bool,
    buffer: Vec<u8>,
    sent: usize,
}

impl InputStream {
    fn is_pending(&self) -> bool {
        self.to.is_some() && self.sent < self.buffer.len()
    }

    /// Sends what the process takes.
    fn send(&mut self) {
        while self.is_pending() {
            let Some(to) = &self.to else { return };
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(to, &self.buffer[self.sent..], flags) {
                Ok(length) => self.sent += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.to = None;
                    self.reading = false;
                }
            }
        }
        if !self.reading {
            self.end();
        }
    }

    /// There is no more input.
    fn end(&mut self) {
        if let Some(to) = self.to.take() {
            // The other end may be closed already.
            let _ = shutdown(&to, Shutdown::Write);
        }
    }
}

struct Pump {
    client: Client,
    keys: KeyWatch,
    input: InputStream,
    outputs: Vec<OutputStream>,
    exit: Option<Exit>,
    /// SIGINT and SIGTERM that have come.
    interrupts: u32,
    /// How the caller has gone, whose input that has come is still passed on.
    gone: Option<Outcome>,
}

#[derive(Clone, Copy)]
enum Ready {
    Events,
    Control,
    Gone,
    Input,
    Send,
    Read(usize),
    Write(usize),
}

impl Pump {
    fn new(
        client: Client,
        streams: Vec<OwnedFd>,
        options: &Options,
        caller: &Caller,
    ) -> Result<Pump> {
        let few = || Error::new("the sandbox handed over too few streams");
        let mut streams = streams.into_iter().rev();
        let (to, mut outputs) = if options.terminal {
            let terminal = streams.next().ok_or_else(few)?;
            let to = terminal.try_clone().context(|| "share a stream")?;
            let output = OutputStream::new(terminal, Target::Output, caller);
            (Some(to), vec![output])
        } else {
            let error = streams.next().ok_or_else(few)?;
            let output = streams.next().ok_or_else(few)?;
            let outputs = vec![
                OutputStream::new(output, Target::Output, caller),
                OutputStream::new(error, Target::Error, caller),
            ];
            (streams.next(), outputs)
        };
        for (output, shown) in outputs.iter_mut().zip(options.shown) {
            output.closed = !shown;
        }
        let mut input = InputStream {
            to,
            reading: options.input,
            ..InputStream::default()
        };
        if !options.input && !options.terminal {
            input.end();
        }
        let mut keys = KeyWatch::new(options);
        if let (Caller::Remote(remote), true) = (caller, options.input) {
            (input.buffer, _) = keys.filter(&remote.early);
        }
        Ok(Pump {
            client,
            keys,
            input,
            outputs,
            exit: None,
            interrupts: 0,
            gone: None,
        })
    }

    /// Sends what is not answered. A sandbox that has gone shows on the connection.
    fn tell(&self, request: &Request) {
        let _ = self.client.tell(request, &[]);
    }

    /// Waits until something can be done, and does it.
    fn step(&mut self, attachment: &Attachment) -> Result<Option<Outcome>> {
        if let Some(exit) = &self.exit
            && self.outputs.iter().all(OutputStream::is_done)
        {
            return Ok(Some(Outcome::Exited(exit.clone())));
        }
        let has_input = self.input.reading || self.input.is_pending();
        if !attachment.follows_end()
            && let Some(gone) = self.gone.take_if(|_| !has_input)
        {
            return Ok(Some(gone));
        }
        for tag in self.wait(attachment)? {
            match tag {
                Ready::Events => {
                    if let Some(outcome) = self.take_events(attachment) {
                        return Ok(Some(outcome));
                    }
                }
                Ready::Control => self.receive()?,
                Ready::Gone => self.leave(Outcome::OutputClosed),
                Ready::Input => {
                    if self.read_input(&attachment.caller)? {
                        if !attachment.follows_end() {
                            return Ok(Some(Outcome::Detached));
                        }
                        self.input.reading = false;
                        self.leave(Outcome::Detached);
                        if let Caller::Remote(remote) = &attachment.caller {
                            remote.end();
                        }
                    }
                    self.input.send();
                }
                Ready::Send => self.input.send(),
                Ready::Read(index) => self.outputs[index].read(),
                Ready::Write(index) => {
                    let mut outputs = self.outputs.iter();
                    let within = outputs.position(OutputStream::is_within_frame);
                    if within.is_some_and(|within| within != index) {
                        continue;
                    }
                    if !self.outputs[index].write(&attachment.caller)? {
                        match attachment.caller {
                            Caller::Own(_) => return Ok(Some(Outcome::OutputClosed)),
                            Caller::Remote(_) => self.leave(Outcome::OutputClosed),
                        }
                    }
                }
            }
        }
        Ok(None)
    }

    /// The caller reads no more. What it has sent before is passed on.
    fn leave(&mut self, how: Outcome) {
        self.gone.get_or_insert(how);
        for output in &mut self.outputs {
            output.closed = true;
        }
    }

    /// What can be done now.
    fn wait(&self, attachment: &Attachment) -> Result<Vec<Ready>> {
        let caller = &attachment.caller;
        let (events, stdin) = (caller.events(), caller.input());
        let outputs = [Target::Output, Target::Error].map(|target| caller.output(target));
        // Only what is wanted: poll would report the hang-up of any other again and again.
        let mut wanted = Vec::with_capacity(7);
        wanted.push((Ready::Events, PollFd::new(&events, PollFlags::IN)));
        if let (Caller::Remote(remote), None) = (caller, &self.gone) {
            // Reported when both directions are shut.
            let gone = PollFd::new(&remote.stream, PollFlags::empty());
            wanted.push((Ready::Gone, gone));
        }
        if self.exit.is_none() {
            wanted.push((Ready::Control, PollFd::new(&self.client, PollFlags::IN)));
        }
        match &self.input.to {
            Some(to) if self.input.is_pending() => {
                wanted.push((Ready::Send, PollFd::new(to, PollFlags::OUT)));
            }
            Some(_) if self.input.reading && self.exit.is_none() => {
                wanted.push((Ready::Input, PollFd::new(&stdin, PollFlags::IN)));
            }
            _ => {}
        }
        let first = self.outputs.iter().position(OutputStream::is_within_frame);
        for (index, output) in self.outputs.iter().enumerate() {
            if output.is_pending() {
                if first.is_some_and(|first| first != index) {
                    continue;
                }
                let target = &outputs[output.target as usize];
                let fd = PollFd::new(target, PollFlags::OUT);
                wanted.push((Ready::Write(index), fd));
            } else if let Some(from) = &output.from {
                wanted.push((Ready::Read(index), PollFd::new(from, PollFlags::IN)));
            }
        }
        let (tags, mut descriptors): (Vec<Ready>, Vec<PollFd<'_>>) = wanted.into_iter().unzip();
        poll_until_ready(&mut descriptors)?;
        Ok(std::iter::zip(tags, &descriptors)
            .filter(|(_, descriptor)| !descriptor.revents().is_empty())
            .map(|(tag, _)| tag)
            .collect())
    }

    /// Reads what the sandbox reports: the end of the process.
    fn receive(&mut self) -> Result<()> {
        match self.client.receive()?.message {
            Reply::Exited(exit) => {
                self.exit = Some(exit);
                Ok(())
            }
            Reply::Ending => Err(gone()),
            other => Err(hull_sandbox::control::client::unexpected(&other)),
        }
    }

    /// Reads the caller's input; true when the user typed the detach keys.
    fn read_input(&mut self, caller: &Caller) -> Result<bool> {
        let mut buffer = vec![0; PIECE / 2];
        let input = &mut self.input;
        (input.buffer, input.sent) = (Vec::new(), 0);
        match caller.read(&mut buffer[..]) {
            // EIO is the end of a terminal that was closed.
            Ok(0) | Err(Errno::IO | Errno::CONNRESET) => {
                input.reading = false;
                input.buffer = self.keys.rest();
                Ok(false)
            }
            Ok(length) => {
                let (typed, detached) = self.keys.filter(&buffer[..length]);
                input.buffer = typed;
                Ok(detached)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(error) => Err(error).context(|| "read standard input"),
        }
    }

    fn take_events(&mut self, attachment: &Attachment) -> Option<Outcome> {
        let signals = match &attachment.caller {
            Caller::Own(signals) => signals,
            Caller::Remote(remote) => {
                if let Some(size) = remote.window.changed() {
                    self.tell(&Request::Resize(size));
                }
                return None;
            }
        };
        while let Some(signal) = signals.next() {
            if signal == Signal::SIGWINCH {
                if let Some(size) = attachment.size() {
                    self.tell(&Request::Resize(size));
                }
            } else if attachment.options.terminal {
                return Some(Outcome::Interrupted(signal as i32));
            } else {
                self.tell(&Request::Forward(signal as u32));
                if matches!(signal, Signal::SIGINT | Signal::SIGTERM) {
                    self.interrupts += 1;
                    if self.interrupts == PATIENCE {
                        return Some(Outcome::GaveUp(signal as i32));
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use hull_sandbox::control::protocol::{pair, send};

    use super::*;

    fn options(terminal: bool) -> Options {
        Options {
            input: false,
            terminal,
            shown: [true; 2],
            forward_signals: false,
            detach_keys: DetachKeys(vec![16, 17]),
        }
    }

    fn pump(streams: usize) -> (Pump, OwnedFd, Vec<UnixStream>) {
        let (ours, sandbox) = pair().unwrap();
        let (near, far): (Vec<_>, Vec<_>) =
            (0..streams).map(|_| UnixStream::pair().unwrap()).unzip();
        let near = near.into_iter().map(OwnedFd::from).collect();
        let caller = Caller::Own(Signals::take(&[]).unwrap());
        let options = options(streams == 1);
        let pump = Pump::new(Client::from(ours), near, &options, &caller).unwrap();
        (pump, sandbox, far)
    }

    #[test]
    fn the_end_counts_when_all_output_is_written() {
        let (mut pump, sandbox, far) = pump(2);
        send(&sandbox, &Reply::Exited(Exit::now(3)), &[]).unwrap();
        pump.receive().unwrap();
        assert!(!pump.outputs.iter().all(OutputStream::is_done));
        drop(far);
        for output in &mut pump.outputs {
            output.read();
        }
        assert!(pump.outputs.iter().all(OutputStream::is_done));
        assert_eq!(pump.exit.unwrap().status, 3);
    }

    #[test]
    fn a_sandbox_process_that_is_gone_is_an_error() {
        let (mut pump, sandbox, _far) = pump(3);
        drop(sandbox);
        let error = pump.receive().unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Gone);
    }

    /// An attachment of a caller elsewhere, its end, that of the sandbox, and those of the process:
    /// input, output, error.
    type Elsewhere = (
        Attachment,
        UnixStream,
        Client,
        OwnedFd,
        Vec<OwnedFd>,
        Vec<UnixStream>,
    );

    fn elsewhere(follows_end: bool) -> Elsewhere {
        let (ours, caller) = UnixStream::pair().unwrap();
        let remote = Remote {
            stream: ours.into(),
            early: b"early ".to_vec(),
            framed: true,
            window: Window::new(None).unwrap(),
            follows_end,
        };
        let options = Options {
            input: true,
            ..options(false)
        };
        let (client, sandbox) = pair().unwrap();
        let (near, far): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
        let near = near.into_iter().map(OwnedFd::from).collect();
        let attachment = Attachment::remote(options, remote);
        (attachment, caller, Client::from(client), sandbox, near, far)
    }

    /// Reads pieces with their heads: what was written to each stream.
    fn unframe(mut from: impl Read) -> [Vec<u8>; 2] {
        let mut streams = [Vec::new(), Vec::new()];
        let mut head = [0; remote::HEAD];
        while from.read_exact(&mut head).is_ok() {
            let length = u32::from_be_bytes(head[4..].try_into().unwrap());
            let mut piece = vec![0; length as usize];
            from.read_exact(&mut piece).unwrap();
            streams[usize::from(head[0]) - 1].extend(piece);
        }
        streams
    }

    #[test]
    fn pieces_of_output_and_error_are_never_mixed_up_on_one_socket() {
        let (attachment, caller, client, sandbox, streams, far) = elsewhere(false);
        let carrying = std::thread::spawn(move || attachment.carry(client, streams).unwrap());
        let reading = std::thread::spawn(move || unframe(caller));
        let [_input, output, error] = far.try_into().unwrap();
        let writing = [(output, b'o'), (error, b'e')].map(|(mut stream, byte)| {
            std::thread::spawn(move || stream.write_all(&vec![byte; 3 << 20]).unwrap())
        });
        for thread in writing {
            thread.join().unwrap();
        }
        send(&sandbox, &Reply::Exited(Exit::now(4)), &[]).unwrap();
        assert!(matches!(carrying.join().unwrap(), Outcome::Exited(exit) if exit.status == 4));
        let [output, error] = reading.join().unwrap();
        assert_eq!((output.len(), error.len()), (3 << 20, 3 << 20));
        assert!(output.iter().all(|byte| *byte == b'o') && error.iter().all(|byte| *byte == b'e'));
    }

    #[test]
    fn input_that_came_before_the_caller_went_is_passed_on() {
        for follows_end in [false, true] {
            let (attachment, mut caller, client, sandbox, streams, far) = elsewhere(follows_end);
            let carrying = std::thread::spawn(move || attachment.carry(client, streams).unwrap());
            let [mut input, output, error] = far.try_into().unwrap();
            caller.write_all(b"and late").unwrap();
            drop(caller);
            let mut read = String::new();
            input.read_to_string(&mut read).unwrap();
            assert_eq!(read, "early and late");
            if follows_end {
                (&output).write_all(&vec![0; 1 << 20]).unwrap();
                drop((output, error));
                send(&sandbox, &Reply::Exited(Exit::now(5)), &[]).unwrap();
            }
            let outcome = carrying.join().unwrap();
            match follows_end {
                false => assert_eq!(outcome, Outcome::OutputClosed),
                true => assert!(matches!(outcome, Outcome::Exited(exit) if exit.status == 5)),
            }
        }
    }

    #[test]
    fn too_few_streams_are_an_error() {
        let (ours, _sandbox) = pair().unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let caller = Caller::Own(Signals::take(&[]).unwrap());
        let pump = Pump::new(
            Client::from(ours),
            vec![near.into()],
            &options(false),
            &caller,
        );
        assert!(pump.is_err());
    }
}
