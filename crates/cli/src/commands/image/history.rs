//! `hull image history`: the steps that an image was made by.

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::images::of_local;
use hull_engine::time;
use hull_image::{HistoryEntry, Reference};
use serde_json::{Value, json};

use crate::error::Result;
use crate::images;
use crate::output::{self, Table};

/// Longest instruction that is shown in a table, as in Docker.
const SHORT: usize = 45;

/// Arguments of `image history`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not shorten ids and instructions
    #[arg(long)]
    no_trunc: bool,
    /// Show ids only
    #[arg(short, long)]
    quiet: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
    /// Name or id
    image: String,
}

/// Prints the history of an image.
pub fn execute(config: &Config, args: &Args) -> Result<()> {
    let store = images::store(config)?;
    let reference: Reference = args.image.parse().map_err(of_image)?;
    let image = store.inspect(&reference).map_err(of_local)?;
    let history = store.history(&image).map_err(of_image)?;
    let newest = match args.no_trunc {
        true => image.id.clone(),
        false => super::short_id(&image.id),
    };
    // The ids of the other steps are known only to the engine that built the image.
    let ids = std::iter::once(newest.as_str()).chain(std::iter::repeat("<missing>"));
    let steps: Vec<(&str, &HistoryEntry)> = ids.zip(&history).collect();
    if args.quiet {
        return output::print(
            steps
                .iter()
                .map(|(id, _)| format!("{id}\n"))
                .collect::<String>(),
        );
    }
    if args.json {
        let objects: Vec<Value> = steps.iter().map(|(id, step)| object(id, step)).collect();
        return output::print_json(&objects);
    }
    let mut table = Table::new(&["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"]);
    for (id, step) in steps {
        let created_by = match args.no_trunc {
            true => step.created_by.clone(),
            false => output::shorten(&step.created_by, SHORT),
        };
        let created = step.created.as_deref().and_then(time::parse_rfc3339);
        table.row([
            id.to_owned(),
            created.map_or_else(
                || "N/A".to_owned(),
                |created| format!("{} ago", time::human_age(created)),
            ),
            created_by,
            output::decimal_size(step.size),
            step.comment.clone(),
        ]);
    }
    table.print()
}

fn object(id: &str, step: &HistoryEntry) -> Value {
    json!({
        "id": id,
        "created": step.created,
        "created_by": step.created_by,
        "comment": step.comment,
        "size": step.size,
        "empty_layer": step.empty_layer,
    })
}
