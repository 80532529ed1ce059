//! `hull attach`.

use hull_engine::attach::{Attachment, Options};
use hull_engine::container::{self, Container};
use hull_engine::values::{self, DetachKeys};
use hull_sandbox::control::protocol::{AttachRequest, Request};
use hull_sandbox::store::State;

use super::config_for_existing;
use super::run::finish;
use crate::error::{Error, Result};

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave the container's standard input alone
    #[arg(long)]
    no_stdin: bool,
    /// Pass signals for this command on to the container
    #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    sig_proxy: bool,
    /// Keys that detach and let the container run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
}

/// Copies input and output until the container exits or the user detaches.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let container = container::find(&config.paths(), &args.container)?;
    let details = &container.record.details;
    let problem = match container.status.state {
        State::Stopped => Some("a stopped container: hull start --attach starts it"),
        State::Created => Some("a container that was not started: hull start --attach does"),
        State::Paused => Some("a paused container: hull unpause comes first"),
        State::Creating | State::Running => None,
    };
    if let Some(problem) = problem {
        return Err(Error::wrong_state(format!("cannot attach to {problem}")));
    }
    let input = details.stdin && !args.no_stdin;
    if details.terminal && input {
        super::run::check_terminal()?;
    }
    let attachment = Attachment::prepare(Options {
        input,
        terminal: details.terminal,
        shown: [true; 2],
        forward_signals: args.sig_proxy,
        detach_keys: args.detach_keys.unwrap_or(config.detach_keys),
    })?;
    attach(&container, attachment)
}

/// Copies input and output of a container that runs until it exits or the user detaches.
///
/// # Errors
/// It does not run, or the caller's streams cannot be used.
pub fn attach(container: &Container, attachment: Attachment) -> Result<u8> {
    let client = container::connect(container)?;
    let streams = client.streams(&Request::Attach(AttachRequest {
        container: container.record.id.clone(),
        options: attachment.request(),
    }))?;
    finish(
        attachment.carry(client, streams)?,
        &container.record.details.name,
    )
}
