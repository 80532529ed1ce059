//! Files that the host gives containers when they are created: hosts, hostname, resolv.conf. They
//! live in the guest, on a small tmpfs for each container they were given to, so that what a
//! container writes to them costs nobody but the guest. Containers that share a network share them:
//! each holds a reference, and dropping the last one unmounts the tmpfs. Called by `service` before
//! a container is created.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hull_protocol::GIVEN_FILES_SOURCE;
use hull_protocol::agent::GivenFile;
use oci_spec::runtime::{Mount, Spec};

use crate::rpc::status::{Failure, Result};
use crate::tmpfs::Tmpfs;

/// Where they are mounted.
const DIRECTORY: &str = "/run/hull/files";

/// Size and number of the files of a container: a resolver's files have a few kilobytes.
const OPTIONS: &std::ffi::CStr = c"size=1m,nr_inodes=64,mode=0755";

/// All given files of the guest, by the container that they were given to.
#[derive(Debug, Default)]
pub struct GivenFiles {
    all: Mutex<HashMap<String, OfContainer>>,
    /// Names directories.
    next: AtomicU64,
}

/// Files that were given to one container.
#[derive(Debug)]
struct OfContainer {
    files: Weak<Tmpfs>,
    /// As they were given last.
    contents: HashMap<String, Vec<u8>>,
}

impl GivenFiles {
    /// Provides the files that a spec's mounts name, and makes them their sources: those that come
    /// with `container`, and those of others. The container must hold the result.
    pub fn provide(
        &self,
        container: &str,
        given: &[GivenFile],
        spec: &mut Spec,
    ) -> Result<Vec<Arc<Tmpfs>>> {
        let mut held: Vec<Arc<Tmpfs>> = Vec::new();
        if !given.is_empty() {
            held.push(self.write(container, given)?);
        }
        for mount in spec.mounts_mut().into_iter().flatten() {
            let Some((owner, file)) = name(mount)? else {
                continue;
            };
            let files = self.of(&owner).ok_or_else(|| {
                Failure::invalid(format!("container {owner} has no files to share"))
            })?;
            mount.set_source(Some(files.path().join(file)));
            held.push(files);
        }
        Ok(held)
    }

    /// Gives files of a container other contents. What a process has changed stays.
    pub fn update(&self, container: &str, given: &[GivenFile]) -> Result<()> {
        let mut all = self.lock();
        let of_container = all.get_mut(container);
        let missing = || Failure::no_container(container);
        let of_container = of_container.ok_or_else(missing)?;
        let files = of_container.files.upgrade().ok_or_else(missing)?;
        for file in given {
            let known = of_container.contents.get_mut(&file.name);
            let known = known.ok_or_else(|| {
                Failure::invalid(format!("{:?} was not given to {container}", file.name))
            })?;
            replace(&files.path().join(&file.name), known, &file.content)
                .map_err(|error| Failure::internal("update a container's files", &error))?;
            known.clone_from(&file.content);
        }
        Ok(())
    }

    fn of(&self, owner: &str) -> Option<Arc<Tmpfs>> {
        self.lock().get(owner)?.files.upgrade()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, OfContainer>> {
        // Nothing panics while it is held.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, owner: &str, given: &[GivenFile]) -> Result<Arc<Tmpfs>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(DIRECTORY).join(number.to_string());
        let failed =
            |error: std::io::Error| Failure::internal("create a container's files", &error);
        let files = Arc::new(Tmpfs::mount(path, "files", OPTIONS).map_err(failed)?);
        for file in given {
            if !is_name(&file.name) {
                return Err(Failure::invalid(format!(
                    "{:?} is no name of a file",
                    file.name
                )));
            }
            let path = files.path().join(&file.name);
            fs::write(&path, &file.content).map_err(failed)?;
            // Users of the container read it.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed)?;
        }
        let contents = given
            .iter()
            .map(|file| (file.name.clone(), file.content.clone()));
        let of_container = OfContainer {
            files: Arc::downgrade(&files),
            contents: contents.collect(),
        };
        let mut all = self.lock();
        all.retain(|_, known| known.files.strong_count() > 0);
        all.insert(owner.to_owned(), of_container);
        Ok(files)
    }
}

/// Gives a file that has the content `from` the content `to`. It stays the same file: containers
/// have it mounted.
fn replace(path: &Path, from: &[u8], to: &[u8]) -> io::Result<()> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut content = Vec::new();
    let most = u64::try_from(from.len())
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    (&file).take(most).read_to_end(&mut content)?;
    if content != from {
        return Ok(());
    }
    file.rewind()?;
    file.write_all(to)?;
    file.set_len(u64::try_from(to.len()).map_err(io::Error::other)?)
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text != "." && text != ".." && !text.contains('/')
}

/// The container and the file that a mount is of.
fn name(mount: &Mount) -> Result<Option<(String, String)>> {
    let source = mount.source().as_deref().and_then(Path::to_str);
    let Some(named) = source.and_then(|source| source.strip_prefix(GIVEN_FILES_SOURCE)) else {
        return Ok(None);
    };
    match named.rsplit_once('/') {
        Some((owner, file)) if !owner.is_empty() && is_name(file) => {
            Ok(Some((owner.to_owned(), file.to_owned())))
        }
        _ => Err(Failure::invalid(format!(
            "invalid spec: mounts: {}: {named:?} is no file of a container",
            mount.destination().display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(source: &str) -> Mount {
        let json = serde_json::json!({
            "destination": "/etc/hosts",
            "type": "bind",
            "source": source,
            "options": ["bind"],
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_mount_names_a_container_and_a_file() {
        let named = name(&of("hull-file:abc/hosts")).unwrap();
        assert_eq!(named, Some(("abc".to_owned(), "hosts".to_owned())));
        assert_eq!(name(&of("/run/hull/shares/a/hosts")).unwrap(), None);
        for source in [
            "hull-file:",
            "hull-file:abc",
            "hull-file:/hosts",
            "hull-file:abc/..",
        ] {
            let error = name(&of(source)).unwrap_err();
            assert!(error.message.contains("/etc/hosts"), "{error:?}");
        }
    }

    #[test]
    fn a_file_is_replaced_in_place_unless_it_was_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        fs::write(&path, "given and longer").unwrap();
        let mounted = File::open(&path).unwrap();
        replace(&path, b"given and longer", b"new").unwrap();
        assert_eq!(io::read_to_string(mounted).unwrap(), "new");
        for changed in ["new and more", "ne", ""] {
            fs::write(&path, changed).unwrap();
            replace(&path, b"new", b"newer").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), changed);
        }
    }

    #[test]
    fn what_is_named_must_be_there() {
        let spec =
            serde_json::json!({"ociVersion": "1.2.0", "mounts": [of("hull-file:gone/hosts")]});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let error = GivenFiles::default()
            .provide("c", &[], &mut spec)
            .unwrap_err();
        assert!(error.message.contains("gone"), "{error:?}");
    }
}
