//! The terminal of a process, opened in the container's own devpts.
//!
//! Runs in the child. The container controls what is at its /dev/pts: everything is checked on the
//! opened descriptor, and the slave comes from the kernel, not from a path.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::Box as ConsoleSize;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::error::{Context, CreateError, Result};
use super::sys;

/// Both ends of a terminal.
pub(super) struct Terminal {
    /// For the agent, non-blocking.
    pub(super) master: OwnedFd,
    /// For the process.
    pub(super) slave: OwnedFd,
}

/// Opens a new terminal below `root`, the container's root directory.
pub(super) fn open(root: BorrowedFd<'_>, size: Option<ConsoleSize>) -> Result<Terminal> {
    const WHAT: &str = "cannot open a terminal in the container's /dev/pts";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let master = rustix::fs::openat2(
        root,
        c"dev/pts/ptmx",
        flags,
        Mode::empty(),
        ResolveFlags::IN_ROOT,
    )
    .context(|| WHAT)?;
    let stat = rustix::fs::fstat(&master).context(|| WHAT)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
        || stat.st_rdev != rustix::fs::makedev(5, 2)
    {
        return Err(CreateError::other(
            WHAT,
            "what is there is not a devpts file system",
        ));
    }
    rustix::pty::unlockpt(&master).context(|| WHAT)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .context(|| WHAT)?;
    if let Some(size) = size {
        let side = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        let size = Winsize {
            ws_row: side(size.height()),
            ws_col: side(size.width()),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size)
            .context(|| "cannot set process.consoleSize")?;
    }
    Ok(Terminal { master, slave })
}

/// Makes `slave` the controlling terminal of this process, which must lead a session.
pub(super) fn control(slave: BorrowedFd<'_>) -> Result<()> {
    sys::ioctl_number(slave.as_fd(), libc::TIOCSCTTY, 0)
        .context(|| "cannot make the terminal the controlling one")
}
