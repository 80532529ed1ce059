//! What the guest watches, and what it is told.

use std::process::Command;

use super::*;

/// IN_* of inotify(7), which the bits of events are.
const MODIFY: u32 = libc::IN_MODIFY;
const ATTRIB: u32 = libc::IN_ATTRIB;
const CLOSE_WRITE: u32 = libc::IN_CLOSE_WRITE;
const MOVED_FROM: u32 = libc::IN_MOVED_FROM;
const MOVED_TO: u32 = libc::IN_MOVED_TO;
const CREATE: u32 = libc::IN_CREATE;
const DELETE: u32 = libc::IN_DELETE;
const DELETE_SELF: u32 = libc::IN_DELETE_SELF;
const ISDIR: u32 = libc::IN_ISDIR;

/// Node, mask, cookie, name.
type Event = (u64, u32, u32, String);

impl Guest {
    /// A directory that the host has made and the guest has looked up.
    fn found(&mut self, root: u64, name: &str) -> u64 {
        fs::create_dir(self.directory.path().join(name)).unwrap();
        self.lookup(root, name).unwrap().node
    }

    fn watch(&mut self, node: u64) {
        assert_eq!(self.call(wire::WATCH, node, &[]), Ok(Vec::new()));
    }

    /// What is told of what a shell does in the share.
    fn told(&mut self, script: &str) -> Vec<Event> {
        let mut shell = Command::new("sh");
        shell
            .args(["-ec", script])
            .current_dir(self.directory.path());
        assert!(shell.status().unwrap().success());
        // Each takes some of them.
        for _ in 0..4 {
            self.driver.host_events().unwrap();
        }
        self.events()
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while self.driver.device.server.watches.has_events() {
            let answer = self.call(wire::EVENTS, wire::ROOT, &[0; 8]).unwrap();
            let mut bytes = &answer[..];
            while !bytes.is_empty() {
                let length = word(bytes, 16) as usize;
                let name = String::from_utf8(bytes[24..24 + length].to_vec()).unwrap();
                events.push((number(bytes, 0), word(bytes, 8), word(bytes, 12), name));
                bytes = &bytes[(24 + length).next_multiple_of(8)..];
            }
        }
        events
    }
}

fn masks(events: &[Event], node: u64, name: &str) -> Vec<u32> {
    let of_it = events
        .iter()
        .filter(|event| event.0 == node && event.3 == name);
    of_it.map(|event| event.1).collect()
}

#[test]
fn a_watched_directory_tells_of_its_files_in_order() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    guest.watch(root);
    let told = guest.told("echo one >new; mkdir directory");
    assert_eq!(masks(&told, root, "new"), [CREATE, MODIFY, CLOSE_WRITE]);
    assert_eq!(masks(&told, root, "directory"), [CREATE | ISDIR]);
    let told = guest.told("chmod 600 new; rm new; rmdir directory");
    let masks_of_new = masks(&told, root, "new");
    assert_eq!(masks_of_new.last(), Some(&DELETE), "{told:?}");
    assert_eq!(masks_of_new.first(), Some(&ATTRIB));
    assert_eq!(masks(&told, root, "directory"), [DELETE | ISDIR]);
    // What has come and gone again is not left in the order of something that is there.
    let told = guest.told("echo >again; rm again; echo >again");
    assert_ne!(masks(&told, root, "again").last(), Some(&DELETE));
}

#[test]
fn both_halves_of_a_move_have_one_cookie() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let directory = guest.found(root, "directory");
    fs::write(guest.directory.path().join("one"), "").unwrap();
    guest.watch(root);
    guest.watch(directory);
    let told = guest.told("mv one directory/two; mv directory/two three");
    let moves: Vec<_> = told
        .iter()
        .filter(|event| event.1 & (MOVED_FROM | MOVED_TO) != 0)
        .collect();
    let [out, there, back, here] = moves[..] else {
        panic!("{told:?}");
    };
    assert_eq!((out.0, out.1, out.3.as_str()), (root, MOVED_FROM, "one"));
    assert_eq!(
        (there.0, there.1, there.3.as_str()),
        (directory, MOVED_TO, "two")
    );
    assert_eq!(
        (back.0, back.1, back.3.as_str()),
        (directory, MOVED_FROM, "two")
    );
    assert_eq!((here.0, here.1, here.3.as_str()), (root, MOVED_TO, "three"));
    assert_eq!((out.2, back.2), (there.2, here.2));
    assert!(out.2 != 0 && out.2 != back.2);
}

#[test]
fn a_watched_file_tells_of_its_changes_and_its_end() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    fs::write(guest.directory.path().join("file"), "").unwrap();
    let file = guest.lookup(root, "file").unwrap().node;
    guest.watch(file);
    let told = guest.told("echo x >>file");
    assert_eq!(masks(&told, file, ""), [MODIFY, CLOSE_WRITE]);
    let told = guest.told("rm file");
    assert_eq!(
        masks(&told, file, "").last(),
        Some(&DELETE_SELF),
        "{told:?}"
    );
    // Also while the guest has it open.
    fs::write(guest.directory.path().join("file"), "").unwrap();
    let file = guest.lookup(root, "file").unwrap().node;
    guest.watch(file);
    guest.open(file, libc::O_RDONLY).unwrap();
    let told = guest.told("rm file");
    assert_eq!(
        masks(&told, file, "").last(),
        Some(&DELETE_SELF),
        "{told:?}"
    );
}

#[test]
fn what_the_guest_does_itself_is_not_told() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    guest.watch(root);
    let (file, handle) = guest.create(root, "file").unwrap();
    guest.watch(file.node);
    guest.write(handle, 0, b"x").unwrap();
    guest.rename((root, "file"), (root, "other")).unwrap();
    guest.driver.host_events().unwrap();
    assert_eq!(guest.events(), []);
    let told = guest.told("echo >>other");
    assert_eq!(masks(&told, root, "other"), [MODIFY, CLOSE_WRITE]);
    assert_eq!(masks(&told, file.node, ""), [MODIFY, CLOSE_WRITE]);
}

#[test]
fn what_is_forgotten_or_removed_or_the_guests_own_is_not_watched() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    fs::write(guest.directory.path().join("file"), "").unwrap();
    let file = guest.lookup(root, "file").unwrap().node;
    guest.watch(file);
    // Twice is once.
    guest.watch(file);
    guest.forget(file, 1);
    assert_eq!(guest.told("echo >file"), []);
    guest.watch(root);
    guest
        .change(|shares, done| shares.remove("s", done))
        .unwrap();
    assert_eq!(guest.told("echo >file"), []);
    assert_eq!(guest.call(wire::WATCH, root, &[]), Err(libc::ESTALE));
    assert_eq!(guest.call(wire::WATCH, 12345, &[]), Err(libc::ESTALE));

    let (mut guest, root) = Guest::new(Cache::Private);
    guest.watch(root);
    assert_eq!(guest.told("echo >file"), []);
}

#[test]
fn events_that_are_too_many_become_one_for_each_watch() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let quiet = guest.found(root, "quiet");
    guest.watch(root);
    guest.watch(quiet);
    let mut told = guest.told("i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo >file$i; done");
    assert_eq!(masks(&told, quiet, ""), [ATTRIB | ISDIR; 2]);
    assert_eq!(masks(&told, root, ""), [ATTRIB | ISDIR; 2]);
    told = guest.told("echo >more");
    assert_eq!(masks(&told, root, "more"), [CREATE, MODIFY, CLOSE_WRITE]);
}

#[test]
fn what_the_guest_does_in_one_share_is_told_in_another_of_the_same_directory() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let again = path(guest.directory.path());
    guest.add("t", again, Cache::Shared).unwrap();
    let other = guest.lookup(wire::ROOT, "t").unwrap().node;
    guest.watch(root);
    guest.watch(other);
    let told = guest.told("echo >file");
    for node in [root, other] {
        assert_eq!(masks(&told, node, "file"), [CREATE, MODIFY, CLOSE_WRITE]);
    }
    let (file, handle) = guest.create(root, "own").unwrap();
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    body.extend([0; 20]);
    body.push(b'x');
    guest.call(wire::WRITE, file.node, &body).unwrap();
    guest.rename((other, "own"), (other, "moved")).unwrap();
    let told = guest.events();
    assert_eq!(masks(&told, other, "own"), [CREATE, MODIFY], "{told:?}");
    assert_eq!(masks(&told, root, "own"), [MOVED_FROM], "{told:?}");
    assert_eq!(masks(&told, root, "moved"), [MOVED_TO]);
    assert!(masks(&told, other, "moved").is_empty());
    guest.forget(file.node, 1);
    // Also if only the other is watched.
    guest.forget(root, 1);
    guest.mkdir(root, "made").unwrap();
    assert_eq!(masks(&guest.events(), other, "made"), [CREATE | ISDIR]);
    guest.lookup(wire::ROOT, "s").unwrap();
    guest.watch(root);
    // The one goes on without the other.
    guest
        .change(|shares, done| shares.remove("t", done))
        .unwrap();
    let told = guest.told("rm file");
    assert_eq!(masks(&told, root, "file"), [DELETE]);
    assert_eq!(told.len(), 1);
}

#[test]
fn what_is_moved_out_of_the_share_is_told_no_more() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let elsewhere = TempDir::new().unwrap();
    fs::create_dir_all(guest.directory.path().join("a/b")).unwrap();
    let a = guest.lookup(root, "a").unwrap().node;
    let b = guest.lookup(a, "b").unwrap().node;
    guest.watch(b);
    assert_eq!(masks(&guest.told("echo >a/b/seen"), b, "seen")[0], CREATE);
    let out = elsewhere.path().join("a");
    fs::rename(guest.directory.path().join("a"), &out).unwrap();
    let script = format!("echo >{}/b/secret", out.display());
    assert_eq!(guest.told(&script), []);
}

#[test]
fn a_removed_directory_that_the_guest_has_used_tells_its_end() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let directory = guest.found(root, "directory");
    guest.watch(root);
    guest.watch(directory);
    // It is open in the device from here on.
    assert_eq!(guest.lookup(directory, "nothing"), Err(libc::ENOENT));
    let told = guest.told("rmdir directory");
    assert_eq!(masks(&told, root, "directory"), [DELETE | ISDIR]);
    assert_eq!(masks(&told, directory, ""), [DELETE_SELF], "{told:?}");
}

#[test]
fn no_watch_outlives_what_the_guest_knows_and_no_request_comes_after_the_last() {
    let (mut guest, root) = Guest::new(Cache::Shared);
    let directory = guest.found(root, "directory");
    fs::write(guest.directory.path().join("directory/file"), "").unwrap();
    let file = guest.lookup(directory, "file").unwrap().node;
    guest.forget(directory, 1);
    // It is there for its file only.
    assert_eq!(guest.call(wire::WATCH, directory, &[]), Err(libc::ESTALE));
    guest.watch(file);
    let stop = u64::from(wire::EVENTS_STOP).to_le_bytes();
    assert_eq!(guest.call(wire::EVENTS, wire::ROOT, &stop), Ok(Vec::new()));
    let late = guest.call(wire::EVENTS, wire::ROOT, &[0; 8]);
    assert_eq!(late, Err(libc::ENOSYS));
}
