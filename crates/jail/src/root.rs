//! The root directory of a jail: a read-only tmpfs that holds only what the [`Root`] names.
//!
//! Prepared before the clone ([`Plan::new`], which may allocate and fail with a message), carried
//! out after it ([`Plan::build`], system calls only).

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::{FIRST_PRIVATE_FD, Step, sys};

/// The content of a jail's root directory.
#[derive(Debug, Default)]
pub struct Root {
    /// `/proc` of the jail's own pid namespace, processes only.
    pub proc: bool,
    /// A writable `/tmp`.
    pub tmp: Option<Tmp>,
    /// Files and directories of the host that are visible, read-only.
    pub binds: Vec<Bind>,
    /// Symbolic links: (path in the jail, what it points to).
    pub links: Vec<(PathBuf, PathBuf)>,
    /// Character devices, owned by the jail's user: (path in the jail, device number).
    pub devices: Vec<(PathBuf, u64)>,
    /// Directories that are mounted nowhere, which the process has as descriptors.
    pub directories: Vec<Directory>,
}

/// A directory that is mounted nowhere: the root of a detached mount.
#[derive(Debug)]
pub struct Directory {
    /// The directory.
    pub directory: OwnedFd,
    /// Whether the process may change what is below it.
    pub writable: bool,
}

/// The writable `/tmp` of a jail; a tmpfs, from which programs can be executed.
#[derive(Debug, Clone, Copy)]
pub struct Tmp {
    /// Its capacity in bytes.
    pub size: u64,
    /// Whether the host kernel may back it with huge pages.
    pub huge_pages: bool,
}

/// A file or directory of the host that a jail sees.
#[derive(Debug)]
pub struct Bind {
    /// The file or directory. Mounts below it are included.
    pub source: Source,
    /// Absolute path in the jail.
    pub target: PathBuf,
    /// Whether programs can be executed (and libraries mapped) from it.
    pub executable: bool,
}

/// What a [`Bind`] shows.
#[derive(Debug)]
pub enum Source {
    /// A path on the host.
    Path(PathBuf),
    /// A descriptor (`O_PATH` is enough) of a file that exists in the caller's mount namespace,
    /// under whatever name.
    Descriptor(OwnedFd),
}

impl From<PathBuf> for Source {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl From<&Path> for Source {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<&str> for Source {
    fn from(path: &str) -> Self {
        Self::Path(path.into())
    }
}

impl Bind {
    /// The type of the file.
    pub(crate) fn file_type(&self) -> Result<FileType, Errno> {
        let stat = match &self.source {
            Source::Path(path) => rustix::fs::stat(path)?,
            Source::Descriptor(file) => rustix::fs::fstat(file)?,
        };
        Ok(FileType::from_raw_mode(stat.st_mode))
    }
}

/// The steps that create a [`Root`].
pub struct Plan {
    actions: Vec<Action>,
    device_nodes: bool,
    owner: (Uid, Gid),
}

enum Action {
    Directory(CString),
    File(CString),
    Link {
        path: CString,
        to: CString,
    },
    Bind {
        source: Tree,
        target: CString,
        attributes: u64,
    },
    Proc,
    Tmp {
        size: CString,
        huge: Option<&'static std::ffi::CStr>,
    },
    Device {
        path: CString,
        number: u64,
    },
}

/// A tree of mounts to attach.
enum Tree {
    /// To be cloned from this path.
    Path(CString),
    /// Cloned already: only in the namespace of its mount can a descriptor's be.
    Detached(OwnedFd),
}

impl Plan {
    /// Plans the steps and examines the sources of binds. The error names the path.
    pub fn new(root: &Root, uid: u32, gid: u32) -> Result<Self, (PathBuf, Errno)> {
        let mut actions = Vec::new();
        if root.proc {
            actions.push(Action::Directory(c"proc".into()));
            actions.push(Action::Proc);
        }
        if let Some(tmp) = root.tmp {
            actions.push(Action::Directory(c"tmp".into()));
            let size = CString::new(tmp.size.to_string()).unwrap_or_default();
            actions.push(Action::Tmp {
                size,
                huge: tmp.huge_pages.then_some(c"always"),
            });
        }
        for bind in &root.binds {
            let failed = |errno| match &bind.source {
                Source::Path(path) => (path.clone(), errno),
                Source::Descriptor(_) => (bind.target.clone(), errno),
            };
            let kind = bind.file_type().map_err(failed)?;
            let target = relative(&bind.target)?;
            parents(&bind.target, &mut actions)?;
            actions.push(if kind == FileType::Directory {
                Action::Directory(target.clone())
            } else {
                Action::File(target.clone())
            });
            let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
                | MountAttrFlags::MOUNT_ATTR_NOSUID
                | MountAttrFlags::MOUNT_ATTR_NODEV;
            if !bind.executable {
                attributes |= MountAttrFlags::MOUNT_ATTR_NOEXEC;
            }
            let source = match &bind.source {
                Source::Path(path) => c_string(path.as_os_str()).map(Tree::Path),
                Source::Descriptor(file) => clone_tree(file.as_fd()).map(Tree::Detached),
            }
            .map_err(failed)?;
            actions.push(Action::Bind {
                source,
                target,
                attributes: attributes.bits().into(),
            });
        }
        for (path, to) in &root.links {
            parents(path, &mut actions)?;
            let to = c_string(to.as_os_str()).map_err(|errno| (to.clone(), errno))?;
            actions.push(Action::Link {
                path: relative(path)?,
                to,
            });
        }
        for (path, number) in &root.devices {
            parents(path, &mut actions)?;
            actions.push(Action::Device {
                path: relative(path)?,
                number: *number,
            });
        }
        Ok(Self {
            actions,
            device_nodes: !root.devices.is_empty(),
            owner: (Uid::from_raw(uid), Gid::from_raw(gid)),
        })
    }

    /// Changes the root directory of the calling process to the planned one and detaches every
    /// other mount.
    ///
    /// The process must be in a mount namespace of its own.
    pub fn build(&self) -> Result<(), (Step, Errno)> {
        let at = |step| move |errno| (step, errno);
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", private).map_err(at(Step::PrivateMounts))?;

        // Attached on top of the old root: mounts can be attached below it only while it is in the
        // namespace, and pivot_root wants a mount point. The old root stays reachable as this
        // process's root until then.
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        if !self.device_nodes {
            attributes |= MountAttrFlags::MOUNT_ATTR_NODEV;
        }
        let root = mount_fs(
            c"tmpfs",
            &[(c"size", c"65536"), (c"mode", c"755")],
            attributes,
        )
        .and_then(|mount| attach(&mount, CWD, c"/").map(|()| mount))
        .map_err(at(Step::Root))?;

        let mask = rustix::process::umask(Mode::empty());
        for action in &self.actions {
            self.carry_out(action, root.as_fd())?;
        }
        rustix::process::umask(mask);

        let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY.bits().into();
        sys::set_mount_attributes(root.as_fd(), read_only, false)
            .map_err(at(Step::ReadOnlyRoot))?;
        rustix::process::fchdir(&root).map_err(at(Step::Root))?;
        // Both names are the new root: the old one ends up mounted on top of it, and the unmount
        // takes it away.
        rustix::process::pivot_root(c".", c".").map_err(at(Step::PivotRoot))?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(at(Step::OldRoot))?;
        rustix::process::chdir(c"/").map_err(at(Step::Root))
    }

    fn carry_out(&self, action: &Action, root: BorrowedFd<'_>) -> Result<(), (Step, Errno)> {
        use rustix::fs;
        let directory = Mode::from_raw_mode(0o755);
        match action {
            Action::Directory(path) => match fs::mkdirat(root, path, directory) {
                Err(Errno::EXIST) => Ok(()),
                other => other,
            }
            .map_err(|errno| (Step::Directory, errno)),
            Action::File(path) => {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                fs::openat(root, path, flags, Mode::from_raw_mode(0o444))
                    .map(drop)
                    .map_err(|errno| (Step::Directory, errno))
            }
            Action::Link { path, to } => {
                fs::symlinkat(to, root, path).map_err(|errno| (Step::Directory, errno))
            }
            Action::Bind {
                source,
                target,
                attributes,
            } => {
                let put = |tree: &OwnedFd| {
                    sys::set_mount_attributes(tree.as_fd(), *attributes, true)?;
                    attach(tree, root, target)
                };
                match source {
                    Tree::Detached(tree) => put(tree),
                    Tree::Path(path) => {
                        rustix::mount::open_tree(CWD, path, CLONE).and_then(|tree| put(&tree))
                    }
                }
                .map_err(|errno| (Step::Bind, errno))
            }
            Action::Proc => {
                let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
                    | MountAttrFlags::MOUNT_ATTR_NODEV
                    | MountAttrFlags::MOUNT_ATTR_NOEXEC;
                mount_fs(
                    c"proc",
                    &[(c"subset", c"pid"), (c"hidepid", c"invisible")],
                    attributes,
                )
                .and_then(|mount| attach(&mount, root, c"proc"))
                .map_err(|errno| (Step::Proc, errno))
            }
            Action::Tmp { size, huge } => self
                .make_tmp(root, size, *huge)
                .map_err(|errno| (Step::Tmp, errno)),
            Action::Device { path, number } => {
                let (uid, gid) = self.owner;
                fs::mknodat(
                    root,
                    path,
                    FileType::CharacterDevice,
                    Mode::from_raw_mode(0o600),
                    *number,
                )
                .and_then(|()| {
                    fs::chownat(
                        root,
                        path,
                        Some(uid),
                        Some(gid),
                        fs::AtFlags::SYMLINK_NOFOLLOW,
                    )
                })
                .map_err(|errno| (Step::Device, errno))
            }
        }
    }

    fn make_tmp(
        &self,
        root: BorrowedFd<'_>,
        size: &CString,
        huge: Option<&std::ffi::CStr>,
    ) -> Result<(), Errno> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let options = [(c"size", size.as_c_str()), (c"mode", c"700")];
        let mount = match huge {
            None => mount_fs(c"tmpfs", &options, attributes)?,
            // A kernel without huge pages refuses the option.
            Some(huge) => mount_fs(
                c"tmpfs",
                &[options[0], options[1], (c"huge", huge)],
                attributes,
            )
            .or_else(|_| mount_fs(c"tmpfs", &options, attributes))?,
        };
        let (uid, gid) = self.owner;
        rustix::fs::fchown(&mount_root(&mount)?, Some(uid), Some(gid))?;
        attach(&mount, root, c"tmp")
    }
}

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE
    .union(OpenTreeFlags::OPEN_TREE_CLOEXEC)
    .union(OpenTreeFlags::AT_RECURSIVE);

/// A detached clone of the mounts at and below a file. Its number is out of the range of inherited
/// descriptors, which are placed before the jail is built.
pub fn clone_tree(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = CLONE | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(file, c"", flags)?;
    rustix::io::fcntl_dupfd_cloexec(&tree, FIRST_PRIVATE_FD)
}

/// A readable descriptor of the top directory of a detached mount (fsmount gives an `O_PATH` one).
fn mount_root(mount: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(mount, c".", flags, Mode::empty())
}

fn mount_fs(
    kind: &std::ffi::CStr,
    options: &[(&std::ffi::CStr, &std::ffi::CStr)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

fn attach(mount: &OwnedFd, directory: BorrowedFd<'_>, path: &std::ffi::CStr) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", directory, path, flags)
}

/// Adds the steps that create every directory above `path`.
fn parents(path: &Path, actions: &mut Vec<Action>) -> Result<(), (PathBuf, Errno)> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.pop();
    for directory in above.into_iter().rev() {
        actions.push(Action::Directory(relative(directory)?));
    }
    Ok(())
}

/// The path in the jail, seen from the jail's root directory.
fn relative(path: &Path) -> Result<CString, (PathBuf, Errno)> {
    let inner = path
        .strip_prefix("/")
        .map_err(|_| (path.to_owned(), Errno::INVAL))?;
    if inner
        .components()
        .any(|part| !matches!(part, std::path::Component::Normal(_)))
    {
        return Err((path.to_owned(), Errno::INVAL));
    }
    c_string(inner.as_os_str()).map_err(|errno| (path.to_owned(), errno))
}

fn c_string(text: &OsStr) -> Result<CString, Errno> {
    CString::new(text.as_bytes()).map_err(|_| Errno::INVAL)
}
