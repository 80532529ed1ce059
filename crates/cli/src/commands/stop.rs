//! `hull stop`.

use hull_sandbox::wire::Request;
use hull_sandbox::{Record, State, client};

use super::{config_for_root, for_each};
use crate::error::Result;
use crate::output;

/// Arguments of `stop`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds to wait before killing the container; -1 waits for ever
    #[arg(
        short = 't',
        long = "time",
        alias = "timeout",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    time: Option<i64>,
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Sends the stop signal, then SIGKILL; prints the name of each container when it has ended.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    let seconds = args.time.unwrap_or(config.stop_timeout);
    let request = Request::Stop {
        signal: None,
        timeout_ms: match u64::try_from(seconds) {
            Ok(seconds) => seconds.saturating_mul(1000),
            Err(_) => u64::MAX,
        },
    };
    for_each(&args.containers, |name| {
        let (record, container) = client::find(&paths, name)?;
        if record.state != State::Stopped
            && let Err(failure) = client::ask(&record, &container, &request)
        {
            // Ended by itself in between, and perhaps removed: that is what was asked for.
            let stopped = Record::load(&container).map(|record| record.state == State::Stopped);
            if !stopped.unwrap_or(!container.run.exists()) {
                return Err(failure.into());
            }
        }
        output::print(format!("{name}\n"))
    })
}
