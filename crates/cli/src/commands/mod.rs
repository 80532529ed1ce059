//! The commands, one file each with its arguments and implementation.

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

/// The configuration, for a command that needs root; other users become root in a user namespace.
pub fn config_for_root() -> Result<Config> {
    let config = Config::load()?;
    if config.without_root {
        hull_sandbox::rootless::enter()?;
        hull_engine::home::secure(&config.run_dir)?;
    }
    let paths = config.paths();
    let images = config.data_dir.join("images");
    for directory in [paths.containers(), paths.names(), images] {
        hull_engine::home::keep_private(&directory)?;
    }
    Ok(config)
}

/// Converts nanoseconds since 1970 to this program's time type.
pub fn from_ns(nanoseconds: u64) -> hull_engine::time::UnixNanos {
    i128::from(nanoseconds)
}
