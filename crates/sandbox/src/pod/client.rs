//! The caller's side of a pod: start its sandbox process or find it, ask it. Blocking.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, socketpair,
};

use super::wire::{Received, Reply, Request, receive, send};
use super::{PodPaths, PodRequest};
use crate::error::{Context, Failure, Result};
use crate::record;

/// A connection to a pod's sandbox process.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// The sandbox process was just started and has not said yet whether it can be found.
    expects_greeting: Cell<bool>,
}

impl From<OwnedFd> for Connection {
    fn from(socket: OwnedFd) -> Self {
        Self {
            socket,
            expects_greeting: Cell::new(false),
        }
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        connection.socket
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// Connects to the pod, if it lives.
    ///
    /// # Errors
    /// It lives and cannot be reached.
    pub fn open(paths: &PodPaths) -> Result<Option<Self>> {
        let doing = || format!("reach the sandbox process of pod {}", paths.id);
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .context(doing)?;
        let address = SocketAddrUnix::new(paths.files().socket()).context(doing)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Some(socket.into())),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => Ok(None),
            Err(error) => Err(error).context(doing),
        }
    }

    /// Asks, and waits for the answer. [`Reply::Failed`] comes as the error it is.
    ///
    /// # Errors
    /// What the sandbox process answered, or that it went away.
    pub fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Received<Reply>> {
        self.greet()?;
        send(&self.socket, request, fds).map_err(|_| gone())?;
        self.receive()
    }

    /// Waits until a sandbox process that was just started can be found by others.
    ///
    /// # Errors
    /// Why it cannot.
    fn greet(&self) -> Result<()> {
        match self.expects_greeting.replace(false) {
            true => self.receive().map(drop),
            false => Ok(()),
        }
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn receive(&self) -> Result<Received<Reply>> {
        let received = receive(&self.socket)
            .context(|| "read the answer of the sandbox process".into())?
            .ok_or_else(gone)?;
        match received.message {
            Reply::Failed(failure) => Err(failure),
            _ => Ok(received),
        }
    }

    /// Says something that is not answered.
    ///
    /// # Errors
    /// The sandbox process has gone.
    pub fn tell(&self, request: &Request) -> Result<()> {
        send(&self.socket, request, &[]).map_err(|_| gone())
    }
}

fn gone() -> Failure {
    Failure::new("the sandbox process has ended: it was killed, or it broke down")
}

/// Whether the pod's sandbox process lives.
pub fn is_alive(paths: &PodPaths) -> bool {
    record::is_alive(&paths.files())
}

/// Waits for the end of the pod's sandbox process.
///
/// # Errors
/// The lock that tells cannot be waited for.
pub fn wait_for_end(paths: &PodPaths) -> Result<()> {
    match File::open(paths.files().lock()) {
        Ok(file) => rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockShared))
            .context(|| "wait for the end of the sandbox process".into()),
        Err(_) => Ok(()),
    }
}

/// Removes what a killed sandbox process left. Does nothing when it lives.
///
/// # Errors
/// The directory cannot be removed.
pub fn sweep(paths: &PodPaths) -> Result<()> {
    let run = paths.files().run;
    if is_alive(paths) {
        return Ok(());
    }
    match fs::remove_dir_all(&run) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).context(|| format!("remove {}", run.display())),
    }
    Ok(())
}

/// Connects to the sandbox process of a pod that others may want at the same time; it is started when there is none.
///
/// `request` is made only when the pod must be started.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started.
pub fn join_or_launch(
    paths: &PodPaths,
    request: impl FnOnce() -> Result<PodRequest>,
) -> Result<Connection> {
    fs::create_dir_all(&paths.all).context(|| format!("create {}", paths.all.display()))?;
    let _lock = LaunchLock::take(paths)?;
    if let Some(connection) = Connection::open(paths)? {
        return Ok(connection);
    }
    // One that is ending keeps its lock until it has removed its files.
    wait_for_end(paths)?;
    sweep(paths)?;
    let connection = launch(paths, &request()?)?;
    connection.greet()?;
    Ok(connection)
}

/// Starts the sandbox process of a pod that nobody else knows. Returns at once: whether it came up is the answer to
/// the first question.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started.
pub fn launch(paths: &PodPaths, request: &PodRequest) -> Result<Connection> {
    let files = paths.files();
    let doing = || format!("start the sandbox process of pod {}", paths.id);
    fs::create_dir_all(&files.run).context(|| format!("create {}", files.run.display()))?;
    let text = serde_json::to_vec(request).context(doing)?;
    record::write_by_rename(&files.request(), &text)?;
    let diagnostics = File::create(files.diagnostics()).context(doing)?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(doing)?;
    Command::new("/proc/self/exe")
        .arg0("hull")
        .args(["pod-process", "--directory"])
        .arg(&paths.all)
        .args(["--id", &paths.id])
        .current_dir("/")
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| name == "HULL_LOG"))
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::from(diagnostics))
        .spawn()
        .context(doing)?;
    let connection = Connection::from(ours);
    connection.expects_greeting.set(true);
    Ok(connection)
}

/// Decides between those who want to start the same pod.
struct LaunchLock {
    _file: File,
    path: std::path::PathBuf,
}

impl LaunchLock {
    fn take(paths: &PodPaths) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let path = paths.launch_lock();
        let doing = || format!("lock {}", path.display());
        loop {
            let file = File::create(&path).context(doing)?;
            rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))
                .context(doing)?;
            // Whoever had it before us has removed it: then another file may have its name by now.
            let ours = file.metadata().context(doing)?;
            if fs::metadata(&path).is_ok_and(|there| there.ino() == ours.ino()) {
                return Ok(Self { _file: file, path });
            }
        }
    }
}

impl Drop for LaunchLock {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = fs::remove_file(&self.path);
    }
}
