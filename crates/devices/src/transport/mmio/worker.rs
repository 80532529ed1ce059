//! The thread of a device.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::TryRecvError;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{Command, ConfigSpace, Description, INTERRUPT_CONFIG, Slot};
use crate::device::{Device, DeviceError};
use crate::runner::{DeviceRunner, Outcome};

/// Why a device is no longer served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host call failed while setting the device up.
    #[error("cannot set up device {device}: {source}")]
    Setup {
        /// The device's name.
        device: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The slot has a device already.
    #[error("cannot set up device {device}: its slot has a device")]
    Taken {
        /// The device's name.
        device: &'static str,
    },
    /// A host call failed.
    #[error("device {device} cannot wait for events: {source}")]
    Wait {
        /// The device's name.
        device: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The device failed: the guest broke its rules, or the host fails. No driver goes on without
    /// it, so the machine ends, with this reason.
    #[error("device {device} failed: {source}")]
    Device {
        /// The device's name.
        device: &'static str,
        /// Why.
        source: DeviceError,
    },
}

/// Puts `device` into `slot`: drivers can find it when this returns. They wait until it is served.
///
/// # Errors
/// The device cannot be set up.
pub fn attach(name: &'static str, device: Box<dyn Device>, slot: Slot) -> Result<Worker, Error> {
    let setup = |source| Error::Setup {
        device: name,
        source,
    };
    let mut runner = DeviceRunner::new(device).map_err(setup)?;
    runner.set_memory(Some(slot.shared.memory.clone()));
    let device = runner.device();
    *slot.shared.config() = ConfigSpace {
        bytes: device.config(),
        generation: 0,
    };
    let description = Description {
        device: device.device_type(),
        features: device.features(),
        queue_sizes: device.queue_sizes().to_vec(),
    };
    if slot.shared.description.set(description).is_err() {
        return Err(Error::Taken { device: name });
    }
    Ok(Worker {
        name,
        runner,
        slot,
        quiesced: false,
    })
}

/// A device in its slot.
pub struct Worker {
    name: &'static str,
    runner: DeviceRunner,
    slot: Slot,
    /// Its host descriptors are not waited for: they stay ready.
    quiesced: bool,
}

impl Worker {
    /// Serves the device on the calling thread, until the registers are dropped.
    ///
    /// # Errors
    /// The device or the host failed.
    pub fn serve(mut self) -> Result<(), Error> {
        loop {
            let (kicked, commanded, host) = self.wait().map_err(|source| Error::Wait {
                device: self.name,
                source,
            })?;
            if commanded {
                clear(self.slot.shared.command.as_fd());
                loop {
                    match self.slot.commands.try_recv() {
                        Ok(command) => self.command(command)?,
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => return Ok(()),
                    }
                }
            }
            if kicked {
                clear(self.slot.shared.kick.as_fd());
                // With one notification for each device, it does not say which queue it is for.
                let outcome = self.runner.check_queues();
                self.take(outcome)?;
            }
            if host {
                let outcome = self.runner.host_events();
                self.take(outcome)?;
            }
        }
    }

    /// Waits for a kick, a command, or a host descriptor of the device.
    fn wait(&self) -> io::Result<(bool, bool, bool)> {
        let shared = &self.slot.shared;
        let host = match self.quiesced {
            true => PollFlags::empty(),
            false => PollFlags::IN,
        };
        let mut ready = [
            PollFd::from_borrowed_fd(shared.kick.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.command.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.runner.events(), host),
        ];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok((false, false, false)),
            Err(error) => return Err(error.into()),
        }
        let [kick, command, host] = ready.map(|one| !one.revents().is_empty());
        Ok((kick, command, host))
    }

    fn command(&mut self, command: Command) -> Result<(), Error> {
        match command {
            Command::Activate { features, rings } => {
                self.runner.activate(features, rings);
                // Kicks may have come before.
                let outcome = self.runner.check_queues();
                self.take(outcome)
            }
            Command::Reset { done } => {
                // It finishes or discards the requests in flight; none completes afterwards.
                self.runner.reset();
                self.quiesced = false;
                // The driver may have stopped waiting only with its machine.
                let _ = done.send(());
                Ok(())
            }
            Command::Save { done } => {
                let quiesced = self.runner.quiesce();
                self.take(quiesced.map(|_| Outcome::default()))?;
                self.quiesced = true;
                // Nobody waits any more if it took too long.
                let _ = done.send(self.runner.save());
                Ok(())
            }
            Command::Restore { saved, rings, done } => {
                let restored = self.runner.restore(&saved, rings);
                self.quiesced = true;
                self.slot.shared.config().bytes = self.runner.device().config();
                let _ = done.send(restored);
                Ok(())
            }
            Command::Resume => {
                self.quiesced = false;
                let outcome = self.runner.resume();
                self.take(outcome)
            }
        }
    }

    fn take(&mut self, outcome: Result<Outcome, DeviceError>) -> Result<(), Error> {
        let outcome = outcome.map_err(|source| Error::Device {
            device: self.name,
            source,
        })?;
        if outcome.config_changed {
            let shared = &self.slot.shared;
            let bytes = self.runner.device().config();
            let mut config = shared.config();
            config.bytes = bytes;
            config.generation = config.generation.wrapping_add(1);
            drop(config);
            shared.interrupt.raise(INTERRUPT_CONFIG);
        }
        Ok(())
    }
}

/// Empties an event counter.
fn clear(event: BorrowedFd<'_>) {
    let mut value = [0; 8];
    // It may be empty already.
    let _ = rustix::io::read(event, &mut value);
}
