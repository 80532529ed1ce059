//! The `hull` command. Dispatches on the role of the executable; as the command for users, parses
//! arguments, calls the other crates and prints their results. It has no logic of its own.
//!
//! Its startup is part of every container's start: nothing is read, allocated or started here
//! before a command needs it.

mod cli;
mod commands;
mod completion;
mod device_process;
mod error;
mod familiar;
mod format;
mod images;
mod internal;
mod machine_process;
mod oci;
mod output;
mod shim;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

fn main() -> ExitCode {
    let began_ns = hull_sandbox::timings::now_ns();
    let arguments: Vec<_> = std::env::args_os().collect();
    match completion::answer(&arguments) {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        // A shell that completes shows no messages.
        Err(_) => return ExitCode::from(error::HULL_FAILED),
    }
    if let Some(status) = internal::dispatch(&arguments) {
        return status;
    }
    // For the processes that are started here. If this fails, starting them reports it.
    let _ = hull_jail::raise_open_files();
    let arguments = familiar::rewrite(arguments);
    let (outcome, is_run) = match cli::Hull::try_parse_from(&arguments) {
        Ok(hull) => {
            let is_run = matches!(hull.command, cli::Command::Run(_));
            (hull.command.execute(began_ns), is_run)
        }
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                (output::print(error.render().to_string()).map(|()| 0), false)
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                // As in Docker: help printed without being requested is a usage error.
                output::note(error.render().to_string().trim_end());
                (Ok(error::HULL_FAILED), false)
            }
            _ => (Err(error::from_usage(&error, &arguments)), false),
        },
    };
    ExitCode::from(match outcome {
        Ok(status) => status,
        Err(error) => {
            error::print(&error);
            let codes = error::codes(error.kind);
            if is_run { codes.run } else { codes.hull }
        }
    })
}
