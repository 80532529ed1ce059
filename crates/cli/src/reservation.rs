//! A container's id and name between the moment they are taken and the moment its sandbox process has made a record
//! of it. Used by `run`. A command that is killed in between leaves a reservation that nobody holds: `ps` and the
//! next command that wants the name remove it.

use std::fs::{self, File};
use std::path::Path;

use hull_sandbox::{Paths, names, record};
use rustix::fs::{FlockOperation, flock};

use crate::error::{Context, Result};

/// Locked by the command that made the reservation, as long as it lives.
const LOCK: &str = "reservation";

/// An id and a name. Dropping it gives both back, unless a container came to be.
#[derive(Debug)]
pub struct Reservation<'a> {
    paths: &'a Paths,
    id: String,
    name: String,
    _lock: File,
}

impl<'a> Reservation<'a> {
    /// Takes the given name, or a random one that is free, for a container of this id.
    pub fn make(paths: &'a Paths, id: &str, given: Option<&str>) -> Result<Reservation<'a>> {
        let directory = paths.container(id).run;
        names::make_directory(&directory)?;
        let lock = lock(&directory)?;
        let mut reservation = Reservation {
            paths,
            id: id.to_owned(),
            name: String::new(),
            _lock: lock,
        };
        let mut attempt = 0;
        loop {
            let name = match given {
                Some(name) => name.to_owned(),
                None => crate::names::random(attempt)?,
            };
            match names::claim(paths, &name, id) {
                Ok(()) => {
                    reservation.name = name;
                    return Ok(reservation);
                }
                Err(_) if attempt == 0 => sweep(paths),
                Err(_) if given.is_none() && attempt < 10 => {}
                Err(failure) => return Err(failure.into()),
            }
            attempt += 1;
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.paths.container(&self.id).state().exists() {
            remove(self.paths, &self.id, Some(&self.name));
        }
    }
}

fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK);
    let file = File::create(&path).context(|| format!("cannot create {}", path.display()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Removes the reservations of commands that are gone. What cannot be removed is left for the next time.
pub fn sweep(paths: &Paths) {
    for id in names::ids(paths).unwrap_or_default() {
        let container = paths.container(&id);
        let Ok(file) = File::open(container.run.join(LOCK)) else {
            continue;
        };
        let is_held = || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
        if !container.state().exists() && !record::is_alive(&container) && !is_held() {
            remove(paths, &id, None);
        }
    }
}

/// Best effort: whoever calls this has something more important to say.
fn remove(paths: &Paths, id: &str, name: Option<&str>) {
    let container = paths.container(id);
    let _ = fs::remove_dir_all(&container.data);
    match name {
        Some(name) => names::release(paths, name, id),
        None => {
            for entry in fs::read_dir(paths.names()).into_iter().flatten().flatten() {
                if let Ok(name) = entry.file_name().into_string() {
                    names::release(paths, &name, id);
                }
            }
        }
    }
    let _ = fs::remove_dir_all(&container.run);
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

    fn id(digit: &str) -> String {
        digit.repeat(64)
    }

    #[test]
    fn a_reservation_that_came_to_nothing_leaves_nothing() {
        let (_directory, paths) = paths();
        let reservation = Reservation::make(&paths, &id("a"), Some("web")).unwrap();
        assert_eq!(reservation.name(), "web");
        let error = Reservation::make(&paths, &id("b"), Some("web")).unwrap_err();
        assert!(error.message().contains("in use"), "{}", error.message());
        assert_eq!(names::ids(&paths).unwrap(), [id("a")]);
        drop(reservation);
        assert!(names::ids(&paths).unwrap().is_empty());
        assert_eq!(fs::read_dir(paths.names()).unwrap().count(), 0);
    }

    #[test]
    fn a_container_keeps_what_was_reserved_for_it() {
        let (_directory, paths) = paths();
        let reservation = Reservation::make(&paths, &id("a"), None).unwrap();
        let name = reservation.name().to_owned();
        fs::write(paths.container(&id("a")).state(), "").unwrap();
        drop(reservation);
        assert_eq!(names::find(&paths, &name).unwrap(), id("a"));
        sweep(&paths);
        assert_eq!(names::find(&paths, &name).unwrap(), id("a"));
    }

    #[test]
    fn the_reservation_of_a_killed_command_is_in_nobodys_way() {
        let (_directory, paths) = paths();
        // As a killed command leaves it: without the lock, without the clean-up.
        let killed = Reservation::make(&paths, &id("a"), Some("web")).unwrap();
        std::mem::forget(killed);
        let of_killed = paths.container(&id("a")).run.join(LOCK);
        fs::remove_file(&of_killed).unwrap();
        fs::write(&of_killed, "").unwrap();
        let reservation = Reservation::make(&paths, &id("b"), Some("web")).unwrap();
        assert_eq!(names::ids(&paths).unwrap(), [id("b")]);
        assert_eq!(reservation.name(), "web");
    }
}
