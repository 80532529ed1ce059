//! The FUSE wire format (`linux/fuse.h`, 7.41): numbers, and bounded reading and writing of
//! messages.
//!
//! Nothing here acts on files. What is read was written by the guest: every access is checked, and
//! too short a message is `EINVAL`.

use std::ffi::CStr;

use rustix::fs::Statx;
use rustix::io::Errno;

pub const MAJOR: u32 = 7;
pub const MINOR: u32 = 41;
pub const ROOT: u64 = 1;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const GETLK: u32 = 31;
pub const SETLK: u32 = 32;
pub const SETLKW: u32 = 33;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
pub const STATX: u32 = 52;
/// Of hull's guest kernel: see [`watches`](super::watches).
pub const WATCH: u32 = 1000;
pub const EVENTS: u32 = 1001;

/// Bits of the INIT reply, both 32-bit fields as one number.
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    /// The guest may mount shares with mapped ids.
    pub const ALLOW_IDMAP: u64 = 1 << 40;
    /// The guest's kernel asks again when a wait for a lock ends with `EAGAIN`, and sends FLUSH for
    /// files that have record locks only (guest/kernel/patches/fuse-locks.patch).
    pub const LOCK_WAIT: u64 = 1 << 62;
    /// The guest's kernel says what is watched, and takes events of it
    /// (guest/kernel/patches/fuse-watches.patch).
    pub const HOST_EVENTS: u64 = 1 << 61;
}

/// Bits of `fuse_setattr_in.valid`.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Bits of `fuse_open_out.open_flags`.
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const NOFLUSH: u32 = 1 << 5;
}

/// `fuse_lk_in.lk_flags`: a lock of flock(2).
pub const LK_FLOCK: u32 = 1 << 0;
/// A lock whose owner is an open file (F_OFD_SETLK); of the guest kernel's patch.
pub const LK_OFD: u32 = 1 << 1;
/// `fuse_events_in.flags`: no further request for events follows.
pub const EVENTS_STOP: u32 = 1 << 0;
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
pub const GETATTR_FH: u32 = 1 << 0;
pub const FSYNC_DATA_ONLY: u32 = 1 << 0;
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

pub const HEADER_IN: usize = 40;
pub const HEADER_OUT: usize = 16;
/// Size of an entry of a READDIRPLUS reply before its dirent.
pub const ENTRY_OUT: usize = 128;
/// Size of a dirent before its name.
pub const DIRENT: usize = 24;

/// `fuse_in_header`.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub length: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_IN]) -> Self {
        let mut input = Input(bytes);
        // The array is as long as what is read of it.
        let mut word = || input.u32().unwrap_or(0);
        let (length, opcode) = (word(), word());
        let mut long = || u64::from(word()) | u64::from(word()) << 32;
        let (unique, node) = (long(), long());
        let (uid, gid) = (word(), word());
        Self {
            length,
            opcode,
            unique,
            node,
            uid,
            gid,
        }
    }
}

/// The content of `fuse_attr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub inode: u64,
    pub size: u64,
    pub blocks: u64,
    /// Access, modification, change: seconds and nanoseconds.
    pub times: [(i64, u32); 3],
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    /// The encoded device number of a device file.
    pub device: u32,
    pub block_size: u32,
}

impl From<&Statx> for Attributes {
    fn from(stat: &Statx) -> Self {
        let times = [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime];
        Self {
            inode: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            times: times.map(|time| (time.tv_sec, time.tv_nsec)),
            mode: stat.stx_mode.into(),
            links: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            device: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            block_size: stat.stx_blksize,
        }
    }
}

/// What is left of a message's body.
#[derive(Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (front, back) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = back;
        Ok(front)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.bytes(4)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.bytes(8)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A string up to its NUL byte.
    pub fn string(&mut self) -> Result<&'a CStr, Errno> {
        let string = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[string.count_bytes() + 1..];
        Ok(string)
    }

    /// A string that is one name in a directory: not `.` or `..`, and without a slash.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(name),
        }
    }
}

/// A reply under construction; the header comes first and is filled in last.
#[derive(Default)]
pub struct Reply(Vec<u8>);

impl Reply {
    /// Starts over, with room for the header.
    pub fn clear(&mut self) {
        self.0.clear();
        self.0.resize(HEADER_OUT, 0);
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub fn zeros(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// `fuse_attr`.
    pub fn attributes(&mut self, attributes: &Attributes) {
        self.u64(attributes.inode);
        self.u64(attributes.size);
        self.u64(attributes.blocks);
        for (seconds, _) in attributes.times {
            self.u64(seconds.cast_unsigned());
        }
        for (_, nanoseconds) in attributes.times {
            self.u32(nanoseconds);
        }
        self.u32(attributes.mode);
        self.u32(attributes.links);
        self.u32(attributes.uid);
        self.u32(attributes.gid);
        self.u32(attributes.device);
        self.u32(attributes.block_size);
        // Flags.
        self.u32(0);
    }

    /// `fuse_dirent`, padded.
    pub fn dirent(&mut self, inode: u64, next: u64, kind: u32, name: &[u8]) {
        self.u64(inode);
        self.u64(next);
        // A name is at most 255 bytes.
        self.u32(name.len() as u32);
        self.u32(kind);
        self.bytes(name);
        self.zeros(dirent_size(name.len()) - DIRENT - name.len());
    }

    /// Fills in the header; returns the bytes to send.
    pub fn finish(&mut self, unique: u64, result: Result<(), Errno>) -> &[u8] {
        let header = match result {
            Ok(()) => header_out(self.0.len(), 0, unique),
            Err(error) => {
                self.clear();
                header_out(HEADER_OUT, error.raw_os_error(), unique)
            }
        };
        self.0[..HEADER_OUT].copy_from_slice(&header);
        &self.0
    }
}

/// `fuse_out_header` of a reply of `length` bytes in all.
pub fn header_out(length: usize, errno: i32, unique: u64) -> [u8; HEADER_OUT] {
    let mut header = [0; HEADER_OUT];
    // No reply is longer than 4 GiB: a descriptor chain is not.
    header[..4].copy_from_slice(&(length as u32).to_le_bytes());
    header[4..8].copy_from_slice(&(-errno).to_le_bytes());
    header[8..].copy_from_slice(&unique.to_le_bytes());
    header
}

/// Size of a dirent with a name of `length` bytes, padding included.
pub fn dirent_size(length: usize) -> usize {
    (DIRENT + length).next_multiple_of(8)
}

/// A device number as the guest's kernel writes it in 32 bits.
pub fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// The major and minor number of an encoded device number.
pub fn decode_device(device: u32) -> (u32, u32) {
    (
        (device >> 8) & 0xfff,
        (device & 0xff) | (device >> 12) & 0xfff00,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_never_lead_anywhere_else() {
        for bad in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"/\0", b"abc", b""] {
            assert!(Input(bad).name().is_err(), "{bad:?}");
        }
        assert_eq!(Input(b"...\0x").name().unwrap(), c"...");
        let mut two = Input(b"one\0two\0");
        assert_eq!(two.name().unwrap(), c"one");
        assert_eq!(two.name().unwrap(), c"two");
        assert!(two.name().is_err());
    }

    #[test]
    fn short_messages_are_errors() {
        assert_eq!(Input(&[0; 3]).u32(), Err(Errno::INVAL));
        assert_eq!(Input(&[0; 7]).u64(), Err(Errno::INVAL));
        assert_eq!(Input(&[1, 0, 0, 0]).u32(), Ok(1));
    }

    #[test]
    fn device_numbers_survive_both_ways() {
        for (major, minor) in [(0, 0), (8, 1), (259, 0x54321), (0xfff, 0xfffff)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }

    #[test]
    fn dirents_are_padded_to_eight_bytes() {
        let mut reply = Reply::default();
        reply.clear();
        reply.dirent(1, 2, 4, b"123456789");
        assert_eq!(reply.len(), HEADER_OUT + dirent_size(9));
        assert_eq!(dirent_size(8), 32);
        assert_eq!(dirent_size(9), 40);
    }
}
