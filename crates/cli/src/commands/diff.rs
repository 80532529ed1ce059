//! `hull diff`.

use hull_engine::changes;

use super::config_for_root;
use crate::error::Result;
use crate::output::{self, printable};

/// Arguments of `diff`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Lists what a container has added (A), changed (C) and deleted (D).
pub fn execute(args: Args) -> Result<u8> {
    let changes = changes::diff(&config_for_root()?.paths(), &args.container)?;
    let lines = changes.iter().map(|change| {
        let path = change.path.display().to_string();
        format!("{} {}\n", change.kind.letter(), printable(&path))
    });
    output::print(lines.collect::<String>())?;
    Ok(0)
}
