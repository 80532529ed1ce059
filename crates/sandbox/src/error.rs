//! The error of this crate: one line, a hint, and the exit code that a command should end with.

use serde::{Deserialize, Serialize};

use crate::timings::Timings;

/// Exit code: hull itself failed (Docker's meaning).
pub const EXIT_HULL: i32 = 125;
/// Exit code: the command cannot be executed.
pub const EXIT_NOT_EXECUTABLE: i32 = 126;
/// Exit code: the command was not found.
pub const EXIT_NOT_FOUND: i32 = 127;

/// What went wrong, in a form that crosses from the sandbox process to the command that a person typed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What failed, on what, why. One line.
    pub message: String,
    /// What to do about it. One line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Exit code for the command: see the constants of this module.
    pub code: i32,
    /// The last lines of the guest's console, when the guest did not come up or broke down.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<String>,
    /// The guest has no part in it, or works and refused: neither its console nor the time it took says more.
    #[serde(skip)]
    pub refused: bool,
    /// Where the time of a failed start went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// Result with a [`Failure`].
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure of hull itself.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: None,
            code: EXIT_HULL,
            console: Vec::new(),
            refused: false,
            timings: None,
        }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Sets the exit code.
    #[must_use]
    pub fn code(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    /// Neither the guest's console nor the time its start took says more about this.
    #[must_use]
    pub fn of_no_guest(mut self) -> Self {
        self.refused = true;
        self
    }

    /// Adds the tail of the guest's console.
    #[must_use]
    pub fn console(mut self, lines: Vec<String>) -> Self {
        self.console = lines;
        self
    }
}

impl Failure {
    /// Of another crate's error, with what mends it.
    fn of(error: impl std::fmt::Display, hint: Option<&str>) -> Self {
        let failure = Self::new(error.to_string());
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<hull_network::Error> for Failure {
    fn from(error: hull_network::Error) -> Self {
        Self::of(&error, error.hint())
    }
}

impl From<hull_network::cni::Error> for Failure {
    fn from(error: hull_network::cni::Error) -> Self {
        Self::of(&error, error.hint())
    }
}

/// Turns any error into a [`Failure`] that says what was being done.
pub trait Context<T> {
    /// `doing` completes "cannot …".
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| {
            let message = format!("cannot {}: {error}", doing());
            // The one cause that people mend without asking what hull was doing.
            if message.contains("No space left on device") {
                Failure::new(message).hint("df -h; hull image prune")
            } else {
                Failure::new(message)
            }
        })
    }
}
