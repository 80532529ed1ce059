//! Sockets inside a namespace that connect to services on its loopback interface. Called by the
//! sandbox process, for the name server that dockerd has there. What is sent and received is up to
//! the caller.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket as StdUdpSocket};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU16, Ordering};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tokio::net::{TcpSocket, UdpSocket};

use crate::error::{Error, Result};
use crate::namespace::Namespace;

/// Whether there is a UDP socket in the namespace that is bound to exactly this address.
pub fn listens(namespace: &Namespace, address: Ipv4Addr) -> Result<bool> {
    let read = || std::fs::read_to_string("/proc/thread-self/net/udp");
    let text = namespace.run_in(read)?.map_err(|why| Error::Read {
        what: "sockets",
        why,
    })?;
    Ok(text.lines().filter_map(local).any(|local| local == address))
}

/// The local address in a line of /proc/net/udp: ` sl local_address rem_address …`, as
/// `0B00007F:0035`.
fn local(line: &str) -> Option<Ipv4Addr> {
    let (address, _port) = line.split_ascii_whitespace().nth(1)?.split_once(':')?;
    let address = u32::from_str_radix(address, 16).ok()?;
    // In memory order.
    Some(address.to_ne_bytes().into())
}

/// Ports for sockets of a namespace whose interfaces are mirrored: answers to these go to the
/// namespace's own stack ([`mirror::admit_answers`](crate::mirror::admit_answers)). All ports that
/// share the first one's bits, above the range from which kernels choose by default (32768 to
/// 60999), so that a guest hardly uses them for queries.
pub const OWN_PORTS: RangeInclusive<u16> = 0xfe00..=0xffff;

/// The kernel's range of ephemeral ports.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Sets the namespace's range of ephemeral ports, in the kernel's format: `32768 60999`. Returns
/// the previous range.
pub fn choose_ports(namespace: &Namespace, range: &str) -> Result<String> {
    let change = || {
        let before = std::fs::read_to_string(PORT_RANGE)?;
        std::fs::write(PORT_RANGE, range)?;
        Ok(before)
    };
    let changed = namespace.run_in(change)?;
    changed.map_err(|why| Error::Ports { why })
}

/// An address of the loopback network that no recent socket had. Where packets are redirected,
/// connection tracking remembers earlier sockets for a while, and there are few ports.
fn source() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    Ipv4Addr::new(127, 104, high, low)
}

/// A UDP socket in the namespace, connected to one address.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn udp(namespace: &Namespace, to: SocketAddrV4) -> Result<UdpSocket> {
    let open = || -> io::Result<_> {
        let socket = StdUdpSocket::bind((source(), 0))?;
        socket.connect(to)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let socket = namespace.run_in(open)?;
    socket
        .and_then(UdpSocket::from_std)
        .map_err(|why| Error::Socket { to, why })
}

/// A TCP socket in the namespace, for the caller to connect to `to`.
///
/// # Panics
/// Outside of a tokio runtime.
pub fn tcp(namespace: &Namespace, to: SocketAddrV4) -> Result<TcpSocket> {
    let open = || -> io::Result<_> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (family, kind) = (AddressFamily::INET, SocketType::STREAM);
        let socket = socket_with(family, kind, flags, None)?;
        bind(&socket, &SocketAddrV4::new(source(), 0))?;
        Ok(socket)
    };
    let socket = namespace.run_in(open)?;
    let socket = socket.map_err(|why| Error::Socket { to, why })?;
    Ok(TcpSocket::from_std_stream(socket.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_local_address_of_a_socket_is_read() {
        if cfg!(target_endian = "little") {
            let line = "  407: 0B00007F:A1B2 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0";
            assert_eq!(local(line), Some(Ipv4Addr::new(127, 0, 0, 11)));
        }
        for line in [
            "   sl  local_address rem_address   st tx_queue rx_queue",
            "",
            "  1:",
            "  1: 0B00007F",
            "  1: 0B00007FFF:1",
        ] {
            assert_eq!(local(line), None, "{line:?}");
        }
    }
}
