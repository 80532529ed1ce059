//! Operations on a file's metadata: status, ownership, times, extended attributes.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::handles::Handle;
use super::nodes::{device_of, stat_fd};
use super::server::{Server, descriptor_name};
use super::wire::{self, Attributes, Header, Input, Reply, fattr};

/// The largest extended attribute, and the longest list of names, that Linux has.
const MAX_XATTR: u32 = 64 << 10;

impl Server {
    /// The status that the guest asks for, by handle if it names one.
    fn status(&mut self, node: u64, handle: Option<u64>) -> Result<Statx, Errno> {
        match handle {
            None => self.nodes.stat(node),
            Some(handle) => match self.handle_of(handle)? {
                Handle::File(open) => stat_fd(&open.file),
                Handle::Directory { file, .. } => stat_fd(&*file),
                Handle::Root => Err(Errno::STALE),
            },
        }
    }

    pub(super) fn getattr(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let handle = named_handle(body)?;
        if header.node == wire::ROOT {
            reply.zeros(16);
            reply.attributes(&self.root_attributes());
            return Ok(());
        }
        let stat = self.status(header.node, handle)?;
        self.attributes(header.node, &stat, reply)
    }

    /// Writes `fuse_attr_out`.
    fn attributes(&self, node: u64, stat: &Statx, reply: &mut Reply) -> Result<(), Errno> {
        let (_, share) = self.share_of(node)?;
        let validity = share.attribute_validity();
        reply.u64(validity.as_secs());
        reply.u32(validity.subsec_nanos());
        reply.u32(0);
        reply.attributes(&share.attributes(stat));
        Ok(())
    }

    /// The root, which holds the shares and nothing else.
    pub(super) fn root_attributes(&self) -> Attributes {
        Attributes {
            inode: wire::ROOT,
            mode: 0o040555,
            links: 2,
            block_size: 4096,
            ..Attributes::default()
        }
    }

    pub(super) fn statx(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let handle = named_handle(body)?;
        if header.node == wire::ROOT {
            // It has no creation time.
            return Err(Errno::NOSYS);
        }
        let stat = self.status(header.node, handle)?;
        let (_, share) = self.share_of(header.node)?;
        let validity = share.attribute_validity();
        reply.u64(validity.as_secs());
        reply.u32(validity.subsec_nanos());
        reply.u32(0);
        reply.zeros(16);
        // `struct fuse_statx` is `struct statx`.
        reply.u32(stat.stx_mask);
        reply.u32(stat.stx_blksize);
        reply.u64(0);
        reply.u32(stat.stx_nlink);
        reply.u32(stat.stx_uid);
        reply.u32(stat.stx_gid);
        reply.u16(stat.stx_mode);
        reply.u16(0);
        reply.u64(share.inode(device_of(&stat), stat.stx_ino));
        reply.u64(stat.stx_size);
        reply.u64(stat.stx_blocks);
        reply.u64(0);
        for time in [
            &stat.stx_atime,
            &stat.stx_btime,
            &stat.stx_ctime,
            &stat.stx_mtime,
        ] {
            reply.u64(time.tv_sec.cast_unsigned());
            reply.u32(time.tv_nsec);
            reply.u32(0);
        }
        reply.u32(stat.stx_rdev_major);
        reply.u32(stat.stx_rdev_minor);
        reply.u32(stat.stx_dev_major);
        reply.u32(stat.stx_dev_minor);
        reply.zeros(14 * 8);
        Ok(())
    }

    pub(super) fn setattr(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let valid = body.u32()?;
        body.u32()?;
        let handle = body.u64()?;
        let size = body.u64()?;
        let _lock_owner = body.u64()?;
        let (access, modification) = (body.u64()?, body.u64()?);
        let _change = body.u64()?;
        let (access_nanos, modification_nanos) = (body.u32()?, body.u32()?);
        let _change_nanos = body.u32()?;
        let mode = body.u32()?;
        body.u32()?;
        let (uid, gid) = (body.u32()?, body.u32()?);
        if header.node == wire::ROOT {
            return Err(Errno::ROFS);
        }
        let kind = self.nodes.kind(header.node)?;
        let fd = self.nodes.open(header.node)?;

        // Even a `chown` without a change touches the time of change and set-id bits. The guest's
        // kernel lets every user do that.
        let known =
            fattr::MODE | fattr::UID | fattr::GID | fattr::SIZE | fattr::ATIME | fattr::MTIME;
        let touch = valid & known == 0 && (header.uid == 0 || stat_fd(&fd)?.stx_uid == header.uid);
        // Ownership first: changing it clears set-id bits that the mode may set again.
        if valid & (fattr::UID | fattr::GID) != 0 || touch {
            let uid = (valid & fattr::UID != 0).then(|| id(uid)).transpose()?;
            let gid = (valid & fattr::GID != 0).then(|| id(gid)).transpose()?;
            rustix::fs::chownat(
                &fd,
                c"",
                uid.map(Uid::from_raw),
                gid.map(Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if valid & fattr::MODE != 0 {
            if kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mut number = [0; 12];
            let name = descriptor_name(&fd, &mut number);
            let mode = Mode::from_raw_mode(mode & 0o7777);
            rustix::fs::chmodat(&self.descriptors, name, mode, AtFlags::empty())?;
        }
        if valid & fattr::SIZE != 0 {
            let handle = (valid & fattr::FH != 0).then_some(handle);
            let ordinary = (valid & fattr::KILL_SUIDGID != 0).then_some(header.gid);
            self.truncate(&fd, kind, handle, size, ordinary)?;
        }
        if valid & (fattr::ATIME | fattr::MTIME) != 0 {
            let time = |bit, now_bit, seconds: u64, nanos: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: if valid & bit == 0 {
                    UTIME_OMIT
                } else if valid & now_bit != 0 {
                    UTIME_NOW
                } else {
                    nanos.min(999_999_999).into()
                },
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, access, access_nanos),
                last_modification: time(
                    fattr::MTIME,
                    fattr::MTIME_NOW,
                    modification,
                    modification_nanos,
                ),
            };
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(&fd, c"", &times, flags)?;
        }
        let stat = stat_fd(&fd)?;
        self.attributes(header.node, &stat, reply)
    }

    fn truncate(
        &mut self,
        fd: &OwnedFd,
        kind: FileType,
        handle: Option<u64>,
        size: u64,
        ordinary: Option<u32>,
    ) -> Result<(), Errno> {
        if kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let open = match handle {
            Some(handle) => self.file_of(handle)?.file.clone(),
            None => self.reopen(fd, OFlags::WRONLY)?.into(),
        };
        let _ordinary = match ordinary {
            Some(gid) => self.credentials.ordinary(gid)?,
            None => None,
        };
        rustix::fs::ftruncate(&open, size)
    }

    pub(super) fn statfs(&mut self, header: &Header, reply: &mut Reply) -> Result<(), Errno> {
        if header.node == wire::ROOT {
            reply.zeros(40);
            reply.u32(4096);
            reply.u32(255);
            reply.u32(4096);
            reply.zeros(28);
            return Ok(());
        }
        let fd = self.nodes.open(header.node)?;
        let stat = rustix::fs::fstatvfs(&fd)?;
        reply.u64(stat.f_blocks);
        reply.u64(stat.f_bfree);
        reply.u64(stat.f_bavail);
        reply.u64(stat.f_files);
        reply.u64(stat.f_ffree);
        reply.u32(u32::try_from(stat.f_bsize).unwrap_or(4096));
        reply.u32(u32::try_from(stat.f_namemax).unwrap_or(255));
        reply.u32(u32::try_from(stat.f_frsize).unwrap_or(4096));
        reply.zeros(28);
        Ok(())
    }

    /// The path for access to a node's extended attributes: the calls that take descriptors refuse
    /// those opened with O_PATH. It leads to the file itself, even if that is a symbolic link.
    fn xattr_path(&mut self, node: u64) -> Result<(std::sync::Arc<OwnedFd>, String), Errno> {
        use std::os::fd::AsRawFd;
        if node == wire::ROOT {
            // It has none, and the guest asks for access control lists whenever a user traverses
            // it.
            return Err(Errno::NODATA);
        }
        let fd = self.nodes.open(node)?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        Ok((fd, path))
    }

    pub(super) fn setxattr(&mut self, header: &Header, body: &mut Input<'_>) -> Result<(), Errno> {
        if header.node == wire::ROOT {
            return Err(Errno::ROFS);
        }
        let (size, flags) = (body.u32()?, body.u32()?);
        let more_flags = body.u32()?;
        body.u32()?;
        let name = body.string()?;
        let value = body.bytes(size as usize)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let name = &*on_host(name)?.ok_or(Errno::PERM)?;
        let (_fd, path) = self.xattr_path(header.node)?;
        let _kill = if more_flags & wire::SETXATTR_ACL_KILL_SGID != 0 {
            self.credentials.ordinary(header.gid)?
        } else {
            None
        };
        rustix::fs::setxattr(path, name, value, flags)
    }

    pub(super) fn getxattr(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let size = body.u32()?;
        body.u32()?;
        let name = &*on_host(body.string()?)?.ok_or(Errno::NODATA)?;
        let (_fd, path) = self.xattr_path(header.node)?;
        if size == 0 {
            write_size(rustix::fs::getxattr_query(path, name)?, reply);
            return Ok(());
        }
        let mut value = vec![0; size.min(MAX_XATTR) as usize];
        let length = rustix::fs::getxattr(path, name, &mut value[..])?;
        reply.bytes(value.get(..length).ok_or(Errno::IO)?);
        Ok(())
    }

    pub(super) fn listxattr(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        let size = body.u32()?;
        let mut names = Vec::new();
        if header.node != wire::ROOT {
            let (_fd, path) = self.xattr_path(header.node)?;
            let mut list = vec![0; MAX_XATTR as usize];
            let length = rustix::fs::listxattr(path, &mut list[..])?;
            for name in list[..length.min(list.len())].split_inclusive(|byte| *byte == 0) {
                names.extend(in_guest(name, header.uid));
            }
        }
        if size == 0 {
            write_size(names.len(), reply);
        } else if names.len() > size as usize {
            return Err(Errno::RANGE);
        } else {
            reply.bytes(&names);
        }
        Ok(())
    }

    pub(super) fn removexattr(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
    ) -> Result<(), Errno> {
        let name = &*on_host(body.string()?)?.ok_or(Errno::NODATA)?;
        let (_fd, path) = self.xattr_path(header.node)?;
        rustix::fs::removexattr(path, name)
    }
}

/// `fuse_getxattr_out`: the answer to a request of size 0.
fn write_size(size: usize, reply: &mut Reply) {
    // At most MAX_XATTR.
    reply.u32(size as u32);
    reply.u32(0);
}

/// Start of `GETATTR` and `STATX`: the handle, if the guest names one.
fn named_handle(body: &mut Input<'_>) -> Result<Option<u64>, Errno> {
    let flags = body.u32()?;
    body.u32()?;
    let handle = body.u64()?;
    Ok((flags & wire::GETATTR_FH != 0).then_some(handle))
}

/// A user or group number; rejects -1, which means "no change" to the host.
fn id(id: u32) -> Result<u32, Errno> {
    if id == u32::MAX {
        Err(Errno::INVAL)
    } else {
        Ok(id)
    }
}

/// Attributes of the class "trusted" are for the guest's administrator. The host's own are not the
/// guest's to read or write (overlayfs believes what they say), so the guest's have other names on
/// the host, which the guest cannot use.
const TRUSTED: &[u8] = b"trusted.";
const TRUSTED_ON_HOST: &[u8] = b"user.hull.trusted.";
/// The longest name that Linux has.
const MAX_NAME: usize = 255;

/// The host's name of a guest's attribute; `None` if the guest cannot have it.
fn on_host(name: &CStr) -> Result<Option<Cow<'_, CStr>>, Errno> {
    let bytes = name.to_bytes();
    if bytes.starts_with(TRUSTED_ON_HOST) {
        return Ok(None);
    }
    let Some(rest) = bytes.strip_prefix(TRUSTED) else {
        return Ok(Some(Cow::Borrowed(name)));
    };
    let name = [TRUSTED_ON_HOST, rest].concat();
    if name.len() > MAX_NAME {
        return Err(Errno::RANGE);
    }
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    Ok(Some(Cow::Owned(name)))
}

/// What a guest's user is told for an entry of the host's list of names, if anything.
fn in_guest(name: &[u8], uid: u32) -> Vec<u8> {
    if let Some(rest) = name.strip_prefix(TRUSTED_ON_HOST) {
        return match uid {
            0 => [TRUSTED, rest].concat(),
            _ => Vec::new(),
        };
    }
    match name.starts_with(TRUSTED) {
        true => Vec::new(),
        false => name.to_vec(),
    }
}
