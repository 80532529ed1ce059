//! The caller's side of a pod: start its sandbox process or find it, ask it. Blocking.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::wire::{Received, Reply, Request, pair, receive, send};
use super::{PodPaths, PodRequest};
use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;
use crate::record;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

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
        let received = match receive(&self.socket) {
            // It has ended with our question unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(gone()),
            received => received.context(|| "read the answer of the sandbox process".into())?,
        };
        let received = received.ok_or_else(gone)?;
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

/// Whether a failure of [`Connection::ask`] says that there is no sandbox process any more.
pub fn is_gone(failure: &Failure) -> bool {
    failure.message == gone().message
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

/// Kills the pod's sandbox process, if it lives.
///
/// # Errors
/// The kernel's.
pub fn kill(paths: &PodPaths) -> Result<()> {
    let doing = || format!("kill the sandbox process of pod {}", paths.id);
    // Written by the process itself. One that has not come to that yet ends when it finds nobody connected.
    let said = fs::read_to_string(paths.files().lock()).unwrap_or_default();
    let Some(pid) = said.trim().parse().ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // As long as it lives nobody else has its id: what was opened is the process.
    match is_alive(paths) {
        true => pidfd_send_signal(&pidfd, Signal::KILL).context(doing),
        false => Ok(()),
    }
}

/// Removes what a killed sandbox process left. Does nothing when it lives.
///
/// # Errors
/// The directory cannot be removed.
pub fn sweep(paths: &PodPaths) -> Result<()> {
    if !paths.files().run.exists() {
        return Ok(());
    }
    // Nobody starts it meanwhile.
    let _lock = LaunchLock::take(paths)?;
    sweep_locked(paths)
}

fn sweep_locked(paths: &PodPaths) -> Result<()> {
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
/// `request` is made only when the pod must be started; with it come the block devices that it names.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started.
pub fn join_or_launch(
    paths: &PodPaths,
    request: impl FnOnce() -> Result<(PodRequest, Vec<OwnedFd>)>,
) -> Result<Connection> {
    fs::create_dir_all(&paths.all).context(|| format!("create {}", paths.all.display()))?;
    let _lock = LaunchLock::take(paths)?;
    if let Some(connection) = Connection::open(paths)? {
        return Ok(connection);
    }
    // One that is ending keeps its lock until it has removed its files.
    wait_for_end(paths)?;
    sweep_locked(paths)?;
    let (request, disks) = request()?;
    let connection = launch(paths, &request, &disks)?;
    connection.greet()?;
    Ok(connection)
}

/// Starts the sandbox process of a pod that nobody else knows. Returns at once: whether it came up is the answer to
/// the first question.
///
/// From here on the pod is alive to whoever looks: it is born with its lock held and with the socket that it is found by,
/// which travel to the new process in its first message, with the block devices of the request's disks. If this process
/// is killed before, they are gone with it.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started.
pub fn launch(paths: &PodPaths, request: &PodRequest, disks: &[OwnedFd]) -> Result<Connection> {
    let files = paths.files();
    let doing = || format!("start the sandbox process of pod {}", paths.id);
    fs::create_dir_all(&files.run).context(|| format!("create {}", files.run.display()))?;
    let lock = record::lock(&files)?;
    let listener = listen(&files)?;
    let diagnostics = File::create(files.diagnostics()).context(doing)?;
    let (ours, theirs) = pair().context(doing)?;
    let mut fds = vec![lock.as_fd(), listener.as_fd()];
    fds.extend(disks.iter().map(AsFd::as_fd));
    send(&ours, request, &fds).context(doing)?;
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

fn listen(files: &ContainerPaths) -> Result<OwnedFd> {
    let doing = || "create the control socket".to_owned();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).context(doing)?;
    let address = SocketAddrUnix::new(files.socket()).context(doing)?;
    rustix::net::bind(&socket, &address).context(doing)?;
    rustix::net::listen(&socket, BACKLOG).context(doing)?;
    Ok(socket)
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
