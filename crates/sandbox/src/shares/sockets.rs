//! Sockets of the host that containers mount: connections of the guest to them. What the guest and
//! the agent do is in `agent.proto`, under Sockets of the host.
//!
//! Only what was mounted itself can be connected to, not what happens to be in a directory that is
//! shared: a mount of `/` or `/run` must not lead to every server of the host. Who connects is, to
//! the server and to the socket's permissions, the user that the guest names, as with a process on
//! the host. Bytes go between guest and server without this process: the connection is handed to
//! the vsock device.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use hull_protocol::{
    MAX_SOCKET_REQUESTS, SOCKET_TIMEOUT, STREAM_PORT, SocketAnswer, SocketRequest,
};
use rustix::fs::{AtFlags, FileType, StatxFlags, makedev, statx};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{DumpableBehavior, Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use crate::guest::{Devices, Incoming};
use crate::sandbox::Sandbox;

/// A file: device and inode.
type Identity = (u64, u64);

/// The sockets among a sandbox's shares, by the name of the share, each with its mount: as long as
/// that is open, no other file gets its number.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<BTreeMap<String, (Identity, OwnedFd)>>);

impl Sockets {
    /// Remembers a share if it is a socket.
    pub fn add(&self, share: &str, mount: &OwnedFd) -> io::Result<()> {
        if let Some(socket) = identity(mount)? {
            let mount = mount.try_clone()?;
            self.lock().insert(share.to_owned(), (socket, mount));
        }
        Ok(())
    }

    /// Forgets shares.
    pub fn remove(&self, shares: &[String]) {
        self.lock().retain(|share, _| !shares.contains(share));
    }

    /// Whether any of these shares is a socket.
    pub fn are_among(&self, shares: &[String]) -> bool {
        let sockets = self.lock();
        shares.iter().any(|share| sockets.contains_key(share))
    }

    fn has(&self, socket: &Identity) -> bool {
        self.lock().values().any(|(known, _)| known == socket)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Identity, OwnedFd)>> {
        // A map is valid at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which socket a file is; `None` if it is none. Does not ask a file system that is elsewhere.
fn identity(file: &OwnedFd) -> rustix::io::Result<Option<Identity>> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(file, c"", flags, StatxFlags::TYPE | StatxFlags::INO)?;
    let device = makedev(stat.stx_dev_major, stat.stx_dev_minor);
    let socket = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::Socket;
    Ok(socket.then_some((device, stat.stx_ino)))
}

/// Answers the guest's requests as long as its device process runs.
pub(crate) async fn serve(sandbox: Sandbox, mut incoming: Incoming) {
    let turns = Arc::new(Semaphore::new(MAX_SOCKET_REQUESTS));
    // The kernel takes it away with each change of a thread's user.
    let dumpable = rustix::process::dumpable_behavior() == Ok(DumpableBehavior::Dumpable);
    while let Some(stream) = incoming.recv().await {
        // A semaphore that nobody closes. Further requests wait, and then are refused.
        let Ok(turn) = turns.clone().acquire_owned().await else {
            return;
        };
        let asked = Asked {
            sandbox: sandbox.clone(),
            dumpable,
            turn,
        };
        tokio::spawn(async move {
            match timeout(SOCKET_TIMEOUT, asked.answer(stream)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!("a request for a socket of the host: {error}"),
                Err(_elapsed) => tracing::debug!("a request for a socket of the host: timed out"),
            }
        });
    }
}

/// A request of the guest.
struct Asked {
    sandbox: Sandbox,
    /// Whether this process is.
    dumpable: bool,
    turn: OwnedSemaphorePermit,
}

impl Asked {
    async fn answer(self, stream: OwnedFd) -> io::Result<()> {
        let stream = StdStream::from(stream);
        stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(stream)?;
        let mut head = [0; SocketRequest::HEAD];
        stream.read_exact(&mut head).await?;
        let (mut request, groups) =
            SocketRequest::decode(head).ok_or(io::ErrorKind::InvalidData)?;
        let mut bytes = vec![0; 4 * groups];
        stream.read_exact(&mut bytes).await?;
        request.groups = SocketRequest::numbers(&bytes).collect();
        let answer = match self.connected(request).await {
            Ok(port) => SocketAnswer::Connected(port),
            Err(error) => SocketAnswer::Refused(error.raw_os_error().unsigned_abs()),
        };
        stream.write_all(&answer.encode()).await
    }

    /// Connects to a socket of the host; the host's port of the stream in the guest.
    async fn connected(self, request: SocketRequest) -> Result<u32, Errno> {
        let sandbox = self.sandbox.clone();
        let devices: &Devices = &sandbox.0.devices;
        let refused = |error| {
            tracing::debug!("{error}");
            Errno::CONNREFUSED
        };
        let file = devices.find_socket(request.node).await.map_err(refused)?;
        let user = (request.uid, request.gid);
        let socket = self.connect(file, request).await?;
        let stream = devices.lead_to(socket.as_fd(), user, STREAM_PORT).await;
        stream.map_err(refused)
    }

    /// Connects to a socket as the user of a request. `EAGAIN` if its queue is full.
    async fn connect(self, file: OwnedFd, request: SocketRequest) -> Result<OwnedFd, Errno> {
        let (sender, connected) = oneshot::channel();
        // A thread of its own: its user is not that of this process, and the file is on any file
        // system. It has its turn for as long as it is there.
        let connecting = move || {
            let _ = sender.send(self.connect_now(&file, &request));
        };
        thread::Builder::new()
            .name("host socket".into())
            .spawn(connecting)
            .map_err(errno)?;
        connected.await.unwrap_or(Err(Errno::IO))
    }

    fn connect_now(self, file: &OwnedFd, request: &SocketRequest) -> Result<OwnedFd, Errno> {
        // The device process may have been taken over by the guest.
        let known = identity(file)?.is_some_and(|socket| self.sandbox.0.sockets.has(&socket));
        if !known {
            tracing::info!(
                "refused a connection of the guest to a socket in a share: only sockets that are \
                 mounted themselves lead to the host"
            );
            return Err(Errno::CONNREFUSED);
        }
        let socket = connect_as(file, request);
        if self.dumpable {
            // The kernel has taken it from the whole process (commit_creds, kernel/cred.c), whose
            // files in /proc then are root's alone. That is for credentials by which others could
            // trace the thread: see `become_user`.
            rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        }
        drop(self.turn);
        socket
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

/// Connects to a socket, on the calling thread, whose user it changes. `EAGAIN` if its queue is
/// full.
fn connect_as(file: &OwnedFd, request: &SocketRequest) -> Result<OwnedFd, Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let address = SocketAddrUnix::new(Path::new(&path))?;
    become_user(request)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => Ok(socket),
        Err(Errno::INPROGRESS) => Err(Errno::AGAIN),
        Err(error) => Err(error),
    }
}

/// Gives the calling thread the effective user and groups of a request: what the kernel goes by,
/// and what the server sees. The real and saved users stay, by which others may signal or trace it.
fn become_user(request: &SocketRequest) -> Result<(), Errno> {
    let number = |id: u32| (id != u32::MAX).then_some(id).ok_or(Errno::ACCESS);
    let (uid, gid) = (
        Uid::from_raw(number(request.uid)?),
        Gid::from_raw(number(request.gid)?),
    );
    let groups = request
        .groups
        .iter()
        .map(|id| Ok(Gid::from_raw(number(*id)?)))
        .collect::<Result<Vec<_>, Errno>>()?;
    if (uid, gid) == (rustix::process::geteuid(), rustix::process::getegid())
        && rustix::process::getgroups()? == groups
    {
        return Ok(());
    }
    // Without the right to it, or a user that is not mapped: no user can be named.
    let denied = |_| Errno::ACCESS;
    set_thread_groups(&groups).map_err(denied)?;
    set_thread_res_gid(None, gid, None).map_err(denied)?;
    set_thread_res_uid(None, uid, None).map_err(denied)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read as _;
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::net::UnixListener;

    use rustix::fs::{Mode, OFlags, open};
    use rustix::net::sockopt::socket_peercred;
    use tempfile::TempDir;

    use super::*;

    fn listening() -> (TempDir, UnixListener, OwnedFd) {
        let directory = TempDir::new().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let file = open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        (directory, listener, file)
    }

    fn request(uid: u32, gid: u32, groups: &[u32]) -> SocketRequest {
        SocketRequest {
            node: 0,
            uid,
            gid,
            groups: groups.to_vec(),
        }
    }

    fn ours() -> SocketRequest {
        let groups = rustix::process::getgroups().unwrap();
        request(
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
            &groups
                .iter()
                .map(|group| group.as_raw())
                .collect::<Vec<_>>(),
        )
    }

    /// Connects on a thread that ends then.
    fn connect(file: &OwnedFd, request: &SocketRequest) -> Result<OwnedFd, Errno> {
        thread::scope(|scope| scope.spawn(|| connect_as(file, request)).join().unwrap())
    }

    #[test]
    fn a_server_is_reached_by_its_file_wherever_that_has_moved() {
        let (directory, listener, file) = listening();
        let path = directory.path().join("socket");
        std::fs::rename(&path, directory.path().join("moved")).unwrap();
        let socket = connect(&file, &ours()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        rustix::io::write(&socket, b"hello").unwrap();
        drop(socket);
        let mut text = String::new();
        server.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        drop(listener);
        assert_eq!(connect(&file, &ours()).unwrap_err(), Errno::CONNREFUSED);
    }

    #[test]
    fn a_server_sees_who_connects_and_its_permissions_count() {
        if !rustix::process::geteuid().is_root() {
            println!("left out: a_server_sees_who_connects…: not root");
            return;
        }
        let (directory, listener, file) = listening();
        let path = directory.path().join("socket");
        chown(&path, Some(0), Some(2000)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o660)).unwrap();
        for denied in [request(1000, 1000, &[]), request(u32::MAX, 0, &[])] {
            assert_eq!(connect(&file, &denied).unwrap_err(), Errno::ACCESS);
        }
        for allowed in [request(1000, 2000, &[]), request(1000, 1000, &[7, 2000])] {
            let _socket = connect(&file, &allowed).unwrap();
            let (server, _) = listener.accept().unwrap();
            let peer = socket_peercred(&server).unwrap();
            let seen = (peer.uid.as_raw(), peer.gid.as_raw());
            assert_eq!(seen, (allowed.uid, allowed.gid));
        }
        // This process is who it was.
        assert!(rustix::process::geteuid().is_root());
    }

    #[test]
    fn a_server_whose_queue_is_full_is_not_waited_for() {
        let (_directory, listener, file) = listening();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = connect(&file, &ours()).unwrap();
        assert_eq!(connect(&file, &ours()).unwrap_err(), Errno::AGAIN);
        drop(listener.accept().unwrap());
        connect(&file, &ours()).unwrap();
    }

    #[test]
    fn only_sockets_that_were_shared_are_known() {
        let ((_one, _, shared), (_other, _, file)) = (listening(), listening());
        let sockets = Sockets::default();
        sockets.add("c-x-0", &shared).unwrap();
        let directory = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        sockets.add("c-x-1", &directory).unwrap();
        let known = |file| sockets.has(&identity(file).unwrap().unwrap());
        assert!(known(&shared) && !known(&file));
        assert_eq!(identity(&directory).unwrap(), None);
        let (socket, other) = (["c-x-0".to_owned()], ["c-x-1".to_owned()]);
        assert!(sockets.are_among(&socket) && !sockets.are_among(&other));
        sockets.remove(&socket);
        assert!(!known(&shared) && !sockets.are_among(&socket));
    }
}
