//! The directories of control groups: created ready for processes and limits, listed, removed.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::Access;

/// Pause between two attempts to remove a group.
pub(super) const PAUSE: Duration = Duration::from_millis(1);
/// The controllers of v2 that statistics and limits need.
const WANTED: [&str; 5] = ["cpuset", "cpu", "io", "memory", "pids"];

/// Directories created so far; removed when dropped.
#[derive(Default)]
pub(super) struct Made(pub(super) Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            // Fails if it is in use by now.
            let _ = rustix::fs::rmdir(directory);
        }
    }
}

/// Creates a group and its missing parents, so that processes can join and limits can be set.
pub(super) fn make(mount: &Path, directory: &Path, made: &mut Made) -> io::Result<()> {
    let mut group = mount.to_owned();
    for name in directory.strip_prefix(mount).unwrap_or(directory) {
        enable_controllers(&group);
        let above = group.clone();
        group.push(name);
        match rustix::fs::mkdir(&group, 0o755.into()) {
            Ok(()) => made.0.push(group.clone()),
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        if !group.join("cgroup.controllers").exists() {
            inherit_cpuset(&above, &group)?;
        }
    }
    // It may have existed, in a hierarchy that is read-only.
    Ok(rustix::fs::access(directory, Access::WRITE_OK)?)
}

/// v2: enables all available controllers for children. Where that fails, a limit will not find its
/// file.
fn enable_controllers(group: &Path) {
    let Ok(available) = std::fs::read_to_string(group.join("cgroup.controllers")) else {
        return;
    };
    let words: Vec<_> = available
        .split_whitespace()
        .filter(|name| WANTED.contains(name))
        .map(|name| format!("+{name}"))
        .collect();
    let file = group.join("cgroup.subtree_control");
    if !words.is_empty() && write(&file, &words.join(" ")).is_err() {
        // The kernel accepts all or none: enable one by one, so that one refusal does not block the
        // others.
        for word in words {
            let _ = write(&file, &word);
        }
    }
}

/// v1: a new cpuset is empty, and an empty cpuset accepts no processes.
fn inherit_cpuset(above: &Path, group: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = group.join(file);
        match std::fs::read_to_string(&path) {
            Ok(text) if text.trim().is_empty() => {
                write(&path, std::fs::read_to_string(above.join(file))?.trim())?;
            }
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// v2: bytes in use that cannot be reclaimed; `maximum` is the group's `memory.max`. File pages can
/// be reclaimed, except shared memory, which includes the machine's.
pub(super) fn held(maximum: &Path) -> u64 {
    let read = |file| std::fs::read_to_string(maximum.with_file_name(file)).unwrap_or_default();
    let current = read("memory.current").trim().parse().unwrap_or(0u64);
    let stat = read("memory.stat");
    let value = |key: &str| {
        stat.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| value.parse::<u64>().ok())
            .unwrap_or(0)
    };
    current.saturating_sub(value("file").saturating_sub(value("shmem")))
}

/// Removes a group and its descendants, waiting for processes to leave until `deadline`.
pub(super) fn remove(directory: &Path, deadline: Instant) -> io::Result<()> {
    loop {
        let mut result = Ok(());
        for group in tree(directory)? {
            match rustix::fs::rmdir(&group) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => result = Err(error),
            }
        }
        match result {
            Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            result => return Ok(result?),
        }
    }
}

/// A group and its descendants, children first; empty if it does not exist.
pub(super) fn tree(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut groups = Vec::new();
    for entry in entries {
        let entry = match entry {
            Err(error) if is_gone(&error) => continue,
            entry => entry?,
        };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            groups.extend(tree(&entry.path())?);
        }
    }
    groups.push(directory.to_owned());
    Ok(groups)
}

/// It does not exist, or (ENODEV) was removed after it was opened.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// The hierarchy is not writable for this process.
pub(super) fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EROFS | libc::EACCES | libc::EPERM)
    )
}

/// A single write; does not create the file.
pub(super) fn write(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(value.as_bytes())
}
