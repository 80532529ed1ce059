//! The caller's terminal: raw mode that is always undone, and its size. Used by the attached forms
//! of run, exec and attach. Never reads or writes the terminal's data.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::termios::{self, OptionalActions, Termios};

/// Raw mode of a terminal; dropping it restores what was before.
#[derive(Debug)]
pub struct RawMode {
    terminal: OwnedFd,
    before: Termios,
}

impl RawMode {
    /// Puts `terminal` into raw mode: every key goes through, Ctrl-C too.
    pub fn enable(terminal: BorrowedFd<'_>) -> io::Result<RawMode> {
        let terminal = terminal.try_clone_to_owned()?;
        let before = termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(RawMode { terminal, before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Rows and columns of the terminal on `fd`; `None` when it is not a terminal or does not know.
pub fn size(fd: impl AsFd) -> Option<(u16, u16)> {
    let size = termios::tcgetwinsize(fd).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::pty;

    fn open_terminal() -> (OwnedFd, std::fs::File) {
        let controller = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
        pty::grantpt(&controller).unwrap();
        pty::unlockpt(&controller).unwrap();
        let name = pty::ptsname(&controller, Vec::new()).unwrap();
        let user = std::fs::File::options()
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        (controller, user)
    }

    #[test]
    fn raw_mode_is_undone() {
        let (_controller, user) = open_terminal();
        let local = termios::LocalModes::ICANON | termios::LocalModes::ISIG;
        let before = termios::tcgetattr(&user).unwrap().local_modes;
        assert!(before.contains(local));
        let raw = RawMode::enable(user.as_fd()).unwrap();
        assert!(
            !termios::tcgetattr(&user)
                .unwrap()
                .local_modes
                .intersects(local)
        );
        drop(raw);
        assert_eq!(termios::tcgetattr(&user).unwrap().local_modes, before);
    }

    #[test]
    fn size_of_a_terminal_and_of_none() {
        let (controller, user) = open_terminal();
        assert_eq!(size(&user), None);
        let winsize = termios::Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        termios::tcsetwinsize(&controller, winsize).unwrap();
        assert_eq!(size(&user), Some((24, 80)));
        assert_eq!(size(std::fs::File::open("/dev/null").unwrap()), None);
    }
}
