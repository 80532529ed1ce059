//! QEMU's monitor: commands and answers in JSON, one per line (QEMU's docs/interop/qmp-spec).
//!
//! QEMU processes guest input, so its answers are not trusted: lines and answers are limited in
//! size, answers have a deadline, and only their success or failure is used. Error texts are
//! displayed, sanitized.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::text::printable;

/// Timeout of a command. QEMU completes its disks' requests before it stops.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes read for one answer. These include the events since the last one, which QEMU limits
/// to a few a second.
const MAX_ANSWER: usize = 4 << 20;

/// Longest line.
const MAX_LINE: usize = 64 << 10;

/// Maximum length of a displayed error text.
const MAX_TEXT: usize = 200;

type Message = serde_json::Map<String, Value>;

/// QEMU's answer to a command: success, or the reason of a failure.
type Answer = Result<(), String>;

/// Connection to a monitor.
#[derive(Debug)]
pub struct Monitor {
    stream: UnixStream,
    stage: Stage,
    /// An incomplete line.
    partial: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// QEMU's greeting has not been read.
    Connected,
    /// Commands are accepted.
    Ready,
    /// An answer was missed: the next one may be to an earlier command.
    Broken,
}

impl Monitor {
    /// Creates a monitor and QEMU's end of its connection.
    ///
    /// # Errors
    /// EMFILE.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        let monitor = Self {
            stream: ours,
            stage: Stage::Connected,
            partial: Vec::new(),
        };
        Ok((monitor, theirs.into()))
    }

    /// Executes a command without arguments. The first one sets up the connection.
    ///
    /// # Errors
    /// The reason: QEMU rejects the command, does not answer in time, sends invalid data, or has
    /// ended.
    pub fn execute(&mut self, command: &str) -> Result<(), String> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let stage = std::mem::replace(&mut self.stage, Stage::Broken);
        if stage == Stage::Broken {
            return Err("QEMU's monitor is out of step".into());
        }
        let mut budget = MAX_ANSWER;
        if stage == Stage::Connected {
            self.expect(deadline, &mut budget, |message| {
                message.contains_key("QMP").then_some(Ok(()))
            })??;
            self.send(deadline, "qmp_capabilities")?;
            self.expect(deadline, &mut budget, answer)??;
        }
        self.send(deadline, command)?;
        let outcome = self.expect(deadline, &mut budget, answer)?;
        self.stage = Stage::Ready;
        outcome
    }

    fn send(&mut self, deadline: Instant, command: &str) -> Result<(), String> {
        let mut line = json!({ "execute": command }).to_string();
        line.push('\n');
        self.stream
            .set_write_timeout(Some(remaining(deadline)?))
            .and_then(|()| self.stream.write_all(line.as_bytes()))
            .map_err(|error| failure(&error))
    }

    /// Reads messages until `wanted` returns a result for one; others are events.
    fn expect(
        &mut self,
        deadline: Instant,
        budget: &mut usize,
        wanted: impl Fn(&Message) -> Option<Answer>,
    ) -> Result<Answer, String> {
        loop {
            let line = self.line(deadline, budget)?;
            let Ok(Value::Object(message)) = serde_json::from_slice(&line) else {
                return Err("QEMU's monitor does not send JSON objects".into());
            };
            if let Some(result) = wanted(&message) {
                return Ok(result);
            }
            if !message.contains_key("event") {
                return Err("QEMU's monitor sends an unexpected message".into());
            }
        }
    }

    fn line(&mut self, deadline: Instant, budget: &mut usize) -> Result<Vec<u8>, String> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let rest = self.partial.split_off(end + 1);
                return Ok(std::mem::replace(&mut self.partial, rest));
            }
            if self.partial.len() > MAX_LINE || *budget == 0 {
                return Err("QEMU's monitor sends too much".into());
            }
            let mut buffer = [0; 4096];
            let most = buffer.len().min(*budget);
            self.stream
                .set_read_timeout(Some(remaining(deadline)?))
                .map_err(|error| failure(&error))?;
            match self.stream.read(&mut buffer[..most]) {
                Ok(0) => return Err("QEMU has closed its monitor".into()),
                Ok(length) => {
                    self.partial.extend_from_slice(&buffer[..length]);
                    *budget -= length;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failure(&error)),
            }
        }
    }
}

/// The answer in a message, if it is one.
fn answer(message: &Message) -> Option<Answer> {
    if message.contains_key("return") {
        return Some(Ok(()));
    }
    let error = message.get("error")?;
    let text = error
        .get("desc")
        .and_then(Value::as_str)
        .unwrap_or("refused");
    let shown: String = text.chars().take(MAX_TEXT).collect();
    Some(Err(printable(&shown)))
}

fn remaining(deadline: Instant) -> Result<Duration, String> {
    match deadline.checked_duration_since(Instant::now()) {
        Some(left) if !left.is_zero() => Ok(left),
        _ => Err("QEMU does not answer".into()),
    }
}

fn failure(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "QEMU does not answer".into(),
        _ => format!("QEMU's monitor: {error}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::thread::JoinHandle;

    /// A monitor whose QEMU sends `first`, then one of `answers` per command.
    fn monitor(first: &str, answers: &[&str]) -> (Monitor, JoinHandle<Vec<String>>) {
        let (monitor, theirs) = Monitor::new().unwrap();
        let mut stream = UnixStream::from(theirs);
        let first = first.to_owned();
        let answers: Vec<String> = answers.iter().map(|text| (*text).to_owned()).collect();
        let thread = std::thread::spawn(move || {
            let mut commands = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut got = Vec::new();
            // The monitor may have closed the connection because of invalid data.
            let _ = stream.write_all(first.as_bytes());
            for answer in answers {
                match commands.next() {
                    Some(Ok(command)) => got.push(command),
                    _ => break,
                }
                let _ = stream.write_all(answer.as_bytes());
            }
            got
        });
        (monitor, thread)
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";
    const DONE: &str = "{\"return\": {}}\r\n";

    #[test]
    fn the_first_command_sets_the_connection_up() {
        let events = "{\"event\": \"STOP\", \"timestamp\": {}}\r\n{\"return\": {}}\r\n";
        let (mut monitor, thread) = monitor(GREETING, &[DONE, events, DONE]);
        assert_eq!(monitor.execute("stop"), Ok(()));
        assert_eq!(monitor.execute("cont"), Ok(()));
        assert_eq!(
            thread.join().unwrap(),
            [
                "{\"execute\":\"qmp_capabilities\"}",
                "{\"execute\":\"stop\"}",
                "{\"execute\":\"cont\"}"
            ]
        );
    }

    #[test]
    fn a_refusal_is_shown_clean_and_leaves_the_connection_usable() {
        let no = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\\u001b[2J\"}}\r\n";
        let (mut monitor, thread) = monitor(GREETING, &[DONE, no, DONE]);
        assert_eq!(monitor.execute("stop"), Err("no\u{fffd}[2J".into()));
        assert_eq!(monitor.execute("stop"), Ok(()));
        thread.join().unwrap();
    }

    #[test]
    fn hostile_answers_are_errors() {
        let endless = "x".repeat(2 * MAX_LINE);
        let nested = format!("{}\n", "[".repeat(MAX_LINE / 2));
        let events = "{\"event\": 1}\n".repeat(MAX_ANSWER / 12 + 1);
        for (first, reason) in [
            ("hello\n", "does not send JSON objects"),
            ("[]\n", "does not send JSON objects"),
            ("{}\n", "an unexpected message"),
            ("{\"return\": {}}\n", "an unexpected message"),
            (endless.as_str(), "sends too much"),
            (nested.as_str(), "does not send JSON objects"),
            (events.as_str(), "sends too much"),
            ("", "has closed its monitor"),
        ] {
            let (mut monitor, thread) = monitor(first, &[]);
            let error = monitor.execute("stop").unwrap_err();
            assert!(error.contains(reason), "{error}, not {reason}");
            let again = monitor.execute("stop").unwrap_err();
            assert!(again.contains("out of step"), "{again}");
            drop(monitor);
            thread.join().unwrap();
        }
    }

    proptest::proptest! {
        /// Parts of the protocol and other bytes, in any order: an answer or an error, without
        /// delay, because the connection ends after them.
        #[test]
        fn any_bytes_are_an_answer_or_an_error(pieces in proptest::collection::vec(
            proptest::prop_oneof![
                proptest::strategy::Just(GREETING.as_bytes().to_vec()),
                proptest::strategy::Just(DONE.as_bytes().to_vec()),
                proptest::strategy::Just(b"{\"event\": {}}\n".to_vec()),
                proptest::strategy::Just(b"{\"error\": {\"desc\": 7}}\n".to_vec()),
                proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..40),
            ],
            0..8,
        )) {
            let (mut monitor, theirs) = Monitor::new().unwrap();
            let mut stream = UnixStream::from(theirs);
            stream.write_all(&pieces.concat()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let start = Instant::now();
            let first = monitor.execute("stop");
            let second = monitor.execute("cont");
            proptest::prop_assert!(start.elapsed() < ANSWER_TIMEOUT);
            // Nothing is accepted after an answer was missed.
            let ready = monitor.stage == Stage::Ready;
            proptest::prop_assert!(second.is_err() || first.is_ok() || ready);
        }
    }
}
