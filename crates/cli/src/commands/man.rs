//! `hull man`: run once by `make install`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::cli::Hull;
use crate::error::{Context, Result};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory that the pages are written to
    directory: PathBuf,
}

/// Writes a page for hull and one for each command.
pub fn execute(args: Args) -> Result<u8> {
    let directory = &args.directory;
    std::fs::create_dir_all(directory)
        .context(|| format!("cannot create {}", directory.display()))?;
    clap_mangen::generate_to(Hull::command(), directory)
        .context(|| format!("cannot write manual pages to {}", directory.display()))?;
    Ok(0)
}
