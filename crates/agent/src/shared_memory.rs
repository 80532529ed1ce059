//! Memory that containers of this guest share: what engines bind to /dev/shm of each container of a
//! pod.
//!
//! The host cannot share memory with a guest, so it names the memory, and here is a tmpfs for each
//! name, which is mounted once and bound by all containers that name it. It lives as long as one of
//! them does: each holds a reference, and dropping the last one unmounts it. Called by `service`
//! before a container is created.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use hull_protocol::SHARED_MEMORY_SOURCE;
use oci_spec::runtime::{Mount, Spec};

use crate::rpc::status::{Failure, Result};
use crate::tmpfs::Tmpfs;

/// Where they are mounted.
const DIRECTORY: &str = "/run/hull/shm";

/// All shared memory of the guest, by its name.
#[derive(Debug, Default)]
pub struct SharedMemory(Mutex<HashMap<String, Weak<Tmpfs>>>);

impl SharedMemory {
    /// Provides the memory that a spec's mounts name, and makes it their source. The container must
    /// hold the result.
    pub fn provide(&self, spec: &mut Spec) -> Result<Vec<Arc<Tmpfs>>> {
        let mut held = Vec::new();
        for mount in spec.mounts_mut().into_iter().flatten() {
            let Some(name) = name(mount)? else {
                continue;
            };
            let memory = self.get(&name, &options(mount))?;
            mount.set_source(Some(memory.path().to_owned()));
            held.push(memory);
        }
        Ok(held)
    }

    fn get(&self, name: &str, options: &str) -> Result<Arc<Tmpfs>> {
        // Nothing panics while it is held.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        let memory = Arc::new(Tmpfs::mount(path, "shm", &data).map_err(failed)?);
        all.insert(name.to_owned(), Arc::downgrade(&memory));
        Ok(memory)
    }
}

/// The name of the shared memory that a mount is of.
fn name(mount: &Mount) -> Result<Option<String>> {
    let source = mount.source().as_deref().and_then(|source| source.to_str());
    let Some(name) = source.and_then(|source| source.strip_prefix(SHARED_MEMORY_SOURCE)) else {
        return Ok(None);
    };
    if name.len() != 16 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Failure::invalid(format!(
            "invalid spec: mounts: {}: {name:?} is no name of shared memory",
            mount.destination().display()
        )));
    }
    Ok(Some(name.to_owned()))
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
        assert_eq!(name(&mount).unwrap().unwrap(), "0123456789abcdef");
        assert_eq!(options(&mount), "size=65536,mode=1777");
        assert_eq!(name(&of("/run/hull/shares/a")).unwrap(), None);
    }

    #[test]
    fn a_name_is_no_path() {
        for source in [
            "hull-shm:",
            "hull-shm:../../../etc/xxxxx",
            "hull-shm:0123456789abcdeg",
        ] {
            let error = name(&of(source)).unwrap_err();
            assert!(error.message.contains("/dev/shm"), "{error:?}");
        }
    }
}
