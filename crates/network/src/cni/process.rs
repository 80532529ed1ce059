//! Runs one process with text in and text out, with a timeout and limited output. Called by
//! [`super::plugin`] and by [`crate::forwarding`]; independent of CNI.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use super::error::Fault;
use crate::sys;

/// Limit of standard output; results are a few kilobytes.
const MOST_OUTPUT: usize = 1 << 20;
/// How much of the end of standard error is kept.
const KEPT_ERRORS: usize = 4 << 10;

/// Exit status and output of a process.
pub(crate) struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    /// Its last part.
    pub stderr: Vec<u8>,
}

/// Runs `program` to its end with only these environment variables. If it runs longer than `limit`,
/// or writes too much, or when `cancel` becomes readable, its process group is killed. It is killed
/// as well when the calling thread ends. It inherits `held`, and so do processes that it starts.
pub(crate) fn run(
    program: &Path,
    arguments: &[&str],
    environment: &[(&str, &OsStr)],
    input: &[u8],
    limit: Duration,
    cancel: Option<&OwnedFd>,
    held: Option<&OwnedFd>,
) -> Result<Output, Fault> {
    let deadline = Instant::now() + limit;
    let mut running =
        Running::start(program, arguments, environment, input, held).map_err(Fault::Start)?;
    match running.listen(deadline, cancel) {
        Ok(Heard::End) => running.end().map_err(Fault::Start),
        Ok(Heard::Nothing) => Err(Fault::Hung(limit)),
        Ok(Heard::Cancelled) => Err(Fault::Cancelled),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Err(Fault::TooMuchOutput),
        Err(error) => Err(Fault::Start(error)),
    }
}

/// Why listening to a process ended.
enum Heard {
    End,
    /// Timeout.
    Nothing,
    Cancelled,
}

/// A process that is killed with its group when this is dropped, unless it was reaped.
struct Running {
    child: Child,
    /// The process's pidfd.
    ended: OwnedFd,
    stdout: Stream,
    stderr: Stream,
    reaped: bool,
}

impl Running {
    fn start(
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &OsStr)],
        input: &[u8],
        held: Option<&OwnedFd>,
    ) -> io::Result<Running> {
        // Not a pipe: writing would block until the process reads, or fail if it does not.
        let mut stdin = File::from(memfd_create("cni-config", MemfdFlags::CLOEXEC)?);
        stdin.write_all(input)?;
        io::Seek::rewind(&mut stdin)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(environment.iter().copied())
            // The caller's directory may be gone, and using it may block an unmount.
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(stdin)))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        sys::die_with_thread(&mut command);
        if let Some(held) = held {
            sys::inherit(&mut command, held);
        }
        let mut child = command.spawn()?;
        let prepared = (|| {
            Ok((
                pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?,
                Stream::new(child.stdout.take().map(OwnedFd::from), MOST_OUTPUT)?,
                Stream::new(child.stderr.take().map(OwnedFd::from), KEPT_ERRORS)?,
            ))
        })();
        match prepared {
            Ok((ended, stdout, stderr)) => Ok(Running {
                child,
                ended,
                stdout,
                stderr,
                reaped: false,
            }),
            Err(error) => {
                kill(&mut child);
                Err(error)
            }
        }
    }

    /// Reads until the process has ended, the timeout, or cancellation. Does not wait for the end
    /// of its streams: processes that it left behind may hold them.
    fn listen(&mut self, deadline: Instant, cancel: Option<&OwnedFd>) -> io::Result<Heard> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = vec![PollFd::new(&self.ended, PollFlags::IN)];
            fds.extend(cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
            let streams = [&self.stdout, &self.stderr];
            fds.extend(
                streams
                    .iter()
                    .filter_map(|stream| stream.fd.as_ref())
                    .map(|fd| PollFd::new(fd, PollFlags::IN)),
            );
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(Heard::Nothing),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let ended = !fds[0].revents().is_empty();
            let cancelled = cancel.is_some() && !fds[1].revents().is_empty();
            self.stdout.read()?;
            if self.stdout.kept.len() > MOST_OUTPUT {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            self.stderr.read()?;
            if self.stderr.kept.len() > KEPT_ERRORS {
                self.stderr
                    .kept
                    .drain(..self.stderr.kept.len() - KEPT_ERRORS);
            }
            if ended {
                return Ok(Heard::End);
            }
            if cancelled {
                return Ok(Heard::Cancelled);
            }
        }
    }

    fn end(mut self) -> io::Result<Output> {
        let status = self.child.wait()?;
        self.reaped = true;
        let (stdout, stderr) = (
            std::mem::take(&mut self.stdout.kept),
            std::mem::take(&mut self.stderr.kept),
        );
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            kill(&mut self.child);
        }
    }
}

/// Kills a process that was not reaped yet, so that its pid, and so its group's id, cannot have
/// been reused.
fn kill(child: &mut Child) {
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.wait();
}

/// Standard output or error of the process.
struct Stream {
    /// `None` after its end.
    fd: Option<OwnedFd>,
    kept: Vec<u8>,
    /// Limit of one read, so that endless output does not delay the timeout.
    most: usize,
}

impl Stream {
    fn new(fd: Option<OwnedFd>, most: usize) -> io::Result<Stream> {
        if let Some(fd) = &fd {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        Ok(Stream {
            fd,
            kept: Vec::new(),
            most,
        })
    }

    /// Reads what is available, at most a little more than `most`.
    fn read(&mut self) -> io::Result<()> {
        let Some(fd) = &self.fd else {
            return Ok(());
        };
        let mut buffer = [0; 16 << 10];
        let mut taken = 0;
        while taken <= self.most {
            match rustix::io::read(fd.as_fd(), &mut buffer) {
                Ok(0) => {
                    self.fd = None;
                    return Ok(());
                }
                Ok(count) => {
                    taken += count;
                    self.kept
                        .extend_from_slice(buffer.get(..count).unwrap_or_default());
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
