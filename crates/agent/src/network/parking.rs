//! Where unused net devices are: a network namespace without processes. A machine may have more
//! devices than its pod has interfaces, for later ones; programs in containers would see interfaces
//! that lead nowhere.
//!
//! Created when there is something to put there, which most guests never have.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hull_protocol::net_device_mac;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::netlink::{IFLA_IFNAME, Requests, Socket, link_body};

/// `IFLA_NET_NS_FD` of linux/if_link.h.
const IFLA_NET_NS_FD: u16 = 28;

/// The namespace, and the guest's own for the way back.
pub struct Parking {
    namespace: OwnedFd,
    /// Socket in the namespace.
    socket: Socket,
    root: OwnedFd,
}

fn own_namespace() -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/proc/self/ns/net", flags, Mode::empty())?)
}

/// Moves a link by its index. On the way it has a name that is free in both namespaces.
fn encode(requests: &mut Requests, index: u32, number: u8, to: &OwnedFd) {
    requests.begin(libc::RTM_NEWLINK, 0, &link_body(index, 0, 0));
    requests.attribute(IFLA_NET_NS_FD, &to.as_raw_fd().to_ne_bytes());
    let name = format!("hull{number}\0");
    requests.attribute(IFLA_IFNAME, name.as_bytes());
}

fn carry_out(socket: &Socket, requests: Requests) -> io::Result<()> {
    match socket.change(requests)?.first() {
        None => Ok(()),
        Some((_, error)) => Err((*error).into()),
    }
}

impl Parking {
    /// Creates it. Afterwards the agent's only thread is back in its own namespace.
    #[allow(unsafe_code)]
    pub fn new() -> io::Result<Self> {
        let root = own_namespace()?;
        // SAFETY: only UnshareFlags::FILES would be unsound.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        let made = own_namespace().and_then(|namespace| Ok((namespace, Socket::open()?)));
        move_into_link_name_space(root.as_fd(), Some(LinkNameSpaceType::Network))?;
        let (namespace, socket) = made?;
        Ok(Self {
            namespace,
            socket,
            root,
        })
    }

    /// Takes devices in: number and index in the guest's own namespace, to which `socket` belongs.
    pub fn take(
        &self,
        socket: &Socket,
        devices: impl Iterator<Item = (u8, u32)>,
    ) -> io::Result<()> {
        let mut requests = Requests::default();
        for (number, index) in devices {
            encode(&mut requests, index, number, &self.namespace);
        }
        carry_out(socket, requests)
    }

    /// Gives those of these devices back that are here; returns their numbers.
    pub fn give(&self, numbers: &[u8]) -> io::Result<Vec<u8>> {
        let mut requests = Requests::default();
        let mut given = Vec::new();
        for link in self.socket.links()? {
            let number = numbers
                .iter()
                .find(|number| link.mac == Some(net_device_mac(**number)));
            if let Some(number) = number {
                encode(&mut requests, link.index, *number, &self.root);
                given.push(*number);
            }
        }
        if !given.is_empty() {
            carry_out(&self.socket, requests)?;
        }
        Ok(given)
    }
}
