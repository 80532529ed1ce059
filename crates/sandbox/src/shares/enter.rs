//! The root file system of a container that is in no guest, as the root of one thread: names and
//! symbolic links mean to it what they mean in the container, and lead nowhere else.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use super::detached::{self, Attributes};
use super::disk::Disk;
use super::overlay::{Overlay, own_namespace, root};
use super::{ReadOnly, host};
use crate::error::{Context, Error, Result};

/// A directory or file of the host in a container.
#[derive(Debug, Clone)]
pub struct Mounted {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// Nothing can be written to it.
    pub read_only: bool,
}

/// Gives the calling thread a mount namespace of its own, with the container's root file system as
/// its root, and what is mounted there. `place` is any directory of the host: what it holds is
/// hidden to the thread. What can be used of `mounted` is; the others come back with the reason.
///
/// # Errors
/// The root file system cannot be mounted.
pub fn enter(
    overlay: &Overlay<'_>,
    read_only: bool,
    mounted: &[Mounted],
    place: &Path,
) -> Result<Vec<(PathBuf, Error)>> {
    const DOING: &str = "enter the container's root file system";
    // The thread has a root and a current directory of its own from here on, too.
    own_namespace().context(|| DOING)?;
    let hidden = File::open(place).context(|| DOING)?;
    let root = root(overlay)?;
    // While nothing of the host is hidden.
    let shares: Vec<_> = mounted.iter().map(share).collect();
    attach(&root, &hidden).context(|| DOING)?;
    let failed = mounted
        .iter()
        .zip(shares)
        .filter_map(|(one, share)| {
            let mounted = share.and_then(|share| mount(&share, &one.destination, &root));
            Some((one.destination.clone(), mounted.err()?))
        })
        .collect();
    if read_only {
        let attributes = Attributes {
            read_only: true,
            no_devices: false,
            no_suid: false,
        };
        detached::set_top(root.as_fd(), attributes).context(|| DOING)?;
    }
    rustix::process::fchdir(&root).context(|| DOING)?;
    rustix::process::chroot(".").context(|| DOING)?;
    Ok(failed)
}

/// Gives the calling thread a mount namespace of its own, with a writable layer as its root: what a
/// container has changed, and nothing of the host that a link in it could lead to. On a `disk`,
/// that must not be mounted elsewhere.
///
/// # Errors
/// There is no such directory, or the disk cannot be mounted.
pub fn enter_upper(upper: &Path, disk: Option<&Disk>) -> Result<()> {
    const DOING: &str = "enter the container's writable layer";
    own_namespace().context(|| DOING)?;
    if let Some(disk) = disk {
        disk.mount()
            .context(|| format!("mount {}", disk.file.display()))?;
    }
    rustix::process::chdir(upper).context(|| DOING)?;
    rustix::process::chroot(".").context(|| DOING)
}

/// What is at a path of a root file system.
fn open_in(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags, Mode::empty(), resolve)
}

fn share(mounted: &Mounted) -> Result<OwnedFd> {
    let read_only = match mounted.read_only {
        true => ReadOnly::Recursive,
        false => ReadOnly::No,
    };
    host(&mounted.source, true, read_only)
}

fn mount(share: &OwnedFd, destination: &Path, root: &OwnedFd) -> Result<()> {
    let there = match open_in(root, destination) {
        // The container has not been started since it was created.
        Err(Errno::NOENT) => make_place(share, destination, root),
        there => there,
    };
    there
        .and_then(|there| attach(share, &there))
        .context(|| format!("mount {}", destination.display()))
}

/// Makes what is missing of the place of a share, as the guest does when it mounts it.
fn make_place(share: &OwnedFd, destination: &Path, root: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let is_directory = FileType::from_raw_mode(fstat(share)?.st_mode) == FileType::Directory;
    let names: Vec<_> = destination
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut above = PathBuf::from("/");
    for (index, name) in names.iter().enumerate() {
        let parent = open_in(root, &above)?;
        above.push(name);
        match open_in(root, &above) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
            Ok(_) => continue,
        }
        let mode = Mode::from_raw_mode(0o755);
        if is_directory || index + 1 < names.len() {
            mkdirat(&parent, *name, mode)?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            openat(&parent, *name, flags, mode)?;
        }
    }
    open_in(root, destination)
}

fn attach(mount: &OwnedFd, there: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", there.as_fd(), c"", flags)
}
