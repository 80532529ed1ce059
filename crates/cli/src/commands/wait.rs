//! `hull wait`.

use hull_sandbox::wire::{Reply, Request};
use hull_sandbox::{Exit, Paths, Record, State, client};

use super::{config_for_root, for_each};
use crate::error::{Error, Result};
use crate::output;

/// Arguments of `wait`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names or ids
    #[arg(value_name = "CONTAINER", required = true)]
    containers: Vec<String>,
}

/// Prints the exit code of each container when it has ended.
pub fn execute(args: Args) -> Result<u8> {
    let paths = config_for_root()?.paths();
    for_each(&args.containers, |name| {
        let exit = wait_for_end(&paths, name)?;
        output::print(format!("{}\n", exit.status))
    })
}

/// Waits until a container has ended; one that has ended already is no error.
pub fn wait_for_end(paths: &Paths, name: &str) -> Result<Exit> {
    let (record, container) = client::find(paths, name)?;
    if let Some(exit) = ended(&record) {
        return Ok(exit);
    }
    let asked = client::ask(&record, &container, &Request::Wait);
    match asked {
        Ok((Reply::Ended(exit), _)) => Ok(exit),
        Ok(_) => Err(unexpected_reply()),
        // It may have ended, or been killed, between the look and the question.
        Err(failure) => match Record::load(&container).ok().as_ref().and_then(ended) {
            Some(exit) => Ok(exit),
            None => Err(failure.into()),
        },
    }
}

/// How a container ended, if it did.
pub fn ended(record: &Record) -> Option<Exit> {
    match record.state {
        State::Stopped => record.exit.clone(),
        _ => None,
    }
}

/// The sandbox process answered something that was not asked.
pub fn unexpected_reply() -> Error {
    Error::new("the sandbox process gave an answer to another question")
        .hint("was hull updated while the container ran? stop it and start it again")
}
