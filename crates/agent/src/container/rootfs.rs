//! The file system that a container sees: its root, what is mounted in it, what is hidden or
//! read-only in it.
//!
//! Planned by the agent. The child, in its own mount namespace, calls the steps of [`RootfsPlan`]
//! in the order in which they are written here. Until [`RootfsPlan::pivot`] the root is the
//! agent's.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libc::c_ulong;
use oci_spec::runtime::Spec;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags};

use super::devices::Devices;
use super::error::{Context, CreateError, Result};
use super::mounts::{self, MountPlan, Surroundings};
use super::namespaces::{IdMaps, Namespaces};
use super::paths;
use super::sys::{self, MOUNT_ATTR_RDONLY, MountAttributes};

/// The child's work on the file system.
#[derive(Debug)]
pub(super) struct RootfsPlan {
    path: CString,
    /// The root with mapped ids, made by the agent.
    mapped: Option<OwnedFd>,
    readonly: bool,
    propagation: Option<c_ulong>,
    mounts: Vec<MountPlan>,
    devices: Devices,
    masked: Vec<CString>,
    readonly_paths: Vec<CString>,
    /// Files below /proc/sys of the container's namespaces, and the values written to them.
    sysctls: Vec<(CString, String)>,
    /// The same, of the whole guest.
    guest_sysctls: Vec<(CString, String)>,
}

/// Makes `path`, which is absolute in the container's root, relative to a directory.
pub(super) fn inside(field: &str, path: &Path) -> Result<CString> {
    let mut bytes = Vec::with_capacity(path.as_os_str().len());
    for name in path.as_os_str().as_bytes().split(|byte| *byte == b'/') {
        if !name.is_empty() && name != b"." {
            if !bytes.is_empty() {
                bytes.push(b'/');
            }
            bytes.extend(name);
        }
    }
    if bytes.is_empty() {
        return Err(CreateError::invalid(
            field,
            format_args!("{:?} is the root itself", path),
        ));
    }
    sys::c_string(field, bytes)
}

impl RootfsPlan {
    pub(super) fn new(spec: &Spec, namespaces: &Namespaces, cgroup: &Path) -> Result<RootfsPlan> {
        let root = spec
            .root()
            .as_ref()
            .ok_or_else(|| CreateError::invalid("root", "is missing"))?;
        if !root.path().is_absolute() {
            return Err(CreateError::invalid(
                "root.path",
                format_args!("{} is not an absolute path", root.path().display()),
            ));
        }
        let surroundings = Surroundings {
            cgroup,
            cgroup_namespace: namespaces.has(sys::CLONE_NEWCGROUP),
            namespaces,
            id_maps: &IdMaps::default(),
        };
        let path = sys::c_path("root.path", root.path())?;
        let mapped = match spec.hull_root_mapped() {
            Some(true) => {
                let users = surroundings
                    .id_maps
                    .get(&namespaces.uid_map, &namespaces.gid_map)?;
                let mapped = mounts::detached_mapped(&path, true, users.as_fd(), false);
                Some(mapped.context(|| "cannot map the ids of the root file system")?)
            }
            _ => None,
        };
        let mounts = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| MountPlan::new(mount, &surroundings))
            .collect::<Result<Vec<_>>>()?;
        let linux = spec.linux().as_ref();
        let list = |field: &'static str, paths: Option<&Vec<String>>| {
            paths
                .into_iter()
                .flatten()
                .map(|path| inside(field, Path::new(path)))
                .collect::<Result<Vec<_>>>()
        };
        let devices = Devices::new(
            linux
                .and_then(|linux| linux.devices().as_deref())
                .unwrap_or_default(),
            mounts.iter().any(MountPlan::is_bound_dev),
            namespaces.has(sys::CLONE_NEWUSER),
        )?;
        let (mut sysctls, mut guest_sysctls) = (Vec::new(), Vec::new());
        let named = linux.and_then(|linux| linux.sysctl().as_ref());
        for (name, value) in named.into_iter().flatten() {
            let (file, of_guest) = sysctl(name, namespaces)?;
            match of_guest {
                true => guest_sysctls.push((file, value.clone())),
                false => sysctls.push((file, value.clone())),
            }
        }
        let propagation = linux
            .and_then(|linux| linux.rootfs_propagation().as_deref())
            .unwrap_or_default();
        Ok(RootfsPlan {
            path,
            mapped,
            readonly: root.readonly().unwrap_or(false),
            propagation: mounts::root_propagation(propagation)?,
            mounts,
            devices,
            masked: list(
                "linux.maskedPaths",
                linux.and_then(|linux| linux.masked_paths().as_ref()),
            )?,
            readonly_paths: list(
                "linux.readonlyPaths",
                linux.and_then(|linux| linux.readonly_paths().as_ref()),
            )?,
            sysctls,
            guest_sysctls,
        })
    }

    /// Sets the sysctls that are the guest's own. The agent does it: a container's user namespace
    /// has no right to.
    pub(super) fn set_guest_sysctls(&self) -> Result<()> {
        self.guest_sysctls.iter().try_for_each(set_sysctl)
    }

    fn shared(&self) -> bool {
        self.propagation
            .is_some_and(|flags| flags & libc::MS_SHARED != 0)
    }

    /// Copies the mounts of the root directory and attaches the copy over the agent's root. From
    /// here on mount events do not leave this namespace.
    pub(super) fn attach(&self) -> Result<BorrowedFd<'static>> {
        // pivot_root refuses a shared root mount.
        let flags = if self.shared() {
            libc::MS_PRIVATE
        } else {
            libc::MS_SLAVE | libc::MS_REC
        };
        sys::mount_propagation(c"/", flags)
            .context(|| "cannot separate the container's mounts from the agent's")?;
        let what = || format!("cannot mount root.path {}", self.path.to_string_lossy());
        let root = match &self.mapped {
            Some(mapped) => mapped.try_clone().context(what)?,
            None => mounts::detached(CWD, &self.path, true).context(what)?,
        };
        let root = sys::leak(root);
        if self.shared() {
            let private = MountAttributes {
                propagation: libc::MS_PRIVATE,
                ..Default::default()
            };
            sys::mount_setattr(root, c"", false, &private).context(what)?;
        }
        rustix::mount::move_mount(
            root,
            c"",
            CWD,
            c"/",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .context(what)?;
        Ok(root)
    }

    /// Creates the spec's mounts and the devices. Returns mounts that [`RootfsPlan::protect`] is to
    /// make read-only.
    pub(super) fn fill(&self, root: BorrowedFd<'_>) -> Result<Vec<BorrowedFd<'static>>> {
        let mut unsealed = Vec::new();
        for mount in &self.mounts {
            unsealed.extend(mount.mount(root)?);
        }
        self.devices.make(root)?;
        Ok(unsealed)
    }

    /// Sets sysctls, hides what is to be hidden and protects what is to be read-only.
    pub(super) fn protect(&self, root: BorrowedFd<'_>, unsealed: &[BorrowedFd<'_>]) -> Result<()> {
        let readonly = MountAttributes {
            set: MOUNT_ATTR_RDONLY,
            ..Default::default()
        };
        for mount in unsealed {
            sys::mount_setattr(*mount, c"", false, &readonly)
                .context(|| "cannot make a tmpfs of mounts read-only")?;
        }
        self.sysctls.iter().try_for_each(set_sysctl)?;
        for path in &self.readonly_paths {
            make_readonly(root, path)
                .context(|| format!("cannot make /{} read-only", path.to_string_lossy()))?;
        }
        for path in &self.masked {
            mask(root, path).context(|| format!("cannot mask /{}", path.to_string_lossy()))?;
        }
        Ok(())
    }

    /// Makes the container's root the root, and detaches the agent's.
    pub(super) fn pivot(&self, root: BorrowedFd<'_>) -> Result<()> {
        let what = || "cannot enter the container's root";
        rustix::process::fchdir(root).context(what)?;
        // With the same directory twice the old root ends up on top of the new one, and is
        // unmounted again.
        rustix::process::pivot_root(c".", c".").context(what)?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).context(what)?;
        match self.propagation {
            Some(flags) if flags & libc::MS_PRIVATE == 0 => {
                sys::mount_propagation(c"/", flags).context(|| "cannot set linux.rootfsPropagation")
            }
            _ => Ok(()),
        }
    }

    /// Last: the root stays writable until all mount points and the working directory exist.
    pub(super) fn seal(&self) -> Result<()> {
        if !self.readonly {
            return Ok(());
        }
        let readonly = MountAttributes {
            set: MOUNT_ATTR_RDONLY,
            ..Default::default()
        };
        sys::mount_setattr(CWD, c"/", false, &readonly).context(|| "cannot make the root read-only")
    }
}

fn set_sysctl((path, value): &(CString, String)) -> Result<()> {
    sys::write_file(CWD, path.as_c_str(), value.as_bytes()).context(|| {
        format!(
            "cannot set linux.sysctl {} to {value:?}",
            path.to_string_lossy()
        )
    })
}

fn make_readonly(root: BorrowedFd<'_>, path: &CStr) -> std::io::Result<()> {
    let place = match paths::find(root, path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => sys::leak(found?),
    };
    let tree = sys::leak(mounts::detached(place, c"", true)?);
    let readonly = MountAttributes {
        set: MOUNT_ATTR_RDONLY,
        ..Default::default()
    };
    sys::mount_setattr(tree, c"", false, &readonly)?;
    Ok(mounts::attach(tree, place)?)
}

fn mask(root: BorrowedFd<'_>, path: &CStr) -> std::io::Result<()> {
    let place = match paths::find(root, path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        found => sys::leak(found?),
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode);
    if kind == FileType::Directory {
        rustix::process::fchdir(place)?;
        // The one inode is the directory itself.
        return sys::mount_here(
            c"tmpfs",
            c"tmpfs",
            libc::MS_RDONLY,
            c"nr_blocks=1,nr_inodes=1",
        );
    }
    // The agent's /dev/null: the container's may be anything.
    let null = sys::leak(mounts::detached(CWD, c"/dev/null", false)?);
    Ok(mounts::attach(null, place)?)
}

/// The file of a sysctl. One that belongs to a namespace is set in the container's, which it must
/// have; any other is the guest's own.
///
/// Returns whether it is the guest's.
fn sysctl(name: &str, namespaces: &Namespaces) -> Result<(CString, bool)> {
    let invalid = |why: &str| CreateError::invalid("linux.sysctl", format_args!("{name:?} {why}"));
    // The separator that comes first counts: net.ipv4.conf.eth0/100.forwarding.
    let slashes = name
        .find(['.', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b'/');
    let path: String = if slashes {
        name.into()
    } else {
        let swap = |character| match character {
            '.' => '/',
            '/' => '.',
            other => other,
        };
        name.chars().map(swap).collect()
    };
    if path
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
    {
        return Err(invalid("is not a name"));
    }
    const IPC: [&str; 8] = [
        "kernel/msgmax",
        "kernel/msgmnb",
        "kernel/msgmni",
        "kernel/sem",
        "kernel/shmall",
        "kernel/shmmax",
        "kernel/shmmni",
        "kernel/shm_rmid_forced",
    ];
    let (namespace, kind) = if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
        (sys::CLONE_NEWIPC, "an IPC")
    } else if path.starts_with("net/") && namespaces.has(sys::CLONE_NEWNET) {
        // Otherwise the guest's own network is the container's.
        (sys::CLONE_NEWNET, "a network")
    } else if path == "kernel/pid_max" && namespaces.has(sys::CLONE_NEWPID) {
        (sys::CLONE_NEWPID, "a PID")
    } else if path == "kernel/domainname" {
        (sys::CLONE_NEWUTS, "a UTS")
    } else if path == "kernel/hostname" {
        return Err(invalid("is set by the spec's hostname"));
    } else {
        (0, "")
    };
    if namespace != 0 && !namespaces.has(namespace) {
        return Err(invalid(&format!(
            "needs {kind} namespace of the container's own"
        )));
    }
    let file = sys::c_string("linux.sysctl", format!("/proc/sys/{path}"))?;
    Ok((file, namespace == 0))
}

/// Opens the root directory with O_PATH.
pub(super) fn current_root() -> Result<BorrowedFd<'static>> {
    rustix::fs::openat(
        CWD,
        c"/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map(sys::leak)
    .context(|| "cannot open the container's root")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn namespaces(json: &str) -> Namespaces {
        let linux =
            serde_json::from_str(&format!(r#"{{"namespaces":[{{"type":"mount"}}{json}]}}"#))
                .unwrap();
        Namespaces::new(&linux).unwrap()
    }

    #[test]
    fn paths_are_counted_from_the_root() {
        let path =
            |path: &str| inside("x", Path::new(path)).map(|path| path.into_string().unwrap());
        assert_eq!(path("/a//b/./c/").unwrap(), "a/b/c");
        assert_eq!(path("a").unwrap(), "a");
        assert_eq!(path("/../a").unwrap(), "../a");
        assert!(path("/").is_err());
        assert!(path("/a\0b").is_err());
    }

    #[test]
    fn sysctls_are_those_of_the_containers_namespaces_or_the_guests() {
        let all = namespaces(r#",{"type":"network"},{"type":"ipc"},{"type":"uts"}"#);
        let name = |name: &str| sysctl(name, &all).map(|(path, _)| path.into_string().unwrap());
        let of_guest = |name: &str| sysctl(name, &all).unwrap().1;
        assert_eq!(
            name("net.ipv4.ip_forward").unwrap(),
            "/proc/sys/net/ipv4/ip_forward"
        );
        assert_eq!(
            name("net/ipv4/conf/eth0.1/mtu").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/mtu"
        );
        assert_eq!(
            name("net.ipv4.conf.eth0/1.mtu").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/mtu"
        );
        assert_eq!(name("kernel.shmmax").unwrap(), "/proc/sys/kernel/shmmax");
        assert_eq!(
            name("vm.max_map_count").unwrap(),
            "/proc/sys/vm/max_map_count"
        );
        for guests in ["vm.max_map_count", "fs.file-max", "kernel.panic"] {
            assert!(of_guest(guests), "{guests}");
        }
        for own in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max"] {
            assert!(!of_guest(own), "{own}");
        }
        assert!(
            name("kernel.hostname")
                .unwrap_err()
                .to_string()
                .contains("hostname")
        );
        assert!(name("net....kernel.panic").is_err());
        assert!(name("net/../kernel/panic").is_err());
        assert!(name("").is_err());
        let none = namespaces("");
        assert!(sysctl("net.ipv4.ip_forward", &none).unwrap().1);
        assert!(
            sysctl("kernel.shmmax", &none)
                .unwrap_err()
                .to_string()
                .contains("IPC namespace")
        );
    }
}
