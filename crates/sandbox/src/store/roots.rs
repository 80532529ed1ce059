//! The directories in which engines keep their containers (`--root`), so that containers of all
//! engines on a host can be listed: a file for each that `hull-oci` was called with.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Directory;
use crate::error::{Error, Result};

fn directory(run: &Path) -> PathBuf {
    run.join("roots")
}

/// A file name for a path: without slashes, and told from that of any other path.
fn name(root: &Path) -> String {
    let mut name = String::new();
    for byte in root.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                name.push(char::from(*byte));
            }
            other => name.push_str(&format!("%{other:02x}")),
        }
    }
    name
}

/// Writes down that an engine keeps containers in a directory.
///
/// # Errors
/// The path is not UTF-8 or too long for a file name, or the file cannot be written.
pub fn register(run: &Path, root: &Path) -> Result<()> {
    let name = name(root);
    let path = directory(run).join(&name);
    if path.exists() {
        return Ok(());
    }
    let text = root
        .to_str()
        .filter(|_| name.len() <= 250)
        .ok_or_else(|| Error::new(format!("cannot remember the root {}", root.display())))?;
    Directory::create(&directory(run))?.write(&name, text.as_bytes())
}

/// All directories of engines that still exist. Those that do not are forgotten.
pub fn list(run: &Path) -> Vec<PathBuf> {
    let mut roots = Vec::new();
    for entry in fs::read_dir(directory(run)).into_iter().flatten().flatten() {
        let Ok(text) = fs::read_to_string(entry.path()) else {
            continue;
        };
        let root = PathBuf::from(text);
        match root.is_dir() {
            true => roots.push(root),
            false => {
                // Nothing depends on it.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    roots.sort();
    roots
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn roots_are_remembered_while_they_exist() {
        let run = tempfile::tempdir().unwrap();
        let root = run.path().join("a b%/c");
        fs::create_dir_all(&root).unwrap();
        register(run.path(), &root).unwrap();
        register(run.path(), &root).unwrap();
        assert_eq!(list(run.path()), std::slice::from_ref(&root));
        fs::remove_dir(&root).unwrap();
        assert!(list(run.path()).is_empty());
        assert!(register(run.path(), Path::new(&"x/".repeat(200))).is_err());
    }
}
