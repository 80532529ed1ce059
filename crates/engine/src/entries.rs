//! Directories whose entries are things of hull's, by name: volumes, networks, containers. What is
//! being made, or was left half made, begins with a dot there.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use hull_sandbox::store::Directory;
use rustix::fs::{FlockOperation, flock};

use crate::error::{Context, Result};

/// The names in a directory, sorted; none when there is no such directory.
///
/// # Errors
/// The directory cannot be read.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>> {
    let doing = || format!("read {}", directory.display());
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(doing),
    };
    let is_whole = |name: &String| !name.starts_with('.');
    let mut names = entries
        .filter_map(|entry| match entry {
            Ok(entry) => entry
                .file_name()
                .into_string()
                .ok()
                .filter(is_whole)
                .map(Ok),
            Err(error) => Some(Err(error)),
        })
        .collect::<io::Result<Vec<_>>>()
        .context(doing)?;
    names.sort();
    Ok(names)
}

/// Held while entries are made and removed. The directory is made if there is none.
#[derive(Debug)]
pub(crate) struct Lock {
    _held: OwnedFd,
}

impl Lock {
    /// Waits for others.
    ///
    /// # Errors
    /// The directory cannot be made or locked.
    pub(crate) fn take(directory: &Path) -> Result<Self> {
        let doing = || format!("lock {}", directory.display());
        let held = Directory::create(directory)?.reopen().context(doing)?;
        rustix::io::retry_on_intr(|| flock(&held, FlockOperation::LockExclusive)).context(doing)?;
        Ok(Self { _held: held })
    }
}
