//! Carrying the streams of one process: a thread for each, which reads and writes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use hull_sandbox::error::{Context, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::Mode;

/// Bytes carried at once. Each of a keeper's threads has a buffer.
const PIECE: usize = 16 << 10;

/// Stack of a thread that carries: its buffer is on the heap.
const STACK: usize = 32 << 10;

/// What carries the streams of one process.
pub struct Carried {
    /// Threads that carry output: waited for at the end.
    outputs: Vec<JoinHandle<()>>,
    /// The terminal, when there is one.
    terminal: Option<OwnedFd>,
    /// What the terminal was like before.
    before: Option<Termios>,
}

/// Begins to carry.
///
/// # Errors
/// Streams are missing, or the terminal cannot be set up.
pub fn carry(mode: Mode, streams: Vec<OwnedFd>) -> Result<Carried> {
    let mut streams = streams.into_iter();
    let mut next = || {
        streams
            .next()
            .ok_or_else(|| Error::new("the keeper got too few streams"))
    };
    let standard = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context(|| "take a stream");
    if mode == Mode::Pipes {
        let (input, output, error) = (next()?, next()?, next()?);
        thread(standard(io::stdin().as_fd())?, input, End::Shutdown)?;
        let outputs = vec![
            thread(output, standard(io::stdout().as_fd())?, End::Nothing)?,
            thread(error, standard(io::stderr().as_fd())?, End::Nothing)?,
        ];
        return Ok(Carried {
            outputs,
            terminal: None,
            before: None,
        });
    }
    let stream = next()?;
    let (terminal, output) = match mode {
        Mode::OwnTerminal => (
            standard(io::stdin().as_fd())?,
            standard(io::stdout().as_fd())?,
        ),
        _ => {
            let slave = next()?;
            // Its size's changes and its hang-up are told to this process then.
            rustix::process::ioctl_tiocsctty(&slave).context(|| "take control of the terminal")?;
            // An engine may wait for the end of what it gave as standard output.
            rustix::stdio::dup2_stdin(&slave)
                .and_then(|()| rustix::stdio::dup2_stdout(&slave))
                .and_then(|()| rustix::stdio::dup2_stderr(&slave))
                .context(|| "leave the standard streams")?;
            (standard(slave.as_fd())?, slave)
        }
    };
    let before = tcgetattr(&terminal).context(|| "read the terminal's attributes")?;
    let mut raw = before.clone();
    raw.make_raw();
    // The terminal that cooks is the one in the guest.
    tcsetattr(&terminal, OptionalActions::Now, &raw).context(|| "set the terminal's attributes")?;
    let input = standard(terminal.as_fd())?;
    let writing = standard(stream.as_fd())?;
    thread(input, writing, End::Shutdown)?;
    let outputs = vec![thread(stream, output, End::Nothing)?];
    Ok(Carried {
        outputs,
        terminal: Some(terminal),
        before: Some(before),
    })
}

/// What follows the end of what is carried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The reader is told.
    Shutdown,
    /// Nothing.
    Nothing,
}

fn thread(from: OwnedFd, to: OwnedFd, end: End) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || {
            let (mut from, mut to) = (File::from(from), File::from(to));
            let mut buffer = vec![0; PIECE];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => {
                        if write_all(&mut to, &buffer[..length]).is_err() {
                            // Nobody reads any more: the writer is to know.
                            let _ = shutdown(&from, Shutdown::Read);
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        wait(&from, PollFlags::IN);
                    }
                    // A terminal that was hung up.
                    Err(_) => break,
                }
            }
            if end == End::Shutdown {
                // The other end may have closed already.
                let _ = shutdown(&to, Shutdown::Write);
            }
        })
        .context(|| "start a thread")
}

/// Writes to what somebody else may have made non-blocking.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: &File, what: PollFlags) {
    // Whatever it says, the next call says more.
    let _ = poll(&mut [PollFd::new(fd, what)], None);
}

impl Carried {
    /// The terminal, when there is one.
    pub fn terminal(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref()
    }

    /// Waits until all output is written, and leaves the terminal as it was.
    pub fn finish(self) {
        for output in self.outputs {
            // A thread that panicked has carried what it could.
            let _ = output.join();
        }
        if let (Some(terminal), Some(before)) = (&self.terminal, &self.before) {
            // It may be gone.
            let _ = tcsetattr(terminal, OptionalActions::Drain, before);
        }
    }
}
