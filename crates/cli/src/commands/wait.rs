//! `hull wait`.

use hull_engine::container;

use super::{config_for_existing, for_each_at_once};
use crate::error::Result;

/// Arguments of `wait`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Prints the exit code of each container when it has exited.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    for_each_at_once(&args.containers, |name| {
        let exit = container::wait(&paths, name)?;
        Ok(Some(exit.status.to_string()))
    })
}
