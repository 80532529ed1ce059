//! Parent directories of entries: found, or created if the archive has no entry for them.
//!
//! Called by the parent module.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use super::super::attributes::{Attributes, failed, set_attributes, set_opaque, show};
use super::super::{LayerError, fs};
use super::{MAX_LINKS, NO_TIME, Writer};
use crate::limits::{LOOKUP_STEPS, PATH_DEPTH};

/// The parent directory of an entry.
pub(super) struct Parent {
    /// Path in the archive.
    written: Vec<u8>,
    /// Path without symbolic links.
    real: Vec<u8>,
    dir: OwnedFd,
    /// Its time before entries were created in it.
    time: (i64, u32),
}

impl Parent {
    fn enter(written: &[u8], real: Vec<u8>, dir: OwnedFd) -> rustix::io::Result<Self> {
        let time = fs::dir_time(dir.as_fd())?;
        Ok(Self {
            written: written.to_vec(),
            real,
            dir,
            time,
        })
    }

    /// The path of an entry in it, without symbolic links.
    pub(super) fn real_path(&self, name: &[u8]) -> Vec<u8> {
        match self.real.as_slice() {
            [] => name.to_vec(),
            real => [real, b"/", name].concat(),
        }
    }

    /// Sets its time again, after entries were created in it.
    pub(super) fn leave(self) -> rustix::io::Result<()> {
        fs::set_dir_time(self.dir.as_fd(), self.time)
    }
}

impl AsFd for Parent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Writer<'_> {
    /// The parent directory of an entry, created if the archive had no entry for it.
    pub(super) fn parent(&mut self, path: &[u8], entry: &[u8]) -> Result<Parent, LayerError> {
        if let Some(last) = &self.last_parent
            && last.written != path
        {
            self.leave_parent()?;
        }
        if let Some(last) = self.last_parent.take() {
            return Ok(last);
        }
        let dir = match fs::open_real(self.root.as_fd(), path) {
            Ok(dir) => Ok((dir, path.to_vec())),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                let real = self.make_parents(path, entry)?;
                fs::open_real(self.root.as_fd(), &real).map(|dir| (dir, real))
            }
            Err(error) => Err(error),
        };
        dir.and_then(|(dir, real)| Parent::enter(path, real, dir))
            .map_err(failed("open the parent of", entry))
    }

    /// Leaves the last entry's directory.
    pub(super) fn leave_parent(&mut self) -> Result<(), LayerError> {
        let Some(last) = self.last_parent.take() else {
            return Ok(());
        };
        let path = last.written.clone();
        last.leave().map_err(failed("set the time of", &path))
    }

    /// Walks to `path` by components: follows symbolic links of this layer and of lower ones, below
    /// the root, and creates missing directories. Returns the path without links.
    fn make_parents(&mut self, path: &[u8], entry: &[u8]) -> Result<Vec<u8>, LayerError> {
        let split = |path: &[u8]| -> Vec<Vec<u8>> {
            path.split(|&byte| byte == b'/')
                .map(<[u8]>::to_vec)
                .collect()
        };
        let no_dir = |parent: String| LayerError::Parent {
            entry: show(entry),
            parent,
        };
        let mut todo: VecDeque<Vec<u8>> = split(path).into();
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        let mut follow = |target: &[u8], todo: &mut VecDeque<Vec<u8>>, done: &mut Vec<Vec<u8>>| {
            links += 1;
            if links > MAX_LINKS {
                return Err(no_dir(format!(
                    "\"{}\" (a loop of symbolic links)",
                    show(path)
                )));
            }
            if target.starts_with(b"/") {
                done.clear();
            }
            for part in split(target).into_iter().rev() {
                todo.push_front(part);
            }
            Ok(())
        };
        let mut steps = 0;
        while let Some(part) = todo.pop_front() {
            steps += 1;
            if steps > LOOKUP_STEPS || done.len() >= PATH_DEPTH {
                return Err(LayerError::Entry {
                    entry: show(entry),
                    reason: format!(
                        "its directory is more than {PATH_DEPTH} deep, or {LOOKUP_STEPS} steps away"
                    ),
                });
            }
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    done.pop();
                    continue;
                }
                _ => {}
            }
            let dir = fs::open_real(self.root.as_fd(), &done.join(&b'/'))
                .map_err(failed("open the parent of", entry))?;
            let existing =
                fs::stat(dir.as_fd(), &part).map_err(failed("look at the parent of", entry))?;
            match existing {
                Some(stat) if fs::file_type(&stat) == FileType::Directory => done.push(part),
                Some(stat) if fs::file_type(&stat) == FileType::Symlink => {
                    let target = rustix::fs::readlinkat(&dir, part.as_slice(), Vec::new())
                        .map_err(failed("read the parent of", entry))?;
                    follow(target.as_bytes(), &mut todo, &mut done)?;
                }
                Some(stat) if fs::is_whiteout(&stat) => {
                    let around = Parent::enter(path, done.join(&b'/'), dir)
                        .map_err(failed("open the parent of", entry))?;
                    fs::remove_all(around.as_fd(), part.as_slice())
                        .map_err(failed("replace the parent of", entry))?;
                    let new = self.make_dir(around.as_fd(), &part, None, entry)?;
                    around
                        .leave()
                        .map_err(failed("set the time of the parent of", entry))?;
                    set_opaque(new.as_fd(), entry)?;
                    done.push(part);
                }
                Some(_) => return Err(no_dir(format!("\"{}\"", show(&part)))),
                None => {
                    done.push(part);
                    let found = self.lower.lookup(&done).map_err(failed("look up", entry))?;
                    let Some(part) = done.pop() else { continue };
                    match &found {
                        Some(found) if fs::file_type(&found.stat) == FileType::Symlink => {
                            let target =
                                rustix::fs::readlinkat(&found.parent, part.as_slice(), Vec::new())
                                    .map_err(failed("read the parent of", entry))?;
                            follow(target.as_bytes(), &mut todo, &mut done)?;
                        }
                        _ => {
                            let like = found
                                .map(|found| found.stat)
                                .filter(|stat| fs::file_type(stat) == FileType::Directory);
                            let around = Parent::enter(path, done.join(&b'/'), dir)
                                .map_err(failed("open the parent of", entry))?;
                            self.make_dir(around.as_fd(), &part, like, entry)?;
                            around
                                .leave()
                                .map_err(failed("set the time of the parent of", entry))?;
                            done.push(part);
                        }
                    }
                }
            }
        }
        Ok(done.join(&b'/'))
    }

    /// Creates a directory that the archive has no entry for.
    fn make_dir(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        like: Option<rustix::fs::Stat>,
        entry: &[u8],
    ) -> Result<OwnedFd, LayerError> {
        self.budget.take_inodes(1)?;
        self.disk.entry()?;
        rustix::fs::mkdirat(parent, name, Mode::RWXU)
            .map_err(failed("create the parent of", entry))?;
        let dir = fs::open_child_dir(parent, name).map_err(failed("open the parent of", entry))?;
        let (uid, gid, mode) = like.map_or((0, 0, 0o755), |stat| {
            (stat.st_uid, stat.st_gid, stat.st_mode)
        });
        let attributes = Attributes {
            uid,
            gid,
            mode,
            mtime: NO_TIME,
            xattrs: &[],
        };
        set_attributes(dir.as_fd(), entry, &attributes)?;
        fs::set_dir_time(dir.as_fd(), NO_TIME)
            .map_err(failed("set the time of the parent of", entry))?;
        Ok(dir)
    }
}
