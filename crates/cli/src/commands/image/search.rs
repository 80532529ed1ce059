//! `hull image search`: images of a registry by a part of their name.

use hull_engine::error::of_image;
use hull_engine::search::SearchFilter;
use hull_image::{Credentials, SEARCH_RESULTS, SearchResult};
use serde_json::{Value, json};

use crate::error::Result;
use crate::format::{self, ListFormat, Row};
use crate::output::{self, Table};

/// Longest description in a table, as in Docker.
const SHORT: usize = 45;

/// The fields of `image search --format`, with the headings of a table.
const HEADINGS: [(&str, &str); 5] = [
    ("Name", "NAME"),
    ("Description", "DESCRIPTION"),
    ("StarCount", "STARS"),
    ("IsOfficial", "OFFICIAL"),
    ("IsAutomated", "AUTOMATED"),
];

/// Arguments of `image search`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Searches Docker Hub, or the registry that is named before the term. Of a registry without a search of its own, the list of repositories is searched."
)]
pub struct Args {
    /// Show only images that match: stars=NUMBER, is-official=true|false, is-automated=true|false;
    /// may be given several times
    #[arg(short, long = "filter", value_name = "KEY=VALUE", value_parser = SearchFilter::parse)]
    filters: Vec<SearchFilter>,
    /// Show at most so many
    #[arg(long, value_name = "NUMBER", default_value_t = 25, value_parser = limit)]
    limit: usize,
    /// Do not shorten descriptions
    #[arg(long)]
    no_trunc: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print with a template of Go's, "json", or "table TEMPLATE"
    #[arg(long, value_name = "FORMAT", value_parser = ListFormat::parse, conflicts_with = "json")]
    format: Option<ListFormat>,
    /// What to search for
    #[arg(value_name = "[REGISTRY/]TERM")]
    term: String,
}

/// Searches for images.
pub fn execute(args: &Args) -> Result<()> {
    let found = hull_image::search(&args.term, args.limit, &Credentials::docker());
    let mut found = found.map_err(of_image)?;
    found.retain(|result| args.filters.iter().all(|filter| filter.selects(result)));
    let description = |result: &SearchResult| match args.no_trunc {
        true => result.description.clone(),
        false => output::shorten(&result.description, SHORT),
    };
    let rows = || {
        let rows = found.iter().map(|result| {
            Row::new()
                .field("Name", result.name.as_str())
                .field("Description", description(result))
                .field("StarCount", result.stars.to_string())
                .field("IsOfficial", official(result))
                .field("IsAutomated", result.automated.to_string())
        });
        rows.collect()
    };
    if format::print_list(args.format.as_ref(), false, &HEADINGS, rows)? {
        return Ok(());
    }
    if args.json {
        let objects: Vec<Value> = found.iter().map(object).collect();
        return output::print_json(&objects);
    }
    let mut table = Table::new(&["NAME", "DESCRIPTION", "STARS", "OFFICIAL"]);
    for result in &found {
        table.row([
            result.name.clone(),
            description(result),
            result.stars.to_string(),
            official(result),
        ]);
    }
    table.print()
}

/// Docker's mark.
fn official(result: &SearchResult) -> String {
    let mark = if result.official { "[OK]" } else { "" };
    mark.to_owned()
}

fn object(result: &SearchResult) -> Value {
    json!({
        "name": result.name,
        "description": result.description,
        "stars": result.stars,
        "official": result.official,
        "automated": result.automated,
    })
}

fn limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=SEARCH_RESULTS) => Ok(number),
        _ => Err(format!("give a number from 1 to {SEARCH_RESULTS}")),
    }
}
