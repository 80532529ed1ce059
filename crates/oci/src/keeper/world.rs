//! The namespaces of a keeper on the host.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command};

use hull_sandbox::error::{Context, Error, Result};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::Namespace;

/// Starts a process as the first one in a new pid namespace.
///
/// # Errors
/// The namespace cannot be created (`EPERM` without `CAP_SYS_ADMIN`), or the process cannot be
/// started.
#[allow(unsafe_code)]
pub fn spawn(command: &mut Command) -> Result<Child> {
    let doing = || "make a process namespace".to_owned();
    let own = File::open("/proc/self/ns/pid").context(doing)?;
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.context(doing)?;
    let child = command.spawn();
    // Hooks, also started by this process, run in its own pid namespace.
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)).context(doing)?;
    child.context(|| "start the keeper")
}

/// Enters namespaces. `fds`: an existing network namespace if `namespaces` does not have a new one,
/// then the root file system, which is read-only and empty at `covered`.
///
/// # Errors
/// A namespace cannot be joined or created (`EPERM` without `CAP_SYS_ADMIN`), or the root file
/// system cannot be entered.
#[allow(unsafe_code)]
pub fn enter(namespaces: &[Namespace], fds: Vec<OwnedFd>, covered: &[String]) -> Result<()> {
    let mut fds = fds.into_iter();
    let mut next = || {
        fds.next()
            .ok_or_else(|| Error::new("the keeper got no namespace"))
    };
    if !namespaces.contains(&Namespace::Network) {
        move_into_link_name_space(next()?.as_fd(), Some(LinkNameSpaceType::Network))
            .context(|| "join the network namespace")?;
    }
    let flag = |namespace: &Namespace| match namespace {
        Namespace::Cgroup => UnshareFlags::NEWCGROUP,
        Namespace::Ipc => UnshareFlags::NEWIPC,
        Namespace::Uts => UnshareFlags::NEWUTS,
        Namespace::Network => UnshareFlags::NEWNET,
        // Last: without mappings, nothing else is permitted in it.
        Namespace::User => UnshareFlags::empty(),
    };
    let new = namespaces
        .iter()
        .fold(UnshareFlags::NEWNS, |flags, namespace| {
            flags | flag(namespace)
        });
    let unshare = |flags| {
        // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is never given.
        unsafe { unshare_unsafe(flags) }.context(|| "make namespaces")
    };
    unshare(new)?;
    let root = next()?;
    enter_root(&root).context(|| "enter the container's root file system")?;
    cover(&root, covered).context(|| "cover what the guest has mounts on")?;
    if namespaces.contains(&Namespace::User) {
        unshare(UnshareFlags::NEWUSER)?;
    }
    Ok(())
}

/// Mounts an empty read-only file system wherever the guest has one of its own: engines that copy
/// files by way of this namespace (`podman cp`) are told so, instead of writing to a directory that
/// the container does not see. What is not there cannot be mistaken for the guest's.
fn cover(root: &OwnedFd, paths: &[String]) -> rustix::io::Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "size", "4k")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    let mut empty = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    for path in paths {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let path = path.trim_start_matches('/');
        let found = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
        let Ok(target) = found else { continue };
        let attach =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&empty, "", &target, "", attach)?;
        // For the next one. Linux before 6.15 clones what is mounted in this namespace only.
        let clone = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        empty = open_tree(&empty, "", clone)?;
    }
    Ok(())
}

/// Makes a detached mount the root. Nothing of the host remains visible, except a proc of this pid
/// namespace.
fn enter_root(root: &OwnedFd) -> rustix::io::Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let processes = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(processes.as_fd())?;
    let processes = fsmount(
        processes.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?;
    // Any directory works: it is covered only until the root changes.
    let from = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root, "", CWD, "/proc", from)?;
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    // The image's /proc may be a symlink, or missing.
    let found = openat2(
        root,
        "proc",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH,
    );
    if let Ok(target) = found {
        move_mount(
            &processes,
            "",
            &target,
            "",
            from | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )?;
    }
    Ok(())
}
