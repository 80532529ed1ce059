//! `hull export`.

use std::fs::File;
use std::io::IsTerminal;
use std::path::PathBuf;

use hull_engine::changes;

use super::config_for_root;
use crate::error::{Context, Error, Result};
use crate::output::Stream;

/// Arguments of `export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Writes the root file system of a container as a tar archive, without its volumes.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    match &args.output {
        None => {
            if std::io::stdout().is_terminal() {
                return Err(Error::new("an archive is not written to a terminal")
                    .hint("hull export -o FILE CONTAINER"));
            }
            changes::export(&paths, &args.container, Stream)?;
        }
        Some(path) => {
            let file = File::create(path).context(|| format!("create {}", path.display()))?;
            changes::export(&paths, &args.container, file).inspect_err(|_| {
                // Half an archive is of no use; the error that is reported made this necessary.
                let _ = std::fs::remove_file(path);
            })?;
        }
    }
    Ok(0)
}
