//! What a guest sees of the host: detached mounts of root file systems, directories and files,
//! which become shares of the fs device.
//!
//! A front end opens them ([`root`], [`host`]) and hands them to the sandbox by descriptor. They
//! are attached nowhere, so they vanish with the last process that has them. What is read-only is a
//! read-only mount of the host's kernel: neither the guest nor a broken device process can write.

mod detached;
mod disk;
mod enter;
mod overlay;
pub(crate) mod sockets;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use hull_device_control::Cache;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

pub use disk::{
    Disk, check_size as check_disk_size, mount_at as mount_disk, unmount_from as unmount_disk,
};
pub use enter::{Mounted, enter, enter_upper};
pub use overlay::{EngineOverlay, Overlay, engine, root};

use crate::config::{FILE_NAME, Share, Writers};
use crate::error::{Context, Result};
use crate::guest::Devices;
use crate::rootless;
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
    if !rootless::in_user_namespace() {
        return detach_directory(directory, read_only);
    }
    // Mounts can be copied in a mount namespace that belongs to the user namespace only, and only
    // those of it: the directory is looked up there again.
    let path = fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
    let found = rustix::fs::fstat(directory)?;
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| {
            rootless::enter_mounts().map_err(io::Error::other)?;
            let same = File::open(&path)?;
            let there = rustix::fs::fstat(&same)?;
            if (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino) {
                return Err(io::Error::other(format!("{} has moved", path.display())));
            }
            detach_directory(same.as_fd(), read_only)
        });
        detaching
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn detach_directory(directory: BorrowedFd<'_>, read_only: bool) -> io::Result<OwnedFd> {
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

/// Makes the top mount of a share read-only, in all processes that have it.
///
/// # Errors
/// The kernel's: EBUSY when a file in it is open for writing, for longer than the guest takes to
/// say that it has closed one.
pub(crate) async fn seal(mount: &OwnedFd) -> io::Result<()> {
    const ATTEMPTS: u32 = 20;
    const PAUSE: Duration = Duration::from_millis(5);
    let attributes = Attributes {
        read_only: true,
        no_devices: false,
        no_suid: false,
    };
    let mut attempt = 0;
    loop {
        match detached::set_top(mount.as_fd(), attributes) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            sealed => return sealed,
        }
    }
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
