//! The keeper's own process.

use std::os::fd::OwnedFd;

use hull_sandbox::config::TerminalSize;
use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::{Received, Reply, Request, receive, send};
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::store::EXIT_SANDBOX_FAILED;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use rustix::termios::tcgetwinsize;

use super::carry::{Carried, HostDevices, carry};
use super::{CHANNEL_FD, Mode, Order, memory, world};

/// Main function of a keeper's process. `session`: leave the caller's session.
///
/// Called first in `main` if [`super::is_wanted`] returns a value.
pub fn run(session: bool) -> ! {
    let status = match take_channel().and_then(|channel| obey(channel, session)) {
        Ok(status) => status,
        // The caller is gone: there is nothing to report to.
        Err(_) => EXIT_SANDBOX_FAILED,
    };
    std::process::exit(status)
}

#[allow(unsafe_code)]
fn take_channel() -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: `spawn` put the channel there, and nothing else in this process owns the descriptor.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    rustix::io::fcntl_setfd(&channel, rustix::io::FdFlags::CLOEXEC)
        .context(|| "take over the channel")?;
    Ok(channel)
}

fn obey(channel: OwnedFd, session: bool) -> Result<i32> {
    if session {
        // Fails only for the leader of a process group, which a keeper is not.
        let _ = rustix::process::setsid();
    }
    let signals = block_signals()?;
    // Before this process enters the container's root.
    let host = HostDevices::open()?;
    loop {
        let Some(Received { message, fds }) =
            receive::<Order>(&channel).context(|| "read an order")?
        else {
            return Ok(EXIT_SANDBOX_FAILED);
        };
        match message {
            Order::Enter {
                namespaces,
                covered,
            } => {
                let reply = match world::enter(&namespaces, fds, &covered) {
                    Ok(()) => Reply::Ok,
                    Err(failure) => Reply::Failed(failure),
                };
                send(&channel, &reply, &[]).context(|| "answer")?;
            }
            Order::Keep(mode) => {
                let mut fds = fds.into_iter();
                let missing = || Error::new("the keeper got no connection");
                let connection = Client::from(fds.next().ok_or_else(missing)?);
                let carried = carry(mode, fds.collect(), &host).and_then(|carried| {
                    if mode == Mode::Pipes {
                        host.leave_standard_streams()?;
                    }
                    Ok(carried)
                });
                let reply = match &carried {
                    Ok(_) => Reply::Ok,
                    Err(failure) => Reply::Failed(failure.clone()),
                };
                send(&channel, &reply, &[]).context(|| "answer")?;
                drop(channel);
                memory::release_code();
                return Ok(wait_for_end(&connection, &signals, carried?));
            }
        }
    }
}

/// Signals that wait until somebody is there to forward them. Taken before a process is started:
/// one that is sent as soon as the process says something is for that process, and would end this
/// one instead.
#[derive(Debug)]
pub struct HeldSignals {
    signals: SignalFd,
    before: SigSet,
}

impl HeldSignals {
    /// Blocks all signals of this thread until this is dropped.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn hold() -> Result<HeldSignals> {
        let before = SigSet::thread_get_mask().context(|| "read the mask of signals")?;
        Ok(HeldSignals {
            signals: block_signals()?,
            before,
        })
    }
}

impl Drop for HeldSignals {
    fn drop(&mut self) {
        // Cannot fail: the arguments are constants.
        let _ = self.before.thread_set_mask();
    }
}

/// Blocks all signals, to forward them to the process in the guest.
fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::all();
    // Faults of the keeper itself.
    for own in [
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGILL,
        Signal::SIGFPE,
        Signal::SIGABRT,
    ] {
        set.remove(own);
    }
    set.thread_block().context(|| "block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "watch signals")
}

/// Forwards signals until the process has exited; returns its status.
fn wait_for_end(connection: &Client, signals: &SignalFd, carried: Carried) -> i32 {
    if let Some(terminal) = carried.terminal() {
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
                pass_on(connection, signal.ssi_signo, carried.terminal());
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
            // The sandbox process was killed, and the container with it.
            Err(_) => break EXIT_SANDBOX_FAILED,
        }
    };
    carried.finish();
    status
}

fn pass_on(connection: &Client, signal: u32, terminal: Option<&OwnedFd>) {
    if signal == Signal::SIGWINCH as u32 {
        if let Some(terminal) = terminal {
            resize(connection, terminal);
        }
        return;
    }
    if is_own(signal) {
        return;
    }
    // Fails if the process has just exited.
    let _ = connection.tell(&Request::Forward(signal), &[]);
}

/// Whether a signal concerns this process's own children and I/O, not the process in the guest.
fn is_own(signal: u32) -> bool {
    [
        Signal::SIGCHLD,
        Signal::SIGPIPE,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGURG,
        Signal::SIGIO,
    ]
    .iter()
    .any(|own| *own as u32 == signal)
}

/// Forwards signals of this process to its child, a keeper, until that exits.
///
/// # Errors
/// The keeper's pidfd cannot be opened.
pub fn pass_signals(keeper: i32, held: &HeldSignals) -> Result<()> {
    let doing = || "wait for the keeper".to_owned();
    let signals = &held.signals;
    let pidfd = rustix::process::Pid::from_raw(keeper)
        .ok_or_else(|| Error::new("the keeper has no process id"))
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).context(doing))?;
    loop {
        let mut ready = [
            PollFd::new(&pidfd, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
        ];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        let ended = !ready[0].revents().is_empty();
        while let Ok(Some(signal)) = signals.read_signal() {
            // Signals from the kernel (terminal keys) reach the keeper anyway: it is in the same
            // process group.
            let is_sent = signal.ssi_code <= 0;
            if is_sent
                && !is_own(signal.ssi_signo)
                && let Ok(number) = Signal::try_from(signal.ssi_signo.cast_signed())
            {
                // Fails if it has just exited.
                let _ = kill(nix::unistd::Pid::from_raw(keeper), number);
            }
        }
        if ended {
            return Ok(());
        }
    }
}

/// Rows and columns of a terminal, if it has a size.
pub fn size_of(terminal: &OwnedFd) -> Option<(u16, u16)> {
    let size = tcgetwinsize(terminal).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

fn resize(connection: &Client, terminal: &OwnedFd) {
    if let Some((rows, columns)) = size_of(terminal) {
        let size = TerminalSize { rows, columns };
        // Fails if the process has just exited.
        let _ = connection.tell(&Request::Resize(size), &[]);
    }
}

/// Acts as the keeper of a process in this process, with its standard streams: for a foreground
/// `exec`. Returns the exit status.
///
/// # Errors
/// The streams cannot be set up.
pub fn keep_here(
    terminal: bool,
    connection: &Client,
    streams: Vec<OwnedFd>,
    held: &HeldSignals,
) -> Result<i32> {
    let mode = if terminal {
        Mode::OwnTerminal
    } else {
        Mode::Pipes
    };
    let carried = carry(mode, streams, &HostDevices::open()?)?;
    Ok(wait_for_end(connection, &held.signals, carried))
}
