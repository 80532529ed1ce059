//! Containers and processes with a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use hull_sandbox::config::{Stdio, TerminalSize};
use hull_sandbox::control::protocol::{AttachOptions, Request};
use rustix::process::Signal;
use rustix::pty;
use rustix::termios::{self, LocalModes, Winsize};

use crate::fake::{Connection, Fake, kill, stderr, while_stopped};

/// A pty: the user's master, and the slave for the command.
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

fn resize(terminal: impl AsFd, rows: u16, columns: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    termios::tcsetwinsize(terminal, size).unwrap();
}

fn size(rows: u16, columns: u16) -> TerminalSize {
    TerminalSize { rows, columns }
}

/// Reads a resize request.
fn resized(connection: &Connection) -> TerminalSize {
    match connection.request() {
        Request::Resize(size) => size,
        other => panic!("{other:?}"),
    }
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
    let (request, connection) = fake.request();
    let Request::Attach(request) = request else {
        panic!("{request:?}")
    };
    let options = AttachOptions {
        stdin: true,
        size: Some(size(24, 80)),
    };
    assert_eq!(request.options, options);
    let [mut stream] = connection.hand_over();
    assert_eq!(resized(&connection), size(24, 80));
    assert!(is_raw());
    user.write_all(b"\x03").unwrap();
    let mut typed = [0];
    stream.read_exact(&mut typed).unwrap();
    assert_eq!(typed, [3]);
    resize(&terminal, 50, 132);
    kill(&child, Signal::WINCH);
    assert_eq!(resized(&connection), size(50, 132));
    stream.write_all(b"hello").unwrap();
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
    // The keys did not reach the container, and only the connection ended.
    assert_eq!(stream.read(&mut typed).unwrap(), 0);
    assert!(connection.next().is_none());
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
    let (_, connection) = fake.request();
    let [_stream] = connection.hand_over();
    resized(&connection);
    let modes = || termios::tcgetattr(&terminal).unwrap().local_modes;
    assert!(!modes().intersects(LocalModes::ICANON | LocalModes::ISIG));
    kill(&child, Signal::TERM);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(143));
    assert!(modes().contains(LocalModes::ICANON | LocalModes::ISIG));
}

#[test]
fn a_terminal_is_restored_when_the_sandbox_process_dies() {
    let Some(fake) = Fake::new(true) else { return };
    let (_user, terminal) = terminal();
    let child = fake
        .hull("attach web")
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal.try_clone().unwrap())
        .spawn()
        .unwrap();
    let (_, connection) = fake.request();
    let [stream] = connection.hand_over();
    resized(&connection);
    drop((stream, connection));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).starts_with("error: "),
        "{}",
        stderr(&output)
    );
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
    let (config, connection) = fake.exec();
    let stdio = Stdio::Handover {
        terminal: true,
        stdin: false,
    };
    assert_eq!((config.stdio, config.size), (stdio, None));
    let [stream] = connection.hand_over();
    drop(stream);
    connection.exit(0);
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn an_end_counts_that_crosses_a_change_of_size() {
    let Some(fake) = Fake::new(false) else { return };
    let (_user, terminal) = terminal();
    let child = fake
        .hull("exec -t web true")
        .stdout(terminal)
        .spawn()
        .unwrap();
    let (config, connection) = fake.exec();
    assert_eq!(config.size, Some(size(24, 80)));
    let [stream] = connection.hand_over();
    // The size that the command sends is never read: the connection is closed first.
    connection.wait_for_request();
    while_stopped(&child, || {
        drop(stream);
        connection.exit(7);
        drop(connection);
    });
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(7), ""));
}
