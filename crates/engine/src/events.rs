//! What happens to containers, as it happens: the log of events that sandboxes write, followed, and
//! told in Docker's words.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use hull_network::cni::DEFAULT_NAME;
use hull_sandbox::events::{Event, EventKind, EventLog, EventReader};
use hull_sandbox::store::Directory;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use serde_json::{Map, Value, json};

use crate::container::{self, Details};
use crate::error::{Context, Result};
use crate::networks;
use crate::paths::Paths;
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
                left => Some(time::timespec(left)),
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

/// Events in Docker's words, with what is known of their containers: also of those that are gone.
#[derive(Debug)]
pub struct Describer {
    paths: Paths,
    known: HashMap<String, Map<String, Value>>,
}

impl Describer {
    /// Remembered containers; all are looked up again beyond that.
    const MOST: usize = 4096;

    /// Knows the containers that there are: one that is removed when it ends is told about then,
    /// too.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn new(paths: Paths) -> Result<Self> {
        let mut describer = Self {
            paths,
            known: HashMap::new(),
        };
        for container in container::list(&describer.paths)?.iter().flatten() {
            describer.remember(&container.record.id, &container.record.details);
        }
        Ok(describer)
    }

    fn remember(&mut self, id: &str, details: &Details) {
        let labels = details.labels.iter();
        let mut attributes: Map<String, Value> = labels
            .map(|(key, value)| (key.clone(), value.as_str().into()))
            .collect();
        attributes.insert("name".into(), details.name.as_str().into());
        attributes.insert("image".into(), details.image.as_str().into());
        if self.known.len() >= Self::MOST {
            self.known.clear();
        }
        self.known.insert(id.to_owned(), attributes);
    }

    /// Labels, name and image of a container.
    fn container(&mut self, id: &str) -> Map<String, Value> {
        if let Ok(Some(container)) = container::load(&self.paths, id) {
            self.remember(id, &container.record.details);
        }
        self.known.get(id).cloned().unwrap_or_default()
    }

    /// An event, in Docker's words.
    pub fn describe(&mut self, event: &Event) -> Value {
        let container = event.kind.container();
        let mut attributes = match (&event.kind, container) {
            (EventKind::Connected { network, .. } | EventKind::Disconnected { network, .. }, _) => {
                let of_network = json!({"container": container, "name": network});
                of_network.as_object().cloned().unwrap_or_default()
            }
            (_, "") => Map::new(),
            _ => self.container(container),
        };
        attributes.insert("sandbox".into(), event.sandbox.as_str().into());
        match &event.kind {
            EventKind::ExecAdded { exec, .. } | EventKind::ExecStarted { exec, .. } => {
                attributes.insert("execID".into(), exec.as_str().into());
            }
            EventKind::Exited { exec, exit, .. } => {
                attributes.insert("exitCode".into(), exit.status.to_string().into());
                if !exec.is_empty() {
                    attributes.insert("execID".into(), exec.as_str().into());
                }
            }
            _ => {}
        }
        let action = action(&event.kind);
        let (kind, id) = match &event.kind {
            EventKind::Connected { network, .. } | EventKind::Disconnected { network, .. } => {
                let created = networks::find(&self.paths, network).ok();
                let is_own = created.is_some() || network == DEFAULT_NAME;
                let driver = if is_own { "bridge" } else { "cni" };
                attributes.insert("type".into(), driver.into());
                let id = created.map_or_else(|| network.clone(), |found| found.id);
                ("network", id)
            }
            _ if container.is_empty() => ("sandbox", event.sandbox.clone()),
            _ => ("container", container.to_owned()),
        };
        json!({
            "Type": kind,
            "Action": action,
            "Actor": {"ID": id, "Attributes": attributes},
            "ID": id,
            "Status": action,
            "Scope": "local",
            "Time": event.time_ns / 1_000_000_000,
            "TimeNano": event.time_ns,
        })
    }
}

/// What Docker calls it.
fn action(kind: &EventKind) -> String {
    let name = match kind {
        EventKind::Created { .. } => "create",
        EventKind::Started { .. } => "start",
        EventKind::ExecAdded { .. } => "exec_create",
        EventKind::ExecStarted { .. } => "exec_start",
        EventKind::Exited { exec, .. } if exec.is_empty() => "die",
        EventKind::Exited { .. } => "exec_die",
        EventKind::Paused { .. } => "pause",
        EventKind::Resumed { .. } => "unpause",
        EventKind::Deleted { .. } => "destroy",
        EventKind::HealthStatus { status, .. } => return format!("health_status: {status}"),
        EventKind::Connected { .. } => "connect",
        EventKind::Disconnected { .. } => "disconnect",
        other => other.name(),
    };
    name.to_owned()
}

/// One condition on events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventFilter {
    /// What it is about (`container`, `network`, `sandbox`), or hull's name of the event.
    Type(String),
    /// Docker's or hull's name of the event.
    Event(String),
    /// The beginning of a container's id, or its name.
    Container(String),
    /// The container's image.
    Image(String),
    /// A label of the container, with this value.
    Label(String, Option<String>),
    /// Name of a network, or the beginning of its id.
    Network(String),
    /// The beginning of a sandbox's id.
    Sandbox(String),
    /// How far it is known: `local`.
    Scope(String),
    /// What hull has no events about.
    Nothing(&'static str),
}

impl EventFilter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "invalid filter {text:?}: give type=, event=, container=, image=, label=, \
                 network=, sandbox= or scope="
            )
        };
        let (key, value) = text.split_once('=').ok_or_else(wrong)?;
        let owned = value.to_owned();
        Ok(match key {
            "type" => Self::Type(owned),
            "event" => Self::Event(owned),
            "container" => Self::Container(owned),
            "image" => Self::Image(owned),
            "label" => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(owned, None),
            },
            "network" => Self::Network(owned),
            "sandbox" => Self::Sandbox(owned),
            "scope" => Self::Scope(owned),
            "volume" => Self::Nothing("volume"),
            "daemon" => Self::Nothing("daemon"),
            _ => return Err(wrong()),
        })
    }

    fn key(&self) -> impl PartialEq + use<> {
        std::mem::discriminant(self)
    }

    fn matches(&self, event: &Event, described: &Value) -> bool {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let attributes = &described["Actor"]["Attributes"];
        let is_of = |kind: &str| described["Type"] == kind;
        let id = text(&described["Actor"]["ID"]);
        let named = |wanted: &str| {
            !wanted.is_empty() && (id.starts_with(wanted) || attributes["name"] == wanted)
        };
        match self {
            Self::Type(kind) => is_of(kind) || event.kind.name() == kind,
            Self::Event(name) => {
                let action = text(&described["Action"]);
                let begin = action.split(':').next();
                action == *name || begin == Some(name) || event.kind.name() == name
            }
            Self::Container(wanted) => is_of("container") && named(wanted),
            Self::Image(wanted) => attributes["image"] == *wanted,
            Self::Label(name, Some(value)) => attributes[name] == *value,
            Self::Label(name, None) => !attributes[name].is_null(),
            Self::Network(wanted) => is_of("network") && named(wanted),
            Self::Sandbox(wanted) => event.sandbox.starts_with(wanted),
            Self::Scope(scope) => scope == "local",
            Self::Nothing(_) => false,
        }
    }
}

/// Whether conditions select an event. Several of one key are alternatives, but all labels have to
/// be there.
pub fn selects(filters: &[EventFilter], event: &Event, described: &Value) -> bool {
    filters.iter().all(|filter| match filter {
        EventFilter::Label(..) => filter.matches(event, described),
        _ => {
            let mut same = filters.iter().filter(|other| other.key() == filter.key());
            same.any(|other| other.matches(event, described))
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn filters_of_one_key_are_alternatives_and_names_are_dockers_or_hulls() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path().join("run"), directory.path().join("data"));
        let mut describer = Describer::new(paths).unwrap();
        let container = "abc".to_owned();
        let started = EventKind::Started {
            container: container.clone(),
        };
        let connected = EventKind::Connected {
            container,
            network: "web".into(),
        };
        for (kind, filters, selected) in [
            (&started, &[][..], true),
            (&started, &["type=started"], true),
            (&started, &["type=container"], true),
            (&started, &["type=network"], false),
            (&started, &["event=start"], true),
            (&started, &["event=started"], true),
            (&started, &["type=exited", "type=started"], true),
            (&started, &["type=started", "container=ab"], true),
            (&started, &["type=started", "container=x"], false),
            (&started, &["sandbox=s1"], true),
            (&started, &["label=a"], false),
            (&started, &["volume=a"], false),
            (&connected, &["type=network", "event=connect"], true),
            (&connected, &["network=web"], true),
            (&connected, &["container=abc"], false),
            (&connected, &["network=other"], false),
        ] {
            let parsed: Vec<EventFilter> = filters
                .iter()
                .map(|text| EventFilter::parse(text).unwrap())
                .collect();
            let event = Event::now("s1", kind.clone());
            let described = describer.describe(&event);
            let found = selects(&parsed, &event, &described);
            assert_eq!(found, selected, "{filters:?} {described}");
        }
        assert!(EventFilter::parse("colour=red").is_err());
    }
}
