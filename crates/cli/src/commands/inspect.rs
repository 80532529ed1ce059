//! `hull inspect`.

use hull_sandbox::{ContainerPaths, Record, client};
use serde_json::{Value, json};

use super::{config_for_root, for_each, from_seconds};
use crate::error::{Context, Error, Result, WRONG_CONTAINER};
use crate::{output, time};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids of containers, or images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Prints one JSON array with an object for each container or image.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    let mut objects = Vec::new();
    let outcome = for_each(&args.names, |name| {
        objects.push(match client::find(&paths, name) {
            Ok((record, container)) => container_object(&record, &container)?,
            Err(failure) if failure.code != i32::from(WRONG_CONTAINER) => {
                return Err(failure.into());
            }
            Err(failure) => match super::image::inspect_object(&config, name)? {
                Some(object) => object,
                None => {
                    return Err(Error::new(format!("no such container or image: {name}"))
                        .hint("hull ps -a; hull image ls")
                        .status(u8::try_from(failure.code).unwrap_or(WRONG_CONTAINER)));
                }
            },
        });
        Ok(())
    });
    output::print_json(&objects)?;
    outcome
}

/// The record with times in words, the files of the container, and its OCI spec.
fn container_object(record: &Record, container: &ContainerPaths) -> Result<Value> {
    let mut object = serde_json::to_value(record).context(|| "cannot write JSON")?;
    let text = |seconds: u64| json!(time::format_rfc3339(from_seconds(seconds)));
    object["created"] = text(record.created);
    if let Some(started) = record.started {
        object["started"] = text(started);
    }
    if let Some(exit) = &record.exit {
        object["exit"]["at"] = text(exit.at);
    }
    object["files"] = json!({
        "state": container.state(),
        "console": container.console(),
        "messages": container.diagnostics(),
        "log": container.log(),
    });
    // There is none yet while the container is being made.
    if let Ok(spec) = std::fs::read(container.spec()) {
        object["spec"] = serde_json::from_slice(&spec)
            .context(|| format!("cannot read {}", container.spec().display()))?;
    }
    Ok(object)
}
