//! Simulated terminals: a command on a pty that is its session's controlling terminal; or the
//! master of a container's terminal, as an engine has it.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::Invocation;

/// A command on a pty.
pub struct Terminal {
    what: String,
    master: Option<File>,
    /// Kept open to read the terminal's modes.
    slave: Option<OwnedFd>,
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    began: Instant,
    limit: Duration,
}

impl Terminal {
    /// Starts a command on a terminal of this size (rows, columns).
    pub fn start(invocation: Invocation, rows: u16, columns: u16) -> Terminal {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).unwrap();
        tcsetwinsize(&master, size(rows, columns)).unwrap();

        // A new session, whose controlling terminal is its standard input.
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

        let master = File::from(master);
        let output = collect(&master);
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

    /// Types input.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.master
            .as_mut()
            .expect("the terminal is closed")
            .write_all(bytes.as_ref())
            .unwrap();
    }

    /// Waits until `text` was shown.
    pub fn wait_for(&mut self, text: &str) {
        while !self.screen().contains(text) {
            if self.began.elapsed() > self.limit || self.child.try_wait().unwrap().is_some() {
                // The last output may still be in transit.
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

    /// All output so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Changes the terminal's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(self.master.as_ref().unwrap(), size(rows, columns)).unwrap();
    }

    /// Whether the terminal echoes input, as it does before and after a command that uses raw mode.
    pub fn echoes(&self) -> bool {
        tcgetattr(self.slave.as_ref().unwrap())
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    }

    /// Hangs up the terminal.
    pub fn hang_up(&mut self) {
        // The reading thread's copy keeps the terminal alive, so send SIGHUP as the kernel would.
        let session = rustix::process::Pid::from_child(&self.child);
        self.slave = None;
        self.master = None;
        let _ = rustix::process::kill_process_group(session, rustix::process::Signal::HUP);
    }

    /// Waits until the command exits; returns its exit status.
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

/// The master of a terminal that a runtime sent to a console socket.
pub struct Console {
    master: File,
    output: Arc<Mutex<Vec<u8>>>,
    /// Tells the reading thread to release the terminal.
    closing: Arc<AtomicBool>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Waits for a runtime to send a master.
    pub fn receive(listener: &UnixListener) -> Console {
        listener.set_nonblocking(true).unwrap();
        let mut accepted = None;
        crate::eventually("a terminal is sent", Duration::from_secs(20), || {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let (stream, _) = accepted.unwrap();
        stream.set_nonblocking(false).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 256];
        let received = recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut name)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap();
        assert!(received.bytes > 0, "a terminal has a name");
        let mut sent = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<OwnedFd>>(),
            _ => Vec::new(),
        });
        let master = File::from(sent.next().expect("a descriptor comes with it"));
        let output = Arc::new(Mutex::new(Vec::new()));
        let closing = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (mut master, output) = (master.try_clone().unwrap(), output.clone());
            let closing = closing.clone();
            move || {
                let mut chunk = vec![0; 64 << 10];
                let while_open = Timespec {
                    tv_sec: 0,
                    tv_nsec: 10_000_000,
                };
                while !closing.load(Ordering::Relaxed) {
                    let mut ready = [PollFd::new(&master, PollFlags::IN)];
                    match poll(&mut ready, Some(&while_open)) {
                        Ok(0) => continue,
                        _ => match master.read(&mut chunk) {
                            Ok(n @ 1..) => output.lock().unwrap().extend_from_slice(&chunk[..n]),
                            // EIO once the terminal has no users.
                            _ => return,
                        },
                    }
                }
            }
        });
        Console {
            master,
            output,
            closing,
            reader,
        }
    }

    /// Hangs up the terminal.
    pub fn hang_up(self) {
        self.closing.store(true, Ordering::Relaxed);
        self.reader.join().unwrap();
    }

    /// Types input.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.master.write_all(bytes.as_ref()).unwrap();
    }

    /// All output so far.
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    /// Waits until `text` was shown.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let begin = Instant::now();
        while !self.screen().contains(text) {
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "no {text:?} on the terminal: {:?}",
                self.screen()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Changes the terminal's size.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.master, size(rows, columns)).unwrap();
    }
}

/// Collects a terminal's output.
fn collect(master: &File) -> Arc<Mutex<Vec<u8>>> {
    let output = Arc::new(Mutex::new(Vec::new()));
    let into = output.clone();
    let mut reader = master.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut chunk = vec![0; 64 << 10];
        // Ends with EIO once the terminal has no users.
        while let Ok(n @ 1..) = reader.read(&mut chunk) {
            into.lock().unwrap().extend_from_slice(&chunk[..n]);
        }
    });
    output
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
