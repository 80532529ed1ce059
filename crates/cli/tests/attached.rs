//! The caller's side of a container, against a sandbox process that this test plays: what goes over the connection,
//! and what a user sees of it. No machine is started. Needs root, as hull does.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use hull_sandbox::wire::{self, Kind, Reply, Request, Size};
use hull_sandbox::{Exit, Failure};
use rustix::fs::{FlockOperation, flock};
use rustix::pty;
use rustix::termios::{self, LocalModes, Winsize};

/// A container that only this test knows, and what its sandbox process was asked.
struct Fake {
    directory: tempfile::TempDir,
    requests: Receiver<(Request, UnixStream)>,
    _lock: File,
}

impl Fake {
    /// A running container called `web`. `None` without root.
    fn new(terminal: bool) -> Option<Fake> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let paths =
            hull_sandbox::Paths::new(directory.path().join("run"), directory.path().join("data"));
        let id = "ab".repeat(32);
        let container = paths.container(&id);
        std::fs::create_dir_all(&container.run).unwrap();
        std::fs::create_dir_all(&container.data).unwrap();
        hull_sandbox::names::claim(&paths, "web", &id).unwrap();
        let lock = File::create(container.lock()).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let record = serde_json::json!({
            "version": hull_sandbox::record::VERSION, "id": id, "name": "web", "image": "busybox", "image_id": "x",
            "command": ["sh"], "created": 1, "started": 1, "state": "running", "machine": "uml", "kernel": "/k",
            "memory": 1, "cpus": 1, "terminal": terminal, "stdin": true, "auto_remove": false, "stop_signal": "TERM",
            "network": "none", "labels": {}, "volumes": [], "layers": [],
            "processes": {"sandbox": 0, "devices": 0, "machine": 0},
        });
        std::fs::write(container.state(), serde_json::to_vec(&record).unwrap()).unwrap();
        let config = format!(
            "run_dir = {:?}\ndata_dir = {:?}\n",
            paths.run(),
            paths.data()
        );
        std::fs::write(directory.path().join("config.toml"), config).unwrap();
        let listener = UnixListener::bind(container.socket()).unwrap();
        let (sender, requests) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let mut payload = Vec::new();
                if let Ok(Some(Kind::Request)) = wire::read_frame(&stream, &mut payload) {
                    let request = wire::from_json(&payload).unwrap();
                    if sender.send((request, stream)).is_err() {
                        return;
                    }
                }
            }
        });
        Some(Fake {
            directory,
            requests,
            _lock: lock,
        })
    }

    fn data(&self) -> PathBuf {
        self.directory
            .path()
            .join("data/containers")
            .join("ab".repeat(32))
    }

    fn hull(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
        command
            .args(line.split_whitespace())
            .env("HULL_CONFIG", self.directory.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn request(&self) -> (Request, UnixStream) {
        self.requests.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// The next request, answered with `Ok`.
    fn accept(&self) -> (Request, UnixStream) {
        let (request, stream) = self.request();
        wire::write_json(&stream, Kind::Reply, &Reply::Ok).unwrap();
        (request, stream)
    }
}

fn end(stream: &UnixStream, status: i32) {
    let exit = Exit {
        status,
        reason: None,
        oom_killed: false,
        at: 2,
    };
    wire::write_json(stream, Kind::Exit, &exit).unwrap();
}

fn frame(stream: &UnixStream) -> (Kind, Vec<u8>) {
    let mut payload = Vec::new();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let kind = wire::read_frame(stream, &mut payload).unwrap().unwrap();
    (kind, payload)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn output_goes_to_both_streams_and_the_exit_status_is_passed_on() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web sh -c x").spawn().unwrap();
    let (request, stream) = fake.accept();
    let Request::Exec(exec) = request else {
        panic!("{request:?}")
    };
    assert_eq!(
        exec.command,
        [b"sh".to_vec(), b"-c".to_vec(), b"x".to_vec()]
    );
    assert!(!exec.stdin && !exec.terminal && !exec.detach);
    wire::write_frame(&stream, Kind::Output, b"out\xff").unwrap();
    wire::write_frame(&stream, Kind::ErrorOutput, b"err").unwrap();
    end(&stream, 42);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\xff"[..], &b"err"[..])
    );
}

#[test]
fn input_is_passed_on_to_its_end() {
    let Some(fake) = Fake::new(false) else { return };
    let mut child = fake
        .hull("exec -i web cat")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let (_, stream) = fake.accept();
    stdin.write_all(b"one").unwrap();
    assert_eq!(frame(&stream), (Kind::Input, b"one".to_vec()));
    drop(stdin);
    assert_eq!(frame(&stream), (Kind::InputEnd, Vec::new()));
    end(&stream, 0);
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn much_output_waits_for_a_slow_reader_without_loss_and_without_memory() {
    let Some(fake) = Fake::new(false) else { return };
    const LENGTH: usize = 100 << 20;
    let mut child = fake.hull("exec web cat").spawn().unwrap();
    let (_, stream) = fake.accept();
    let writer = std::thread::spawn(move || {
        let chunk: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        let mut left = LENGTH;
        while left > 0 {
            let length = left.min(chunk.len());
            wire::write_frame(&stream, Kind::Output, &chunk[..length]).unwrap();
            left -= length;
        }
        end(&stream, 0);
    });
    std::thread::sleep(Duration::from_millis(500));
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let resident: usize = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .unwrap()
        .parse()
        .unwrap();
    assert!(resident < 4096, "{resident} kB");
    let mut output = Vec::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    writer.join().unwrap();
    assert_eq!(output.len(), LENGTH);
    let expected = |i: usize| (i % 100_000 % 251) as u8;
    assert!(
        output
            .iter()
            .enumerate()
            .all(|(i, byte)| *byte == expected(i))
    );
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_closed_output_ends_the_command() {
    let Some(fake) = Fake::new(false) else { return };
    let mut child = fake.hull("exec web yes").spawn().unwrap();
    let (_, stream) = fake.accept();
    drop(child.stdout.take());
    wire::write_frame(&stream, Kind::Output, b"y\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(141), "")
    );
}

#[test]
fn a_sandbox_process_that_dies_is_an_error_of_hull() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web true").spawn().unwrap();
    let (_, stream) = fake.accept();
    drop(stream);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).starts_with("error: "),
        "{}",
        stderr(&output)
    );
}

#[test]
fn failures_keep_their_words_and_status() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web nothing").spawn().unwrap();
    let (_, stream) = fake.request();
    let failure = Failure::new("nothing: command not found")
        .hint("look")
        .code(127);
    wire::write_json(&stream, Kind::Reply, &Reply::Failed(failure)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(
        stderr(&output),
        "error: nothing: command not found\nhint: look\n"
    );
}

fn kill(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

#[test]
fn signals_reach_the_container_even_when_it_reads_no_input() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake
        .hull("attach web")
        .stdin(File::open("/dev/zero").unwrap())
        .spawn()
        .unwrap();
    let (request, stream) = fake.accept();
    assert!(matches!(
        request,
        Request::Attach {
            stdin: true,
            size: None
        }
    ));
    // Its input is never read: the connection is full by now.
    std::thread::sleep(Duration::from_millis(300));
    for (signal, number) in [
        (rustix::process::Signal::INT, 2),
        (rustix::process::Signal::USR1, 10),
    ] {
        kill(&child, signal);
        let (request, _) = fake.request();
        assert!(
            matches!(request, Request::Signal { signal, all: false } if signal == number),
            "{request:?}"
        );
    }
    end(&stream, 130);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
}

/// A terminal: what a user holds, and what the command gets.
fn terminal() -> (File, OwnedFd) {
    let controller = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
    pty::grantpt(&controller).unwrap();
    pty::unlockpt(&controller).unwrap();
    let name = pty::ptsname(&controller, Vec::new()).unwrap();
    let user = File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    resize(&user, 24, 80);
    (File::from(controller), user.into())
}

fn resize(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    termios::tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn a_terminal_is_raw_while_attached_and_its_size_follows() {
    let Some(fake) = Fake::new(true) else { return };
    let (mut user, terminal) = terminal();
    let is_raw = || {
        let modes = termios::tcgetattr(&terminal).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO)
    };
    let child = fake
        .hull("attach web")
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .spawn()
        .unwrap();
    let (request, stream) = fake.accept();
    let size = |rows, columns| Size { rows, columns };
    let Request::Attach {
        stdin: true,
        size: asked,
    } = request
    else {
        panic!("{request:?}")
    };
    assert_eq!(asked, Some(size(24, 80)));
    let (kind, payload) = frame(&stream);
    assert_eq!(
        (kind, wire::from_json::<Size>(&payload).unwrap()),
        (Kind::Resize, size(24, 80))
    );
    assert!(is_raw());
    user.write_all(b"\x03").unwrap();
    assert_eq!(frame(&stream), (Kind::Input, vec![3]));
    resize(&terminal, 50, 132);
    kill(&child, rustix::process::Signal::WINCH);
    let (kind, payload) = frame(&stream);
    assert_eq!(
        (kind, wire::from_json::<Size>(&payload).unwrap()),
        (Kind::Resize, size(50, 132))
    );
    wire::write_frame(&stream, Kind::Output, b"hello").unwrap();
    let mut seen = [0; 5];
    user.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello");
    user.write_all(b"\x10\x11").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(0), "read escape sequence\n")
    );
    assert!(!is_raw());
}

#[test]
fn a_terminal_is_restored_when_the_command_is_terminated() {
    let Some(fake) = Fake::new(true) else { return };
    let (_user, terminal) = terminal();
    let child = fake
        .hull("attach web")
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .spawn()
        .unwrap();
    let (_, stream) = fake.accept();
    assert_eq!(frame(&stream).0, Kind::Resize);
    kill(&child, rustix::process::Signal::TERM);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    let modes = termios::tcgetattr(&terminal).unwrap().local_modes;
    assert!(modes.contains(LocalModes::ICANON | LocalModes::ISIG));
}

#[test]
fn a_terminal_without_a_terminal_is_refused_only_with_input() {
    let Some(fake) = Fake::new(false) else { return };
    let output = fake.hull("exec -it web sh").output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).starts_with("error: the input device is not a TTY\n"));
    let child = fake.hull("exec -t web sh").spawn().unwrap();
    let (request, stream) = fake.accept();
    let Request::Exec(exec) = request else {
        panic!("{request:?}")
    };
    assert!(exec.terminal && !exec.stdin && exec.size.is_none());
    end(&stream, 0);
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn logs_are_followed_to_the_end() {
    let Some(fake) = Fake::new(false) else { return };
    use hull_sandbox::log::{Stream, Writer};
    let mut log = Writer::create(&fake.data().join("log"), 1 << 20).unwrap();
    log.append(Stream::Output, b"one\ntwo\n").unwrap();
    log.append(Stream::Error, b"three\n").unwrap();
    let output = fake.hull("logs --tail 2 web").output().unwrap();
    assert_eq!(
        (&output.stdout[..], stderr(&output).as_str()),
        (&b"two\n"[..], "three\n")
    );
    let mut child = fake.hull("logs -f web").spawn().unwrap();
    let (request, stream) = fake.request();
    assert!(matches!(request, Request::Wait));
    let mut stdout = child.stdout.take().unwrap();
    let mut seen = [0; 8];
    stdout.read_exact(&mut seen).unwrap();
    log.append(Stream::Output, b"four\n").unwrap();
    stdout.read_exact(&mut seen[..5]).unwrap();
    assert_eq!(&seen[..5], b"four\n");
    log.append(Stream::Output, b"five\n").unwrap();
    drop(stream);
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"five\n");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_directory_is_copied_into_an_existing_one() {
    let Some(fake) = Fake::new(false) else { return };
    let source = fake.directory.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "text").unwrap();
    let child = fake
        .hull(&format!("cp {} web:/srv", source.display()))
        .spawn()
        .unwrap();
    let (request, stream) = fake.accept();
    assert!(matches!(request, Request::CopyOut { path, follow: true } if path == b"/srv"));
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_path("srv/").unwrap();
    header.set_size(0);
    header.set_cksum();
    wire::write_frame(&stream, Kind::Output, header.as_bytes()).unwrap();
    let (request, stream) = fake.accept();
    assert!(matches!(request, Request::CopyIn { path } if path == b"/srv"));
    let mut archive = Vec::new();
    loop {
        match frame(&stream) {
            (Kind::Input, bytes) => archive.extend(bytes),
            (Kind::InputEnd, _) => break,
            other => panic!("{other:?}"),
        }
    }
    end(&stream, 0);
    assert!(child.wait_with_output().unwrap().status.success());
    let mut archive = tar::Archive::new(&archive[..]);
    let names: Vec<PathBuf> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().into())
        .collect();
    assert_eq!(
        names,
        [PathBuf::from("source"), PathBuf::from("source/file")]
    );
}

#[test]
fn one_failure_does_not_keep_others_from_their_turn() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("kill -s HUP nothing web").spawn().unwrap();
    let (request, _stream) = fake.accept();
    assert!(matches!(
        request,
        Request::Signal {
            signal: 1,
            all: false
        }
    ));
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(1), &b"web\n"[..])
    );
    assert!(
        stderr(&output).starts_with("error: no such container: nothing\n"),
        "{}",
        stderr(&output)
    );
}
