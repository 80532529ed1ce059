//! `hull stop`.

use hull_engine::container::{self, Container, Down};
use hull_engine::lifecycle::{self, Stop};
use hull_engine::supervise;
use hull_engine::values;

use super::{config_for_existing, for_each_at_once, named_or_all};
use crate::error::Result;

/// Arguments of `stop`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds to wait before killing the container; -1 waits for ever
    #[arg(
        short = 't',
        long = "time",
        alias = "timeout",
        value_name = "SECONDS",
        value_parser = values::seconds,
        allow_negative_numbers = true
    )]
    time: Option<i64>,
    /// All containers that run
    #[arg(short, long, conflicts_with = "containers")]
    all: bool,
    /// They are started again at boot, as if they had not been stopped
    #[arg(long, hide = true)]
    until_boot: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required_unless_present = "all")]
    containers: Vec<String>,
}

/// Sends the stop signal, then SIGKILL; prints the name of each container when it has exited.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let paths = config.paths();
    let runs = |container: &Container| {
        !container::is_idle(container) || supervise::has_supervisor(container)
    };
    let names = named_or_all(&paths, args.containers, args.all, runs)?;
    for_each_at_once(&names, |name| {
        let down = match args.until_boot {
            true => Down::UntilBoot,
            false => Down::ForGood,
        };
        let stop = Stop {
            down,
            seconds: args.time,
            signal: None,
        };
        lifecycle::stop(&config, name, &stop)?;
        Ok(Some(name.to_owned()))
    })
}
