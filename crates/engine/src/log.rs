//! The output of a container as `hull logs` shows it: cut into lines, and followed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::log::{Entry, Stream};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use serde_json::Value;

use crate::container::{self, Container};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::time::{self, UnixNanos};

/// Cuts entries into lines: which are shown, and what they begin with.
#[derive(Debug)]
pub struct Lines {
    since: Option<UnixNanos>,
    until: Option<UnixNanos>,
    timestamps: bool,
    /// What lines begin with, before their times.
    pub prefix: String,
    /// What lines begin with, after their times.
    pub details: String,
    /// Lines that are not shown.
    pub skip: usize,
    /// Lines begun so far.
    pub begun: usize,
    /// For each stream, whether its last line has not ended, and whether that line is shown.
    streams: [OpenLine; 2],
}

#[derive(Clone, Copy, Debug, Default)]
struct OpenLine {
    open: bool,
    shown: bool,
}

impl Lines {
    /// Lines of what was written at or after `since`, and not after `until`.
    pub fn new(since: Option<UnixNanos>, until: Option<UnixNanos>, timestamps: bool) -> Lines {
        Lines {
            since,
            until,
            timestamps,
            prefix: String::new(),
            details: String::new(),
            skip: 0,
            begun: 0,
            streams: Default::default(),
        }
    }

    fn is_wanted(&self, entry: &Entry) -> bool {
        let at = i128::from(entry.time);
        self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at <= until)
    }

    /// Counts the lines of an entry.
    pub fn count(&mut self, entry: &Entry) {
        self.format(entry);
    }

    /// What is printed of an entry.
    pub fn format(&mut self, entry: &Entry) -> Vec<u8> {
        let mut text = Vec::with_capacity(entry.bytes.len());
        if !self.is_wanted(entry) {
            return text;
        }
        let index = match entry.stream {
            Stream::Output => 0,
            Stream::Error => 1,
        };
        for piece in entry.bytes.split_inclusive(|byte| *byte == b'\n') {
            let line = &mut self.streams[index];
            if !line.open {
                self.begun += 1;
                line.shown = self.begun > self.skip;
                if line.shown {
                    text.extend_from_slice(self.prefix.as_bytes());
                }
                if line.shown && self.timestamps {
                    text.extend_from_slice(time::format_rfc3339(i128::from(entry.time)).as_bytes());
                    text.push(b' ');
                }
                if line.shown {
                    text.extend_from_slice(self.details.as_bytes());
                }
            }
            line.open = !piece.ends_with(b"\n");
            if line.shown {
                text.extend_from_slice(piece);
            }
        }
        text
    }
}

/// What is kept beside each line of a container, as `logs --details` shows it: labels, variables
/// and a tag, if its log options name some, and a space. Escaped as in URLs, as Docker does: they
/// are an image's, too.
///
/// # Errors
/// The container's spec cannot be read.
pub fn details(container: &Container) -> Result<String> {
    let details = &container.record.details;
    let Some(options) = &details.options else {
        return Ok(String::new());
    };
    let environment: Vec<String> = match options.log.env.is_empty() {
        true => Vec::new(),
        false => match container::config(&container.directory) {
            Ok(spec) => environment_of(&spec),
            // It was never started.
            Err(error) if error.kind == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        },
    };
    let id = &container.record.id;
    let attributes = options.log.attributes(id, details, &environment);
    let pairs: Vec<String> = attributes
        .iter()
        .map(|(key, value)| format!("{}={}", escaped(key), escaped(value)))
        .collect();
    Ok(pairs.join(",") + " ")
}

fn environment_of(spec: &Value) -> Vec<String> {
    let all = spec["process"]["env"].as_array().into_iter().flatten();
    all.filter_map(|one| one.as_str().map(str::to_owned))
        .collect()
}

/// The text as in the query of a URL (Go's url.QueryEscape).
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' ' => escaped.push('+'),
            b'-' | b'_' | b'.' | b'~' => escaped.push(char::from(byte)),
            _ if byte.is_ascii_alphanumeric() => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

/// Tells when there is new output, or the container has ended.
#[derive(Debug)]
pub struct Follower {
    watch: OwnedFd,
    /// The sandbox answers on it, or closes it, when the container has ended.
    end: Option<Client>,
    /// What comes later is not wanted.
    until: Option<UnixNanos>,
}

/// Why [`Follower::wait`] returns.
#[derive(Debug, PartialEq, Eq)]
pub enum Followed {
    /// There may be new output.
    More,
    /// There will be no more.
    Ended,
    /// Nobody reads the caller's output any more.
    Unread,
}

impl Follower {
    /// Watches a container, up to a time.
    ///
    /// # Errors
    /// The kernel has no watches left, or the container's sandbox refuses to be asked.
    pub fn new(container: &Container, until: Option<UnixNanos>) -> Result<Follower> {
        let directory = container.directory.path();
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context(|| "watch files")?;
        let events = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, directory, events)
            .context(|| format!("watch {}", directory.display()))?;
        let end = container::connect(container).and_then(|client| {
            let request = Request::Wait {
                container: container.record.id.clone(),
            };
            client.tell(&request, &[]).map(|()| client)
        });
        let end = match end {
            Ok(client) => Some(client),
            Err(error) if is_end(&error) => None,
            Err(error) => return Err(error),
        };
        Ok(Follower { watch, end, until })
    }

    /// Waits for new output.
    ///
    /// # Errors
    /// The descriptors cannot be polled, or the container's sandbox refuses to be asked.
    pub fn wait(&self, stdout: BorrowedFd<'_>) -> Result<Followed> {
        let Some(end) = &self.end else {
            return Ok(Followed::Ended);
        };
        let mut descriptors = [
            PollFd::new(&self.watch, PollFlags::IN),
            PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN),
            // Only its end is of interest, which is always reported.
            PollFd::new(&stdout, PollFlags::empty()),
        ];
        loop {
            let timeout = match self.until.map(|until| until - time::now()) {
                Some(left) if left <= 0 => return Ok(Followed::Ended),
                left => left.map(time::timespec),
            };
            match poll(&mut descriptors, timeout.as_ref()) {
                Ok(0) => {}
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context(|| "wait for output"),
            }
        }
        let closed = PollFlags::ERR | PollFlags::HUP;
        if descriptors[2].revents().intersects(closed) {
            return Ok(Followed::Unread);
        }
        // The greeting's answer comes first.
        if !descriptors[1].revents().is_empty() && self.has_ended(end)? {
            return Ok(Followed::Ended);
        }
        // What changed does not matter: the events only have to be taken.
        let mut events = [0u8; 4096];
        while rustix::io::read(&self.watch, &mut events).is_ok_and(|length| length > 0) {}
        Ok(Followed::More)
    }

    fn has_ended(&self, end: &Client) -> Result<bool> {
        if !end.is_greeted() {
            return match end.wait_for_greeting() {
                Ok(()) => Ok(false),
                Err(error) if is_end(&error) => Ok(true),
                Err(error) => Err(error),
            };
        }
        Ok(true)
    }
}

/// Whether a container has ended that cannot be asked.
fn is_end(error: &Error) -> bool {
    matches!(error.kind, ErrorKind::Gone | ErrorKind::WrongState)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(time: u64, stream: Stream, text: &str) -> Entry {
        Entry {
            time,
            stream,
            bytes: text.as_bytes().to_vec(),
        }
    }

    fn show(lines: &mut Lines, entries: &[Entry]) -> String {
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|entry| lines.format(entry))
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn details_do_not_break_lines() {
        assert_eq!(escaped("a b,c=\n\x1bé~"), "a+b%2Cc%3D%0A%1B%C3%A9~");
    }

    #[test]
    fn every_line_gets_one_time() {
        let entries = [
            entry(0, Stream::Output, "a\nb"),
            entry(1, Stream::Error, "E\n"),
            entry(2, Stream::Output, "c\n"),
        ];
        let text = show(&mut Lines::new(None, None, true), &entries);
        assert_eq!(
            text,
            "1970-01-01T00:00:00.000000000Z a\n1970-01-01T00:00:00.000000000Z b\
             1970-01-01T00:00:00.000000001Z E\nc\n"
        );
    }

    #[test]
    fn old_output_and_first_lines_are_left_out() {
        let entries = [
            entry(1, Stream::Output, "a\nb\n"),
            entry(5, Stream::Output, "c"),
            entry(6, Stream::Output, "d\ne"),
        ];
        assert_eq!(
            show(&mut Lines::new(Some(5), None, false), &entries),
            "cd\ne"
        );
        let mut lines = Lines::new(None, None, false);
        lines.skip = 2;
        assert_eq!(show(&mut lines, &entries), "cd\ne");
        assert_eq!(lines.begun, 4);
    }
}
