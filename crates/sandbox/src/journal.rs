//! The output of a container in the host's journal, line by line (systemd-journald, its native
//! protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).
//!
//! Called by the hub. A message is one datagram; lines are cut so that it is always small enough.
//! A journal that takes nothing for [`SEND_TIMEOUT`] loses lines and does not keep the container
//! from running.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::net::SendFlags;
use tokio::net::UnixDatagram;

use crate::error::{Error, Result};
use crate::log::Stream;

/// Where journald takes messages.
pub const SOCKET: &str = "/run/systemd/journal/socket";

/// Longest piece of a line in one message, as Docker's.
const LINE: usize = 16 * 1024;

/// Most bytes of all fields beside the line: a datagram has room for some 200 KiB
/// (`net.core.wmem_default`), and each line repeats them.
const MAX_FIELDS: usize = 16 * 1024;

/// How long the container waits for a journal that is busy.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Writes the lines of one container.
#[derive(Debug)]
pub struct Journal {
    place: &'static Path,
    /// Connected: the kernel says when the journal has taken what was sent.
    socket: Option<UnixDatagram>,
    /// The message that is being made; it begins with the fields that all messages have.
    message: Vec<u8>,
    /// How long those are.
    fields: usize,
    /// The line that each stream has begun.
    lines: [Vec<u8>; 2],
    /// The last message was lost: the next is not waited for.
    lost: bool,
}

/// The fields as they are sent.
///
/// # Errors
/// `InvalidArgument`: they are too long, or one has a name that journald does not take.
pub fn encode(fields: &[(String, String)]) -> Result<Vec<u8>> {
    let mut encoded = Vec::new();
    for (name, value) in fields {
        if !is_name(name) {
            return Err(Error::invalid(format!(
                "journal: {name:?} is no name of a field"
            )));
        }
        put(&mut encoded, name, value.as_bytes());
    }
    match encoded.len() {
        0..=MAX_FIELDS => Ok(encoded),
        length => Err(Error::invalid(format!(
            "journal: the fields of a line are {length} bytes, more than {MAX_FIELDS}"
        ))
        .hint("name fewer labels and variables")),
    }
}

impl Journal {
    /// A writer whose messages have these fields, names and values.
    ///
    /// # Errors
    /// Those of [`encode`].
    pub fn new(fields: &[(String, String)]) -> Result<Self> {
        Self::at(Path::new(SOCKET), fields)
    }

    fn at(place: &'static Path, fields: &[(String, String)]) -> Result<Self> {
        let message = encode(fields)?;
        Ok(Self {
            place,
            socket: None,
            fields: message.len(),
            message,
            lines: Default::default(),
            lost: false,
        })
    }

    /// Writes the lines that end in a piece of output. When the journal takes nothing, the rest of
    /// the piece is lost with its first line.
    pub async fn append(&mut self, stream: Stream, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (mut text, ends) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            loop {
                let line = &mut self.lines[index(stream)];
                let (now, later) = text.split_at(text.len().min(LINE - line.len()));
                line.extend_from_slice(now);
                if later.is_empty() && (ends || line.len() < LINE) {
                    break;
                }
                text = later;
                if !self.send(stream, true).await {
                    return;
                }
            }
            if ends && !self.send(stream, false).await {
                return;
            }
        }
    }

    /// Writes lines that have not ended.
    pub async fn finish(&mut self) {
        for stream in [Stream::Output, Stream::Error] {
            if !self.lines[index(stream)].is_empty() {
                self.send(stream, false).await;
            }
        }
    }

    /// Sends the line of a stream, of which more is to come if it is `partial`; whether it arrived.
    async fn send(&mut self, stream: Stream, partial: bool) -> bool {
        self.message.truncate(self.fields);
        // syslog's numbers of "informational" and "error".
        let priority = match stream {
            Stream::Output => "6",
            Stream::Error => "3",
        };
        put(&mut self.message, "PRIORITY", priority.as_bytes());
        if partial {
            put(&mut self.message, "CONTAINER_PARTIAL_MESSAGE", b"true");
        }
        let line = &mut self.lines[index(stream)];
        // Terminals end lines with both.
        let text = line.strip_suffix(b"\r").unwrap_or(line);
        put(&mut self.message, "MESSAGE", text);
        line.clear();
        let mut sent = self.deliver().await;
        if sent.as_ref().is_err_and(is_of_another_life) {
            self.socket = None;
            sent = self.deliver().await;
        }
        match sent {
            Ok(()) => self.lost = false,
            // Reported once, then the journal has a gap.
            Err(error) if !self.lost => {
                self.lost = true;
                tracing::error!("cannot write output to the journal: {error}");
            }
            Err(_) => {}
        }
        !self.lost
    }

    async fn deliver(&mut self) -> io::Result<()> {
        let socket = match &self.socket {
            Some(socket) => socket,
            None => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(self.place)?;
                self.socket.insert(socket)
            }
        };
        if self.lost {
            // Asks the kernel, where the socket would first wait to be told.
            let sent = rustix::net::send(socket, &self.message, SendFlags::DONTWAIT);
            return sent.map(drop).map_err(io::Error::from);
        }
        match tokio::time::timeout(SEND_TIMEOUT, socket.send(&self.message)).await {
            Ok(sent) => sent.map(drop),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Whether the journal that a socket was connected to is gone. Another may be there.
fn is_of_another_life(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionRefused | ConnectionReset | NotConnected
    )
}

fn index(stream: Stream) -> usize {
    match stream {
        Stream::Output => 0,
        Stream::Error => 1,
    }
}

/// journald's rule: capitals, digits and underscores, at most 64, not beginning with a digit or an
/// underscore (those are its own).
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    name.len() <= 64
        && name.bytes().all(allowed)
        && name
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_uppercase())
}

/// Adds a field in the form that may have any bytes.
fn put(message: &mut Vec<u8>, name: &str, value: &[u8]) {
    message.extend_from_slice(name.as_bytes());
    message.push(b'\n');
    message.extend_from_slice(&(value.len() as u64).to_le_bytes());
    message.extend_from_slice(value);
    message.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixDatagram as StdDatagram;

    use super::*;

    /// A journal's socket, and a writer to it.
    fn journal(fields: &[(String, String)]) -> (tempfile::TempDir, StdDatagram, Journal) {
        let directory = tempfile::tempdir().unwrap();
        let place: &'static Path = directory.path().join("socket").leak();
        let socket = StdDatagram::bind(place).unwrap();
        socket.set_nonblocking(true).unwrap();
        (directory, socket, Journal::at(place, fields).unwrap())
    }

    /// The fields of the next message.
    fn next(socket: &StdDatagram) -> Option<Vec<(String, String)>> {
        let mut buffer = vec![0; 1 << 20];
        let length = socket.recv(&mut buffer).ok()?;
        let mut rest = &buffer[..length];
        let mut fields = Vec::new();
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let name = String::from_utf8_lossy(&rest[..end]).into_owned();
            let length = u64::from_le_bytes(rest[end + 1..end + 9].try_into().unwrap());
            let value = &rest[end + 9..][..usize::try_from(length).unwrap()];
            fields.push((name, String::from_utf8_lossy(value).into_owned()));
            rest = &rest[end + 10 + value.len()..];
        }
        Some(fields)
    }

    fn message(fields: &[(String, String)]) -> &str {
        let found = fields.iter().find(|(name, _)| name == "MESSAGE");
        found.map_or("", |(_, value)| value)
    }

    #[tokio::test]
    async fn lines_become_messages_with_the_streams_priority() {
        let own = [("CONTAINER_NAME".to_owned(), "web\n1".to_owned())];
        let (_directory, socket, mut journal) = journal(&own);
        journal.append(Stream::Output, b"one\r\n\ntw").await;
        journal.append(Stream::Error, b"wrong\n").await;
        journal.append(Stream::Output, b"o\nthree").await;
        journal.finish().await;
        let mut seen = Vec::new();
        while let Some(fields) = next(&socket) {
            assert_eq!(fields[0], own[0]);
            seen.push((fields[1].1.clone(), message(&fields).to_owned()));
        }
        let seen: Vec<(&str, &str)> = seen.iter().map(|(a, b)| (&a[..], &b[..])).collect();
        assert_eq!(
            seen,
            [
                ("6", "one"),
                ("6", ""),
                ("3", "wrong"),
                ("6", "two"),
                ("6", "three")
            ]
        );
    }

    #[tokio::test]
    async fn long_lines_come_in_parts() {
        let (_directory, socket, mut journal) = journal(&[]);
        for length in [LINE - 1, LINE, LINE + 1, 2 * LINE] {
            let line = "x".repeat(length);
            journal
                .append(Stream::Output, format!("{line}\n").as_bytes())
                .await;
            let mut whole = String::new();
            while let Some(fields) = next(&socket) {
                let text = message(&fields);
                assert!(text.len() <= LINE);
                whole.push_str(text);
                let partial = fields
                    .iter()
                    .any(|(name, _)| name.ends_with("PARTIAL_MESSAGE"));
                assert_eq!(partial, whole.len() < length, "{length}");
            }
            assert_eq!(whole, line);
        }
    }

    #[tokio::test]
    async fn a_journal_that_is_gone_loses_lines_and_comes_back() {
        let (directory, socket, mut journal) = journal(&[]);
        let place = directory.path().join("socket");
        drop(socket);
        std::fs::remove_file(&place).unwrap();
        journal.append(Stream::Output, b"lost\n").await;
        let socket = StdDatagram::bind(&place).unwrap();
        journal.append(Stream::Output, b"kept\n").await;
        assert_eq!(message(&next(&socket).unwrap()), "kept");
    }

    #[tokio::test(start_paused = true)]
    async fn a_journal_that_is_busy_is_waited_for_and_then_lines_are_lost() {
        let (_directory, socket, mut journal) = journal(&[]);
        // As many as the socket keeps for a journal that reads none.
        let mut sent = 0;
        while journal.send(Stream::Output, false).await {
            sent += 1;
        }
        assert!((1..100_000).contains(&sent), "{sent}");
        // Of what follows nothing is waited for.
        journal.append(Stream::Output, b"lost\nlost, too\n").await;
        for _ in 0..sent {
            assert_eq!(message(&next(&socket).unwrap()), "");
        }
        assert_eq!(next(&socket), None);
        journal.append(Stream::Output, b"kept\n").await;
        assert_eq!(message(&next(&socket).unwrap()), "kept");
    }

    #[tokio::test]
    async fn a_line_waits_until_the_journal_has_room() {
        let (_directory, socket, mut journal) = journal(&[]);
        let mut sent = 0;
        journal.lost = true;
        while journal.send(Stream::Output, false).await {
            // What is marked as lost is tried without waiting.
            journal.lost = true;
            sent += 1;
        }
        journal.lost = false;
        let reader = async {
            tokio::task::yield_now().await;
            (0..=sent).filter_map(|_| next(&socket)).count()
        };
        let (arrived, taken) = tokio::join!(journal.send(Stream::Output, false), reader);
        assert!(arrived);
        assert!(taken >= sent, "{taken} of {sent}");
    }

    #[tokio::test]
    async fn fields_are_checked() {
        let field = |name: &str, value: &str| [(name.to_owned(), value.to_owned())];
        for name in ["", "_PID", "1A", "a", "A B", "Ä", &"A".repeat(65)] {
            assert!(Journal::new(&field(name, "x")).is_err(), "{name}");
        }
        assert!(Journal::new(&field("A", &"x".repeat(MAX_FIELDS))).is_err());
        assert!(Journal::new(&field("A_1", "x")).is_ok());
    }
}
