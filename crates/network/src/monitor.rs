//! Notifies of changes in a namespace: interfaces, addresses, routes or neighbours. Called by the
//! sandbox process, which then describes the namespace again and compares. Parses nothing and does
//! not report what changed, so lost notifications do not matter.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::sys;

/// Notifications read before [`Monitor::changed`] returns, even if there are more: the next call
/// reads those.
const AT_ONCE: usize = 4096;

/// Multicast groups of linux/rtnetlink.h: links, neighbours, addresses and routes of both families.
const GROUPS: u32 = (libc::RTMGRP_LINK
    | libc::RTMGRP_NEIGH
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV6_ROUTE) as u32;

/// Reports changes of a namespace since [`Monitor::open`]. Open it before describing the namespace.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<OwnedFd>,
}

impl Monitor {
    /// Starts watching.
    ///
    /// # Errors
    /// `Watch` if the socket cannot be opened; `Enter` if the namespace cannot be entered.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let socket = namespace.run_in(|| -> io::Result<OwnedFd> {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            // Protocol 0 is NETLINK_ROUTE.
            let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
            Ok(socket)
        })?;
        let socket = socket.and_then(sys::when_readable).map_err(Error::Watch)?;
        Ok(Self { socket })
    }

    /// Waits for a change since the last call. Several changes count as one.
    ///
    /// May be dropped while it waits, and called again.
    pub async fn changed(&self) -> Result<()> {
        loop {
            let mut ready = self.socket.readable().await.map_err(Error::Watch)?;
            let mut changed = false;
            for _ in 0..AT_ONCE {
                // The rest of the message is cut off: it is not needed.
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
