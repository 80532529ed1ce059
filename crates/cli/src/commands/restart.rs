//! `hull restart`.

use hull_engine::container::Down;
use hull_engine::lifecycle::{self, Stop};
use hull_engine::values;

use super::{config_for_root, for_each};
use crate::error::Result;
use crate::output;

/// Arguments of `restart`.
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
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Stops containers, those that run, and starts them.
pub fn execute(args: Args, began_ns: u64) -> Result<u8> {
    let config = config_for_root()?;
    for_each(&args.containers, |name| {
        let stop = Stop {
            down: Down::ForGood,
            seconds: args.time,
            signal: None,
        };
        let container = lifecycle::stop(&config, name, &stop)?;
        lifecycle::start(&config, &container.record.id, began_ns, None)?;
        output::print(format!("{name}\n"))
    })
}
