//! `hull exec`.

use std::ffi::OsString;
use std::path::PathBuf;

use hull_engine::attach::{Attachment, Options};
use hull_engine::container;
use hull_engine::exec::{ExecOptions, process};
use hull_engine::values::{self, DetachKeys};
use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::State;

use super::config_for_existing;
use super::run::{check_terminal, finish, gather_environment, given};
use crate::error::{Error, ErrorKind, Result};

/// Arguments of `exec`.
#[derive(Debug, clap::Args)]
#[command(override_usage = "hull exec [OPTIONS] CONTAINER COMMAND [ARG]...")]
pub struct Args {
    /// Keep standard input open and pass it on
    #[arg(short, long)]
    interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Return as soon as the process has started
    #[arg(short, long)]
    detach: bool,
    /// Set an environment variable; without a value, the caller's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// User, and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = values::or_empty(values::user))]
    user: Option<String>,
    /// With all capabilities of the container's own kernel; nothing of the host
    #[arg(long)]
    privileged: bool,
    /// Working directory inside the container
    #[arg(short, long, value_name = "DIR", value_parser = values::or_empty(values::directory))]
    workdir: Option<String>,
    /// Keys that detach and let the process run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    /// Container, command and its arguments
    #[arg(value_names = ["CONTAINER", "COMMAND"], num_args = 1.., required = true, trailing_var_arg = true)]
    words: Vec<OsString>,
}

/// Starts a process in a running container and forwards its streams until it exits.
pub fn execute(args: Args) -> Result<u8> {
    let config = config_for_existing()?;
    let mut words = args.words.into_iter();
    let name = words.next().unwrap_or_default();
    let name = name.to_string_lossy();
    let command: Vec<OsString> = words.collect();
    if command.is_empty() {
        return Err(
            Error::invalid("no command was given").hint("hull exec CONTAINER COMMAND [ARG]...")
        );
    }
    let environment = gather_environment(&args.env_file, &args.env)?;
    if !args.detach && args.interactive && args.tty {
        check_terminal()?;
    }
    let container = container::find_any(&config.paths(), &name)?;
    if container.state() == State::Paused {
        return Err(Error::wrong_state(format!("container {name} is paused"))
            .hint(format!("hull unpause {name}")));
    }
    let attachment = Attachment::prepare(Options {
        input: args.interactive,
        terminal: args.tty,
        shown: [true; 2],
        // As in Docker, signals end this command, not the process.
        forward_signals: false,
        detach_keys: args.detach_keys.unwrap_or(config.detach_keys),
    })?;
    let client = container.connect()?;
    let process = process(
        &container,
        &ExecOptions {
            command,
            environment,
            directory: given(args.workdir),
            user: given(args.user),
            privileged: args.privileged,
            stdin: args.interactive,
            terminal: args.tty,
            detach: args.detach,
            size: attachment.size(),
        },
    )?;
    let streams = client.streams(&Request::Exec(Box::new(process)));
    let streams = streams.map_err(|error| match (error.kind, container.state()) {
        // The sandbox is there before the container.
        (ErrorKind::NotFound, state @ State::Creating) => container::not_running(&name, state),
        _ => error,
    })?;
    if args.detach {
        return Ok(0);
    }
    finish(attachment.carry(client, streams)?, container.name())
}
