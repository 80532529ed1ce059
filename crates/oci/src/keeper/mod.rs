//! The keeper: the host process that stands for one process of a container towards an engine.
//!
//! It is a child of the engine's subreaper, lives as long as the process in the guest, carries its
//! streams, passes signals on, and exits with its status. Its namespaces on the host are the
//! container's as far as the host has a part in them: the network namespace that engines fill and
//! hooks look for, the root file system that they copy into and out of, and a process namespace in
//! which there is nothing but it. In `ps` it looks like the process it stands for.
//!
//! A keeper is started before its container: [`spawn`] makes it wait, hooks can find it by its
//! process id, and [`Keeper::keep`] gives it streams to carry. There is one per container, so it is
//! small: no runtime, one thread for each stream, and this executable's text, which all of hull's
//! processes share.

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

pub use process::{keep_here, run};

/// Environment variable that makes this executable a keeper: its arguments are the container's.
/// Says whether it is to leave its caller's session.
const ROLE_VARIABLE: &str = "HULL_KEEPER";
const SESSION: &str = "session";
const FOREGROUND: &str = "foreground";

/// Whether this process was started as a keeper, and if so whether it is to leave its caller's
/// session.
pub fn is_wanted() -> Option<bool> {
    match std::env::var_os(ROLE_VARIABLE) {
        Some(role) if role == SESSION => Some(true),
        Some(role) if role == FOREGROUND => Some(false),
        _ => None,
    }
}

/// What a keeper is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Enter namespaces. Beside it the network's, if it exists, and the root file system.
    Enter(Vec<Namespace>),
    /// Carry. Beside it: the connection to the sandbox, the streams, and the slave of a terminal.
    Keep(Mode),
}

/// How streams are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Standard input, output and error.
    Pipes,
    /// One stream; the terminal is a slave whose master the engine has.
    Terminal,
    /// One stream; the terminal is the caller's own, on standard input.
    OwnTerminal,
}

/// A keeper that waits for its streams.
#[derive(Debug)]
pub struct Keeper {
    channel: OwnedFd,
    child: Child,
    kept: bool,
}

/// Namespaces that a keeper has of its own beside those that every one has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Namespace {
    /// Of control groups.
    Cgroup,
    /// Of System V and POSIX message queues.
    Ipc,
    /// Of users: in a new one without any, a keeper has no rights on the host any more.
    User,
    /// Of the host name.
    Uts,
    /// Of the network.
    Network,
}

/// What the host has of a container's world.
#[derive(Debug)]
pub struct World {
    /// Namespaces to be made, as the spec has them: who looks at the keeper finds what the
    /// container was to have.
    pub namespaces: Vec<Namespace>,
    /// Its network namespace, when it exists.
    pub network: Option<File>,
    /// A detached mount of its root file system.
    pub root: OwnedFd,
}

/// Starts a keeper, which inherits the standard streams.
///
/// `arguments` are what `ps` shows: the command in the container. `world` is absent for a further
/// process, which nobody looks at. `session` is false where the keeper shares its caller's
/// terminal.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// The process cannot be started, or its namespaces cannot be entered.
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
        keeper.order(&Order::Enter(world.namespaces.clone()), &fds)?;
    }
    Ok(keeper)
}

/// The number of the channel in the keeper.
const CHANNEL_FD: i32 = 3;

#[allow(unsafe_code)]
fn inherit(command: &mut Command, channel: OwnedFd) -> Result<()> {
    // SAFETY: between fork and exec only system calls on numbers are made.
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
            // Whatever an engine left open is not the keeper's: its other end would never see the
            // end.
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

    /// Its network namespace.
    ///
    /// # Errors
    /// It has ended.
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

    /// Gives it the connection to the sandbox, the streams of its process, and the slave of a
    /// terminal. From now on it stands for the process; the process lives as long as this
    /// connection.
    ///
    /// # Errors
    /// It has ended.
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
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A keeper that carries; it goes on when this is dropped.
#[derive(Debug)]
pub struct Kept(Keeper);

impl Kept {
    /// Waits for its end, and passes on to it the signals that come meanwhile; its exit status.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&mut self) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        process::pass_signals(self.pid())?;
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
