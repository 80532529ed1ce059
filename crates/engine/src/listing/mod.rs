//! Containers as lists show them: `ps`, and the API.

mod filter;
mod prune;

use std::collections::BTreeMap;
use std::path::PathBuf;

use hull_image::Store;
use hull_network::cni::PortMapping;
use hull_sandbox::store::{State, Status};
use serde::Serialize;

use crate::container::{self, Container, EngineContainer};
use crate::error::{Error, Result, of_image};
use crate::health::{Health, HealthStatus};
use crate::inspect::{RESTARTING, state_name};
use crate::paths::Paths;
use crate::supervise;
use crate::volumes::Source;
use crate::{time, usage};

pub(crate) use self::filter::name_pattern;
pub use self::filter::{Filter, Filters, KEYS, STATES};
pub use self::prune::PruneFilter;

/// How much there is of a container's files.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Size {
    /// Bytes in the writable layer.
    pub written: u64,
    /// Bytes of the image.
    pub image: u64,
}

/// A volume or a directory of the host in a container.
#[derive(Debug, Default)]
pub struct Mount {
    /// The name of a volume, or a path of the host.
    pub source: String,
    /// Where the container has it.
    pub destination: String,
    /// It is a volume.
    pub is_volume: bool,
    /// The container cannot write to it.
    pub read_only: bool,
}

/// What the supervisor of a container knows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Life {
    /// It waits to be started again.
    pub restarting: bool,
    /// Its health, if that is checked.
    pub health: Option<HealthStatus>,
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
    pub fn health(&self) -> &'static str {
        self.health.map_or("none", HealthStatus::name)
    }
}

/// Status as text: `Up 5 minutes`, `Exited (0) 2 hours ago`.
pub fn in_words(status: &Status, created_ns: u64, life: Life) -> String {
    let since = |time: Option<u64>| time::human_age(i128::from(time.unwrap_or(created_ns)));
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
#[derive(Debug)]
pub struct Row {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The engine that it belongs to.
    pub engine: String,
    /// Image reference as given.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// What its init was started as.
    pub command: Vec<String>,
    /// When it was created.
    pub created_ns: u64,
    /// How far it is.
    pub status: Status,
    /// What its supervisor knows.
    pub life: Life,
    /// Machine kind.
    pub machine: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Volumes, as given.
    pub volumes: Vec<String>,
    /// Names of its networks.
    pub networks: Vec<String>,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Volumes and directories of the host.
    pub mounts: Vec<Mount>,
    /// Of one of hull's own.
    pub directory: Option<PathBuf>,
    /// If they were asked for.
    pub size: Option<Size>,
}

impl Row {
    /// Docker's name for its state.
    pub fn state(&self) -> &'static str {
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
                read_only: volume.read_only,
            }
        });
        let further = details
            .options
            .iter()
            .flat_map(|options| &options.network.further);
        let networks = std::iter::once(&details.network)
            .chain(further.map(|further| &further.network))
            .filter(|name| !name.is_empty())
            .cloned()
            .collect();
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
            status: container.status,
            life,
            machine: details.machine,
            labels: details.labels,
            volumes: details.volumes,
            networks,
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
            status: container.stored.status,
            image_id: String::new(),
            life: Life::default(),
            machine: String::new(),
            labels: BTreeMap::new(),
            volumes: Vec::new(),
            networks: Vec::new(),
            ports: Vec::new(),
            mounts: Vec::new(),
            directory: None,
            size: None,
        }
    }

    /// The whole id, or its beginning.
    pub fn shown_id(&self, no_trunc: bool) -> String {
        match no_trunc {
            true => self.id.clone(),
            false => self.id.get(..12).unwrap_or(&self.id).to_owned(),
        }
    }
}

/// Which containers are wanted.
#[derive(Debug, Default)]
pub struct Selection {
    /// Also those that do not run.
    pub all: bool,
    /// Also those of engines.
    pub engines: bool,
    /// Only so many that were created last, whatever state they are in.
    pub last: Option<usize>,
    /// Conditions.
    pub filters: Vec<Filter>,
}

/// The containers that are wanted, newest first, and what is wrong with others.
///
/// # Errors
/// The directory of containers cannot be read; a filter names a container that there is not.
pub fn list(paths: &Paths, selection: Selection) -> Result<(Vec<Row>, Vec<Error>)> {
    let all = selection.all
        || selection.last.is_some()
        || selection.filters.iter().any(Filter::wants_stopped);
    let filters = Filters::new(selection.filters, paths)?;
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for container in container::list(paths)? {
        match container {
            Ok(container) => rows.push(Row::own(container)),
            Err((id, mut error)) => {
                let short = id.get(..12).unwrap_or(&id);
                error.message = format!("container {short}: {}", error.message);
                wrong.push(error);
            }
        }
    }
    if selection.engines {
        for container in container::engines(paths) {
            match container {
                Ok(container) => rows.push(Row::of_engine(container)),
                Err(error) => wrong.push(error),
            }
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.created_ns));
    }
    rows.retain(|row| {
        let state = row.status.state;
        let up = matches!(state, State::Running | State::Paused) || row.life.restarting;
        (all || up) && filters.select(row)
    });
    rows.truncate(selection.last.unwrap_or(usize::MAX));
    Ok((rows, wrong))
}

/// Finds out how much there is of the files of containers.
///
/// # Errors
/// The images cannot be read.
pub fn measure(rows: &mut [Row], images: &Store) -> Result<()> {
    let images: BTreeMap<String, u64> = images
        .list()
        .map_err(of_image)?
        .into_iter()
        .map(|image| (image.id.to_string(), image.size))
        .collect();
    for row in rows {
        row.size = row.directory.as_deref().map(|directory| Size {
            written: usage::of_container(directory),
            image: images.get(&row.image_id).copied().unwrap_or(0),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hull_sandbox::store::Exit;

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
            status,
            machine: "uml".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            engine: "hull".into(),
            created_ns: 0,
            life: Life::default(),
            volumes: Vec::new(),
            networks: Vec::new(),
            ports: Vec::new(),
            mounts: Vec::new(),
            directory: None,
            size: None,
        }
    }
}
