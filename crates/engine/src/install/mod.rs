//! Telling engines, and systemd, about hull: which file gets which lines, and how to take exactly
//! these back. Called by `hull install` and `hull uninstall`; prints nothing. The files of one
//! engine are in the module of its name.
//!
//! A change is worked out completely before anything is written, and a file is written beside its
//! place and renamed into it: what is there is the old text or the new one.

mod containerd;
mod crio;
mod docker;
mod drop_in;
mod json;
mod podman;
pub mod systemd;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::error::{Context, Error, Result};

/// The name under which engines know the runtime.
const RUNTIME: &str = "hull";

/// The executable that engines call.
const EXECUTABLE: &str = "hull-oci";

/// What runs containers with a runtime of the user's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// podman and buildah.
    Podman,
    /// Docker.
    Docker,
    /// CRI-O, of Kubernetes.
    Crio,
    /// containerd, of Kubernetes: the shim instead of the OCI runtime.
    Containerd,
    /// systemd: containers that are to run are started at boot, and the API is served.
    Systemd,
}

/// A file before and after.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    /// The file.
    pub path: PathBuf,
    /// `None`: there is no file.
    pub before: Option<String>,
    /// `None`: there will be no file.
    pub after: Option<String>,
    /// Directories above a removed file that go with it when they are empty.
    directories: usize,
}

impl Engine {
    /// The changes that make `runtime` known, below `root` in place of `/`; none when it is known
    /// already.
    pub fn install(self, root: &Path, runtime: &str, default: bool) -> Result<Vec<Change>> {
        let change = match self {
            Engine::Podman => drop_in::install(&podman::PODMAN, root, runtime, default),
            Engine::Docker => docker::install(root, runtime, default),
            Engine::Crio => drop_in::install(&crio::CRIO, root, runtime, default),
            Engine::Containerd => containerd::install(root, default),
            Engine::Systemd if default => Err(Error::unsupported(
                "--default: systemd runs no containers of its own",
            )),
            Engine::Systemd => return systemd::install(root, runtime),
        };
        change.map(|change| change.into_iter().collect())
    }

    /// The changes that take back what [`Engine::install`] did; none when there is nothing of it.
    pub fn uninstall(self, root: &Path) -> Result<Vec<Change>> {
        let change = match self {
            Engine::Podman => drop_in::uninstall(&podman::PODMAN, root),
            Engine::Docker => docker::uninstall(root),
            Engine::Crio => drop_in::uninstall(&crio::CRIO, root),
            Engine::Containerd => containerd::uninstall(root),
            Engine::Systemd => return systemd::uninstall(root),
        };
        change.map(|change| change.into_iter().collect())
    }

    /// What to do after a change; `installed` as the default or by name, or not at all.
    pub fn next(self, installed: Option<bool>) -> &'static [&'static str] {
        match (self, installed) {
            (Engine::Systemd, Some(_)) => &[
                "systemctl daemon-reload",
                "systemctl enable hull-containers.service",
                "systemctl enable --now hull-api.socket",
                "hull run -d --restart unless-stopped IMAGE …",
            ],
            (Engine::Systemd, None) => &["systemctl daemon-reload"],
            (Engine::Podman, Some(true)) => &["podman run IMAGE …"],
            (Engine::Podman, Some(false)) => &["podman --runtime hull run IMAGE …"],
            (Engine::Podman, None) => &[],
            (Engine::Docker, Some(true)) => &["systemctl reload docker", "docker run IMAGE …"],
            (Engine::Docker, Some(false)) => &[
                "systemctl reload docker",
                "docker run --runtime hull IMAGE …",
            ],
            (Engine::Docker, None) => &["systemctl reload docker"],
            (Engine::Crio, Some(true)) | (Engine::Crio, None) => &["systemctl restart crio"],
            (Engine::Containerd, Some(true)) | (Engine::Containerd, None) => {
                &["systemctl restart containerd"]
            }
            (Engine::Containerd, Some(false)) => &[
                "systemctl restart containerd",
                "a RuntimeClass with handler: hull, and pods with its runtimeClassName",
                "ctr run --runtime io.containerd.hull.v2 IMAGE ID",
            ],
            (Engine::Crio, Some(false)) => &[
                "systemctl restart crio",
                "a RuntimeClass with handler: hull, and pods with its runtimeClassName",
            ],
        }
    }
}

/// The runtime beside hull's own executable.
pub fn runtime() -> Result<String> {
    let executable = std::env::current_exe().context(|| "find hull's own executable")?;
    let path = executable.with_file_name(EXECUTABLE);
    if !path.exists() {
        return Err(Error::new(format!(
            "{EXECUTABLE} is not installed beside hull: there is no {}",
            path.display()
        ))
        .hint("make install"));
    }
    path.into_os_string().into_string().map_err(|path| {
        Error::new(format!(
            "configuration files cannot have the path {path:?}: not UTF-8"
        ))
    })
}

/// A file's text; `None` when there is no file.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            Err(Error::new(format!("{} is not text", path.display())))
        }
        Err(error) => Err(error).context(|| format!("read {}", path.display())),
    }
}

/// How many of the directories that a file lies in are not there.
fn missing_directories(path: &Path) -> usize {
    let directories = path.ancestors().skip(1);
    directories.take_while(|path| !path.exists()).count()
}

impl Change {
    /// Does it.
    pub fn apply(&self) -> Result<()> {
        let outcome = match &self.after {
            Some(text) => self.write(text),
            None => self.remove(),
        };
        outcome.map_err(|error| {
            let denied = error.kind() == ErrorKind::PermissionDenied;
            let error = Error::new(format!("cannot write {}: {error}", self.path.display()));
            if denied {
                error.hint("it takes the rights of root: sudo hull …")
            } else {
                error
            }
        })
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let missing = missing_directories(&self.path);
        let made: Vec<&Path> = self.path.ancestors().skip(1).take(missing).collect();
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        self.replace(text).inspect_err(|_| {
            for directory in made {
                // The first error is the one to tell.
                let _ = fs::remove_dir(directory);
            }
        })
    }

    /// The new text under the name of the old one, with its owner and mode.
    fn replace(&self, text: &str) -> io::Result<()> {
        // A link stays one.
        let path = match fs::canonicalize(&self.path) {
            Ok(path) => path,
            Err(error) if error.kind() == ErrorKind::NotFound => self.path.clone(),
            Err(error) => return Err(error),
        };
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".hull");
        let beside = path.with_file_name(name);
        // Of a command that was killed.
        let _ = fs::remove_file(&beside);
        let written = || -> io::Result<()> {
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&beside)?;
            let mut mode = 0o644;
            if let Ok(old) = fs::metadata(&path) {
                mode = old.mode();
                let new = file.metadata()?;
                if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                    fchown(&file, Some(old.uid()), Some(old.gid()))?;
                }
            }
            file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&beside, &path)
        };
        written().inspect_err(|_| {
            let _ = fs::remove_file(&beside);
        })
    }

    fn remove(&self) -> io::Result<()> {
        fs::remove_file(&self.path)?;
        for directory in self.path.ancestors().skip(1).take(self.directories) {
            match fs::remove_dir(directory) {
                Ok(()) => {}
                // Somebody else has put something there.
                Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What changes, line by line: the lines that go with `-`, those that come with `+`, those
    /// around them with a space.
    pub fn lines(&self) -> Vec<String> {
        let before: Vec<&str> = self.before.as_deref().unwrap_or_default().lines().collect();
        let after: Vec<&str> = self.after.as_deref().unwrap_or_default().lines().collect();
        // Lengths of the longest common subsequences of what is left: the files are small.
        let mut common = vec![vec![0u32; after.len() + 1]; before.len() + 1];
        for (i, old) in before.iter().enumerate().rev() {
            for (j, new) in after.iter().enumerate().rev() {
                common[i][j] = if old == new {
                    common[i + 1][j + 1] + 1
                } else {
                    common[i + 1][j].max(common[i][j + 1])
                };
            }
        }
        let (mut i, mut j) = (0, 0);
        let mut lines = Vec::new();
        while i < before.len() || j < after.len() {
            if i < before.len() && j < after.len() && before[i] == after[j] {
                lines.push(format!("  {}", before[i]));
                i += 1;
                j += 1;
            } else if j == after.len() || (i < before.len() && common[i + 1][j] >= common[i][j + 1])
            {
                lines.push(format!("- {}", before[i]));
                i += 1;
            } else {
                lines.push(format!("+ {}", after[j]));
                j += 1;
            }
        }
        without_distant(lines)
    }
}

/// Keeps two lines around each change.
fn without_distant(lines: Vec<String>) -> Vec<String> {
    let changes: Vec<usize> = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.starts_with(' '))
        .map(|(at, _)| at)
        .collect();
    let is_near = |at: usize| changes.iter().any(|change| change.abs_diff(at) <= 2);
    let near: Vec<bool> = (0..lines.len()).map(is_near).collect();
    lines
        .into_iter()
        .zip(near)
        .filter_map(|(line, near)| near.then_some(line))
        .collect()
}

#[cfg(test)]
mod tests;
