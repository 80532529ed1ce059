//! Operations on names: lookup, create, rename, remove.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use hull_device_control::Cache;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::handles::{Handle, OpenFile};
use super::nodes::{ShareId, stat_fd};
use super::server::{Server, descriptor_name, write_entry};
use super::wire::{self, Header, Input, Reply};

/// The open flags that the guest may choose. `O_DIRECT` is left out: its rules on addresses are
/// those of the host's storage, which the guest cannot know.
const OPEN_FLAGS: OFlags = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

impl Server {
    pub(super) fn lookup(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        if header.node == wire::ROOT {
            return self.lookup_share(name, reply);
        }
        let (share, directory) = self.directory(header.node)?;
        match self.stat_name(&directory, name) {
            Ok(stat) => {
                self.entry(share, header.node, name, &stat, reply)?;
                Ok(())
            }
            Err(Errno::NOENT) => {
                let share = self.shares.get(&share).ok_or(Errno::STALE)?;
                if share.cache == Cache::Shared {
                    return Err(Errno::NOENT);
                }
                // An entry without a node: the guest may cache that the name does not exist.
                reply.u64(0);
                reply.u64(0);
                reply.u64(share.attribute_validity().as_secs());
                reply.zeros(wire::ENTRY_OUT - 24);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn lookup_share(&mut self, name: &CStr, reply: &mut Reply) -> Result<(), Errno> {
        let (id, root) = self
            .shares
            .iter()
            .find(|(_, share)| share.name.as_bytes() == name.to_bytes())
            .map(|(id, share)| (*id, share.root))
            .ok_or(Errno::NOENT)?;
        let stat = self.nodes.stat(root)?;
        // Its node is there already; this counts the lookup.
        let known = self.nodes.remember(&stat, id, wire::ROOT, c"")?;
        let share = self.shares.get(&id).ok_or(Errno::STALE)?;
        // Looked up each time: another share may get this name.
        let (attributes, never) = (share.attributes(&stat), Duration::ZERO);
        write_entry(reply, known, &attributes, never, never);
        Ok(())
    }

    /// Replies with the current entry of `name`; returns its node.
    fn entry_at(
        &mut self,
        share: ShareId,
        directory: &OwnedFd,
        parent: u64,
        name: &CStr,
        reply: &mut Reply,
    ) -> Result<u64, Errno> {
        let stat = self.stat_name(directory, name)?;
        self.entry(share, parent, name, &stat, reply)
    }

    /// Runs `make`, which creates `name` in a directory as the guest's user, and replies with its
    /// entry.
    fn make(
        &mut self,
        header: &Header,
        name: &CStr,
        reply: &mut Reply,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let (share, directory) = self.directory(header.node)?;
        {
            let _assumed = self.credentials.assume(header.uid, header.gid)?;
            make(&directory)?;
        }
        self.entry_at(share, &directory, header.node, name, reply)?;
        Ok(())
    }

    pub(super) fn symlink(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        let target = body.string()?;
        self.make(header, name, reply, |directory| {
            rustix::fs::symlinkat(target, directory, name)
        })
    }

    pub(super) fn mknod(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (mode, device, umask) = (body.u32()?, body.u32()?, body.u32()?);
        body.u32()?;
        let name = body.name()?;
        let kind = match FileType::from_raw_mode(mode) {
            FileType::Unknown if mode & 0o170000 == 0 => FileType::RegularFile,
            FileType::Unknown | FileType::Directory | FileType::Symlink => {
                return Err(Errno::INVAL);
            }
            kind => kind,
        };
        let (major, minor) = wire::decode_device(device);
        self.set_umask(umask);
        self.make(header, name, reply, |directory| {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(directory, name, kind, permissions(mode), device)
        })
    }

    pub(super) fn mkdir(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (mode, umask) = (body.u32()?, body.u32()?);
        let name = body.name()?;
        self.set_umask(umask);
        self.make(header, name, reply, |directory| {
            rustix::fs::mkdirat(directory, name, permissions(mode))
        })
    }

    pub(super) fn remove(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        flags: AtFlags,
    ) -> Result<(), Errno> {
        let name = body.name()?;
        let (share, directory) = self.directory(header.node)?;
        let stat = self.stat_name(&directory, name)?;
        let leaving = self.nodes.leaving(share, &stat, header.node, name);
        let result = rustix::fs::unlinkat(&directory, name, flags);
        if result.is_err()
            && let Some(node) = leaving
        {
            self.nodes.unpin(node);
        }
        result
    }

    pub(super) fn rename(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        has_flags: bool,
    ) -> Result<(), Errno> {
        let to = body.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            flags = RenameFlags::from_bits(body.u32()?).ok_or(Errno::INVAL)?;
            body.u32()?;
        }
        let (old_name, new_name) = (body.name()?, body.name()?);
        let (share, old_directory) = self.directory(header.node)?;
        let (new_share, new_directory) = self.directory(to)?;
        if share != new_share {
            return Err(Errno::XDEV);
        }
        let moving = self.stat_name(&old_directory, old_name)?;
        let replaced = match self.stat_name(&new_directory, new_name) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error),
        };
        let leaving = match &replaced {
            Some(stat) if !flags.intersects(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE) => {
                self.nodes.leaving(share, stat, to, new_name)
            }
            _ => None,
        };
        let result = {
            // A whiteout is a new file.
            let _assumed = if flags.contains(RenameFlags::WHITEOUT) {
                self.credentials.assume(header.uid, header.gid)?
            } else {
                None
            };
            rustix::fs::renameat_with(&old_directory, old_name, &new_directory, new_name, flags)
        };
        if let Err(error) = result {
            if let Some(node) = leaving {
                self.nodes.unpin(node);
            }
            return Err(error);
        }
        self.nodes.moved(share, &moving, to, new_name)?;
        if let Some(stat) = &replaced
            && flags.contains(RenameFlags::EXCHANGE)
        {
            self.nodes.moved(share, stat, header.node, old_name)?;
        }
        Ok(())
    }

    pub(super) fn link(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let old = body.u64()?;
        let name = body.name()?;
        let (share, directory) = self.directory(header.node)?;
        if self.nodes.share(old)? != share {
            return Err(Errno::XDEV);
        }
        if self.nodes.kind(old)? == FileType::Directory {
            return Err(Errno::PERM);
        }
        let fd = self.nodes.open(old)?;
        let mut number = [0; 12];
        rustix::fs::linkat(
            &self.descriptors,
            descriptor_name(&fd, &mut number),
            &directory,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.entry_at(share, &directory, header.node, name, reply)?;
        Ok(())
    }

    pub(super) fn readlink(&mut self, header: &Header, reply: &mut Reply) -> Result<(), Errno> {
        if self.nodes.kind(header.node)? != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let fd = self.nodes.open(header.node)?;
        let target = rustix::fs::readlinkat(&fd, c"", Vec::new())?;
        reply.bytes(target.as_bytes());
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (flags, mode) = (body.u32()?, body.u32()?);
        let (umask, kill) = (body.u32()?, body.u32()?);
        let name = body.name()?;
        let (share, directory) = self.directory(header.node)?;
        let exclusive = OFlags::from_bits_retain(flags).contains(OFlags::EXCL);
        self.set_umask(umask);
        let made = {
            let _assumed = self.credentials.assume(header.uid, header.gid)?;
            // Exclusively, so that no existing file is opened.
            let how = open_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            rustix::fs::openat(&directory, name, how - OFlags::TRUNC, permissions(mode))
        };
        match made {
            Ok(file) => {
                let stat = stat_fd(&file)?;
                let node = self.entry(share, header.node, name, &stat, reply)?;
                let opened = self.opened(share, node, flags, file, reply);
                self.forget_unless(node, opened)
            }
            Err(Errno::EXIST) if !exclusive => {
                let node = self.entry_at(share, &directory, header.node, name, reply)?;
                let opened = self
                    .open_node(header, node, flags, kill)
                    .and_then(|file| self.opened(share, node, flags, file, reply));
                self.forget_unless(node, opened)
            }
            Err(error) => Err(error),
        }
    }

    /// Undoes the lookup that an entry counted when the rest of the operation failed, because the
    /// guest gets no entry then.
    fn forget_unless(&mut self, node: u64, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_err() {
            self.forget(node, 1);
        }
        result
    }

    pub(super) fn tmpfile(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (flags, mode) = (body.u32()?, body.u32()?);
        let umask = body.u32()?;
        let (share, directory) = self.directory(header.node)?;
        self.set_umask(umask);
        let file = {
            let _assumed = self.credentials.assume(header.uid, header.gid)?;
            let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
            let how = open_flags(flags) | OFlags::TMPFILE | exclusive | OFlags::CLOEXEC;
            rustix::fs::openat(&directory, c".", how, permissions(mode))?
        };
        let stat = stat_fd(&file)?;
        // It has no place: it is reached by its descriptor only.
        let path = self.reopen(&file, OFlags::PATH)?;
        let node = self.entry(share, header.node, c"", &stat, reply)?;
        let opened = self
            .nodes
            .pin(node, Some(path))
            .and_then(|()| self.opened(share, node, flags, file, reply));
        self.forget_unless(node, opened)
    }

    pub(super) fn open(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let (flags, kill) = (body.u32()?, body.u32()?);
        let share = self.nodes.share(header.node)?;
        let file = self.open_node(header, header.node, flags, kill)?;
        self.opened(share, header.node, flags, file, reply)
    }

    /// Opens a regular file, never anything else.
    fn open_node(
        &mut self,
        header: &Header,
        node: u64,
        flags: u32,
        kill: u32,
    ) -> Result<OwnedFd, Errno> {
        match self.nodes.kind(node)? {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let fd = self.nodes.open(node)?;
        let flags = open_flags(flags);
        let _kill = if flags.contains(OFlags::TRUNC) && kill & wire::OPEN_KILL_SUIDGID != 0 {
            self.credentials.ordinary(header.gid)?
        } else {
            None
        };
        self.reopen(&fd, flags)
    }

    /// Writes `fuse_open_out` for a file that was just opened.
    fn opened(
        &mut self,
        share: ShareId,
        node: u64,
        flags: u32,
        file: OwnedFd,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let cache = self.shares.get(&share).ok_or(Errno::STALE)?.cache;
        let open = OpenFile::new(share, node, open_flags(flags) - OFlags::TRUNC, file)?;
        let is_made = open.is_made;
        let handle = self.add_handle(Handle::File(open))?;
        reply.u64(handle);
        reply.u32(match cache {
            _ if is_made => wire::fopen::DIRECT_IO,
            Cache::Private | Cache::Brief => wire::fopen::KEEP_CACHE | wire::fopen::NOFLUSH,
            Cache::Shared => 0,
        });
        reply.u32(0);
        Ok(())
    }
}

/// How a file that was opened with `flags` is opened again.
pub(super) fn reopen_flags(flags: OFlags) -> OFlags {
    flags & (OPEN_FLAGS - OFlags::TRUNC)
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

fn open_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) & OPEN_FLAGS
}
