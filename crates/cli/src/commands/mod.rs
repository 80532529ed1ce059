//! The commands, one file each: its arguments, and what it does with them.

pub mod attach;
pub mod check;
pub mod completions;
pub mod config;
pub mod cp;
pub mod events;
pub mod exec;
pub mod image;
pub mod inspect;
pub mod install;
pub mod kernel;
pub mod kill;
pub mod logs;
pub mod man;
pub mod pause;
pub mod ps;
pub mod rm;
pub mod run;
pub mod stats;
pub mod stop;
pub mod top;
pub mod version;
pub mod wait;

use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::error::{self, Result};
use hull_engine::config::Config;

/// Turns a function on the raw text of a value into a value parser.
pub fn raw<T: Clone + Send + Sync + 'static>(
    parse: fn(&std::ffi::OsStr) -> std::result::Result<T, String>,
) -> impl TypedValueParser<Value = T> {
    OsStringValueParser::new().try_map(move |text| parse(&text))
}

/// Does something with each of several containers or images. A failure is reported at once and does
/// not keep the others from their turn; the exit status.
pub fn for_each(names: &[String], mut action: impl FnMut(&str) -> Result<()>) -> Result<u8> {
    let mut status = 0;
    for name in names {
        if let Err(error) = action(name) {
            status = error::fail(&error).max(status);
        }
    }
    Ok(status)
}

/// The configuration, for a command that needs the rights of root: who is not root gets them in a
/// user namespace.
pub fn config_for_root() -> Result<Config> {
    let config = Config::load()?;
    if config.without_root {
        hull_sandbox::rootless::enter()?;
        hull_engine::home::secure(&config.run_dir)?;
    }
    Ok(config)
}

/// Nanoseconds since 1970 as the clock of this program counts.
pub fn from_ns(nanoseconds: u64) -> hull_engine::time::UnixNanos {
    i128::from(nanoseconds)
}
