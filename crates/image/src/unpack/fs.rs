//! Small file-system helpers over directory descriptors.
//!
//! Called by the unpacker and the store. None of them follows a symbolic link in the last
//! component.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Timespec, Timestamps,
    XattrFlags,
};
use rustix::io::{Errno, Result};

/// The attribute that marks a directory as opaque: it hides the lower ones.
const OPAQUE: &str = "trusted.overlay.opaque";
/// Its counterpart in a user namespace (overlayfs option `userxattr`), where the other cannot be
/// set. Images cannot set either.
const OPAQUE_OF_USER: &str = "user.overlay.opaque";

/// Opens a directory for reading.
pub(crate) fn open_dir(path: impl rustix::path::Arg) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Opens the directory `name` in `parent`, which must not be a symbolic link.
pub(crate) fn open_child_dir(
    parent: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Opens the directory `path` as if `root` were the root directory; symbolic links stay inside.
pub(crate) fn open_in_root(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    open_below(
        root,
        path,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Opens the directory `path` below `root`; fails with `LOOP` if a component is a symbolic link.
pub(crate) fn open_real(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd> {
    open_below(
        root,
        path,
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}

fn open_below(root: BorrowedFd<'_>, path: &[u8], resolve: ResolveFlags) -> Result<OwnedFd> {
    let path = if path.is_empty() { &b"."[..] } else { path };
    loop {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // A concurrent rename somewhere; the kernel asks for a retry.
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
}

/// Stat of `name`, if it exists.
pub(crate) fn stat(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The file type of a stat.
pub(crate) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether a stat is that of an overlayfs whiteout.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether a directory is opaque.
pub(crate) fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    [OPAQUE, OPAQUE_OF_USER].into_iter().any(|name| {
        let mut value = [0u8; 1];
        matches!(rustix::fs::fgetxattr(dir, name, &mut value[..]), Ok(1)) && value[0] == b'y'
    })
}

/// Marks a directory as opaque.
pub(crate) fn set_opaque(dir: BorrowedFd<'_>) -> Result<()> {
    let set = |name| rustix::fs::fsetxattr(dir, name, b"y", XattrFlags::empty());
    match set(OPAQUE) {
        Err(Errno::PERM) => set(OPAQUE_OF_USER),
        done => done,
    }
}

/// Time stamps with this modification time, which is also the access time, to be deterministic.
pub(crate) fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanoseconds),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// The modification time of a directory, which may be open as a path only.
pub(crate) fn dir_time(dir: BorrowedFd<'_>) -> Result<(i64, u32)> {
    let stat = rustix::fs::fstat(dir)?;
    // Below 1,000,000,000.
    Ok((stat.st_mtime, stat.st_mtime_nsec as u32))
}

/// Sets the modification time of a directory, which may be open as a path only.
pub(crate) fn set_dir_time(dir: BorrowedFd<'_>, time: (i64, u32)) -> Result<()> {
    rustix::fs::utimensat(dir, ".", &times(time), AtFlags::SYMLINK_NOFOLLOW)
}

/// Called with a directory and a name in it.
pub(crate) type Visit<'a> = dyn FnMut(BorrowedFd<'_>, &CStr) -> Result<()> + 'a;

/// Removes `name`, recursively. The tree may be arbitrarily deep: subdirectories are moved up
/// before they are emptied, so neither stack nor descriptors run out.
pub(crate) fn remove_all(parent: BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<()> {
    remove_all_after(parent, name, &mut |_, _| Ok(()))
}

/// The same; calls `before` for each entry that may be a file, before that is removed.
pub(crate) fn remove_all_after(
    parent: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
    before: &mut Visit<'_>,
) -> Result<()> {
    name.into_with_c_str(|name| remove_tree(parent, name, before))
}

fn remove_tree(parent: BorrowedFd<'_>, name: &CStr, before: &mut Visit<'_>) -> Result<()> {
    if !unlink(parent, name, before)? {
        return Ok(());
    }
    let top = open_child_dir(parent, name)?;
    let mut moved = 0u64;
    loop {
        let mut empty = true;
        for entry in Dir::read_from(&top)? {
            let entry = entry?;
            let child = entry.file_name();
            if matches!(child.to_bytes(), b"." | b"..") {
                continue;
            }
            empty = false;
            if unlink(top.as_fd(), child, before)?
                && rustix::fs::unlinkat(&top, child, AtFlags::REMOVEDIR).is_err()
            {
                flatten(top.as_fd(), child, &mut moved, before)?;
            }
        }
        if empty {
            break;
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Removes an entry that is no directory. Returns whether it is one.
fn unlink(dir: BorrowedFd<'_>, name: &CStr, before: &mut Visit<'_>) -> Result<bool> {
    before(dir, name)?;
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(false),
        Err(Errno::ISDIR) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Empties the directory `name` in `top`: removes files, and moves non-empty directories to `top`.
fn flatten(
    top: BorrowedFd<'_>,
    name: &CStr,
    moved: &mut u64,
    before: &mut Visit<'_>,
) -> Result<()> {
    let dir = open_child_dir(top, name)?;
    for entry in Dir::read_from(&dir)? {
        let entry = entry?;
        let child = entry.file_name();
        if matches!(child.to_bytes(), b"." | b"..") || !unlink(dir.as_fd(), child, before)? {
            continue;
        }
        if rustix::fs::unlinkat(&dir, child, AtFlags::REMOVEDIR).is_ok() {
            continue;
        }
        loop {
            *moved += 1;
            let target = format!(".removed-{moved}");
            match rustix::fs::renameat_with(&dir, child, top, &target, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => {}
                result => break result?,
            }
        }
    }
    rustix::fs::unlinkat(top, name, AtFlags::REMOVEDIR)
}

/// Flushes a directory's entries to disk.
pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    rustix::fs::fsync(open_dir(path)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn removes_trees_deeper_than_descriptors_and_paths() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_dir(dir.path()).unwrap();
        let mut current = rustix::io::dup(&root).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&current, "deeper", Mode::RWXU).unwrap();
            rustix::fs::mkdirat(&current, "empty", Mode::RWXU).unwrap();
            rustix::fs::symlinkat("/etc", &current, "link").unwrap();
            current = open_child_dir(current.as_fd(), "deeper").unwrap();
        }
        remove_all(root.as_fd(), "deeper").unwrap();
        assert!(stat(root.as_fd(), b"deeper").unwrap().is_none());
        remove_all(root.as_fd(), "not there").unwrap();
        assert!(Path::new("/etc/passwd").exists());
    }
}
