//! Memory that containers of this guest share: what engines bind to /dev/shm of each container of a
//! pod, and volumes of a pod in memory.
//!
//! The host cannot share memory with a guest, so it names the memory, and here is a tmpfs for each
//! name, which is mounted once and bound by all containers that name it. Shared memory lives as
//! long as one of them does: each holds a reference, and dropping the last one unmounts it. That of
//! the pod lives as long as the guest. Called by `service` before a container is created.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hull_protocol::{POD_MEMORY_SOURCE, SHARED_MEMORY_SOURCE};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount,
};

use crate::container::paths::{Missing, find, find_or_make};
use crate::rpc::status::{Failure, Result};
use crate::tmpfs::Tmpfs;

/// Where they are mounted.
const DIRECTORY: &str = "/run/hull/shm";

/// Where parts of them are mounted.
const PARTS: &str = "/run/hull/parts";

/// All shared memory of the guest, by its name.
#[derive(Debug, Default)]
pub struct SharedMemory {
    all: Mutex<HashMap<String, Weak<Tmpfs>>>,
    /// What lives as long as the guest.
    lasting: Mutex<Vec<Arc<Tmpfs>>>,
    /// Names parts.
    next: AtomicU64,
}

/// What a container holds.
#[derive(Debug)]
pub struct Memory {
    // Unmounted before the whole.
    _part: Option<Part>,
    _whole: Arc<Tmpfs>,
}

impl SharedMemory {
    /// Provides the memory that a spec's mounts name, and makes it their source. The container must
    /// hold the result.
    pub fn provide(&self, spec: &mut Spec) -> Result<Vec<Memory>> {
        let mut held = Vec::new();
        for mount in spec.mounts_mut().into_iter().flatten() {
            let Some(Name { name, lasting }) = name(mount)? else {
                continue;
            };
            // A volume of the pod may be shared memory of one of its containers, too.
            let name = match lasting {
                true => format!("pod-{name}"),
                false => name,
            };
            let whole = self.get(&name, &options(mount), lasting)?;
            let part = match part(mount) {
                Some(part) => Some(self.part(&whole, part)?),
                None => None,
            };
            let source = part.as_ref().map_or(whole.path(), |part| &part.0);
            mount.set_source(Some(source.to_owned()));
            held.push(Memory {
                _part: part,
                _whole: whole,
            });
        }
        Ok(held)
    }

    fn get(&self, name: &str, options: &str, lasting: bool) -> Result<Arc<Tmpfs>> {
        // Nothing panics while it is held.
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memory) = all.get(name).and_then(Weak::upgrade) {
            return Ok(memory);
        }
        all.retain(|_, memory| memory.strong_count() > 0);
        let path = PathBuf::from(DIRECTORY).join(name);
        let failed = |error: std::io::Error| {
            Failure::internal(&format!("make shared memory ({options})"), &error)
        };
        let data = CString::new(options)
            .map_err(|_| Failure::invalid("invalid options of shared memory"))?;
        // A volume may hold programs.
        let memory = match lasting {
            true => Tmpfs::mount_with(path, "pod", &data, MountFlags::empty()),
            false => Tmpfs::mount(path, "shm", &data),
        };
        let memory = Arc::new(memory.map_err(failed)?);
        all.insert(name.to_owned(), Arc::downgrade(&memory));
        if lasting {
            let mut all = self.lasting.lock().unwrap_or_else(PoisonError::into_inner);
            all.push(memory.clone());
        }
        Ok(memory)
    }

    fn part(&self, whole: &Tmpfs, part: &str) -> Result<Part> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let place = PathBuf::from(PARTS).join(number.to_string());
        Part::mount(whole, part, place).map_err(|error| {
            Failure::internal(&format!("mount {part:?} of a volume in memory"), &error)
        })
    }
}

/// A file or directory in such memory, mounted where no container can put another in its place.
/// Dropping it unmounts it.
#[derive(Debug)]
struct Part(PathBuf);

impl Part {
    fn mount(whole: &Tmpfs, part: &str, place: PathBuf) -> std::io::Result<Self> {
        let part = CString::new(part)?;
        let root = rustix::fs::open(
            whole.path(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let found = match find(root.as_fd(), &part) {
            Err(Errno::NOENT) => make_directories(root.as_fd(), &part)?,
            found => found?,
        };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
        std::fs::create_dir_all(PARTS)?;
        match kind {
            FileType::Directory => std::fs::create_dir(&place)?,
            _ => std::fs::write(&place, "")?,
        }
        // From here on it is removed again.
        let made = Self(place);
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree: OwnedFd = open_tree(&found, "", flags)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tree, "", CWD, &made.0, flags)?;
        Ok(made)
    }
}

/// Makes what is missing of a directory in a volume: each new one with the mode of the volume, as
/// the kubelet makes it (pkg/volume/util/subpath).
fn make_directories(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<OwnedFd> {
    let mode = rustix::fs::fstat(root)?.st_mode & 0o7777;
    let ends = path.to_bytes().iter().enumerate();
    let slashes = ends.filter_map(|(at, byte)| (*byte == b'/').then_some(at));
    for end in slashes.chain([path.to_bytes().len()]) {
        let upper = CString::new(&path.to_bytes()[..end]).map_err(|_| Errno::INVAL)?;
        if upper.is_empty() || find(root, &upper).is_ok() {
            continue;
        }
        let made = find_or_make(root, &upper, || Ok(Missing::Directory))?;
        // By its descriptor: nobody has put another in its place.
        let made = format!("/proc/self/fd/{}", made.as_raw_fd());
        rustix::fs::chmod(made, Mode::from_raw_mode(mode))?;
    }
    find(root, path)
}

impl Drop for Part {
    fn drop(&mut self) {
        // It may not have been mounted. What a container still uses stays with that.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let removed = match self.0.is_dir() {
            true => std::fs::remove_dir(&self.0),
            false => std::fs::remove_file(&self.0),
        };
        if let Err(error) = removed {
            crate::log::error!("cannot release {}: {error}", self.0.display());
        }
    }
}

struct Name {
    name: String,
    /// It lives as long as the guest.
    lasting: bool,
}

/// The name of the shared memory that a mount is of.
fn name(mount: &Mount) -> Result<Option<Name>> {
    let source = mount.source().as_deref().and_then(|source| source.to_str());
    let source = source.unwrap_or_default();
    let shared = source.strip_prefix(SHARED_MEMORY_SOURCE);
    let lasting = source.strip_prefix(POD_MEMORY_SOURCE);
    let Some(name) = shared.or(lasting) else {
        return Ok(None);
    };
    if name.len() != 16 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Failure::invalid(format!(
            "invalid spec: mounts: {}: {name:?} is no name of shared memory",
            mount.destination().display()
        )));
    }
    Ok(Some(Name {
        name: name.to_owned(),
        lasting: lasting.is_some(),
    }))
}

/// Which part of the memory a mount is of.
fn part(mount: &Mount) -> Option<&str> {
    let mut options = mount.options().iter().flatten();
    options.find_map(|option| option.strip_prefix("part="))
}

/// The options of a mount that are the file system's.
fn options(mount: &Mount) -> String {
    const OWN: [&str; 4] = ["size=", "mode=", "uid=", "gid="];
    let options = mount.options().iter().flatten();
    let own: Vec<&str> = options
        .map(String::as_str)
        .filter(|option| OWN.iter().any(|name| option.starts_with(name)))
        .collect();
    own.join(",")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn of(source: &str) -> Mount {
        let json = serde_json::json!({
            "destination": "/dev/shm",
            "type": "bind",
            "source": source,
            "options": ["bind", "nosuid", "size=65536", "mode=1777", "ro"],
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_mount_names_memory_and_its_limits() {
        let mount = of("hull-shm:0123456789abcdef");
        let found = name(&mount).unwrap().unwrap();
        assert_eq!(found.name, "0123456789abcdef");
        assert!(!found.lasting && part(&mount).is_none());
        assert_eq!(options(&mount), "size=65536,mode=1777");
        let found = name(&of("hull-pod:0123456789abcdef")).unwrap().unwrap();
        assert!(found.lasting);
        assert!(name(&of("/run/hull/shares/a")).unwrap().is_none());
    }

    #[test]
    fn a_name_is_no_path() {
        for source in [
            "hull-shm:",
            "hull-shm:../../../etc/xxxxx",
            "hull-shm:0123456789abcdeg",
        ] {
            let error = name(&of(source)).map(drop).unwrap_err();
            assert!(error.message.contains("/dev/shm"), "{error:?}");
        }
    }
}
