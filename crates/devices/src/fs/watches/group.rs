//! fanotify(7), without privilege: marks on files, and what it tells of them.
//!
//! Unlike inotify it says whether an event is this process's own, and takes a file by its
//! descriptor. Events name files by handles (`name_to_handle_at(2)`), never by descriptors.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{
    FAN_ATTRIB, FAN_CLOSE_WRITE, FAN_CREATE, FAN_DELETE, FAN_DELETE_SELF, FAN_EVENT_ON_CHILD,
    FAN_MODIFY, FAN_MOVE_SELF, FAN_ONDIR, FAN_RENAME,
};
use rustix::io::Errno;

use crate::fs::server::descriptor_name;

/// What is told of a file; fanotify's bits are inotify's.
const OF_FILES: u64 = FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_DELETE_SELF | FAN_MOVE_SELF;
/// The same of a directory and what is in it.
const OF_DIRECTORIES: u64 =
    OF_FILES | FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_ONDIR | FAN_EVENT_ON_CHILD;

/// Longest handle, bytes (`MAX_HANDLE_SZ`, linux/exportfs.h).
const MAX_HANDLE: usize = 128;
/// Bytes read at once: some 100 events.
const BUFFER: usize = 16 << 10;
/// `struct fanotify_event_metadata`.
const METADATA: usize = 24;
/// `struct fanotify_event_info_header`.
const INFO_HEADER: usize = 4;
const FSID: usize = 8;
/// The fields of `struct file_handle` before its bytes.
const HANDLE_HEADER: usize = 8;

/// A file by its file system, and the type and bytes of its handle.
pub type FileId = Box<[u8]>;

/// What others have done to a file.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// FAN_*; several in one event have happened in an unknown order.
    pub mask: u64,
    /// Process that did it; 0 for others, without privilege.
    pub process: i32,
    /// The file itself.
    pub file: Option<FileId>,
    /// A directory, and the name in it; "." is the directory itself.
    pub place: Option<(FileId, Vec<u8>)>,
    /// Where it had been before it was moved.
    pub before: Option<(FileId, Vec<u8>)>,
    /// Where it was moved.
    pub after: Option<(FileId, Vec<u8>)>,
}

/// A group of marks.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

impl Group {
    /// A group without marks.
    ///
    /// # Errors
    /// `ENOSYS`, `EINVAL`, `EPERM`: the host's kernel is older than 5.17; `EMFILE`: the user has
    /// too many (`fs.fanotify.max_user_groups`).
    pub fn new() -> Result<Self, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DFID_NAME;
        // SAFETY: the call takes numbers only.
        let fd = unsafe { libc::fanotify_init(flags, libc::O_RDONLY as u32) };
        if fd < 0 {
            return Err(last_error());
        }
        // SAFETY: the kernel has just returned it, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds a mark on the file of a descriptor (`O_PATH`), which `descriptors` (`/proc/self/fd`)
    /// leads to.
    ///
    /// # Errors
    /// There are too many marks (`fs.fanotify.max_user_marks`); `EXDEV`: a group cannot have files
    /// of this file system, or not beside its others.
    pub fn add(&self, fd: &OwnedFd, directory: bool, descriptors: &OwnedFd) -> Result<(), Errno> {
        self.mark(libc::FAN_MARK_ADD, fd, directory, descriptors)
    }

    /// Removes a mark.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(
        &self,
        fd: &OwnedFd,
        directory: bool,
        descriptors: &OwnedFd,
    ) -> Result<(), Errno> {
        self.mark(libc::FAN_MARK_REMOVE, fd, directory, descriptors)
    }

    fn mark(
        &self,
        action: u32,
        fd: &OwnedFd,
        directory: bool,
        descriptors: &OwnedFd,
    ) -> Result<(), Errno> {
        let mask = if directory { OF_DIRECTORIES } else { OF_FILES };
        let mut space = [0; 12];
        let name = descriptor_name(fd, &mut space);
        // SAFETY: the name is a string that lives until the call returns.
        let done = unsafe {
            libc::fanotify_mark(
                self.0.as_raw_fd(),
                action,
                mask,
                descriptors.as_raw_fd(),
                name.as_ptr(),
            )
        };
        if done < 0 { Err(last_error()) } else { Ok(()) }
    }

    /// Reads some of what has happened; nothing when that was all.
    pub fn read(&self) -> Vec<Told> {
        let mut buffer = vec![0; BUFFER];
        match rustix::io::read(&self.0, &mut buffer[..]) {
            Ok(length) => parse(&buffer[..length]),
            // EAGAIN: that was all. No other error is to be expected, nor would it go away.
            Err(_) => Vec::new(),
        }
    }
}

/// How events name the file of a descriptor.
///
/// # Errors
/// Its file system has no handles.
pub fn file_id(fd: &OwnedFd) -> Result<FileId, Errno> {
    /// `struct file_handle` with room for the longest.
    #[repr(C)]
    struct Handle {
        header: libc::file_handle,
        bytes: [u8; MAX_HANDLE],
    }
    let mut handle = Handle {
        // SAFETY: it consists of numbers.
        header: unsafe { std::mem::zeroed() },
        bytes: [0; MAX_HANDLE],
    };
    let mut mount = 0;
    let empty: &CStr = c"";
    // File systems that cannot open handles still have those for events, since Linux 6.5.
    for kind in [libc::AT_HANDLE_FID, 0] {
        handle.header.handle_bytes = MAX_HANDLE as u32;
        // SAFETY: the handle has as many bytes as it says, and all pointers are valid.
        let done = unsafe {
            libc::name_to_handle_at(
                fd.as_raw_fd(),
                empty.as_ptr(),
                &raw mut handle.header,
                &raw mut mount,
                libc::AT_EMPTY_PATH | kind,
            )
        };
        if done == 0 {
            break;
        }
        let error = last_error();
        if kind == 0 || error != Errno::INVAL {
            return Err(error);
        }
    }
    // SAFETY: a structure of numbers, which the call fills.
    let mut status: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), &raw mut status) } < 0 {
        return Err(last_error());
    }
    // SAFETY: `fsid_t` is two numbers of 32 bits, whatever libc calls them.
    let fsid: [u8; FSID] = unsafe { std::mem::transmute(status.f_fsid) };
    let length = usize::try_from(handle.header.handle_bytes).unwrap_or(0);
    let bytes = handle.bytes.get(..length).ok_or(Errno::OVERFLOW)?;
    Ok([&fsid[..], &handle.header.handle_type.to_ne_bytes(), bytes]
        .concat()
        .into())
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

/// The events of a read. Nothing of it is the guest's; what is not understood is passed over.
fn parse(mut bytes: &[u8]) -> Vec<Told> {
    let mut all = Vec::new();
    while let Some(length) = word(bytes, 0).and_then(|length| usize::try_from(length).ok())
        && length >= METADATA
        && let Some((event, rest)) = bytes.split_at_checked(length)
    {
        bytes = rest;
        all.extend(parse_event(event));
    }
    all
}

fn parse_event(event: &[u8]) -> Option<Told> {
    let metadata = usize::from(u16::from_ne_bytes([event[6], event[7]]));
    let mut told = Told {
        mask: u64::from(word(event, 8)?) | u64::from(word(event, 12)?) << 32,
        process: word(event, 20)?.cast_signed(),
        ..Told::default()
    };
    let mut infos = event.get(metadata..)?;
    while infos.len() >= INFO_HEADER {
        let length = usize::from(u16::from_ne_bytes([infos[2], infos[3]]));
        if length < INFO_HEADER {
            break;
        }
        let (info, rest) = infos.split_at_checked(length)?;
        infos = rest;
        let Some((file, name)) = parse_info(&info[INFO_HEADER..]) else {
            continue;
        };
        match info[0] {
            libc::FAN_EVENT_INFO_TYPE_FID => told.file = Some(file),
            libc::FAN_EVENT_INFO_TYPE_DFID => told.place = Some((file, b".".to_vec())),
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => told.place = Some((file, name)),
            libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => told.before = Some((file, name)),
            libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => told.after = Some((file, name)),
            _ => {}
        }
    }
    Some(told)
}

/// A file system, a handle, and the name that may follow it.
fn parse_info(info: &[u8]) -> Option<(FileId, Vec<u8>)> {
    let length = usize::try_from(word(info, FSID)?).ok()?;
    let (fsid, kind) = (info.get(..FSID)?, info.get(FSID + 4..FSID + HANDLE_HEADER)?);
    let (handle, rest) = info.get(FSID + HANDLE_HEADER..)?.split_at_checked(length)?;
    let name = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(([fsid, kind, handle].concat().into(), name.to_vec()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use proptest::prelude::*;
    use rustix::fs::{Mode, OFlags};

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty()).unwrap()
    }

    #[test]
    fn events_name_files_by_the_handles_that_marks_returned() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let descriptors = open(Path::new("/proc/self/fd"));
        let group = Group::new().unwrap();
        let of_directory = open(directory.path());
        group.add(&of_directory, true, &descriptors).unwrap();
        let in_directory = file_id(&of_directory).unwrap();
        let of_file = open(&file);
        group.add(&of_file, false, &descriptors).unwrap();
        let itself = file_id(&of_file).unwrap();
        assert_ne!(in_directory, itself);

        std::fs::write(&file, "x").unwrap();
        let told = group.read();
        assert!(told.iter().all(|told| told.file.as_ref() == Some(&itself)));
        let all = told.iter().fold(0, |all, told| all | told.mask);
        assert_eq!(all, FAN_MODIFY | FAN_CLOSE_WRITE);
        let place = (in_directory.clone(), b"file".to_vec());
        assert!(told.iter().all(|told| told.place.as_ref() == Some(&place)));
        let own = std::process::id().cast_signed();
        assert!(told.iter().all(|told| told.process == own));

        let moved = directory.path().join("moved");
        std::fs::rename(&file, &moved).unwrap();
        let told = group.read();
        let renamed = told
            .iter()
            .find(|told| told.mask & FAN_RENAME != 0)
            .unwrap();
        assert_eq!(
            renamed.before,
            Some((in_directory.clone(), b"file".to_vec()))
        );
        assert_eq!(renamed.after, Some((in_directory, b"moved".to_vec())));

        group.remove(&of_directory, true, &descriptors).unwrap();
        group.remove(&of_file, false, &descriptors).unwrap();
        std::fs::remove_file(moved).unwrap();
        assert_eq!(group.read(), []);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_much(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            parse(&bytes);
        }
    }
}
