//! Control groups on the host, for the host processes of a sandbox.
//!
//! Limits of containers are enforced in the guest, field by field. The host's group is an outer
//! limit on everything that the sandbox costs:
//! - An engine names the group of a container; it holds sandbox process, devices, machine and
//!   keepers, and engines read statistics from it (podman and Docker look up the keeper's group).
//!   It has the specification's memory and swap, processor time, cpusets and block I/O; pids,
//!   devices, hugetlb, rdma, network, memory.reservation and `unified` are left to the guest.
//! - hull's own sandboxes have a group each for machine and devices: see [`machine`].
//! - Both keep the machine within [`Bounds`], where the specification has no limit of its own.
//!
//! - cgroup v1, hybrid and v2 share one implementation: a group has one directory per hierarchy,
//!   and a limit is written to the first directory that has a file for it ([`limits`]). [`path`]
//!   finds the directories.
//! - A hierarchy that is not writable is skipped like one that is not mounted: an error only if a
//!   limit needs it.
//! - For systemd style paths, the directories that systemd would create are created directly.
//!   systemd creates a scope only with a process to put in it, and there is none yet when limits
//!   are set. The price: systemd does not know the unit (`systemctl status` does not show it), and
//!   does not keep controllers enabled in its slices for it when it is reloaded.
//!
//! Not cgroups-rs (0.5): it depends on zbus and its executors (about 90 packages), finds its mounts
//! by itself, so that tests cannot replace them, and leaves directories behind when it fails
//! half-way.

mod directory;
mod limits;
pub(crate) mod machine;
mod path;

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use directory::{Made, held, is_denied, is_gone, make, remove, tree, write};
use path::{Hierarchy, Location};

use crate::error::{Context, Error, Result};
use crate::store::ProcessStat;

pub use limits::Bounds;
pub use machine::{LIMITS, reach};

/// How long [`Groups::remove`] waits for processes to leave; runc waits as long.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it waits for processes that were killed. On a busy host one takes seconds to give back
/// gigabytes.
const KILLED_TIMEOUT: Duration = Duration::from_secs(30);
/// Attempts to move a process that is not fully set up yet (EINVAL), [`JOIN_PAUSE`] apart; as in
/// runc.
const JOIN_ATTEMPTS: u32 = 5;
const JOIN_PAUSE: Duration = Duration::from_millis(30);

/// Files that tell that a group is frozen, itself or with one above it, and the lines that do.
const FREEZER_V1: (&str, &[&str]) = ("freezer.state", &["FROZEN", "FREEZING"]);
const FREEZER_V2: (&str, &[&str]) = ("cgroup.events", &["frozen 1"]);

/// The control groups of one container: the same group in each hierarchy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Absolute paths: one directory with v2, one per hierarchy otherwise. Empty if no hierarchy is
    /// writable.
    pub directories: Vec<PathBuf>,
}

/// Where the control groups of a container are created.
#[derive(Debug)]
pub struct Place {
    hierarchies: Vec<Hierarchy>,
    location: Location,
}

impl Place {
    /// Finds the place; creates nothing.
    ///
    /// `cgroups_path` is `linux.cgroupsPath`: an absolute path is below the mount of each
    /// hierarchy, a relative one below the caller's group (with v2 beside it, because a group with
    /// processes cannot enable controllers for its children); without a path, the group is named
    /// `id`. With `systemd` it is `slice:prefix:name`, by default `system.slice:hull:ID`. `..` does
    /// not lead above the mount or the caller's group.
    pub fn find(cgroups_path: Option<&Path>, id: &str, systemd: bool) -> Result<Place> {
        let location = path::location(cgroups_path, id, systemd)?;
        let read = |path: &str| std::fs::read_to_string(path).context(|| format!("read {path}"));
        let hierarchies =
            path::hierarchies(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?);
        Ok(Place {
            hierarchies,
            location,
        })
    }

    /// Path of the group, relative to the mount or to the caller's group.
    pub fn path(&self) -> &Path {
        match &self.location {
            Location::Mount(path) | Location::Caller(path) => path,
        }
    }

    /// The place without hierarchies that have no controller for [`Bounds`].
    fn for_machine(mut self) -> Self {
        self.hierarchies = path::for_machine(self.hierarchies);
        self
    }

    /// All groups that [`Place::make`] may create, to be recorded before it is called.
    pub fn groups(&self) -> Groups {
        let directory = |hierarchy: &Hierarchy| hierarchy.directory(&self.location);
        Groups {
            directories: self.hierarchies.iter().map(directory).collect(),
        }
    }

    /// Creates the groups with their limits. Leaves nothing behind on failure.
    ///
    /// `overhead`: bytes that the machine needs in addition to the container, added to memory
    /// limits.
    pub fn make(&self, resources: Option<&LinuxResources>, overhead: u64) -> Result<Groups> {
        let mut groups = Groups::default();
        let mut made = Made::default();
        let mut left_out = Vec::new();
        for hierarchy in &self.hierarchies {
            let directory = hierarchy.directory(&self.location);
            let before = made.0.len();
            match make(&hierarchy.mount, &directory, &mut made) {
                Ok(()) => groups.directories.push(directory),
                Err(error) if is_denied(&error) => {
                    drop(Made(made.0.split_off(before)));
                    left_out.push(format!("{}: {error}", hierarchy.mount.display()));
                }
                Err(error) => return Err(failed("make the control group", &directory, error)),
            }
        }
        groups.refuse_frozen()?;
        if let Some(resources) = resources {
            groups
                .apply(resources, overhead)
                .map_err(|failure| match &left_out[..] {
                    [] => failure,
                    _ => failure.hint(format!("not writable: {}", left_out.join(", "))),
                })?;
        }
        made.0.clear();
        Ok(groups)
    }
}

impl Groups {
    /// Sets the limits that `resources` names and keeps the others. `overhead` as in
    /// [`Place::make`].
    ///
    /// Memory is never limited to less than is in use and cannot be reclaimed: the machine would be
    /// killed for memory that its guest may keep. The host's limit then stays as it was, and the
    /// new one holds only in the guest.
    pub fn apply(&self, resources: &LinuxResources, overhead: u64) -> Result<()> {
        let settings = limits::settings(resources, overhead, self.quota_in_force())?;
        // The kernel compares some limits with each other (memory with memory and swap, period with
        // quota), so the right order depends on the values in force: a refused value may be
        // accepted after the others are set.
        let mut refused = Vec::new();
        let mut kept = false;
        for setting in &settings {
            match self.write(setting)? {
                Written::Yes => {}
                Written::InUse => kept = true,
                Written::No(_) => refused.push(setting),
            }
        }
        for setting in refused {
            match self.write(setting)? {
                Written::Yes | Written::InUse => {}
                Written::No(_) if kept && setting.is_memory() => {}
                Written::No(failure) => return Err(failure),
            }
        }
        Ok(())
    }

    /// Keeps the processes in the groups within bounds, as far as the host has controllers for
    /// them. What the kernel refuses is logged: a stricter limit of a group above, for example.
    pub fn bound(&self, bounds: &Bounds) {
        for setting in limits::bounds(bounds) {
            match self.write(&setting) {
                Ok(Written::No(error)) | Err(error) => tracing::warn!("{}", error.message),
                Ok(Written::Yes | Written::InUse) => {}
            }
        }
    }

    /// Processes that join a frozen group, or one below it, hang until somebody thaws it.
    fn refuse_frozen(&self) -> Result<()> {
        let frozen = |directory: &&PathBuf| {
            let is = |(file, words): (&str, &[&str])| {
                let text = std::fs::read_to_string(directory.join(file)).unwrap_or_default();
                text.lines().any(|line| words.contains(&line.trim()))
            };
            [FREEZER_V1, FREEZER_V2].into_iter().any(is)
        };
        let Some(directory) = self.directories.iter().find(frozen) else {
            return Ok(());
        };
        // The first words are runc's.
        let directory = directory.display();
        let error = format!("container's cgroup unexpectedly frozen: {directory}");
        Err(Error::new(error).hint("thaw it, or the group above that is frozen, or remove it"))
    }

    /// Thaws the groups, so that processes in them can end. One that cannot be thawed, because one
    /// above is frozen, stays as it is.
    pub fn thaw(&self) {
        for directory in &self.directories {
            for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
                match write(&directory.join(file), value) {
                    Err(error) if !is_gone(&error) && !is_denied(&error) => {
                        tracing::warn!("cannot thaw {}: {error}", directory.display());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Moves a process with all its threads. Only children that it creates later follow.
    pub fn join(&self, pid: i32) -> Result<()> {
        self.move_in(pid).map_err(|(directory, error)| {
            let doing = format!("move process {pid} to the control group");
            failed(&doing, directory, error)
        })
    }

    /// The same, with the directory that refuses the process.
    fn move_in(&self, pid: i32) -> Result<(), (&Path, io::Error)> {
        for directory in &self.directories {
            let mut attempts = 1;
            while let Err(error) = write(&directory.join("cgroup.procs"), &pid.to_string()) {
                if error.raw_os_error() != Some(libc::EINVAL) || attempts == JOIN_ATTEMPTS {
                    return Err((directory, error));
                }
                attempts += 1;
                std::thread::sleep(JOIN_PAUSE);
            }
        }
        Ok(())
    }

    /// Removes the groups and their descendants but not their parents, as runc does. Kills nothing:
    /// waits up to a second for processes to leave, and longer while all of them are dying. Missing
    /// groups are not an error.
    pub fn remove(&self) -> Result<()> {
        let begin = Instant::now();
        let (directory, error) = loop {
            match self.remove_within(LEAVE_TIMEOUT) {
                None => return Ok(()),
                Some((_, error))
                    if error.raw_os_error() == Some(libc::EBUSY)
                        && begin.elapsed() < KILLED_TIMEOUT
                        && self.are_dying() => {}
                Some(failed) => break failed,
            }
        };
        let inside = self.processes().unwrap_or_default();
        Err(error).context(|| {
            let directory = directory.display();
            match &inside[..] {
                [] => format!("remove the control group {directory}"),
                _ => format!("remove the control group {directory} with processes {inside:?}"),
            }
        })
    }

    /// Whether all processes in the groups are dying, or the last one has just left.
    fn are_dying(&self) -> bool {
        self.processes()
            .is_ok_and(|inside| inside.into_iter().all(is_dying))
    }

    /// The first group that cannot be removed, and why.
    fn remove_within(&self, limit: Duration) -> Option<(&PathBuf, io::Error)> {
        let deadline = Instant::now() + limit;
        let mut failed = None;
        for directory in &self.directories {
            match remove(directory, deadline) {
                // Read-only: the group was not created here.
                Err(error) if error.raw_os_error() == Some(libc::EROFS) => {}
                Err(error) => {
                    failed.get_or_insert((directory, error));
                }
                Ok(()) => {}
            }
        }
        failed
    }

    /// The processes in the groups and their descendants, in ascending order.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for directory in &self.directories {
            for group in tree(directory)
                .context(|| format!("list the control group {}", directory.display()))?
            {
                match std::fs::read_to_string(group.join("cgroup.procs")) {
                    Ok(text) => {
                        pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()))
                    }
                    Err(error) if is_gone(&error) => {}
                    Err(error) => {
                        return Err(error)
                            .context(|| format!("read {}/cgroup.procs", group.display()));
                    }
                }
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    fn quota_in_force(&self) -> Option<String> {
        let text = std::fs::read_to_string(self.find("cpu.max")?).ok()?;
        text.split_whitespace().next().map(str::to_owned)
    }

    fn find(&self, file: &str) -> Option<PathBuf> {
        self.directories
            .iter()
            .map(|directory| directory.join(file))
            .find(|path| path.exists())
    }

    /// The file that a limit is written to, and its content.
    fn way<'a>(&self, setting: &'a limits::Setting) -> Option<(PathBuf, &'a str)> {
        let mut ways = setting.ways.iter();
        ways.find_map(|(file, value)| Some((self.find(file)?, &value[..])))
    }

    fn write(&self, setting: &limits::Setting) -> Result<Written> {
        let Some((path, value)) = self.way(setting) else {
            return match setting.optional {
                true => Ok(Written::Yes),
                false => Err(self.missing(setting)),
            };
        };
        if path.ends_with("memory.max") && value.parse().is_ok_and(|wall: u64| wall < held(&path)) {
            return Ok(Written::InUse);
        }
        let Err(error) = write(&path, value) else {
            return Ok(Written::Yes);
        };
        let number = error.raw_os_error();
        if number == Some(libc::EBUSY) && setting.is_memory() {
            return Ok(Written::InUse);
        }
        let failure = Error::new(format!(
            "cannot set {} ({} to {value}): {error}",
            setting.field,
            path.display(),
        ));
        match number {
            Some(libc::EINVAL) => Ok(Written::No(failure)),
            _ => Err(failure),
        }
    }

    /// The error for a limit that no group has a file for.
    fn missing(&self, setting: &limits::Setting) -> Error {
        let [old, new] = setting.controllers;
        let field = setting.field;
        let mut name = old;
        for directory in &self.directories {
            let there = match std::fs::read_to_string(directory.join("cgroup.controllers")) {
                Ok(text) if self.directories.len() == 1 => {
                    name = new;
                    text.split_whitespace().any(|word| word == new)
                }
                // Hybrid: v2 has only the controllers that v1 does not, and their files would have
                // been found.
                Ok(_) => false,
                Err(_) => std::fs::read_dir(directory).is_ok_and(|entries| {
                    entries.flatten().any(|entry| {
                        let file = entry.file_name();
                        file.to_string_lossy().split('.').next() == Some(old)
                    })
                }),
            };
            if there {
                let files: Vec<_> = setting.ways.iter().map(|(file, _)| *file).collect();
                return Error::new(format!(
                    "cannot set {field}: the host's {name} controller has no {}",
                    files.join(" or ")
                ));
            }
        }
        Error::new(format!(
            "cannot set {field}: the host has no {name} controller"
        ))
    }
}

/// Without [`Context`]: its hint for "no space left" is about disks; here the error is about
/// cpusets and the number of groups.
fn failed(doing: &str, directory: &Path, error: impl Display) -> Error {
    Error::new(format!("cannot {doing} {}: {error}", directory.display()))
}

/// Whether a process was killed, or has ended.
fn is_dying(pid: i32) -> bool {
    /// `PF_EXITING` of linux/sched.h
    const EXITING: u64 = 4;
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let Some(stat) = ProcessStat::read(pid) else {
        return true;
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let was_killed = status.lines().any(|line| {
        let pending = line
            .strip_prefix("ShdPnd:")
            .or_else(|| line.strip_prefix("SigPnd:"));
        pending
            .is_some_and(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & KILL != 0))
    });
    // The 9th field of proc_pid_stat(5) is its flags.
    let flags: u64 = stat.number(9).unwrap_or_default();
    was_killed || flags & EXITING != 0
}

/// Result of writing a limit.
enum Written {
    Yes,
    /// More memory than that is in use.
    InUse,
    /// The value is invalid, or conflicts with other limits.
    No(Error),
}

#[cfg(test)]
mod tests;
