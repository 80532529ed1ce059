//! Ids and names of containers, and finding a container by either.
//!
//! A name belongs to whoever manages to create the symbolic link `names/<name>`: the file system decides between
//! two commands that want the same one at the same time.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::Path;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Context, Failure, Result};
use crate::paths::Paths;
use crate::record::{self, Record};

/// A new id: 64 hexadecimal digits.
///
/// # Errors
/// The kernel has no random numbers.
pub fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random numbers".into())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether a text may be a name: as Docker's, `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
pub fn is_valid(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && name.len() >= 2
        && name.len() <= 200
        && characters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// Takes a name for the container `id`, and makes its state directory.
///
/// # Errors
/// The name is not valid, or another container has it.
pub fn claim(paths: &Paths, name: &str, id: &str) -> Result<()> {
    if !is_valid(name) {
        return Err(Failure::new(format!(
            "invalid container name {name:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]+ is allowed"
        )));
    }
    let names = paths.names();
    fs::create_dir_all(&names).context(|| format!("create {}", names.display()))?;
    // A name whose owner has no directory is free: so the directory comes before the name.
    let container = paths.container(id).run;
    make_directory(&container)?;
    link(paths, name, id).inspect_err(|_| {
        // The failure that is reported is the claim's.
        let _ = fs::remove_dir(&container);
    })
}

fn link(paths: &Paths, name: &str, id: &str) -> Result<()> {
    let link = paths.names().join(name);
    loop {
        match symlink(id, &link) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).context(|| format!("create {}", link.display())),
        }
        let Some(owner) = owner(paths, name)? else {
            continue; // released in between
        };
        if paths.container(&owner).run.exists() {
            return Err(Failure::new(format!(
                "the container name {name:?} is in use by container {}",
                owner.get(..12).unwrap_or(&owner)
            ))
            .hint(format!("hull rm {name}, or choose another --name")));
        }
        // Left by a command that was killed.
        release(paths, name, &owner);
    }
}

fn owner(paths: &Paths, name: &str) -> Result<Option<String>> {
    match fs::read_link(paths.names().join(name)) {
        Ok(target) => Ok(Some(target.to_string_lossy().into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(|| format!("read the name {name:?}")),
    }
}

/// Gives a name back, if `id` has it.
pub fn release(paths: &Paths, name: &str, id: &str) {
    if owner(paths, name).ok().flatten().as_deref() == Some(id) {
        // Gone already is as good.
        let _ = fs::remove_file(paths.names().join(name));
    }
}

/// Ids of all containers, in no order.
///
/// # Errors
/// The state directory cannot be read.
pub fn ids(paths: &Paths) -> Result<Vec<String>> {
    let entries = match fs::read_dir(paths.run()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("read {}", paths.run().display())),
    };
    let is_id = |name: &String| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    entries
        .filter_map(|entry| match entry {
            Ok(entry) => entry.file_name().into_string().ok().filter(is_id).map(Ok),
            Err(error) => Some(Err(error)),
        })
        .collect::<io::Result<_>>()
        .context(|| format!("read {}", paths.run().display()))
}

/// The id of the container with this name, id, or unambiguous beginning of an id.
///
/// # Errors
/// There is none, or more than one.
pub fn find(paths: &Paths, text: &str) -> Result<String> {
    if is_valid(text)
        && let Some(id) = owner(paths, text)?
        && paths.container(&id).run.exists()
    {
        return Ok(id);
    }
    let mut matches = ids(paths)?;
    matches.retain(|id| !text.is_empty() && id.starts_with(text));
    match &matches[..] {
        [one] => Ok(one.clone()),
        [] => Err(Failure::new(format!("no such container: {text}"))
            .hint("hull ps -a lists all containers")
            .code(1)),
        _ => Err(Failure::new(format!(
            "{text:?} is the beginning of {} container ids",
            matches.len()
        ))
        .hint("give more digits, or the name")
        .code(1)),
    }
}

/// The records of all containers, newest first. A container whose record cannot be read is reported by id with
/// the reason; it does not hide the others.
///
/// # Errors
/// The state directory cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<(String, Result<Record>)>> {
    let mut records: Vec<_> = ids(paths)?
        .into_iter()
        .filter_map(|id| {
            let container = paths.container(&id);
            let record = Record::load(&container);
            // One that is just being made, or just being removed, has no record and nothing to show.
            if record.is_err() && (!container.state().exists() || !container.run.exists()) {
                return None;
            }
            Some((id, record))
        })
        .collect();
    records.sort_by_key(|(_, record)| {
        std::cmp::Reverse(record.as_ref().map_or(0, |record| record.created))
    });
    Ok(records)
}

/// Whether a container of this id lives.
pub fn is_alive(paths: &Paths, id: &str) -> bool {
    record::is_alive(&paths.container(id))
}

/// Makes the directory of a container's state: what was asked for may be secret, and is nobody else's business.
///
/// # Errors
/// The directory above it cannot be written.
pub fn make_directory(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .context(|| format!("create {}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn paths() -> (tempfile::TempDir, Paths) {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths::new(directory.path().join("run"), directory.path().join("data"));
        (directory, paths)
    }

    #[test]
    fn names_are_dockers() {
        for good in ["ab", "web-1", "A_b.c", "0x"] {
            assert!(is_valid(good), "{good}");
        }
        for bad in ["", "a", "-a", ".a", "a/b", "a b", "ä1", "../x"] {
            assert!(!is_valid(bad), "{bad}");
        }
    }

    #[test]
    fn a_name_can_be_taken_once_and_again_after_it_is_given_back() {
        let (_directory, paths) = paths();
        claim(&paths, "web", "one").unwrap();
        let error = claim(&paths, "web", "two").unwrap_err();
        assert!(error.message.contains("in use by container one"), "{error}");
        release(&paths, "web", "two");
        claim(&paths, "web", "two").unwrap_err();
        release(&paths, "web", "one");
        claim(&paths, "web", "two").unwrap();
    }

    #[test]
    fn a_name_whose_container_is_gone_can_be_taken() {
        let (_directory, paths) = paths();
        claim(&paths, "web", "gone").unwrap();
        fs::remove_dir(paths.container("gone").run).unwrap();
        claim(&paths, "web", "new").unwrap();
    }

    #[test]
    fn a_container_is_found_by_name_id_and_unambiguous_beginning() {
        let (_directory, paths) = paths();
        let id = "ab".repeat(32);
        let other = format!("ac{}", "ab".repeat(31));
        for id in [&id, &other] {
            fs::create_dir_all(paths.container(id).run).unwrap();
        }
        claim(&paths, "web", &id).unwrap();
        assert_eq!(find(&paths, "web").unwrap(), id);
        assert_eq!(find(&paths, &id).unwrap(), id);
        assert_eq!(find(&paths, "ac").unwrap(), other);
        assert!(
            find(&paths, "a")
                .unwrap_err()
                .message
                .contains("2 container ids")
        );
        assert!(find(&paths, "").is_err());
        assert!(
            find(&paths, "nothing")
                .unwrap_err()
                .message
                .contains("no such container")
        );
    }
}
