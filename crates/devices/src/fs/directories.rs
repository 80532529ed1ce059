//! Reading directories, with the attributes of each entry if the guest asks for them.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_device_control::Cache;
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::handles::Handle;
use super::nodes::{ShareId, device_of, stat_at, stat_fd};
use super::server::Server;
use super::wire::{self, Header, Input, Reply, dirent_size};

/// The longest reply.
const MAX_REPLY: usize = 256 << 10;
/// Least and most bytes read from the host at once: the longest entry fits.
const READ: std::ops::RangeInclusive<usize> = 512..=32 << 10;

impl Server {
    pub(super) fn opendir(&mut self, header: &Header, reply: &mut Reply) -> Result<(), Errno> {
        let (handle, flags) = if header.node == wire::ROOT {
            (Handle::Root, 0)
        } else {
            let (share, fd) = self.directory(header.node)?;
            let cache = self.shares.get(&share).ok_or(Errno::STALE)?.cache;
            let file = self.reopen(&fd, OFlags::RDONLY | OFlags::DIRECTORY)?;
            let flags = match cache {
                Cache::Private => wire::fopen::KEEP_CACHE | wire::fopen::CACHE_DIR,
                Cache::Brief | Cache::Shared => 0,
            };
            let file = file.into();
            let node = header.node;
            (Handle::Directory { share, node, file }, flags)
        };
        let handle = self.add_handle(handle)?;
        reply.u64(handle);
        reply.u32(flags);
        reply.u32(0);
        Ok(())
    }

    pub(super) fn readdir(
        &mut self,
        header: &Header,
        body: &mut Input<'_>,
        reply: &mut Reply,
        room: usize,
        plus: bool,
    ) -> Result<(), Errno> {
        let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
        let room = (size as usize)
            .min(room.saturating_sub(wire::HEADER_OUT))
            .min(MAX_REPLY)
            + wire::HEADER_OUT;
        let (share, file) = match self.handle_of(handle)? {
            Handle::Directory { share, file, .. } => (*share, file.clone()),
            Handle::Root if header.node == wire::ROOT => {
                self.list_shares(offset, reply, room, plus);
                return Ok(());
            }
            Handle::Root => return Err(Errno::STALE),
            Handle::File(_) => return Err(Errno::NOTDIR),
        };
        self.list(header.node, share, &file, offset, reply, room, plus)
    }

    #[allow(clippy::too_many_arguments)]
    fn list(
        &mut self,
        node: u64,
        share: ShareId,
        file: &Arc<OwnedFd>,
        offset: u64,
        reply: &mut Reply,
        room: usize,
        plus: bool,
    ) -> Result<(), Errno> {
        let before_name = if plus { wire::ENTRY_OUT } else { 0 };
        let device = device_of(&stat_fd(file)?);
        rustix::fs::seek(file, SeekFrom::Start(offset))?;
        // About as much as fills the reply: entries beyond are read again by the next call.
        let expected = if plus { room / 5 } else { room };
        let mut space =
            vec![MaybeUninit::<u8>::uninit(); expected.clamp(*READ.start(), *READ.end())];
        let mut entries = RawDir::new(file, &mut space);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // The entries that are in the reply already are valid.
                Err(_) if reply.len() > wire::HEADER_OUT => break,
                Err(error) => return Err(error),
            };
            let name = entry.file_name();
            let length = name.count_bytes();
            if reply.len() + before_name + dirent_size(length) > room {
                break;
            }
            if plus {
                let special = matches!(name.to_bytes(), b"." | b"..");
                let looked_up = if special {
                    Err(Errno::NOENT)
                } else {
                    stat_at(file, name)
                        .and_then(|stat| self.listed_entry(share, node, name, &stat, reply))
                };
                if looked_up.is_err() {
                    // The guest gets the name only and looks it up when needed. An entry is written
                    // in whole or not at all.
                    reply.zeros(wire::ENTRY_OUT);
                }
            }
            let kind = dirent_type(entry.file_type());
            let inode = self
                .shares
                .get(&share)
                .map_or(0, |share| share.inode(device, entry.ino()));
            reply.dirent(inode, entry.next_entry_cookie(), kind, name.to_bytes());
        }
        Ok(())
    }

    fn list_shares(&self, offset: u64, reply: &mut Reply, room: usize, plus: bool) {
        let names = [".", ".."].into_iter().zip([wire::ROOT, wire::ROOT]).chain(
            self.shares
                .values()
                .map(|share| (share.name.as_str(), share.root)),
        );
        let before_name = if plus { wire::ENTRY_OUT } else { 0 };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (name, inode)) in names.enumerate().skip(start) {
            if reply.len() + before_name + dirent_size(name.len()) > room {
                return;
            }
            // Without a node: shares are always looked up.
            reply.zeros(before_name);
            let kind = dirent_type(FileType::Directory);
            reply.dirent(inode, index as u64 + 1, kind, name.as_bytes());
        }
    }
}

/// The type of a file in a directory entry (`DT_REG` and so on).
fn dirent_type(kind: FileType) -> u32 {
    (kind.as_raw_mode() & 0o170000) >> 12
}
