//! `hull config`.

use serde_json::json;

use crate::error::Result;
use crate::output;
use hull_engine::config::{self, Config};

/// Arguments of `config`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the default file, which explains every key, instead
    #[arg(long)]
    default: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "default")]
    json: bool,
}

/// Prints the effective values and where each comes from, as a valid configuration file.
pub fn execute(args: Args) -> Result<u8> {
    if args.default {
        output::print(config::DEFAULT)?;
        return Ok(0);
    }
    let config = Config::load()?;
    if args.json {
        let keys: Vec<_> = config
            .origins
            .iter()
            .map(|origin| json!({"key": origin.key, "value": origin.value, "from": origin.place}))
            .collect();
        output::print_json(&keys)?;
        return Ok(0);
    }
    let lines: Vec<(String, &str)> = config
        .origins
        .iter()
        // A value may span several lines in its file.
        .map(|origin| {
            (
                origin
                    .value
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" "),
                origin,
            )
        })
        .map(|(value, origin)| (format!("{} = {value}", origin.key), origin.place.as_str()))
        .collect();
    let width = lines
        .iter()
        .map(|(line, _)| line.chars().count())
        .max()
        .unwrap_or(0);
    let text: String = lines
        .iter()
        .map(|(line, place)| format!("{line:width$}  # {place}\n"))
        .collect();
    output::print(text)?;
    Ok(0)
}
