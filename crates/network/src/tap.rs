//! Taps: interfaces of a namespace whose other end is a descriptor, for the device process. Called
//! by the sandbox process.
//!
//! A tap is not persistent: it goes away when its descriptor is closed everywhere, so it cannot
//! leak when processes are killed. Only the guest sends on it: the tap has no address, not even a
//! link-local one.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, open};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::description::Interface;
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::netlink::Netlink;
use crate::sys;

/// Prefix of tap names. An interface of this name and of kind `tun` is one of ours.
pub(crate) const PREFIX: &str = "hulltap";

/// Length of the `struct virtio_net_hdr_mrg_rxbuf` before each packet.
pub const HEADER_LENGTH: usize = 12;

/// The largest MTU that the tun driver takes: 65,535 bytes with an Ethernet header.
const MAX_MTU: u32 = 65_535 - 14;

/// `step` of [`Error::Tap`] when the tun driver is missing.
pub(crate) const OPEN: &str = "open /dev/net/tun";

/// Options for creating a tap.
#[derive(Debug, Clone)]
pub struct TapOptions {
    /// User that owns the tap: that of the device process.
    pub owner: Option<u32>,
    /// Group of the tap.
    pub group: Option<u32>,
    /// Packets that wait for the device process before the kernel drops some.
    pub queue_length: u32,
}

impl Default for TapOptions {
    fn default() -> Self {
        Self {
            owner: None,
            group: None,
            queue_length: 1000,
        }
    }
}

/// A tap, up, with one queue. Each packet has [`HEADER_LENGTH`] bytes of virtio header, little
/// endian, before it. Offloads are off until the device process sets them (TUNSETOFFLOAD needs no
/// capability).
#[derive(Debug)]
pub struct Tap {
    /// Read and written by the device process; does not block. The tap lasts as long as this is
    /// open somewhere.
    pub fd: OwnedFd,
    /// Its name in the namespace.
    pub name: String,
    /// Its index in the namespace.
    pub index: u32,
}

impl Tap {
    /// Creates a tap for `interface`, with its MTU, in `namespace`, to which `netlink` belongs.
    pub async fn create(
        namespace: &Namespace,
        netlink: &Netlink,
        interface: &Interface,
        options: &TapOptions,
    ) -> Result<Self> {
        let failed = |(step, why): (&'static str, io::Error)| Error::Tap {
            interface: interface.name.clone(),
            step,
            why,
        };
        let tap = namespace.run_in(|| make(options))?.map_err(failed)?;
        netlink
            .prepare_tap(tap.index, interface.mtu.min(MAX_MTU), options.queue_length)
            .await
            .map_err(|why| failed(("set it up", why)))?;
        Ok(tap)
    }
}

/// Sets a tap's MTU to that of its interface, which has changed.
pub async fn set_mtu(netlink: &Netlink, tap: u32, interface: &Interface) -> Result<()> {
    netlink
        .set_mtu(tap, interface.mtu.min(MAX_MTU))
        .await
        .map_err(|why| Error::Set {
            what: "MTU of the tap",
            interface: interface.name.clone(),
            why,
        })
}

/// Creates a tap in the namespace of the calling thread. It is down, and removed on failure.
fn make(options: &TapOptions) -> Result<Tap, (&'static str, io::Error)> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| (OPEN, errno.into()))?;
    // The kernel chooses the number.
    let name = sys::become_tap(&fd, &format!("{PREFIX}%d")).map_err(|why| ("TUNSETIFF", why))?;
    sys::set_header(&fd, HEADER_LENGTH as i32).map_err(|why| ("TUNSETVNETHDRSZ", why))?;
    if let Some(owner) = options.owner {
        sys::set_owner(&fd, owner).map_err(|why| ("TUNSETOWNER", why))?;
    }
    if let Some(group) = options.group {
        sys::set_group(&fd, group).map_err(|why| ("TUNSETGROUP", why))?;
    }
    let index = index_of(&name).map_err(|why| ("find it by its name", why))?;
    Ok(Tap { fd, name, index })
}

fn index_of(name: &str) -> io::Result<u32> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    Ok(name_to_index(socket, name)?)
}
