//! What the sandbox process mounts for its container: the root file system from the image's layers, and the
//! directories and files that become shares.
//!
//! Everything happens in a mount namespace of the sandbox process's own, or on mounts that are attached nowhere:
//! it all vanishes with the last process that uses it, however that ends. Read-only shares are read-only mounts of
//! the host's kernel, so neither the guest nor a broken device process can write to them.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, mount, mount_change,
    move_mount, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::detached::{self, Attributes};
use crate::error::{Context, Failure, Result};
use crate::paths::ContainerPaths;
use crate::pod::wire::FILE_NAME;
use crate::request::Volume;
use crate::rootless;

/// Longest string of options that mount(2) takes: one page, with its terminating zero.
const MAX_OPTIONS: usize = 4095;

/// Gives this process a mount namespace of its own. Must be called while it has one thread.
///
/// # Errors
/// Not permitted.
#[allow(unsafe_code)]
pub fn enter_namespace() -> Result<()> {
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context(|| "make a mount namespace".into())?;
    // What the host mounts later still appears here (volumes), what is mounted here stays here.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "make the mount namespace private".into())
}

/// The container's root file system: layers below, the container's own directory on top.
#[derive(Debug)]
pub struct RootFs {
    /// Where it is mounted, in this process's namespace.
    path: PathBuf,
    /// The directory, as a share.
    pub directory: OwnedFd,
}

impl RootFs {
    /// Mounts it.
    ///
    /// # Errors
    /// A layer is gone, the data directory cannot be an upper layer, or the disk is full.
    pub fn mount(paths: &ContainerPaths, layers: &[PathBuf], volatile: bool) -> Result<Self> {
        let path = paths.mounts().join("rootfs");
        for directory in [&path, &paths.upper(), &paths.work()] {
            fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
        }
        // The root of an overlay has the attributes of its upper directory.
        if let Some(top) = layers.first() {
            copy_attributes(top, &paths.upper())?;
        }
        let (base, options) = overlay_options(layers, &paths.upper(), &paths.work(), volatile)?;
        // Relative names keep the options of images with many layers within one page.
        let old = rustix::fs::open(".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .context(|| "open the working directory".into())?;
        rustix::process::chdir(&base).context(|| format!("enter {}", base.display()))?;
        let options = std::ffi::CString::new(options)
            .map_err(|_| Failure::new("a layer's path holds a zero byte"))?;
        let mounted = mount(
            "overlay",
            &path,
            "overlay",
            MountFlags::NODEV | MountFlags::NOSUID,
            Some(options.as_c_str()),
        );
        rustix::process::fchdir(&old).context(|| "return to the working directory".into())?;
        mounted.context(|| format!("mount the container's root on {}", path.display()))?;
        let directory = open_path(&path)?;
        Ok(Self { path, directory })
    }

    /// Takes the mount away, so that the directories can be removed.
    pub fn unmount(self) {
        drop(self.directory);
        // Nothing can be done about a failure, and the namespace ends soon.
        if let Err(error) = unmount(&self.path, UnmountFlags::DETACH) {
            tracing::warn!("cannot unmount {}: {error}", self.path.display());
        }
    }
}

fn copy_attributes(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let there = fs::metadata(from).context(|| format!("read layer {}", from.display()))?;
    chown(to, Some(there.uid()), Some(there.gid()))
        .and_then(|()| fs::set_permissions(to, there.permissions()))
        .context(|| format!("prepare {}", to.display()))
}

/// The directory to be in, and the options to give.
fn overlay_options(
    layers: &[PathBuf],
    upper: &Path,
    work: &Path,
    volatile: bool,
) -> Result<(PathBuf, Vec<u8>)> {
    let base = layers
        .first()
        .and_then(|layer| layer.parent())
        .filter(|parent| layers.iter().all(|layer| layer.parent() == Some(parent)))
        .map_or_else(|| PathBuf::from("/"), Path::to_owned);
    let mut options = b"lowerdir=".to_vec();
    for (index, layer) in layers.iter().enumerate() {
        if index > 0 {
            options.push(b':');
        }
        let name = layer.strip_prefix(&base).unwrap_or(layer);
        escape(name.as_os_str().as_bytes(), b"\\:,", &mut options);
    }
    options.extend_from_slice(b",upperdir=");
    escape(upper.as_os_str().as_bytes(), b"\\,", &mut options);
    options.extend_from_slice(b",workdir=");
    escape(work.as_os_str().as_bytes(), b"\\,", &mut options);
    options.extend_from_slice(b",index=off,metacopy=off");
    if volatile {
        // The container is removed when it ends: nothing of it has to survive a power failure.
        options.extend_from_slice(b",volatile");
    }
    if rootless::in_user_namespace() {
        // What hides lower directories is in attributes that can be set there.
        options.extend_from_slice(b",userxattr");
    }
    if options.len() > MAX_OPTIONS {
        return Err(Failure::new(format!(
            "the image has too many layers to mount: {}",
            layers.len()
        )));
    }
    Ok((base, options))
}

fn escape(name: &[u8], special: &[u8], into: &mut Vec<u8>) {
    for byte in name {
        if special.contains(byte) {
            into.push(b'\\');
        }
        into.push(*byte);
    }
}

/// A share made from a host directory or file.
#[derive(Debug)]
pub struct VolumeShare {
    /// The directory to share.
    pub directory: OwnedFd,
    /// Path of the volume inside the share: empty for a directory, a file name for a file.
    pub inside: &'static str,
}

/// Prepares a volume as a share.
///
/// # Errors
/// The source does not exist or cannot be mounted.
pub fn volume(paths: &ContainerPaths, index: usize, volume: &Volume) -> Result<VolumeShare> {
    let doing = || format!("share {}", volume.source.display());
    let metadata = fs::metadata(&volume.source).context(doing)?;
    let tree = detached::copy(&volume.source, true).context(doing)?;
    let attributes = Attributes {
        read_only: volume.read_only,
        no_devices: true,
        no_suid: true,
    };
    detached::set(tree.as_fd(), attributes).context(doing)?;
    if metadata.is_dir() {
        return Ok(VolumeShare {
            directory: tree,
            inside: "",
        });
    }
    let directory = paths.mounts().join(format!("volume{index}"));
    Ok(VolumeShare {
        directory: hold_file(&directory, &tree).context(doing)?,
        inside: FILE_NAME,
    })
}

/// Only directories can be shared: a file is mounted into one of its own, in this process's mount namespace.
///
/// # Errors
/// The directory cannot be made, or the host's kernel refuses.
pub fn hold_file(directory: &Path, mount: &OwnedFd) -> std::io::Result<OwnedFd> {
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

fn open_path(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context(|| format!("open {}", path.display()))
}

/// A directory of hull's own as a share (hosts, hostname, resolv.conf): containers may write to them.
///
/// # Errors
/// It does not exist or cannot be mounted.
pub fn own_directory(path: &Path) -> Result<OwnedFd> {
    let doing = || format!("share {}", path.display());
    let tree = detached::copy(path, false).context(doing)?;
    let attributes = Attributes {
        read_only: false,
        no_devices: true,
        no_suid: true,
    };
    detached::set(tree.as_fd(), attributes).context(doing)?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn overlay_options_are_relative_where_the_layers_are_side_by_side() {
        let layers = ["/data/layers/b".into(), "/data/layers/a".into()];
        let (base, options) =
            overlay_options(&layers, Path::new("/u"), Path::new("/w"), false).unwrap();
        assert_eq!(base, Path::new("/data/layers"));
        assert_eq!(
            options,
            b"lowerdir=b:a,upperdir=/u,workdir=/w,index=off,metacopy=off"
        );
    }

    #[test]
    fn separators_in_paths_are_escaped() {
        let layers = ["/x/a:b,c".into(), "/y/d\\e".into()];
        let (base, options) =
            overlay_options(&layers, Path::new("/u"), Path::new("/w"), true).unwrap();
        assert_eq!(base, Path::new("/"));
        assert!(options.starts_with(b"lowerdir=x/a\\:b\\,c:y/d\\\\e,"));
        assert!(options.ends_with(b",volatile"));
    }

    #[test]
    fn too_many_layers_are_refused_by_name() {
        let layers: Vec<PathBuf> = (0..80).map(|i| format!("/l/{i:064}").into()).collect();
        let error = overlay_options(&layers, Path::new("/u"), Path::new("/w"), false).unwrap_err();
        assert!(error.message.contains("too many layers"), "{error}");
    }
}
