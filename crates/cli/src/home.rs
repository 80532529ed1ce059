//! The directories of a person who is not root (XDG base directory specification): where the configuration, images and the
//! state of containers are then.

use std::env::var_os;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;

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
                None => own_directory(uid.as_raw())?,
            },
        }))
    }
}

/// What stands in for XDG_RUNTIME_DIR where nobody has logged in: a directory of the person's own, which nobody else can have
/// made.
fn own_directory(uid: u32) -> Result<PathBuf> {
    let logged_in = PathBuf::from(format!("/run/user/{uid}"));
    if std::fs::metadata(&logged_in).is_ok_and(|found| found.uid() == uid) {
        return Ok(logged_in.join("hull"));
    }
    let path = PathBuf::from(format!("/tmp/hull-{uid}"));
    let doing = || format!("cannot use {}", path.display());
    match std::fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).context(doing);
        }
        _ => {}
    }
    let found = std::fs::symlink_metadata(&path).context(doing)?;
    match found.is_dir() && found.uid() == uid && found.mode() & 0o077 == 0 {
        true => Ok(path),
        false => Err(
            Error::new(format!("{}: it is not a directory of yours alone", doing()))
                .hint("XDG_RUNTIME_DIR can name another one"),
        ),
    }
}
