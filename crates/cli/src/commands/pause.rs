//! `hull pause` and `hull unpause`.

use hull_engine::lifecycle;

use super::{config_for_existing, for_each};
use crate::error::Result;
use crate::output;

/// Arguments of `pause` and `unpause`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Pauses or resumes each container.
pub fn execute(args: Args, freeze: bool) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    for_each(&args.containers, |name| {
        lifecycle::freeze(&paths, name, freeze)?;
        output::print(format!("{name}\n"))
    })
}
