//! The commands of the OCI command line, without argument parsing and output.
//!
//! | module | commands |
//! | --- | --- |
//! | `create` | `create`, `run` |
//! | `exec` | `exec` |
//! | `life` | `start`, `kill`, `pause`, `resume`, `update`, `delete` |
//! | `query` | `state`, `list`, `ps`, `events` |

mod create;
mod exec;
mod life;
mod query;

use std::io::Write;
use std::path::{Path, PathBuf};

use hull_sandbox::config::{MachineConfig, NetworkLimits};
use hull_sandbox::error::{Context, Error, ErrorKind, Result};

pub use create::{CreateOptions, create, run};
pub use exec::{ExecOptions, exec};
pub use life::{delete, kill, pause, resume, start, update, wall};
pub use query::{Listed, list, metrics, processes, state};

use crate::container::Root;

/// See [`Settings::machine`].
pub type MachineMaker = Box<dyn Fn(Option<u64>, Option<u64>) -> Result<MachineConfig>>;

/// Settings of all commands.
pub struct Settings {
    /// Directory of container state.
    pub root: Root,
    /// hull's runtime directory, which has the state of machines.
    pub run_directory: PathBuf,
    /// `cgroupsPath` has the form `slice:prefix:name`.
    pub systemd_cgroup: bool,
    /// Configures a machine for a container with this memory limit (bytes) and this CPU limit
    /// (thousandths of a CPU). Called only if a machine is needed.
    pub machine: MachineMaker,
    /// Limits for networks that engines set up.
    pub network: NetworkLimits,
    /// Processors of one core run one machine at a time.
    pub core_scheduling: bool,
    /// Reports a problem that does not make the command fail.
    pub warn: fn(&str),
}

/// Adds the text that engines look for when a command was not found or cannot be executed.
pub fn with_runc_wording(mut failure: Error) -> Error {
    let words: &[&str] = match failure.kind {
        ErrorKind::CommandNotFound => &[
            "executable file not found in $PATH",
            "no such file or directory",
        ],
        ErrorKind::NotExecutable => &["permission denied"],
        _ => return failure,
    };
    let lower = failure.message.to_lowercase();
    if !words.iter().any(|words| lower.contains(words)) {
        failure.message = format!("{}: {}", failure.message, words[0]);
    }
    failure
}

fn write_pid_file(path: Option<&Path>, pid: i32) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    // Readers must never see a partial file.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!(".{name}.new"));
    // One that is there was left by a command that was killed, or is a trap: a link to a file that
    // is to be overwritten. The directory may be writable for others.
    let _ = std::fs::remove_file(&new);
    let create = || {
        let mut file = std::fs::File::create_new(&new)?;
        file.write_all(pid.to_string().as_bytes())?;
        std::fs::rename(&new, path)
    };
    create().context(|| format!("write {}", path.display()))
}

fn refuse_descriptors(count: u32) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    Err(Error::unsupported(
        "--preserve-fds: descriptors of the host's kernel mean nothing to the guest's",
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_link_beside_the_pid_file_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, directory.path().join(".pid.new")).unwrap();
        let path = directory.path().join("pid");
        for pid in [7, 8] {
            write_pid_file(Some(&path), pid).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), pid.to_string());
        }
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
