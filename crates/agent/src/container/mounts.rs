//! The mounts of a spec, one by one.
//!
//! Planned by the agent, mounted by the child in its own mount namespace. A target is always a
//! descriptor that was resolved inside the container's root, never a path; a bind mount is
//! complete, with its attributes, before it appears anywhere.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libc::c_ulong;
use oci_spec::runtime::{LinuxIdMapping, Mount};
use rustix::fs::{AtFlags, CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use super::error::{Context, CreateError, Result};
use super::mount_options::MountOptions;
use super::namespaces::{IdMaps, Namespaces};
use super::paths::{self, Missing};
use super::sys::{self, MountAttributes};
use super::{copy_up, rootfs};

/// Mode of a tmpfs whose mount point was not there, when the spec names none.
const DEFAULT_TMPFS_MODE: Mode = Mode::from_raw_mode(0o1777);

/// One mount.
#[derive(Debug)]
pub(super) struct MountPlan {
    /// Relative to the container's root.
    destination: CString,
    kind: Kind,
    options: MountOptions,
}

#[derive(Debug)]
enum Kind {
    Bind {
        source: CString,
        recursive: bool,
        /// The mount itself, made by the agent: ids can be mapped only where the file system's own
        /// user namespace is.
        mapped: Option<OwnedFd>,
    },
    Filesystem {
        name: CString,
        source: CString,
        data: CString,
    },
}

/// Properties of the container that mounts depend on.
pub(super) struct Surroundings<'a> {
    /// The container's control group, and whether it is the root of the container's view.
    pub(super) cgroup: &'a Path,
    pub(super) cgroup_namespace: bool,
    pub(super) namespaces: &'a Namespaces,
    pub(super) id_maps: &'a IdMaps,
}

/// The ids of a mount that are mapped.
struct Mapping<'a> {
    uid: &'a [LinuxIdMapping],
    gid: &'a [LinuxIdMapping],
    /// Also in what is mounted below.
    recursive: bool,
}

impl<'a> Mapping<'a> {
    /// Of a mount; takes the words that ask for it out of its options.
    fn new(
        mount: &'a Mount,
        options: &mut MountOptions,
        namespaces: &'a Namespaces,
    ) -> std::result::Result<Option<Self>, &'static str> {
        let words = options.data.split(',');
        let (asked, rest): (Vec<_>, Vec<_>) =
            words.partition(|word| matches!(*word, "idmap" | "ridmap"));
        let recursive = asked.contains(&"ridmap");
        let asked = !asked.is_empty();
        options.data = rest.join(",");
        let given = |map: &'a Option<Vec<LinuxIdMapping>>| map.as_deref().unwrap_or_default();
        let (uid, gid) = (given(mount.uid_mappings()), given(mount.gid_mappings()));
        match (uid.is_empty(), gid.is_empty()) {
            (true, true) if !asked => Ok(None),
            (true, true) if namespaces.uid_map.is_empty() => {
                Err("neither the mount nor the container has mappings")
            }
            (true, true) => Ok(Some(Self {
                uid: &namespaces.uid_map,
                gid: &namespaces.gid_map,
                recursive,
            })),
            (false, false) => Ok(Some(Self {
                uid,
                gid,
                recursive,
            })),
            _ => Err("users and groups must both be mapped"),
        }
    }
}

/// A copy of the mount at `path`, attached nowhere, with mapped ids. Made by the agent.
pub(super) fn detached_mapped(
    path: &CStr,
    recursive: bool,
    users: BorrowedFd<'_>,
    map_recursively: bool,
) -> std::io::Result<OwnedFd> {
    let tree = detached(CWD, path, recursive)?;
    let attributes = MountAttributes {
        set: sys::MOUNT_ATTR_IDMAP,
        // A descriptor that is open is not negative.
        user_namespace: u64::from(users.as_raw_fd().unsigned_abs()),
        ..Default::default()
    };
    sys::mount_setattr(tree.as_fd(), c"", map_recursively, &attributes)?;
    Ok(tree)
}

impl MountPlan {
    pub(super) fn new(mount: &Mount, surroundings: &Surroundings<'_>) -> Result<MountPlan> {
        let shown = mount.destination().display();
        let field = |name: &str| format!("mounts: {shown}: {name}");
        let destination = rootfs::inside("mounts: destination", mount.destination())?;
        let mut options = MountOptions::parse(mount.options().iter().flatten().map(String::as_str));
        let mapping = Mapping::new(mount, &mut options, surroundings.namespaces)
            .map_err(|why| CreateError::invalid(field("uidMappings"), why))?;
        if options.data.split(',').any(|word| word == "remount") {
            return Err(CreateError::unsupported(field("options"), "\"remount\""));
        }
        let source = mount
            .source()
            .as_deref()
            .filter(|source| !source.as_os_str().is_empty());
        let name = mount.typ().as_deref().unwrap_or_default();
        let bind = options.bind.or((name == "bind").then_some(false));
        if mapping.is_some() && bind.is_none() {
            return Err(CreateError::unsupported(
                field("uidMappings"),
                "mapped ids of mounts that are no bind mounts",
            ));
        }
        let kind = if let Some(recursive) = bind {
            let source =
                source.ok_or_else(|| CreateError::invalid(field("source"), "is missing"))?;
            if !source.is_absolute() {
                return Err(CreateError::invalid(
                    field("source"),
                    format_args!("{} is not an absolute path", source.display()),
                ));
            }
            // The kernel ignores data of a bind mount, and engines pass options of any type of
            // mount.
            if options.filesystem_wide() {
                return Err(CreateError::unsupported(
                    field("options"),
                    "a bind mount cannot change how its file system writes",
                ));
            }
            let source = sys::c_path("mounts: source", source)?;
            let mapped = match mapping {
                Some(mapping) => {
                    let users = surroundings.id_maps.get(mapping.uid, mapping.gid)?;
                    let mapped =
                        detached_mapped(&source, recursive, users.as_fd(), mapping.recursive);
                    Some(mapped.context(|| format!("cannot map the ids of the mount at {shown}"))?)
                }
                None => None,
            };
            Kind::Bind {
                source,
                recursive,
                mapped,
            }
        } else if matches!(name, "cgroup" | "cgroup2") {
            if !options.data.is_empty() {
                return Err(CreateError::unsupported(
                    field("options"),
                    format_args!("{:?}", options.data),
                ));
            }
            if surroundings.cgroup_namespace {
                Kind::Filesystem {
                    name: c"cgroup2".into(),
                    source: c"cgroup".into(),
                    data: CString::default(),
                }
            } else {
                // Without a namespace the whole hierarchy would be visible.
                Kind::Bind {
                    source: sys::c_path("linux.cgroupsPath", surroundings.cgroup)?,
                    recursive: false,
                    mapped: None,
                }
            }
        } else {
            if name.is_empty() || name == "none" {
                return Err(CreateError::invalid(field("type"), "is missing"));
            }
            let source = source.unwrap_or(Path::new(name));
            Kind::Filesystem {
                name: sys::c_string("mounts: type", name)?,
                source: sys::c_path("mounts: source", source)?,
                data: sys::c_string("mounts: options", &options.data)?,
            }
        };
        if options.copy_up
            && !matches!(&kind, Kind::Filesystem { name, .. } if name.as_c_str() == c"tmpfs")
        {
            return Err(CreateError::invalid(
                field("options"),
                "\"tmpcopyup\" is for tmpfs",
            ));
        }
        options.data.clear();
        Ok(MountPlan {
            destination,
            kind,
            options,
        })
    }

    /// Whether this replaces the image's /dev by another one, which must not be filled.
    pub(super) fn is_bound_dev(&self) -> bool {
        self.destination.to_bytes() == b"dev" && matches!(self.kind, Kind::Bind { .. })
    }

    /// Mounts it. Runs in the child, as the agent's root and without umask. Changes the working
    /// directory. Returns a mount that is to be made read-only when all mounts are there.
    pub(super) fn mount(&self, root: BorrowedFd<'_>) -> Result<Option<BorrowedFd<'static>>> {
        match &self.kind {
            Kind::Bind {
                source,
                recursive,
                mapped,
            } => {
                let tree = match mapped {
                    Some(mapped) => Ok(mapped.as_fd()),
                    None => detached(CWD, source, *recursive).map(sys::leak),
                };
                let tree = tree.context(|| self.what())?;
                self.bind(root, tree).map(|()| None)
            }
            Kind::Filesystem { name, source, data } => {
                self.new_filesystem(root, name, source, data)
            }
        }
    }

    fn what(&self) -> String {
        match &self.kind {
            Kind::Bind { source, .. } => {
                format!(
                    "cannot bind {} to /{}",
                    source.to_string_lossy(),
                    self.destination.to_string_lossy()
                )
            }
            Kind::Filesystem { name, data, .. } => {
                let mut text = format!(
                    "cannot mount {} at /{}",
                    name.to_string_lossy(),
                    self.destination.to_string_lossy()
                );
                if !data.is_empty() {
                    text.push_str(&format!(" (options {})", data.to_string_lossy()));
                }
                text
            }
        }
    }

    fn bind(&self, root: BorrowedFd<'_>, tree: BorrowedFd<'_>) -> Result<()> {
        let target = paths::find_or_make(root, &self.destination, || {
            Ok(if is_directory(tree) {
                Missing::Directory
            } else {
                Missing::File
            })
        })
        .context(|| self.what())?;
        if self.options.fill && is_directory(tree) && is_directory(target.as_fd()) {
            copy_up::copy(target.as_fd(), tree).context(|| {
                let destination = self.destination.to_string_lossy();
                format!("cannot copy /{destination} to a new volume")
            })?;
        }
        self.set_attributes(tree, &self.options.attributes)?;
        match attach(tree, target.as_fd()) {
            Err(Errno::INVAL) if is_directory(tree) != is_directory(target.as_fd()) => {
                let why = if is_directory(tree) {
                    "a directory cannot be mounted on a file"
                } else {
                    "a file cannot be mounted on a directory"
                };
                Err(CreateError::other(self.what(), why))
            }
            attached => attached.context(|| self.what()),
        }
    }

    fn new_filesystem(
        &self,
        root: BorrowedFd<'_>,
        name: &CStr,
        source: &CStr,
        data: &CStr,
    ) -> Result<Option<BorrowedFd<'static>>> {
        let found = if name == c"proc" || name == c"sysfs" {
            // Links in the image must not redirect these: masking and sysctls rely on their place.
            match paths::find_plain(root, &self.destination) {
                Err(Errno::LOOP) => {
                    return Err(CreateError::invalid(
                        format_args!("mounts: /{}", self.destination.to_string_lossy()),
                        format_args!(
                            "{} is not mounted through a symbolic link",
                            name.to_string_lossy()
                        ),
                    ));
                }
                found => found,
            }
        } else {
            paths::find(root, &self.destination)
        };
        let existed = !matches!(found, Err(Errno::NOENT));
        let target = match existed {
            true => found,
            false => paths::find_or_make(root, &self.destination, || Ok(Missing::Directory)),
        }
        .context(|| self.what())?;
        let target = sys::leak(target);
        rustix::process::fchdir(target).context(|| self.what())?;
        if name == c"tmpfs" {
            return self.new_tmpfs(root, source, data, existed.then_some(target));
        }
        match sys::mount_here(source, name, self.options.flags, data) {
            // A user namespace that does not own the network namespace cannot mount sysfs, which
            // shows the latter: the agent's shows the same.
            Err(error) if name == c"sysfs" && error.raw_os_error() == Some(libc::EPERM) => {
                return self.bind_own(c"/sys", target).map(|()| None);
            }
            // The agent's /sys, bound above, has the same file system there: mount(2) refuses that.
            Err(error) if name == c"cgroup2" && error.raw_os_error() == Some(libc::EBUSY) => {
                return self.cover_cgroups(target).map(|()| None);
            }
            mounted => mounted.context(|| self.what())?,
        }
        if self.options.propagation.is_empty() && self.options.recursive.is_empty() {
            return Ok(None);
        }
        let mounted = paths::find(root, &self.destination).context(|| self.what())?;
        self.set_attributes(mounted.as_fd(), &MountAttributes::default())?;
        Ok(None)
    }

    /// Mounts a tmpfs on the working directory, which is `hidden` if it was there before. One that
    /// is to be read-only is returned: other mounts, devices and a copy may have to be put in it.
    fn new_tmpfs(
        &self,
        root: BorrowedFd<'_>,
        source: &CStr,
        data: &CStr,
        hidden: Option<BorrowedFd<'_>>,
    ) -> Result<Option<BorrowedFd<'static>>> {
        let named = |option: &[u8]| {
            let mut options = data.to_bytes().split(|byte| *byte == b',');
            options.any(|word| word.starts_with(option))
        };
        let mut data = data.to_owned();
        match hidden {
            _ if named(b"mode=") => {}
            Some(hidden) => {
                let mode = rustix::fs::fstat(hidden).context(|| self.what())?.st_mode & 0o7777;
                let comma = if data.is_empty() { "" } else { "," };
                let options = format!("{}{comma}mode={mode:o}", data.to_string_lossy());
                data = sys::c_string("mounts: options", options)?;
            }
            // The same when the container is started again, with the directory there.
            None => rustix::fs::chmodat(CWD, c".", DEFAULT_TMPFS_MODE, AtFlags::empty())
                .context(|| self.what())?,
        }
        let flags = self.options.flags & !libc::MS_RDONLY;
        sys::mount_here(source, c"tmpfs", flags, &data).context(|| self.what())?;
        let read_only = self.options.flags & libc::MS_RDONLY != 0;
        if !read_only
            && !self.options.copy_up
            && self.options.propagation.is_empty()
            && self.options.recursive.is_empty()
        {
            return Ok(None);
        }
        let mounted = paths::find(root, &self.destination).context(|| self.what())?;
        let mounted = sys::leak(mounted);
        if let Some(hidden) = hidden.filter(|_| self.options.copy_up) {
            let owner = !named(b"uid=") && !named(b"gid=");
            copy_up::fill(hidden, mounted, owner).context(|| {
                format!(
                    "cannot copy to the tmpfs at /{}",
                    self.destination.to_string_lossy()
                )
            })?;
        }
        self.set_attributes(mounted, &MountAttributes::default())?;
        Ok(read_only.then_some(mounted))
    }

    /// Binds the agent's mount at `source` with everything below it: a user namespace may not
    /// uncover what mounts hide.
    fn bind_own(&self, source: &CStr, target: BorrowedFd<'_>) -> Result<()> {
        let tree = detached(CWD, source, true).context(|| self.what())?;
        let attributes = MountAttributes {
            // Access times cannot be changed on a mount that another user namespace owns.
            set: self.options.attributes.set & !sys::MOUNT_ATTR_ATIME,
            ..Default::default()
        };
        sys::mount_setattr(tree.as_fd(), c"", true, &attributes).context(|| self.what())?;
        attach(tree.as_fd(), target).context(|| self.what())
    }

    /// Mounts the groups that the container's namespace shows on top of the agent's.
    fn cover_cgroups(&self, target: BorrowedFd<'_>) -> Result<()> {
        let mount = || {
            let context = rustix::mount::fsopen(c"cgroup2", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_create(context.as_fd())?;
            rustix::mount::fsmount(
                context.as_fd(),
                FsMountFlags::FSMOUNT_CLOEXEC,
                MountAttrFlags::empty(),
            )
        };
        let tree = mount().context(|| self.what())?;
        self.set_attributes(tree.as_fd(), &self.options.attributes)?;
        attach(tree.as_fd(), target).context(|| self.what())
    }

    fn set_attributes(&self, mount: BorrowedFd<'_>, own: &MountAttributes) -> Result<()> {
        let set = |recursive: bool, attributes: &MountAttributes| {
            sys::mount_setattr(mount, c"", recursive, attributes).context(|| self.what())
        };
        if !own.is_empty() {
            set(false, own)?;
        }
        if !self.options.recursive.is_empty() {
            set(true, &self.options.recursive)?;
        }
        self.options.propagation.iter().try_for_each(|flags| {
            let propagation = *flags & !libc::MS_REC;
            set(
                flags & libc::MS_REC != 0,
                &MountAttributes {
                    propagation,
                    ..Default::default()
                },
            )
        })
    }
}

fn is_directory(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstat(fd)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// A copy of the mount at `path`, attached nowhere.
pub(super) fn detached(
    at: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    rustix::mount::open_tree(at, path, flags)
}

/// Attaches what [`detached`] returned.
pub(super) fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", target, c"", flags)
}

/// The flags of a value of linux.rootfsPropagation.
pub(super) fn root_propagation(word: &str) -> Result<Option<c_ulong>> {
    if word.is_empty() {
        return Ok(None);
    }
    match MountOptions::parse([word]).propagation.as_slice() {
        [flags] => Ok(Some(*flags)),
        _ => Err(CreateError::invalid(
            "linux.rootfsPropagation",
            format_args!("{word:?} is unknown"),
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn plan(json: &str) -> Result<MountPlan> {
        let mount: Mount = serde_json::from_str(json).unwrap();
        MountPlan::new(
            &mount,
            &Surroundings {
                cgroup: Path::new("/sys/fs/cgroup/c1"),
                cgroup_namespace: false,
                namespaces: &Namespaces::default(),
                id_maps: &IdMaps::default(),
            },
        )
    }

    #[test]
    fn kinds() {
        let bind = plan(r#"{"destination":"/a","source":"/b","options":["rbind","ro"]}"#).unwrap();
        assert!(matches!(
            bind.kind,
            Kind::Bind {
                recursive: true,
                ..
            }
        ));
        let bind = plan(r#"{"destination":"/dev","source":"/b","type":"bind"}"#).unwrap();
        assert!(matches!(
            bind.kind,
            Kind::Bind {
                recursive: false,
                ..
            }
        ));
        assert!(bind.is_bound_dev());
        let tmpfs =
            plan(r#"{"destination":"/a","type":"tmpfs","options":["size=1m","nosuid"]}"#).unwrap();
        let Kind::Filesystem { name, source, data } = &tmpfs.kind else {
            panic!("{tmpfs:?}")
        };
        assert_eq!(
            (name.as_c_str(), source.as_c_str(), data.as_c_str()),
            (c"tmpfs", c"tmpfs", c"size=1m")
        );
        let cgroup =
            plan(r#"{"destination":"/sys/fs/cgroup","type":"cgroup","options":["ro"]}"#).unwrap();
        assert!(
            matches!(&cgroup.kind, Kind::Bind { source, .. } if source.as_c_str() == c"/sys/fs/cgroup/c1")
        );
    }

    #[test]
    fn what_is_not_done_is_named() {
        for (json, words) in [
            (
                r#"{"destination":"/a","source":"b","options":["bind"]}"#,
                "not an absolute path",
            ),
            (r#"{"destination":"/a","options":["bind"]}"#, "source"),
            (
                r#"{"destination":"/a","source":"/b","options":["bind","sync"]}"#,
                "bind mount cannot",
            ),
            (
                r#"{"destination":"/a","type":"tmpfs","options":["idmap"]}"#,
                "neither the mount nor the container has mappings",
            ),
            (
                r#"{"destination":"/a","source":"/b","options":["bind"],
                    "uidMappings":[{"containerID":0,"hostID":5,"size":1}]}"#,
                "both be mapped",
            ),
            (
                r#"{"destination":"/a","type":"tmpfs",
                    "uidMappings":[{"containerID":0,"hostID":5,"size":1}],
                    "gidMappings":[{"containerID":0,"hostID":5,"size":1}]}"#,
                "not supported",
            ),
            (
                r#"{"destination":"/a","type":"tmpfs","options":["remount"]}"#,
                "remount",
            ),
            (r#"{"destination":"/a","source":"/b"}"#, "type"),
            (r#"{"destination":"/","type":"tmpfs"}"#, "destination"),
            (
                r#"{"destination":"/a","type":"proc","options":["tmpcopyup"]}"#,
                "tmpcopyup",
            ),
            (
                r#"{"destination":"/sys/fs/cgroup","type":"cgroup","options":["x"]}"#,
                "\"x\"",
            ),
        ] {
            let message = plan(json).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn propagation_of_the_root() {
        assert_eq!(root_propagation("").unwrap(), None);
        assert_eq!(
            root_propagation("rslave").unwrap(),
            Some(libc::MS_SLAVE | libc::MS_REC)
        );
        assert!(root_propagation("x").is_err());
    }
}
