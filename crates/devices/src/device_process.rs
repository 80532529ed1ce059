//! The process that holds the devices of a guest whose machine is another process.
//!
//! Its role calls [`take_control_socket`] first, confines itself, and then calls [`run`]. By then
//! nothing is left of the host but `/proc` of its own pid namespace and the descriptors that come
//! over the control socket. The process ends when the sandbox closes the control socket or a front
//! end disconnects.

use std::io;
use std::os::fd::OwnedFd;

use hull_device_control::{CONTROL_FD, DeviceConfig, Resources};
use rustix::net::SocketType;

use crate::served::{Error, Served, receive_setup};
use crate::transport::Connection;
use crate::transport::vhost_user::FrontEnd;

/// Takes the inherited control socket, [`CONTROL_FD`]. Called once, before the process opens any
/// descriptor of its own, which could get that number.
///
/// [`Error::NoControlSocket`] if the descriptor is not open, or not a socket for messages.
pub fn take_control_socket() -> Result<OwnedFd, Error> {
    let socket = hull_ipc::inherited(CONTROL_FD).map_err(|_| Error::NoControlSocket)?;
    match rustix::net::sockopt::socket_type(&socket) {
        Ok(SocketType::SEQPACKET) => Ok(socket),
        _ => Err(Error::NoControlSocket),
    }
}

/// Runs the devices that the sandbox asks for until it closes the control socket or a front end
/// disconnects.
///
/// # Errors
/// A device cannot be set up, its front end broke the protocol, or the control socket failed.
pub fn run(control: OwnedFd) -> Result<(), Error> {
    let devices = receive_setup(&control)?;
    // Their threads start others, by the vhost-user library.
    let mut served = Served::new(control, |_| Ok(()))?;
    for (device, Resources { socket, file }) in devices {
        let connection = connection(&device, socket)?;
        served.start(device, connection, file)?;
    }
    served.serve()
}

fn connection(device: &DeviceConfig, socket: Option<OwnedFd>) -> Result<Connection, Error> {
    let front_end = match device {
        DeviceConfig::Net {
            early_enable: true, ..
        } => FrontEnd::EarlyEnable,
        _ => FrontEnd::InOrder,
    };
    match socket {
        Some(socket) => Ok(Connection::VhostUser { socket, front_end }),
        None => Err(Error::Host {
            action: "set the devices up",
            source: io::Error::other("they have no sockets"),
        }),
    }
}
