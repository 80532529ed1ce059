//! `hull kill`.

use hull_engine::container::{self, Container};
use hull_engine::lifecycle;
use hull_engine::values;

use super::{config_for_existing, for_each_at_once, named_or_all};
use crate::error::Result;

/// Arguments of `kill`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Signal to send, by name or number
    #[arg(
        short,
        long,
        value_name = "SIGNAL",
        default_value = "KILL",
        value_parser = values::signal,
        allow_negative_numbers = true
    )]
    signal: u32,
    /// All containers that run
    #[arg(short, long, conflicts_with = "containers")]
    all: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required_unless_present = "all")]
    containers: Vec<String>,
}

/// Sends a signal to the init process of each container; after SIGKILL it waits for the end.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let runs = |container: &Container| !container::is_idle(container);
    let names = named_or_all(&paths, args.containers, args.all, runs)?;
    for_each_at_once(&names, |name| {
        lifecycle::kill(&paths, name, args.signal)?;
        Ok(Some(name.to_owned()))
    })
}
