//! Starts the process of a sandbox.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::client::Client;
use super::protocol::{pair, send};
use crate::config::SandboxConfig;
use crate::error::{Context, Error, Result};
use crate::role::ROLE;
use crate::store::sandbox_dir::LaunchLock;
use crate::store::{Directory, SandboxDir, SandboxPath};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Starts the process of a sandbox that nobody else knows. Returns at once: whether it came up is
/// the answer to the greeting, which comes before that to the first request.
///
/// From here on the sandbox is alive to all others: it is born with its lock held and with the
/// socket that it is found by, which travel to the new process in its first message, with the block
/// devices of the configuration's disks. If this process is killed before, they are gone with it.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started.
pub fn launch(path: &SandboxPath, config: &SandboxConfig, disks: &[OwnedFd]) -> Result<Client> {
    let dir = SandboxDir::create(path)?;
    start(dir, config, disks).inspect_err(|_| {
        // The error that is reported is the one that made this necessary.
        let _ = path.sweep_locked();
    })
}

fn start(dir: SandboxDir, config: &SandboxConfig, disks: &[OwnedFd]) -> Result<Client> {
    let path = dir.path().clone();
    let doing = || format!("start the sandbox process of {}", path.id);
    let listener = listen(&path)?;
    let diagnostics = File::create(path.diagnostics()).context(doing)?;
    let (ours, theirs) = pair().context(doing)?;
    let lock = dir
        .into_lock()
        .ok_or_else(|| Error::new("the lock of a sandbox was let go of"))?;
    let mut fds = vec![lock.as_fd(), listener.as_fd()];
    fds.extend(disks.iter().map(AsFd::as_fd));
    send(&ours, config, &fds).context(doing)?;
    let client = Client::greet(ours)?;
    let process = Command::new("/proc/self/exe")
        .arg0("hull")
        .arg(ROLE)
        .arg("--directory")
        .arg(&path.sandboxes)
        .args(["--id", &path.id])
        .current_dir("/")
        .env_clear()
        // Where programs are that it starts (QEMU, pasta, plugins' own), and how much it logs.
        .envs(std::env::vars_os().filter(|(name, _)| name == "PATH" || name == "HULL_LOG"))
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::from(diagnostics))
        .spawn()
        .context(doing)?;
    reap(process).context(doing)?;
    Ok(client)
}

/// Lets a caller that outlives a process which it has started have no zombie of it. The thread
/// takes no signals: they are for whoever blocks or handles them in the caller.
///
/// # Errors
/// There can be no more threads.
pub fn reap(mut process: Child) -> std::io::Result<()> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let reaper = std::thread::Builder::new().spawn(move || process.wait());
    before.thread_set_mask()?;
    reaper?;
    Ok(())
}

/// Connects to a sandbox that others may want at the same time; it is launched when there is none.
///
/// `config` is called only when the sandbox must be started; with it come the block devices that it
/// names.
///
/// # Errors
/// As [`launch`], and why the sandbox does not come up.
pub fn join_or_launch(
    path: &SandboxPath,
    config: impl FnOnce() -> Result<(SandboxConfig, Vec<OwnedFd>)>,
) -> Result<Client> {
    Directory::create(&path.sandboxes)?;
    let _lock = LaunchLock::take(path)?;
    if let Some(client) = Client::open(path)? {
        return Ok(client);
    }
    // One that is ending keeps its lock until it has removed its files.
    path.wait_for_end()?;
    path.sweep_locked()?;
    let (config, disks) = config()?;
    let client = launch(path, &config, &disks)?;
    client.wait_for_greeting()?;
    Ok(client)
}

/// Makes this process the one of a sandbox that is used as a library: the sandbox's directory, with
/// its lock, the socket of the control protocol, for [`serve`](super::serve), and the file for
/// messages of its processes.
///
/// # Errors
/// `Exists` when the sandbox lives; the state directory cannot be written.
pub fn claim(path: &SandboxPath) -> Result<(SandboxDir, OwnedFd)> {
    Directory::create(&path.sandboxes)?;
    let _lock = LaunchLock::take(path)?;
    if path.is_alive() {
        return Err(Error::exists(format!(
            "sandbox {} is there already",
            path.id
        )));
    }
    path.sweep_locked()?;
    let dir = SandboxDir::create(path)?;
    let prepared = listen(path).and_then(|listener| {
        let diagnostics = path.diagnostics();
        File::create(&diagnostics).context(|| format!("create {}", diagnostics.display()))?;
        let lock = dir
            .into_lock()
            .ok_or_else(|| Error::new("the lock of a sandbox was let go of"))?;
        Ok((SandboxDir::adopt(path, lock)?, listener))
    });
    prepared.inspect_err(|_| {
        // The error that is reported is the one that made this necessary.
        let _ = path.sweep_locked();
    })
}

fn listen(path: &SandboxPath) -> Result<OwnedFd> {
    let doing = || "create the control socket";
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).context(doing)?;
    let address = SocketAddrUnix::new(path.socket()).context(doing)?;
    rustix::net::bind(&socket, &address).context(doing)?;
    rustix::net::listen(&socket, BACKLOG).context(doing)?;
    Ok(socket)
}
