//! What a user sees if a sandbox refuses, has another protocol version, or dies.

use std::process::{Child, Output};

use hull_sandbox::control::protocol::{Hello, OLDEST, Reply, VERSION, send};
use hull_sandbox::error::{Error, ErrorKind};
use hull_sandbox::log::Writer;
use hull_sandbox::store::Exit;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use crate::fake::{Connection, Fake, stderr, while_stopped};

fn assert_fails(output: &Output, code: i32, text: &str) {
    let shown = stderr(output);
    assert_eq!((output.status.code(), &*shown), (Some(code), text));
    assert!(output.stdout.is_empty());
}

#[test]
fn a_sandbox_process_that_dies_is_an_error_of_hull() {
    let gone = "error: the sandbox process has ended: it was killed, or it broke down\n";
    // Before its greeting, before its answer, and while the process runs.
    for stage in 0..3 {
        let Some(fake) = Fake::new(false) else { return };
        let child = fake.hull("exec web true").spawn().unwrap();
        let connection = match stage {
            0 => fake.accept(),
            _ => fake.exec().1,
        };
        if stage == 2 {
            let [output, error] = connection.hand_over();
            drop((output, error));
        }
        drop(connection);
        assert_fails(&child.wait_with_output().unwrap(), 125, gone);
    }
}

#[test]
fn a_container_whose_sandbox_process_is_gone_does_not_run() {
    let Some(fake) = Fake::new(false) else { return };
    let mut command = fake.hull("exec web true");
    let _directory = fake.die();
    let text = "error: container web is not running: it is stopped\n";
    assert_fails(&command.output().unwrap(), 1, text);
}

#[test]
fn failures_keep_their_words_and_status() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web nothing").spawn().unwrap();
    let (_, connection) = fake.exec();
    let error = Error::with_kind(ErrorKind::CommandNotFound, "nothing: command not found");
    connection.answer(&Reply::Failed(error.hint("look")));
    let text = "error: nothing: command not found\nhint: look\n";
    assert_fails(&child.wait_with_output().unwrap(), 127, text);
}

#[test]
fn what_a_sandbox_cannot_do_is_said_in_one_clear_line() {
    let Some(fake) = Fake::new(false) else { return };
    // The answer of a sandbox that an older hull started.
    let error = Error::unsupported("call \"exec\": this sandbox was started by hull 0.0.9");
    let failed = Reply::Failed(error.hint("start the container anew"));
    let text = "error: not supported: call \"exec\": this sandbox was started by hull 0.0.9\n\
                hint: start the container anew\n";
    for line in ["exec web true", "attach web", "kill web"] {
        let child = fake.hull(line).spawn().unwrap();
        let (_, connection) = fake.request();
        connection.answer(&failed);
        assert_fails(&child.wait_with_output().unwrap(), 125, text);
    }
}

#[test]
fn every_kind_of_failure_has_its_status() {
    let Some(fake) = Fake::new(false) else { return };
    for (kind, status) in [
        ("not_found", 1),
        ("exists", 125),
        ("wrong_state", 1),
        ("invalid_argument", 125),
        ("unsupported", 125),
        ("command_not_found", 127),
        ("not_executable", 126),
        ("guest_failed", 125),
        ("gone", 125),
        ("host", 125),
        // A kind added by a newer hull.
        ("out_of_tea", 125),
    ] {
        let child = fake.hull("exec web x").spawn().unwrap();
        let (_, connection) = fake.exec();
        // The message comes from the guest: control characters must not reach the terminal.
        let reply = json!({"failed": {"kind": kind, "message": "a\nb\u{1b}[31mc"}});
        send(&connection.socket, &reply, &[]).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_fails(&output, status, "error: a b\u{fffd}[31mc\n");
    }
}

#[test]
fn the_reason_of_an_end_is_told() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("attach web").spawn().unwrap();
    let (_, connection) = fake.request();
    let streams: [_; 3] = connection.hand_over();
    drop(streams);
    connection.answer(&Reply::Exited(Exit::because(
        125,
        "the guest kernel panicked",
    )));
    let text = "error: container web: the guest kernel panicked\n";
    assert_fails(&child.wait_with_output().unwrap(), 125, text);
}

#[test]
fn a_sandbox_of_a_newer_hull_is_used() {
    let Some(fake) = Fake::new(false) else { return };
    let child = fake.hull("exec web true").spawn().unwrap();
    let connection = fake.accept();
    connection.take_greeting();
    // Additions of a newer hull to its replies are ignored.
    let hello = json!({"hello": {"version": VERSION + 7, "build": "hull 99", "mood": "calm"}});
    send(&connection.socket, &hello, &[]).unwrap();
    connection.request();
    let [output, error] = connection.hand_over();
    drop((output, error));
    let exited = json!({"exited": {"status": 5, "at_ns": 1, "weather": "fair"}});
    send(&connection.socket, &exited, &[]).unwrap();
    assert_fails(&child.wait_with_output().unwrap(), 5, "");
}

#[test]
fn a_sandbox_that_is_too_old_is_named() {
    let Some(fake) = Fake::new(false) else { return };
    let old = Hello {
        version: OLDEST - 1,
        build: "hull 0.0.1".into(),
    };
    let text = format!(
        "error: not supported: the sandbox was started by hull 0.0.1, whose control protocol {} \
         is too old for {}\n",
        old.version,
        Hello::own().build
    );
    Writer::open(fake.container(), 1 << 20).unwrap();
    for line in ["exec web true", "attach web", "kill web", "logs -f web"] {
        let child = fake.hull(line).spawn().unwrap();
        let connection = fake.accept();
        connection.greet(old.clone());
        assert_fails(&child.wait_with_output().unwrap(), 125, &text);
    }
}

/// Refuses the greeting, as a sandbox that no longer supports this version.
fn refuse(connection: Connection) -> &'static str {
    let error = Error::unsupported("hull 0.1.0 speaks version 1, hull 99 answers 7 and later");
    connection.answer(&Reply::Failed(error.hint("update hull")));
    "error: not supported: hull 0.1.0 speaks version 1, hull 99 answers 7 and later\n\
     hint: update hull\n"
}

#[test]
fn a_sandbox_that_refuses_this_hull_says_so_whether_or_not_it_reads_on() {
    let Some(fake) = Fake::new(false) else { return };
    Writer::open(fake.container(), 1 << 20).unwrap();
    for line in ["exec web true", "attach web", "kill web", "logs -f web"] {
        let child: Child = fake.hull(line).spawn().unwrap();
        let connection = fake.accept();
        connection.take_greeting();
        // The first request has arrived, and stays unread when the connection is closed.
        connection.wait_for_request();
        let mut text = "";
        while_stopped(&child, || text = refuse(connection));
        assert_fails(&child.wait_with_output().unwrap(), 125, text);
    }
}

#[test]
fn a_sandbox_that_refuses_this_hull_before_the_first_request_says_so() {
    let Some(fake) = Fake::new(false) else { return };
    let config = std::fs::read(fake.config()).unwrap();
    std::fs::remove_file(fake.config()).unwrap();
    // Read between the greeting and the request: the command blocks there.
    mknodat(
        CWD,
        fake.config(),
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .unwrap();
    let child = fake.hull("exec web true").spawn().unwrap();
    let connection = fake.accept();
    connection.take_greeting();
    let text = refuse(connection);
    std::fs::write(fake.config(), config).unwrap();
    assert_fails(&child.wait_with_output().unwrap(), 125, text);
}

#[test]
fn answers_that_make_no_sense_are_errors() {
    let Some(fake) = Fake::new(false) else { return };
    for (reply, text) in [
        (
            json!({"levitating": {}}),
            "error: cannot read the answer of the sandbox process: a message cannot be parsed: ",
        ),
        (
            json!("ok"),
            "error: the sandbox process answered Ok\nhint: ",
        ),
        (
            json!("streams"),
            "error: the sandbox handed over too few streams\n",
        ),
    ] {
        let child = fake.hull("exec web true").spawn().unwrap();
        let (_, connection) = fake.exec();
        send(&connection.socket, &reply, &[]).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(125));
        assert!(stderr(&output).starts_with(text), "{}", stderr(&output));
    }
}
