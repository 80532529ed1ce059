//! `hull ps`.

use std::net::IpAddr;

use hull_engine::container::{self, Container, EngineContainer};
use hull_engine::time;
use hull_network::cni::PortMapping;
use hull_sandbox::store::{Exit, State, Status};
use regex::{Regex, RegexBuilder};
use serde::Serialize;

use super::port::outside;
use super::{config_for_existing, from_ns};
use crate::error::Result;
use crate::output::{self, Table};

/// Arguments of `ps`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show stopped containers too
    #[arg(short, long)]
    all: bool,
    /// Show only containers that match; may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = Filter::parse)]
    filters: Vec<Filter>,
    /// Show containers of podman, Docker and other engines that run with hull, too
    #[arg(long)]
    all_engines: bool,
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
#[derive(Clone, Debug)]
enum Filter {
    Id(String),
    Name(Regex),
    Status(&'static str),
    Label(String, Option<String>),
    Ancestor(String),
    Exited(i32),
}

/// The states that `--filter status=` knows.
pub const STATES: [&str; 4] = ["created", "running", "paused", "exited"];

impl Filter {
    fn parse(text: &str) -> std::result::Result<Filter, String> {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            format!("invalid filter {text:?}: give KEY=VALUE, like status=running")
        })?;
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
            _ => {
                return Err(format!(
                    "invalid filter {text:?}: {key:?} is none of id, name, status, label, ancestor, exited"
                ));
            }
        })
    }

    fn matches(&self, row: &Row) -> bool {
        match self {
            Filter::Id(id) => row.id.starts_with(id.as_str()),
            // Docker's names begin with a slash, with which and without which they are matched.
            Filter::Name(name) => {
                name.is_match(&row.name) || name.is_match(&format!("/{}", row.name))
            }
            Filter::Status(state) => docker_state(row.status.state) == *state,
            Filter::Label(name, value) => row
                .labels
                .get(name)
                .is_some_and(|has| value.as_ref().is_none_or(|value| has == value)),
            Filter::Ancestor(image) => {
                let digest = row
                    .image_id
                    .strip_prefix("sha256:")
                    .unwrap_or(&row.image_id);
                let image_without_tag = row.image.split(':').next();
                row.image == *image
                    || image_without_tag == Some(image)
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
        }
    }

    /// Whether the filter selects containers that `ps` hides by default.
    fn wants_stopped(&self) -> bool {
        matches!(
            self,
            Filter::Status("exited" | "created") | Filter::Exited(_)
        )
    }
}

/// The regular expression of a filter for names.
fn name_pattern(filter: &str, pattern: &str) -> std::result::Result<Regex, String> {
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

/// Docker's name for a state.
fn docker_state(state: State) -> &'static str {
    match state {
        State::Creating | State::Created => "created",
        State::Running => "running",
        State::Paused => "paused",
        State::Stopped => "exited",
    }
}

/// Status as text: `Up 5 minutes`, `Exited (0) 2 hours ago`.
fn in_words(row: &Row) -> String {
    let since = |time: Option<u64>| time::human_age(from_ns(time.unwrap_or(row.created_ns)));
    let status = &row.status;
    match (status.state, &status.exit) {
        (State::Creating | State::Created, _) => "Created".to_owned(),
        (State::Running, _) => format!("Up {}", since(status.started_ns)),
        (State::Paused, _) => format!("Up {} (Paused)", since(status.started_ns)),
        (State::Stopped, Some(exit)) => {
            format!("Exited ({}) {} ago", exit.status, since(Some(exit.at_ns)))
        }
        (State::Stopped, None) => "Exited".to_owned(),
    }
}

/// What is shown of a container, of any engine.
#[derive(Debug, Default)]
struct Row {
    id: String,
    name: String,
    engine: String,
    image: String,
    image_id: String,
    command: Vec<String>,
    created_ns: u64,
    status: RowStatus,
    machine: String,
    labels: std::collections::BTreeMap<String, String>,
    volumes: Vec<String>,
    network: String,
    ports: Vec<PortMapping>,
}

/// A status, with a default for tests.
#[derive(Debug)]
struct RowStatus(Status);

impl Default for RowStatus {
    fn default() -> Self {
        Self(Status::new(State::Stopped))
    }
}

impl std::ops::Deref for RowStatus {
    type Target = Status;

    fn deref(&self) -> &Status {
        &self.0
    }
}

impl Row {
    fn own(container: Container) -> Self {
        let record = container.record;
        let details = record.details;
        Self {
            id: record.id,
            name: details.name,
            engine: record.engine,
            image: details.image,
            image_id: details.image_id,
            command: record.command,
            created_ns: record.created_ns,
            status: RowStatus(container.status),
            machine: details.machine,
            labels: details.labels,
            volumes: details.volumes,
            network: details.network,
            ports: details.ports,
        }
    }

    fn of_engine(container: EngineContainer) -> Self {
        let record = container.stored.record;
        let annotation = |names: &[&str]| {
            let annotations = &record.details["annotations"];
            let found = names.iter().find_map(|name| annotations[*name].as_str());
            found.unwrap_or_default().to_owned()
        };
        Self {
            name: annotation(&[
                "io.kubernetes.cri-o.Name",
                "io.kubernetes.cri.container-name",
            ]),
            image: annotation(&[
                "io.kubernetes.cri-o.ImageName",
                "io.kubernetes.cri.image-name",
                "org.opencontainers.image.ref.name",
            ]),
            id: record.id,
            engine: record.engine,
            command: record.command,
            created_ns: record.created_ns,
            status: RowStatus(container.stored.status),
            ..Self::default()
        }
    }

    fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

/// A container in `ps --json`.
#[derive(Serialize)]
struct Listed<'a> {
    id: &'a str,
    name: &'a str,
    engine: &'a str,
    image: &'a str,
    command: &'a [String],
    created: String,
    state: &'static str,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<&'a Exit>,
    machine: &'a str,
    labels: &'a std::collections::BTreeMap<String, String>,
    volumes: &'a [String],
    network: &'a str,
    addresses: &'a [IpAddr],
    ports: &'a [PortMapping],
}

/// Lists containers, newest first.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    container::sweep(&paths);
    let all = args.all || args.filters.iter().any(Filter::wants_stopped);
    let mut rows = Vec::new();
    for container in container::list(&paths)? {
        match container {
            Ok(container) => rows.push(Row::own(container)),
            Err((id, error)) => {
                let short = id.get(..12).unwrap_or(&id).to_owned();
                output::note(format!("warning: container {short}: {error}"));
            }
        }
    }
    if args.all_engines {
        for container in container::engines(&paths) {
            match container {
                Ok(container) => rows.push(Row::of_engine(container)),
                Err(error) => output::note(format!("warning: {error}")),
            }
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.created_ns));
    }
    rows.retain(|row| {
        let state = row.status.state;
        let up = matches!(state, State::Running | State::Paused);
        (all || up) && args.filters.iter().all(|filter| filter.matches(row))
    });
    if args.quiet {
        let id = |row: &Row| match args.no_trunc {
            true => row.id.clone(),
            false => row.short_id().to_owned(),
        };
        let ids: Vec<String> = rows.iter().map(|row| id(row) + "\n").collect();
        output::print(ids.concat())?;
    } else if args.json {
        let listed: Vec<Listed<'_>> = rows.iter().map(listed).collect();
        output::print_json(&listed)?;
    } else {
        table(&rows, args.no_trunc, args.all_engines).print()?;
    }
    Ok(0)
}

fn listed(row: &Row) -> Listed<'_> {
    Listed {
        id: &row.id,
        name: &row.name,
        engine: &row.engine,
        image: &row.image,
        command: &row.command,
        created: time::format_rfc3339(from_ns(row.created_ns)),
        state: docker_state(row.status.state),
        status: in_words(row),
        exit: row.status.exit.as_ref(),
        machine: &row.machine,
        labels: &row.labels,
        volumes: &row.volumes,
        network: &row.network,
        addresses: &row.status.addresses,
        ports: &row.ports,
    }
}

/// Published ports in Docker's format: `0.0.0.0:8080->80/tcp`. Empty for a stopped container.
fn ports(row: &Row) -> String {
    if matches!(row.status.state, State::Stopped | State::Created) {
        return String::new();
    }
    let shown = row.ports.iter().map(|port| {
        format!(
            "{}->{}/{}",
            outside(port),
            port.container_port,
            port.protocol.name()
        )
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn table(rows: &[Row], no_trunc: bool, engines: bool) -> Table {
    let mut table = Table::new(&[
        "CONTAINER ID",
        "IMAGE",
        "COMMAND",
        "CREATED",
        "STATUS",
        "PORTS",
        if engines { "ENGINE" } else { "MACHINE" },
        "NAMES",
    ]);
    for row in rows {
        let command = row.command.join(" ");
        let (id, command) = match no_trunc {
            true => (row.id.as_str(), command),
            false => (row.short_id(), output::shorten(&command, 20)),
        };
        table.row([
            id.to_owned(),
            row.image.clone(),
            format!("\"{command}\""),
            format!("{} ago", time::human_age(from_ns(row.created_ns))),
            in_words(row),
            ports(row),
            match engines {
                true => row.engine.clone(),
                false => row.machine.clone(),
            },
            row.name.clone(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn row() -> Row {
        let mut status = Status::new(State::Stopped);
        status.exit = Some(Exit::now(3));
        Row {
            id: "ab".repeat(32),
            name: "web".into(),
            image: "busybox:1".into(),
            image_id: "sha256:0123456789".into(),
            command: vec!["sleep".into(), "a long time with many words".into()],
            status: RowStatus(status),
            machine: "uml".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            ..Row::default()
        }
    }

    #[test]
    fn filters() {
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
            ("ancestor=busybox", true),
            ("ancestor=busybox:1", true),
            ("ancestor=busybox:2", false),
            ("ancestor=012345", true),
            ("exited=3", true),
            ("exited=0", false),
        ] {
            assert_eq!(
                Filter::parse(filter).unwrap().matches(&row()),
                matches,
                "{filter}"
            );
        }
        for filter in ["", "name", "size=1", "status=dead", "exited=x", "name=("] {
            assert!(Filter::parse(filter).is_err(), "{filter}");
        }
    }

    #[test]
    fn a_row() {
        let text = table(&[row()], false, false).render();
        let row = text.lines().nth(1).unwrap();
        assert!(
            row.starts_with("abababababab   busybox:1   \"sleep a long time w…\""),
            "{row}"
        );
        assert!(row.contains("Exited (3) "), "{row}");
    }
}
