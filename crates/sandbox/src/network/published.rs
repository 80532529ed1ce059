//! Published ports at the host's IPv6 loopback address. Packet filters cannot lead there what comes
//! from ::1: it has no other address to come from. So the sandbox process takes connections and
//! datagrams itself, with the sockets that hold the ports, and carries them to the container's
//! address, as Docker's proxy does.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::net::{TcpListener as StdTcpListener, UdpSocket as StdUdpSocket};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hull_network::cni::{PortMapping, Protocol};
use rustix::net::sockopt::{set_socket_linger, socket_type};
use rustix::net::{SocketType, getsockname, listen};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// Connections of one port at a time; further ones wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 256;

/// Peers of one port at a time that send datagrams; what others send is dropped.
const MOST_PEERS: usize = 256;

/// After this time without datagrams a peer is forgotten.
const PEER_TIMEOUT: Duration = Duration::from_secs(90);

/// How long the container has to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

const LONGEST_DATAGRAM: usize = 65_535;

/// The sockets of published ports, of which some are served. Ends with [`Published::end`].
#[derive(Debug, Default)]
pub struct Published {
    /// On which nothing is received.
    held: Vec<OwnedFd>,
    served: Vec<JoinHandle<()>>,
}

impl Published {
    /// Serves those of these sockets to which connections to ::1 come. The others, and those that
    /// cannot be served, keep their ports from others.
    pub fn new(sockets: Vec<OwnedFd>, mappings: &[PortMapping], container: &[IpAddr]) -> Self {
        let mut published = Self {
            held: sockets,
            served: Vec::new(),
        };
        published.serve(mappings, container);
        published
    }

    fn serve(&mut self, mappings: &[PortMapping], container: &[IpAddr]) {
        for socket in &self.held {
            let task = match target(socket, mappings, container) {
                Some((protocol, to)) => serve(socket, protocol, to),
                None => Ok(None),
            };
            match task {
                Ok(Some(task)) => self.served.push(task),
                Ok(None) => {}
                Err(error) => tracing::warn!("a published port is not served at ::1: {error}"),
            }
        }
    }

    /// Serves the ports from now on by other addresses of the container; without any, connections
    /// are reset.
    pub async fn lead_to(&mut self, mappings: &[PortMapping], container: &[IpAddr]) {
        self.end_serving().await;
        self.serve(mappings, container);
    }

    async fn end_serving(&mut self) {
        for task in std::mem::take(&mut self.served) {
            task.abort();
            // It was aborted.
            let _ = task.await;
        }
    }

    /// Lets go of the ports.
    pub async fn end(mut self) {
        self.end_serving().await;
        drop(self.held);
    }
}

/// The protocol of a socket to which connections to ::1 come, and where they lead: addresses of the
/// container, those first on which most programs listen.
fn target(
    socket: &OwnedFd,
    mappings: &[PortMapping],
    container: &[IpAddr],
) -> Option<(Protocol, Vec<SocketAddr>)> {
    let local = SocketAddr::try_from(getsockname(socket).ok()?).ok()?;
    let takes_loopback = |ip: IpAddr| {
        ip == IpAddr::V6(Ipv6Addr::UNSPECIFIED) || ip == IpAddr::V6(Ipv6Addr::LOCALHOST)
    };
    if !takes_loopback(local.ip()) {
        return None;
    }
    let protocol = match socket_type(socket).ok()? {
        SocketType::STREAM => Protocol::Tcp,
        SocketType::DGRAM => Protocol::Udp,
        _ => return None,
    };
    let mapping = mappings.iter().find(|mapping| {
        mapping.host_port == local.port()
            && mapping.protocol == protocol
            && mapping.host_ip.is_none_or(takes_loopback)
    })?;
    let mut to: Vec<SocketAddr> = container
        .iter()
        .map(|address| SocketAddr::new(*address, mapping.container_port))
        .collect();
    to.sort_by_key(SocketAddr::is_ipv6);
    Some((protocol, to))
}

fn serve(
    socket: &OwnedFd,
    protocol: Protocol,
    to: Vec<SocketAddr>,
) -> io::Result<Option<JoinHandle<()>>> {
    let socket = socket.try_clone()?;
    match protocol {
        Protocol::Tcp => {
            listen(&socket, 128)?;
            let listener = StdTcpListener::from(socket);
            listener.set_nonblocking(true)?;
            let listener = TcpListener::from_std(listener)?;
            Ok(Some(tokio::spawn(accept(listener, to.into()))))
        }
        Protocol::Udp => {
            let socket = StdUdpSocket::from(socket);
            socket.set_nonblocking(true)?;
            let socket = UdpSocket::from_std(socket)?;
            let to = to.first().copied();
            Ok(to.map(|to| tokio::spawn(receive(Arc::new(socket), to))))
        }
        Protocol::Sctp => Ok(None),
    }
}

async fn accept(listener: TcpListener, to: Arc<[SocketAddr]>) {
    // Dropped with this task: connections end when the port is published no more.
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= MOST_CONNECTIONS {
            // A connection has no result.
            let _ = connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            // At other addresses of the host it would have been led elsewhere.
            Ok((stream, peer)) if !peer.ip().is_loopback() => reset(&stream),
            Ok((stream, _)) => {
                connections.spawn(carry(stream, to.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: others go away, so it passes.
                tracing::warn!("a connection to ::1 was not taken: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(mut stream: TcpStream, to: Arc<[SocketAddr]>) {
    let mut reached = None;
    for address in &*to {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(connected)) => {
                reached = Some(connected);
                break;
            }
            Ok(Err(error)) => tracing::debug!("{address}: {error}"),
            Err(_) => tracing::debug!("{address} does not answer"),
        }
    }
    let Some(mut container) = reached else {
        return reset(&stream);
    };
    // Small messages do not wait for each other.
    let _ = (stream.set_nodelay(true), container.set_nodelay(true));
    if let Err(error) = tokio::io::copy_bidirectional(&mut stream, &mut container).await {
        tracing::debug!("a connection to ::1 ended: {error}");
        reset(&stream);
        reset(&container);
    }
}

/// A connection that is closed as a server does that is not there.
fn reset(stream: &TcpStream) {
    // At worst it is closed in the usual way.
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
}

/// A socket for each peer, by which the container's answers find back.
type Peers = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

async fn receive(socket: Arc<UdpSocket>, to: SocketAddr) {
    let peers = Peers::default();
    let mut answers = JoinSet::new();
    let mut datagram = vec![0; LONGEST_DATAGRAM];
    loop {
        while answers.try_join_next().is_some() {}
        let (length, peer) = match socket.recv_from(&mut datagram).await {
            Ok((length, peer)) if peer.ip().is_loopback() => (length, peer),
            Ok(_) => continue,
            // An earlier datagram was not taken by its receiver.
            Err(error) => {
                tracing::debug!("a datagram to ::1: {error}");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let known = lock(&peers).get(&peer).cloned();
        let connected = match known {
            Some(known) => known,
            None if answers.len() >= MOST_PEERS => continue,
            None => match connect(to).await {
                Ok(new) => {
                    let new = Arc::new(new);
                    lock(&peers).insert(peer, new.clone());
                    answers.spawn(answer(socket.clone(), new.clone(), peer, peers.clone()));
                    new
                }
                Err(error) => {
                    tracing::debug!("a datagram to ::1: {error}");
                    continue;
                }
            },
        };
        // Lost as any datagram may be.
        let _ = connected.send(&datagram[..length]).await;
    }
}

async fn connect(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match to {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(to).await?;
    Ok(socket)
}

/// Carries what the container answers to a peer, until it is silent.
async fn answer(socket: Arc<UdpSocket>, from: Arc<UdpSocket>, peer: SocketAddr, peers: Peers) {
    let mut datagram = vec![0; LONGEST_DATAGRAM];
    while let Ok(received) = timeout(PEER_TIMEOUT, from.recv(&mut datagram)).await {
        match received {
            Ok(length) => {
                // Lost as any datagram may be.
                let _ = socket.send_to(&datagram[..length], peer).await;
            }
            // Nobody listens in the container.
            Err(error) => {
                tracing::debug!("an answer for {peer}: {error}");
                break;
            }
        }
    }
    lock(&peers).remove(&peer);
}

fn lock(
    peers: &Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>,
) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, Arc<UdpSocket>>> {
    // A map is valid at any time.
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::net::TcpStream as StdTcpStream;

    use super::*;

    fn mapping(host_port: u16, container_port: u16, protocol: Protocol) -> PortMapping {
        PortMapping {
            host_ip: None,
            host_port,
            container_port,
            protocol,
        }
    }

    fn in_a_thread<T: Send + 'static>(
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> {
        let task = tokio::task::spawn_blocking(work);
        async { task.await.unwrap() }
    }

    #[tokio::test]
    async fn connections_and_datagrams_to_the_ipv6_loopback_address_reach_the_container() {
        let Ok(tcp) = StdTcpListener::bind((Ipv6Addr::LOCALHOST, 0)) else {
            return println!("left out: no IPv6");
        };
        let udp = StdUdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let other = StdUdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let (tcp_at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        let container_tcp = StdTcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let container_udp = StdUdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = container_tcp.local_addr().unwrap().port();
        let mappings = [
            mapping(tcp_at.port(), port, Protocol::Tcp),
            mapping(
                udp_at.port(),
                container_udp.local_addr().unwrap().port(),
                Protocol::Udp,
            ),
        ];
        let sockets = vec![tcp.into(), udp.into(), other.into()];
        let addresses = [
            IpAddr::V6(Ipv6Addr::LOCALHOST),
            std::net::Ipv4Addr::LOCALHOST.into(),
        ];
        let published = Published::new(sockets, &mappings, &addresses);
        assert_eq!(published.served.len(), 2);

        let echo = in_a_thread(move || {
            let (mut stream, _) = container_tcp.accept().unwrap();
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            stream.write_all(&text).unwrap();
        });
        let said = in_a_thread(move || {
            let mut stream = StdTcpStream::connect(tcp_at).unwrap();
            stream.write_all(b"hello").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        });
        assert_eq!(said.await, "hello");
        echo.await;

        let echo = in_a_thread(move || {
            let mut text = [0; 100];
            for _ in 0..2 {
                let (length, peer) = container_udp.recv_from(&mut text).unwrap();
                container_udp.send_to(&text[..length], peer).unwrap();
            }
        });
        let said = in_a_thread(move || {
            let mut said = Vec::new();
            for text in ["one", "two"] {
                let socket = StdUdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
                socket.send_to(text.as_bytes(), udp_at).unwrap();
                let mut answer = [0; 100];
                let (length, from) = socket.recv_from(&mut answer).unwrap();
                assert_eq!(from, udp_at);
                said.push(String::from_utf8(answer[..length].to_vec()).unwrap());
            }
            said
        });
        assert_eq!(said.await, ["one", "two"]);
        echo.await;

        published.end().await;
        drop(StdTcpListener::bind(tcp_at).unwrap());
        StdUdpSocket::bind(udp_at).unwrap();
    }
}
