//! `hull pause` and `hull unpause`.

use hull_engine::container;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::State;

use super::{config_for_existing, for_each};
use crate::error::{Error, Result};
use crate::output;

/// Arguments of `pause` and `unpause`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Pauses or resumes each container.
pub fn execute(args: Args, freeze: bool) -> Result<u8> {
    let paths = config_for_existing()?.paths();
    for_each(&args.containers, |name| {
        let container = container::find(&paths, name)?;
        let problem = match (freeze, container.status.state) {
            (true, State::Paused) => Some("is already paused"),
            (false, State::Running) => Some("is not paused"),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(Error::wrong_state(format!("container {name} {problem}")));
        }
        container::connect(&container)?.do_(&Request::Freeze {
            container: container.record.id.clone(),
            frozen: freeze,
        })?;
        output::print(format!("{name}\n"))
    })
}
