//! `hull completions`: run once by `make install`.

use crate::error::{Context, Error, Result};
use crate::{completion, output};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_parser = ["bash", "elvish", "fish", "powershell", "zsh"])]
    shell: String,
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
    let name = match args.name {
        Name::Hull => "hull",
        Name::HullOci => "hull-oci",
    };
    let script = completion::script(&args.shell, name)
        .ok_or_else(|| Error::unsupported(format!("completion in {}", args.shell)))?
        .context(|| "write the completion script")?;
    output::print(script)?;
    Ok(0)
}
