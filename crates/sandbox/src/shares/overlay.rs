//! The root file system of a container from an image's layers: an overlay, mounted nowhere.
//!
//! Layers are named by descriptors (`/proc/self/fd/N`), so that an image may have as many layers as
//! the kernel takes, whatever their paths are. Linux 6.5 mounts an overlay without a place
//! (`fsopen`, "lowerdir+"); before, it is mounted for a moment in a mount namespace that only one
//! thread is in.

use std::collections::HashSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_change,
    unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::detached;
use super::disk::Disk;
use crate::error::{Context, Error, Result};
use crate::rootless;

/// Longest string of options that mount(2) takes: one page, with its terminating zero.
const MAX_OPTIONS: usize = 4095;

/// The parts of a root file system.
#[derive(Debug, Clone)]
pub struct Overlay<'a> {
    /// Lower directories, topmost first.
    pub layers: &'a [PathBuf],
    /// Upper directory; created, with the attributes of the topmost layer.
    pub upper: PathBuf,
    /// Work directory of the overlay, on the same file system; created.
    pub work: PathBuf,
    /// Nothing of it has to survive a power failure.
    pub volatile: bool,
    /// Upper and work directory are on this, below its place.
    pub disk: Option<Disk>,
}

/// A detached mount of a container's root file system.
///
/// # Errors
/// A layer is gone, the upper directory's file system cannot be an upper layer, or the disk is
/// full.
pub fn root(overlay: &Overlay<'_>) -> Result<OwnedFd> {
    if let Some(disk) = &overlay.disk {
        if rootless::in_user_namespace() {
            return Err(Error::unsupported(
                "a writable layer with a size, without root: it is a file system of its own",
            ));
        }
        disk.prepare(overlay.volatile)?;
        return in_a_thread(overlay);
    }
    prepare(overlay)?;
    match Opened::new(overlay)?.without_place(overlay.volatile) {
        // The overlay of an older kernel knows no "lowerdir+".
        Err(error) if error == rustix::io::Errno::INVAL => in_a_thread(overlay),
        mounted => mounted.context(|| DOING),
    }
}

/// The directories of an overlay that an engine has made, and what else it says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineOverlay {
    /// Lower directories, topmost first.
    pub lower: Vec<PathBuf>,
    /// Upper directory and that of the overlay's work; without them it is read-only.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// Options with a value (`index=off`).
    pub values: Vec<(String, String)>,
    /// Options without (`volatile`).
    pub flags: Vec<String>,
    /// The guest maps ids, and the engine has given the upper directory to this user and group, for
    /// which the host would: it becomes root's, as in the image.
    pub unmapped: Option<(u32, u32)>,
}

/// A detached mount of such an overlay.
///
/// # Errors
/// A directory is gone, or the kernel refuses them.
pub fn engine(overlay: &EngineOverlay, read_only: bool) -> Result<OwnedFd> {
    let doing = || "mount an overlay".to_owned();
    let open = |path: &PathBuf| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).context(|| format!("open {}", path.display()))
    };
    // By descriptors: a value has at most 255 bytes.
    let lower: Vec<OwnedFd> = overlay.lower.iter().map(open).collect::<Result<_>>()?;
    let upper = match &overlay.upper {
        Some((upper, work)) => Some((open(upper)?, open(work)?)),
        None => None,
    };
    if let (Some(owner), Some((upper, _))) = (overlay.unmapped, &upper) {
        let stat = rustix::fs::fstat(upper).context(doing)?;
        if (stat.st_uid, stat.st_gid) == owner {
            let (user, group) = (Some(Uid::ROOT), Some(Gid::ROOT));
            rustix::fs::chownat(upper, c"", user, group, AtFlags::EMPTY_PATH).context(doing)?;
        }
    }
    let mount = || {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        let layers: Vec<String> = lower.iter().map(named).collect();
        fsconfig_set_string(context, "lowerdir", layers.join(":"))?;
        if let Some((upper, work)) = &upper {
            fsconfig_set_string(context, "upperdir", named(upper))?;
            fsconfig_set_string(context, "workdir", named(work))?;
        }
        for (name, value) in &overlay.values {
            fsconfig_set_string(context, name.as_str(), value.as_str())?;
        }
        for flag in &overlay.flags {
            fsconfig_set_flag(context, flag.as_str())?;
        }
        fsconfig_create(context)?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
        fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    let mounted: rustix::io::Result<OwnedFd> = mount();
    mounted.context(doing)
}

/// What fails when the kernel does not mount it.
const DOING: &str = "mount the container's root file system";

/// Creates the upper directory and that of the overlay's work.
fn prepare(overlay: &Overlay<'_>) -> Result<()> {
    let is_new = !overlay.upper.exists();
    for directory in [&overlay.upper, &overlay.work] {
        fs::create_dir_all(directory).context(|| format!("create {}", directory.display()))?;
    }
    // The root of an overlay has the attributes of its upper directory. The container may have
    // changed them since.
    match overlay.layers.first() {
        Some(top) if is_new => copy_attributes(top, &overlay.upper),
        _ => Ok(()),
    }
}

/// Mounts it in a mount namespace that nobody but one thread is in: with what its upper directory
/// is on, and on that directory where the kernel needs a place.
fn in_a_thread(overlay: &Overlay<'_>) -> Result<OwnedFd> {
    std::thread::scope(|scope| {
        let mounting = scope.spawn(|| {
            own_namespace().context(|| "create a mount namespace")?;
            if let Some(disk) = &overlay.disk {
                disk.mount()
                    .context(|| format!("mount {}", disk.file.display()))?;
                prepare(overlay)?;
            }
            // In that namespace: an overlay takes no directories of another one.
            let opened = Opened::new(overlay)?;
            match opened.without_place(overlay.volatile) {
                Err(error) if error == rustix::io::Errno::INVAL => {
                    opened.on(&overlay.upper, overlay.volatile)
                }
                mounted => mounted.map_err(io::Error::from),
            }
            .context(|| DOING)
        });
        mounting
            .join()
            .unwrap_or_else(|_| Err(Error::new("the mounting thread panicked")))
    })
}

fn copy_attributes(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let there = fs::metadata(from).context(|| format!("read layer {}", from.display()))?;
    chown(to, Some(there.uid()), Some(there.gid()))
        .and_then(|()| fs::set_permissions(to, Permissions::from_mode(there.mode() & 0o7777)))
        .context(|| format!("prepare {}", to.display()))
}

/// Each layer once, where it is topmost: the kernel refuses one that is there twice, and what is
/// below shows nothing that the topmost one does not have.
fn distinct(layers: &[PathBuf]) -> Vec<&Path> {
    let mut seen = HashSet::new();
    layers
        .iter()
        .map(PathBuf::as_path)
        .filter(|layer| seen.insert(*layer))
        .collect()
}

/// The directories, open.
struct Opened {
    layers: Vec<OwnedFd>,
    upper: OwnedFd,
    work: OwnedFd,
}

fn named(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

impl Opened {
    fn new(overlay: &Overlay<'_>) -> Result<Self> {
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty())
                .context(|| format!("open {}", path.display()))
        };
        let mut layers: Vec<OwnedFd> = distinct(overlay.layers)
            .into_iter()
            .map(open)
            .collect::<Result<_>>()?;
        if layers.is_empty() {
            // An image without files: there is no overlay of nothing.
            let empty = overlay.upper.with_file_name("empty");
            fs::create_dir_all(&empty).context(|| format!("create {}", empty.display()))?;
            layers.push(open(&empty)?);
        }
        Ok(Self {
            layers,
            upper: open(&overlay.upper)?,
            work: open(&overlay.work)?,
        })
    }

    /// `EINVAL` where the kernel cannot do it.
    fn without_place(&self, volatile: bool) -> rustix::io::Result<OwnedFd> {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        for layer in &self.layers {
            fsconfig_set_string(context, "lowerdir+", named(layer))?;
        }
        fsconfig_set_string(context, "upperdir", named(&self.upper))?;
        fsconfig_set_string(context, "workdir", named(&self.work))?;
        for name in ["index", "metacopy"] {
            fsconfig_set_string(context, name, "off")?;
        }
        for flag in flags(volatile) {
            fsconfig_set_flag(context, flag)?;
        }
        fsconfig_create(context)?;
        fsmount(
            context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
        )
    }

    fn on(&self, place: &Path, volatile: bool) -> io::Result<OwnedFd> {
        let options = self.options(volatile)?;
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("overlay", place, "overlay", flags, Some(options.as_c_str()))?;
        let mounted = detached::copy(place, false);
        unmount(place, UnmountFlags::DETACH)?;
        mounted
    }

    fn options(&self, volatile: bool) -> io::Result<std::ffi::CString> {
        let layers: Vec<String> = self.layers.iter().map(named).collect();
        let mut options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,metacopy=off",
            layers.join(":"),
            named(&self.upper),
            named(&self.work)
        );
        for flag in flags(volatile) {
            options.push(',');
            options.push_str(flag);
        }
        if options.len() > MAX_OPTIONS {
            let count = layers.len();
            return Err(io::Error::other(Error::unsupported(format_args!(
                "{count} layers before Linux 6.5"
            ))));
        }
        Ok(std::ffi::CString::new(options)?)
    }
}

fn flags(volatile: bool) -> Vec<&'static str> {
    let mut flags = Vec::new();
    if volatile {
        flags.push("volatile");
    }
    if rootless::in_user_namespace() {
        // What hides lower directories is in attributes that can be set there.
        flags.push("userxattr");
    }
    flags
}

/// Gives the calling thread a mount namespace of its own, to which nothing propagates and from
/// which nothing does.
#[allow(unsafe_code)]
pub(super) fn own_namespace() -> io::Result<()> {
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    Ok(mount_change("/", private)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_engines_overlay_shows_its_lower_directory_and_writes_to_the_upper_one() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (lower, upper, work) = (make("lower"), make("upper"), make("work"));
        fs::write(lower.join("file"), "lower").unwrap();
        let overlay = EngineOverlay {
            lower: vec![lower.clone()],
            upper: Some((upper.clone(), work)),
            values: vec![("index".into(), "off".into())],
            flags: Vec::new(),
            unmapped: None,
        };
        let mount = engine(&overlay, false).unwrap();
        let root = PathBuf::from(named(&mount));
        assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "lower");
        fs::write(root.join("file"), "upper").unwrap();
        drop(mount);
        assert_eq!(fs::read_to_string(lower.join("file")).unwrap(), "lower");
        assert_eq!(fs::read_to_string(upper.join("file")).unwrap(), "upper");
        let owner = || {
            use std::os::unix::fs::MetadataExt;
            let found = fs::metadata(&upper).unwrap();
            (found.uid(), found.gid())
        };
        for (given, then) in [((7, 8), (0, 0)), ((7, 9), (7, 9))] {
            std::os::unix::fs::chown(&upper, Some(given.0), Some(given.1)).unwrap();
            let unmapped = EngineOverlay {
                unmapped: Some((7, 8)),
                ..overlay.clone()
            };
            drop(engine(&unmapped, false).unwrap());
            assert_eq!(owner(), then);
        }
    }

    /// Layers whose names hold what separates options, each with a file of its own and one of all.
    fn layers(parent: &Path, count: usize) -> Vec<PathBuf> {
        (0..count)
            .map(|index| {
                let layer = parent.join(format!("layer:{index},\\"));
                fs::create_dir_all(&layer).unwrap();
                fs::write(layer.join(format!("own{index}")), "").unwrap();
                fs::write(layer.join("all"), index.to_string()).unwrap();
                layer
            })
            .collect()
    }

    fn read(mount: &OwnedFd, name: &str) -> io::Result<String> {
        fs::read_to_string(format!("{}/{name}", named(mount)))
    }

    #[test]
    fn an_overlay_shows_all_layers_and_is_attached_nowhere() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        // Not on an overlay itself: /tmp may be one in a container.
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let layers = layers(parent.path(), 60);
        let overlay = Overlay {
            layers: &layers,
            upper: parent.path().join("upper"),
            work: parent.path().join("work"),
            volatile: false,
            disk: None,
        };
        let mount = root(&overlay).unwrap();
        assert_eq!(read(&mount, "all").unwrap(), "0");
        assert_eq!(read(&mount, "own59").unwrap(), "");
        fs::write(format!("{}/new", named(&mount)), "x").unwrap();
        assert_eq!(fs::read_to_string(overlay.upper.join("new")).unwrap(), "x");
        drop(mount);

        let mount = in_a_thread(&overlay).unwrap();
        assert_eq!(read(&mount, "all").unwrap(), "0");
        assert_eq!(read(&mount, "new").unwrap(), "x");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(
            !mounts.contains(parent.path().to_str().unwrap()),
            "{mounts}"
        );
    }

    #[test]
    fn an_image_may_have_a_layer_twice_and_more_than_a_hundred_layers() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut all = layers(parent.path(), 127);
        all.push(all[0].clone());
        all.insert(5, all[100].clone());
        let overlay = Overlay {
            layers: &all,
            upper: parent.path().join("upper"),
            work: parent.path().join("work"),
            volatile: false,
            disk: None,
        };
        for mount in [root(&overlay).unwrap(), in_a_thread(&overlay).unwrap()] {
            assert_eq!(read(&mount, "all").unwrap(), "0");
            assert_eq!(read(&mount, "own126").unwrap(), "");
            assert_eq!(read(&mount, "own100").unwrap(), "");
        }
    }

    #[test]
    fn a_thread_whose_root_is_a_containers_sees_nothing_else() {
        use std::os::unix::fs::symlink;
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let layers = layers(parent.path(), 2);
        fs::create_dir(layers[0].join("dir")).unwrap();
        symlink("/dir", layers[0].join("link")).unwrap();
        let volume = parent.path().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "of the host").unwrap();
        let place = parent.path().to_owned();
        let mounted = |source: &Path, destination: &str| super::super::Mounted {
            source: source.to_owned(),
            destination: destination.into(),
            read_only: false,
        };
        let mounted = [
            mounted(&volume, "/link"),
            mounted(Path::new("/nowhere"), "/dir"),
        ];
        std::thread::spawn(move || {
            let overlay = Overlay {
                layers: &layers,
                upper: place.join("upper"),
                work: place.join("work"),
                volatile: false,
                disk: None,
            };
            let failed = super::super::enter(&overlay, true, &mounted, &place).unwrap();
            assert_eq!(failed.len(), 1, "{failed:?}");
            assert_eq!(fs::read_to_string("/all").unwrap(), "0");
            assert_eq!(fs::read_to_string("/../dir/file").unwrap(), "of the host");
            fs::write("/new", "").unwrap_err();
        })
        .join()
        .unwrap();
        assert!(volume.exists(), "others see nothing of it");
    }
}
