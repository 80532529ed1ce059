//! Errors of CNI networks: what failed, on what, and why.
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

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No file describes this network.
    #[error("network {name:?} not found: {}", alternatives(known, unreadable))]
    NotFound {
        /// The requested name.
        name: String,
        /// The networks that exist.
        known: Vec<String>,
        /// Errors of unreadable files, which may describe the network.
        unreadable: Vec<String>,
    },
    /// A file or directory of configurations cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// A configuration violates the specification.
    #[error("invalid network configuration {place}: {why}")]
    Invalid {
        /// A file, or the name of a network.
        place: String,
        /// The reason.
        why: String,
    },
    /// The attachment is not possible; no plugin was run.
    #[error("network {network:?}: {why}")]
    Refused {
        /// The network's name.
        network: String,
        /// The reason.
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
        /// Where it was searched for.
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
        /// The operation.
        command: Command,
        /// How the plugin failed.
        fault: Fault,
    },
    /// Attaching failed, and so did the cleanup.
    #[error("{error}; it could not be undone: {undo}")]
    NotUndone {
        /// Why attaching failed.
        error: Box<Error>,
        /// Why the cleanup failed.
        undo: Box<Error>,
    },
}

/// How a plugin failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum Fault {
    /// It cannot be executed.
    Start(io::Error),
    /// It reported an error in the specification's format.
    Answer {
        /// Below 100 a code of the specification, otherwise the plugin's own.
        code: u64,
        /// Short; one line.
        message: String,
        /// Long, or empty; one line.
        details: String,
    },
    /// It failed without such a report.
    Died {
        /// How it ended.
        status: ExitStatus,
        /// The last lines of its output, as one line.
        said: String,
    },
    /// It exceeded the timeout, and was killed with its process group.
    Hung(Duration),
    /// The caller cancelled, and it was killed.
    Cancelled,
    /// It wrote more than the limit, and was killed.
    TooMuchOutput,
    /// It succeeded with an invalid result.
    BadResult(String),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        const INSTALL: &str = "apt-get install containernetworking-plugins";
        match self {
            Error::NoPlugin { .. } => Some(INSTALL),
            // A plugin that misses another one, such as its IPAM plugin.
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

    /// The error code that a plugin reported: below 100 those of the specification.
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
        0 => "CNI has no other".to_owned(),
        1 => format!("CNI has only {}", quoted[0]),
        _ => format!("CNI has {}", quoted.join(", ")),
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

/// A plugin's text as one line: without line ends and control characters, truncated.
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
