//! `hull completions`: run once by `make install`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Hull;
use crate::error::Result;
use crate::{oci, output};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    shell: Shell,
    /// The name that is completed
    #[arg(value_enum, default_value_t = Name::Hull)]
    name: Name,
}

/// Commands with completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// The command.
    Hull,
    /// The runtime of engines.
    HullOci,
}

/// Prints the completion script.
pub fn execute(args: Args) -> Result<u8> {
    let mut script = Vec::new();
    let (mut grammar, name) = match args.name {
        Name::Hull => (Hull::command(), "hull"),
        Name::HullOci => (oci::grammar(), "hull-oci"),
    };
    clap_complete::generate(args.shell, &mut grammar, name, &mut script);
    output::print(script)?;
    Ok(0)
}
