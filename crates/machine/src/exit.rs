//! Why a machine ended, in one line. Called by crate sandbox once the machine's pidfd is readable.

use std::fmt;

use hull_jail::{SignalName, Status};
use serde::{Deserialize, Serialize};

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The guest shut itself down.
    PoweredOff,
    /// The guest kernel panicked.
    Panicked(String),
    /// The machine process was killed.
    Killed {
        /// By this signal.
        signal: i32,
    },
    /// The machine process gave up.
    Failed {
        /// Its exit code.
        code: i32,
        /// The last thing it said.
        said: String,
    },
}

impl Exit {
    /// Interprets how a machine process ended, with the last lines of its console (see
    /// [`crate::ConsoleRing::tail`]). What the console says is the guest's word: it colours the
    /// reason, no more.
    pub fn interpret(status: Status, console: &[String]) -> Self {
        let panic = console.iter().rev().find_map(|line| {
            line.split_once("Kernel panic - not syncing: ")
                .map(|(_, why)| why.trim().to_owned())
        });
        if let Some(why) = panic {
            return Self::Panicked(why);
        }
        let said = console.last().cloned().unwrap_or_default();
        match status {
            Status::Signal(signal) => Self::Killed { signal },
            Status::Code(0) => Self::PoweredOff,
            Status::Code(code) => Self::Failed { code, said },
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest shut down"),
            Self::Panicked(why) => write!(f, "guest kernel panic: {why}"),
            Self::Killed { signal } => write!(
                f,
                "the machine process was killed by {}",
                SignalName(*signal)
            ),
            Self::Failed { code, said } if said.is_empty() => {
                write!(f, "the machine process failed (exit code {code})")
            }
            Self::Failed { code, said } => {
                write!(f, "the machine process failed (exit code {code}): {said}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[&str]) -> Vec<String> {
        text.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn a_panic_on_the_console_is_the_reason_whatever_the_status() {
        let console = lines(&[
            "[ 1.0] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000009",
            "---[ end",
        ]);
        for status in [Status::Code(0), Status::Signal(6)] {
            let exit = Exit::interpret(status, &console);
            assert_eq!(
                exit.to_string(),
                "guest kernel panic: Attempted to kill init! exitcode=0x00000009"
            );
        }
    }

    #[test]
    fn reasons_are_one_line() {
        let uml = |status, console: &[&str]| Exit::interpret(status, &lines(console)).to_string();
        assert_eq!(
            uml(Status::Code(0), &["Linux version 7"]),
            "the guest shut down"
        );
        assert_eq!(
            uml(Status::Signal(9), &[]),
            "the machine process was killed by SIGKILL"
        );
        assert_eq!(
            uml(Status::Signal(31), &[]),
            "the machine process was killed by SIGSYS (a forbidden system call)"
        );
        assert_eq!(
            uml(Status::Code(1), &["ptrace: Operation not permitted"]),
            "the machine process failed (exit code 1): ptrace: Operation not permitted"
        );
    }
}
