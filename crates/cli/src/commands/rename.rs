//! `hull rename`.

use hull_engine::container;
use hull_engine::values;

use super::config_for_existing;
use crate::error::Result;

/// Arguments of `rename`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Its new name
    #[arg(value_name = "NAME", value_parser = values::container_name)]
    name: String,
}

/// Gives a container another name.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    container::rename(&paths, &args.container, &args.name)?;
    Ok(0)
}
