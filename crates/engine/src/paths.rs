//! Where hull keeps containers of its own. Creates nothing itself.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hull_sandbox::store::ProcessId;

/// The two directories everything lives under.
///
/// ```text
/// RUN/…                   what lives: see hull_sandbox::store
/// DATA/containers/<id>/   one container: config.json, record.json, status.json, and
///     upper, work         its writable layer; with a size of its own:
///     layer.img, layer    a file system that holds those, and where it is mounted
///     log, log.1          its output
///     lock                held (flock) by who starts it, or looks into it while it is idle
///     network.json        what network plugins are to undo (network-1.json, network-ports.json)
///     volumes/<n>         volumes that go with the container
/// DATA/containers/.<pid>-<start>-<n>   one that this process is about to create, or its files
/// DATA/names/<name>       symbolic link to the id that has the name
/// DATA/volumes/<name>/    one volume: volume.json, _data
/// DATA/networks/<name>/   one network: network.json; names of containers: see hull_sandbox
/// DATA/images/…           images and layers: see crate image
/// ```
#[derive(Debug, Clone)]
pub struct Paths {
    run: PathBuf,
    data: PathBuf,
}

impl Paths {
    /// `run` is for what lives (default `/run/hull`), `data` for what there is (default
    /// `/var/lib/hull`).
    pub fn new(run: impl Into<PathBuf>, data: impl Into<PathBuf>) -> Self {
        Self {
            run: run.into(),
            data: data.into(),
        }
    }

    /// Those of a test, which go with the directory.
    #[cfg(test)]
    #[allow(clippy::unwrap_used)]
    pub(crate) fn temporary() -> (tempfile::TempDir, Self) {
        let directory = tempfile::tempdir().unwrap();
        let paths = Self::new(directory.path().join("run"), directory.path().join("data"));
        (directory, paths)
    }

    /// The directory of run-time state.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// The directory of all containers.
    pub fn containers(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// Directory of links from names to ids.
    pub fn names(&self) -> PathBuf {
        self.data.join("names")
    }

    /// The directory of all volumes.
    pub fn volumes(&self) -> PathBuf {
        self.data.join("volumes")
    }

    /// The directory of one volume.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.volumes().join(name)
    }

    /// The directory of all networks that people created.
    pub fn networks(&self) -> PathBuf {
        self.data.join("networks")
    }

    /// The directory of one container.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }

    /// Where a process prepares the directory of a container, or keeps files of its own for a
    /// while: another place each time. Removed by others when the process does not live any more.
    pub fn staging(&self, creator: ProcessId) -> PathBuf {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let ProcessId { pid, started } = creator;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        self.containers().join(format!(".{pid}-{started}-{number}"))
    }

    /// The directories that processes were preparing which do not live any more.
    pub fn abandoned(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.containers()).into_iter().flatten();
        let is_abandoned = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            let (pid, started) = name?.strip_prefix('.')?.split_once('-')?;
            let (started, _) = started.split_once('-').unwrap_or((started, ""));
            let creator = ProcessId {
                pid: pid.parse().ok()?,
                started: started.parse().ok()?,
            };
            (!creator.lives()).then_some(())
        };
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| is_abandoned(path).is_some())
            .collect()
    }
}
