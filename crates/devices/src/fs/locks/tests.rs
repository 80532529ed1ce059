//! Locks by the device's messages, against those of the host and of another machine.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use hull_device_control::Cache;

use super::host;
use super::ranges::{Kind, Range};
use super::*;
use crate::device::Device as _;
use crate::fs::Fs;
use crate::fs::tests::{Answer, Guest, number, path, word};
use crate::testing::WRITE;

const READ: i32 = libc::F_RDLCK;
const EXCLUSIVE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const ALL: (u64, u64) = (0, Range::LAST);
const BUSY: Result<(), i32> = Err(libc::EAGAIN);

/// Where messages and answers of requests that wait are, beside those of other requests.
const PLACE: u64 = 0x18_0000;

/// Body of a request for a lock.
fn body(handle: u64, owner: u64, range: (u64, u64), kind: i32, flags: u32) -> Vec<u8> {
    let mut body = Vec::new();
    for value in [handle, owner, range.0, range.1] {
        body.extend(value.to_le_bytes());
    }
    // The pid is the owner, for the tests.
    for value in [kind as u32, owner as u32, flags, 0] {
        body.extend(value.to_le_bytes());
    }
    body
}

impl Guest {
    fn lock(&mut self, handle: u64, owner: u64, kind: i32) -> Result<(), i32> {
        self.lock_range(handle, owner, ALL, kind)
    }

    fn lock_range(
        &mut self,
        handle: u64,
        owner: u64,
        range: (u64, u64),
        kind: i32,
    ) -> Result<(), i32> {
        let body = body(handle, owner, range, kind, 0);
        self.call(wire::SETLK, 0, &body).map(drop)
    }

    fn flock(&mut self, handle: u64, kind: i32) -> Result<(), i32> {
        let body = body(handle, 1, ALL, kind, wire::LK_FLOCK);
        self.call(wire::SETLK, 0, &body).map(drop)
    }

    /// Kind, range and process of the lock that is in the way.
    fn holder(&mut self, handle: u64, owner: u64, kind: i32) -> (i32, (u64, u64), u32) {
        let answer = self.call(wire::GETLK, 0, &body(handle, owner, ALL, kind, 0));
        let answer = answer.unwrap();
        let range = (number(&answer, 0), number(&answer, 8));
        (word(&answer, 16).cast_signed(), range, word(&answer, 20))
    }

    fn close(&mut self, handle: u64, owner: u64) -> Answer {
        let mut flush = handle.to_le_bytes().to_vec();
        flush.extend([0; 8]);
        flush.extend(owner.to_le_bytes());
        self.call(wire::FLUSH, 0, &flush)
    }

    fn release(&mut self, handle: u64, flags: u32) -> Answer {
        let mut release = handle.to_le_bytes().to_vec();
        release.extend([0; 4]);
        release.extend(flags.to_le_bytes());
        release.extend([0; 8]);
        self.call(wire::RELEASE, 0, &release)
    }

    /// Offers a request in a place of its own; descriptors from `head` on.
    fn offer_waiting(&mut self, head: u16, body: &[u8]) {
        let message = self.message(wire::SETLKW, 0, body);
        let at = PLACE + u64::from(head) * 256;
        let place = vm_memory::GuestAddress(at);
        vm_memory::Bytes::write_slice(&*self.driver.memory, &message, place).unwrap();
        let length = u32::try_from(message.len()).unwrap();
        let descriptors = [
            (at, length, crate::testing::NEXT, 1),
            (at + 128, 64, WRITE, 0),
        ];
        self.driver.offer_at(1, head, &descriptors);
        self.driver.run(1).unwrap();
    }

    /// The errors of requests that were answered meanwhile, 0 for none.
    fn answered(&mut self) -> Vec<(u16, i32)> {
        self.driver.host_events().unwrap();
        let heads = self.driver.all_used(1);
        let error = |head: u16| {
            let at = vm_memory::GuestAddress(PLACE + u64::from(head) * 256 + 128 + 4);
            let error: i32 = vm_memory::Bytes::read_obj(&*self.driver.memory, at).unwrap();
            (head, -error)
        };
        heads.into_iter().map(error).collect()
    }

    fn wait(&mut self) -> (u16, i32) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(answer) = self.answered().first() {
                return *answer;
            }
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn file(&mut self, root: u64) -> u64 {
        std::fs::write(self.directory.path().join("file"), "content").unwrap();
        let node = self.lookup(root, "file").unwrap().node;
        self.open(node, libc::O_RDWR).unwrap()
    }

    fn again(&mut self, root: u64, flags: i32) -> u64 {
        let node = self.lookup(root, "file").unwrap().node;
        self.open(node, flags).unwrap()
    }

    fn on_host(&self) -> OwnedFd {
        open(&self.directory.path().join("file"))
    }
}

fn open(path: &Path) -> OwnedFd {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file: File = options.open(path).unwrap();
    file.into()
}

/// A lock as a process of the host has it.
fn classic(file: &OwnedFd, kind: i32) -> bool {
    #![allow(unsafe_code)]
    use std::os::fd::AsRawFd;
    // SAFETY: a struct of numbers.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    // SAFETY: the command takes a pointer to a `flock64`.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw mut lock) == 0 }
}

fn whole() -> Range {
    Range::new(ALL.0, ALL.1).unwrap()
}

#[test]
fn locks_of_the_guest_are_the_hosts() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let handle = guest.file(root);
    let host = guest.on_host();
    // Record locks.
    assert_eq!(guest.lock_range(handle, 1, (10, 19), EXCLUSIVE), Ok(()));
    let others = Range::new(15, 15).unwrap();
    assert_eq!(
        host::set(&host, others, Some(Kind::Read)),
        Err(Errno::AGAIN)
    );
    assert!(!classic(&host, READ));
    let others = Range::new(20, 30).unwrap();
    host::set(&host, others, Some(Kind::Write)).unwrap();
    assert_eq!(guest.lock_range(handle, 1, (15, 25), READ), BUSY);
    let unlocked = guest.lock_range(handle, 1, ALL, UNLOCK);
    assert_eq!(unlocked, Ok(()));
    host::set(&host, whole(), Some(Kind::Read)).unwrap();
    assert_eq!(guest.lock(handle, 1, READ), Ok(()));
    assert_eq!(guest.lock(handle, 1, EXCLUSIVE), BUSY);
    drop(host);
    assert_eq!(guest.lock(handle, 1, EXCLUSIVE), Ok(()));
    // Those of flock(2), which are others.
    let host = guest.on_host();
    assert_eq!(guest.flock(handle, READ), Ok(()));
    host::flock(&host, Some(Kind::Read)).unwrap();
    assert_eq!(guest.flock(handle, EXCLUSIVE), BUSY);
    host::flock(&host, None).unwrap();
    assert_eq!(guest.flock(handle, EXCLUSIVE), Ok(()));
    assert_eq!(host::flock(&host, Some(Kind::Read)), Err(Errno::AGAIN));
    assert_eq!(guest.flock(handle, UNLOCK), Ok(()));
    host::flock(&host, Some(Kind::Write)).unwrap();
}

#[test]
fn owners_of_one_guest_exclude_each_other_and_share_open_files() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let (one, two) = (guest.file(root), guest.again(root, libc::O_RDWR));
    assert_eq!(guest.lock(one, 1, EXCLUSIVE), Ok(()));
    assert_eq!(guest.lock(one, 2, READ), BUSY);
    assert_eq!(guest.lock(two, 2, READ), BUSY);
    // An owner's locks are its own, by whatever open file.
    assert_eq!(guest.lock(two, 1, READ), Ok(()));
    assert_eq!(guest.lock(two, 2, READ), Ok(()));
    assert_eq!(guest.holder(one, 3, EXCLUSIVE), (READ, ALL, 1));
    assert_eq!(guest.holder(one, 3, READ), (UNLOCK, ALL, 0));
    assert_eq!(guest.flock(one, EXCLUSIVE), Ok(()));
    assert_eq!(guest.flock(two, READ), BUSY);
    // The host's locks have no process of the guest.
    guest.lock(one, 1, UNLOCK).unwrap();
    guest.lock(one, 2, UNLOCK).unwrap();
    let host = guest.on_host();
    let range = Range::new(3, 5).unwrap();
    host::set(&host, range, Some(Kind::Write)).unwrap();
    assert_eq!(guest.holder(one, 3, READ), (EXCLUSIVE, (3, 5), 0));
    assert_eq!(guest.holder(two, 1, READ), (EXCLUSIVE, (3, 5), 0));
}

#[test]
fn locks_end_with_the_process_and_the_open_file() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let (one, two) = (guest.file(root), guest.again(root, libc::O_RDWR));
    let host = guest.on_host();
    let free = |host: &OwnedFd| {
        let is_free = host::set(host, whole(), Some(Kind::Write)).is_ok();
        host::set(host, whole(), None).unwrap();
        is_free
    };
    // A process that closes any open file of it loses all its record locks.
    guest.lock(one, 1, EXCLUSIVE).unwrap();
    guest.close(two, 2).unwrap();
    assert!(!free(&host));
    guest.close(two, 1).unwrap();
    assert!(free(&host));
    // The lock of an open file ends with that.
    let body = body(one, 7, ALL, EXCLUSIVE, wire::LK_OFD);
    guest.call(wire::SETLK, 0, &body).unwrap();
    assert_eq!(guest.holder(two, 3, READ), (EXCLUSIVE, ALL, u32::MAX));
    guest.close(one, 1).unwrap();
    guest.release(two, 0).unwrap();
    assert!(!free(&host));
    guest.release(one, 0).unwrap();
    assert!(free(&host));
    // So does one of flock(2).
    let one = guest.again(root, libc::O_RDWR);
    guest.flock(one, EXCLUSIVE).unwrap();
    assert!(host::flock(&host, Some(Kind::Read)).is_err());
    guest.release(one, wire::RELEASE_FLOCK_UNLOCK).unwrap();
    host::flock(&host, Some(Kind::Read)).unwrap();
    // All end with the share, and with the guest.
    let one = guest.again(root, libc::O_RDWR);
    guest.lock(one, 1, EXCLUSIVE).unwrap();
    guest
        .change(|shares, done| shares.remove("s", done))
        .unwrap();
    assert!(free(&host));
    guest
        .add("s", path(guest.directory.path()), Cache::Shared)
        .unwrap();
    let root = guest.lookup(wire::ROOT, "s").unwrap().node;
    let one = guest.again(root, libc::O_RDWR);
    guest.lock(one, 1, EXCLUSIVE).unwrap();
    guest.driver.device.reset();
    assert!(free(&host));
}

#[test]
fn a_lock_needs_an_open_file_of_its_kind() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let writer = guest.file(root);
    let reader = guest.again(root, libc::O_RDONLY);
    assert_eq!(guest.lock(reader, 1, READ), Ok(()));
    assert_eq!(guest.lock(reader, 1, EXCLUSIVE), Err(libc::EBADF));
    // By another open file the owner's lock becomes exclusive, with nobody between.
    assert_eq!(guest.lock_range(writer, 1, (5, 9), EXCLUSIVE), Ok(()));
    assert_eq!(guest.lock_range(reader, 2, (4, 4), READ), Ok(()));
    assert_eq!(guest.lock_range(writer, 2, (4, 4), EXCLUSIVE), BUSY);
    assert_eq!(guest.lock_range(reader, 2, (5, 5), READ), BUSY);
    let only_writes = guest.again(root, libc::O_WRONLY);
    assert_eq!(
        guest.lock_range(only_writes, 3, (5, 5), READ),
        Err(libc::EBADF)
    );
    for (range, kind) in [((5, 4), READ), ((0, u64::MAX), READ), (ALL, 9)] {
        assert_eq!(guest.lock_range(writer, 1, range, kind), Err(libc::EINVAL));
    }
    assert_eq!(guest.lock(99, 1, READ), Err(libc::EBADF));
}

#[test]
fn who_waits_gets_the_lock_when_it_is_free() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let handle = guest.file(root);
    // Released by the guest itself: at once.
    guest.lock(handle, 1, EXCLUSIVE).unwrap();
    guest.offer_waiting(10, &body(handle, 2, ALL, EXCLUSIVE, 0));
    assert_eq!(guest.answered(), []);
    guest.close(handle, 1).unwrap();
    assert_eq!(guest.driver.all_used(1), [10]);
    guest.lock(handle, 2, UNLOCK).unwrap();
    // By the host: soon.
    for (host_kind, flags) in [(Some(Kind::Read), wire::LK_FLOCK), (None, 0)] {
        let host = guest.on_host();
        match host_kind {
            Some(kind) => host::flock(&host, Some(kind)).unwrap(),
            None => host::set(&host, whole(), Some(Kind::Write)).unwrap(),
        }
        guest.offer_waiting(10, &body(handle, 2, ALL, EXCLUSIVE, flags));
        assert_eq!(guest.answered(), []);
        drop(host);
        assert_eq!(guest.wait(), (10, 0));
    }
    // Otherwise the guest asks again after a while.
    guest.offer_waiting(12, &body(handle, 3, ALL, READ, 0));
    let begin = Instant::now();
    assert_eq!(guest.wait(), (12, libc::EAGAIN));
    assert!(begin.elapsed() > Duration::from_millis(100));
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn requests_that_wait_are_answered_before_the_device_rests_and_never_after_a_reset() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let handle = guest.file(root);
    guest.lock(handle, 1, EXCLUSIVE).unwrap();
    guest.offer_waiting(10, &body(handle, 2, ALL, READ, 0));
    guest.driver.quiesce().unwrap();
    assert_eq!(guest.answered(), [(10, libc::EAGAIN)]);
    let refused = guest.driver.device.save().unwrap_err();
    assert!(refused.to_string().contains("locked"), "{refused}");
    guest.offer_waiting(10, &body(handle, 2, ALL, READ, 0));
    guest.driver.device.reset();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.answered(), []);
}

#[test]
fn processes_that_wait_for_each_other_are_told() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let handle = guest.file(root);
    for owner in 1..=3 {
        let range = (owner, owner);
        guest.lock_range(handle, owner, range, EXCLUSIVE).unwrap();
    }
    guest.offer_waiting(10, &body(handle, 1, (2, 2), EXCLUSIVE, 0));
    guest.offer_waiting(12, &body(handle, 2, (3, 3), EXCLUSIVE, 0));
    // An open file as an owner may be unlocked by whoever has it open.
    guest.offer_waiting(14, &body(handle, 3, (1, 1), EXCLUSIVE, wire::LK_OFD));
    assert_eq!(guest.answered(), []);
    guest.offer_waiting(16, &body(handle, 3, (1, 1), READ, 0));
    assert_eq!(guest.answered(), [(16, libc::EDEADLK)]);
    guest.lock_range(handle, 3, (3, 3), UNLOCK).unwrap();
    assert_eq!(guest.driver.all_used(1), [12]);
}

#[test]
fn a_guest_has_no_more_locks_than_it_may() {
    let (device, shares) = crate::fs::Fs::new().unwrap();
    let server = Server::new(256).unwrap();
    let (mut guest, root) = Guest::with((Fs { server, ..device }, shares), Cache::Shared);
    let handle = guest.file(root);
    let taken = (0..500)
        .map(|owner| guest.lock_range(handle, owner, (owner, owner), EXCLUSIVE))
        .filter(Result::is_ok)
        .count();
    assert!((100..200).contains(&taken), "{taken}");
    let refused = guest.lock_range(handle, 499, (499, 499), EXCLUSIVE);
    assert_eq!(refused, Err(libc::ENOLCK));
    // Nor more open files beside them.
    let node = guest.lookup(root, "file").unwrap().node;
    assert_eq!(guest.open(node, libc::O_RDWR), Err(libc::ENFILE));
    guest.close(handle, 0).unwrap();
    assert!(guest.open(node, libc::O_RDWR).is_ok());
    // Ranges.
    let mut ranges = 0..;
    let refused = ranges
        .find_map(|at| (guest.lock_range(handle, 1, (1000 + 2 * at, 1000 + 2 * at), READ)).err());
    assert_eq!(refused, Some(libc::ENOLCK));
    assert!(ranges.start <= MAX_LOCKED_RANGES as u64);
    // What it has it can give back.
    assert_eq!(guest.lock(handle, 1, UNLOCK), Ok(()));
    assert_eq!(guest.lock(handle, 1, READ), BUSY);
    assert_eq!(guest.lock_range(handle, 1, (1000, 1000), READ), Ok(()));
}

#[test]
fn a_kernel_that_cannot_wait_keeps_its_locks() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let mut init = Vec::new();
    for word in [wire::MAJOR, 46, 128 << 10, u32::MAX, u32::MAX >> 2] {
        init.extend(word.to_le_bytes());
    }
    init.extend([0; 44]);
    let answer = guest.call(wire::INIT, 0, &init).unwrap();
    let locks = wire::init::POSIX_LOCKS | wire::init::FLOCK_LOCKS;
    assert_eq!(u64::from(word(&answer, 12)) & locks, 0);
    let _ = root;
    assert_eq!(guest.close(0, 1), Err(libc::ENOSYS));
}
