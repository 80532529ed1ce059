//! What the containers of a pod see of the host: shares of the fs device, made from the detached mounts that the
//! engine's side sent.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use crate::error::{Context, Result};
use crate::paths::ContainerPaths;
use crate::pod::wire::Share;
use crate::process::devices::Devices;
use crate::process::mounts;
use hull_device_control::Cache;

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
        mounts::hold_file(&files.mounts().join(&share.name), &mount)
            .context(|| format!("share {} with the guest", share.name))?
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
        .await?;
    Ok(())
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
