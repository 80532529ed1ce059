//! `hull install` and `hull uninstall`: shows the change of an engine's configuration, applies it,
//! and prints what to do next.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::output::{self, Colours};
use hull_engine::install::{self, Change, Engine};

/// Arguments of `install`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The engine
    engine: Engine,
    /// Make hull the runtime of containers that ask for none
    #[arg(long)]
    default: bool,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `uninstall`.
#[derive(Debug, clap::Args)]
pub struct UninstallArgs {
    /// The engine
    engine: Engine,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Only show what would change
    #[arg(long)]
    dry_run: bool,
    /// Directory that the engine's /etc is in
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
}

/// Registers hull-oci with an engine.
pub fn execute(args: Args) -> Result<u8> {
    let runtime = install::runtime()?;
    let changes = args
        .engine
        .install(&args.common.root, &runtime, args.default)?;
    let next = args.engine.next(Some(args.default));
    perform(&changes, &args.common, "is installed already", next)
}

/// Reverts `install`.
pub fn uninstall(args: UninstallArgs) -> Result<u8> {
    let changes = args.engine.uninstall(&args.common.root)?;
    let next = args.engine.next(None);
    perform(&changes, &args.common, "is not installed", next)
}

fn perform(changes: &[Change], common: &Common, nothing: &str, next: &[&str]) -> Result<u8> {
    if changes.is_empty() {
        output::print(format!("nothing to do: hull {nothing}\n"))?;
        return Ok(0);
    }
    for change in changes {
        output::print(shown(change))?;
        if !common.dry_run {
            change.apply()?;
        }
    }
    if common.dry_run {
        return Ok(0);
    }
    // With another root, no running engine is affected.
    if common.root == Path::new("/") && !next.is_empty() {
        let lines: Vec<String> = next.iter().map(|line| format!("  {line}\n")).collect();
        output::print(format!("next:\n{}", lines.concat()))?;
    }
    Ok(0)
}

fn shown(change: &Change) -> String {
    let colours = Colours::for_stdout();
    let what = match (&change.before, &change.after) {
        (None, _) => " (new)",
        (_, None) => " (removed)",
        _ => "",
    };
    let mut text = format!(
        "{}{what}\n",
        output::printable(&change.path.to_string_lossy())
    );
    for line in change.lines() {
        let line = output::printable(&line);
        let line = match line.as_bytes().first() {
            Some(b'+') => colours.good(&line),
            Some(b'-') => colours.bad(&line),
            _ => line,
        };
        text.push_str(&format!("{line}\n"));
    }
    text
}
