//! Where hull keeps containers of its own. Creates nothing itself.

use std::path::{Path, PathBuf};

/// The two directories everything lives under.
///
/// ```text
/// RUN/…                   what lives: see hull_sandbox::store
/// DATA/containers/<id>/   one container: config.json, record.json, status.json, and
///     upper, work         its writable layer
///     log, log.1          its output
///     etc/                its hosts, hostname, resolv.conf
///     network.json        what network plugins are to undo
/// DATA/names/<name>       symbolic link to the id that has the name
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

    /// The directory of one container.
    pub fn container(&self, id: &str) -> PathBuf {
        self.containers().join(id)
    }
}
