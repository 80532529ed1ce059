//! The caller's side of a container, against a fake sandbox process: what is sent over the
//! connection, and what a user sees. No machine is started. Needs root, as hull does.
#![allow(clippy::unwrap_used)]

mod failures;
mod fake;
mod terminals;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use hull_sandbox::config::Stdio as ProcessStdio;
use hull_sandbox::control::protocol::{AttachOptions, CopyRequest, Reply, Request};
use hull_sandbox::error::Error;
use hull_sandbox::log::{Stream, Writer};
use hull_sandbox::store::Exit;
use rustix::process::Signal;
use serde_json::{Value, json};

use fake::{Fake, kill, resident, stderr, zeros};

/// Anonymous memory that a command which holds no stream's content stays below, in kilobytes: far
/// below what the tests pass through it, and above the 4 MB of a build that counts what was run.
const MEMORY: usize = 16 << 10;

#[test]
fn output_goes_to_both_streams_and_the_exit_status_is_passed_on() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web sh -c x").spawn().unwrap();
    let (config, connection) = fake.exec();
    let process: Value = serde_json::from_str(config.process.get()).unwrap();
    assert_eq!(process["args"], json!(["sh", "-c", "x"]));
    assert_eq!(process["env"], json!(["PATH=/bin"]));
    let stdio = ProcessStdio::Handover {
        terminal: false,
        stdin: false,
    };
    assert_eq!(config.stdio, stdio);
    assert_eq!((config.keeper, config.size), (None, None));
    let [mut output, mut error] = connection.hand_over();
    output.write_all(b"out\xff").unwrap();
    error.write_all(b"err").unwrap();
    drop((output, error));
    connection.exit(42);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\xff"[..], &b"err"[..])
    );
}

#[test]
fn output_that_is_still_to_be_read_when_the_process_has_ended_is_not_lost() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web sh").spawn().unwrap();
    let (_, connection) = fake.exec();
    let [mut output, error] = connection.hand_over();
    connection.exit(3);
    drop((connection, error));
    std::thread::sleep(Duration::from_millis(100));
    output.write_all(b"last").unwrap();
    drop(output);
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(3), &b"last"[..])
    );
    assert_eq!(stderr(&output), "");
}

#[test]
fn a_detached_process_is_not_waited_for() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec -d -i web sleep 9").spawn().unwrap();
    let (config, connection) = fake.exec();
    assert_eq!(config.stdio, ProcessStdio::Null);
    let [] = connection.hand_over();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(connection.next().is_none());
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
    let (config, connection) = fake.exec();
    let stdio = ProcessStdio::Handover {
        terminal: false,
        stdin: true,
    };
    assert_eq!(config.stdio, stdio);
    let [mut input, output, error] = connection.hand_over();
    stdin.write_all(b"one").unwrap();
    let mut seen = [0; 3];
    input.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"one");
    drop(stdin);
    assert_eq!(input.read(&mut seen).unwrap(), 0);
    drop((output, error));
    connection.exit(0);
    assert!(child.wait_with_output().unwrap().status.success());
}

#[test]
fn a_process_that_closes_its_input_goes_on() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake
        .hull("exec -i web head")
        .stdin(zeros())
        .spawn()
        .unwrap();
    let (_, connection) = fake.exec();
    let [input, mut output, error] = connection.hand_over();
    drop(input);
    std::thread::sleep(Duration::from_millis(100));
    output.write_all(b"on").unwrap();
    drop((output, error));
    connection.exit(0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), &output.stdout[..], &*stderr(&output)),
        (Some(0), &b"on"[..], "")
    );
}

#[test]
fn much_output_waits_for_a_slow_reader_without_loss_and_without_memory() {
    let Some(fake) = Fake::new(false) else { return };
    const LENGTH: usize = 100 << 20;
    let mut child = fake.hull("exec web cat").spawn().unwrap();
    let (_, connection) = fake.exec();
    let [mut output, error] = connection.hand_over();
    let writer = std::thread::spawn(move || {
        let chunk: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        let mut left = LENGTH;
        while left > 0 {
            let length = left.min(chunk.len());
            output.write_all(&chunk[..length]).unwrap();
            left -= length;
        }
        drop((output, error));
        connection.exit(0);
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(!writer.is_finished());
    let memory = resident(&child);
    assert!(memory < MEMORY, "{memory} kB");
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
fn much_input_waits_for_a_slow_process_without_memory() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec -i web wc").stdin(zeros()).spawn().unwrap();
    let (_, connection) = fake.exec();
    let [input, output, error] = connection.hand_over();
    std::thread::sleep(Duration::from_millis(500));
    let memory = resident(&child);
    assert!(memory < MEMORY, "{memory} kB");
    drop((output, error));
    connection.exit(0);
    assert!(child.wait_with_output().unwrap().status.success());
    drop(input);
}

#[test]
fn a_closed_output_ends_the_command() {
    let Some(fake) = Fake::new(false) else { return };
    let mut child = fake.hull("exec web yes").spawn().unwrap();
    let (_, connection) = fake.exec();
    let [mut output, _error] = connection.hand_over();
    drop(child.stdout.take());
    output.write_all(b"y\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), stderr(&output).as_str()),
        (Some(141), "")
    );
    // Closing the connection tells the sandbox that the output is no longer read.
    assert!(connection.next().is_none());
}

#[test]
fn signals_reach_the_container_even_when_it_reads_no_input() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("attach web").stdin(zeros()).spawn().unwrap();
    let (request, connection) = fake.request();
    let Request::Attach(request) = request else {
        panic!("{request:?}")
    };
    let options = AttachOptions {
        stdin: true,
        size: None,
    };
    assert_eq!(
        (request.container, request.options),
        (fake.id.clone(), options)
    );
    let [_input, output, error] = connection.hand_over();
    // Its input is never read, so the stream is full by now.
    std::thread::sleep(Duration::from_millis(300));
    for (signal, number) in [(Signal::INT, 2), (Signal::USR1, 10)] {
        kill(&child, signal);
        let request = connection.request();
        assert!(
            matches!(request, Request::Forward(signal) if signal == number),
            "{request:?}"
        );
    }
    drop((output, error));
    connection.exit(130);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
}

#[test]
fn a_signal_ends_exec_and_not_its_process() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web sleep 9").spawn().unwrap();
    let (_, connection) = fake.exec();
    let [_output, _error] = connection.hand_over();
    kill(&child, Signal::TERM);
    child.wait_with_output().unwrap();
    // No signal is sent to the process before the connection is closed.
    assert!(connection.next().is_none());
}

#[test]
fn logs_are_followed_to_the_end() {
    let ended = Reply::Ended(Exit::now(0));
    // Both the container's end and the sandbox process's end complete it.
    for answer in [None, Some(ended)] {
        let Some(fake) = Fake::new(false) else { return };
        let mut log = Writer::open(fake.container(), 1 << 20).unwrap();
        log.append(Stream::Output, b"one\ntwo\n").unwrap();
        log.append(Stream::Error, b"three\n").unwrap();
        let output = fake.hull("logs --tail 2 web").output().unwrap();
        assert_eq!(
            (&output.stdout[..], stderr(&output).as_str()),
            (&b"two\n"[..], "three\n")
        );
        let mut child = fake.hull("logs -f web").spawn().unwrap();
        let (request, connection) = fake.request();
        assert!(
            matches!(&request, Request::Wait { container } if *container == fake.id),
            "{request:?}"
        );
        let mut stdout = child.stdout.take().unwrap();
        let mut seen = [0; 8];
        stdout.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"one\ntwo\n");
        log.append(Stream::Output, b"four\n").unwrap();
        stdout.read_exact(&mut seen[..5]).unwrap();
        assert_eq!(&seen[..5], b"four\n");
        log.append(Stream::Output, b"five\n").unwrap();
        if let Some(answer) = &answer {
            connection.answer(answer);
        }
        drop(connection);
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"five\n");
        assert!(child.wait().unwrap().success());
    }
}

fn copy(request: Request) -> CopyRequest {
    match request {
        Request::Copy(copy) => copy,
        other => panic!("{other:?}"),
    }
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
    let (request, connection) = fake.request();
    let asked = copy(request);
    assert_eq!((&*asked.container, &*asked.path), (&*fake.id, "/srv"));
    assert!(asked.follow && !asked.into);
    let [mut stream] = connection.hand_over();
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_path("srv/").unwrap();
    header.set_size(0);
    header.set_cksum();
    stream.write_all(header.as_bytes()).unwrap();
    let (request, connection) = fake.request();
    let asked = copy(request);
    assert_eq!((&*asked.container, &*asked.path), (&*fake.id, "/srv"));
    assert!(asked.into);
    let [mut stream] = connection.hand_over();
    let mut archive = Vec::new();
    stream.read_to_end(&mut archive).unwrap();
    connection.answer(&Reply::Ok);
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
fn a_copy_that_fails_in_the_guest_says_why() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("cp web:/nothing -").spawn().unwrap();
    let (request, connection) = fake.request();
    let asked = copy(request);
    assert_eq!((&*asked.path, asked.follow), ("/nothing", false));
    let [stream] = connection.hand_over();
    drop(stream);
    let failed = Error::not_found("/nothing: No such file or directory");
    connection.answer(&Reply::Failed(failed));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "error: cannot copy /nothing from container web: /nothing: No such file or directory\n"
    );
}

#[test]
fn one_failure_does_not_keep_others_from_their_turn() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("kill -s HUP nothing web").spawn().unwrap();
    let (request, connection) = fake.request();
    assert!(
        matches!(
            &request,
            Request::Signal { container, signal: 1, all: false } if *container == fake.id
        ),
        "{request:?}"
    );
    connection.answer(&Reply::Ok);
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
