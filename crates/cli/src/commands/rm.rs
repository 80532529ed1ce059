//! `hull rm`.

use hull_engine::container::{self, Container, Removing};

use super::{config_for_existing, for_each_at_once, named_or_all};
use crate::error::{ErrorKind, Result};

/// Arguments of `rm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kill running containers first; one that does not exist is no error
    #[arg(short, long)]
    force: bool,
    /// Remove volumes that were created for them and have no names of their own, too
    #[arg(short, long)]
    volumes: bool,
    /// All containers that do not run; with --force all
    #[arg(short, long, conflicts_with = "containers")]
    all: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required_unless_present = "all")]
    containers: Vec<String>,
}

/// Removes containers and all their resources.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let wanted = |container: &Container| args.force || container::is_idle(container);
    let names = named_or_all(&paths, args.containers, args.all, wanted)?;
    for_each_at_once(&names, |name| {
        let id = match container::find_id(&paths, name) {
            Ok(id) => id,
            Err(error) if args.force && error.kind == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let removing = Removing {
            force: args.force,
            volumes: args.volumes,
        };
        container::remove(&paths, &id, removing)?;
        Ok(Some(name.to_owned()))
    })
}
