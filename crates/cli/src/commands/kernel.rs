//! `hull kernel`: the installed guest kernels.

use std::path::{Path, PathBuf};

use hull_machine::Kind;
use serde::Serialize;

use crate::error::{Context, Result};
use crate::output::{self, Table};
use hull_engine::config::Config;
use hull_engine::guest_files::{GuestFiles, kernel_file};

/// Arguments of `kernel`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the installed kernels
    #[command(visible_alias = "list")]
    Ls {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show version, size and configuration hash of kernels
    Info {
        /// Kernel of this machine kind only: uml or qemu
        #[arg(long, value_name = "KIND", value_parser = machine_kind)]
        machine: Option<Kind>,
        /// This file instead of the installed kernels
        #[arg(long, value_name = "FILE", conflicts_with = "machine")]
        kernel: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

fn machine_kind(text: &str) -> std::result::Result<Kind, String> {
    text.parse()
        .map_err(|_| format!("unknown machine kind {text:?}: uml or qemu"))
}

/// A kernel in the output.
#[derive(Debug, Serialize)]
struct Kernel {
    /// `um`, or the architecture of the host.
    architecture: String,
    /// Machine kinds that use it.
    machines: Vec<String>,
    path: PathBuf,
    version: String,
    size: u64,
    config_hash: String,
}

/// Shows kernels.
pub fn execute(args: Args) -> Result<u8> {
    let config = Config::load()?;
    let guest = GuestFiles::locate(&config)?;
    match args.command {
        Command::Ls { json } => {
            let kernels = installed(&guest)?;
            if json {
                output::print_json(&kernels)?;
            } else {
                list(&kernels).print()?;
            }
        }
        Command::Info {
            machine,
            kernel: file,
            json,
        } => {
            let kernels = if let Some(file) = file {
                vec![kernel("", &[], &kernel_file(&file)?)?]
            } else if let Some(kind) = machine {
                let architecture = kind.kernel_architecture();
                let kinds = hull_machine::kernels()
                    .into_iter()
                    .find(|(other, _)| *other == architecture)
                    .map(|(_, kinds)| kinds)
                    .unwrap_or_default();
                vec![kernel(architecture, &kinds, &guest.kernel(kind)?)?]
            } else {
                installed(&guest)?
            };
            if json {
                output::print_json(&kernels)?;
            } else {
                let text: Vec<String> = kernels.iter().map(describe).collect();
                output::print(text.join("\n"))?;
            }
        }
    }
    Ok(0)
}

/// The installed kernels; an error if there are none.
fn installed(guest: &GuestFiles) -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for (architecture, kinds) in hull_machine::kernels() {
        let Some(kind) = kinds.first() else { continue };
        let path = guest.kernel_path(*kind);
        if path.is_file() {
            kernels.push(kernel(architecture, &kinds, &path)?);
        }
    }
    if kernels.is_empty() {
        // The same error as when a container needs a kernel.
        guest.any_kernel()?;
    }
    Ok(kernels)
}

fn kernel(architecture: &str, kinds: &[Kind], path: &Path) -> Result<Kernel> {
    let information = GuestFiles::information(path)?;
    let metadata = std::fs::metadata(path).context(|| format!("read {}", path.display()))?;
    Ok(Kernel {
        architecture: architecture.to_owned(),
        machines: kinds.iter().map(|kind| kind.name().to_owned()).collect(),
        path: path.to_owned(),
        version: information.version,
        size: metadata.len(),
        config_hash: information.config_hash,
    })
}

fn or_unknown(text: &str) -> &str {
    if text.is_empty() { "unknown" } else { text }
}

fn list(kernels: &[Kernel]) -> Table {
    let mut table = Table::new(&["ARCHITECTURE", "MACHINE", "VERSION", "SIZE", "CONFIG"]);
    for kernel in kernels {
        table.row([
            kernel.architecture.clone(),
            kernel.machines.join(", "),
            or_unknown(&kernel.version).to_owned(),
            output::decimal_size(kernel.size),
            or_unknown(&kernel.config_hash).to_owned(),
        ]);
    }
    table
}

fn describe(kernel: &Kernel) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| text.push_str(&format!("{name:14}{value}\n"));
    if !kernel.architecture.is_empty() {
        line("architecture", &kernel.architecture);
        line("machine", &kernel.machines.join(", "));
    }
    line("version", or_unknown(&kernel.version));
    line("size", &output::decimal_size(kernel.size));
    line("config hash", or_unknown(&kernel.config_hash));
    line("file", &kernel.path.display().to_string());
    text
}
