//! `hull pause` and `hull unpause`.

use hull_sandbox::wire::Request;
use hull_sandbox::{State, client};

use super::{config_for_root, for_each};
use crate::error::{Error, Result, WRONG_CONTAINER};
use crate::output;

/// Arguments of `pause` and `unpause`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Freezes each container, or lets it go on.
pub fn execute(args: Args, freeze: bool) -> Result<u8> {
    let paths = config_for_root()?.paths();
    for_each(&args.containers, |name| {
        let (record, container) = client::find(&paths, name)?;
        let problem = match (freeze, record.state) {
            (true, State::Paused) => Some("is already paused"),
            (false, State::Running) => Some("is not paused"),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(Error::new(format!("container {name} {problem}")).status(WRONG_CONTAINER));
        }
        let request = if freeze {
            Request::Pause
        } else {
            Request::Resume
        };
        client::ask(&record, &container, &request)?;
        output::print(format!("{name}\n"))
    })
}
