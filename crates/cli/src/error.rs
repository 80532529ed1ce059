//! How a failed command is reported: a line with what failed, on what and why, a second line with a
//! hint, and the exit status. Only `main`, and commands that continue after an error, print errors.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};

use clap::error::{ContextKind, ContextValue};
use hull_machine::printable;

pub use hull_sandbox::error::{Context, Error, ErrorKind, Result};

use crate::familiar;

/// Exit status if hull itself failed before or around the container's process, as in Docker.
pub const HULL_FAILED: u8 = 125;

/// Exit status if the object of a command does not exist or is in the wrong state, as in Docker.
pub const WRONG_CONTAINER: u8 = 1;

/// Exit status if a process could not be executed in a container, as of `runc exec`.
const RUNC_EXEC_FAILED: u8 = 255;

/// Exit codes of the front ends for each kind of error: the only such table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codes {
    /// `hull run`: any failure before the container runs is hull's failure.
    pub run: u8,
    /// Other commands of `hull`.
    pub hull: u8,
    /// `hull-oci exec`; other commands of `hull-oci` exit with 1.
    pub oci_exec: u8,
    /// gRPC status of the containerd shim (google/rpc/code.proto).
    pub grpc: i32,
}

/// The codes of a kind.
pub fn codes(kind: ErrorKind) -> Codes {
    let (run, hull, grpc) = match kind {
        ErrorKind::NotFound => (HULL_FAILED, WRONG_CONTAINER, 5),
        ErrorKind::Exists => (HULL_FAILED, HULL_FAILED, 6),
        ErrorKind::WrongState => (HULL_FAILED, WRONG_CONTAINER, 9),
        ErrorKind::InvalidArgument => (HULL_FAILED, HULL_FAILED, 3),
        ErrorKind::Unsupported => (HULL_FAILED, HULL_FAILED, 12),
        ErrorKind::CommandNotFound => (127, 127, 5),
        ErrorKind::NotExecutable => (126, 126, 7),
        ErrorKind::GuestFailed | ErrorKind::Gone => (HULL_FAILED, HULL_FAILED, 14),
        ErrorKind::Host => (HULL_FAILED, HULL_FAILED, 13),
    };
    Codes {
        run,
        hull,
        oci_exec: RUNC_EXEC_FAILED,
        grpc,
    }
}

/// Prints an error to standard error, with colours only on a terminal.
pub fn print(error: &Error) {
    let stderr = std::io::stderr();
    let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let (red, cyan, reset) = if colour {
        ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m")
    } else {
        ("", "", "")
    };
    let mut text = format!("{red}error:{reset} {}\n", one_line(&error.message));
    if let Some(hint) = &error.hint {
        text.push_str(&format!("{cyan}hint:{reset} {}\n", one_line(hint)));
    }
    if !error.console.is_empty() {
        text.push_str("last lines of the guest's console:\n");
        for line in &error.console {
            text.push_str(&format!("  {}\n", one_line(line)));
        }
    }
    // If standard error is closed, there is nowhere to report to.
    let _ = stderr.lock().write_all(text.as_bytes());
}

/// Prints an error of a command of `hull`; returns its exit status.
pub fn fail(error: &Error) -> u8 {
    print(error);
    codes(error.kind).hull
}

/// Converts a usage error of clap for these arguments.
pub fn from_usage(error: &clap::Error, arguments: &[OsString]) -> Error {
    if let Some(known) = of_other_engines(error, arguments) {
        return known;
    }
    let text = error.render().to_string();
    let mut message = String::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        // clap's tips are guesses that are often far off.
        if !line.is_empty() && !line.starts_with("tip: ") {
            if !message.is_empty() {
                message.push(' ');
            }
            message.push_str(line.strip_prefix("error: ").unwrap_or(line));
        }
    }
    // Errors of value parsers contain the value already.
    if error.kind() == clap::error::ErrorKind::ValueValidation
        && let Some(argument) = context(error, ContextKind::InvalidArg)
        && let Some(cause) = std::error::Error::source(error)
    {
        let option = argument.split([' ', '[', '=']).next().unwrap_or(argument);
        message = if option.starts_with('-') {
            format!("{option}: {cause}")
        } else {
            cause.to_string()
        };
    }
    Error::invalid(message).hint(usage_hint(error, arguments))
}

/// The word or option that an error is about.
fn context(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    match error.get(kind)? {
        ContextValue::String(word) => Some(word),
        _ => None,
    }
}

/// What to say of a command or an option that hull does not have and other engines have.
fn of_other_engines(error: &clap::Error, arguments: &[OsString]) -> Option<Error> {
    if let Some(word) = context(error, ContextKind::InvalidSubcommand) {
        return familiar::missing_command(word, arguments);
    }
    let is_run = arguments.get(1).is_some_and(|command| command == "run");
    if error.kind() == clap::error::ErrorKind::UnknownArgument && is_run {
        let option = context(error, ContextKind::InvalidArg)?;
        return familiar::missing_option(option.split('=').next().unwrap_or(option));
    }
    None
}

/// Suggests a command or option that differs in a letter or two, or the help.
fn usage_hint(error: &clap::Error, arguments: &[OsString]) -> String {
    use clap::CommandFactory;
    // Removes or ends something: not what somebody meant who typed another word.
    const DESTRUCTIVE: [&str; 5] = ["kill", "rm", "stop", "prune", "uninstall"];
    let hull = crate::cli::Hull::command();
    let (mut command, mut path) = (&hull, "hull".to_owned());
    for word in arguments.iter().skip(1) {
        let Some(inner) = command.find_subcommand(word) else {
            break;
        };
        command = inner;
        path = format!("{path} {}", inner.get_name());
    }
    if let Some(word) = context(error, ContextKind::InvalidSubcommand) {
        let names = command
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
            .map(clap::Command::get_name)
            .filter(|name| !DESTRUCTIVE.contains(name));
        if let Some(near) = hull_engine::values::nearest(word, names) {
            return format!("did you mean {path} {near}?");
        }
    }
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && let Some(option) = context(error, ContextKind::InvalidArg)
            .and_then(|option| option.split('=').next())
            .filter(|option| option.starts_with("--"))
    {
        let names: Vec<String> = command
            .get_arguments()
            .filter_map(|argument| Some(format!("--{}", argument.get_long()?)))
            .collect();
        let names = names.iter().map(String::as_str);
        if let Some(near) = hull_engine::values::nearest(option, names) {
            return format!("did you mean {near}? {path} --help");
        }
    }
    format!("{path} --help")
}

/// Messages may contain text of a guest or a registry.
fn one_line(text: &str) -> String {
    printable(text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_dockers_and_runcs() {
        assert_eq!(codes(ErrorKind::CommandNotFound).run, 127);
        assert_eq!(codes(ErrorKind::NotExecutable).hull, 126);
        assert_eq!(codes(ErrorKind::NotFound).hull, 1);
        assert_eq!(codes(ErrorKind::NotFound).run, 125);
        assert_eq!(codes(ErrorKind::Host).hull, 125);
        assert_eq!(codes(ErrorKind::Unsupported).grpc, 12);
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[31mc\n"), "a b\u{fffd}[31mc");
    }
}
