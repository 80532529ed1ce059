//! `hull container`: what has no other name. Other commands need no such word before them.

use hull_engine::Paths;
use hull_engine::container;
use hull_engine::lifecycle::{self, Pruned};
use hull_engine::listing::PruneFilter;

use super::{agreed, config_for_existing, exists};
use crate::error::{self, Result};
use crate::output;

/// Arguments of `container`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Tell by the exit status whether there is a container: 0 or 1
    Exists {
        /// Name or id
        #[arg(value_name = "CONTAINER")]
        container: String,
    },
    /// Remove all containers that do not run
    Prune {
        /// Remove only containers that match: until=TIME, label=KEY[=VALUE], label!=KEY[=VALUE]
        #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = PruneFilter::parse)]
        filters: Vec<PruneFilter>,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
}

/// Manages containers.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    let (filters, force) = match args.command {
        Command::Exists { container } => return exists(container::find(&paths, &container)),
        Command::Prune { filters, force } => (filters, force),
    };
    if !force && !agreed("all containers that do not run")? {
        return Ok(0);
    }
    prune(&paths, &filters).map(|(status, _)| status)
}

/// Removes all containers that do not run and that conditions select, and prints their ids; the
/// exit status, and the bytes that they had written.
pub fn prune(paths: &Paths, filters: &[PruneFilter]) -> Result<(u8, u64)> {
    container::sweep(paths);
    let mut status = 0;
    let reclaimed = lifecycle::prune(paths, filters, |pruned| {
        match pruned {
            Pruned::Removed(id) => output::print(format!("{id}\n"))?,
            Pruned::Kept(error) => status = error::fail(&error).max(status),
            Pruned::Unreadable(id, error) => {
                let short = id.get(..12).unwrap_or(&id);
                output::note(format!("warning: container {short}: {error}"));
            }
        }
        Ok(())
    })?;
    Ok((status, reclaimed))
}
