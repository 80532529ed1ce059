//! What happens to containers, as it happens: the log of events that sandboxes write, followed.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use hull_sandbox::events::{Event, EventKind, EventLog, EventReader};
use hull_sandbox::store::Directory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use serde_json::{Value, json};

use crate::error::{Context, Result};
use crate::time::{self, UnixNanos};

/// Events, from one time to another.
#[derive(Debug)]
pub struct Feed {
    watch: OwnedFd,
    reader: EventReader,
    since: UnixNanos,
    until: Option<UnixNanos>,
}

impl Feed {
    /// Those since a time, or from now on; up to a time, or without an end.
    ///
    /// # Errors
    /// The directory of run-time state cannot be watched.
    pub fn open(run: &Path, since: Option<UnixNanos>, until: Option<UnixNanos>) -> Result<Self> {
        Directory::create(run)?;
        // Watch before reading, so that no event is missed.
        let watch = watch(run)?;
        Ok(Self {
            watch,
            reader: EventLog::new(run).reader(),
            since: since.unwrap_or_else(time::now),
            until,
        })
    }

    /// Waits for the next event; `None` when there is to be no more, or when `reader` hangs up.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn next(&mut self, reader: BorrowedFd<'_>) -> Result<Option<Event>> {
        loop {
            while let Some(event) = self
                .reader
                .next_event()
                .context(|| "read the log of events")?
            {
                let at = i128::from(event.time_ns);
                if self.until.is_some_and(|until| at > until) {
                    return Ok(None);
                }
                if at >= self.since {
                    return Ok(Some(event));
                }
            }
            if !self.wait(reader)? {
                return Ok(None);
            }
        }
    }

    /// Waits for more events; false if the time is reached, or nobody wants them.
    fn wait(&self, reader: BorrowedFd<'_>) -> Result<bool> {
        let left = match self.until {
            None => None,
            Some(until) => match until - time::now() {
                left if left <= 0 => return Ok(false),
                left => Some(Timespec {
                    tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(i64::MAX),
                    tv_nsec: (left % 1_000_000_000) as _,
                }),
            },
        };
        let mut descriptors = [
            PollFd::new(&self.watch, PollFlags::IN),
            // Only hang-up is of interest, which poll always reports.
            PollFd::new(&reader, PollFlags::empty()),
        ];
        match poll(&mut descriptors, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context(|| "wait for events"),
        }
        let closed = PollFlags::ERR | PollFlags::HUP;
        if descriptors[1].revents().intersects(closed) {
            return Ok(false);
        }
        // Drain inotify; what changed does not matter.
        let mut events = [0u8; 4096];
        while rustix::io::read(&self.watch, &mut events).is_ok_and(|length| length > 0) {}
        Ok(true)
    }
}

fn watch(directory: &Path) -> Result<OwnedFd> {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
        .context(|| "watch files")?;
    let events =
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, directory, events)
        .context(|| format!("watch {}", directory.display()))?;
    Ok(watch)
}

/// An event's own keys, and those of Docker's events.
pub fn with_dockers_keys(event: &Event, mut object: Value) -> Value {
    let container = event.kind.container();
    let action = match &event.kind {
        EventKind::Created { .. } => "create",
        EventKind::Started { .. } => "start",
        EventKind::ExecAdded { .. } => "exec_create",
        EventKind::ExecStarted { .. } => "exec_start",
        EventKind::Exited { exec, .. } if exec.is_empty() => "die",
        EventKind::Exited { .. } => "exec_die",
        EventKind::Oom { .. } => "oom",
        EventKind::Paused { .. } => "pause",
        EventKind::Resumed { .. } => "unpause",
        EventKind::Deleted { .. } => "destroy",
        EventKind::HealthStatus { status, .. } => &format!("health_status: {status}"),
        other => other.name(),
    };
    let (kind, id) = match container {
        "" => ("sandbox", &event.sandbox[..]),
        container => ("container", container),
    };
    let mut attributes = json!({"sandbox": event.sandbox});
    match &event.kind {
        EventKind::ExecAdded { exec, .. } | EventKind::ExecStarted { exec, .. } => {
            attributes["execID"] = json!(exec);
        }
        EventKind::Exited { exec, exit, .. } => {
            attributes["exitCode"] = json!(exit.status.to_string());
            if !exec.is_empty() {
                attributes["execID"] = json!(exec);
            }
        }
        _ => {}
    }
    for (key, value) in [
        ("Type", json!(kind)),
        ("Action", json!(action)),
        ("Status", json!(action)),
        ("ID", json!(id)),
        ("Actor", json!({"ID": id, "Attributes": attributes})),
        ("Scope", json!("local")),
        ("Time", json!(event.time_ns / 1_000_000_000)),
        ("TimeNano", json!(event.time_ns)),
    ] {
        object[key] = value;
    }
    object
}
