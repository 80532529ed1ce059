//! Redirects connections to the namespace's own addresses: engines dial 127.0.0.1, and rootlesskit
//! the interface's address, in a pod's network namespace, but the servers listen in a guest. Called
//! by the sandbox process, which relays the connections to the guest.
//!
//! For each family a socket listens in the namespace, on a free port of 127.0.0.1 or ::1, and the
//! kernel redirects connections to *any* other port there, and at the addresses of the interfaces,
//! to it ([`crate::nftables`]); the kernel reports the original address. Other addresses of
//! 127.0.0.0/8 are left alone: dockerd has its name server on one. Only connections opened by
//! processes in the namespace are redirected, never packets that arrive through its interfaces.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::sync::{Mutex, PoisonError};
use std::task::Poll;

use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
use tokio::net::{TcpListener, TcpStream};

use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::nftables::loopback::Rules;

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Of 127.0.0.1
    V4,
    /// Of ::1
    V6,
}

impl Family {
    /// Its loopback address.
    pub fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// `NFPROTO_*` of linux/netfilter.h, which are the address families.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }
}

/// Receives connections to the addresses of a namespace for as long as this lives.
#[derive(Debug)]
pub struct Redirect {
    // Before the listeners, so that nothing is redirected to a port without a listener.
    rules: Mutex<Option<Rules>>,
    listeners: Vec<Listener>,
}

#[derive(Debug)]
struct Listener {
    family: Family,
    port: u16,
    socket: TcpListener,
}

/// A connection that was opened to an address of the namespace.
#[derive(Debug)]
pub struct Accepted {
    /// Our end of the connection.
    pub stream: TcpStream,
    /// What it was opened to.
    pub to: SocketAddr,
}

impl Redirect {
    /// Starts to redirect connections, of IPv6 too where there is IPv6.
    ///
    /// # Errors
    /// `Loopback` if the rules or the socket for 127.0.0.1 cannot be created; `Enter` if the
    /// namespace cannot be entered.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let failed = |(family, why): (Family, io::Error)| Error::Loopback {
            address: family.loopback(),
            why,
        };
        let open = || {
            let mut rules = Rules::new().map_err(|why| (Family::V4, why))?;
            let first = listen(&mut rules, Family::V4).map_err(|why| (Family::V4, why))?;
            let mut sockets = vec![(Family::V4, first)];
            match listen(&mut rules, Family::V6) {
                Ok(second) => sockets.push((Family::V6, second)),
                Err(error) => tracing::debug!("connections to ::1 are not redirected: {error}"),
            }
            Ok((rules, sockets))
        };
        let (rules, sockets) = namespace.run_in(open)?.map_err(failed)?;
        let listener = |(family, (socket, port))| {
            let socket = TcpListener::from_std(socket).map_err(|why| failed((family, why)))?;
            Ok(Listener {
                family,
                port,
                socket,
            })
        };
        let listeners = sockets.into_iter().map(listener).collect::<Result<_>>()?;
        Ok(Self {
            rules: Mutex::new(Some(rules)),
            listeners,
        })
    }

    /// The ports that connections are redirected to.
    pub fn ports(&self) -> Vec<u16> {
        let ports = self.listeners.iter().map(|listener| listener.port);
        ports.collect()
    }

    /// Stops redirecting, in a process that is about to end. Dropping does the same, but waits
    /// until the kernel has freed the rules, 10 ms and more: here this is left to the end of the
    /// process.
    pub fn end(&self) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mut rules) = rules.take() {
            rules.delete();
            // Closing its socket is what waits.
            std::mem::forget(rules);
        }
    }

    /// The next connection. May be dropped while it waits; one task at a time may wait.
    pub async fn accept(&self) -> io::Result<Accepted> {
        loop {
            let (listener, accepted) = poll_fn(|context| {
                for listener in &self.listeners {
                    if let Poll::Ready(accepted) = listener.socket.poll_accept(context) {
                        return Poll::Ready((listener, accepted));
                    }
                }
                Poll::Pending
            })
            .await;
            let (stream, _) = accepted?;
            let to = match listener.family {
                Family::V4 => ip_original_dst(&stream).map(SocketAddr::from),
                Family::V6 => ipv6_original_dst(&stream).map(SocketAddr::from),
            };
            match to {
                Ok(to) if to.port() != listener.port => return Ok(Accepted { stream, to }),
                // The client connected to our own port, or has disconnected.
                _ => {}
            }
        }
    }
}

/// A listening socket in the calling thread's namespace with its redirection, and its port.
fn listen(rules: &mut Rules, family: Family) -> io::Result<(StdListener, u16)> {
    let listener = StdListener::bind((family.loopback(), 0))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    rules.redirect(family, port)?;
    Ok((listener, port))
}
