//! Tests of the fs device by its messages: what an honest guest gets, and what a hostile one does
//! not.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::mpsc::channel;

use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

use super::wire::{self, fattr};
use super::*;
use crate::testing::{Driver, hostile_chains};

mod saving;
mod watching;

const REQUESTS: usize = 1;
const ROOM: usize = 64 << 10;

pub struct Guest {
    pub driver: Driver<Fs>,
    shares: Shares,
    pub directory: TempDir,
    uid: u32,
    gid: u32,
}

pub type Answer = Result<Vec<u8>, i32>;

/// A file as described by an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub node: u64,
    inode: u64,
    size: u64,
    mode: u32,
}

pub fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn entry(bytes: &[u8]) -> Entry {
    Entry {
        node: number(bytes, 0),
        inode: number(bytes, 40),
        size: number(bytes, 48),
        mode: word(bytes, 40 + 60),
    }
}

pub fn path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

impl Guest {
    /// A device with one share, "s", and its root's node.
    pub fn new(cache: Cache) -> (Self, u64) {
        Self::with(Fs::new().unwrap(), cache)
    }

    pub fn with((device, shares): (Fs, Shares), cache: Cache) -> (Self, u64) {
        let directory = TempDir::new().unwrap();
        let mut guest = Self {
            driver: Driver::new(device),
            shares,
            directory,
            uid: 0,
            gid: 0,
        };
        let share = path(guest.directory.path());
        guest.add("s", share, cache).unwrap();
        let mut init = Vec::new();
        for word in [wire::MAJOR, 46, 128 << 10, u32::MAX, u32::MAX] {
            init.extend(word.to_le_bytes());
        }
        init.extend([0; 44]);
        let answer = guest.call(wire::INIT, 0, &init).unwrap();
        assert_eq!((word(&answer, 0), answer.len()), (wire::MAJOR, 64));
        let root = guest.lookup(wire::ROOT, "s").unwrap().node;
        (guest, root)
    }

    pub fn change<T: Send + 'static>(
        &mut self,
        start: impl FnOnce(&Shares, Done<T>),
    ) -> Result<T, ShareError> {
        let (sender, receiver) = channel();
        start(
            &self.shares,
            Box::new(move |result| sender.send(result).unwrap()),
        );
        self.driver.host_events().unwrap();
        receiver.try_recv().unwrap()
    }

    pub fn add(&mut self, name: &str, share: OwnedFd, cache: Cache) -> Result<(), ShareError> {
        self.change(|shares, done| shares.add(name, share, cache, done))
    }

    pub fn message(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut message = Vec::new();
        let length = u32::try_from(wire::HEADER_IN + body.len()).unwrap();
        message.extend(length.to_le_bytes());
        message.extend(opcode.to_le_bytes());
        message.extend(77u64.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend(self.uid.to_le_bytes());
        message.extend(self.gid.to_le_bytes());
        message.extend([0; 8]);
        message.extend(body);
        message
    }

    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        let message = self.message(opcode, node, body);
        let answer = self.driver.request(REQUESTS, &message, ROOM);
        assert_eq!(word(&answer, 0) as usize, answer.len());
        assert_eq!(number(&answer, 8), 77);
        match word(&answer, 4).cast_signed() {
            0 => Ok(answer[wire::HEADER_OUT..].to_vec()),
            error => Err(-error),
        }
    }

    fn named(&mut self, opcode: u32, node: u64, words: &[u32], name: &str) -> Answer {
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend(name.as_bytes());
        body.push(0);
        self.call(opcode, node, &body)
    }

    pub fn lookup(&mut self, node: u64, name: &str) -> Result<Entry, i32> {
        self.named(wire::LOOKUP, node, &[], name)
            .map(|bytes| entry(&bytes))
    }

    fn create(&mut self, node: u64, name: &str) -> Result<(Entry, u64), i32> {
        let words = [libc::O_RDWR as u32, 0o100644, 0o022, 0];
        self.named(wire::CREATE, node, &words, name)
            .map(|bytes| (entry(&bytes), number(&bytes, wire::ENTRY_OUT)))
    }

    fn mkdir(&mut self, node: u64, name: &str) -> Result<Entry, i32> {
        self.named(wire::MKDIR, node, &[0o755, 0], name)
            .map(|bytes| entry(&bytes))
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend((data.len() as u32).to_le_bytes());
        body.extend([0; 20]);
        body.extend(data);
        self.call(wire::WRITE, 0, &body)
            .map(|bytes| word(&bytes, 0))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Answer {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        self.call(wire::READ, 0, &body)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let mut body = (flags as u32).to_le_bytes().to_vec();
        body.extend([0; 4]);
        self.call(wire::OPEN, node, &body)
            .map(|bytes| number(&bytes, 0))
    }

    fn getattr(&mut self, node: u64) -> Result<u64, i32> {
        self.call(wire::GETATTR, node, &[0; 16])
            .map(|bytes| number(&bytes, 16))
    }

    fn rename(&mut self, from: (u64, &str), to: (u64, &str)) -> Answer {
        let mut body = to.0.to_le_bytes().to_vec();
        body.extend(from.1.as_bytes());
        body.push(0);
        body.extend(to.1.as_bytes());
        body.push(0);
        self.call(wire::RENAME, from.0, &body)
    }

    fn forget(&mut self, node: u64, count: u64) {
        let message = self.message(wire::FORGET, node, &count.to_le_bytes());
        assert_eq!(self.driver.request(0, &message, 0), [0u8; 0]);
    }

    /// The names in a directory, read in pieces of `size` bytes.
    fn list(&mut self, node: u64, plus: bool, size: u32) -> Result<Vec<String>, i32> {
        let handle = number(&self.call(wire::OPENDIR, node, &[0; 8])?, 0);
        let opcode = if plus {
            wire::READDIRPLUS
        } else {
            wire::READDIR
        };
        let mut names = Vec::new();
        let mut offset = 0u64;
        loop {
            let mut body = handle.to_le_bytes().to_vec();
            body.extend(offset.to_le_bytes());
            body.extend(size.to_le_bytes());
            body.extend([0; 20]);
            let mut bytes = &self.call(opcode, node, &body)?[..];
            if bytes.is_empty() {
                break;
            }
            while !bytes.is_empty() {
                if plus {
                    bytes = &bytes[wire::ENTRY_OUT..];
                }
                offset = number(bytes, 8);
                let length = word(bytes, 16) as usize;
                let name = &bytes[wire::DIRENT..wire::DIRENT + length];
                names.push(String::from_utf8(name.to_vec()).unwrap());
                bytes = &bytes[wire::dirent_size(length)..];
            }
        }
        let mut body = handle.to_le_bytes().to_vec();
        body.extend([0; 16]);
        self.call(wire::RELEASEDIR, node, &body)?;
        names.sort();
        Ok(names)
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn files_are_made_written_read_and_removed() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let (file, handle) = guest.create(root, "file").unwrap();
    assert_eq!(file.mode, 0o100644);
    let data: Vec<u8> = (0..5000u32).map(|byte| byte as u8).collect();
    assert_eq!(guest.write(handle, 3, &data), Ok(5000));
    assert_eq!(guest.read(handle, 3, 5000).unwrap(), data);
    assert_eq!(guest.read(handle, 5000, 5000).unwrap(), data[4997..]);
    assert_eq!(guest.read(handle, 6000, 5000).unwrap(), [0u8; 0]);
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
    let on_host = guest.directory.path().join("file");
    assert_eq!(fs::read(&on_host).unwrap()[3..], data);
    // Done by workers.
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 8]);
    assert_eq!(guest.call(wire::FSYNC, file.node, &body), Ok(vec![]));
    guest.named(wire::UNLINK, root, &[], "file").unwrap();
    assert!(!on_host.exists());
    // A removed file exists as long as it is known.
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
    assert_eq!(guest.read(handle, 3, 1).unwrap(), data[..1]);
    guest.forget(file.node, 1);
    assert_eq!(guest.getattr(file.node), Err(libc::ESTALE));
}

#[test]
fn no_name_leads_out_of_a_share() {
    let (mut guest, root) = Guest::new(Cache::Private);
    symlink("/", guest.directory.path().join("link")).unwrap();
    for name in ["..", ".", "", "a/b", "/etc", "../x", "link/etc"] {
        assert_eq!(guest.lookup(root, name), Err(libc::EINVAL), "{name}");
        assert_eq!(guest.create(root, name).unwrap_err(), libc::EINVAL);
        assert_eq!(guest.mkdir(root, name), Err(libc::EINVAL));
        let unlinked = guest.named(wire::UNLINK, root, &[], name);
        assert_eq!(unlinked, Err(libc::EINVAL));
        let renamed = guest.rename((root, "link"), (root, name));
        assert_eq!(renamed, Err(libc::EINVAL));
    }
    let link = guest.lookup(root, "link").unwrap();
    assert_eq!(link.mode & 0o170000, 0o120000);
    assert_eq!(guest.call(wire::READLINK, link.node, &[]).unwrap(), b"/");
    assert_eq!(guest.lookup(link.node, "etc"), Err(libc::ENOTDIR));
    assert_eq!(guest.open(link.node, libc::O_RDONLY), Err(libc::ELOOP));
    let opened = guest.call(wire::OPENDIR, link.node, &[0; 8]);
    assert_eq!(opened, Err(libc::ENOTDIR));
    assert_eq!(guest.create(root, "link").unwrap_err(), libc::ELOOP);
}

#[test]
fn only_files_and_directories_are_opened() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let words = [libc::S_IFIFO | 0o666, 0, 0, 0];
    let made = guest.named(wire::MKNOD, root, &words, "fifo").unwrap();
    let fifo = entry(&made);
    let on_host = fs::metadata(guest.directory.path().join("fifo")).unwrap();
    assert!(on_host.file_type().is_fifo());
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
        assert_eq!(guest.open(fifo.node, flags), Err(libc::EACCES));
    }
    assert_eq!(guest.create(root, "fifo").unwrap_err(), libc::EACCES);
    // Also when another file takes its place behind the guest's back.
    let (file, _) = guest.create(root, "file").unwrap();
    fs::remove_file(guest.directory.path().join("file")).unwrap();
    fs::rename(
        guest.directory.path().join("fifo"),
        guest.directory.path().join("file"),
    )
    .unwrap();
    assert_eq!(guest.open(file.node, libc::O_RDONLY), Err(libc::ESTALE));
}

/// Attributes of a file by name, of the guest's user.
fn set_attribute(guest: &mut Guest, node: u64, name: &str, value: &[u8]) -> Answer {
    let mut body = (value.len() as u32).to_le_bytes().to_vec();
    body.extend([0; 12]);
    body.extend(name.as_bytes());
    body.push(0);
    body.extend(value);
    guest.call(wire::SETXATTR, node, &body)
}

#[test]
fn trusted_attributes_are_the_guests_own() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let (file, _) = guest.create(root, "file").unwrap();
    let on_host = guest.directory.path().join("file");
    let name = "trusted.overlay.opaque";
    match set_attribute(&mut guest, file.node, name, b"y") {
        Err(libc::EOPNOTSUPP) => return,
        result => result.unwrap(),
    };
    let get = |guest: &mut Guest, name: &str| guest.named(wire::GETXATTR, file.node, &[9, 0], name);
    assert_eq!(get(&mut guest, name).unwrap(), b"y");
    let mut value = [0; 9];
    let hidden = "user.hull.trusted.overlay.opaque";
    assert_eq!(rustix::fs::getxattr(&on_host, hidden, &mut value), Ok(1));
    // The guest cannot use the name that it has on the host, nor reach the host's own.
    assert_eq!(get(&mut guest, hidden), Err(libc::ENODATA));
    let set = set_attribute(&mut guest, file.node, hidden, b"n");
    assert_eq!(set, Err(libc::EPERM));
    let removed = guest.named(wire::REMOVEXATTR, file.node, &[], hidden);
    assert_eq!(removed, Err(libc::ENODATA));
    let flags = rustix::fs::XattrFlags::empty();
    let own = rustix::fs::setxattr(&on_host, "trusted.host", b"x", flags);
    assert_eq!(get(&mut guest, "trusted.host"), Err(libc::ENODATA));
    if own.is_ok() {
        set_attribute(&mut guest, file.node, "trusted.host", b"guest").unwrap();
        assert_eq!(
            rustix::fs::getxattr(&on_host, "trusted.host", &mut value),
            Ok(1)
        );
        guest
            .named(wire::REMOVEXATTR, file.node, &[], "trusted.host")
            .unwrap();
    }
    // Only the administrator is told of it.
    set_attribute(&mut guest, file.node, "user.plain", b"").unwrap();
    let list = |guest: &mut Guest, size: u32| {
        let body = [size.to_le_bytes(), [0; 4]].concat();
        guest.call(wire::LISTXATTR, file.node, &body)
    };
    let mut names: Vec<_> = list(&mut guest, 1000).unwrap();
    let length = word(&list(&mut guest, 0).unwrap(), 0) as usize;
    assert_eq!(length, names.len());
    assert_eq!(list(&mut guest, 9), Err(libc::ERANGE));
    names.pop();
    let mut names: Vec<_> = names.split(|byte| *byte == 0).collect();
    names.retain(|name| !name.starts_with(b"security."));
    names.sort_unstable();
    assert_eq!(names, [name.as_bytes(), b"user.plain"]);
    guest.uid = 1000;
    let names = String::from_utf8(list(&mut guest, 1000).unwrap()).unwrap();
    assert!(!names.contains("overlay"), "{names}");
    let long = format!("trusted.{}", "x".repeat(240));
    let set = set_attribute(&mut guest, file.node, &long, b"");
    assert_eq!(set, Err(libc::ERANGE));
}

#[test]
fn files_whose_content_the_host_makes_are_read_whatever_their_size() {
    let (mut guest, _) = Guest::new(Cache::Shared);
    for (directory, name) in [("/proc", "uptime"), ("/sys/kernel", "uevent_seqnum")] {
        let share = path(Path::new(directory));
        guest.add("made", share, Cache::Shared).unwrap();
        let root = guest.lookup(wire::ROOT, "made").unwrap();
        let file = guest.lookup(root.node, name).unwrap();
        let opened = guest.call(wire::OPEN, file.node, &[0; 8]).unwrap();
        let handle = number(&opened, 0);
        assert_eq!(word(&opened, 8), wire::fopen::DIRECT_IO);
        for size in [4 << 10, 48 << 10] {
            let content = guest.read(handle, 0, size).unwrap();
            assert!(content.ends_with(b"\n"), "{name} {size}");
            let end = content.len() as u64;
            assert_eq!(guest.read(handle, end, size).unwrap(), [0u8; 0]);
        }
        guest
            .change(|shares, done| shares.remove("made", done))
            .unwrap();
    }
}

#[test]
fn directories_are_listed_in_pieces_of_any_size() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let mut names: Vec<String> = (0..300).map(|index| format!("file{index}")).collect();
    for name in &names {
        fs::write(guest.directory.path().join(name), name).unwrap();
    }
    names.extend([".".into(), "..".into()]);
    names.sort();
    for plus in [false, true] {
        for size in [300, 4096, 60_000] {
            assert_eq!(guest.list(root, plus, size).unwrap(), names);
        }
    }
    assert_eq!(
        guest.list(wire::ROOT, false, 4096).unwrap(),
        [".", "..", "s"]
    );
    // Room for no entry looks like the end.
    assert_eq!(guest.list(root, true, 10).unwrap(), Vec::<String>::new());
}

#[test]
fn more_files_are_known_than_can_be_open() {
    let (device, shares) = Fs::new().unwrap();
    let server = Server::new(256).unwrap();
    let (mut guest, root) = Guest::with((Fs { server, ..device }, shares), Cache::Private);
    let deep = guest.mkdir(root, "one").unwrap();
    let deep = guest.mkdir(deep.node, "two").unwrap();
    let mut files = Vec::new();
    for index in 0..400 {
        let name = format!("file{index}");
        fs::write(guest.directory.path().join("one/two").join(&name), &name).unwrap();
        files.push((name.clone(), guest.lookup(deep.node, &name).unwrap()));
    }
    let read_all = |guest: &mut Guest| {
        for (name, file) in &files {
            let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
            assert_eq!(guest.read(handle, 0, 100).unwrap(), name.as_bytes());
            let mut body = handle.to_le_bytes().to_vec();
            body.extend([0; 16]);
            guest.call(wire::RELEASE, file.node, &body).unwrap();
            assert_eq!(guest.getattr(file.node), Ok(file.inode));
        }
    };
    read_all(&mut guest);
    let open = fs::read_dir("/proc/self/fd").unwrap();
    let here = guest.directory.path().canonicalize().unwrap();
    let open = open
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(&here))
        .count();
    assert!(open < 100, "{open} descriptors");
    // They are found after the guest moved them, and their parents.
    let other = guest.mkdir(root, "other").unwrap();
    guest.rename((root, "one"), (other.node, "moved")).unwrap();
    read_all(&mut guest);
    // The guest holds no more open than it is allowed to.
    let results: Vec<_> = files
        .iter()
        .map(|(_, file)| guest.open(file.node, libc::O_RDONLY))
        .collect();
    assert_eq!(results.last().unwrap(), &Err(libc::ENFILE));
    assert!(results.iter().filter(|result| result.is_ok()).count() > 100);
}

#[test]
fn what_a_guest_fails_to_remove_leaves_nothing_in_the_device() {
    let (device, shares) = Fs::new().unwrap();
    let server = Server::new(256).unwrap();
    let (mut guest, root) = Guest::with((Fs { server, ..device }, shares), Cache::Private);
    for index in 0..40 {
        let full = guest.mkdir(root, &format!("full{index}")).unwrap();
        guest.create(full.node, "file").unwrap();
    }
    for round in 0..50 {
        for index in 0..40 {
            let name = format!("full{index}");
            let refused = guest.named(wire::RMDIR, root, &[], &name);
            assert_eq!(refused, Err(libc::ENOTEMPTY));
            let elsewhere = (root, "full0");
            let refused = guest.rename((root, &name), elsewhere);
            assert!(refused.is_err() || index == 0, "{refused:?}");
        }
        let queued = guest.driver.device.server.nodes.queue_length();
        assert!(queued <= 100, "{queued} in round {round}");
    }
}

#[test]
fn removed_files_with_other_names_are_found() {
    let (device, shares) = Fs::new().unwrap();
    let server = Server::new(64).unwrap();
    let (mut guest, root) = Guest::with((Fs { server, ..device }, shares), Cache::Private);
    let (file, _) = guest.create(root, "a").unwrap();
    let mut body = file.node.to_le_bytes().to_vec();
    body.extend(b"b\0");
    let linked = entry(&guest.call(wire::LINK, root, &body).unwrap());
    assert_eq!((linked.node, linked.inode), (file.node, file.inode));
    guest.named(wire::UNLINK, root, &[], "a").unwrap();
    for index in 0..50 {
        let made = guest.mkdir(root, &format!("d{index}")).unwrap();
        guest.mkdir(made.node, "inner").unwrap();
    }
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
}

#[test]
fn a_socket_is_found_by_its_node_and_nothing_else_is() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let socket = guest.directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    fs::write(guest.directory.path().join("file"), "").unwrap();
    let node = guest.lookup(root, "socket").unwrap().node;
    let file = guest.lookup(root, "file").unwrap().node;
    let mut find = |node| guest.change(|shares, done| shares.find_socket(node, done));
    let found = find(node).unwrap();
    let stat = rustix::fs::fstat(&*found).unwrap();
    assert_eq!(stat.st_ino, fs::metadata(&socket).unwrap().ino());
    for other in [file, root] {
        assert_eq!(find(other).unwrap_err(), ShareError::NotSocket);
    }
    for unknown in [0, wire::ROOT, u64::MAX, node + 100] {
        let refused = find(unknown).unwrap_err();
        assert_eq!(refused, ShareError::Host(Errno::STALE));
    }
    // Another file took its name.
    fs::remove_file(&socket).unwrap();
    fs::write(&socket, "").unwrap();
    drop(found);
    let found = find(node).map(|found| rustix::fs::fstat(&*found).unwrap().st_ino);
    assert!(found.is_err() || found == Ok(stat.st_ino));
}

#[test]
fn shares_come_and_go() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let (file, handle) = guest.create(root, "file").unwrap();
    let directory = || path(Path::new("/"));
    let taken = guest.add("s", directory(), Cache::Shared);
    assert_eq!(taken, Err(ShareError::Exists));
    for name in ["", "..", ".x", "a/b", "nul\0"] {
        let added = guest.add(name, directory(), Cache::Shared);
        assert_eq!(added, Err(ShareError::Name));
    }
    let on_host = path(&guest.directory.path().join("file"));
    let added = guest.add("f", on_host, Cache::Shared);
    assert_eq!(added, Err(ShareError::NotDirectory));
    // The same directory twice: other nodes, other inode numbers.
    let again = path(guest.directory.path());
    guest.add("again", again, Cache::Private).unwrap();
    let other = guest.lookup(wire::ROOT, "again").unwrap();
    let same = guest.lookup(other.node, "file").unwrap();
    assert_ne!((same.node, same.inode), (file.node, file.inode));
    assert_eq!(
        guest.rename((root, "file"), (other.node, "x")),
        Err(libc::EXDEV)
    );

    guest
        .change(|shares, done| shares.remove("s", done))
        .unwrap();
    assert_eq!(guest.lookup(wire::ROOT, "s"), Err(libc::ENOENT));
    assert_eq!(guest.lookup(root, "file"), Err(libc::ESTALE));
    assert_eq!(guest.getattr(file.node), Err(libc::ESTALE));
    assert_eq!(guest.read(handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.getattr(same.node), Ok(same.inode));
    let missing = guest.change(|shares, done| shares.remove("s", done));
    assert_eq!(missing, Err(ShareError::Missing));
    let back = path(guest.directory.path());
    guest.add("s", back, Cache::Shared).unwrap();
    assert_ne!(guest.lookup(wire::ROOT, "s").unwrap().node, root);
    // A guest that starts over knows nothing.
    guest.call(wire::DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.getattr(same.node), Err(libc::ESTALE));
    assert!(guest.lookup(wire::ROOT, "again").is_ok());
}

#[test]
fn absence_is_remembered_only_where_nobody_else_writes() {
    let (mut guest, root) = Guest::new(Cache::Private);
    assert_eq!(guest.lookup(root, "none").unwrap().node, 0);
    let (mut guest, root) = Guest::new(Cache::Shared);
    assert_eq!(guest.lookup(root, "none"), Err(libc::ENOENT));
}

#[test]
fn files_belong_to_the_guests_user() {
    if !is_root() {
        return;
    }
    let (mut guest, root) = Guest::new(Cache::Private);
    (guest.uid, guest.gid) = (1234, 4321);
    // The guest's kernel decides what its users may do: here, create files in a directory of root.
    let (file, handle) = guest.create(root, "file").unwrap();
    guest.mkdir(root, "directory").unwrap();
    let target = guest
        .named(wire::SYMLINK, root, &[], "link\0target")
        .unwrap();
    assert_eq!(entry(&target).mode & 0o170000, 0o120000);
    let on_host = guest.directory.path().to_owned();
    for name in ["file", "directory", "link"] {
        let found = fs::symlink_metadata(on_host.join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (1234, 4321), "{name}");
    }
    // A user's writes clear set-id bits, root's do not.
    let program = on_host.join("file");
    for (flags, mode) in [(0u32, 0o6755), (wire::WRITE_KILL_SUIDGID, 0o755)] {
        fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)).unwrap();
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0u64.to_le_bytes());
        body.extend(1u32.to_le_bytes());
        body.extend(flags.to_le_bytes());
        body.extend([0; 17]);
        guest.call(wire::WRITE, file.node, &body).unwrap();
        let found = fs::metadata(&program).unwrap();
        assert_eq!(found.permissions().mode() & 0o7777, mode);
    }
    // Then the thread is root again.
    guest.uid = 0;
    guest.gid = 0;
    guest.mkdir(root, "roots").unwrap();
    assert_eq!(fs::metadata(on_host.join("roots")).unwrap().uid(), 0);
}

#[test]
fn attributes_are_set() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let (file, _) = guest.create(root, "file").unwrap();
    let mut set = |valid: u32, size: u64, seconds: u64, mode: u32| {
        let mut body = valid.to_le_bytes().to_vec();
        body.extend([0; 12]);
        body.extend(size.to_le_bytes());
        body.extend([0; 8]);
        for time in [seconds, seconds + 1, 0] {
            body.extend(time.to_le_bytes());
        }
        for nanos in [5u32, u32::MAX, 0] {
            body.extend(nanos.to_le_bytes());
        }
        body.extend(mode.to_le_bytes());
        body.extend([0; 16]);
        guest.call(wire::SETATTR, file.node, &body)
    };
    set(fattr::SIZE, 1000, 0, 0).unwrap();
    set(fattr::MODE, 0, 0, 0o4711).unwrap();
    let times = fattr::ATIME | fattr::MTIME;
    let answer = set(times, 0, 1_000_000, 0).unwrap();
    assert_eq!(number(&answer, 16 + 8), 1000);
    assert_eq!(number(&answer, 16 + 24), 1_000_000);
    assert!(set(fattr::SIZE, u64::MAX, 0, 0).is_err());
    let found = fs::metadata(guest.directory.path().join("file")).unwrap();
    assert_eq!(found.permissions().mode() & 0o7777, 0o4711);
    assert_eq!((found.len(), found.mtime()), (1000, 1_000_001));
}

#[test]
fn nonsense_is_answered_with_errors() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let (file, handle) = guest.create(root, "file").unwrap();
    for opcode in 0..60 {
        if matches!(
            opcode,
            wire::FORGET | wire::BATCH_FORGET | wire::INTERRUPT | wire::INIT | wire::DESTROY
        ) {
            continue;
        }
        for node in [0, wire::ROOT, root, file.node, 99_999, u64::MAX] {
            for body in [&[][..], &[0], &[0xff; 8], &[0xff; 39], &[0xff; 200]] {
                let _ = guest.call(opcode, node, body);
            }
        }
    }
    assert_eq!(guest.call(wire::READ, 0, &[0; 39]), Err(libc::EINVAL));
    assert_eq!(guest.read(handle + 1, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(u64::MAX, 0, 1), Err(libc::EBADF));
    // More data announced than sent.
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    body.extend(100u32.to_le_bytes());
    body.extend([0; 30]);
    assert_eq!(guest.call(wire::WRITE, 0, &body), Err(libc::EINVAL));
    // Less room than the answer takes.
    let message = guest.message(wire::GETATTR, root, &[0; 16]);
    let answer = guest.driver.request(REQUESTS, &message, 40);
    assert_eq!(
        (answer.len(), word(&answer, 4).cast_signed()),
        (16, -libc::EINVAL)
    );
    assert_eq!(guest.driver.request(REQUESTS, &message, 10), [0u8; 0]);
    assert_eq!(
        guest.driver.request(REQUESTS, &message[..20], 100),
        [0u8; 0]
    );
    // A guest that lies about lengths and counts.
    let mut message = guest.message(wire::LOOKUP, root, b"file\0");
    message[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(guest.driver.request(REQUESTS, &message, 200).len(), 144);
    message[..4].copy_from_slice(&7u32.to_le_bytes());
    assert_eq!(guest.driver.request(REQUESTS, &message, 200).len(), 16);
    let mut many = u32::MAX.to_le_bytes().to_vec();
    many.extend([0xff; 20]);
    let message = guest.message(wire::BATCH_FORGET, 0, &many);
    assert_eq!(guest.driver.request(0, &message, 0), [0u8; 0]);
    guest.forget(root, u64::MAX);
    guest.forget(wire::ROOT, u64::MAX);
    assert!(guest.lookup(root, "file").is_ok());
}

#[test]
fn hostile_chains_are_given_back() {
    let (mut guest, root) = Guest::new(Cache::Private);
    for chain in hostile_chains() {
        for queue in 0..2 {
            guest.driver.offer(queue, &chain);
            guest.driver.run(queue).unwrap();
            assert!(guest.driver.used(queue).is_some(), "{chain:?}");
        }
    }
    assert!(guest.getattr(root).is_ok());
}

#[test]
fn the_config_space_holds_the_tag() {
    let (device, _) = Fs::new().unwrap();
    let config = device.config();
    assert_eq!(&config[..5], b"hull\0");
    assert_eq!(config[36..], [1, 0, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random messages about files that are there: nothing panics, and nothing outside is changed.
    #[test]
    fn random_messages_do_no_harm(
        messages in prop::collection::vec(
            (1u32..54, 0u64..8, prop::collection::vec(any::<u8>(), 0..64), 0usize..3),
            1..40,
        )
    ) {
        let (mut guest, root) = Guest::new(Cache::Shared);
        let mut outside = tempfile::NamedTempFile::new().unwrap();
        outside.write_all(b"untouched").unwrap();
        symlink(outside.path(), guest.directory.path().join("out")).unwrap();
        guest.lookup(root, "out").unwrap();
        guest.create(root, "a").unwrap();
        guest.mkdir(root, "d").unwrap();
        guest.call(wire::OPENDIR, root, &[0; 8]).unwrap();
        for (opcode, node, mut body, shape) in messages {
            let unanswered = [wire::FORGET, wire::BATCH_FORGET, wire::INTERRUPT, wire::DESTROY];
            if unanswered.contains(&opcode) {
                let message = guest.message(opcode, node, &body);
                guest.driver.request(0, &message, 0);
                continue;
            }
            match shape {
                // Handles that are there, and names.
                0 if body.len() >= 8 => body[..8].copy_from_slice(&(node % 3).to_le_bytes()),
                1 => body.extend(b"out\0a\0d\0"),
                _ => {}
            }
            let _ = guest.call(opcode, node, &body);
        }
        prop_assert_eq!(fs::read(outside.path()).unwrap(), b"untouched");
    }
}
