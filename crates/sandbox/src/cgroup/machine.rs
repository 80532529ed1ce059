//! The control groups of a machine: made and joined while its guest boots. Moving a process waits
//! until no processor is in the middle of a fork, 10 ms and more, which a start does not wait for.
//!
//! The directories of a sandbox's own group are recorded in its run-time directory before they are
//! made, and go with that: at the end of the sandbox, or when what a killed one left is swept.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use serde::{Deserialize, Serialize};

use super::directory::{is_denied, is_gone};
use super::{Bounds, Groups, Place, limits};
use crate::config::CgroupConfig;
use crate::error::{Context, Error, Result};
use crate::rootless;
use crate::store::{Directory, HostProcesses, ProcessStat, versioned};

/// Name of the record in a sandbox's run-time directory.
const FILE: &str = "cgroup.json";

/// Version of the record.
const VERSION: u32 = 1;

/// The groups that a sandbox made.
#[derive(Serialize, Deserialize)]
struct Made {
    version: u32,
    #[serde(flatten)]
    groups: Groups,
}

/// Puts the processes of a sandbox into control groups, and keeps them within bounds. Blocks.
///
/// # Errors
/// A group that an engine made cannot be joined; a group of the sandbox's own cannot be made, for
/// another reason than that the host does not allow it.
pub(crate) fn confine(
    config: &CgroupConfig,
    bounds: &Bounds,
    sandbox: &Path,
    processes: HostProcesses,
) -> Result<()> {
    match config {
        CgroupConfig::None => Ok(()),
        CgroupConfig::Join(directories) | CgroupConfig::JoinMachine(directories) => {
            let groups = Groups {
                directories: directories.clone(),
            };
            groups.bound(bounds);
            let mut joining = processes.guest();
            if !matches!(config, CgroupConfig::JoinMachine(_)) {
                joining.push(processes.sandbox);
            }
            join(&groups, &joining).map_err(|(directory, error)| cannot_join(directory, error))
        }
        CgroupConfig::Own { parent } => {
            let directory = Directory::open(sandbox)
                .context(|| format!("open the directory {}", sandbox.display()))?;
            let id = sandbox.file_name().unwrap_or_default();
            let place = place(parent, Path::new(id))?;
            record(&directory, &place.groups())?;
            let groups = place.make(None, 0)?;
            groups.bound(bounds);
            match join(&groups, &processes.guest()) {
                Ok(()) => Ok(()),
                // Without root: the groups are the user's, but the one above them is not.
                // They are removed at the end of the sandbox.
                Err((directory, error)) if is_denied(&error) => {
                    tracing::warn!("{}", cannot_join(directory, error).message);
                    Ok(())
                }
                Err((directory, error)) => Err(cannot_join(directory, error)),
            }
        }
    }
}

/// Removes the groups that a sandbox made, with what a killed one left in them.
///
/// # Errors
/// A process is still in one, or the record is damaged.
pub(crate) fn remove(sandbox: &Path) -> Result<()> {
    let directory = match Directory::open(sandbox) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(error).context(|| format!("open the directory {}", sandbox.display()));
        }
    };
    match versioned::read::<Made>(&directory, FILE, VERSION)? {
        Some(made) => made.groups.remove(),
        None => Ok(()),
    }
}

fn record(directory: &Directory, groups: &Groups) -> Result<()> {
    let made = Made {
        version: VERSION,
        groups: groups.clone(),
    };
    let text = serde_json::to_vec(&made).context(|| "encode the control groups")?;
    directory.write(FILE, &text)
}

/// Where a sandbox's own group is: below `parent` of the mount. Without root it is beside the
/// caller's group, which is the user's where the host delegates control groups.
fn place(parent: &Path, id: &Path) -> Result<Place> {
    let path = match rootless::in_user_namespace() {
        true => PathBuf::from(format!("hull-{}", id.display())),
        false => parent.join(id),
    };
    Ok(Place::find(Some(&path), "", false)?.for_machine())
}

/// Moves processes with all that they have started. What they start later follows by itself.
fn join<'a>(groups: &'a Groups, pids: &[i32]) -> Result<(), (&'a Path, io::Error)> {
    let mut waiting: Vec<_> = pids.iter().map(|pid| (*pid, None)).collect();
    while let Some((pid, parent)) = waiting.pop() {
        // Its number may be another process's by now.
        let is_child = |parent| {
            ProcessStat::read(pid)?
                .number(4)
                .map(|found: i32| found == parent)
        };
        if parent.is_some_and(|parent| is_child(parent) != Some(true)) {
            continue;
        }
        match groups.move_in(pid) {
            // It has ended.
            Err((_, error)) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            moved => moved?,
        }
        // After it has moved: from now on it starts others in its groups.
        waiting.extend(children(pid).into_iter().map(|child| (child, Some(pid))));
    }
    Ok(())
}

/// The children of a process, those of all its threads.
fn children(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        all.extend(
            list.split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    all
}

fn cannot_join(directory: &Path, error: io::Error) -> Error {
    Error::new(format!(
        "cannot join the control group {}: {error}",
        directory.display()
    ))
}

/// What [`Bounds`] limits, by name.
pub const LIMITS: [&str; 3] = ["memory", "processes", "processors"];

/// Which of [`LIMITS`] can be set for the machines of hull's own containers on this host: tried
/// with a group, which is removed again.
///
/// # Errors
/// No group can be made, with the reason.
pub fn reach(parent: &Path) -> Result<Vec<&'static str>> {
    let id = format!("check-{}", std::process::id());
    let place = place(parent, Path::new(&id))?;
    let groups = place.make(None, 0)?;
    let found = usable(&groups);
    groups.remove()?;
    found
}

fn usable(groups: &Groups) -> Result<Vec<&'static str>> {
    let [first, ..] = &groups.directories[..] else {
        return Err(Error::new("no hierarchy of control groups can be written"));
    };
    for directory in &groups.directories {
        let above = directory.with_file_name("cgroup.procs");
        if let Err(error) = rustix::fs::access(&above, Access::WRITE_OK)
            && !is_gone(&error.into())
        {
            return Err(cannot_join(first, error.into()));
        }
    }
    let each = [
        Bounds {
            memory: Some(0),
            ..Bounds::default()
        },
        Bounds {
            processes: Some(0),
            ..Bounds::default()
        },
        Bounds {
            cpus: Some(0),
            ..Bounds::default()
        },
    ];
    // That of swap, which comes after that of memory, is missing on many hosts.
    let can = |bounds: &Bounds| {
        let settings = limits::bounds(bounds);
        settings
            .first()
            .is_some_and(|setting| groups.way(setting).is_some())
    };
    Ok(LIMITS
        .into_iter()
        .zip(&each)
        .filter_map(|(what, bounds)| can(bounds).then_some(what))
        .collect())
}
