//! Tells that something changed in a namespace: interfaces, addresses, routes or neighbours. Called
//! by the sandbox process, which then describes the namespace anew and compares. Never says what
//! changed, and parses nothing: who looks afterwards sees everything, also what was lost because
//! too much happened at once.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::sys;

/// Notifications read before [`Monitor::changed`] answers, even when there are more: the next call
/// has these.
const AT_ONCE: usize = 4096;

/// Multicast groups of linux/rtnetlink.h: links, neighbours, addresses and routes of both families.
const GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_NEIGH
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE) as u32;

/// Sees changes of a namespace from the moment it is opened on. So it is opened before the
/// namespace is described.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<OwnedFd>,
}

impl Monitor {
    /// Begins to watch.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let socket = namespace.run_in(|| -> io::Result<OwnedFd> {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            // No protocol is NETLINK_ROUTE.
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
            Ok(socket)
        })?;
        let socket = socket.and_then(sys::when_readable).map_err(Error::Watch)?;
        Ok(Self { socket })
    }

    /// Waits for a change, if there was none since the last call. Any number of changes is one.
    ///
    /// May be dropped while it waits, and called again.
    pub async fn changed(&self) -> Result<()> {
        loop {
            let mut ready = self.socket.readable().await.map_err(Error::Watch)?;
            let mut changed = false;
            for _ in 0..AT_ONCE {
                // What does not fit is cut off: nobody reads it.
                let received = ready
                    .try_io(|socket| Ok(recv(socket, &mut [0; 16], RecvFlags::empty()).map(drop)?));
                match received.map(|received| received.map_err(|error| error.raw_os_error())) {
                    Ok(Ok(())) => changed = true,
                    // Notifications were lost.
                    Ok(Err(Some(libc::ENOBUFS))) => changed = true,
                    Ok(Err(Some(libc::EINTR))) => {}
                    Ok(Err(errno)) => {
                        let errno = errno.unwrap_or(Errno::IO.raw_os_error());
                        return Err(Error::Watch(io::Error::from_raw_os_error(errno)));
                    }
                    Err(_would_block) => break,
                }
            }
            if changed {
                return Ok(());
            }
        }
    }
}
