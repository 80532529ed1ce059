//! What a keeper does, from its start to its end.

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

use super::carry::{Carried, carry};
use super::{CHANNEL_FD, Mode, Order, memory, world};

/// What the keeper's process does, from its start to its end. `session`: it leaves its caller's.
///
/// Called when [`super::is_wanted`] says so, before anything else.
pub fn run(session: bool) -> ! {
    let status = match take_channel().and_then(|channel| obey(channel, session)) {
        Ok(status) => status,
        // Nobody is left to tell.
        Err(_) => EXIT_SANDBOX_FAILED,
    };
    std::process::exit(status)
}

#[allow(unsafe_code)]
fn take_channel() -> Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: `spawn` put the channel there, and nothing else in this process owns that number.
    let channel = unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) };
    rustix::io::fcntl_setfd(&channel, rustix::io::FdFlags::CLOEXEC)
        .context(|| "take over the channel")?;
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
            receive::<Order>(&channel).context(|| "read an order")?
        else {
            return Ok(EXIT_SANDBOX_FAILED);
        };
        match message {
            Order::Enter(namespaces) => {
                let reply = match world::enter(&namespaces, fds) {
                    Ok(()) => Reply::Ok,
                    Err(failure) => Reply::Failed(failure),
                };
                send(&channel, &reply, &[]).context(|| "answer")?;
            }
            Order::Keep(mode) => {
                let mut fds = fds.into_iter();
                let missing = || Error::new("the keeper got no connection");
                let connection = Client::from(fds.next().ok_or_else(missing)?);
                let carried = carry(mode, fds.collect());
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
    set.thread_block().context(|| "block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context(|| "watch signals")
}

/// Passes signals on until the process has ended; its status.
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
            // The sandbox process was killed, and with it everything.
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
    // A process that has just ended cannot be told, and need not be.
    let _ = connection.tell(&Request::Forward(signal), &[]);
}

/// Whether a signal is about this process's own children, input and output, and not about the
/// process in the guest.
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

/// Passes signals that this process gets on to a keeper, its child, until that has ended.
///
/// # Errors
/// The kernel's.
pub fn pass_signals(keeper: i32) -> Result<()> {
    let doing = || "wait for the keeper".to_owned();
    let before = SigSet::thread_get_mask().context(doing)?;
    let signals = block_signals()?;
    let pidfd = rustix::process::Pid::from_raw(keeper)
        .ok_or_else(|| Error::new("the keeper has no process id"))
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).context(doing))?;
    loop {
        let mut ready = [
            PollFd::new(&pidfd, PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        if poll(&mut ready, None).is_err() {
            continue;
        }
        let ended = !ready[0].revents().is_empty();
        while let Ok(Some(signal)) = signals.read_signal() {
            // What the kernel sends, the terminal's keys, the keeper gets too: it is in the same
            // process group.
            let is_sent = signal.ssi_code <= 0;
            if is_sent
                && !is_own(signal.ssi_signo)
                && let Ok(number) = Signal::try_from(signal.ssi_signo.cast_signed())
            {
                // One that has just ended need not be told.
                let _ = kill(nix::unistd::Pid::from_raw(keeper), number);
            }
        }
        if ended {
            // Hooks, which may follow, inherit it.
            return before.thread_set_mask().context(doing);
        }
    }
}

fn resize(connection: &Client, terminal: &OwnedFd) {
    if let Ok(size) = tcgetwinsize(terminal)
        && size.ws_row > 0
        && size.ws_col > 0
    {
        let size = TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        };
        // As above.
        let _ = connection.tell(&Request::Resize(size), &[]);
    }
}

/// Keeps a process in this very process, on its own standard streams: a foreground `exec`. Returns
/// its status.
///
/// # Errors
/// The streams cannot be carried.
pub fn keep_here(terminal: bool, connection: &Client, streams: Vec<OwnedFd>) -> Result<i32> {
    let mode = if terminal {
        Mode::OwnTerminal
    } else {
        Mode::Pipes
    };
    let signals = block_signals()?;
    let carried = carry(mode, streams)?;
    Ok(wait_for_end(connection, &signals, carried))
}
