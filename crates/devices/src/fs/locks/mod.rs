//! Locks of the guest's programs (flock(2), fcntl(2)), which are locks on the host's files: what
//! one machine has locked, neither another one nor the host can lock.
//!
//! A lock of flock(2) is the open file's, of which the device has one for each of the guest's. A
//! record lock belongs to an owner, which is a process or an open file of the guest. For each owner
//! and file the device opens the file once more, and its record locks are locks of that open file
//! (`F_OFD_SETLK`): these exclude each other and those of the host's processes.
//!
//! The device knows which ranges its owners have. So it can tell the guest who has a lock, and find
//! out that owners wait for each other.
//!
//! Nothing here waits: see [`waiting`].

mod host;
mod ranges;
#[cfg(test)]
mod tests;
pub mod waiting;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, Statx};
use rustix::io::Errno;

use super::handles::Handle;
use super::nodes::{ShareId, device_of, stat_fd};
use super::server::Server;
use super::wire::{self, Input, Reply};
use ranges::{Kind, Range, Ranges};

/// The most owners of record locks, each with an open file, as far as there may be open files.
const MAX_LOCK_OWNERS: usize = 8192;
/// The most ranges that all owners have locked.
const MAX_LOCKED_RANGES: usize = 8192;

/// A file of the host, under whatever name and in whatever share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl From<&Statx> for FileId {
    fn from(stat: &Statx) -> Self {
        Self {
            device: device_of(stat),
            inode: stat.stx_ino,
        }
    }
}

/// What SETLK, SETLKW and GETLK ask for.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    file: FileId,
    handle: u64,
    owner: u64,
    /// The guest's process.
    pid: u32,
    range: Range,
    /// `None` unlocks.
    kind: Option<Kind>,
    is_flock: bool,
    /// The owner is an open file, not a process.
    is_ofd: bool,
}

/// An owner's locks on one file.
struct Holder {
    share: ShareId,
    file: OwnedFd,
    /// How `file` was opened: `O_RDONLY`, `O_WRONLY` or `O_RDWR`.
    access: OFlags,
    /// The guest's open file by which it asked last.
    handle: u64,
    pid: u32,
    is_ofd: bool,
    ranges: Ranges,
}

/// All record locks of the guest.
#[derive(Default)]
pub struct Locks {
    /// Whether the guest leaves its locks to the device.
    pub agreed: bool,
    holders: BTreeMap<(FileId, u64), Holder>,
    /// Ranges of all holders.
    ranges: usize,
    /// Files of which locks have gone, if anybody waits.
    released: Vec<FileId>,
    waiting: usize,
}

impl Locks {
    /// Number of open files that it keeps.
    pub fn open_files(&self) -> usize {
        self.holders.len()
    }

    /// All locks go.
    pub fn clear(&mut self) {
        self.agreed = false;
        self.holders.clear();
        self.ranges = 0;
        self.released.clear();
    }

    /// The locks on a share's files go.
    pub fn remove_share(&mut self, share: ShareId) {
        self.drop_where(|_, holder| holder.share == share);
    }

    fn drop_where(&mut self, drop: impl Fn(&(FileId, u64), &Holder) -> bool) {
        let mut gone = Vec::new();
        self.holders.retain(|key, holder| {
            let keep = !drop(key, holder);
            if !keep {
                self.ranges -= holder.ranges.len();
                gone.push(key.0);
            }
            keep
        });
        gone.into_iter().for_each(|file| self.note_released(file));
    }

    fn note_released(&mut self, file: FileId) {
        if self.waiting > 0 && !self.released.contains(&file) {
            self.released.push(file);
        }
    }

    fn of_file(&self, file: FileId) -> impl Iterator<Item = (u64, &Holder)> {
        (self.holders.range((file, 0)..=(file, u64::MAX)))
            .map(|((_, owner), holder)| (*owner, holder))
    }

    /// Other owners in this guest whose locks are in the way, and the first such lock of each.
    fn blockers(&self, request: &Request) -> impl Iterator<Item = (u64, &Holder, (Range, Kind))> {
        let (range, kind, asking) = (request.range, request.kind, request.owner);
        self.of_file(request.file)
            .filter(move |(owner, _)| *owner != asking)
            .filter_map(move |(owner, holder)| {
                Some((owner, holder, holder.ranges.conflict(range, kind?)?))
            })
    }
}

impl Server {
    /// `fuse_lk_in`.
    fn lock_request(&mut self, body: &mut Input<'_>) -> Result<Request, Errno> {
        let (handle, owner) = (body.u64()?, body.u64()?);
        let (start, end) = (body.u64()?, body.u64()?);
        let (kind, pid, flags) = (body.u32()?, body.u32()?, body.u32()?);
        let kind = match i32::try_from(kind) {
            Ok(libc::F_RDLCK) => Some(Kind::Read),
            Ok(libc::F_WRLCK) => Some(Kind::Write),
            Ok(libc::F_UNLCK) => None,
            _ => return Err(Errno::INVAL),
        };
        Ok(Request {
            file: FileId::from(&stat_fd(&*self.open_file(handle)?.1)?),
            handle,
            owner,
            pid,
            range: Range::new(start, end).ok_or(Errno::INVAL)?,
            kind,
            is_flock: flags & wire::LK_FLOCK != 0,
            is_ofd: flags & wire::LK_OFD != 0,
        })
    }

    /// A file or directory that the guest has open.
    fn open_file(&mut self, handle: u64) -> Result<(ShareId, Arc<OwnedFd>), Errno> {
        match self.handle_of(handle)? {
            Handle::File(open) => Ok((open.share, open.file.clone())),
            Handle::Directory { share, file, .. } => Ok((*share, file.clone())),
            Handle::Root => Err(Errno::BADF),
        }
    }

    pub(super) fn getlk(&mut self, body: &mut Input<'_>, reply: &mut Reply) -> Result<(), Errno> {
        self.agreed()?;
        let request = self.lock_request(body)?;
        let kind = request.kind.ok_or(Errno::INVAL)?;
        let found = self.locks.blockers(&request).next();
        let found = match found {
            // -1 is an open file's, which no one process has.
            Some((_, holder, lock)) => {
                let pid = if holder.is_ofd { u32::MAX } else { holder.pid };
                Some((lock, pid))
            }
            None => {
                let key = (request.file, request.owner);
                let other = match self.locks.holders.get(&key) {
                    Some(holder) => host::conflict(&holder.file, request.range, kind)?,
                    None => {
                        let (_, file) = self.open_file(request.handle)?;
                        host::conflict(&file, request.range, kind)?
                    }
                };
                // No process of the guest has it.
                other.map(|lock| (lock, 0))
            }
        };
        let (range, kind, pid) = match found {
            Some(((range, Kind::Read), pid)) => (range, libc::F_RDLCK, pid),
            Some(((range, Kind::Write), pid)) => (range, libc::F_WRLCK, pid),
            None => (request.range, libc::F_UNLCK, 0),
        };
        reply.u64(range.start);
        reply.u64(range.end);
        reply.u32(kind.cast_unsigned());
        reply.u32(pid);
        Ok(())
    }

    /// SETLK and SETLKW. The request to go on with if the lock is not to be had now.
    pub(super) fn setlk(
        &mut self,
        body: &mut Input<'_>,
        waits: bool,
    ) -> Result<Option<Request>, Errno> {
        self.agreed()?;
        let request = self.lock_request(body)?;
        let result = self.lock(&request);
        if request.is_flock {
            // Even if it is refused, it may have given up another lock.
            self.locks.note_released(request.file);
        }
        match result {
            Err(Errno::AGAIN) if waits => Ok(Some(request)),
            other => other.map(|()| None),
        }
    }

    fn agreed(&self) -> Result<(), Errno> {
        if self.locks.agreed {
            Ok(())
        } else {
            Err(Errno::NOSYS)
        }
    }

    /// Locks or unlocks; `EAGAIN` if somebody else's lock is in the way.
    pub(super) fn lock(&mut self, request: &Request) -> Result<(), Errno> {
        if request.is_flock {
            let (_, file) = self.open_file(request.handle)?;
            return host::flock(&file, request.kind);
        }
        let key = (request.file, request.owner);
        let Some(kind) = request.kind else {
            if let Some(holder) = self.locks.holders.get(&key) {
                host::set(&holder.file, request.range, None)?;
                self.set_ranges(request);
            }
            return Ok(());
        };
        self.prepare(request, kind)?;
        // An unlock in the middle makes two ranges of one: that is never refused.
        if self.locks.ranges >= MAX_LOCKED_RANGES {
            return Err(Errno::NOLCK);
        }
        let holder = self.locks.holders.get_mut(&key).ok_or(Errno::NOLCK)?;
        host::set(&holder.file, request.range, Some(kind))?;
        (holder.handle, holder.pid, holder.is_ofd) = (request.handle, request.pid, request.is_ofd);
        self.set_ranges(request);
        Ok(())
    }

    /// Takes down what the host has locked or unlocked.
    fn set_ranges(&mut self, request: &Request) {
        let locks = &mut self.locks;
        if let Some(holder) = locks.holders.get_mut(&(request.file, request.owner)) {
            locks.ranges -= holder.ranges.len();
            holder.ranges.set(request.range, request.kind);
            locks.ranges += holder.ranges.len();
        }
        if request.kind != Some(Kind::Write) {
            locks.note_released(request.file);
        }
    }

    /// Makes sure that the owner has an open file for a lock of this kind.
    fn prepare(&mut self, request: &Request, kind: Kind) -> Result<(), Errno> {
        let key = (request.file, request.owner);
        let lacks = |access: OFlags| match kind {
            Kind::Read => access == OFlags::WRONLY,
            Kind::Write => access == OFlags::RDONLY,
        };
        let Handle::File(open) = self.handle_of(request.handle)? else {
            return Err(Errno::BADF);
        };
        let (share, file) = (open.share, open.file.clone());
        let own = open.flags & OFlags::ACCMODE;
        if lacks(own) {
            // As the guest's kernel should have said.
            return Err(Errno::BADF);
        }
        let Some(holder) = self.locks.holders.get(&key) else {
            if self.locks.holders.len() >= MAX_LOCK_OWNERS
                || self.handles.len() + self.locks.holders.len() >= self.handle_limit
            {
                return Err(Errno::NOLCK);
            }
            // Not for writing what the guest only reads: that would copy a file of a lower layer.
            let (file, access) = if own == OFlags::RDONLY {
                (self.reopen(&file, own)?, own)
            } else {
                match self.reopen(&file, OFlags::RDWR) {
                    Ok(file) => (file, OFlags::RDWR),
                    Err(_) => (self.reopen(&file, own)?, own),
                }
            };
            let holder = Holder {
                share,
                file,
                access,
                handle: request.handle,
                pid: request.pid,
                is_ofd: request.is_ofd,
                ranges: Ranges::default(),
            };
            self.locks.holders.insert(key, holder);
            return Ok(());
        };
        if !lacks(holder.access) {
            return Ok(());
        }
        // The locks that it has are for reading only: another open file can have them, too. Those
        // for writing of a file that could not be opened for reading cannot be moved.
        let better = self.reopen(&file, OFlags::RDWR).map_err(|_| Errno::NOLCK)?;
        for (range, held) in holder.ranges.iter() {
            if held == Kind::Write {
                return Err(Errno::NOLCK);
            }
            host::set(&better, range, Some(held)).map_err(|_| Errno::NOLCK)?;
        }
        if let Some(holder) = self.locks.holders.get_mut(&key) {
            (holder.file, holder.access) = (better, OFlags::RDWR);
        }
        Ok(())
    }

    /// FLUSH: a process closes a file, and with it go all its record locks on the file.
    pub(super) fn flush(&mut self, body: &mut Input<'_>) -> Result<(), Errno> {
        self.agreed()?;
        let handle = body.u64()?;
        let _unused = body.u64()?;
        let owner = body.u64()?;
        let (_, file) = self.open_file(handle)?;
        if self.locks.holders.is_empty() {
            return Ok(());
        }
        let file = FileId::from(&stat_fd(&*file)?);
        if let Some(holder) = self.locks.holders.remove(&(file, owner)) {
            self.locks.ranges -= holder.ranges.len();
            self.locks.note_released(file);
        }
        Ok(())
    }

    /// An open file is released: locks of which it is the owner go. `has_flock`: one of them is of
    /// flock(2).
    pub(super) fn release_locks(&mut self, handle: u64, has_flock: bool) -> Result<(), Errno> {
        if !has_flock && self.locks.holders.is_empty() {
            return Ok(());
        }
        let Ok((_, file)) = self.open_file(handle) else {
            return Ok(());
        };
        let id = FileId::from(&stat_fd(&*file)?);
        if has_flock {
            // A worker may keep the file open for a while.
            host::flock(&file, None)?;
            self.locks.note_released(id);
        }
        let gone: Vec<u64> = (self.locks.of_file(id))
            .filter_map(|(owner, holder)| (holder.handle == handle).then_some(owner))
            .collect();
        for owner in gone {
            if let Some(holder) = self.locks.holders.remove(&(id, owner)) {
                self.locks.ranges -= holder.ranges.len();
                self.locks.note_released(id);
            }
        }
        Ok(())
    }

    /// Whether the guest has locks, which another device would not have.
    pub(super) fn has_locks(&self) -> bool {
        self.locks.ranges > 0
    }
}
