//! `hull completions`: run once by `make install`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Hull;
use crate::error::Result;
use crate::output;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Prints the completion script.
pub fn execute(args: Args) -> Result<u8> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Hull::command(), "hull", &mut script);
    output::print(script)?;
    Ok(0)
}
