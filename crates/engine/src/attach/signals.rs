//! Signals as a descriptor that can be polled beside others. Used while a command stands for a
//! container's process: a signal for the command is then one for the container.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Context, Result};

/// Signals that are blocked and come by a descriptor instead.
#[derive(Debug)]
pub struct Signals {
    descriptor: SignalFd,
}

/// What Docker passes on to a container without a terminal.
pub const FORWARDED: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

impl Signals {
    /// Takes these signals for this process. Every thread that is started later inherits it; none
    /// may have been started before.
    pub fn take(signals: &[Signal]) -> Result<Signals> {
        let mut set = SigSet::empty();
        for signal in signals {
            set.add(*signal);
        }
        set.thread_block().context(|| "block signals")?;
        let descriptor = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .context(|| "make a descriptor of signals")?;
        Ok(Signals { descriptor })
    }

    /// The next signal, if one has come.
    pub fn next(&self) -> Option<Signal> {
        let information = self.descriptor.read_signal().ok().flatten()?;
        Signal::try_from(information.ssi_signo as i32).ok()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Undoes for a process what its parent blocked.
pub fn unblock_all() {
    // Cannot fail: the arguments are constants.
    let _ = SigSet::empty().thread_set_mask();
}
