//! `hull kill`.

use hull_engine::{container, values};
use hull_sandbox::control::protocol::Request;

use super::{config_for_root, for_each};
use crate::error::Result;
use crate::output;

/// Arguments of `kill`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Signal to send, by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = values::signal)]
    signal: u32,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Sends a signal to the init process of each container.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    for_each(&args.containers, |name| {
        let container = container::find(&paths, name)?;
        container::connect(&container)?.do_(&Request::Signal {
            container: container.record.id.clone(),
            signal: args.signal,
            all: false,
        })?;
        output::print(format!("{name}\n"))
    })
}
