//! What happens to sandboxes and their containers: a broadcast to those who use a sandbox as a
//! library, and a log of the whole host for people (`hull events`).

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::store::{Exit, SandboxPath, unix_time_ns};

/// Something that has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, nanoseconds since 1970 UTC.
    pub time_ns: u64,
    /// The sandbox.
    pub sandbox: String,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

impl Event {
    /// An event right now.
    pub fn now(sandbox: &str, kind: EventKind) -> Self {
        Self {
            time_ns: unix_time_ns(),
            sandbox: sandbox.to_owned(),
            kind,
        }
    }
}

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum EventKind {
    /// A container is there; its init waits.
    Created { container: String },
    /// A container's init runs.
    Started { container: String },
    /// A further process was asked for.
    ExecAdded { container: String, exec: String },
    /// A further process runs.
    ExecStarted { container: String, exec: String },
    /// A process has ended; with an empty `exec`, the container's init.
    Exited {
        container: String,
        #[serde(default, skip_serializing_if = "String::is_empty")]
        exec: String,
        exit: Exit,
    },
    /// The guest's kernel has killed a process of the container for lack of memory.
    Oom { container: String },
    /// A container's processes are frozen.
    Paused { container: String },
    /// They go on.
    Resumed { container: String },
    /// A container was removed from its sandbox.
    Deleted { container: String },
    /// Checks have found a container in another state of health.
    HealthStatus {
        /// The container.
        container: String,
        /// `starting`, `healthy` or `unhealthy`.
        status: String,
    },
    /// A container has come into a network.
    Connected { container: String, network: String },
    /// A container has left a network.
    Disconnected { container: String, network: String },
    /// The guest did not come up, or has broken down.
    GuestFailed { reason: String },
    /// Something that a newer hull reports.
    #[serde(other)]
    Unknown,
}

impl EventKind {
    /// The container that it is about; empty when it is about the sandbox.
    pub fn container(&self) -> &str {
        match self {
            Self::Created { container }
            | Self::Started { container }
            | Self::ExecAdded { container, .. }
            | Self::ExecStarted { container, .. }
            | Self::Exited { container, .. }
            | Self::Oom { container }
            | Self::Paused { container }
            | Self::Resumed { container }
            | Self::HealthStatus { container, .. }
            | Self::Connected { container, .. }
            | Self::Disconnected { container, .. }
            | Self::Deleted { container } => container,
            Self::GuestFailed { .. } | Self::Unknown => "",
        }
    }

    /// Its name, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "created",
            Self::Started { .. } => "started",
            Self::ExecAdded { .. } => "exec_added",
            Self::ExecStarted { .. } => "exec_started",
            Self::Exited { .. } => "exited",
            Self::Oom { .. } => "oom",
            Self::Paused { .. } => "paused",
            Self::Resumed { .. } => "resumed",
            Self::Deleted { .. } => "deleted",
            Self::HealthStatus { .. } => "health_status",
            Self::Connected { .. } => "connected",
            Self::Disconnected { .. } => "disconnected",
            Self::GuestFailed { .. } => "guest_failed",
            Self::Unknown => "unknown",
        }
    }
}

/// Appends an event about a container of a sandbox that the sandbox does not know of.
///
/// # Errors
/// The log cannot be written.
pub fn append_event(sandbox: &SandboxPath, event: &Event) -> io::Result<()> {
    match EventLog::of(sandbox) {
        Some(log) => log.append(event),
        None => Ok(()),
    }
}

/// Bytes after which the log of the host becomes its older part: some 20,000 events.
const MAX_LOG: u64 = 4 << 20;

/// The log of a host's events: one line of JSON each, appended by every sandbox process. Below the
/// directory of run-time state: it begins anew with each boot of the host.
#[derive(Debug, Clone)]
pub struct EventLog {
    path: PathBuf,
}

impl EventLog {
    /// The log of the host that a sandbox is on.
    pub fn of(sandbox: &SandboxPath) -> Option<Self> {
        sandbox.sandboxes.parent().map(Self::new)
    }

    /// The log below hull's directory of run-time state.
    pub fn new(run: &Path) -> Self {
        Self {
            path: run.join("events"),
        }
    }

    /// The file that is appended to.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn older(&self) -> PathBuf {
        self.path.with_extension("1")
    }

    /// Appends an event.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append(&self, event: &Event) -> io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path)?;
        // One write of a line: lines of several sandboxes do not mix.
        file.write_all(&line)?;
        if file.metadata()?.len() > MAX_LOG {
            self.rotate(&file)?;
        }
        Ok(())
    }

    fn rotate(&self, file: &File) -> io::Result<()> {
        use std::os::unix::fs::MetadataExt;
        flock(file, FlockOperation::LockExclusive)?;
        // Another process may have done it meanwhile.
        match fs::metadata(&self.path) {
            Ok(there) if there.ino() == file.metadata()?.ino() => {
                fs::rename(&self.path, self.older())
            }
            _ => Ok(()),
        }
    }

    /// Reads the log from its beginning; can be asked again when it has grown.
    pub fn reader(&self) -> EventReader {
        EventReader {
            log: self.clone(),
            older: File::open(self.older()).ok().map(BufReader::new),
            current: None,
        }
    }
}

/// Reads a log of events.
#[derive(Debug)]
pub struct EventReader {
    log: EventLog,
    older: Option<BufReader<File>>,
    current: Option<BufReader<File>>,
}

impl EventReader {
    /// The next event; `None` when there is no further one yet. Lines that cannot be read are left
    /// out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next_event(&mut self) -> io::Result<Option<Event>> {
        loop {
            if let Some(older) = &mut self.older {
                match next_line(older)? {
                    Some(line) => match serde_json::from_slice(&line) {
                        Ok(event) => return Ok(Some(event)),
                        Err(_) => continue,
                    },
                    None => self.older = None,
                }
            }
            if self.current.is_none() {
                match File::open(&self.log.path) {
                    Ok(file) => self.current = Some(BufReader::new(file)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
            let Some(current) = &mut self.current else {
                return Ok(None);
            };
            match next_line(current)? {
                Some(line) => match serde_json::from_slice(&line) {
                    Ok(event) => return Ok(Some(event)),
                    Err(_) => continue,
                },
                None if self.is_current()? => return Ok(None),
                // Rotated away: what was added before that is read, then the new file.
                None => self.older = self.current.take(),
            }
        }
    }

    fn is_current(&self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let Some(current) = &self.current else {
            return Ok(true);
        };
        match fs::metadata(&self.log.path) {
            Ok(there) => Ok(there.ino() == current.get_ref().metadata()?.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// Longest line that is read, bytes.
const MAX_LINE: u64 = 64 << 10;

/// The next whole line; the reader stays where it is when there is only half of one.
fn next_line(reader: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let read = reader
        .by_ref()
        .take(MAX_LINE)
        .read_until(b'\n', &mut line)?;
    if line.ends_with(b"\n") {
        return Ok(Some(line));
    }
    if read as u64 == MAX_LINE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the log of events is damaged",
        ));
    }
    reader.seek_relative(-(read as i64))?;
    let _ = reader.stream_position()?;
    Ok(None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn event(container: &str) -> Event {
        Event::now(
            "s",
            EventKind::Started {
                container: container.into(),
            },
        )
    }

    #[test]
    fn events_are_read_back_also_across_rotation() {
        let run = tempfile::tempdir().unwrap();
        let log = EventLog::new(run.path());
        let mut reader = log.reader();
        assert_eq!(reader.next_event().unwrap(), None);
        log.append(&event("a")).unwrap();
        let read = reader.next_event().unwrap().unwrap();
        assert_eq!(read.kind.container(), "a");
        assert_eq!(reader.next_event().unwrap(), None);
        log.append(&event("b")).unwrap();
        log.rotate(&File::open(log.path()).unwrap()).unwrap();
        log.append(&event("c")).unwrap();
        for expected in ["b", "c"] {
            let read = reader.next_event().unwrap().unwrap();
            assert_eq!(read.kind.container(), expected);
        }
        assert_eq!(reader.next_event().unwrap(), None);
        let mut all = log.reader();
        let mut seen = Vec::new();
        while let Some(event) = all.next_event().unwrap() {
            seen.push(event.kind.container().to_owned());
        }
        assert_eq!(seen, ["a", "b", "c"]);
    }

    #[test]
    fn what_a_newer_hull_reports_is_read() {
        let text = r#"{"time_ns":1,"sandbox":"s","type":"levitated","height":3}"#;
        let event: Event = serde_json::from_str(text).unwrap();
        assert_eq!(event.kind, EventKind::Unknown);
        let text = serde_json::to_string(&self::event("c")).unwrap();
        assert!(
            text.contains(r#""type":"started","container":"c""#),
            "{text}"
        );
    }
}
