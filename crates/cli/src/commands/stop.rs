//! `hull stop`.

use hull_engine::config::Config;
use hull_engine::container::{self, Container, Down};
use hull_engine::supervise;
use hull_engine::values;
use hull_sandbox::control::client::unexpected;
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::signals;

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
        stop(&config, name, down, args.time)?;
        Ok(Some(name.to_owned()))
    })
}

/// How long a stop waits for a container, as was asked for with it.
fn timeout(container: &Container, config: &Config) -> i64 {
    let options = container.record.details.options.as_ref();
    let asked = options.and_then(|options| options.stop_timeout);
    asked.unwrap_or(config.stop_timeout)
}

/// Stops a container, if it runs, which then stays down. `seconds` is how long it may take, instead
/// of what was asked for with it. Returns what it was before.
///
/// # Errors
/// It does not stop.
pub fn stop(config: &Config, name: &str, down: Down, seconds: Option<i64>) -> Result<Container> {
    let paths = config.paths();
    let container = container::keep_down(&paths, container::find(&paths, name)?, down)?;
    let seconds = seconds.unwrap_or_else(|| timeout(&container, config));
    // Below zero it is waited for without an end.
    let timeout_ms = match u64::try_from(seconds) {
        Ok(seconds) => seconds.saturating_mul(1000),
        Err(_) => u64::MAX,
    };
    if !container::is_idle(&container)
        && let Err(error) = ask(&container, timeout_ms)
    {
        // Exited by itself meanwhile, and may have been removed: the goal is reached.
        let now = container::load(&paths, &container.record.id)?;
        if now.is_some_and(|now| !container::is_idle(&now)) {
            return Err(error);
        }
    }
    Ok(container)
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
