//! The commands, one file each with its arguments and implementation.

pub mod api;
pub mod attach;
pub mod build;
pub mod check;
pub mod commit;
pub mod completions;
pub mod config;
pub mod container;
pub mod cp;
pub mod create;
pub mod diff;
pub mod events;
pub mod exec;
pub mod export;
pub mod generate;
pub mod image;
pub mod info;
pub mod inspect;
pub mod install;
pub mod kernel;
pub mod kill;
pub mod login;
pub mod logs;
pub mod man;
pub mod network;
pub mod pause;
pub mod port;
pub mod ps;
pub mod rename;
pub mod restart;
pub mod rm;
pub mod run;
pub mod start;
pub mod stats;
pub mod stop;
pub mod system;
pub mod top;
pub mod update;
pub mod version;
pub mod volume;
pub mod wait;

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use clap::builder::{OsStringValueParser, TypedValueParser};
use hull_engine::Paths;
use hull_engine::config::Config;
use hull_engine::container::{self as containers, Container};

use crate::error::{self, Context, ErrorKind, Result};
use crate::output;

/// Containers that one command works on at a time.
const MOST_AT_ONCE: usize = 50;

/// Creates a value parser from a function on the raw text of a value.
pub fn raw<T: Clone + Send + Sync + 'static>(
    parse: fn(&std::ffi::OsStr) -> std::result::Result<T, String>,
) -> impl TypedValueParser<Value = T> {
    OsStringValueParser::new().try_map(move |text| parse(&text))
}

/// Calls `action` for each of several containers or images. Reports failures at once and continues;
/// returns the exit status.
pub fn for_each(names: &[String], mut action: impl FnMut(&str) -> Result<()>) -> Result<u8> {
    let mut status = 0;
    for name in names {
        if let Err(error) = action(name) {
            status = error::fail(&error).max(status);
        }
    }
    Ok(status)
}

/// Calls `action` for several containers at once. What it returns is printed, and failures are
/// reported, in the order of the names; returns the exit status.
pub fn for_each_at_once<F>(names: &[String], action: F) -> Result<u8>
where
    F: Fn(&str) -> Result<Option<String>> + Sync,
{
    let next = AtomicUsize::new(0);
    let (sender, done) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..names.len().min(MOST_AT_ONCE) {
            let (next, action, sender) = (&next, &action, sender.clone());
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(name) = names.get(index) else { return };
                    if sender.send((index, action(name))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let (mut printed, mut status) = (0, 0);
        for (index, outcome) in done {
            early.insert(index, outcome);
            while let Some(outcome) = early.remove(&printed) {
                printed += 1;
                let shown = match outcome {
                    Ok(Some(line)) => output::print(format!("{line}\n")),
                    Ok(None) => Ok(()),
                    Err(error) => Err(error),
                };
                if let Err(error) = shown {
                    status = error::fail(&error).max(status);
                }
            }
        }
        Ok(status)
    })
}

/// The exit status of `exists`, as podman's: whether something was found.
///
/// # Errors
/// It cannot be told.
pub fn exists<T>(found: Result<T>) -> Result<u8> {
    match found {
        Ok(_) => Ok(0),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(1),
        Err(error) => Err(error),
    }
}

/// Asks whether something is to be removed, as Docker also where nobody is at a terminal: then the
/// answer is what standard input has, and its end means no.
pub fn agreed(what: &str) -> Result<bool> {
    // If standard error is closed, nobody sees the question.
    let _ = write!(
        std::io::stderr().lock(),
        "This removes {what}. Go on? [y/N] "
    );
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer);
    let length = read.context(|| "read the answer")?;
    let agreed = matches!(answer.trim(), "y" | "Y" | "yes");
    if length == 0 {
        output::note("\nnothing was removed: there is no answer; --force asks nothing");
    }
    Ok(agreed)
}

/// The containers that a command is about: those that are named, or with `all` those that match.
///
/// # Errors
/// The directory of containers cannot be read.
pub fn named_or_all(
    paths: &Paths,
    names: Vec<String>,
    all: bool,
    matches: impl Fn(&Container) -> bool,
) -> Result<Vec<String>> {
    if !all {
        return Ok(names);
    }
    let listed = containers::list(paths)?.into_iter().flatten();
    Ok(listed
        .filter(matches)
        .map(|container| container.record.details.name)
        .collect())
}

/// The configuration, for a command that needs root; other users become root in a user namespace.
pub fn config_for_root() -> Result<Config> {
    prepared(Config::load()?)
}

/// The same, for a command that looks at containers or ends them: a key that is wrong must not keep
/// people from that.
pub fn config_for_existing() -> Result<Config> {
    let (config, wrong) = Config::load_for_existing()?;
    for error in wrong {
        output::note(format!("note: {}", error.message));
    }
    prepared(config)
}

fn prepared(config: Config) -> Result<Config> {
    if config.without_root {
        hull_sandbox::rootless::enter()?;
        hull_engine::home::secure(&config.run_dir)?;
    }
    let paths = config.paths();
    let images = config.data_dir.join("images");
    for directory in [paths.containers(), paths.names(), paths.volumes(), images] {
        hull_engine::home::keep_private(&directory)?;
    }
    Ok(config)
}

/// Converts nanoseconds since 1970 to this program's time type.
pub fn from_ns(nanoseconds: u64) -> hull_engine::time::UnixNanos {
    i128::from(nanoseconds)
}
