//! `hull inspect`.

use hull_engine::config::Config;
use hull_engine::container::{self, Any};
use hull_engine::time;
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::{CONSOLE_FILE, MESSAGES_FILE};
use serde_json::{Value, json};

use super::{config_for_existing, for_each, from_ns};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::output;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print what the guests of running containers can reach: devices, addresses, queues, and the
    /// threads of the host that serve them
    #[arg(long)]
    devices: bool,
    /// Names or ids of containers, or images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Prints a JSON array with an object for each container or image.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let mut objects = Vec::new();
    let outcome = for_each(&args.names, |name| {
        objects.push(match args.devices {
            true => devices(&config, name)?,
            false => object(&config, name)?,
        });
        Ok(())
    });
    output::print_json(&objects)?;
    outcome
}

/// The devices of the guest of a running container.
fn devices(config: &Config, name: &str) -> Result<Value> {
    let container = container::find_any(&config.paths(), name)?;
    match container.connect()?.ask(&Request::Reach, &[])?.message {
        Reply::Reach(devices) => Ok(json!({"id": container.id(), "devices": devices})),
        other => Err(unexpected(&other)),
    }
}

fn object(config: &Config, name: &str) -> Result<Value> {
    match container::find_any(&config.paths(), name) {
        Ok(container) => container_object(&container),
        Err(error) if error.kind != ErrorKind::NotFound => Err(error),
        Err(_) => super::image::inspect_object(config, name)?.ok_or_else(|| {
            Error::not_found(format!("no such container or image: {name}"))
                .hint("hull ps -a --all-engines; hull image ls")
        }),
    }
}

/// Record and status in one object, with formatted times, the paths of the container's files, and
/// its OCI configuration.
fn container_object(container: &Any) -> Result<Value> {
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
    Ok(object)
}
