//! One connection that is forwarded: to a server at one of the guest's addresses, and both ways
//! from then on. Called by `Loopback`. Bounded in memory, and in time once one side has ended.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect as begin, socket_with};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::time::timeout;

use super::connection;
use crate::io::vsock::Connection;

/// Time limit for connecting to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may be idle once one direction has ended.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(300);

/// Largest piece moved at once.
const PIECE: usize = 16 * 1024;

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

/// Relays both directions until both have ended, or one has failed.
pub async fn carry(one: Connection, other: Connection) {
    let (from_one, to_one) = split(one);
    let (from_other, to_other) = split(other);
    let half = AtomicBool::new(false);
    // A failure is for the peers: they see a connection that ends.
    let _ = tokio::try_join!(
        pass(from_one, to_other, &half),
        pass(from_other, to_one, &half)
    );
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    half: &AtomicBool,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let length = moving(from.read(&mut piece), half).await?;
        if length == 0 {
            break;
        }
        moving(to.write_all(&piece[..length]), half).await?;
    }
    half.store(true, Ordering::Relaxed);
    to.shutdown().await
}

/// Waits for a step: without limit while both directions are open.
async fn moving<T>(step: impl Future<Output = io::Result<T>>, half: &AtomicBool) -> io::Result<T> {
    let mut step = pin!(step);
    loop {
        match timeout(HALF_CLOSED_TIMEOUT, step.as_mut()).await {
            Ok(done) => return done,
            Err(_elapsed) if half.load(Ordering::Relaxed) => return Err(Errno::TIMEDOUT.into()),
            Err(_elapsed) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;

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

    #[test]
    fn both_ways_are_carried_and_each_ends_by_itself() {
        const LENGTH: usize = 1 << 20;
        run(async {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let (ours, mut host) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let reached = reach(&server, false).await.unwrap();
            let carrier = tokio::spawn(carry(connection(ours.into()).unwrap(), reached));
            let serving = std::thread::spawn(move || {
                let (mut stream, _) = server.accept().unwrap();
                let mut question = Vec::new();
                stream.read_to_end(&mut question).unwrap();
                assert_eq!(question.len(), LENGTH);
                stream.write_all(&question).unwrap();
            });
            let asking = std::thread::spawn(move || {
                let question: Vec<u8> = (0..=250u8).cycle().take(LENGTH).collect();
                host.write_all(&question).unwrap();
                host.shutdown(Shutdown::Write).unwrap();
                let mut answer = Vec::new();
                host.read_to_end(&mut answer).unwrap();
                assert!(answer == question);
            });
            carrier.await.unwrap();
            serving.join().unwrap();
            asking.join().unwrap();
        });
    }

    #[test]
    fn who_goes_away_takes_the_other_along() {
        run(async {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let (ours, host) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let reached = reach(&server, false).await.unwrap();
            let carrier = tokio::spawn(carry(connection(ours.into()).unwrap(), reached));
            let (mut stream, _) = server.accept().unwrap();
            drop(host);
            let talking = std::thread::spawn(move || {
                // Until writing fails because the reader is gone.
                while stream.write_all(&[0; 4096]).is_ok() {}
            });
            carrier.await.unwrap();
            talking.join().unwrap();
        });
    }
}
