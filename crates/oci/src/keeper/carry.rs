//! Copies the streams of one process, with a thread for each.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;

use hull_sandbox::error::{Context, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

use super::Mode;

/// Size of a thread's buffer, bytes.
const PIECE: usize = 16 << 10;

/// Stack of such a thread; its buffer is on the heap.
const STACK: usize = 32 << 10;

/// The streams being copied.
pub struct Carried {
    /// Threads for output, joined at the end.
    outputs: Vec<JoinHandle<()>>,
    /// The terminal, if there is one.
    terminal: Option<OwnedFd>,
    /// The terminal's attributes before.
    before: Option<Termios>,
}

/// Devices of the host, for a process that leaves the host's root.
pub struct HostDevices {
    null: File,
    /// The controlling terminal, if there is one.
    tty: Option<OwnedFd>,
}

impl HostDevices {
    /// Opens them.
    ///
    /// # Errors
    /// There is no /dev/null.
    pub fn open() -> Result<Self> {
        let open = |path| File::options().read(true).write(true).open(path);
        Ok(Self {
            null: open("/dev/null").context(|| "open /dev/null")?,
            tty: open("/dev/tty").ok().map(OwnedFd::from),
        })
    }

    /// The caller's terminal: the first one among the standard streams, as in runc, else the
    /// controlling one.
    ///
    /// # Errors
    /// The caller has none.
    pub fn terminal(&self) -> Result<OwnedFd> {
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]
            .into_iter()
            .find(|stream| isatty(*stream))
            .or(self.tty.as_ref().map(AsFd::as_fd))
            .ok_or_else(|| {
                Error::new(
                    "the process is to have a terminal, and hull-oci was started without one",
                )
                .hint("without process.terminal (exec: without --tty) none is needed")
            })?
            .try_clone_to_owned()
            .context(|| "take the terminal")
    }

    /// Lets go of the standard streams, which threads have copies of: the other ends see them
    /// closed when the process in the guest has closed its own.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn leave_standard_streams(&self) -> Result<()> {
        rustix::stdio::dup2_stdin(&self.null)
            .and_then(|()| rustix::stdio::dup2_stdout(&self.null))
            .and_then(|()| rustix::stdio::dup2_stderr(&self.null))
            .context(|| "leave the standard streams")
    }
}

/// Rows and columns of the caller's terminal, if it has one and that has a size.
pub fn own_terminal_size() -> Option<(u16, u16)> {
    let terminal = HostDevices::open().ok()?.terminal().ok()?;
    super::size_of(&terminal)
}

/// Starts to copy.
///
/// # Errors
/// A stream is missing, or the terminal cannot be set up.
pub fn carry(mode: Mode, streams: Vec<OwnedFd>, host: &HostDevices) -> Result<Carried> {
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
    let (terminal, input, output) = match mode {
        Mode::OwnTerminal => (
            host.terminal()?,
            standard(io::stdin().as_fd())?,
            standard(io::stdout().as_fd())?,
        ),
        _ => {
            let slave = next()?;
            // So that this process is notified of resizes and hang-up.
            rustix::process::ioctl_tiocsctty(&slave).context(|| "take control of the terminal")?;
            // The engine may wait for end of file on what it passed as standard output.
            rustix::stdio::dup2_stdin(&slave)
                .and_then(|()| rustix::stdio::dup2_stdout(&slave))
                .and_then(|()| rustix::stdio::dup2_stderr(&slave))
                .context(|| "leave the standard streams")?;
            (standard(slave.as_fd())?, standard(slave.as_fd())?, slave)
        }
    };
    let before = tcgetattr(&terminal).context(|| "read the terminal's attributes")?;
    let mut raw = before.clone();
    raw.make_raw();
    // The terminal in the guest does the line editing.
    tcsetattr(&terminal, OptionalActions::Now, &raw).context(|| "set the terminal's attributes")?;
    let writing = standard(stream.as_fd())?;
    thread(input, writing, End::Shutdown)?;
    let outputs = vec![thread(stream, output, End::Nothing)?];
    Ok(Carried {
        outputs,
        terminal: Some(terminal),
        before: Some(before),
    })
}

/// What to do at the end of a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Shut down the other side.
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
                            // Nothing reads any more: notify the writer.
                            let _ = shutdown(&from, Shutdown::Read);
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        wait(&from, PollFlags::IN);
                    }
                    // The terminal was hung up.
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

/// Writes to a descriptor that other processes may have made non-blocking.
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
    // On error, the next read or write reports it.
    let _ = poll(&mut [PollFd::new(fd, what)], None);
}

impl Carried {
    /// The terminal, if there is one.
    pub fn terminal(&self) -> Option<&OwnedFd> {
        self.terminal.as_ref()
    }

    /// Waits until all output is written, and restores the terminal.
    pub fn finish(self) {
        for output in self.outputs {
            // If a thread panicked, the remaining output is lost.
            let _ = output.join();
        }
        if let (Some(terminal), Some(before)) = (&self.terminal, &self.before) {
            // The terminal may be gone.
            let _ = tcsetattr(terminal, OptionalActions::Drain, before);
        }
    }
}
