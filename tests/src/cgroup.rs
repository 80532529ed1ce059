//! Control groups of the host, version 1 or 2, as tests look at them.

use std::fs;
use std::path::{Path, PathBuf};

const MOUNT: &str = "/sys/fs/cgroup";

/// A file of a process's control groups: the first that has it, by its name in version 1 or 2, with
/// its text.
pub fn file_of(pid: i32, v1: &str, v2: &str) -> Option<(PathBuf, String)> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_start_matches('/'));
        let (mount, file) = match controllers {
            "" => (PathBuf::from(MOUNT), v2),
            _ => (
                Path::new(MOUNT).join(controllers.trim_start_matches("name=")),
                v1,
            ),
        };
        let file = mount.join(path).join(file);
        let text = fs::read_to_string(&file).ok()?;
        Some((file, text.trim().to_owned()))
    })
}

/// The groups of this path, `/a/b`, in all hierarchies.
pub fn named(path: &str) -> Vec<PathBuf> {
    let path = path.trim_start_matches('/');
    let hierarchies = fs::read_dir(MOUNT).into_iter().flatten().flatten();
    let mounts = hierarchies
        .map(|entry| entry.path())
        .chain([PathBuf::from(MOUNT)]);
    let mut found: Vec<_> = mounts
        .filter_map(|mount| fs::canonicalize(mount.join(path)).ok())
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The groups directly below those of this path.
pub fn below(path: &str) -> Vec<PathBuf> {
    let entries = named(path)
        .into_iter()
        .filter_map(|group| fs::read_dir(group).ok());
    entries
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

/// Removes the groups of this path, in which nothing must be.
pub fn remove(path: &str) {
    for group in named(path) {
        // Another test's may be in it.
        let _ = fs::remove_dir(group);
    }
}
