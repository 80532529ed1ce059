//! The keeper: the host process that represents one process of a container to an engine.
//!
//! It is a child of the engine's subreaper, lives as long as the process in the guest, copies its
//! streams, forwards signals, and exits with its status. On the host it has the container's
//! namespaces that matter there: the network namespace that engines and hooks configure, the root
//! file system that they copy to and from, and a pid namespace with no other process. In `ps` it
//! looks like the process it represents.
//!
//! A keeper is started before its container: [`spawn`] makes it wait, hooks find it by its process
//! id, and [`Keeper::keep`] passes it the streams. There is one per container, so it is small: no
//! async runtime, one thread per stream, and this executable's text, shared with all of hull's
//! processes.

mod carry;
mod memory;
mod process;
mod world;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::{Received, Reply, pair, receive, send};
use hull_sandbox::error::{Context, Error, Result};
use serde::{Deserialize, Serialize};

pub use carry::own_terminal_size;
pub use process::{HeldSignals, keep_here, run, size_of};

/// Environment variable that makes this executable a keeper, whose arguments are the container's.
/// Its value tells whether to leave the caller's session.
const ROLE_VARIABLE: &str = "HULL_KEEPER";
const SESSION: &str = "session";
const FOREGROUND: &str = "foreground";

/// Whether this process was started as a keeper; if so, whether it leaves its caller's session.
pub fn is_wanted() -> Option<bool> {
    match std::env::var_os(ROLE_VARIABLE) {
        Some(role) if role == SESSION => Some(true),
        Some(role) if role == FOREGROUND => Some(false),
        _ => None,
    }
}

/// A request to a keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Enter namespaces. Descriptors: the network namespace, if it exists, and the root file
    /// system.
    Enter {
        namespaces: Vec<Namespace>,
        covered: Vec<String>,
    },
    /// Copy streams. Descriptors: the connection to the sandbox, the streams, and a terminal's
    /// slave.
    Keep(Mode),
}

/// How streams are copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Standard input, output and error.
    Pipes,
    /// One stream; the terminal is a pty's slave whose master the engine has.
    Terminal,
    /// One stream; the terminal is the caller's.
    OwnTerminal,
}

/// A keeper that waits for its streams.
#[derive(Debug)]
pub struct Keeper {
    channel: OwnedFd,
    child: Child,
    kept: bool,
}

/// New namespaces of a keeper in addition to those that every keeper has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// Control groups.
    Cgroup,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Users: without id mappings, the keeper has no privileges on the host.
    User,
    /// Host name.
    Uts,
    /// Network.
    Network,
}

/// The container's namespaces and root file system on the host.
#[derive(Debug)]
pub struct World {
    /// Namespaces to create, as in the spec: tools that inspect the keeper find what was asked for.
    pub namespaces: Vec<Namespace>,
    /// An existing network namespace.
    pub network: Option<File>,
    /// A detached mount of its root file system.
    pub root: OwnedFd,
    /// Where the guest has file systems of its own, as absolute paths in the root: what is below
    /// them on the host the container does not see.
    pub covered: Vec<String>,
}

/// Starts a keeper, which inherits the standard streams.
///
/// `arguments` are shown by `ps`: the command in the container. `world` is `None` for `exec`, where
/// nothing uses the keeper's namespaces. `session` is false if the keeper shares its caller's
/// terminal.
///
/// The calling process must have only one thread.
///
/// # Errors
/// The process cannot be started, join `cgroups`, or enter its namespaces.
pub fn spawn(
    arguments: &[String],
    world: Option<&World>,
    cgroups: &[std::path::PathBuf],
    session: bool,
) -> Result<Keeper> {
    let doing = || "start the keeper".to_owned();
    let (ours, theirs) = pair().context(doing)?;
    let mut command = Command::new("/proc/self/exe");
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .env(ROLE_VARIABLE, if session { SESSION } else { FOREGROUND })
        .current_dir("/");
    inherit(&mut command, theirs)?;
    let child = match world {
        None => command.spawn().context(doing)?,
        Some(_) => world::spawn(&mut command)?,
    };
    let mut keeper = Keeper {
        child,
        channel: ours,
        kept: false,
    };
    for directory in cgroups {
        std::fs::write(directory.join("cgroup.procs"), keeper.pid().to_string())
            .context(|| format!("join the control group {}", directory.display()))?;
    }
    if let Some(world) = world {
        let network = world.network.as_ref().map(AsFd::as_fd);
        let fds: Vec<_> = network.into_iter().chain([world.root.as_fd()]).collect();
        let order = Order::Enter {
            namespaces: world.namespaces.clone(),
            covered: world.covered.clone(),
        };
        keeper.order(&order, &fds)?;
    }
    Ok(keeper)
}

/// The channel's descriptor in the keeper.
const CHANNEL_FD: i32 = 3;

#[allow(unsafe_code)]
fn inherit(command: &mut Command, channel: OwnedFd) -> Result<()> {
    // SAFETY: only async-signal-safe system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            use std::os::fd::AsRawFd;
            let from = channel.as_raw_fd();
            let done = if from == CHANNEL_FD {
                libc::fcntl(from, libc::F_SETFD, 0)
            } else {
                libc::dup2(from, CHANNEL_FD)
            };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            // Close descriptors that the engine left open: the keeper would keep their other ends
            // from seeing the end of the stream.
            let limit = libc::c_uint::MAX;
            let first = CHANNEL_FD as libc::c_uint + 1;
            if libc::close_range(first, limit, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Ok(())
}

impl Keeper {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Opens its network namespace.
    ///
    /// # Errors
    /// The keeper has ended.
    pub fn network_namespace(&self) -> Result<OwnedFd> {
        let path = format!("/proc/{}/ns/net", self.pid());
        File::open(&path)
            .map(OwnedFd::from)
            .context(|| format!("open the network namespace {path}"))
    }

    fn order(&mut self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let gone = || Error::new("the keeper has ended: it was killed, or it broke down");
        send(&self.channel, order, fds).map_err(|_| gone())?;
        match receive::<Reply>(&self.channel) {
            Ok(Some(Received {
                message: Reply::Failed(failure),
                ..
            })) => Err(failure),
            Ok(Some(_)) => Ok(()),
            _ => Err(gone()),
        }
    }

    /// Passes it the connection to the sandbox, the streams of its process, and a terminal's slave.
    /// From now on it represents the process, which lives as long as this connection.
    ///
    /// # Errors
    /// The keeper has ended, or cannot set up the streams.
    pub fn keep(
        mut self,
        mode: Mode,
        client: Client,
        streams: Vec<OwnedFd>,
        slave: Option<OwnedFd>,
    ) -> Result<Kept> {
        let connection = OwnedFd::from(client);
        let fds: Vec<_> = std::iter::once(connection.as_fd())
            .chain(streams.iter().map(AsFd::as_fd))
            .chain(slave.iter().map(AsFd::as_fd))
            .collect();
        self.order(&Order::Keep(mode), &fds)?;
        self.kept = true;
        Ok(Kept(self))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.kept {
            // It may have exited already.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A keeper that copies streams; it continues when this is dropped.
#[derive(Debug)]
pub struct Kept(Keeper);

impl Kept {
    /// Waits for it to exit, forwards signals meanwhile, and returns its exit status.
    ///
    /// # Errors
    /// Waiting fails.
    pub fn wait(&mut self, held: &HeldSignals) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        process::pass_signals(self.pid(), held)?;
        let status = self.0.child.wait().context(|| "wait for the keeper")?;
        Ok(status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.pid()
    }
}
