//! `hull man`: run once by `make install`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::cli::Hull;
use crate::error::{Context, Result};
use crate::oci;

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory that the pages are written to
    directory: PathBuf,
}

/// Writes manual pages for hull, hull-oci, and each of their commands.
pub fn execute(args: Args) -> Result<u8> {
    let directory = &args.directory;
    std::fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
    for grammar in [Hull::command(), oci::grammar()] {
        clap_mangen::generate_to(grammar, directory)
            .context(|| format!("write manual pages to {}", directory.display()))?;
    }
    Ok(0)
}
