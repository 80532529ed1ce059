//! The agent's own log lines. They go to the kernel's log, and so in order with the kernel's own
//! lines to the console, which the host keeps. Called from everywhere in the agent; never by
//! container processes.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;

/// Urgency of a line, in the kernel's numbers. A guest boots with `quiet`: lines from `Warning` on
/// stay in the kernel's ring, more urgent ones are also shown on the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The agent cannot go on.
    Critical = 2,
    /// Something asked for did not work.
    Error = 3,
    /// Worth knowing when something else breaks.
    Info = 6,
}

/// Writes one line. A line that cannot be written is lost.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    // The kernel takes one record per write and cuts what is longer than about a kilobyte.
    let line = record(level, &message.to_string());
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(line.as_bytes()));
    if written.is_err() {
        // Before /dev is mounted there is only the console that the kernel opened.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

fn record(level: Level, message: &str) -> String {
    let mut line = format!("<{}>hull-agent: ", level as u8);
    for c in message.chars() {
        if line.len() > 900 {
            line.push('…');
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line.push('\n');
    line
}

/// Logs why the agent cannot go on.
macro_rules! critical {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Critical, format_args!($($arg)*)) };
}

/// Logs an error.
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) };
}

/// Logs a line that is only kept in the kernel's ring.
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) };
}

pub(crate) use {critical, error, info};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_one_line_of_bounded_length() {
        assert_eq!(record(Level::Error, "a\nb"), "<3>hull-agent: a b\n");
        let long = record(Level::Info, &"x".repeat(5000));
        assert!(long.len() < 1000 && long.ends_with("…\n"));
    }
}
