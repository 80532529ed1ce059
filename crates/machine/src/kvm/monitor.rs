//! The socket over which a machine process is paused and resumed.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use hull_device_control::monitor::{Answer, Command, LIMITS};
use hull_ipc::Received;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long an answer may take: longer than the machine process waits for virtual CPUs.
const TIMEOUT: Duration = Duration::from_secs(10);

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

    /// Has a command executed. The error is for display.
    pub fn execute(&mut self, command: Command) -> Result<(), String> {
        if self.broken {
            return Err("an earlier command was not answered".into());
        }
        match self.ask(command) {
            Ok(Answer { error: None }) => Ok(()),
            Ok(Answer { error: Some(error) }) => Err(error),
            Err(error) => {
                self.broken = true;
                Err(error)
            }
        }
    }

    fn ask(&self, command: Command) -> Result<Answer, String> {
        hull_ipc::send(&self.socket, &command, &[]).map_err(|error| error.to_string())?;
        let timeout = Timespec {
            tv_sec: TIMEOUT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        match rustix::io::retry_on_intr(|| poll(&mut ready, Some(&timeout))) {
            Ok(0) => return Err(format!("no answer within {} s", TIMEOUT.as_secs())),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
        match hull_ipc::receive::<Answer>(&self.socket, LIMITS) {
            Ok(Some(Received { message, .. })) => Ok(message),
            Ok(None) => Err("the machine process has ended".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}
