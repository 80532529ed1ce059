//! Paths inside a container's root, for the agent: links in an image never lead out of it.
//!
//! The kernel resolves ([`find`], RESOLVE_IN_ROOT). Only where something must be created on the way
//! are the components walked here, with a descriptor for each directory: `..` goes back to the one
//! before, links start over from the root, nothing is resolved twice.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// As many links as the kernel follows.
const LINK_LIMIT: usize = 40;

/// What to create at the end of a path, if nothing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    Directory,
    File,
}

/// Opens `path` below `root` with O_PATH.
pub(crate) fn find(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<OwnedFd> {
    resolve(root, path, ResolveFlags::IN_ROOT)
}

/// As [`find`], but fails on any link.
pub(super) fn find_plain(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<OwnedFd> {
    resolve(
        root,
        path,
        ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS,
    )
}

fn resolve(root: BorrowedFd<'_>, path: &CStr, flags: ResolveFlags) -> rustix::io::Result<OwnedFd> {
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(
            root,
            path,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            flags,
        ) {
            // Something was renamed or mounted meanwhile, and the kernel cannot tell whether `..`
            // stayed inside.
            Err(Errno::AGAIN) if attempts < 32 => attempts += 1,
            result => return result,
        }
    }
}

/// As [`find`]; creates what is missing: directories on the way, and `missing` at the end.
pub(crate) fn find_or_make(
    root: BorrowedFd<'_>,
    path: &CStr,
    missing: impl FnOnce() -> rustix::io::Result<Missing>,
) -> rustix::io::Result<OwnedFd> {
    match find(root, path) {
        Err(Errno::NOENT) => {
            let missing = missing()?;
            match make_last(root, path.to_bytes(), missing) {
                Err(Errno::NOENT | Errno::EXIST) => walk(root, path.to_bytes(), missing),
                made => made,
            }
        }
        found => found,
    }
}

/// The usual case, with fewer calls: only the end of the path is missing.
fn make_last(root: BorrowedFd<'_>, path: &[u8], missing: Missing) -> rustix::io::Result<OwnedFd> {
    let slash = path.iter().rposition(|byte| *byte == b'/');
    let (directory, name) = match slash {
        Some(slash) if slash > 0 => (&path[..slash], &path[slash + 1..]),
        _ => return Err(Errno::NOENT),
    };
    if matches!(name, b"" | b"." | b"..") {
        return Err(Errno::NOENT);
    }
    let directory = find(root, &CString::new(directory).map_err(|_| Errno::INVAL)?)?;
    make(directory.as_fd(), name, missing)?;
    open(directory.as_fd(), name)
}

/// Opens the directory of `path` below `root`, created if missing, for a new entry with the name
/// that is returned.
pub(super) fn parent(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<(OwnedFd, CString)> {
    let bytes = path.to_bytes();
    let (directory, name) = match bytes.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&bytes[..slash], &bytes[slash + 1..]),
        None => (&b""[..], bytes),
    };
    if name.is_empty() || name == b"." || name == b".." {
        return Err(Errno::INVAL);
    }
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    let directory = CString::new(if directory.is_empty() {
        b"."
    } else {
        directory
    })
    .map_err(|_| Errno::INVAL)?;
    Ok((
        find_or_make(root, &directory, || Ok(Missing::Directory))?,
        name,
    ))
}

fn walk(root: BorrowedFd<'_>, path: &[u8], missing: Missing) -> rustix::io::Result<OwnedFd> {
    let split = |path: &[u8]| -> VecDeque<Vec<u8>> {
        path.split(|byte| *byte == b'/')
            .filter(|name| !name.is_empty() && *name != b".")
            .map(<[u8]>::to_vec)
            .collect()
    };
    let mut names = split(path);
    // The directories from the root down to where we are; empty at the root itself.
    let mut place: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(name) = names.pop_front() {
        if name == b".." {
            place.pop();
            continue;
        }
        let here = place.last().map_or(root, AsFd::as_fd);
        let next = match open(here, &name) {
            Err(Errno::NOENT) => {
                make(
                    here,
                    &name,
                    if names.is_empty() {
                        missing
                    } else {
                        Missing::Directory
                    },
                )?;
                open(here, &name)?
            }
            opened => opened?,
        };
        let stat = rustix::fs::fstat(&next)?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Symlink {
            links += 1;
            if links > LINK_LIMIT {
                return Err(Errno::LOOP);
            }
            let target = rustix::fs::readlinkat(&next, c"", Vec::new())?;
            if target.to_bytes().starts_with(b"/") {
                place.clear();
            }
            let mut rest = split(target.to_bytes());
            rest.append(&mut names);
            names = rest;
            continue;
        }
        place.push(next);
    }
    match place.pop() {
        Some(place) => Ok(place),
        None => rustix::fs::openat(root, c".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()),
    }
}

/// Opens one component, not followed, across mount points.
fn open(directory: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn make(directory: BorrowedFd<'_>, name: &[u8], missing: Missing) -> rustix::io::Result<()> {
    match missing {
        Missing::Directory => rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755)),
        Missing::File => rustix::fs::mknodat(
            directory,
            name,
            rustix::fs::FileType::RegularFile,
            Mode::from_raw_mode(0o644),
            0,
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    /// A root with a secret beside it.
    fn with_root(test: impl FnOnce(&Path, BorrowedFd<'_>)) {
        let directory = std::env::temp_dir().join(format!("hull-paths-{}", std::process::id()));
        let name = std::thread::current()
            .name()
            .unwrap_or("x")
            .replace(':', "-");
        let base = directory.join(name);
        let root = base.join("root");
        fs::create_dir_all(&root).unwrap();
        fs::create_dir(base.join("secret")).unwrap();
        let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        test(&root, fd.as_fd());
        fs::remove_dir_all(&base).unwrap();
        let _ = fs::remove_dir(&directory);
    }

    fn make_directory(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<OwnedFd> {
        find_or_make(root, path, || Ok(Missing::Directory))
    }

    #[test]
    fn directories_and_files_are_made() {
        with_root(|path, root| {
            make_directory(root, c"/a/b/c").unwrap();
            assert!(path.join("a/b/c").is_dir());
            find_or_make(root, c"a/b/file", || Ok(Missing::File)).unwrap();
            assert!(path.join("a/b/file").is_file());
            make_directory(root, c"/").unwrap();
        });
    }

    #[test]
    fn links_stay_inside() {
        with_root(|path, root| {
            symlink("/etc", path.join("absolute")).unwrap();
            symlink("../../secret", path.join("upwards")).unwrap();
            symlink("dangling/deeper", path.join("relative")).unwrap();
            make_directory(root, c"/absolute/x").unwrap();
            assert!(path.join("etc/x").is_dir());
            make_directory(root, c"/upwards/x").unwrap();
            assert!(path.join("secret/x").is_dir());
            assert!(!path.parent().unwrap().join("secret/x").exists());
            make_directory(root, c"/relative/../x").unwrap();
            assert!(path.join("dangling/x").is_dir());
            make_directory(root, c"/../../../y").unwrap();
            assert!(path.join("y").is_dir());
        });
    }

    #[test]
    fn circles_end() {
        with_root(|path, root| {
            symlink("b", path.join("a")).unwrap();
            symlink("a", path.join("b")).unwrap();
            assert_eq!(make_directory(root, c"/a/x").unwrap_err(), Errno::LOOP);
        });
    }

    #[test]
    fn magic_links_lead_nowhere() {
        let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        assert!(find(root.as_fd(), c"/proc/self/root/etc").is_err());
    }

    #[test]
    fn parents() {
        with_root(|path, root| {
            let (_, name) = parent(root, c"/dev/net/tun").unwrap();
            assert_eq!(name.as_c_str(), c"tun");
            assert!(path.join("dev/net").is_dir());
            assert!(parent(root, c"/dev/..").is_err());
        });
    }
}
