//! Connections of the guest's processes to sockets of the host: see Sockets of the host in
//! `agent.proto`. Called by `rpc::service`, which holds one [`HostSockets`].
//!
//! The guest's kernel (patch `unix-host-sockets`) hands each connection to a socket in a share to
//! whoever listens at [`LISTENER`], with the number of the socket's node in the fs device, and
//! connect(2) returns with the answer from here. Nothing listens before there is a container whose
//! shares have such sockets.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hull_protocol::{
    HOST_CID, MAX_HOST_CONNECTIONS, MAX_SOCKET_REQUESTS, SOCKET_TIMEOUT, SOCKETS_PORT,
    SocketAnswer, SocketRequest,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::io::carry::{HalfClosed, carry};
use crate::io::reactor;
use crate::io::streams::Streams;
use crate::io::vsock::{self, Connection};
use crate::rpc::status::{Failure, Result};

/// Where the kernel looks for the listener (`UNIX_HOST_LISTENER`, net/unix/af_unix.c as patched).
const LISTENER: &str = "/run/host-sockets";

/// Connections that wait to be accepted; further ones wait in connect(2).
const BACKLOG: i32 = 128;

/// How often a server is tried again whose queue is full.
const QUEUE_INTERVAL: Duration = Duration::from_millis(50);

/// `SO_PASSRIGHTS` (asm-generic/socket.h).
const PASS_RIGHTS: libc::c_int = 83;

/// `SIOCUNIXHOSTSOCKET` and `SIOCUNIXHOSTANSWER` (linux/un.h as patched): from
/// `SIOCPROTOPRIVATE`, 0x89e0.
const HOST_SOCKET: u64 = 0x89e1;
const HOST_ANSWER: u64 = 0x89e2;

/// See the module. One per guest.
#[derive(Default)]
pub struct HostSockets {
    listening: AtomicBool,
}

impl HostSockets {
    /// Takes connections from now on.
    pub fn listen(&self, streams: &Arc<Streams>) -> Result<()> {
        if self.listening.load(Ordering::Relaxed) {
            return Ok(());
        }
        let failed = |error| Failure::internal("listen for connections to the host", &error);
        let listener = listener(Path::new(LISTENER)).map_err(failed)?;
        tokio::spawn(accept(listener, streams.clone()));
        self.listening.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn listener(path: &Path) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    // Left by an attempt that failed.
    let _ = std::fs::remove_file(path);
    // Descriptors are refused where they are sent (EPERM): they mean nothing to the host.
    refuse_descriptors(socket.as_fd())?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    reactor::watch(socket, Interest::READABLE)
}

/// Connections of this listener take no descriptors.
fn refuse_descriptors(listener: BorrowedFd<'_>) -> io::Result<()> {
    let none: libc::c_int = 0;
    // SAFETY: the value lives across the call, and its size is given.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            PASS_RIGHTS,
            (&raw const none).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Before Linux 6.16, which only tests run on: descriptors are discarded.
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
            error => Err(error),
        },
    }
}

async fn accept(listener: AsyncFd<OwnedFd>, streams: Arc<Streams>) {
    let places = Arc::new(Semaphore::new(MAX_HOST_CONNECTIONS));
    let turns = Arc::new(Semaphore::new(MAX_SOCKET_REQUESTS));
    loop {
        // A semaphore that nobody closes. Further connections wait in the kernel's queue.
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let client = match accept_one(&listener).await {
            Ok(client) => client,
            Err(error) => {
                crate::log::error!("cannot take a connection to a socket of the host: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (streams, turns) = (streams.clone(), turns.clone());
        tokio::spawn(async move {
            serve(client, &streams, &turns).await;
            drop(place);
        });
    }
}

async fn accept_one(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut guard = listener.readable().await?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match rustix::net::accept_with(listener.get_ref(), flags) {
            Err(Errno::AGAIN) => guard.clear_ready(),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            accepted => return Ok(accepted?),
        }
    }
}

/// Connects a client with the host's socket, and relays until both have ended.
async fn serve(client: OwnedFd, streams: &Streams, turns: &Semaphore) {
    let reached = reach(client.as_fd(), streams, turns).await;
    // Where it fails, nobody waits for the answer any more.
    if answer(client.as_fd(), reached.as_ref().err().copied()).is_ok()
        && let Ok(host) = reached
        && let Ok(client) = Connection::new(client, Arc::default())
    {
        carry(client, host, HalfClosed::HungUp).await;
    }
}

/// Has the host connect, again and again while the server's queue is full and the client waits for
/// that. The error, or the connection.
async fn reach(
    client: BorrowedFd<'_>,
    streams: &Streams,
    turns: &Semaphore,
) -> std::result::Result<Connection, Errno> {
    let (request, nonblock) = request(client)?;
    loop {
        let turn = turns.acquire().await;
        if vsock::hung_up(client) {
            return Err(Errno::INTR);
        }
        let asked = timeout(SOCKET_TIMEOUT, ask(&request)).await;
        drop(turn);
        let port = match asked.unwrap_or(Err(Errno::TIMEDOUT)) {
            Err(Errno::AGAIN) if !nonblock => {
                tokio::time::sleep(QUEUE_INTERVAL).await;
                continue;
            }
            asked => asked?,
        };
        let connected = streams.take(port).await;
        return connected
            .and_then(|stream| Connection::new(stream, Arc::default()))
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
}

/// Asks the host to connect. Its error, or the port that the stream comes from.
async fn ask(request: &SocketRequest) -> std::result::Result<u32, Errno> {
    let asked: io::Result<SocketAnswer> = async {
        let home = vsock::dial(HOST_CID, SOCKETS_PORT)?;
        let mut home = Connection::new(home, Arc::default())?;
        home.established().await?;
        home.write_all(&request.encode()).await?;
        let mut answer = [0; SocketAnswer::LENGTH];
        home.read_exact(&mut answer).await?;
        Ok(SocketAnswer::decode(answer))
    }
    .await;
    match asked {
        Ok(SocketAnswer::Connected(port)) => Ok(port),
        Ok(SocketAnswer::Refused(error)) => {
            // Any other value is none that connect(2) returns.
            let known = i32::try_from(error).ok();
            let known = known.filter(|error| (1..4096).contains(error));
            Err(known.map_or(Errno::IO, Errno::from_raw_os_error))
        }
        Err(error) => {
            crate::log::info!("the host does not connect with a socket: {error}");
            Err(Errno::CONNREFUSED)
        }
    }
}

/// `struct unix_host_socket` (linux/un.h as patched).
#[repr(C)]
#[derive(Default)]
struct HostSocket {
    inode: u64,
    nonblock: u32,
    reserved: u32,
}

/// Which socket a connection is meant for, and whose it is; and whether connect(2) must not wait
/// for room in a queue.
fn request(client: BorrowedFd<'_>) -> std::result::Result<(SocketRequest, bool), Errno> {
    let mut socket = HostSocket::default();
    ioctl(client, HOST_SOCKET, &raw mut socket)?;
    // Of who has called connect(2), in numbers of the guest's first user namespace, which are those
    // that files in shares have.
    let peer = rustix::net::sockopt::socket_peercred(client)?;
    let request = SocketRequest {
        node: socket.inode,
        uid: peer.uid.as_raw(),
        gid: peer.gid.as_raw(),
        groups: peer_groups(client)?,
    };
    Ok((request, socket.nonblock != 0))
}

/// Supplementary groups of who has called connect(2).
fn peer_groups(client: BorrowedFd<'_>) -> std::result::Result<Vec<u32>, Errno> {
    // NGROUPS_MAX (linux/limits.h) is 65536: the first call says how many there are.
    let mut groups = vec![0u32; SocketRequest::MAX_GROUPS];
    loop {
        let mut length = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `groups`, and `length`.
        let result = unsafe {
            libc::getsockopt(
                client.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<u32>();
        match result {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            _ => match io::Error::last_os_error().raw_os_error() {
                Some(libc::ERANGE) if count > groups.len() => groups.resize(count, 0),
                // The caller's credentials were not kept: it has no groups for the host.
                Some(libc::ENODATA) => return Ok(Vec::new()),
                other => return Err(Errno::from_raw_os_error(other.unwrap_or(libc::EIO))),
            },
        }
    }
}

/// Lets connect(2) return.
fn answer(client: BorrowedFd<'_>, error: Option<Errno>) -> std::result::Result<(), Errno> {
    let mut answer: libc::c_int = error.map_or(0, |error| -error.raw_os_error());
    ioctl(client, HOST_ANSWER, &raw mut answer)
}

fn ioctl<T>(
    socket: BorrowedFd<'_>,
    request: u64,
    argument: *mut T,
) -> std::result::Result<(), Errno> {
    // SAFETY: both requests read or write one value of the size that `argument` points to, which
    // lives in the caller; the cast is to what the C library declares.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request as _, argument) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn groups_of_a_peer_are_its_own() {
        let (_one, other) = UnixStream::pair().unwrap();
        let mut ours: Vec<u32> = rustix::process::getgroups()
            .unwrap()
            .into_iter()
            .map(|group| group.as_raw())
            .collect();
        let mut groups = peer_groups(other.as_fd()).unwrap();
        ours.sort_unstable();
        groups.sort_unstable();
        assert_eq!(groups, ours);
    }

    #[test]
    fn only_connections_from_the_patched_kernel_are_answered() {
        let (_one, other) = UnixStream::pair().unwrap();
        assert!(request(other.as_fd()).is_err());
        assert!(answer(other.as_fd(), None).is_err());
    }

    #[test]
    fn a_listener_takes_the_place_of_an_earlier_attempt() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("listener");
            drop(listener(&path).unwrap());
            let listening = listener(&path).unwrap();
            let _client = UnixStream::connect(&path).unwrap();
            accept_one(&listening).await.unwrap();
        });
    }
}
