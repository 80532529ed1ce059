//! Keeps the shares of running containers mounted. Called by `service`.
//!
//! Each share is a file system of its own, which the kernel mounts where a path first crosses into it: left alone, in
//! the mount namespace of the container, so that it would end with the container's last process. Linux 7.3 does not
//! survive that when the process was killed while a page was still being read for it ("busy inodes after unmount",
//! then a page fault of the kernel's own). So the agent crosses first, and its own mount keeps the file system alive
//! until the container is forgotten and its last reads have long been answered.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_protocol::SHARES_DIR;
use oci_spec::runtime::Spec;
use rustix::mount::{UnmountFlags, unmount};

/// How long a share stays after its last container: longer than a read takes.
const LINGER: Duration = Duration::from_secs(2);

/// Containers per share.
#[derive(Clone, Default)]
pub struct Shares {
    users: Arc<Mutex<HashMap<String, usize>>>,
}

/// While it lives, the shares of a container stay mounted.
pub struct Held {
    shares: Shares,
    names: BTreeSet<String>,
}

impl Shares {
    /// Mounts what the paths of a spec need. A share that is not there is the creator's matter.
    pub fn hold(&self, spec: &Spec) -> Held {
        let names = named(spec);
        for name in &names {
            *self.users().entry(name.clone()).or_default() += 1;
            // The slash at the end crosses into the share.
            let _ = rustix::fs::stat(format!("{SHARES_DIR}/{name}/"));
        }
        Held {
            shares: self.clone(),
            names,
        }
    }

    fn release(&self, names: BTreeSet<String>) {
        let unused: Vec<String> = names.into_iter().filter(|name| self.forget(name)).collect();
        if unused.is_empty() {
            return;
        }
        let shares = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            for name in unused {
                if shares.users().contains_key(&name) {
                    continue;
                }
                // Fails when it never was mounted. Detached: a path in it may be in use.
                let _ = unmount(format!("{SHARES_DIR}/{name}"), UnmountFlags::DETACH);
            }
        });
    }

    /// One user less; says whether it was the last one.
    fn forget(&self, name: &str) -> bool {
        let mut users = self.users();
        match users.get_mut(name) {
            Some(count) if *count > 1 => {
                *count -= 1;
                false
            }
            Some(_) => users.remove(name).is_some(),
            None => false,
        }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shares.release(std::mem::take(&mut self.names));
    }
}

/// Names of the shares in a spec's paths.
fn named(spec: &Spec) -> BTreeSet<String> {
    let root = spec.root().iter().map(|root| root.path().as_path());
    let mounts = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(|mount| mount.source().as_deref());
    root.chain(mounts).filter_map(share_of).collect()
}

fn share_of(path: &Path) -> Option<String> {
    let inside = path.strip_prefix(SHARES_DIR).ok()?;
    let name = inside.components().next()?.as_os_str().to_str()?;
    (!matches!(name, "." | "..")).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_shares_of_a_spec_are_those_its_paths_name() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","root":{"path":"/run/hull/shares/rootfs"},"mounts":[
                {"destination":"/a","source":"/run/hull/shares/volume/sub"},
                {"destination":"/b","source":"/run/hull/shares/volume"},
                {"destination":"/c","source":"/run/hull/shares"},
                {"destination":"/d","source":"/run/hull/shares/../x"},
                {"destination":"/proc","source":"proc","type":"proc"}]}"#,
        )
        .unwrap();
        assert_eq!(
            named(&spec).into_iter().collect::<Vec<_>>(),
            ["rootfs", "volume"]
        );
    }

    #[test]
    fn a_share_goes_with_its_last_container() {
        let shares = Shares::default();
        for _ in 0..2 {
            *shares.users().entry("v".into()).or_default() += 1;
        }
        assert!(!shares.forget("v"));
        assert!(shares.forget("v"));
        assert!(!shares.forget("v"));
    }
}
