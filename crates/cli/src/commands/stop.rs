//! `hull stop`.

use hull_engine::Paths;
use hull_engine::container::{self, Container};
use hull_engine::values;
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::signals;

use super::{config_for_existing, for_each_at_once};
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
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Sends the stop signal, then SIGKILL; prints the name of each container when it has exited.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let paths = config.paths();
    let seconds = args.time.unwrap_or(config.stop_timeout);
    for_each_at_once(&args.containers, |name| {
        stop(&paths, &container::find(&paths, name)?, seconds)?;
        Ok(Some(name.to_owned()))
    })
}

/// Stops a container, if it runs; below zero it is waited for without an end.
///
/// # Errors
/// It does not stop.
pub fn stop(paths: &Paths, container: &Container, seconds: i64) -> Result<()> {
    let timeout_ms = match u64::try_from(seconds) {
        Ok(seconds) => seconds.saturating_mul(1000),
        Err(_) => u64::MAX,
    };
    if !container::is_idle(container)
        && let Err(error) = ask(container, timeout_ms)
    {
        // Exited by itself meanwhile, and may have been removed: the goal is reached.
        let now = container::load(paths, &container.record.id)?;
        if now.is_some_and(|now| !container::is_idle(&now)) {
            return Err(error);
        }
    }
    Ok(())
}

fn ask(container: &Container, timeout_ms: u64) -> Result<()> {
    const SIGTERM: u32 = 15;
    let request = Request::Stop {
        container: container.record.id.clone(),
        signal: signals::parse(&container.record.details.stop_signal).unwrap_or(SIGTERM),
        timeout_ms,
    };
    match container::connect(container)?.ask(&request, &[])?.message {
        Reply::Ended(_) => Ok(()),
        other => Err(unexpected(&other)),
    }
}
