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

/// The parent directory of an entry.
pub(super) struct Parent {
    /// Path in the archive.
    pub written: Vec<u8>,
    /// Path without symbolic links.
    pub real: Vec<u8>,
    pub dir: OwnedFd,
}

impl AsFd for Parent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Writer<'_> {
    /// The parent directory of an entry, created if the archive had no entry for it.
    pub(super) fn parent(&mut self, path: &[u8], entry: &[u8]) -> Result<Parent, LayerError> {
        if let Some(last) = self.last_parent.take()
            && last.written == path
        {
            return Ok(last);
        }
        match fs::open_real(self.root.as_fd(), path) {
            Ok(dir) => Ok(Parent {
                written: path.to_vec(),
                real: path.to_vec(),
                dir,
            }),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                let mut made = Vec::new();
                let real = self.make_parents(path, entry, &mut made)?;
                for path in made {
                    self.dir_times.entry(path).or_insert(NO_TIME);
                }
                let dir = fs::open_real(self.root.as_fd(), &real)
                    .map_err(failed("open the parent of", entry))?;
                Ok(Parent {
                    written: path.to_vec(),
                    real,
                    dir,
                })
            }
            Err(error) => Err(failed("open the parent of", entry)(error)),
        }
    }

    /// Walks to `path` by components: follows symbolic links of this layer and of lower ones, below
    /// the root, and creates missing directories. Returns the path without links.
    fn make_parents(
        &self,
        path: &[u8],
        entry: &[u8],
        made: &mut Vec<Vec<u8>>,
    ) -> Result<Vec<u8>, LayerError> {
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
        let open = |done: &[Vec<u8>]| {
            fs::open_real(self.root.as_fd(), &done.join(&b'/'))
                .map_err(failed("open the parent of", entry))
        };
        while let Some(part) = todo.pop_front() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    done.pop();
                    continue;
                }
                _ => {}
            }
            let dir = open(&done)?;
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
                    fs::remove_all(dir.as_fd(), part.as_slice())
                        .map_err(failed("replace the parent of", entry))?;
                    let new = self.make_dir(dir.as_fd(), &part, None, entry)?;
                    set_opaque(new.as_fd(), entry)?;
                    done.push(part);
                    made.push(done.join(&b'/'));
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
                            self.make_dir(dir.as_fd(), &part, like, entry)?;
                            done.push(part);
                            made.push(done.join(&b'/'));
                        }
                    }
                }
            }
        }
        Ok(done.join(&b'/'))
    }

    /// Creates a directory that the archive has no entry for.
    fn make_dir(
        &self,
        parent: BorrowedFd<'_>,
        name: &[u8],
        like: Option<rustix::fs::Stat>,
        entry: &[u8],
    ) -> Result<OwnedFd, LayerError> {
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
        Ok(dir)
    }
}
