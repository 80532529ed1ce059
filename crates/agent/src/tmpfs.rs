//! A tmpfs of the agent's own, from which containers get files or memory. Called by `shared_memory`
//! and `given_files`.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A mounted tmpfs. Dropping it unmounts it and removes its mount point.
#[derive(Debug)]
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// Mounts one at `path`, which is created, with mount options of tmpfs(5). Nothing in it is
    /// executed, and nothing is a device.
    pub fn mount(path: PathBuf, source: &str, options: &CStr) -> io::Result<Self> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        Self::mount_with(path, source, options, flags)
    }

    /// The same with these flags.
    pub fn mount_with(
        path: PathBuf,
        source: &str,
        options: &CStr,
        flags: MountFlags,
    ) -> io::Result<Self> {
        fs::create_dir_all(&path)?;
        if let Err(error) = mount(source, &path, "tmpfs", flags, options) {
            let _ = fs::remove_dir(&path);
            return Err(error.into());
        }
        Ok(Self { path })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Containers that are just ending may still use it.
        let unmounted = unmount(&self.path, UnmountFlags::DETACH).map_err(Into::into);
        if let Err(error) = unmounted.and_then(|()| fs::remove_dir(&self.path)) {
            crate::log::error!("cannot release {}: {error}", self.path.display());
        }
    }
}
