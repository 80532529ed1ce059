//! Serves FUSE messages: decoding, dispatch, encoding. The operations are in [`names`], [`files`],
//! [`attributes`], [`directories`] and [`watches`], as further methods of [`Server`].
//!
//! One thread owns all of it. Operations that may take long are returned as [`Work`] for the
//! device's workers.
//!
//! [`names`]: super::names
//! [`files`]: super::files
//! [`attributes`]: super::attributes
//! [`directories`]: super::directories
//! [`watches`]: super::watches

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hull_device_control::Cache;
use rustix::fs::{FileType, Mode, OFlags, Statx};
use rustix::io::Errno;

use super::credentials::Credentials;
use super::handles::{Handle, OpenFile};
use super::locks::{self, Locks};
use super::nodes::{Known, Nodes, ShareId, device_of, stat_at};
use super::slab::Slab;
use super::watches::Watches;
use super::wire::{self, Attributes, Header, Input, Reply, init};
use super::work::Work;
use crate::buffers::Buffers;

/// The longest body of a message besides the data of a write: the largest extended attribute and
/// its name.
const MAX_BODY: usize = 68 << 10;
/// Bytes of one read or write.
const MAX_TRANSFER: u32 = 1 << 20;
const PAGE: u32 = 4096;
/// Short: starting a program takes longer, so it sees earlier changes by the host. Long enough for
/// many files of one directory.
const MOMENT: Duration = Duration::from_millis(10);
/// The same for what a list of a directory brings: long enough to look at all entries of one reply,
/// some hundred. hull's guest kernel looks up a file that is opened all the same.
const LISTED_VALIDITY: Duration = Duration::from_millis(50);

/// A directory of the host in the device's root.
pub struct Share {
    pub name: String,
    pub root: u64,
    pub cache: Cache,
    /// Number of the host's device that the root is on.
    pub(super) device: u64,
    /// Distinguishes its inode numbers from those of other shares.
    pub(super) salt: u64,
}

impl Share {
    /// An inode number for the guest, which sees one device where the host has several: numbers of
    /// other shares and of other devices within a share must not look like those of the same file.
    pub fn inode(&self, device: u64, inode: u64) -> u64 {
        let foreign = if device == self.device {
            0
        } else {
            // A hash of the device number that is not 0.
            device.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52 | 1
        };
        inode ^ (self.salt ^ foreign) << 48
    }

    /// The attributes of a file of the share as the guest sees them.
    pub fn attributes(&self, stat: &Statx) -> Attributes {
        Attributes {
            inode: self.inode(device_of(stat), stat.stx_ino),
            ..Attributes::from(stat)
        }
    }

    /// Cache validity of a name, for a file of this mode.
    ///
    /// A file that the host may change is looked up each time it is used by name. Directories on
    /// its path are not: that would be a request for every component of every path.
    pub fn name_validity(&self, mode: u32) -> Duration {
        match self.cache {
            Cache::Shared if mode & 0o170000 != 0o040000 => Duration::ZERO,
            _ => self.attribute_validity(),
        }
    }

    /// The same, with the attributes, in the list of a directory.
    pub fn listed_validity(&self, mode: u32) -> Duration {
        match (self.cache, mode & 0o170000) {
            // Followed, and walked through, without a further request.
            (Cache::Shared, 0o120000 | 0o040000) => self.name_validity(mode),
            (Cache::Shared, _) => LISTED_VALIDITY,
            _ => self.attribute_validity(),
        }
    }

    /// Cache validity of attributes. A lookup returns them as well, so in a share that the host may
    /// change this matters for directories and open files only.
    pub fn attribute_validity(&self) -> Duration {
        match self.cache {
            Cache::Private => Duration::from_secs(86_400),
            Cache::Brief => Duration::from_secs(1),
            Cache::Shared => MOMENT,
        }
    }
}

/// How a message is answered.
pub enum Outcome {
    /// Answered, with this many bytes written.
    Done(usize),
    /// Answered later, by a worker.
    Later { unique: u64, work: Work },
    /// Answered when the lock is to be had, or after a while.
    Wait { unique: u64, lock: locks::Request },
    /// Answered when a watched file has changed, or if it is the `last` such request, at once.
    Events { unique: u64, last: bool },
}

/// State of the file system.
pub struct Server {
    pub(super) nodes: Nodes,
    pub(super) shares: BTreeMap<ShareId, Share>,
    pub(super) next_share: ShareId,
    pub(super) handles: Slab<Handle>,
    pub(super) handle_limit: usize,
    pub(super) credentials: Credentials,
    pub(super) locks: Locks,
    pub(super) watches: Watches,
    umask: Option<u32>,
    /// `/proc/self/fd`, through which descriptors are reopened.
    pub(super) descriptors: OwnedFd,
    body: Vec<u8>,
    reply: Reply,
}

impl Server {
    /// A file system without shares, for a process that may have `descriptor_limit` descriptors
    /// open.
    pub fn new(descriptor_limit: usize) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            // An eighth for the cache, an eighth for files without a name, an eighth for the rest
            // of the process, and the others for files that the guest has open.
            nodes: Nodes::new((descriptor_limit / 8).min(8 << 10), descriptor_limit / 8),
            handle_limit: descriptor_limit / 8 * 5,
            shares: BTreeMap::new(),
            next_share: 0,
            handles: Slab::new(),
            credentials: Credentials::new(),
            locks: Locks::default(),
            watches: Watches::default(),
            umask: None,
            descriptors: rustix::fs::open(c"/proc/self/fd", flags, Mode::empty())?,
            body: Vec::new(),
            reply: Reply::default(),
        })
    }

    /// Adds a directory to the root. A name that is taken is an error (`EEXIST`), as is a bad one
    /// (`EINVAL`).
    pub fn add_share(&mut self, name: &str, directory: OwnedFd, cache: Cache) -> Result<(), Errno> {
        if name.is_empty()
            || name.len() > 255
            || name.contains(['/', '\0'])
            || name.starts_with('.')
        {
            return Err(Errno::INVAL);
        }
        if self.shares.values().any(|share| share.name == name) {
            return Err(Errno::EXIST);
        }
        let stat = super::nodes::stat_fd(&directory)?;
        if stat.stx_mode & 0o170000 != 0o040000 {
            return Err(Errno::NOTDIR);
        }
        let id = self.next_share;
        let root = self.nodes.add_root(id, directory)?;
        self.next_share += 1;
        let share = Share {
            name: name.to_owned(),
            root,
            cache,
            device: device_of(&stat),
            salt: Self::salt(id),
        };
        self.shares.insert(id, share);
        Ok(())
    }

    /// The salt of a share's inode numbers. The first share's are the host's, for old programs that
    /// take no more than 32 bits.
    pub(super) fn salt(id: ShareId) -> u64 {
        u64::from(id % (1 << 15))
    }

    /// Removes a share, and closes every descriptor on it.
    pub fn remove_share(&mut self, name: &str) -> Result<(), Errno> {
        let id = self
            .shares
            .iter()
            .find_map(|(id, share)| (share.name == name).then_some(*id))
            .ok_or(Errno::NOENT)?;
        self.shares.remove(&id);
        self.unwatch_share(id);
        self.nodes.remove_share(id);
        self.locks.remove_share(id);
        // The guest's handles keep their numbers, so that these are not reused, but refer to no
        // file.
        for handle in self.handles.iter_mut() {
            match handle {
                Handle::File(OpenFile { share, .. }) | Handle::Directory { share, .. }
                    if *share == id =>
                {
                    *handle = Handle::Root;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The file (`O_PATH`) of a node that is a socket.
    pub fn find_socket(&mut self, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.nodes.kind(node)? {
            FileType::Socket => self.nodes.open(node),
            _ => Err(Errno::NOTSOCK),
        }
    }

    /// The driver has reset the device: the next one starts without files.
    pub fn reset(&mut self) {
        self.handles = Slab::new();
        self.locks.clear();
        self.watches.clear();
        self.nodes.clear();
    }

    /// Answers one message.
    pub fn handle(&mut self, buffers: &mut Buffers<'_>) -> Outcome {
        let mut header = [0; wire::HEADER_IN];
        if buffers.readable.take_exact(&mut header).is_none() {
            return Outcome::Done(0);
        }
        let header = Header::parse(&header);
        let mut body = std::mem::take(&mut self.body);
        let mut reply = std::mem::take(&mut self.reply);
        let result = self.answer(&header, buffers, &mut body, &mut reply);
        let outcome = match result {
            Ok(Answer::None) => Outcome::Done(0),
            Ok(Answer::Later(work)) => Outcome::Later {
                unique: header.unique,
                work,
            },
            Ok(Answer::Wait(lock)) => Outcome::Wait {
                unique: header.unique,
                lock,
            },
            Ok(Answer::Events { last }) => Outcome::Events {
                unique: header.unique,
                last,
            },
            Ok(Answer::Data(length)) => Outcome::Done(length),
            Ok(Answer::Reply) => send(buffers, &mut reply, header.unique, Ok(())),
            Err(error) => send(buffers, &mut reply, header.unique, Err(error)),
        };
        self.body = body;
        self.reply = reply;
        self.receive_own_events(&header);
        outcome
    }

    fn answer(
        &mut self,
        header: &Header,
        buffers: &mut Buffers<'_>,
        body: &mut Vec<u8>,
        reply: &mut Reply,
    ) -> Result<Answer, Errno> {
        match header.opcode {
            wire::READ => return self.read(header, buffers),
            wire::WRITE => return self.write(header, buffers, reply),
            _ => {}
        }
        // Without room for an answer, only messages without an answer are served.
        let one_way = matches!(
            header.opcode,
            wire::FORGET | wire::BATCH_FORGET | wire::INTERRUPT
        );
        if !one_way && buffers.writable.remaining() < wire::HEADER_OUT {
            return Ok(Answer::None);
        }
        let length = (header.length as usize)
            .checked_sub(wire::HEADER_IN)
            .ok_or(Errno::INVAL)?
            .min(buffers.readable.remaining());
        if length > MAX_BODY {
            return Err(Errno::INVAL);
        }
        body.resize(length, 0);
        buffers.readable.copy_to(body);
        reply.clear();
        let room = buffers.writable.remaining();
        self.call(header, Input(body), reply, room)
    }

    fn call(
        &mut self,
        header: &Header,
        mut body: Input<'_>,
        reply: &mut Reply,
        room: usize,
    ) -> Result<Answer, Errno> {
        let body = &mut body;
        match header.opcode {
            wire::FORGET => {
                self.forget(header.node, body.u64().unwrap_or(0));
                return Ok(Answer::None);
            }
            wire::BATCH_FORGET => {
                self.batch_forget(body);
                return Ok(Answer::None);
            }
            wire::INTERRUPT => return Ok(Answer::None),
            wire::FSYNC | wire::FSYNCDIR => return self.fsync(body).map(Answer::Later),
            wire::SYNCFS => return self.syncfs(header).map(Answer::Later),
            wire::FALLOCATE => return self.fallocate(header, body).map(Answer::Later),
            wire::COPY_FILE_RANGE => return self.copy_file_range(header, body).map(Answer::Later),
            wire::SETLK | wire::SETLKW => {
                let waits = header.opcode == wire::SETLKW;
                return Ok(self.setlk(body, waits)?.map_or(Answer::Reply, Answer::Wait));
            }
            wire::EVENTS if self.watches.agreed => {
                return self.wants_events(body).map(|last| Answer::Events { last });
            }
            wire::WATCH if self.watches.agreed => self.watch(header.node),
            wire::GETLK => self.getlk(body, reply),
            wire::FLUSH => self.flush(body),
            wire::INIT => self.init(body, reply),
            wire::DESTROY => {
                self.reset();
                Ok(())
            }
            wire::LOOKUP => self.lookup(header, body, reply),
            wire::SYMLINK => self.symlink(header, body, reply),
            wire::MKNOD => self.mknod(header, body, reply),
            wire::MKDIR => self.mkdir(header, body, reply),
            wire::UNLINK => self.remove(header, body, rustix::fs::AtFlags::empty()),
            wire::RMDIR => self.remove(header, body, rustix::fs::AtFlags::REMOVEDIR),
            wire::RENAME => self.rename(header, body, false),
            wire::RENAME2 => self.rename(header, body, true),
            wire::LINK => self.link(header, body, reply),
            wire::READLINK => self.readlink(header, reply),
            wire::CREATE => self.create(header, body, reply),
            wire::TMPFILE => self.tmpfile(header, body, reply),
            wire::OPEN => self.open(header, body, reply),
            wire::RELEASE | wire::RELEASEDIR => self.release(body),
            wire::LSEEK => self.lseek(body, reply),
            wire::GETATTR => self.getattr(header, body, reply),
            wire::STATX => self.statx(header, body, reply),
            wire::SETATTR => self.setattr(header, body, reply),
            wire::STATFS => self.statfs(header, reply),
            wire::SETXATTR => self.setxattr(header, body),
            wire::GETXATTR => self.getxattr(header, body, reply),
            wire::LISTXATTR => self.listxattr(header, body, reply),
            wire::REMOVEXATTR => self.removexattr(header, body),
            wire::OPENDIR => self.opendir(header, reply),
            wire::READDIR => self.readdir(header, body, reply, room, false),
            wire::READDIRPLUS => self.readdir(header, body, reply, room, true),
            wire::IOCTL => Err(Errno::NOTTY),
            _ => Err(Errno::NOSYS),
        }?;
        Ok(Answer::Reply)
    }

    fn init(&mut self, body: &mut Input<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (major, _minor) = (body.u32()?, body.u32()?);
        let (readahead, flags) = (body.u32()?, body.u32()?);
        self.reset();
        reply.u32(wire::MAJOR);
        reply.u32(wire::MINOR);
        if major != wire::MAJOR {
            // The guest tries again with a version that both support.
            return Ok(());
        }
        let mut offered = u64::from(flags);
        if offered & init::INIT_EXT != 0 {
            offered |= u64::from(body.u32()?) << 32;
        }
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DONT_MASK
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::POSIX_ACL
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT;
        // Without it a process that waits for a lock could not be killed, and each close would be a
        // request: the guest keeps its locks to itself then.
        self.locks.agreed = offered & init::LOCK_WAIT != 0;
        if self.locks.agreed {
            wanted |= init::POSIX_LOCKS | init::FLOCK_LOCKS | init::LOCK_WAIT;
        }
        self.watches.agreed = offered & init::HOST_EVENTS != 0;
        if self.watches.agreed {
            // hull's kernel says who asks also on mounts with mapped ids
            // (guest/kernel/patches/fuse-who-asks.patch).
            wanted |= init::HOST_EVENTS | init::ALLOW_IDMAP;
        }
        let agreed = wanted & offered;
        reply.u32(readahead);
        reply.u32(agreed as u32);
        // Limits of background requests: readahead and delayed writes.
        reply.u16(64);
        reply.u16(48);
        reply.u32(MAX_TRANSFER);
        // Granularity of times, in nanoseconds.
        reply.u32(1);
        reply.u16((MAX_TRANSFER / PAGE) as u16);
        reply.u16(0);
        reply.u32((agreed >> 32) as u32);
        reply.zeros(28);
        Ok(())
    }

    fn batch_forget(&mut self, body: &mut Input<'_>) {
        let Ok(count) = body.u32() else { return };
        // Padding. If it is missing, the loop below ends at once.
        let _ = body.u32();
        // Ends with the body at the latest.
        for _ in 0..count {
            let (Ok(node), Ok(lookups)) = (body.u64(), body.u64()) else {
                return;
            };
            self.forget(node, lookups);
        }
    }

    /// The share that a node is in.
    pub(super) fn share_of(&self, node: u64) -> Result<(ShareId, &Share), Errno> {
        let id = self.nodes.share(node)?;
        Ok((id, self.shares.get(&id).ok_or(Errno::STALE)?))
    }

    /// A directory of a share that the guest names as parent.
    pub(super) fn directory(&mut self, node: u64) -> Result<(ShareId, Arc<OwnedFd>), Errno> {
        if node == wire::ROOT {
            // Only the host adds and removes shares.
            return Err(Errno::ROFS);
        }
        if self.nodes.kind(node)? != rustix::fs::FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok((self.nodes.share(node)?, self.nodes.open(node)?))
    }

    /// Opens the file that `fd` (`O_PATH`) refers to.
    pub(super) fn reopen(&self, fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mut name = [0; 12];
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        rustix::fs::openat(
            &self.descriptors,
            descriptor_name(fd, &mut name),
            flags,
            Mode::empty(),
        )
    }

    /// Writes `fuse_entry_out` for `name` in `parent`, which now counts as looked up.
    pub(super) fn entry(
        &mut self,
        share: ShareId,
        parent: u64,
        name: &CStr,
        stat: &Statx,
        reply: &mut Reply,
    ) -> Result<u64, Errno> {
        self.entry_valid_for(share, parent, name, stat, reply, |share, mode| {
            (share.name_validity(mode), share.attribute_validity())
        })
    }

    /// The same for an entry of a list.
    pub(super) fn listed_entry(
        &mut self,
        share: ShareId,
        parent: u64,
        name: &CStr,
        stat: &Statx,
        reply: &mut Reply,
    ) -> Result<u64, Errno> {
        self.entry_valid_for(share, parent, name, stat, reply, |share, mode| {
            let validity = share.listed_validity(mode);
            (validity, validity)
        })
    }

    /// `validity` of name and attributes, for a share and a mode.
    fn entry_valid_for(
        &mut self,
        share: ShareId,
        parent: u64,
        name: &CStr,
        stat: &Statx,
        reply: &mut Reply,
        validity: impl FnOnce(&Share, u32) -> (Duration, Duration),
    ) -> Result<u64, Errno> {
        let known = self.nodes.remember(stat, share, parent, name)?;
        let share = self.shares.get(&share).ok_or(Errno::STALE)?;
        let attributes = share.attributes(stat);
        let (names, validity) = validity(share, attributes.mode);
        write_entry(reply, known, &attributes, names, validity);
        Ok(known.id)
    }

    /// Sets the umask for new files. Only this thread of the process creates files.
    pub(super) fn set_umask(&mut self, umask: u32) {
        if self.umask != Some(umask) {
            rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
            self.umask = Some(umask);
        }
    }

    /// Adds a handle; returns its number.
    pub(super) fn add_handle(&mut self, handle: Handle) -> Result<u64, Errno> {
        let limit = self.handle_limit.saturating_sub(self.locks.open_files());
        self.handles
            .insert(handle, limit)
            .map(u64::from)
            .ok_or(Errno::NFILE)
    }

    pub(super) fn handle_of(&mut self, number: u64) -> Result<&mut Handle, Errno> {
        u32::try_from(number)
            .ok()
            .and_then(|number| self.handles.get_mut(number))
            .ok_or(Errno::BADF)
    }

    pub(super) fn file_of(&mut self, number: u64) -> Result<&mut OpenFile, Errno> {
        match self.handle_of(number)? {
            Handle::File(file) => Ok(file),
            _ => Err(Errno::BADF),
        }
    }

    /// The status of `name` in a directory of a share.
    pub(super) fn stat_name(&self, directory: &OwnedFd, name: &CStr) -> Result<Statx, Errno> {
        stat_at(directory, name)
    }
}

/// How an operation is answered.
pub enum Answer {
    /// Sends the reply.
    Reply,
    /// Sends this many bytes, which are in place already.
    Data(usize),
    /// Answers later.
    Later(Work),
    /// Answers when the lock is to be had.
    Wait(locks::Request),
    /// Answers when a watched file has changed, or if this is the `last` such request, at once.
    Events { last: bool },
    /// Sends no answer.
    None,
}

fn send(
    buffers: &mut Buffers<'_>,
    reply: &mut Reply,
    unique: u64,
    result: Result<(), Errno>,
) -> Outcome {
    let bytes = reply.finish(unique, result);
    if bytes.len() > buffers.writable.remaining() {
        // The answer does not fit: the driver gets an error instead.
        let bytes = reply.finish(unique, Err(Errno::INVAL));
        return Outcome::Done(buffers.writable.copy_from(bytes));
    }
    Outcome::Done(buffers.writable.copy_from(bytes))
}

/// `fuse_entry_out`.
pub fn write_entry(
    reply: &mut Reply,
    known: Known,
    attributes: &Attributes,
    names: Duration,
    validity: Duration,
) {
    reply.u64(known.id);
    reply.u64(known.generation);
    reply.u64(names.as_secs());
    reply.u64(validity.as_secs());
    reply.u32(names.subsec_nanos());
    reply.u32(validity.subsec_nanos());
    reply.attributes(attributes);
}

/// The name of a descriptor in `/proc/self/fd`.
pub fn descriptor_name<'a>(fd: &OwnedFd, space: &'a mut [u8; 12]) -> &'a CStr {
    use std::io::Write;
    // Ten digits and a NUL fit.
    let _ = write!(&mut space[..], "{}\0", fd.as_raw_fd());
    CStr::from_bytes_until_nul(space).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIRECTORY: u32 = 0o040755;
    const FILE: u32 = 0o100644;

    fn share(cache: Cache) -> Share {
        Share {
            name: "share".into(),
            root: 2,
            cache,
            device: 1,
            salt: 0,
        }
    }

    #[test]
    fn a_file_that_the_host_may_change_is_asked_for_by_name_each_time() {
        let shared = share(Cache::Shared);
        assert_eq!(shared.name_validity(FILE), Duration::ZERO);
        assert_eq!(shared.name_validity(0o120777), Duration::ZERO);
        assert_eq!(shared.name_validity(DIRECTORY), MOMENT);
        assert_eq!(shared.attribute_validity(), MOMENT);
        assert!(MOMENT < Duration::from_millis(20));
        assert!(shared.listed_validity(FILE) < Duration::from_millis(100));
        assert_eq!(shared.listed_validity(0o120777), Duration::ZERO);
        assert_eq!(shared.listed_validity(DIRECTORY), MOMENT);
    }

    #[test]
    fn what_only_the_guest_changes_is_asked_for_once() {
        let private = share(Cache::Private);
        for mode in [FILE, DIRECTORY] {
            assert!(private.name_validity(mode) > Duration::from_secs(3600));
        }
    }
}
