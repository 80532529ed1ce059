//! Ids and names of containers, and finding a container by either.
//!
//! A name belongs to the command that manages to create the symbolic link `names/<name>`: the file
//! system decides between two that want the same one at the same time.

mod random;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;

use hull_sandbox::store::Directory;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::entries;
use crate::error::{Context, Error, Result};
use crate::paths::Paths;

pub use random::random;

/// A new id: 64 hexadecimal digits.
///
/// # Errors
/// The kernel has no random numbers.
pub fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random numbers")?;
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

/// Takes a name for the container `id`, whose directory exists.
///
/// # Errors
/// `InvalidArgument` for a name that is not valid, `Exists` when another container has it.
pub fn claim(paths: &Paths, name: &str, id: &str) -> Result<()> {
    if !is_valid(name) {
        return Err(Error::invalid(format!(
            "invalid container name {name:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]+ is allowed"
        )));
    }
    Directory::create(&paths.names())?;
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
        if paths.container(&owner).exists() {
            return Err(in_use(name, &owner));
        }
        // Left by a command that was killed.
        release(paths, name, &owner);
    }
}

fn in_use(name: &str, owner: &str) -> Error {
    Error::exists(format!(
        "the container name {name:?} is in use by container {}",
        owner.get(..12).unwrap_or(owner)
    ))
    .hint(format!("hull rm {name}, or choose another --name"))
}

/// Fails when a name is taken now: found out before an image is pulled.
///
/// # Errors
/// `Exists`.
pub fn check_free(paths: &Paths, name: &str) -> Result<()> {
    match owner(paths, name)? {
        Some(owner) if paths.container(&owner).exists() => Err(in_use(name, &owner)),
        _ => Ok(()),
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

/// Gives back whatever name `id` has.
pub fn release_all_of(paths: &Paths, id: &str) {
    for entry in fs::read_dir(paths.names()).into_iter().flatten().flatten() {
        if let Ok(name) = entry.file_name().into_string() {
            release(paths, &name, id);
        }
    }
}

/// Ids of all containers.
///
/// # Errors
/// The directory of containers cannot be read.
pub fn ids(paths: &Paths) -> Result<Vec<String>> {
    let is_id = |name: &String| name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let mut ids = entries::names(&paths.containers())?;
    ids.retain(is_id);
    Ok(ids)
}

/// The id of the container with this name, id, or unambiguous beginning of an id.
///
/// # Errors
/// `NotFound`; `InvalidArgument` when there is more than one.
pub fn find(paths: &Paths, text: &str) -> Result<String> {
    if is_valid(text)
        && let Some(id) = owner(paths, text)?
        && paths.container(&id).exists()
    {
        return Ok(id);
    }
    let mut matches = ids(paths)?;
    matches.retain(|id| !text.is_empty() && id.starts_with(text));
    match &matches[..] {
        [one] => Ok(one.clone()),
        [] => Err(no_such(text)),
        _ => Err(Error::not_found(format!(
            "{text:?} is the beginning of {} container ids",
            matches.len()
        ))
        .hint("give more digits, or the name")),
    }
}

/// There is no container of this name.
pub fn no_such(text: &str) -> Error {
    Error::not_found(format!("no such container: {text}")).hint("hull ps -a lists all containers")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
        let (_directory, paths) = Paths::temporary();
        for id in ["one", "two"] {
            fs::create_dir_all(paths.container(id)).unwrap();
        }
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
        let (_directory, paths) = Paths::temporary();
        claim(&paths, "web", "gone").unwrap();
        claim(&paths, "web", "new").unwrap();
    }

    #[test]
    fn a_container_is_found_by_name_id_and_unambiguous_beginning() {
        let (_directory, paths) = Paths::temporary();
        let id = "ab".repeat(32);
        let other = format!("ac{}", "ab".repeat(31));
        for id in [&id, &other] {
            fs::create_dir_all(paths.container(id)).unwrap();
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
