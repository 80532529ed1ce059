//! The keeper: the host process that stands for one process of a container towards an engine.
//!
//! It is a child of the engine's subreaper, lives as long as the process in the guest, carries its streams, passes
//! signals on, and exits with its status. Its namespaces on the host are the container's as far as the host has a part
//! in them: the network namespace that engines fill and hooks look for, the root file system that they copy into and
//! out of, and a process namespace in which there is nothing but it. In `ps` it looks like the process it stands for.
//!
//! A keeper is started before its container: [`spawn`] makes it wait, hooks can find it by its process id, and
//! [`Keeper::keep`] gives it streams to carry. There is one per container, so it is small: no runtime, one thread for
//! each stream, and this executable's text, which all of hull's processes share.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::JoinHandle;

use hull_sandbox::error::{Context, EXIT_HULL, Failure, Result};
use hull_sandbox::pod::PodPaths;
use hull_sandbox::pod::client::Connection;
use hull_sandbox::pod::wire::{Received, Reply, Request, receive, send};
use hull_sandbox::wire::Size;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, shutdown, socketpair};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use serde::{Deserialize, Serialize};

/// Environment variable of a keeper: the directory of the pod that its container is in.
pub const POD_VARIABLE: &str = "HULL_POD";

/// Environment variable that makes this executable a keeper: its arguments are the container's. Says whether it
/// is to leave its caller's session.
const ROLE_VARIABLE: &str = "HULL_KEEPER";
const SESSION: &str = "session";
const FOREGROUND: &str = "foreground";

/// Whether this process was started as a keeper, and if so whether it is to leave its caller's session.
pub fn is_wanted() -> Option<bool> {
    match std::env::var_os(ROLE_VARIABLE) {
        Some(role) if role == SESSION => Some(true),
        Some(role) if role == FOREGROUND => Some(false),
        _ => None,
    }
}

/// Bytes carried at once; what a pipe holds by default.
const PIECE: usize = 64 << 10;

/// Stack of a thread that carries: its buffer is on the heap.
const STACK: usize = 32 << 10;

/// What a keeper is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// Enter namespaces: a new one for the network, or the one beside it first; the root file system beside it last.
    Enter { network: bool, root: bool },
    /// Carry. Beside it: the connection to the pod, the streams, and the slave of a terminal.
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

/// What the host has of a container's world.
#[derive(Debug)]
pub struct World {
    /// Its network namespace; a new one when absent.
    pub network: Option<File>,
    /// A detached mount of its root file system.
    pub root: OwnedFd,
}

/// Starts a keeper, which inherits the standard streams.
///
/// `arguments` are what `ps` shows: the command in the container. `world` is absent for a further process, which
/// nobody looks at. `session` is false where the keeper shares its caller's terminal.
///
/// Must be called while this process has one thread.
///
/// # Errors
/// The process cannot be started, or its namespaces cannot be entered.
pub fn spawn(
    pod: &PodPaths,
    arguments: &[String],
    world: Option<&World>,
    cgroups: &[std::path::PathBuf],
    session: bool,
) -> Result<Keeper> {
    let doing = || "start the keeper".to_owned();
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(doing)?;
    let mut command = Command::new("/proc/self/exe");
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    command
        .env_clear()
        .env(ROLE_VARIABLE, if session { SESSION } else { FOREGROUND })
        .env(POD_VARIABLE, pod.files().run)
        .current_dir("/");
    inherit(&mut command, theirs)?;
    let child = match world {
        None => command.spawn().context(doing)?,
        Some(_) => spawn_alone(&mut command)?,
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
            network: network.is_some(),
            root: true,
        };
        keeper.order(&order, &fds)?;
    }
    Ok(keeper)
}

/// Starts a process that is the first one of a new process namespace.
#[allow(unsafe_code)]
fn spawn_alone(command: &mut Command) -> Result<Child> {
    let doing = || "make a process namespace".to_owned();
    let own = File::open("/proc/self/ns/pid").context(doing)?;
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.context(doing)?;
    let child = command.spawn();
    // Hooks, which this process starts too, belong into its own.
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)).context(doing)?;
    child.context(|| "start the keeper".into())
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
            // Whatever an engine left open is not the keeper's: its other end would never see the end.
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

    fn order(&mut self, order: &Order, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let gone = || Failure::new("the keeper has ended: it was killed, or it broke down");
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

    /// Gives it the connection to the pod, the streams of its process, and the slave of a terminal. From now on it
    /// stands for the process; the process lives as long as this connection.
    ///
    /// # Errors
    /// It has ended.
    pub fn keep(
        mut self,
        mode: Mode,
        connection: Connection,
        streams: Vec<OwnedFd>,
        slave: Option<OwnedFd>,
    ) -> Result<Kept> {
        let connection = OwnedFd::from(connection);
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
    /// Waits for its end; its exit status.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&mut self) -> Result<i32> {
        use std::os::unix::process::ExitStatusExt;
        let status = self
            .0
            .child
            .wait()
            .context(|| "wait for the keeper".into())?;
        Ok(status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.0.pid()
    }
}

/// What the keeper's process does, from its start to its end. `session`: it leaves its caller's.
///
/// Called when [`is_wanted`] says so, before anything else.
pub fn run(session: bool) -> ! {
    let status = match take_channel().and_then(|channel| obey(channel, session)) {
        Ok(status) => status,
        // Nobody is left to tell.
        Err(_) => EXIT_HULL,
    };
    std::process::exit(status)
}

#[allow(unsafe_code)]
fn take_channel() -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: `spawn` put the channel there, and nothing else in this process owns that number.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    rustix::io::fcntl_setfd(&channel, rustix::io::FdFlags::CLOEXEC)
        .context(|| "take over the channel".into())?;
    Ok(channel)
}

fn obey(channel: OwnedFd, session: bool) -> Result<i32> {
    if session {
        // A leader of a process group cannot; a keeper is none.
        let _ = rustix::process::setsid();
    }
    let signals = block_signals()?;
    loop {
        let Some(Received { message, fds }) =
            receive::<Order>(&channel).context(|| "read an order".into())?
        else {
            return Ok(EXIT_HULL);
        };
        match message {
            Order::Enter { network, root } => {
                let reply = match enter(network, root, fds) {
                    Ok(()) => Reply::Ok,
                    Err(failure) => Reply::Failed(failure),
                };
                send(&channel, &reply, &[]).context(|| "answer".into())?;
            }
            Order::Keep(mode) => {
                let mut fds = fds.into_iter();
                let missing = || Failure::new("the keeper got no connection");
                let connection = Connection::from(fds.next().ok_or_else(missing)?);
                let carried = carry(mode, fds.collect());
                let reply = match &carried {
                    Ok(_) => Reply::Ok,
                    Err(failure) => Reply::Failed(failure.clone()),
                };
                send(&channel, &reply, &[]).context(|| "answer".into())?;
                drop(channel);
                return Ok(wait_for_end(&connection, &signals, carried?));
            }
        }
    }
}

#[allow(unsafe_code)]
fn enter(network: bool, root: bool, fds: Vec<OwnedFd>) -> Result<()> {
    let mut fds = fds.into_iter();
    let mut next = || {
        fds.next()
            .ok_or_else(|| Failure::new("the keeper got no namespace"))
    };
    let mut new = UnshareFlags::NEWNS;
    if network {
        move_into_link_name_space(next()?.as_fd(), Some(LinkNameSpaceType::Network))
            .context(|| "join the network namespace".into())?;
    } else {
        new |= UnshareFlags::NEWNET;
    }
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { rustix::thread::unshare_unsafe(new) }.context(|| "make namespaces".into())?;
    if root {
        enter_root(&next()?).context(|| "enter the container's root file system".into())?;
    }
    Ok(())
}

/// Makes a detached mount the root, with nothing of the host in it but a view of this process.
fn enter_root(root: &OwnedFd) -> rustix::io::Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let processes = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(processes.as_fd())?;
    let processes = fsmount(
        processes.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?;
    // Any directory will do: it is covered for the moment in which the root changes.
    let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root, "", CWD, "/proc", from)?;
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    // What the image has there may be a link, or nothing.
    let found = openat2(
        root,
        "proc",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
    );
    if let Ok(target) = found {
        move_mount(
            &processes,
            "",
            &target,
            "",
            from | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )?;
    }
    Ok(())
}

/// All signals that can be: they are the process's in the guest.
fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::all();
    // A fault is the keeper's own.
    for own in [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGILL,
        Signal::SIGFPE,
        Signal::SIGABRT,
    ] {
        set.remove(own);
    }
    set.thread_block().context(|| "block signals".into())?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "watch signals".into())
}

/// What carries the streams of one process.
pub struct Carried {
    /// Threads that carry output: waited for at the end.
    outputs: Vec<JoinHandle<()>>,
    /// The terminal, when there is one.
    terminal: Option<OwnedFd>,
    /// What the terminal was like before.
    before: Option<Termios>,
}

/// Begins to carry.
///
/// # Errors
/// Streams are missing, or the terminal cannot be set up.
pub fn carry(mode: Mode, streams: Vec<OwnedFd>) -> Result<Carried> {
    let mut streams = streams.into_iter();
    let mut next = || {
        streams
            .next()
            .ok_or_else(|| Failure::new("the keeper got too few streams"))
    };
    let standard = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().context(|| "take a stream".into());
    if mode == Mode::Pipes {
        let (input, output, error) = (next()?, next()?, next()?);
        thread(standard(io::stdin().as_fd())?, input, End::Shutdown)?;
        let outputs = vec![
            thread(output, standard(io::stdout().as_fd())?, End::Nothing)?,
            thread(error, standard(io::stderr().as_fd())?, End::Nothing)?,
        ];
        return Ok(Carried {
            outputs,
            terminal: None,
            before: None,
        });
    }
    let stream = next()?;
    let (terminal, output) = match mode {
        Mode::OwnTerminal => (
            standard(io::stdin().as_fd())?,
            standard(io::stdout().as_fd())?,
        ),
        _ => {
            let slave = next()?;
            // Its size's changes and its hang-up are told to this process then.
            rustix::process::ioctl_tiocsctty(&slave)
                .context(|| "take control of the terminal".into())?;
            // An engine may wait for the end of what it gave as standard output.
            rustix::stdio::dup2_stdin(&slave)
                .and_then(|()| rustix::stdio::dup2_stdout(&slave))
                .and_then(|()| rustix::stdio::dup2_stderr(&slave))
                .context(|| "leave the standard streams".into())?;
            (standard(slave.as_fd())?, slave)
        }
    };
    let before = tcgetattr(&terminal).context(|| "read the terminal's attributes".into())?;
    let mut raw = before.clone();
    raw.make_raw();
    // The terminal that cooks is the one in the guest.
    tcsetattr(&terminal, OptionalActions::Now, &raw)
        .context(|| "set the terminal's attributes".into())?;
    let input = standard(terminal.as_fd())?;
    let writing = standard(stream.as_fd())?;
    thread(input, writing, End::Shutdown)?;
    let outputs = vec![thread(stream, output, End::Nothing)?];
    Ok(Carried {
        outputs,
        terminal: Some(terminal),
        before: Some(before),
    })
}

/// What follows the end of what is carried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The reader is told.
    Shutdown,
    /// Nothing.
    Nothing,
}

fn thread(from: OwnedFd, to: OwnedFd, end: End) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .stack_size(STACK)
        .spawn(move || {
            let (mut from, mut to) = (File::from(from), File::from(to));
            let mut buffer = vec![0; PIECE];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => {
                        if write_all(&mut to, &buffer[..length]).is_err() {
                            // Nobody reads any more: the writer is to know.
                            let _ = shutdown(&from, Shutdown::Read);
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        wait(&from, PollFlags::IN);
                    }
                    // A terminal that was hung up.
                    Err(_) => break,
                }
            }
            if end == End::Shutdown {
                // The other end may have closed already.
                let _ = shutdown(&to, Shutdown::Write);
            }
        })
        .context(|| "start a thread".into())
}

/// Writes to what somebody else may have made non-blocking.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to, PollFlags::OUT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: &File, what: PollFlags) {
    // Whatever it says, the next call says more.
    let _ = poll(&mut [PollFd::new(fd, what)], None);
}

/// Passes signals on until the process has ended; its status.
fn wait_for_end(connection: &Connection, signals: &SignalFd, carried: Carried) -> i32 {
    if let Some(terminal) = &carried.terminal {
        resize(connection, terminal);
    }
    let status = loop {
        let mut ready = [
            PollFd::new(connection, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        if !ready[1].revents().is_empty() {
            while let Ok(Some(signal)) = signals.read_signal() {
                pass_on(connection, signal.ssi_signo, carried.terminal.as_ref());
            }
        }
        if ready[0].revents().is_empty() {
            continue;
        }
        match connection.receive() {
            Ok(Received {
                message: Reply::Exited(exit),
                ..
            }) => break exit.status,
            Ok(_) => {}
            // The sandbox process was killed, and with it everything.
            Err(_) => break EXIT_HULL,
        }
    };
    for output in carried.outputs {
        // A thread that panicked has carried what it could.
        let _ = output.join();
    }
    if let (Some(terminal), Some(before)) = (&carried.terminal, &carried.before) {
        // It may be gone.
        let _ = tcsetattr(terminal, OptionalActions::Drain, before);
    }
    status
}

fn pass_on(connection: &Connection, signal: u32, terminal: Option<&OwnedFd>) {
    if signal == Signal::SIGWINCH as u32 {
        if let Some(terminal) = terminal {
            resize(connection, terminal);
        }
        return;
    }
    // These are about the keeper's own children, input and output, not about the process.
    let own = [
        Signal::SIGCHLD,
        Signal::SIGPIPE,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGURG,
        Signal::SIGIO,
    ];
    if own.iter().any(|own| *own as u32 == signal) {
        return;
    }
    // A process that has just ended cannot be told, and need not be.
    let _ = connection.tell(&Request::Forward(signal));
}

fn resize(connection: &Connection, terminal: &OwnedFd) {
    if let Ok(size) = tcgetwinsize(terminal)
        && size.ws_row > 0
        && size.ws_col > 0
    {
        let size = Size {
            rows: size.ws_row,
            columns: size.ws_col,
        };
        // As above.
        let _ = connection.tell(&Request::Resize(size));
    }
}

/// Keeps a process in this very process, on its own standard streams: a foreground `exec`. Returns its status.
///
/// # Errors
/// The streams cannot be carried.
pub fn keep_here(terminal: bool, connection: &Connection, streams: Vec<OwnedFd>) -> Result<i32> {
    let mode = if terminal {
        Mode::OwnTerminal
    } else {
        Mode::Pipes
    };
    let signals = block_signals()?;
    let carried = carry(mode, streams)?;
    Ok(wait_for_end(connection, &signals, carried))
}
