//! A person at a terminal: a command on a pseudo-terminal of its own, as its session's controlling terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::Invocation;

/// A command on a terminal.
pub struct Terminal {
    what: String,
    master: Option<File>,
    /// Kept open to look at the terminal's modes.
    slave: Option<OwnedFd>,
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    began: Instant,
    limit: Duration,
}

impl Terminal {
    /// Starts a command on a terminal of this size.
    pub fn start(invocation: Invocation, rows: u16, columns: u16) -> Terminal {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        tcsetwinsize(&master, size(rows, columns)).unwrap();

        // A session of its own, whose controlling terminal is its standard input.
        let (mut command, limit) = invocation
            .under(&["setsid", "--ctty", "--wait"])
            .into_parts();
        let what = format!("{command:?}");
        let end = || Stdio::from(slave.try_clone().unwrap());
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();

        let output = Arc::new(Mutex::new(Vec::new()));
        let into = output.clone();
        let master = File::from(master);
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut chunk = vec![0; 64 << 10];
            // Ends with EIO when nobody has the terminal any more.
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                into.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        });
        Terminal {
            what,
            master: Some(master),
            slave: Some(slave),
            child,
            output,
            began: Instant::now(),
            limit,
        }
    }

    /// Types.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.master
            .as_mut()
            .expect("the terminal is closed")
            .write_all(bytes.as_ref())
            .unwrap();
    }

    /// Waits until the screen has shown `text`.
    pub fn wait_for(&mut self, text: &str) {
        while !self.screen().contains(text) {
            if self.began.elapsed() > self.limit || self.child.try_wait().unwrap().is_some() {
                // What was written last may be under way still.
                std::thread::sleep(Duration::from_millis(200));
                if self.screen().contains(text) {
                    return;
                }
                let _ = self.child.kill();
                panic!(
                    "{}: no {text:?} on the terminal: {:?}",
                    self.what,
                    self.screen()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything shown until now.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Changes the size of the window.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(self.master.as_ref().unwrap(), size(rows, columns)).unwrap();
    }

    /// Whether the terminal echoes what is typed, as it does before and after a command that takes it over.
    pub fn echoes(&self) -> bool {
        tcgetattr(self.slave.as_ref().unwrap())
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    }

    /// Closes the window.
    pub fn hang_up(&mut self) {
        // The reading thread's copy keeps the terminal alive, so its end is told as the kernel would.
        let session = rustix::process::Pid::from_child(&self.child);
        self.slave = None;
        self.master = None;
        let _ = rustix::process::kill_process_group(session, rustix::process::Signal::HUP);
    }

    /// Waits for the end of the command; its exit status.
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            if self.began.elapsed() > self.limit {
                let _ = self.child.kill();
                panic!(
                    "{}: still running after {:?}: {:?}",
                    self.what,
                    self.limit,
                    self.screen()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
