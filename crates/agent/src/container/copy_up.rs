//! Fills a tmpfs with a copy of the directory that it hides (mount option `tmpcopyup`), and a new
//! volume (`hull.fill`).
//!
//! Runs in the child. Works on descriptors and follows no links: the content comes from the image.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, Result};

/// Copies everything in the directory `from` to the root directory `to` of a tmpfs, whose mode its
/// options have set; with `owner` also the directory's own owner.
pub(super) fn fill(from: BorrowedFd<'_>, to: BorrowedFd<'_>, owner: bool) -> Result<()> {
    let (from, to) = copy_entries(from, to)?;
    let stat = rustix::fs::fstat(&from)?;
    if owner {
        own(to.as_fd(), c"", &stat)?;
    }
    rustix::fs::futimens(&to, &times(&stat))
}

/// Copies everything in the directory `from` to the directory `to`, and the directory's own owner
/// and mode.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let (from, to) = copy_entries(from, to)?;
    let stat = rustix::fs::fstat(&from)?;
    own(to.as_fd(), c"", &stat)?;
    copy_attributes(&from, &to)?;
    rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode))?;
    rustix::fs::futimens(&to, &times(&stat))
}

/// Copies everything in the directory `from` to the directory `to`. Both, opened for reading.
fn copy_entries(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let from = rustix::fs::openat(from, c".", flags, Mode::empty())?;
    let to = rustix::fs::openat(to, c".", flags, Mode::empty())?;
    for entry in Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            copy_entry(from.as_fd(), to.as_fd(), name)?;
        }
    }
    Ok((from, to))
}

fn copy_entry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = rustix::fs::openat(from, name, flags, Mode::empty())?;
            let new = rustix::fs::openat(to, name, flags, Mode::empty())?;
            copy(below.as_fd(), new.as_fd())
        }
        FileType::RegularFile => {
            let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let old = rustix::fs::openat(
                from,
                name,
                flags | OFlags::RDONLY | OFlags::NONBLOCK,
                Mode::empty(),
            )?;
            let create = flags | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let new = rustix::fs::openat(to, name, create, Mode::from_raw_mode(0o600))?;
            loop {
                match rustix::fs::sendfile(&new, &old, None, 1 << 20) {
                    Ok(0) => break,
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error),
                }
            }
            own(new.as_fd(), c"", &stat)?;
            copy_attributes(&old, &new)?;
            rustix::fs::fchmod(&new, mode)?;
            rustix::fs::futimens(&new, &times(&stat))
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&*target, to, name)?;
            own(to, name, &stat)
        }
        FileType::Fifo | FileType::Socket | FileType::CharacterDevice | FileType::BlockDevice => {
            rustix::fs::mknodat(
                to,
                name,
                FileType::from_raw_mode(stat.st_mode),
                mode,
                stat.st_rdev,
            )?;
            own(to, name, &stat)?;
            rustix::fs::chmodat(to, name, mode, AtFlags::empty())
        }
        FileType::Unknown => Err(Errno::OPNOTSUPP),
    }
}

/// Copies extended attributes, as far as the other file system has them: capabilities of programs
/// above all.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd) -> Result<()> {
    let length = match rustix::fs::flistxattr(from, &mut [0; 0][..]) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(()),
        listed => listed?,
    };
    let mut names = vec![0; length];
    let length = rustix::fs::flistxattr(from, &mut names[..])?;
    // linux/limits.h: XATTR_SIZE_MAX.
    let mut value = vec![0; 65536];
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let length = match rustix::fs::fgetxattr(from, name, &mut value[..]) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
            read => read?,
        };
        match rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP | Errno::PERM) => {}
            set => set?,
        }
    }
    Ok(())
}

fn own(at: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(
        at,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH,
    )
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds| rustix::time::Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as i64),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as i64),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let base = std::env::temp_dir().join(format!("hull-copy-up-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("sub/file"), "text").unwrap();
        fs::set_permissions(from.join("sub/file"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o1777)).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        let open =
            |path| rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        fill(open(&from).as_fd(), open(&to).as_fd(), true).unwrap();
        assert_eq!(fs::read_to_string(to.join("sub/file")).unwrap(), "text");
        let mode = |path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(mode(to.join("sub/file")), 0o4711);
        assert_eq!(mode(to.join("sub")), 0o1777);
        assert_eq!(
            fs::read_link(to.join("link")).unwrap().to_str(),
            Some("/nowhere")
        );
        fs::remove_dir_all(&base).unwrap();
    }
}
