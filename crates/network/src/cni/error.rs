//! Everything that can go wrong with a network, each with what failed, on what, and why.
//!
//! `Display` is the first line that a user sees, [`Error::hint`] the second.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use super::plugin::Command;

/// Result of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No file describes this network.
    #[error("network {name:?} not found: {}", alternatives(known, unreadable))]
    NotFound {
        /// As asked for.
        name: String,
        /// The networks that there are.
        known: Vec<String>,
        /// What is wrong with files that could not be read: the network may be one of these.
        unreadable: Vec<String>,
    },
    /// A file or directory of configurations cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A configuration is not what the specification says.
    #[error("invalid network configuration {place}: {why}")]
    Invalid {
        /// A file, or the name of a network.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// The attachment is not possible; no plugin was asked.
    #[error("network {network:?}: {why}")]
    Refused {
        /// The network's name.
        network: String,
        /// What is wrong.
        why: String,
    },
    /// A plugin is not installed.
    #[error(
        "network {network:?}: plugin {plugin} not found in {}",
        paths(directories)
    )]
    NoPlugin {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// Where it was searched.
        directories: Vec<PathBuf>,
    },
    /// A plugin failed.
    #[error(
        "network {network:?}: plugin {plugin} failed{}: {fault}",
        during(command)
    )]
    Plugin {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// What it was to do.
        command: Command,
        /// How it failed.
        fault: Fault,
    },
    /// Attaching failed, and so did undoing what had been done of it.
    #[error("{error}; it could not be undone: {undo}")]
    NotUndone {
        /// Why attaching failed.
        error: Box<Error>,
        /// Why undoing failed.
        undo: Box<Error>,
    },
}

/// How a plugin failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Fault {
    /// It cannot be executed.
    Start(io::Error),
    /// It said what is wrong, in the form of the specification.
    Answer {
        /// Below 100 those of the specification, else the plugin's own.
        code: u64,
        /// Short; one line.
        message: String,
        /// Long, or empty; one line.
        details: String,
    },
    /// It ended without saying why in that form.
    Died {
        /// How it ended.
        status: ExitStatus,
        /// The last lines of what it said instead; one line.
        said: String,
    },
    /// It had not ended in time, and was killed with all that it had started.
    Hung(Duration),
    /// Nobody waited for it any more, and it was killed.
    Cancelled,
    /// It wrote more than a result can be, and was killed.
    TooMuchOutput,
    /// It succeeded, but its result is none.
    BadResult(String),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        const INSTALL: &str = "apt-get install containernetworking-plugins";
        match self {
            Error::NoPlugin { .. } => Some(INSTALL),
            // A plugin that misses another one, for instance that which gives out addresses.
            Error::Plugin {
                fault: Fault::Answer {
                    message, details, ..
                },
                ..
            } if message.contains("failed to find plugin")
                || details.contains("failed to find plugin") =>
            {
                Some(INSTALL)
            }
            Error::NotUndone { error, .. } => error.hint(),
            _ => None,
        }
    }

    /// The code with which a plugin said what is wrong: below 100 those of the specification.
    pub fn code(&self) -> Option<u64> {
        match self {
            Error::Plugin {
                fault: Fault::Answer { code, .. },
                ..
            } => Some(*code),
            Error::NotUndone { error, .. } => error.code(),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Start(error) => write!(f, "{error}"),
            Fault::Answer {
                message, details, ..
            } if details.is_empty() => f.write_str(message),
            Fault::Answer {
                message, details, ..
            } => write!(f, "{message} ({details})"),
            Fault::Died { status, said } if said.is_empty() => write!(f, "{status}"),
            Fault::Died { status, said } => write!(f, "{status}: {said}"),
            Fault::Hung(limit) => write!(f, "it had not ended after {limit:?} and was killed"),
            Fault::Cancelled => f.write_str("it was not waited for any more and was killed"),
            Fault::TooMuchOutput => f.write_str("it wrote too much output and was killed"),
            Fault::BadResult(why) => write!(f, "its result is not valid: {why}"),
        }
    }
}

fn alternatives(known: &[String], unreadable: &[String]) -> String {
    let quoted: Vec<String> = known.iter().map(|name| format!("{name:?}")).collect();
    let mut text = match quoted.len() {
        0 => "there is no other".to_owned(),
        1 => format!("there is only {}", quoted[0]),
        _ => format!("there are {}", quoted.join(", ")),
    };
    for why in unreadable {
        text.push_str("; ");
        text.push_str(why);
    }
    text
}

fn paths(directories: &[PathBuf]) -> String {
    if directories.is_empty() {
        return "no directory at all".to_owned();
    }
    let paths: Vec<String> = directories
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    paths.join(", ")
}

fn during(command: &Command) -> &'static str {
    match command {
        Command::Add => "",
        Command::Check => " on CHECK",
        Command::Del => " on DEL",
    }
}

/// Foreign text as part of one line: without line ends and control characters, and not without end.
pub(super) fn one_line(text: &str) -> String {
    const MOST: usize = 1000;
    let words: Vec<&str> = text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|word| !word.is_empty())
        .collect();
    let line = words.join(" ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
