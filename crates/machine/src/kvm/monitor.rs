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
pub struct Monitor(OwnedFd);

impl Monitor {
    /// A connection, and its other end for the machine process.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = hull_ipc::pair()?;
        Ok((Self(ours), theirs))
    }

    /// Has a command executed. The error is for display.
    pub fn execute(&mut self, command: Command) -> Result<(), String> {
        hull_ipc::send(&self.0, &command, &[]).map_err(|error| error.to_string())?;
        let timeout = Timespec {
            tv_sec: TIMEOUT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut ready, Some(&timeout)) {
            Ok(0) => return Err(format!("no answer within {} s", TIMEOUT.as_secs())),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
        match hull_ipc::receive::<Answer>(&self.0, LIMITS) {
            Ok(Some(Received { message, .. })) => match message.error {
                None => Ok(()),
                Some(error) => Err(error),
            },
            Ok(None) => Err("the machine process has ended".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}
