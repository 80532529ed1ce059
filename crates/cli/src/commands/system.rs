//! `hull system`: what is about everything that hull keeps on this host.

mod df;

use std::collections::BTreeMap;

use hull_engine::error::of_image;
use hull_engine::listing::PruneFilter;
use hull_engine::networks;
use hull_engine::volumes::store;

use super::{agreed, config_for_root, container, events, image, info};
use crate::error::Result;
use crate::images;
use crate::output;

/// Arguments of `system`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show what images, containers and volumes take of the disk
    Df(df::Args),
    /// Show what happens to containers; hull events
    Events(events::Args),
    /// Show what there is on this host; hull info
    Info(info::Args),
    /// Remove containers that do not run, networks that no container is in, and images that nothing
    /// uses
    Prune {
        /// Remove only containers and networks that match: until=TIME, label=KEY[=VALUE],
        /// label!=KEY[=VALUE]; images stay
        #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = PruneFilter::parse,
              conflicts_with_all = ["all", "volumes"])]
        filters: Vec<PruneFilter>,
        /// Remove images with a name too
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
        /// Remove volumes without a name of their own that no container uses, too
        #[arg(long)]
        volumes: bool,
    },
}

/// Manages everything.
pub fn execute(args: Args) -> Result<u8> {
    match args.command {
        Command::Df(args) => df::execute(&args),
        Command::Events(args) => events::execute(args),
        Command::Info(args) => info::execute(args),
        Command::Prune {
            all,
            force,
            volumes,
            filters,
        } => prune(all, force, volumes, &filters),
    }
}

fn prune(all: bool, force: bool, volumes: bool, filters: &[PruneFilter]) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    let mut what = match filters.is_empty() {
        true => vec![
            "all containers that do not run",
            "all networks that no container is in",
        ],
        false => {
            vec!["containers that do not run and networks that no container is in, if they match"]
        }
    };
    if volumes {
        what.push("all volumes without a name of their own that no container uses");
    }
    what.extend(filters.is_empty().then_some(match all {
        true => "all images that no container uses, also those with a name",
        false => "all images without a name that no container uses",
    }));
    if !force && !agreed(&what.join(", "))? {
        return Ok(0);
    }
    let images = images::store(&config)?;
    // Containers first: then nothing uses their volumes and images.
    let (status, mut reclaimed) = container::prune(&paths, filters)?;
    // Without root there are none.
    if !config.without_root {
        for name in networks::prune(&paths, filters)? {
            output::print(format!("{name}\n"))?;
        }
    }
    if !filters.is_empty() {
        output::print(format!(
            "Total reclaimed space: {}\n",
            output::decimal_size(reclaimed)
        ))?;
        return Ok(status);
    }
    if volumes {
        let bytes: BTreeMap<String, u64> = store::list(&paths)?
            .into_iter()
            .flatten()
            .filter(|volume| volume.record.anonymous)
            .map(|volume| (volume.name.clone(), volume.size()))
            .collect();
        for name in store::prune(&paths, false, |_| true)? {
            reclaimed += bytes.get(&name).copied().unwrap_or(0);
            output::print(format!("{name}\n"))?;
        }
    }
    let container_exists = |id: &str| paths.container(id).exists();
    let removed = images.prune(all, &container_exists).map_err(of_image)?;
    image::report(&removed)?;
    reclaimed += removed.bytes;
    let note = if removed.layers_kept {
        "; more when the running pulls have ended"
    } else {
        ""
    };
    output::print(format!(
        "Total reclaimed space: {}{note}\n",
        output::decimal_size(reclaimed)
    ))?;
    Ok(status)
}
