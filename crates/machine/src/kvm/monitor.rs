//! The socket over which a machine process is paused, resumed and saved.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use hull_device_control::monitor::{Answer, Command, LIMITS};
use hull_ipc::Received;
use rustix::event::{PollFd, PollFlags, poll};

use crate::process::timespec;

/// How long an answer may take: longer than the machine process waits for virtual CPUs.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The same for a resume, which waits for devices the first time after a restore.
const RESUME_TIMEOUT: Duration = Duration::from_secs(330);

/// Why a command was not executed. Its text is for display.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The machine process has ended, or is about to.
    #[error("the machine process has ended")]
    Ended,
    /// The process says why, or the connection failed.
    #[error("{0}")]
    Other(String),
}

/// This end of the socket.
#[derive(Debug)]
pub struct Monitor {
    socket: OwnedFd,
    /// An answer is missing, which would be taken for that of the next command.
    broken: bool,
}

impl Monitor {
    /// A connection, and its other end for the machine process.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = hull_ipc::pair()?;
        let monitor = Self {
            socket: ours,
            broken: false,
        };
        Ok((monitor, theirs))
    }

    /// Has a command executed; `files` come with it.
    pub fn execute(&mut self, command: Command, files: &[BorrowedFd<'_>]) -> Result<(), Failure> {
        if self.broken {
            let why = "an earlier command was not answered";
            return Err(Failure::Other(why.into()));
        }
        match self.ask(command, files) {
            Ok(Answer { error: None }) => Ok(()),
            Ok(Answer { error: Some(error) }) => Err(Failure::Other(error)),
            Err(error) => {
                self.broken = true;
                Err(error)
            }
        }
    }

    fn ask(&self, command: Command, files: &[BorrowedFd<'_>]) -> Result<Answer, Failure> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Failure::Ended,
            _ => Failure::Other(error.to_string()),
        };
        hull_ipc::send(&self.socket, &command, files).map_err(failed)?;
        let limit = match command {
            Command::Pause => Some(TIMEOUT),
            Command::Resume => Some(RESUME_TIMEOUT),
            // As long as it takes to write the guest's memory.
            Command::Save => None,
        };
        let timeout = limit.map(timespec);
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        match rustix::io::retry_on_intr(|| poll(&mut ready, timeout.as_ref())) {
            Ok(0) => {
                let seconds = limit.unwrap_or_default().as_secs();
                let why = format!("no answer within {seconds} s");
                return Err(Failure::Other(why));
            }
            Ok(_) => {}
            Err(error) => return Err(failed(error.into())),
        }
        match hull_ipc::receive::<Answer>(&self.socket, LIMITS) {
            Ok(Some(Received { message, .. })) => Ok(message),
            Ok(None) => Err(Failure::Ended),
            Err(error) => Err(failed(error)),
        }
    }
}
