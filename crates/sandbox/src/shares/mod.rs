//! What a guest sees of the host: detached mounts of root file systems, directories and files,
//! which become shares of the fs device.
//!
//! A front end opens them ([`root`], [`host`]) and hands them to the sandbox by descriptor. They
//! are attached nowhere, so they vanish with the last process that has them. What is read-only is a
//! read-only mount of the host's kernel: neither the guest nor a broken device process can write.

mod detached;
mod disk;
mod overlay;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use hull_device_control::Cache;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

pub use disk::Disk;
pub use overlay::{Overlay, root};

use crate::config::{FILE_NAME, Share, Writers};
use crate::error::{Context, Result};
use crate::guest::Devices;
use crate::store::SandboxPath;
use detached::Attributes;

/// Which mounts of a share are read-only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOnly {
    /// None.
    No,
    /// The one at the path itself: OCI's `ro`.
    Top,
    /// Also those below it.
    Recursive,
}

/// A detached mount of a directory or file of the host, without devices and set-user-id programs.
///
/// # Errors
/// There is no such path, or it cannot be mounted.
pub fn host(path: &Path, recursive: bool, read_only: ReadOnly) -> Result<OwnedFd> {
    let doing = || format!("share {}", path.display());
    let mount = detached::copy(path, recursive).context(doing)?;
    let mut attributes = Attributes {
        read_only: read_only == ReadOnly::Recursive,
        no_devices: true,
        no_suid: true,
    };
    detached::set(mount.as_fd(), attributes).context(doing)?;
    if read_only == ReadOnly::Top {
        attributes.read_only = true;
        detached::set_top(mount.as_fd(), attributes).context(doing)?;
    }
    Ok(mount)
}

/// A detached mount of an open directory of the host, from which `..` leads nowhere, for a process
/// that is to work below it.
///
/// # Errors
/// The kernel's.
pub fn directory(directory: BorrowedFd<'_>, read_only: bool) -> io::Result<OwnedFd> {
    let mount = detached::copy_of(directory)?;
    let attributes = Attributes {
        read_only,
        no_devices: true,
        no_suid: true,
    };
    detached::set(mount.as_fd(), attributes)?;
    // What open_tree gives can be looked up in, but not be changed itself.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&mount, c".", flags, Mode::empty())?)
}

/// Adds one share to the guest.
///
/// # Errors
/// The host's kernel or the fs device refuses.
pub(crate) async fn add(
    devices: &Devices,
    sandbox: &SandboxPath,
    share: &Share,
    mount: OwnedFd,
) -> Result<()> {
    let directory = match share.is_file {
        true => hold_file(&sandbox.mounts().join(&share.name), &mount)
            .context(|| format!("share {} with the guest", share.name))?,
        false => mount,
    };
    let cache = match share.writers {
        Writers::Guest => Cache::Private,
        Writers::HostRarely => Cache::Brief,
        Writers::Anyone => Cache::Shared,
    };
    Ok(devices
        .add_share(&share.name, directory.as_fd(), cache)
        .await?)
}

/// Makes the top mount of a share read-only, whoever has it.
///
/// # Errors
/// The kernel's: EBUSY when a file in it is open for writing.
pub(crate) fn seal(mount: &OwnedFd) -> io::Result<()> {
    let attributes = Attributes {
        read_only: true,
        no_devices: false,
        no_suid: false,
    };
    detached::set_top(mount.as_fd(), attributes)
}

/// Takes shares away again.
pub(crate) async fn remove(devices: &Devices, sandbox: &SandboxPath, shares: &[String]) {
    for name in shares {
        if let Err(error) = devices.remove_share(name).await {
            tracing::debug!("{error}");
        }
        // Only that of a file has a directory of its own.
        let _ = fs::remove_dir_all(sandbox.mounts().join(name));
    }
}

/// Only directories can be shared: a file is mounted into one of its own, for a moment.
fn hold_file(directory: &Path, mount: &OwnedFd) -> io::Result<OwnedFd> {
    let file = directory.join(FILE_NAME);
    fs::create_dir_all(directory)?;
    File::create(&file)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, &file, flags)?;
    // The directory itself is hull's: the guest must not add to it.
    let tree = detached::copy(directory, true)?;
    // The copy has a mount of its own. What has one cannot be removed here.
    unmount(&file, UnmountFlags::DETACH)?;
    let attributes = Attributes {
        read_only: true,
        no_devices: true,
        no_suid: true,
    };
    detached::set_top(tree.as_fd(), attributes)?;
    Ok(tree)
}
