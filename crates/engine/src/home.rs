//! The directories of a person who is not root (XDG base directory specification): where the
//! configuration, images and the state of containers are then.

use std::env::var_os;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// The directories. `None` for root.
#[derive(Clone, Debug, PartialEq)]
pub struct Home {
    /// The configuration file, which may not exist.
    pub config: PathBuf,
    /// Images and writable layers.
    pub data: PathBuf,
    /// State of containers.
    pub run: PathBuf,
}

impl Home {
    /// Those of who calls, unless it is root.
    pub fn of_caller() -> Result<Option<Home>> {
        let uid = rustix::process::geteuid();
        if uid.is_root() {
            return Ok(None);
        }
        let absolute = |name: &str| {
            var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let home = absolute("HOME");
        let below = |variable: &str, directory: &str| {
            absolute(variable)
                .or_else(|| home.as_ref().map(|home| home.join(directory)))
                .map(|path| path.join("hull"))
                .ok_or_else(|| Error::new("cannot tell where files of yours are: HOME is not set"))
        };
        Ok(Some(Home {
            config: below("XDG_CONFIG_HOME", ".config")?.join("config.toml"),
            data: below("XDG_DATA_HOME", ".local/share")?,
            run: match absolute("XDG_RUNTIME_DIR") {
                Some(path) => path.join("hull"),
                None => without_session(uid.as_raw()),
            },
        }))
    }
}

/// What stands in for XDG_RUNTIME_DIR where nobody has logged in.
fn without_session(uid: u32) -> PathBuf {
    let logged_in = PathBuf::from(format!("/run/user/{uid}"));
    match std::fs::metadata(&logged_in).is_ok_and(|found| found.uid() == uid) {
        true => logged_in.join("hull"),
        false => PathBuf::from(format!("/tmp/hull-{uid}")),
    }
}

/// Makes the directory of containers' state, unless it is there, and sees to it that nobody else
/// can change what is in it: it may be in one where everybody can make files.
pub fn secure(directory: &Path) -> Result<()> {
    let doing = || format!("cannot use {}", directory.display());
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.context(doing)?;
    let found = std::fs::symlink_metadata(directory).context(doing)?;
    let own = rustix::process::geteuid().as_raw();
    match found.is_dir() && found.uid() == own && found.mode() & 0o022 == 0 {
        true => Ok(()),
        false => Err(Error::new(format!("{}: others can write to it", doing()))
            .hint("XDG_RUNTIME_DIR, or run_dir in the configuration, can name another one")),
    }
}
