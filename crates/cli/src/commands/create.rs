//! `hull create`.

use hull_engine::run::Run;
use hull_sandbox::timings::Timings;

use super::config_for_root;
use super::run::{Caller, ContainerArgs};
use crate::error::Result;
use crate::output;

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "hull create [OPTIONS] IMAGE [COMMAND] [ARG]...",
    disable_help_flag = true
)]
pub struct Args {
    #[command(flatten)]
    container: ContainerArgs,
}

/// Creates a container and prints its id; there is no machine for it until it is started.
pub fn execute(args: Args, began_ns: u64) -> Result<u8> {
    let config = config_for_root()?;
    let (options, caller) = Caller::split(args.container, &config)?;
    let timings = Timings::default();
    let run = Run::prepare(options, &config, began_ns, &timings)?;
    let (image, _hold) = caller.obtain(&run, &config)?;
    let created = run.create(&image)?;
    caller.tell(&created.id)?;
    output::print(format!("{}\n", created.id))?;
    Ok(0)
}
