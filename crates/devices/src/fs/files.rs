//! Operations on open files.

use std::os::fd::AsFd;

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::handles::Handle;
use super::server::{Answer, Server};
use super::wire::{self, Header, Input, Reply};
use super::work::Work;
use crate::buffers::{Buffers, Span};

/// Reads of this size or more go to the workers where the host cannot tell whether they block.
const BULK: usize = 32 << 10;
/// Size of `fuse_read_in` and `fuse_write_in`.
const TRANSFER_IN: usize = 40;

impl Server {
    pub(super) fn read(
        &mut self,
        header: &Header,
        buffers: &mut Buffers<'_>,
    ) -> Result<Answer, Errno> {
        let mut body = [0; TRANSFER_IN];
        take(&mut buffers.readable, &mut body)?;
        let mut body = Input(&body);
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let open = self.file_of(handle)?;
        let mut data = buffers.writable.split_off(wire::HEADER_OUT);
        let count = (size as usize).min(data.remaining());
        // Data in the host's page cache is read at once; other reads would block this thread. Where
        // the host cannot tell (overlayfs), only small reads are done here.
        let mut read = Err(Errno::OPNOTSUPP);
        if open.can_poll {
            read = data.read_cached(open.file.as_fd(), count, offset);
            open.can_poll = read != Err(Errno::OPNOTSUPP);
        }
        if read == Err(Errno::OPNOTSUPP) && count < BULK {
            read = data.read_from(open.file.as_fd(), count, offset);
        }
        match read {
            Ok(length) => {
                let header = wire::header_out(wire::HEADER_OUT + length, 0, header.unique);
                return Ok(Answer::Data(buffers.writable.copy_from(&header) + length));
            }
            Err(Errno::AGAIN | Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        Ok(Answer::Later(Work::Read {
            file: open.file.clone(),
            offset,
            count,
        }))
    }

    pub(super) fn write(
        &mut self,
        header: &Header,
        buffers: &mut Buffers<'_>,
        reply: &mut Reply,
    ) -> Result<Answer, Errno> {
        let mut body = [0; TRANSFER_IN];
        take(&mut buffers.readable, &mut body)?;
        let mut body = Input(&body);
        let (handle, offset) = (body.u64()?, body.u64()?);
        let (size, flags) = (body.u32()? as usize, body.u32()?);
        if size > buffers.readable.remaining() {
            return Err(Errno::INVAL);
        }
        let file = self.file_of(handle)?.file.clone();
        let _kill = if flags & wire::WRITE_KILL_SUIDGID != 0 {
            self.credentials.ordinary(header.gid)?
        } else {
            None
        };
        let written = buffers.readable.write_to(file.as_fd(), size, offset)?;
        reply.clear();
        // No more than `size`, which is 32 bits long.
        reply.u32(written as u32);
        reply.u32(0);
        Ok(Answer::Reply)
    }

    pub(super) fn release(&mut self, body: &mut Input<'_>) -> Result<(), Errno> {
        let (handle, _flags, flags) = (body.u64()?, body.u32()?, body.u32()?);
        let unlocked = self.release_locks(handle, flags & wire::RELEASE_FLOCK_UNLOCK != 0);
        let handle = u32::try_from(handle).map_err(|_| Errno::BADF)?;
        self.handles.remove(handle).ok_or(Errno::BADF)?;
        unlocked
    }

    pub(super) fn fsync(&mut self, body: &mut Input<'_>) -> Result<Work, Errno> {
        let (handle, flags) = (body.u64()?, body.u32()?);
        let file = match self.handle_of(handle)? {
            Handle::File(open) => open.file.clone(),
            Handle::Directory { file, .. } => file.clone(),
            Handle::Root => return Err(Errno::INVAL),
        };
        Ok(Work::Sync {
            file,
            data_only: flags & wire::FSYNC_DATA_ONLY != 0,
        })
    }

    pub(super) fn syncfs(&mut self, header: &Header) -> Result<Work, Errno> {
        // The guest has one file system for all shares: the root stands for the file systems of all
        // of them.
        let roots: Vec<u64> = if header.node == wire::ROOT {
            self.shares.values().map(|share| share.root).collect()
        } else {
            vec![self.share_of(header.node)?.1.root]
        };
        let directories = roots
            .into_iter()
            .map(|root| {
                let fd = self.nodes.open(root)?;
                self.reopen(&fd, OFlags::RDONLY | OFlags::DIRECTORY)
            })
            .collect::<Result<_, _>>()?;
        Ok(Work::SyncFileSystems { directories })
    }

    pub(super) fn fallocate(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
    ) -> Result<Work, Errno> {
        let (handle, offset, length) = (body.u64()?, body.u64()?, body.u64()?);
        let mode = body.u32()?;
        Ok(Work::Allocate {
            file: self.file_of(handle)?.file.clone(),
            mode,
            offset,
            length,
            // FUSE has no flag for it here: every user but root counts as unprivileged.
            ordinary: (header.uid != 0).then_some(header.gid),
        })
    }

    pub(super) fn copy_file_range(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
    ) -> Result<Work, Errno> {
        let (from, from_offset) = (body.u64()?, body.u64()?);
        let _to_node = body.u64()?;
        let (to, to_offset) = (body.u64()?, body.u64()?);
        let (length, flags) = (body.u64()?, body.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        Ok(Work::Copy {
            from: self.file_of(from)?.file.clone(),
            from_offset,
            to: self.file_of(to)?.file.clone(),
            to_offset,
            length,
            ordinary: (header.uid != 0).then_some(header.gid),
        })
    }

    pub(super) fn lseek(&mut self, body: &mut Input<'_>, reply: &mut Reply) -> Result<(), Errno> {
        let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The guest handles all other modes itself.
            _ => return Err(Errno::INVAL),
        };
        // The position of the host's descriptor is not used: every other access is positional.
        reply.u64(rustix::fs::seek(&self.file_of(handle)?.file, position)?);
        Ok(())
    }
}

fn take(span: &mut Span<'_>, bytes: &mut [u8]) -> Result<(), Errno> {
    span.take_exact(bytes).ok_or(Errno::INVAL)
}
