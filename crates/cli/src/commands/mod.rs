//! The commands, one file each: its arguments, and what it does with them.

pub mod attach;
pub mod check;
pub mod completions;
pub mod config;
pub mod cp;
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

use crate::config::Config;
use crate::error::{Error, Result};

/// Turns a function on the raw text of a value into a value parser.
pub fn raw<T: Clone + Send + Sync + 'static>(
    parse: fn(&std::ffi::OsStr) -> std::result::Result<T, String>,
) -> impl TypedValueParser<Value = T> {
    OsStringValueParser::new().try_map(move |text| parse(&text))
}

/// Does something with each of several containers or images. A failure is reported at once and does not keep the
/// others from their turn.
pub fn for_each(names: &[String], mut action: impl FnMut(&str) -> Result<()>) -> Result<u8> {
    let mut status = 0;
    for name in names {
        if let Err(error) = action(name) {
            error.print();
            status = error.exit_status().max(status);
        }
    }
    match status {
        0 => Ok(0),
        status => Err(Error::printed(status)),
    }
}

/// The configuration, for a command that needs the rights of root: who is not root gets them in a user namespace.
pub fn config_for_root() -> Result<Config> {
    let config = Config::load()?;
    if config.without_root {
        hull_sandbox::rootless::enter()?;
        crate::home::secure(&config.run_dir)?;
    }
    Ok(config)
}

/// Unix seconds as the clock of this program counts.
pub fn from_seconds(seconds: u64) -> crate::time::UnixNanos {
    i128::from(seconds) * 1_000_000_000
}
