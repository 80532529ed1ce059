//! The `hull` command. Finds out in which of its roles the executable was called, and in the role that people use
//! turns arguments into requests to the other crates and prints what comes back. It has no logic of its own.
//!
//! Its start is part of the start of every container: nothing is read, allocated or started here before a command
//! needs it.

mod attach;
mod cli;
mod commands;
mod config;
mod copy;
mod device_process;
mod engines;
mod error;
mod guest;
mod home;
mod images;
mod internal;
mod mounts;
mod names;
mod network;
mod oci;
mod output;
mod publish;
mod reservation;
mod signals;
mod terminal;
mod time;
mod values;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

fn main() -> ExitCode {
    let began_ns = hull_sandbox::timings::now_ns();
    let arguments: Vec<_> = std::env::args_os().collect();
    if let Some(status) = internal::dispatch(&arguments) {
        return status;
    }
    commands::run::set_beginning(began_ns);
    let outcome = match cli::Hull::try_parse_from(arguments) {
        Ok(hull) => hull.command.execute(),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                output::print(error.render().to_string()).map(|()| 0)
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                // As with Docker: help without having asked for it is a usage error.
                output::note(error.render().to_string().trim_end());
                Err(error::Error::printed(error::HULL_FAILED))
            }
            _ => Err(error::from_usage(&error)),
        },
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            error.print();
            ExitCode::from(error.exit_status())
        }
    }
}
