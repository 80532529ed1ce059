//! The directories of a person who is not root (XDG base directory specification): where the
//! configuration, images and the state of containers are then.

use std::env::var_os;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// The directories. `None` for root.
#[derive(Clone, Debug, PartialEq)]
pub struct Home {
    /// Whose they are.
    pub uid: u32,
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
        match uid.is_root() {
            true => Ok(None),
            false => Home::of(uid.as_raw()).map(Some),
        }
    }

    /// Those of a person, in whose environment this process is.
    pub fn of(uid: u32) -> Result<Home> {
        let absolute = |name: &str| {
            var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let home = absolute("HOME").or_else(|| of_password_file(uid));
        let below = |variable: &str, directory: &str| {
            absolute(variable)
                .or_else(|| home.as_ref().map(|home| home.join(directory)))
                .map(|path| path.join("hull"))
                .ok_or_else(|| Error::new("cannot tell where files of yours are: HOME is not set"))
        };
        Ok(Home {
            uid,
            config: below("XDG_CONFIG_HOME", ".config")?.join("config.toml"),
            data: below("XDG_DATA_HOME", ".local/share")?,
            run: match absolute("XDG_RUNTIME_DIR") {
                Some(path) => path.join("hull"),
                None => without_session(uid),
            },
        })
    }
}

/// A person's directory as /etc/passwd says it.
fn of_password_file(uid: u32) -> Option<PathBuf> {
    let text = std::fs::read_to_string("/etc/passwd").ok()?;
    let line = text
        .lines()
        .find(|line| line.split(':').nth(2) == Some(&uid.to_string()))?;
    let home = PathBuf::from(line.split(':').nth(5)?);
    home.is_absolute().then_some(home)
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

/// Closes a directory of hull's own to all other users, if it is there: what images and containers
/// hold may be set-user-id programs of a guest's (CVE-2021-41091), and secrets.
///
/// # Errors
/// `Host` if it belongs to another user, is not a directory, or its mode cannot be set.
pub fn keep_private(directory: &Path) -> Result<()> {
    let doing = || format!("cannot use {}", directory.display());
    let found = match std::fs::symlink_metadata(directory) {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).context(doing),
    };
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(
            Error::new(format!("{}: it is not a directory of this user", doing()))
                .hint("data_dir in the configuration can name another place"),
        );
    }
    if found.mode() & 0o077 != 0 {
        let private = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(directory, private).context(doing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_others_can_enter_is_closed_to_them() {
        let data = tempfile::tempdir().unwrap();
        let directory = data.path().join("containers");
        keep_private(&directory).unwrap();
        assert!(!directory.exists());
        std::fs::create_dir(&directory).unwrap();
        for mode in [0o755, 0o711, 0o770, 0o700] {
            let open = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&directory, open).unwrap();
            keep_private(&directory).unwrap();
            let now = std::fs::metadata(&directory).unwrap().mode();
            assert_eq!(now & 0o7777, 0o700, "{mode:o}");
        }
        let link = data.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        let error = keep_private(&link).unwrap_err();
        assert!(
            error.message.contains("not a directory of this user"),
            "{error}"
        );
    }
}
