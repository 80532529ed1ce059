//! `hull image history`: the steps that an image was made by.

use hull_engine::config::Config;
use hull_engine::error::of_image;
use hull_engine::images::of_local;
use hull_engine::time::{self, UnixNanos};
use hull_image::{HistoryEntry, Reference};
use serde_json::{Value, json};

use crate::error::Result;
use crate::format::{self, ListFormat, Row};
use crate::images;
use crate::output::{self, Table};

/// Longest instruction that is shown in a table, as in Docker.
const SHORT: usize = 45;

/// The fields of `image history --format`, with the headings of a table.
const HEADINGS: [(&str, &str); 6] = [
    ("ID", "IMAGE"),
    ("CreatedSince", "CREATED"),
    ("CreatedAt", "CREATED AT"),
    ("CreatedBy", "CREATED BY"),
    ("Size", "SIZE"),
    ("Comment", "COMMENT"),
];

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
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
    /// Print sizes and times for people; --human=false for bytes and time stamps
    #[arg(short = 'H', long, value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    human: bool,
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
    let rows = || steps.iter().map(|(id, step)| row(id, step, args)).collect();
    if format::print_list(args.format.as_ref(), args.quiet, &HEADINGS, rows)? {
        return Ok(());
    }
    if args.quiet {
        let ids = steps.iter().map(|(id, _)| format!("{id}\n"));
        return output::print(ids.collect::<String>());
    }
    if args.json {
        let objects: Vec<Value> = steps.iter().map(|(id, step)| object(id, step)).collect();
        return output::print_json(&objects);
    }
    let mut table = Table::new(&["IMAGE", "CREATED", "CREATED BY", "SIZE", "COMMENT"]);
    for (id, step) in steps {
        let shown = Shown::new(step, args);
        table.row([
            id.to_owned(),
            shown.created,
            shown.created_by,
            shown.size,
            step.comment.clone(),
        ]);
    }
    table.print()
}

/// A step as text.
struct Shown {
    created: String,
    created_by: String,
    size: String,
}

impl Shown {
    fn new(step: &HistoryEntry, args: &Args) -> Self {
        let since = created(step).map(|created| format!("{} ago", time::human_age(created)));
        Self {
            created: match args.human {
                true => since.unwrap_or_else(|| "N/A".to_owned()),
                false => step.created.clone().unwrap_or_default(),
            },
            created_by: match args.no_trunc {
                true => step.created_by.clone(),
                false => output::shorten(&step.created_by, SHORT),
            },
            size: match args.human {
                true => output::decimal_size(step.size),
                false => step.size.to_string(),
            },
        }
    }
}

fn created(step: &HistoryEntry) -> Option<UnixNanos> {
    step.created.as_deref().and_then(time::parse_rfc3339)
}

fn row(id: &str, step: &HistoryEntry, args: &Args) -> Row {
    let shown = Shown::new(step, args);
    Row::new()
        .field("ID", id)
        .field("CreatedSince", shown.created)
        .field("CreatedAt", step.created.clone().unwrap_or_default())
        .field("CreatedBy", shown.created_by)
        .field("Size", shown.size)
        .field("Comment", step.comment.as_str())
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
