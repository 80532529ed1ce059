//! Conditions on containers, as `ps` and the API have them.

use std::collections::BTreeMap;

use hull_image::Reference;
use hull_network::cni::Protocol;
use hull_sandbox::store::{Record, State};
use regex::{Regex, RegexBuilder};

use super::Row;
use crate::container;
use crate::error::Result;
use crate::paths::Paths;
use crate::publish::port_range;
use crate::values;

/// One condition.
#[derive(Clone, Debug)]
pub enum Filter {
    /// Begins so.
    Id(String),
    /// A pattern of its name.
    Name(Regex),
    /// Docker's name of its state.
    Status(&'static str),
    /// A label, with this value.
    Label(String, Option<String>),
    /// The image that it was created from.
    Ancestor(String),
    /// How it ended.
    Exited(i32),
    /// Its health.
    Health(&'static str),
    /// Created before another one.
    Before(String),
    /// Created after another one.
    Since(String),
    /// In this network.
    Network(String),
    /// Has this volume, or one at this place.
    Volume(String),
    /// One of these ports of the host leads to it.
    Publish(Ports),
    /// One of these ports of its own is published.
    Expose(Ports),
}

/// A range of ports, both ends included.
#[derive(Clone, Debug)]
pub struct Ports {
    first: u16,
    last: u16,
    protocol: Protocol,
}

impl Ports {
    fn parse(text: &str) -> Option<Self> {
        let (range, protocol) = match text.split_once('/') {
            Some((range, protocol)) => (range, Protocol::parse(protocol)?),
            None => (text, Protocol::default()),
        };
        let (first, last) = port_range(range)?;
        Some(Self {
            first,
            last,
            protocol,
        })
    }

    fn contains(&self, port: u16, protocol: Protocol) -> bool {
        (self.first..=self.last).contains(&port) && self.protocol == protocol
    }
}

/// The states that `--filter health=` knows.
const HEALTH: [&str; 4] = ["starting", "healthy", "unhealthy", "none"];

/// The states that `--filter status=` knows.
pub const STATES: [&str; 7] = [
    "created",
    "running",
    "paused",
    "restarting",
    "exited",
    // Docker has them; no container of hull's is ever in one.
    "removing",
    "dead",
];

/// The keys of filters.
pub const KEYS: [&str; 13] = [
    "id", "name", "status", "label", "ancestor", "exited", "health", "before", "since", "network",
    "volume", "publish", "expose",
];

impl Filter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> std::result::Result<Filter, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            format!("invalid filter {text:?}: give KEY=VALUE, like status=running")
        })?;
        let ports = || {
            let wrong = || format!("invalid filter {text:?}: give a port like 80 or 80-90/udp");
            Ports::parse(value).ok_or_else(wrong)
        };
        Ok(match key {
            "id" => Filter::Id(value.to_owned()),
            "name" => Filter::Name(name_pattern(text, value)?),
            "status" => {
                // As `hull inspect` and the OCI specification call it.
                let wanted = if value == "stopped" { "exited" } else { value };
                let state = STATES.into_iter().find(|state| *state == wanted);
                Filter::Status(state.ok_or_else(|| {
                    format!(
                        "invalid filter {text:?}: {value:?} is none of {}",
                        STATES.join(", ")
                    )
                })?)
            }
            "label" => match value.split_once('=') {
                Some((name, value)) => Filter::Label(name.to_owned(), Some(value.to_owned())),
                None => Filter::Label(value.to_owned(), None),
            },
            "ancestor" => Filter::Ancestor(value.to_owned()),
            "exited" => Filter::Exited(
                value
                    .parse()
                    .map_err(|_| format!("invalid filter {text:?}: {value:?} is no exit code"))?,
            ),
            "health" => {
                let state = HEALTH.into_iter().find(|state| *state == value);
                Filter::Health(state.ok_or_else(|| {
                    format!(
                        "invalid filter {text:?}: {value:?} is none of {}",
                        HEALTH.join(", ")
                    )
                })?)
            }
            "before" => Filter::Before(value.to_owned()),
            "since" => Filter::Since(value.to_owned()),
            // As `--network` calls it.
            "network" => Filter::Network(match values::network(value) {
                Ok(network) => network.to_string(),
                Err(_) => value.to_owned(),
            }),
            "volume" => Filter::Volume(value.to_owned()),
            "publish" => Filter::Publish(ports()?),
            "expose" => Filter::Expose(ports()?),
            _ => {
                return Err(format!(
                    "invalid filter {text:?}: {key:?} is none of {}",
                    KEYS.join(", ")
                ));
            }
        })
    }

    /// Whether the filter selects containers that `ps` hides by default.
    pub fn wants_stopped(&self) -> bool {
        matches!(
            self,
            Filter::Status("exited" | "created") | Filter::Exited(_)
        )
    }
}

/// The regular expression of a filter for names.
pub(crate) fn name_pattern(filter: &str, pattern: &str) -> std::result::Result<Regex, String> {
    const MOST_BYTES: usize = 1 << 20;
    RegexBuilder::new(pattern)
        .size_limit(MOST_BYTES)
        .build()
        .map_err(|error| {
            let why = error.to_string();
            let why = why.lines().last().unwrap_or_default().trim();
            let why = why.strip_prefix("error: ").unwrap_or(why);
            format!("invalid filter {filter:?}: no regular expression: {why}")
        })
}

/// All conditions. Several of one key are alternatives, but of labels all have to be there, as with
/// Docker.
#[derive(Debug, Default)]
pub struct Filters {
    filters: Vec<Filter>,
    /// When the containers were created that `before` and `since` name.
    created_ns: BTreeMap<String, u64>,
}

impl Filters {
    /// Looks up the containers that filters name.
    ///
    /// # Errors
    /// There is no such container.
    pub fn new(filters: Vec<Filter>, paths: &Paths) -> Result<Self> {
        let mut created_ns = BTreeMap::new();
        for filter in &filters {
            if let Filter::Before(name) | Filter::Since(name) = filter {
                let Record { created_ns: at, .. } = container::find(paths, name)?.record;
                created_ns.insert(name.clone(), at);
            }
        }
        Ok(Self {
            filters,
            created_ns,
        })
    }

    /// Whether a container is selected.
    pub fn select(&self, row: &Row) -> bool {
        let key = |filter: &Filter| std::mem::discriminant(filter);
        self.filters.iter().all(|filter| match filter {
            Filter::Label(..) => self.matches(filter, row),
            _ => {
                let mut same = self.filters.iter();
                same.any(|other| key(other) == key(filter) && self.matches(other, row))
            }
        })
    }

    fn matches(&self, filter: &Filter, row: &Row) -> bool {
        let created = |name: &String| self.created_ns.get(name).copied();
        match filter {
            Filter::Id(id) => row.id.starts_with(id.as_str()),
            // Docker's names begin with a slash, with which and without which they are matched.
            Filter::Name(name) => {
                name.is_match(&row.name) || name.is_match(&format!("/{}", row.name))
            }
            Filter::Status(state) => row.state() == *state,
            Filter::Health(state) => row.life.health() == *state,
            Filter::Label(name, value) => row
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
            Filter::Ancestor(image) => {
                let digest = row
                    .image_id
                    .strip_prefix("sha256:")
                    .unwrap_or(&row.image_id);
                row.image == *image
                    || same_name(&row.image, image)
                    || (image.len() >= 4
                        && digest.starts_with(image.strip_prefix("sha256:").unwrap_or(image)))
            }
            Filter::Exited(status) => {
                row.status.state == State::Stopped
                    && row
                        .status
                        .exit
                        .as_ref()
                        .is_some_and(|exit| exit.status == *status)
            }
            Filter::Before(name) => created(name).is_some_and(|at| row.created_ns < at),
            Filter::Since(name) => created(name).is_some_and(|at| row.created_ns > at),
            Filter::Network(name) => row.networks.contains(name),
            Filter::Volume(wanted) => row
                .mounts
                .iter()
                .any(|mount| mount.source == *wanted || mount.destination == *wanted),
            Filter::Publish(ports) => row
                .ports
                .iter()
                .any(|port| ports.contains(port.host_port, port.protocol)),
            Filter::Expose(ports) => row
                .ports
                .iter()
                .any(|port| ports.contains(port.container_port, port.protocol)),
        }
    }
}

/// Whether two references name the same image: `app` is `app:latest`.
fn same_name(one: &str, other: &str) -> bool {
    let parsed = |text: &str| {
        text.parse::<Reference>()
            .ok()
            .map(|parsed| parsed.to_string())
    };
    matches!((parsed(one), parsed(other)), (Some(one), Some(other)) if one == other)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_network::cni::PortMapping;

    use super::super::tests::row;
    use super::super::{Mount, Row};
    use super::*;

    fn filters(texts: &[&str]) -> Filters {
        let filters = texts.iter().map(|text| Filter::parse(text).unwrap());
        Filters {
            filters: filters.collect(),
            created_ns: [("older".to_owned(), 5), ("newer".to_owned(), 15)].into(),
        }
    }

    #[test]
    fn each_filter_selects() {
        let row = Row {
            created_ns: 10,
            networks: vec!["default".into()],
            ports: vec![PortMapping {
                host_ip: None,
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
            }],
            mounts: vec![Mount {
                source: "data".into(),
                destination: "/var/data".into(),
                is_volume: true,
                read_only: false,
            }],
            ..row()
        };
        for (filter, matches) in [
            ("id=abab", true),
            ("id=ba", false),
            ("name=we", true),
            ("name=x", false),
            ("name=^web$", true),
            ("name=^/web$", true),
            ("name=/we", true),
            ("name=^we$", false),
            ("name=^(web|db)$", true),
            ("name=", true),
            ("status=exited", true),
            ("status=stopped", true),
            ("status=running", false),
            ("label=a", true),
            ("label=a=b", true),
            ("label=a=c", false),
            ("ancestor=busybox", false),
            ("ancestor=busybox:1", true),
            ("ancestor=busybox:2", false),
            ("ancestor=012345", true),
            ("exited=3", true),
            ("exited=0", false),
            ("before=newer", true),
            ("before=older", false),
            ("since=older", true),
            ("since=newer", false),
            ("network=default", true),
            ("network=bridge", true),
            ("network=none", false),
            ("volume=data", true),
            ("volume=/var/data", true),
            ("volume=dat", false),
            ("publish=8080", true),
            ("publish=8000-8100/tcp", true),
            ("publish=8080/udp", false),
            ("publish=80", false),
            ("expose=80", true),
            ("expose=8080", false),
        ] {
            assert_eq!(filters(&[filter]).select(&row), matches, "{filter}");
        }
        for filter in [
            "",
            "name",
            "size=1",
            "status=asleep",
            "exited=x",
            "name=(",
            "publish=x",
            "publish=1/x",
        ] {
            assert!(Filter::parse(filter).is_err(), "{filter}");
        }
    }

    #[test]
    fn several_filters_of_one_key_are_alternatives_but_all_labels_have_to_be_there() {
        for (texts, matches) in [
            (&["status=running", "status=exited"][..], true),
            (&["status=running", "status=paused"], false),
            (&["status=exited", "name=x"], false),
            (&["label=a", "label=a=b"], true),
            (&["label=a", "label=z"], false),
            (&[], true),
        ] {
            assert_eq!(filters(texts).select(&row()), matches, "{texts:?}");
        }
    }
}
