//! `hull inspect`: containers, images, volumes and networks in Docker's words, with hull's own keys
//! of containers and images below one of them.

use std::collections::BTreeMap;

use hull_engine::config::Config;
use hull_engine::container::{self, Any};
use hull_engine::inspect;
use hull_engine::time;
use hull_engine::volumes::store;
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::{CONSOLE_FILE, MESSAGES_FILE};
use serde_json::{Value, json};

use super::{config_for_existing, for_each, from_ns};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::format::ObjectFormat;
use crate::output;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print what the guests of running containers can reach: devices, addresses, queues, and the
    /// threads of the host that serve them
    #[arg(long)]
    devices: bool,
    /// Print a line for each with a template of Go's, such as '{{.State.Status}}', or "json"
    #[arg(short, long, value_name = "FORMAT", value_parser = ObjectFormat::parse)]
    format: Option<ObjectFormat>,
    /// What the names are of; without it, the first that is there
    #[arg(
        short = 't',
        long = "type",
        value_name = "TYPE",
        conflicts_with = "devices"
    )]
    kind: Option<Kind>,
    /// With the bytes that a container has written, SizeRw, and all of it, SizeRootFs
    #[arg(short, long, conflicts_with = "devices")]
    size: bool,
    /// Names or ids of containers, images, volumes or networks
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// What has a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// A container, of hull or of an engine.
    Container,
    /// An image.
    Image,
    /// A volume.
    Volume,
    /// A network.
    Network,
}

/// Prints an object for each name.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    print_each(&args.names, args.format.as_ref(), |name| {
        match args.devices {
            true => devices(&config, name),
            false => object(&config, name, args.kind, args.size),
        }
    })
}

/// Prints the objects of names: as a JSON array, or in a format each on a line of its own.
pub fn print_each(
    names: &[String],
    format: Option<&ObjectFormat>,
    object: impl Fn(&str) -> Result<Value>,
) -> Result<u8> {
    if let Some(format) = format {
        return for_each(names, |name| output::print(format.line(&object(name)?)?));
    }
    let (mut objects, mut failures) = (Vec::new(), BTreeMap::new());
    for name in names {
        match object(name) {
            Ok(object) => objects.push(object),
            Err(error) => drop(failures.insert(name.clone(), error)),
        }
    }
    output::print_json(&objects)?;
    for_each(names, |name| failures.remove(name).map_or(Ok(()), Err))
}

/// The devices of the guest of a running container.
fn devices(config: &Config, name: &str) -> Result<Value> {
    let container = container::find_any(&config.paths(), name)?;
    match container.connect()?.ask(&Request::Reach, &[])?.message {
        Reply::Reach(devices) => Ok(json!({"id": container.id(), "devices": devices})),
        other => Err(unexpected(&other)),
    }
}

fn object(config: &Config, name: &str, kind: Option<Kind>, size: bool) -> Result<Value> {
    let kinds = match kind {
        Some(kind) => vec![kind],
        None => vec![Kind::Container, Kind::Image, Kind::Volume, Kind::Network],
    };
    for kind in kinds {
        let found = match kind {
            Kind::Container => container::find_any(&config.paths(), name).and_then(|container| {
                let mut object = container_object(config, &container)?;
                if size {
                    inspect::add_size(config, &container, &mut object)?;
                }
                Ok(object)
            }),
            Kind::Image => match hull_engine::images::inspect_object(config, name)? {
                Some(object) => Ok(object),
                None => continue,
            },
            Kind::Volume => store::find(&config.paths(), name).map(|volume| volume.object()),
            Kind::Network => inspect::network(&config.paths(), name),
        };
        match found {
            Err(error) if error.kind == ErrorKind::NotFound => {}
            found => return found,
        }
    }
    let (what, hint) = match kind {
        Some(Kind::Container) => ("container", "hull ps -a --all-engines"),
        Some(Kind::Image) => ("image", "hull image ls"),
        Some(Kind::Volume) => ("volume", "hull volume ls"),
        Some(Kind::Network) => ("network", "hull network ls"),
        None => (
            "container, image, volume or network",
            "hull ps -a --all-engines; hull image ls; hull volume ls; hull network ls",
        ),
    };
    Err(Error::not_found(format!("no such {what}: {name}")).hint(hint))
}

/// Docker's object, and hull's own below [`inspect::OWN`]: record and status in one, with formatted
/// times, the paths of the container's files, and its OCI configuration.
fn container_object(config: &Config, container: &Any) -> Result<Value> {
    let (record, status) = match container {
        Any::Own(own) => (
            serde_json::to_value(&own.record).context(|| "write JSON")?,
            &own.status,
        ),
        Any::Engine(other) => (
            serde_json::to_value(&other.stored.record).context(|| "write JSON")?,
            &other.stored.status,
        ),
    };
    let text = |nanoseconds: u64| json!(time::format_rfc3339(from_ns(nanoseconds)));
    let mut object = record["details"].clone();
    if let Some(object) = object.as_object_mut() {
        // For hull itself; what it became is in the rest.
        object.remove("options");
    }
    for name in ["id", "engine", "command"] {
        object[name] = record[name].clone();
    }
    object["created"] = text(record["created_ns"].as_u64().unwrap_or_default());
    object["state"] = json!(status.state);
    object["addresses"] = json!(status.addresses);
    object["processes"] = json!(status.processes);
    if let Some(started) = status.started_ns {
        object["started"] = text(started);
    }
    if let Some(exit) = &status.exit {
        object["exit"] = json!(exit);
        object["exit"]["at"] = text(exit.at_ns);
    }
    let directory = container.directory().path();
    object["files"] = json!({
        "directory": directory,
        "state": directory.join("record.json"),
        "log": directory.join("log"),
    });
    if let Some(sandbox) = &record["sandbox"].as_object()
        && let Ok(path) = serde_json::from_value::<hull_sandbox::store::SandboxPath>(Value::Object(
            (*sandbox).clone(),
        ))
    {
        // Kept with the container when its guest broke down; the sandbox's own goes then.
        let kept = |name: &str| container.directory().path().join(name);
        for (key, own, name) in [
            ("console", path.console(), CONSOLE_FILE),
            ("messages", path.diagnostics(), MESSAGES_FILE),
        ] {
            let files = [kept(name), own];
            if let Some(file) = files.into_iter().find(|file| file.exists()) {
                object["files"][key] = json!(file);
            }
        }
    }
    // Missing while the container is being created.
    if let Ok(spec) = container.config() {
        object["spec"] = spec;
    }
    let mut docker = inspect::container(config, container);
    docker[inspect::OWN] = object;
    Ok(docker)
}
