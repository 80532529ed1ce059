//! Which sandbox a keeper's process belongs to: a file for each, named by its process id, in a
//! directory that only root writes. A process cannot claim to be a keeper by anything that it has
//! itself, such as its environment.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::process::ProcessId;
use super::sandbox_dir::SandboxPath;
use super::{Directory, versioned};
use crate::error::{Context, Result};

const VERSION: u32 = 1;

/// A keeper of a container's init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperEntry {
    version: u32,
    /// The process.
    pub process: ProcessId,
    /// The sandbox that its container is in.
    pub sandbox: SandboxPath,
    /// The container's id.
    pub container: String,
}

fn directory(run: &Path) -> PathBuf {
    run.join("keepers")
}

/// Writes down that a process is a keeper.
///
/// # Errors
/// The directory cannot be written.
pub fn register(
    run: &Path,
    process: ProcessId,
    sandbox: &SandboxPath,
    container: &str,
) -> Result<()> {
    let entry = KeeperEntry {
        version: VERSION,
        process,
        sandbox: sandbox.clone(),
        container: container.to_owned(),
    };
    let text = serde_json::to_vec(&entry).context(|| "encode a keeper")?;
    Directory::create(&directory(run))?.write(&process.pid.to_string(), &text)
}

/// The keeper that is a process now; `None` for any other process.
pub fn find(run: &Path, pid: i32) -> Option<KeeperEntry> {
    let directory = Directory::open(&directory(run)).ok()?;
    let entry: KeeperEntry = versioned::read(&directory, &pid.to_string(), VERSION)
        .inspect_err(|error| tracing::warn!("{error}"))
        .ok()
        .flatten()?;
    // A file that a keeper left which has ended is not about a later process of its id.
    (entry.process.pid == pid && entry.process.lives()).then_some(entry)
}

/// The keepers of the containers in a sandbox.
pub fn of_sandbox(run: &Path, sandbox: &SandboxPath) -> Vec<KeeperEntry> {
    let entries = std::fs::read_dir(directory(run)).into_iter().flatten();
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| find(run, pid))
        .filter(|keeper| keeper.sandbox == *sandbox)
        .collect()
}

/// Forgets a keeper, if this process id is still registered for it.
pub fn forget(run: &Path, process: ProcessId) {
    let Ok(directory) = Directory::open(&directory(run)) else {
        return;
    };
    let name = process.pid.to_string();
    let entry = versioned::read::<KeeperEntry>(&directory, &name, VERSION);
    if !matches!(entry, Ok(Some(entry)) if entry.process != process) {
        // What cannot be removed is not about a process that lives.
        let _ = directory.remove_file(&name);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_keeper_is_known_by_its_process_and_forgotten_with_it() {
        let run = tempfile::tempdir().unwrap();
        let sandbox = SandboxPath::new(run.path(), "s");
        let own = ProcessId::own();
        assert_eq!(find(run.path(), own.pid), None);
        register(run.path(), own, &sandbox, "c").unwrap();
        let found = find(run.path(), own.pid).unwrap();
        assert_eq!((found.sandbox, &*found.container), (sandbox.clone(), "c"));
        assert_eq!(of_sandbox(run.path(), &sandbox).len(), 1);
        let other = SandboxPath::new(run.path(), "t");
        assert!(of_sandbox(run.path(), &other).is_empty());
        // An earlier process of the same id: what is there now is not its.
        let earlier = ProcessId {
            started: own.started - 1,
            ..own
        };
        forget(run.path(), earlier);
        assert!(find(run.path(), own.pid).is_some());
        register(run.path(), earlier, &sandbox, "c").unwrap();
        assert_eq!(find(run.path(), own.pid), None);
        forget(run.path(), earlier);
    }
}
