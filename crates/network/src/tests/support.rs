//! Shared test code: namespaces joined by veth pairs, frames, and sockets that send and receive
//! them.
#![allow(unsafe_code)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::{LinkBridge, LinkUnspec, LinkVeth};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::tap::HEADER_LENGTH;
use crate::{Description, Interface, Monitor, Namespace, Netlink, Result};

/// How long to wait for an expected event.
pub const SOON: Duration = Duration::from_secs(5);
/// How long to wait for an event that must not happen.
pub const NEVER: Duration = Duration::from_millis(200);

/// A namespace, its netlink socket, and one for an engine's changes.
pub struct Place {
    pub namespace: Namespace,
    pub netlink: Netlink,
    pub engine: rtnetlink::Handle,
}

impl Place {
    /// A new namespace, or `None`, with a message, if this machine does not allow it.
    pub fn new(test: &str) -> Option<Self> {
        let namespace = match Namespace::new() {
            Ok(namespace) => namespace,
            Err(error) => {
                println!("left out: {test}: {error}");
                return None;
            }
        };
        let runtime = tokio::runtime::Handle::current();
        let connection = namespace.run_in(|| {
            let _inside = runtime.enter();
            rtnetlink::new_connection().unwrap()
        });
        let (connection, engine, _) = connection.unwrap();
        tokio::spawn(connection);
        Some(Self {
            netlink: Netlink::open(&namespace).unwrap(),
            namespace,
            engine,
        })
    }

    pub fn monitor(&self) -> Monitor {
        Monitor::open(&self.namespace).unwrap()
    }

    pub async fn describe(&self) -> Description {
        self.netlink.describe().await.unwrap()
    }

    /// The namespace's only interface.
    pub async fn interface(&self) -> Interface {
        let mut interfaces = self.describe().await.interfaces;
        assert_eq!(interfaces.len(), 1, "{interfaces:?}");
        interfaces.remove(0)
    }

    /// Sets an interface up, and returns its index.
    pub async fn up(&self, name: &str) -> u32 {
        let message = LinkUnspec::new_with_name(name).up().build();
        self.set(message).await;
        self.index(name)
    }

    async fn has_link_local(&self, name: &str) -> bool {
        let described = self.describe().await;
        let interface = described
            .interfaces
            .iter()
            .find(|interface| interface.name == name);
        interface.is_some_and(|interface| {
            interface
                .addresses
                .iter()
                .any(|address| address.scope == libc::RT_SCOPE_LINK)
        })
    }

    pub async fn set(&self, message: LinkMessage) {
        let link = self.engine.link();
        link.set(message).execute().await.unwrap();
    }

    pub async fn delete(&self, index: u32) {
        let link = self.engine.link();
        link.del(index).execute().await.unwrap();
    }

    pub async fn add_bridge(&self, name: &str) -> u32 {
        let link = self.engine.link();
        let message = LinkBridge::new(name).up().build();
        link.add(message).execute().await.unwrap();
        self.index(name)
    }

    pub async fn add_address(&self, index: u32, address: &str) {
        let (address, length) = address.split_once('/').unwrap();
        let address: IpAddr = address.parse().unwrap();
        let addresses = self.engine.address();
        let request = addresses.add(index, address, length.parse().unwrap());
        request.execute().await.unwrap();
    }

    pub fn index(&self, name: &str) -> u32 {
        self.find(name).unwrap()
    }

    /// The index of an interface, if it is there.
    pub fn find(&self, name: &str) -> io::Result<u32> {
        let name = std::ffi::CString::new(name).unwrap();
        let find = move || {
            // SAFETY: a string that ends with zero.
            match unsafe { libc::if_nametoindex(name.as_ptr()) } {
                0 => Err(io::Error::last_os_error()),
                index => Ok(index),
            }
        };
        self.namespace.run_in(find).unwrap()
    }

    /// A socket that sends and receives the interface's frames.
    pub fn packets(&self, index: u32) -> OwnedFd {
        self.namespace.run_in(|| packet_socket(index)).unwrap()
    }
}

/// Two namespaces; `eth0` of the first is a veth whose peer is `peer` in the second. Both are up.
pub async fn joined(test: &str) -> Option<(Place, Place)> {
    let (here, there) = (Place::new(test)?, Place::new(test)?);
    join(&here, "eth0", &there, "peer").await;
    Some((here, there))
}

pub async fn join(here: &Place, name: &str, there: &Place, peer: &str) {
    let link = here.engine.link();
    let veth = LinkVeth::new(name, peer).build();
    link.add(veth).execute().await.unwrap();
    let fd = there.namespace.as_fd().as_raw_fd();
    here.set(LinkUnspec::new_with_name(peer).setns_by_fd(fd).build())
        .await;
    here.up(name).await;
    there.up(peer).await;
    // The kernel adds link-local addresses some time after both are up.
    let end = Instant::now() + SOON;
    while has_ipv6() && !(here.has_link_local(name).await && there.has_link_local(peer).await) {
        assert!(Instant::now() < end, "no link-local addresses");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether the host's kernel supports IPv6.
pub fn has_ipv6() -> bool {
    std::fs::exists("/proc/thread-self/net/if_inet6").unwrap()
}

/// Waits until the monitor reports a change.
pub async fn changed(monitor: &Monitor) -> Result<()> {
    tokio::time::timeout(SOON, monitor.changed())
        .await
        .expect("no change was noticed")
}

/// Consumes all changes so far.
pub async fn drain(monitor: &Monitor) {
    while let Ok(changed) = tokio::time::timeout(NEVER, monitor.changed()).await {
        changed.unwrap();
    }
}

/// A broadcast Ethernet frame with this type and content, padded to the minimum length.
pub fn frame(kind: &[u8], content: &str) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x02, 0, 0, 0, 0, 0x55]);
    frame.extend(kind);
    frame.extend(content.as_bytes());
    frame.resize(frame.len().max(60), 0);
    frame
}

/// Writes a frame to a tap.
pub fn write(tap: &OwnedFd, frame: &[u8]) {
    let mut packet = vec![0; HEADER_LENGTH];
    packet.extend(frame);
    assert_eq!(rustix::io::write(tap, &packet).unwrap(), packet.len());
}

/// Whether a tap receives this frame within the time. Ignores others.
pub fn read(tap: &OwnedFd, frame: &[u8], within: Duration) -> bool {
    receive(tap, within, |packet| {
        packet.get(HEADER_LENGTH..) == Some(frame)
    })
}

/// Whether a packet socket receives this frame within the time. Ignores others.
pub fn hear(socket: &OwnedFd, frame: &[u8], within: Duration) -> bool {
    receive(socket, within, |packet| packet == frame)
}

/// Whether nothing is received within the time.
pub fn is_silent(from: &OwnedFd, within: Duration) -> bool {
    !receive(from, within, |_| true)
}

/// Sends a frame with a packet socket.
pub fn send(socket: &OwnedFd, frame: &[u8]) {
    assert_eq!(rustix::io::write(socket, frame).unwrap(), frame.len());
}

fn receive(from: &OwnedFd, within: Duration, wanted: impl Fn(&[u8]) -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        let mut polled = [PollFd::new(from, PollFlags::IN)];
        if poll(&mut polled, Some(&timeout)).unwrap() == 0 {
            return false;
        }
        let mut packet = [0; 4096];
        if let Ok(length) = rustix::io::read(from, &mut packet)
            && wanted(&packet[..length])
        {
            return true;
        }
    }
}

fn packet_socket(index: u32) -> OwnedFd {
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(every_protocol)) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: a fresh descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = every_protocol;
    address.sll_ifindex = index as i32;
    // SAFETY: `address` is whole, and its size is given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    socket
}
