//! `hull generate`: files for other programs.

use std::fs;
use std::path::PathBuf;

use hull_engine::container;
use hull_engine::install::systemd;

use super::{config_for_existing, for_each};
use crate::error::{Context, Result};
use crate::output;

/// Arguments of `generate`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print a unit of systemd for each container: it starts, watches and stops it
    Systemd {
        /// Write them to files in this directory, container-NAME.service, and print their names
        #[arg(short, long)]
        files: bool,
        /// Accepted for podman's sake: units have names
        #[arg(short, long, hide = true)]
        name: bool,
        /// Names or ids
        #[arg(value_name = "CONTAINER", required = true)]
        containers: Vec<String>,
    },
}

/// Generates files.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let Command::Systemd {
        files, containers, ..
    } = args.command;
    for_each(&containers, |name| {
        let container = container::find(&config.paths(), name)?;
        let unit = systemd::container_unit(&config, &container)?;
        if !files {
            return output::print(unit);
        }
        let name = &container.record.details.name;
        let path = PathBuf::from(format!("container-{name}.service"));
        fs::write(&path, unit).context(|| format!("write {}", path.display()))?;
        output::print(format!("{}\n", path.display()))
    })
}
