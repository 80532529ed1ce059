//! Terminals: a pty on the host, whose master is sent to the engine's console socket.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use hull_sandbox::error::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Opens a pty of this size (rows, columns), sends its master to `socket`, and returns its slave.
///
/// # Errors
/// Nothing listens on the socket, or no pty is available.
pub fn send_master(socket: &Path, size: Option<(u16, u16)>) -> Result<OwnedFd> {
    let doing = || "make a terminal".to_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).context(doing)?;
    grantpt(&master).context(doing)?;
    unlockpt(&master).context(doing)?;
    let name = ptsname(&master, Vec::new()).context(doing)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(&name, flags, Mode::empty()).context(doing)?;
    if let Some((ws_row, ws_col)) = size {
        let size = Winsize {
            ws_row,
            ws_col,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).context(doing)?;
    }
    let sending = || format!("send the terminal to {}", socket.display());
    let stream = UnixStream::connect(socket).context(sending)?;
    // The message is the pty's name, as with runc.
    hull_ipc::packet::send(&stream, name.as_bytes(), &[master.as_fd()]).context(sending)?;
    Ok(slave)
}
