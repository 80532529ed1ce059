//! Published ports of the host: found, and reserved for as long as they are published.
//!
//! Called when a user's publish options are read, and by the sandbox process, which holds the ports
//! while its container runs. Forwards nothing: plugins do (module `cni`).

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, bind, getsockname, listen, shutdown,
    socket_with, sockopt,
};

use serde::{Deserialize, Serialize};

use crate::cni::{PortMapping, Protocol};

/// A port of the host to publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostPort {
    /// Any free port.
    Any,
    /// This one.
    One(u16),
    /// The first free port of a range, both ends included.
    OneOf(u16, u16),
}

/// One container port that is reached through the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Restricted to this address of the host.
    pub host_ip: Option<IpAddr>,
    /// Port of the host.
    pub host_port: HostPort,
    /// Port of the container.
    pub container_port: u16,
    /// Protocol of both ports.
    pub protocol: Protocol,
}

/// Reserves host ports while it lives, with sockets bound to them. The sockets receive nothing:
/// packets are redirected to the container before, and others are refused.
///
/// When this is dropped before the container ends (or not handed to the process that stays), others
/// can take the ports, including hull's own containers: packet filter rules do not occupy a port.
#[derive(Debug, Default)]
pub struct Reservation {
    /// In the order of the published ports.
    pub mappings: Vec<PortMapping>,
    /// Can be passed to another process.
    pub sockets: Vec<OwnedFd>,
}

/// A port cannot be published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot publish {port}: {}", self.why())]
pub struct PortError {
    port: String,
    error: Errno,
}

impl PortError {
    fn why(&self) -> String {
        match self.error {
            Errno::ADDRINUSE => "port is already allocated".to_owned(),
            Errno::ADDRNOTAVAIL => "the host has no such address".to_owned(),
            error => std::io::Error::from(error).to_string(),
        }
    }

    /// Whether the caller lacks the privilege.
    pub fn is_denied(&self) -> bool {
        matches!(self.error, Errno::ACCESS | Errno::PERM)
    }
}

/// Finds the host's ports and reserves them; all or none.
///
/// # Errors
/// [`PortError`] if a port is taken, its address is not the host's, or the caller may not bind it.
pub fn reserve(published: &[Published]) -> Result<Reservation, PortError> {
    let mut all = Reservation::default();
    // Fixed ports first, so that they are not taken by chance for others.
    let mut order: Vec<(usize, &Published)> = published.iter().enumerate().collect();
    order.sort_by_key(|(_, one)| match one.host_port {
        HostPort::One(_) => 0,
        HostPort::OneOf(..) => 1,
        HostPort::Any => 2,
    });
    let mut mappings = Vec::new();
    let mut seen = HashSet::new();
    for (index, one) in order {
        let same = (one.host_ip, one.container_port, one.protocol);
        if let HostPort::One(port) = one.host_port
            && !seen.insert((port, same))
        {
            // A duplicate.
            continue;
        }
        let (host_port, mut sockets) = reserve_one(one)?;
        all.sockets.append(&mut sockets);
        let mapping = PortMapping {
            host_ip: one.host_ip,
            host_port,
            container_port: one.container_port,
            protocol: one.protocol,
        };
        mappings.push((index, mapping));
    }
    mappings.sort_by_key(|(index, _)| *index);
    all.mappings = mappings.into_iter().map(|(_, mapping)| mapping).collect();
    Ok(all)
}

fn reserve_one(one: &Published) -> Result<(u16, Vec<OwnedFd>), PortError> {
    /// A port may be free for one address family and taken for the other.
    const TRIES: u32 = 32;
    let name = one.protocol.name();
    let cannot = |port: String, error: Errno| {
        let address = match one.host_ip {
            Some(IpAddr::V6(ip)) => format!("[{ip}]"),
            Some(IpAddr::V4(ip)) => ip.to_string(),
            None => "0.0.0.0".to_owned(),
        };
        PortError {
            port: format!("{address}:{port}/{name}"),
            error,
        }
    };
    match one.host_port {
        HostPort::One(port) => occupy(one, port).map_err(|error| cannot(port.to_string(), error)),
        HostPort::OneOf(first, last) => (first..=last)
            .map(|port| occupy(one, port))
            .find(|outcome| !matches!(outcome, Err(Errno::ADDRINUSE)))
            .unwrap_or(Err(Errno::ADDRINUSE))
            .map_err(|error| cannot(format!("{first}-{last}"), error)),
        HostPort::Any => (0..TRIES)
            .map(|_| occupy(one, 0))
            .find(|outcome| !matches!(outcome, Err(Errno::ADDRINUSE)))
            .unwrap_or(Err(Errno::ADDRINUSE))
            .map_err(|error| cannot("0".to_owned(), error)),
    }
}

/// Binds sockets to a port of all requested addresses; 0 is any, the same for all of them.
fn occupy(one: &Published, port: u16) -> Result<(u16, Vec<OwnedFd>), Errno> {
    match one.host_ip {
        Some(ip) => {
            let (socket, port) = bound(SocketAddr::new(ip, port), one.protocol)?;
            Ok((port, vec![socket]))
        }
        None => {
            let (v4, port) = bound(
                SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port),
                one.protocol,
            )?;
            match bound(
                SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port),
                one.protocol,
            ) {
                Ok((v6, _)) => Ok((port, vec![v4, v6])),
                // A host without IPv6.
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => Ok((port, vec![v4])),
                Err(error) => Err(error),
            }
        }
    }
}

fn bound(address: SocketAddr, protocol: Protocol) -> Result<(OwnedFd, u16), Errno> {
    let family = if address.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let open = |kind, protocol| socket_with(family, kind, SocketFlags::CLOEXEC, protocol);
    let socket = match protocol {
        Protocol::Tcp => open(SocketType::STREAM, None)?,
        Protocol::Udp => open(SocketType::DGRAM, None)?,
        // Few kernels have SCTP. Without it no program can bind the port, only packet filters can
        // use it, so a TCP socket with the same number stands in.
        Protocol::Sctp => match open(SocketType::STREAM, Some(rustix::net::ipproto::SCTP)) {
            Ok(socket) => socket,
            Err(Errno::PROTONOSUPPORT) => open(SocketType::STREAM, None)?,
            Err(error) => return Err(error),
        },
    };
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // The kernel chooses among ports without connections.
    if address.port() != 0 && sockopt::socket_type(&socket)? == SocketType::STREAM {
        bind_beside_ended_connections(&socket, &address)?;
    } else {
        bind(&socket, &address)?;
    }
    let port = SocketAddr::try_from(getsockname(&socket)?).map(|address| address.port())?;
    Ok((socket, port))
}

/// Binds to a port that nobody listens on, also when connections of its last user are still in
/// TIME_WAIT, which lasts 60 s. No other socket can bind the port afterwards.
///
/// `SO_REUSEADDR` allows the first; it also lets two sockets share a port until one of them listens
/// (`inet_csk_bind_conflict`). So the socket listens, which only one can, and then closes without
/// the option: from then on it conflicts with every other one, and connections are refused.
fn bind_beside_ended_connections(socket: &OwnedFd, address: &SocketAddr) -> Result<(), Errno> {
    sockopt::set_socket_reuseaddr(socket, true)?;
    bind(socket, address)?;
    listen(socket, 0)?;
    sockopt::set_socket_reuseaddr(socket, false)?;
    // A listening socket stops, and keeps a port that it was bound to by number.
    shutdown(socket, Shutdown::Both)
}
