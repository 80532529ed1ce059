//! Transports, which drive a [`Device`]: one module per way of reaching a
//! guest's queues.

pub mod early_enable;
mod in_flight;
mod load;
pub mod mmio;
mod placement;
#[cfg(not(fuzzing))]
mod ring;
#[cfg(fuzzing)]
pub mod ring;
pub mod vhost_user;
#[cfg(not(fuzzing))]
mod vring;
#[cfg(fuzzing)]
pub mod vring;

use std::os::fd::OwnedFd;

use crate::device::Device;

/// How a device reaches its driver.
pub enum Connection {
    /// Through a machine process that speaks vhost-user.
    VhostUser {
        /// The listening socket.
        socket: OwnedFd,
        /// Which machine's.
        front_end: vhost_user::FrontEnd,
    },
    /// In the machine process.
    Mmio(mmio::Slot),
}

/// Why a device is not served any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A front end broke the protocol.
    #[error(transparent)]
    VhostUser(#[from] vhost_user::Error),
    /// The host failed.
    #[error(transparent)]
    Mmio(#[from] mmio::Error),
    /// The device's thread cannot be confined.
    #[error("{0}")]
    Confine(String),
}

impl Connection {
    /// Connects `device`. A driver that looks for it finds it when this returns, and waits until it
    /// is served.
    ///
    /// # Errors
    /// [`Error::Mmio`]: the device cannot be set up.
    pub fn attach(self, name: &'static str, device: Box<dyn Device>) -> Result<Attached, Error> {
        Ok(match self {
            Self::VhostUser { socket, front_end } => Attached::VhostUser {
                name,
                device,
                socket,
                front_end,
            },
            Self::Mmio(slot) => Attached::Mmio(Box::new(mmio::attach(name, device, slot)?)),
        })
    }
}

/// A device with its connection.
pub enum Attached {
    /// See [`Connection::VhostUser`].
    VhostUser {
        /// The device's name.
        name: &'static str,
        /// The device.
        device: Box<dyn Device>,
        /// The listening socket.
        socket: OwnedFd,
        /// Which machine's.
        front_end: vhost_user::FrontEnd,
    },
    /// See [`Connection::Mmio`].
    Mmio(Box<mmio::Worker>),
}

impl Attached {
    /// Serves the device on the calling thread until its front end disconnects or the machine has
    /// ended.
    ///
    /// # Errors
    /// The front end broke the protocol, or the host fails.
    pub fn serve(self) -> Result<(), Error> {
        match self {
            Self::VhostUser {
                name,
                device,
                socket,
                front_end,
            } => Ok(vhost_user::serve(name, device, socket, front_end)?),
            Self::Mmio(worker) => Ok(worker.serve()?),
        }
    }
}
