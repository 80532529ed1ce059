//! `hull attach`.

use hull_sandbox::wire::Request;
use hull_sandbox::{State, client};

use super::config_for_root;
use super::run::finish;
use crate::attach::{Attachment, Options};
use crate::error::{Error, Result, WRONG_CONTAINER};
use crate::values::{self, DetachKeys};

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave the container's standard input alone
    #[arg(long)]
    no_stdin: bool,
    /// Keys that detach and let the container run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Carries input and output until the container ends or the user goes.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_root()?;
    let paths = config.paths();
    let (record, container) = client::find(&paths, &args.container)?;
    let problem = match record.state {
        State::Stopped => Some("a stopped container: start another with hull run"),
        State::Paused => Some("a paused container: hull unpause comes first"),
        State::Creating | State::Running => None,
    };
    if let Some(problem) = problem {
        return Err(Error::new(format!("cannot attach to {problem}")).status(WRONG_CONTAINER));
    }
    let input = record.stdin && !args.no_stdin;
    if record.terminal && input {
        super::run::check_terminal()?;
    }
    let attachment = Attachment::prepare(Options {
        input,
        terminal: record.terminal,
        forward_signals: Some(container.socket()),
        detach_keys: args.detach_keys.unwrap_or(config.detach_keys),
    })?;
    let request = Request::Attach {
        stdin: input,
        size: attachment.size(),
    };
    let (_, stream) = client::ask(&record, &container, &request)?;
    finish(attachment.carry(stream)?, &record.name)
}
