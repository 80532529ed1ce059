//! The connection to a server at one of the guest's addresses that a forwarded one leads to. Called
//! by `Loopback`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect as begin, socket_with};
use tokio::time::timeout;

use super::connection;
use crate::io::vsock::Connection;

/// Time limit for connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to a server. For 127.0.0.1 and ::1 the other one is tried if nothing listens.
pub async fn connect(to: SocketAddr) -> io::Result<Connection> {
    let other = match to.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(IpAddr::from(Ipv6Addr::LOCALHOST)),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(IpAddr::from(Ipv4Addr::LOCALHOST)),
        _ => None,
    };
    let dialled = timeout(CONNECT_TIMEOUT, async {
        match (dial(to).await, other) {
            // The first error is the one to report.
            (Err(error), Some(other)) => dial((other, to.port()).into()).await.map_err(|_| error),
            (dialled, _) => dialled,
        }
    });
    dialled
        .await
        .unwrap_or_else(|_elapsed| Err(Errno::TIMEDOUT.into()))
}

async fn dial(address: SocketAddr) -> io::Result<Connection> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if !address.ip().is_loopback() {
        // Refuses an address that is not the guest's own: the connection would leave it.
        bind(&socket, &SocketAddr::new(address.ip(), 0))?;
    }
    match begin(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(error) => return Err(error.into()),
    }
    let socket = connection(socket)?;
    socket.established().await?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::TcpListener;

    use super::*;

    fn run<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { timeout(Duration::from_secs(20), test).await.unwrap() })
    }

    fn at_loopback(port: u16, ipv6: bool) -> SocketAddr {
        match ipv6 {
            false => (Ipv4Addr::LOCALHOST, port).into(),
            true => (Ipv6Addr::LOCALHOST, port).into(),
        }
    }

    /// Connects to the port of `server`.
    async fn reach(server: &TcpListener, ipv6: bool) -> io::Result<Connection> {
        connect(at_loopback(server.local_addr().unwrap().port(), ipv6)).await
    }

    #[test]
    fn a_server_is_reached_on_either_address() {
        run(async {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            reach(&server, false).await.unwrap();
            reach(&server, true).await.unwrap();
            if let Ok(server) = TcpListener::bind("[::1]:0") {
                reach(&server, false).await.unwrap();
                reach(&server, true).await.unwrap();
            }
            let port = server.local_addr().unwrap().port();
            drop(server);
            let error = connect(at_loopback(port, false)).await.err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        });
    }

    #[test]
    fn an_address_that_is_not_the_guests_own_is_not_dialled() {
        run(async {
            // TEST-NET-1
            let error = connect(([192, 0, 2, 1], 80).into()).await.err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        });
    }
}
