//! `hull start`: containers that were created, or that have ended, run.

use hull_engine::attach::{Attachment, Options};
use hull_engine::config::Config;
use hull_engine::container;
use hull_engine::lifecycle::{self, Start};
use hull_engine::run::Outcome;
use hull_engine::supervise;
use hull_engine::values::{self, DetachKeys};

use super::run::{check_terminal, follow, status_of_signal};
use super::{attach, config_for_root, for_each};
use crate::error::{Error, Result};
use crate::output;

/// Arguments of `start`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Attach output, pass signals on, and exit as the container does
    #[arg(short, long)]
    attach: bool,
    /// Attach standard input, too
    #[arg(short, long)]
    interactive: bool,
    /// Pass signals for this command on to the container
    #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    sig_proxy: bool,
    /// Keys that detach and let the container run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    /// Start those that are to run at boot, as their restart policies say
    #[arg(long, conflicts_with_all = ["containers", "attach", "interactive"])]
    at_boot: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required_unless_present = "at_boot")]
    containers: Vec<String>,
}

/// Starts containers; one that runs already is left alone.
pub fn execute(args: Args, began_ns: u64) -> Result<u8> {
    let config = config_for_root()?;
    let attached = args.attach || args.interactive;
    let paths = config.paths();
    let names = match args.at_boot {
        true => supervise::to_boot(&paths)?,
        false => args.containers,
    };
    match &names[..] {
        [name] if attached => {
            let keys = args.detach_keys.unwrap_or(config.detach_keys.clone());
            start_attached(
                name,
                args.interactive,
                args.sig_proxy,
                keys,
                &config,
                began_ns,
            )
        }
        _ if attached => Err(Error::invalid(
            "cannot attach to several containers at once: give one with --attach",
        )),
        names => for_each(names, |name| {
            lifecycle::start(&config, name, began_ns, None)?;
            output::print(format!("{name}\n"))
        }),
    }
}

fn start_attached(
    name: &str,
    interactive: bool,
    sig_proxy: bool,
    detach_keys: DetachKeys,
    config: &Config,
    began_ns: u64,
) -> Result<u8> {
    let container = container::find(&config.paths(), name)?;
    let details = &container.record.details;
    let input = interactive && details.stdin;
    if details.terminal && input {
        check_terminal()?;
    }
    let attachment = Attachment::prepare(Options {
        input,
        terminal: details.terminal,
        shown: [true; 2],
        forward_signals: sig_proxy,
        detach_keys,
    })?;
    match lifecycle::start(config, name, began_ns, Some(&attachment))? {
        Start::Running => attach::attach(&container::find(&config.paths(), name)?, attachment),
        Start::Done(Outcome::Started(started)) => follow(attachment, *started),
        Start::Done(Outcome::Interrupted(signal)) => Ok(status_of_signal(signal)),
    }
}
