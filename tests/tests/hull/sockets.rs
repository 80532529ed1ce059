//! Unix sockets of the host in containers: a server on the host is reached from the guest.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hull_tests::{Hull, eventually, on_every_machine, unix_client_program};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

on_every_machine!(
    a_server_of_the_host_answers_at_its_mounted_socket,
    many_connections_at_once_reach_the_server_and_each_has_its_own_answer
);

/// A server's socket that everybody may connect to.
fn server(hull: &Hull) -> (UnixListener, PathBuf) {
    let path = hull.scratch().join("server.sock");
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
    (listener, path)
}

/// Options of `hull run`: the client at /client, the socket at /run/server.sock.
fn options(socket: &Path) -> [String; 4] {
    let client = unix_client_program();
    [
        "-v".into(),
        format!("{}:/client:ro", client.display()),
        "-v".into(),
        format!("{}:/run/server.sock", socket.display()),
    ]
}

/// Runs the client in a container.
fn client(hull: &Hull, socket: &Path, more: &[&str], arguments: &[&str]) -> hull_tests::Output {
    let options = options(socket);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let command = [&["/client", "/run/server.sock"], arguments].concat();
    hull.run(&[&options, more].concat(), &command)
}

/// What a peer is to the server: user and group.
fn peer(stream: &UnixStream) -> (u32, u32) {
    let peer = socket_peercred(stream).unwrap();
    (peer.uid.as_raw(), peer.gid.as_raw())
}

fn a_server_of_the_host_answers_at_its_mounted_socket(machine: &'static str) {
    const LENGTH: usize = 3 << 20;
    let hull = Hull::on(machine);
    let (listener, path) = server(&hull);
    let serving = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut question = Vec::new();
        // To the end: the client has closed that direction only.
        stream.read_to_end(&mut question).unwrap();
        stream.write_all(&question).unwrap();
        (question.len(), peer(&stream))
    });
    let question: Vec<u8> = (0..=250u8).cycle().take(LENGTH).collect();
    let options = options(&path);
    let output = hull
        .hull([
            "run",
            "--rm",
            "-i",
            "--network",
            "none",
            "--user",
            "1234:77",
        ])
        .args(&options)
        .args(["busybox", "/client", "/run/server.sock", "talk"])
        .input(question.clone())
        .run()
        .ok();
    assert!(output.stdout == question);
    assert_eq!(serving.join().unwrap(), (LENGTH, (1234, 77)));
}

fn many_connections_at_once_reach_the_server_and_each_has_its_own_answer(machine: &'static str) {
    const CONNECTIONS: usize = 200;
    let hull = Hull::on(machine);
    let (listener, path) = server(&hull);
    let serving = thread::spawn(move || {
        let mut streams = Vec::new();
        for _ in 0..CONNECTIONS {
            streams.push(listener.accept().unwrap().0);
        }
        for mut stream in streams {
            let mut number = [0; 4];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&number).unwrap();
        }
    });
    let output = client(&hull, &path, &[], &["many", "200"]).ok();
    assert_eq!(output.text(), "200 answers");
    serving.join().unwrap();
}

#[test]
fn a_server_that_is_gone_refuses_and_one_that_does_not_listen_yet_can_be_tried_again() {
    let hull = Hull::new();
    let (listener, path) = server(&hull);
    drop(listener);
    let output = client(&hull, &path, &[], &["try"]);
    assert_eq!(output.text(), "Connection refused");

    let path = hull.scratch().join("later.sock");
    let later = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&later, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    let options = options(&path);
    let mut client = hull
        .hull(["run", "--rm", "-i", "--network", "none"])
        .args(&options)
        .args(["busybox", "/client", "/run/server.sock", "again"])
        .start();
    client.wait_for("Connection refused\n");
    listen(&later, 1).unwrap();
    client.write("\n");
    let output = client.finish().ok();
    // The same socket, which the client has opened once.
    assert_eq!(
        output.text(),
        "Connection refused\nconnected /run/server.sock"
    );
}

#[test]
fn permissions_of_the_socket_count_for_the_user_in_the_container() {
    let hull = Hull::new();
    let (listener, path) = server(&hull);
    chown(&path, Some(0), Some(4321)).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o660)).unwrap();
    let tries = |more: &[&str]| client(&hull, &path, more, &["try"]).text();
    assert_eq!(tries(&["--user", "1000:1000"]), "Permission denied");
    for user in ["0:0", "1000:4321"] {
        assert_eq!(tries(&["--user", user]), "connected /run/server.sock");
        let (stream, _) = listener.accept().unwrap();
        let (uid, gid) = user.split_once(':').unwrap();
        let named = (uid.parse().unwrap(), gid.parse().unwrap());
        assert_eq!(peer(&stream), named);
    }
}

#[test]
fn a_socket_in_a_shared_directory_leads_nowhere_but_to_processes_of_the_guest() {
    let hull = Hull::new();
    let (listener, path) = server(&hull);
    listener.set_nonblocking(true).unwrap();
    let program = format!("{}:/client:ro", unix_client_program().display());
    let directory = format!("{}:/d", path.parent().unwrap().display());
    let script = "/client /d/server.sock try
                  /client /d/guest.sock serve & until [ -S /d/guest.sock ]; do sleep 0.05; done
                  sleep 0.2; /client /d/guest.sock talk </dev/null";
    let output = hull.sh(&["-v", &program, "-v", &directory], script).ok();
    assert_eq!(output.text(), "Connection refused\nfrom the guest");
    assert!(listener.accept().is_err());
}

#[test]
fn either_end_that_goes_away_is_seen_by_the_other() {
    let hull = Hull::new();
    let (listener, path) = server(&hull);
    let options = options(&path);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let script = "/client /run/server.sock hold & echo $! >/tmp/client; sleep 1000";
    let container = hull.start(&options, &["sh", "-c", script]);
    let (mut held, _) = listener.accept().unwrap();
    let limit = Some(Duration::from_secs(20));
    held.set_read_timeout(limit).unwrap();
    // The client is killed.
    container.sh("kill -9 $(cat /tmp/client)").ok();
    assert_eq!(held.read(&mut [0]).unwrap(), 0);
    eventually(
        "the server sees that nobody reads",
        Duration::from_secs(20),
        || held.write_all(b"x").is_err(),
    );
    // The server closes without a word.
    let serving = thread::spawn(move || drop(listener.accept().unwrap()));
    let output = container
        .sh("/client /run/server.sock talk </dev/null")
        .ok();
    assert_eq!(output.text(), "");
    serving.join().unwrap();
}

#[test]
fn a_client_that_is_killed_while_it_connects_leaves_the_others_alone() {
    let hull = Hull::new();
    let path = hull.scratch().join("full.sock");
    let full = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&full, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(full.as_fd(), 0).unwrap();
    // Its queue is full: whoever connects now waits.
    let _first = UnixStream::connect(&path).unwrap();
    let options = options(&path);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let script = "/client /run/server.sock try & sleep 0.5; kill -9 $!; wait $!; echo killed
                  /client /run/server.sock signal";
    let mut container = hull
        .hull(["run", "--rm", "--network", "none"])
        .args(&options)
        .args(["busybox", "sh", "-c", script])
        .start();
    container.wait_for("killed\nInterrupted system call\n");
    // The one that was interrupted tries again and waits until there is room.
    std::thread::sleep(Duration::from_secs(1));
    drop(rustix::net::accept(&full).unwrap());
    let output = container.finish().ok();
    assert_eq!(
        output.text(),
        "killed\nInterrupted system call\nconnected /run/server.sock"
    );
    let accepted = rustix::net::accept(&full).unwrap();
    assert_eq!(rustix::io::read(&accepted, &mut [0; 1]), Ok(0));
}

/// What a server does with its only connection, and what the client then prints.
fn talk(arguments: &[&str], serve: impl FnOnce(UnixStream) + Send + 'static) -> String {
    let hull = Hull::new();
    let (listener, path) = server(&hull);
    let serving = thread::spawn(move || serve(listener.accept().unwrap().0));
    let output = client(&hull, &path, &[], arguments).ok();
    serving.join().unwrap();
    let text = output.text();
    let answer = text.strip_prefix("connected /run/server.sock\n");
    answer.map(str::to_owned).unwrap_or(text)
}

#[test]
fn an_answer_is_whole_for_a_client_that_reads_it_late() {
    let said = talk(&["slow"], |mut stream| {
        stream.read_to_end(&mut Vec::new()).unwrap();
        stream.write_all(&vec![7; 600_000]).unwrap();
    });
    assert_eq!(said, "600000 bytes");
}

#[test]
fn an_answer_arrives_that_comes_before_the_question_has_ended() {
    let said = talk(&["early"], |mut stream| {
        stream.read_exact(&mut [0; 4096]).unwrap();
        stream.write_all(b"too long").unwrap();
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        // What was not read does not become an error of the client's.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    });
    assert_eq!(said, "too long");
}

#[test]
fn a_client_that_only_waits_sees_that_the_server_is_gone() {
    assert_eq!(talk(&["idle"], drop), "gone");
}

#[test]
fn descriptors_are_refused_where_they_are_sent() {
    let said = talk(&["pass"], |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"");
    });
    assert_eq!(said, "Operation not permitted");
}
