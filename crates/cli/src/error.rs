//! What a user sees when a command fails: one line that says what, on what and why, a second one that says what
//! to do, and Docker's exit statuses. Every command returns this error; only `main` prints it.

use std::fmt::Display;
use std::io::{IsTerminal, Write};

/// Exit status when hull itself failed before or around the container's process.
pub const HULL_FAILED: u8 = 125;
/// Exit status when the container that a command names is not there or not in the right state.
pub const WRONG_CONTAINER: u8 = 1;

/// A failed command.
#[derive(Debug)]
pub struct Error {
    message: String,
    hint: Option<String>,
    status: Option<u8>,
    console: Vec<String>,
}

/// Result of a command or of a step of one.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of one line: what failed, on what, why.
    pub fn new(message: impl Into<String>) -> Error {
        Error {
            message: message.into(),
            hint: None,
            status: None,
            console: Vec::new(),
        }
    }

    /// An error that was printed already: only its exit status is left.
    pub fn printed(status: u8) -> Error {
        Error::new("").status(status)
    }

    /// An error made of another one and all its causes, each said once.
    pub fn from_chain(error: &dyn std::error::Error) -> Error {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Error::new(message)
    }

    /// Says before the message what was being done.
    pub fn while_doing(mut self, what: String) -> Error {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// Adds what the user can do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the exit status, unless one was already set nearer to the cause.
    pub fn status(mut self, status: u8) -> Error {
        self.status.get_or_insert(status);
        self
    }

    /// Sets the exit status, whatever it was.
    pub fn always_status(mut self, status: u8) -> Error {
        self.status = Some(status);
        self
    }

    /// The exit status of the command that failed with this.
    pub fn exit_status(&self) -> u8 {
        self.status.unwrap_or(HULL_FAILED)
    }

    /// What the user can do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Whether the guest's console belongs to it: the guest did not come up, or broke down.
    pub fn has_console(&self) -> bool {
        !self.console.is_empty()
    }

    /// The line without `error: `.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Prints the error on standard error; colours only for a terminal.
    pub fn print(&self) {
        if self.message.is_empty() {
            return;
        }
        let stderr = std::io::stderr();
        let colour = stderr.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let (red, cyan, reset) = if colour {
            ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m")
        } else {
            ("", "", "")
        };
        let mut text = format!("{red}error:{reset} {}\n", one_line(&self.message));
        if let Some(hint) = &self.hint {
            text.push_str(&format!("{cyan}hint:{reset} {}\n", one_line(hint)));
        }
        if !self.console.is_empty() {
            text.push_str("last lines of the guest's console:\n");
            for line in &self.console {
                text.push_str(&format!("  {}\n", one_line(line)));
            }
        }
        // Nobody is left to tell when standard error is closed.
        let _ = stderr.lock().write_all(text.as_bytes());
    }
}

impl From<Error> for hull_sandbox::Failure {
    fn from(error: Error) -> hull_sandbox::Failure {
        let code = error.exit_status().into();
        let mut failure = hull_sandbox::Failure::new(error.message)
            .code(code)
            .console(error.console);
        failure.hint = error.hint;
        failure
    }
}

impl From<hull_sandbox::Failure> for Error {
    fn from(failure: hull_sandbox::Failure) -> Error {
        Error {
            message: failure.message,
            hint: failure.hint,
            status: Some(u8::try_from(failure.code).unwrap_or(HULL_FAILED)),
            console: failure.console,
        }
    }
}

impl From<hull_machine::Error> for Error {
    fn from(error: hull_machine::Error) -> Error {
        let hint = error.hint();
        Error {
            hint,
            ..Error::from_chain(&error)
        }
    }
}

impl From<hull_image::Error> for Error {
    fn from(error: hull_image::Error) -> Error {
        let hint = error.hint();
        Error {
            hint,
            ..Error::from_chain(&error)
        }
    }
}

/// Adds what was being done to errors of the system and of libraries.
pub trait Context<T> {
    /// Prefixes the error with what failed, on what.
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: std::error::Error> Context<T> for std::result::Result<T, E> {
    fn context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| {
            let cause = Error::from_chain(&error);
            Error::new(format!("{}: {}", what(), cause.message))
        })
    }
}

/// Turns a usage error of the argument parser into an error of this kind.
pub fn from_usage(error: &clap::Error) -> Error {
    let text = error.render().to_string();
    let mut message = String::new();
    let mut hint = None;
    for line in text.lines().map(str::trim) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        if let Some(tip) = line.strip_prefix("tip: ") {
            hint.get_or_insert_with(|| tip.to_owned());
        } else if !line.is_empty() {
            if !message.is_empty() {
                message.push(' ');
            }
            message.push_str(line.strip_prefix("error: ").unwrap_or(line));
        }
    }
    // The value parsers' own messages name the value already.
    if error.kind() == clap::error::ErrorKind::ValueValidation
        && let Some(clap::error::ContextValue::String(argument)) =
            error.get(clap::error::ContextKind::InvalidArg)
        && let Some(cause) = std::error::Error::source(error)
    {
        let option = argument.split([' ', '[', '=']).next().unwrap_or(argument);
        message = if option.starts_with('-') {
            format!("{option}: {cause}")
        } else {
            cause.to_string()
        };
    }
    let hint = hint.unwrap_or_else(|| usage_hint(error));
    Error::new(message).hint(hint)
}

/// The nearest command, or where the help is.
fn usage_hint(error: &clap::Error) -> String {
    use clap::CommandFactory;
    let hull = crate::cli::Hull::command();
    if let Some(clap::error::ContextValue::String(word)) =
        error.get(clap::error::ContextKind::InvalidSubcommand)
    {
        let names = hull
            .get_subcommands()
            .filter(|command| !command.is_hide_set());
        if let Some(near) = crate::values::nearest(word, names.map(clap::Command::get_name)) {
            return format!("did you mean hull {near}?");
        }
    }
    match std::env::args()
        .nth(1)
        .filter(|word| hull.find_subcommand(word).is_some())
    {
        Some(command) => format!("hull {command} --help"),
        None => "hull --help".to_owned(),
    }
}

/// Messages may carry text of a guest or a registry: no control characters of theirs reach the terminal.
fn one_line(text: &str) -> String {
    text.trim_end()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_first_status_counts() {
        assert_eq!(Error::new("x").exit_status(), HULL_FAILED);
        assert_eq!(Error::new("x").status(127).status(125).exit_status(), 127);
    }

    #[test]
    fn causes_are_said_once() {
        let error = std::fs::read("/nonexistent/file")
            .context(|| "cannot read /nonexistent/file")
            .unwrap_err();
        assert_eq!(
            error.message(),
            "cannot read /nonexistent/file: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[31mc\n"), "a b [31mc");
    }
}
