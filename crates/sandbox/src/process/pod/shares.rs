//! What the containers of a pod see of the host: shares of the fs device, made from the detached mounts that the
//! engine's side sent.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};

use hull_devices::control::Cache;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::detached::{self, Attributes};
use crate::error::{Context, Result};
use crate::paths::ContainerPaths;
use crate::pod::wire::{FILE_NAME, Share};
use crate::process::devices::Devices;

/// Adds one share.
///
/// # Errors
/// The host's kernel or the fs device refuses.
pub async fn add(
    devices: &Devices,
    files: &ContainerPaths,
    share: &Share,
    mount: OwnedFd,
) -> Result<()> {
    let directory = if share.is_file {
        hold_file(files, &share.name, &mount)?
    } else {
        mount
    };
    let cache = if share.is_root {
        // `docker cp` and the like write to it from the host.
        Cache::Brief
    } else {
        Cache::Shared
    };
    devices
        .add_share(&share.name, directory.as_fd(), cache)
        .await
}

/// Only directories can be shared: a file is mounted into one of its own, in this process's mount namespace.
fn hold_file(files: &ContainerPaths, name: &str, mount: &OwnedFd) -> Result<OwnedFd> {
    let doing = || format!("share {name} with the guest");
    let directory = files.mounts().join(name);
    let file = directory.join(FILE_NAME);
    fs::create_dir_all(&directory)
        .and_then(|()| File::create(&file).map(drop))
        .context(doing)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), "", CWD, &file, flags).context(doing)?;
    let tree = detached::copy(&directory, true).context(doing)?;
    // The directory itself is hull's: the guest must not add to it.
    let attributes = Attributes {
        read_only: true,
        no_devices: true,
        no_suid: true,
    };
    detached::set_top(tree.as_fd(), attributes).context(doing)?;
    // The tree has a mount of its own. The name that it is mounted on must stay.
    rustix::mount::unmount(&file, rustix::mount::UnmountFlags::DETACH).context(doing)?;
    Ok(tree)
}

/// Takes shares away again.
pub async fn remove(devices: &Devices, files: &ContainerPaths, shares: &[String]) {
    for name in shares {
        if let Err(failure) = devices.remove_share(name).await {
            tracing::debug!("{failure}");
        }
        // Only that of a file has a directory of its own.
        let _ = fs::remove_dir_all(files.mounts().join(name));
    }
}
