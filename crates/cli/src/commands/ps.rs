//! `hull ps`.

mod columns;
mod filter;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use hull_engine::container::{self, Container, EngineContainer};
use hull_engine::error::of_image;
use hull_engine::health::{Health, HealthStatus};
use hull_engine::inspect::{RESTARTING, state_name};
use hull_engine::supervise;
use hull_engine::volumes::Source;
use hull_engine::{time, usage};
use hull_network::cni::PortMapping;
use hull_sandbox::store::{Exit, State, Status};
use serde::Serialize;

use self::filter::{Filter, Filters};
use super::{config_for_existing, from_ns};
use crate::error::Result;
use crate::format::{self, ListFormat};
use crate::images;
use crate::output;

pub use self::filter::{KEYS, STATES};

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
    /// Show only the container that was created last, whatever state it is in
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,
    /// Show only so many containers that were created last, whatever state they are in
    #[arg(
        short = 'n',
        long,
        value_name = "NUMBER",
        default_value_t = -1,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    last: i64,
    /// Show how much containers have written to their root file systems
    #[arg(short, long)]
    size: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
}

/// What `--size` asks for.
#[derive(Clone, Copy, Debug, Serialize)]
struct Size {
    /// Bytes in the writable layer.
    written: u64,
    /// Bytes of the image.
    image: u64,
}

/// A volume or a directory of the host in a container.
#[derive(Debug, Default)]
struct Mount {
    /// The name of a volume, or a path of the host.
    source: String,
    destination: String,
    is_volume: bool,
}

/// What the supervisor of a container knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Life {
    /// It waits to be started again.
    restarting: bool,
    health: Option<HealthStatus>,
}

impl Life {
    /// Of a container of hull's own.
    pub fn of(container: &Container) -> Self {
        Self {
            restarting: supervise::is_restarting(container),
            health: Health::of(container).map(|health| health.status),
        }
    }

    /// Docker's word for its health.
    fn health(&self) -> &'static str {
        self.health.map_or("none", HealthStatus::name)
    }
}

/// Status as text: `Up 5 minutes`, `Exited (0) 2 hours ago`.
pub fn in_words(status: &Status, created_ns: u64, life: Life) -> String {
    let since = |time: Option<u64>| time::human_age(from_ns(time.unwrap_or(created_ns)));
    match (status.state, &status.exit) {
        (State::Creating | State::Created, _) => "Created".to_owned(),
        (State::Running, _) => {
            let health = match life.health {
                Some(HealthStatus::Starting) => " (health: starting)",
                Some(HealthStatus::Healthy) => " (healthy)",
                Some(HealthStatus::Unhealthy) => " (unhealthy)",
                None => "",
            };
            format!("Up {}{health}", since(status.started_ns))
        }
        (State::Paused, _) => format!("Up {} (Paused)", since(status.started_ns)),
        (State::Stopped, Some(exit)) if life.restarting => {
            format!(
                "Restarting ({}) {} ago",
                exit.status,
                since(Some(exit.at_ns))
            )
        }
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
    life: Life,
    machine: String,
    labels: BTreeMap<String, String>,
    volumes: Vec<String>,
    network: String,
    ports: Vec<PortMapping>,
    mounts: Vec<Mount>,
    /// Of one of hull's own.
    directory: Option<PathBuf>,
    /// If they were asked for.
    size: Option<Size>,
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
    /// Docker's name for its state.
    fn state(&self) -> &'static str {
        match self.life.restarting {
            true => RESTARTING,
            false => state_name(self.status.state),
        }
    }

    fn own(container: Container) -> Self {
        let directory = container.path();
        let life = Life::of(&container);
        let record = container.record;
        let details = record.details;
        let volumes = details.options.iter().flat_map(|options| &options.volumes);
        let mounts = volumes.map(|volume| {
            let (source, is_volume) = match &volume.source {
                Source::Host(path) => (path.display().to_string(), false),
                Source::Named(name) => (name.clone(), true),
                Source::Anonymous => (String::new(), true),
            };
            Mount {
                source,
                destination: volume.destination.display().to_string(),
                is_volume,
            }
        });
        Self {
            mounts: mounts.collect(),
            directory: Some(directory),
            size: None,
            id: record.id,
            name: details.name,
            engine: record.engine,
            image: details.image,
            image_id: details.image_id,
            command: record.command,
            created_ns: record.created_ns,
            status: RowStatus(container.status),
            life,
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

    fn shown_id(&self, no_trunc: bool) -> String {
        match no_trunc {
            true => self.id.clone(),
            false => self.id.get(..12).unwrap_or(&self.id).to_owned(),
        }
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
    labels: &'a BTreeMap<String, String>,
    volumes: &'a [String],
    network: &'a str,
    addresses: &'a [IpAddr],
    ports: &'a [PortMapping],
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
}

/// Lists containers, newest first.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let paths = config.paths();
    container::sweep(&paths);
    let last = match args.latest {
        true => Some(1),
        false => usize::try_from(args.last).ok().filter(|last| *last > 0),
    };
    let all = args.all || last.is_some() || args.filters.iter().any(Filter::wants_stopped);
    let filters = Filters::new(args.filters, &paths)?;
    let template = args.format.as_ref().and_then(ListFormat::template);
    let with_size = args.size || template.is_some_and(|template| template.names("Size"));
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
        let up = matches!(state, State::Running | State::Paused) || row.life.restarting;
        (all || up) && filters.select(row)
    });
    rows.truncate(last.unwrap_or(usize::MAX));
    if with_size {
        let store = images::store(&config)?;
        let images: BTreeMap<String, u64> = store
            .list()
            .map_err(of_image)?
            .into_iter()
            .map(|image| (image.id.to_string(), image.size))
            .collect();
        for row in &mut rows {
            row.size = row.directory.as_deref().map(|directory| Size {
                written: usage::of_container(directory),
                image: images.get(&row.image_id).copied().unwrap_or(0),
            });
        }
    }
    let fields = || {
        rows.iter()
            .map(|row| columns::fields(row, args.no_trunc))
            .collect()
    };
    if format::print_list(args.format.as_ref(), args.quiet, &columns::HEADINGS, fields)? {
        return Ok(0);
    }
    if args.quiet {
        let ids = rows.iter().map(|row| row.shown_id(args.no_trunc) + "\n");
        output::print(ids.collect::<String>())?;
    } else if args.json {
        let listed: Vec<Listed<'_>> = rows.iter().map(listed).collect();
        output::print_json(&listed)?;
    } else {
        columns::table(&rows, args.no_trunc, args.all_engines, args.size).print()?;
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
        state: row.state(),
        status: in_words(&row.status, row.created_ns, row.life),
        exit: row.status.exit.as_ref(),
        machine: &row.machine,
        labels: &row.labels,
        volumes: &row.volumes,
        network: &row.network,
        addresses: &row.status.addresses,
        ports: &row.ports,
        size: row.size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A container that has ended.
    pub fn row() -> Row {
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
}
