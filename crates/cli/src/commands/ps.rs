//! `hull ps`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use hull_network::cni::PortMapping;
use hull_sandbox::{Record, State, names};
use serde::Serialize;

use super::{config_for_root, from_seconds};
use crate::error::Result;
use crate::output::{self, Table};
use crate::time;

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show stopped containers too
    #[arg(short, long)]
    all: bool,
    /// Show only containers that match; may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
    filters: Vec<Filter>,
    /// Show ids only
    #[arg(short, long)]
    quiet: bool,
    /// Do not shorten ids and commands
    #[arg(long)]
    no_trunc: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// One condition of `--filter`.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Filter {
    Id(String),
    Name(String),
    Status(&'static str),
    Label(String, Option<String>),
    Ancestor(String),
    Exited(i32),
}

const STATES: [&str; 4] = ["created", "running", "paused", "exited"];

impl Filter {
    fn parse(text: &str) -> std::result::Result<Filter, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            format!("invalid filter {text:?}: give KEY=VALUE, like status=running")
        })?;
        Ok(match key {
            "id" => Filter::Id(value.to_owned()),
            "name" => Filter::Name(value.trim_start_matches('/').to_owned()),
            "status" => {
                let state = STATES.into_iter().find(|state| *state == value);
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
            _ => {
                return Err(format!(
                    "invalid filter {text:?}: {key:?} is none of id, name, status, label, ancestor, exited"
                ));
            }
        })
    }

    fn matches(&self, record: &Record) -> bool {
        match self {
            Filter::Id(id) => record.id.starts_with(id.as_str()),
            Filter::Name(name) => record.name.contains(name.as_str()),
            Filter::Status(state) => docker_state(record.state) == *state,
            Filter::Label(name, value) => record
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
            Filter::Ancestor(image) => {
                let digest = record
                    .image_id
                    .strip_prefix("sha256:")
                    .unwrap_or(&record.image_id);
                let image_without_tag = record.image.split(':').next();
                record.image == *image
                    || image_without_tag == Some(image)
                    || (image.len() >= 4
                        && digest.starts_with(image.strip_prefix("sha256:").unwrap_or(image)))
            }
            Filter::Exited(status) => {
                record.state == State::Stopped
                    && record
                        .exit
                        .as_ref()
                        .is_some_and(|exit| exit.status == *status)
            }
        }
    }

    /// Whether one asks for containers that `ps` hides by default.
    fn wants_stopped(&self) -> bool {
        matches!(
            self,
            Filter::Status("exited" | "created") | Filter::Exited(_)
        )
    }
}

/// Docker's word for a state.
fn docker_state(state: State) -> &'static str {
    match state {
        State::Creating => "created",
        State::Running => "running",
        State::Paused => "paused",
        State::Stopped => "exited",
    }
}

/// State and times in words: `Up 5 minutes`, `Exited (0) 2 hours ago`.
pub fn status(record: &Record) -> String {
    let since =
        |seconds: Option<u64>| time::human_age(from_seconds(seconds.unwrap_or(record.created)));
    match (record.state, &record.exit) {
        (State::Creating, _) => "Created".to_owned(),
        (State::Running, _) => format!("Up {}", since(record.started)),
        (State::Paused, _) => format!("Up {} (Paused)", since(record.started)),
        (State::Stopped, Some(exit)) => {
            format!("Exited ({}) {} ago", exit.status, since(Some(exit.at)))
        }
        (State::Stopped, None) => "Exited".to_owned(),
    }
}

/// One container in `ps --json`.
#[derive(Serialize)]
struct Listed<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    created: String,
    state: &'static str,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<&'a hull_sandbox::Exit>,
    machine: String,
    labels: &'a std::collections::BTreeMap<String, String>,
    volumes: &'a [String],
    network: &'a str,
    addresses: &'a [IpAddr],
    ports: &'a [PortMapping],
}

/// Lists containers, newest first.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    crate::reservation::sweep(&paths);
    let all = args.all || args.filters.iter().any(Filter::wants_stopped);
    let mut records = Vec::new();
    for (id, record) in names::list(&paths)? {
        match record {
            Ok(record) => records.push(record),
            Err(failure) => {
                let short = id.get(..12).unwrap_or(&id).to_owned();
                output::note(format!("warning: container {short}: {failure}"));
            }
        }
    }
    records.retain(|record| {
        (all || record.state != State::Stopped && record.state != State::Creating)
            && args.filters.iter().all(|filter| filter.matches(record))
    });
    if args.quiet {
        let id = |record: &Record| match args.no_trunc {
            true => record.id.clone(),
            false => record.short_id().to_owned(),
        };
        let ids: Vec<String> = records.iter().map(|record| id(record) + "\n").collect();
        output::print(ids.concat())?;
    } else if args.json {
        let listed: Vec<Listed<'_>> = records.iter().map(listed).collect();
        output::print_json(&listed)?;
    } else {
        table(&records, args.no_trunc).print()?;
    }
    Ok(0)
}

fn listed(record: &Record) -> Listed<'_> {
    Listed {
        id: &record.id,
        name: &record.name,
        image: &record.image,
        command: &record.command,
        created: time::format_rfc3339(from_seconds(record.created)),
        state: docker_state(record.state),
        status: status(record),
        exit: record.exit.as_ref(),
        machine: record.machine.to_string(),
        labels: &record.labels,
        volumes: &record.volumes,
        network: &record.network,
        addresses: &record.addresses,
        ports: &record.ports,
    }
}

/// As Docker shows published ports: `0.0.0.0:8080->80/tcp`. Those of a container that does not run lead nowhere.
fn ports(record: &Record) -> String {
    if record.state == State::Stopped {
        return String::new();
    }
    let shown = record.ports.iter().map(|port| {
        let address = port.host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let outside = SocketAddr::new(address, port.host_port);
        format!(
            "{outside}->{}/{}",
            port.container_port,
            port.protocol.name()
        )
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn table(records: &[Record], no_trunc: bool) -> Table {
    let mut table = Table::new(&[
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        "MACHINE",
        "NAMES",
    ]);
    for record in records {
        let command = record.command.join(" ");
        let (id, command) = match no_trunc {
            true => (record.id.as_str(), command),
            false => (record.short_id(), output::shorten(&command, 20)),
        };
        table.row([
            id.to_owned(),
            record.image.clone(),
            format!("\"{command}\""),
            format!("{} ago", time::human_age(from_seconds(record.created))),
            status(record),
            ports(record),
            record.machine.to_string(),
            record.name.clone(),
        ]);
    }
    table
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub fn record() -> Record {
        serde_json::from_value(serde_json::json!({
            "version": hull_sandbox::record::VERSION,
            "id": "ab".repeat(32),
            "name": "web",
            "image": "busybox:1",
            "image_id": "sha256:0123456789",
            "command": ["sleep", "a long time with many words"],
            "created": 0,
            "state": "stopped",
            "exit": {"status": 3, "at": 60},
            "machine": serde_json::to_value(hull_machine::Kind::Uml).unwrap(),
            "kernel": "/k", "memory": 1, "cpus": 1, "terminal": false, "stdin": false,
            "auto_remove": false, "stop_signal": "TERM", "network": "none",
            "labels": {"a": "b"}, "volumes": [],
            "processes": {"sandbox": 0, "devices": 0, "machine": 0}, "layers": []
        }))
        .unwrap()
    }

    #[test]
    fn filters() {
        for (filter, matches) in [
            ("id=abab", true),
            ("id=ba", false),
            ("name=we", true),
            ("name=x", false),
            ("status=exited", true),
            ("status=running", false),
            ("label=a", true),
            ("label=a=b", true),
            ("label=a=c", false),
            ("ancestor=busybox", true),
            ("ancestor=busybox:1", true),
            ("ancestor=busybox:2", false),
            ("ancestor=012345", true),
            ("exited=3", true),
            ("exited=0", false),
        ] {
            assert_eq!(
                Filter::parse(filter).unwrap().matches(&record()),
                matches,
                "{filter}"
            );
        }
        for filter in ["", "name", "size=1", "status=dead", "exited=x"] {
            assert!(Filter::parse(filter).is_err(), "{filter}");
        }
    }

    #[test]
    fn a_row() {
        let text = table(&[record()], false).render();
        let row = text.lines().nth(1).unwrap();
        assert!(
            row.starts_with("abababababab   busybox:1   \"sleep a long time w…\""),
            "{row}"
        );
        assert!(row.contains("Exited (3) "), "{row}");
    }
}
