//! Saving the device, and continuing with a fresh one over the same directories.

use serde_json::{Value, json};

use super::*;
use crate::device::Device as _;

impl Guest {
    fn save(&mut self) -> Result<SavedState, SaveError> {
        self.driver.quiesce().unwrap();
        self.driver.device.save()
    }

    /// Another device with these shares, in the same guest, with the state of the first.
    fn restored(self, saved: &SavedState, names: &[&str]) -> Result<Self, RestoreError> {
        let (device, shares) = Fs::new().unwrap();
        let mut guest = Self {
            driver: Driver::in_guest(device, self.driver.into_guest()),
            shares,
            directory: self.directory,
            uid: 0,
            gid: 0,
        };
        for name in names {
            let share = path(guest.directory.path());
            guest.add(name, share, Cache::Private).unwrap();
        }
        guest.driver.device.restore(saved)?;
        Ok(guest)
    }

    fn save_and_restore(mut self) -> Self {
        let saved = self.save().unwrap();
        self.restored(&saved, &["s"]).unwrap()
    }
}

#[test]
fn a_restored_device_knows_the_same_files() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let mut parent = root;
    for depth in 0..10 {
        parent = guest
            .mkdir(parent, &format!("directory {depth}"))
            .unwrap()
            .node;
    }
    let (file, handle) = guest.create(parent, "file").unwrap();
    guest.write(handle, 0, b"before").unwrap();
    let (moved, _) = guest.create(root, "old name").unwrap();
    guest
        .rename((root, "old name"), (parent, "new name"))
        .unwrap();
    let listing = number(&guest.call(wire::OPENDIR, parent, &[0; 8]).unwrap(), 0);
    let read_only = guest.open(file.node, libc::O_RDONLY).unwrap();
    // A number that is free stays free.
    let mut release = read_only.to_le_bytes().to_vec();
    release.extend([0; 16]);
    guest.call(wire::RELEASE, file.node, &release).unwrap();

    let mut guest = guest.save_and_restore();
    assert_eq!(guest.lookup(wire::ROOT, "s").unwrap().node, root);
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
    assert_eq!(guest.lookup(parent, "new name").unwrap().node, moved.node);
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"before");
    assert_eq!(guest.write(handle, 6, b", after"), Ok(7));
    assert_eq!(guest.read(handle, 0, 100).unwrap(), b"before, after");
    let mut body = listing.to_le_bytes().to_vec();
    body.extend([0; 8]);
    body.extend(4096u32.to_le_bytes());
    body.extend([0; 20]);
    assert!(!guest.call(wire::READDIR, parent, &body).unwrap().is_empty());
    assert_eq!(guest.read(read_only, 0, 1), Err(libc::EBADF));
    // Numbers are not given out twice.
    let (other, other_handle) = guest.create(root, "other").unwrap();
    assert_ne!(other.node, file.node);
    assert_ne!(other_handle, handle);
    // And again, twice.
    let mut guest = guest.save_and_restore().save_and_restore();
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
    assert_eq!(guest.read(handle, 0, 6).unwrap(), b"before");
    guest.forget(file.node, 1);
    assert_eq!(guest.getattr(file.node), Err(libc::ESTALE));
}

#[test]
fn a_file_that_is_open_without_a_name_keeps_the_device_from_being_saved() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let directory = guest.mkdir(root, "directory").unwrap().node;
    let (file, handle) = guest.create(directory, "file").unwrap();
    guest.named(wire::UNLINK, directory, &[], "file").unwrap();
    let refused = guest.save().unwrap_err().to_string();
    assert_eq!(
        refused,
        "the fs device cannot be saved: \"directory/file\" of share s is open and has been removed \
         or moved"
    );
    // It continues, and once the file is closed it can be saved.
    assert_eq!(guest.write(handle, 0, b"x"), Ok(1));
    let mut release = handle.to_le_bytes().to_vec();
    release.extend([0; 16]);
    guest.call(wire::RELEASE, file.node, &release).unwrap();
    let mut guest = guest.save_and_restore();
    assert_eq!(guest.getattr(file.node), Err(libc::ESTALE));
    // What the host removes counts as well.
    let (_, _) = guest.create(directory, "other").unwrap();
    fs::remove_file(guest.directory.path().join("directory/other")).unwrap();
    assert!(guest.save().is_err());
}

#[test]
fn a_file_that_has_gone_meanwhile_is_stale_until_it_is_forgotten() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let directory = guest.mkdir(root, "directory").unwrap().node;
    let inside = guest.mkdir(directory, "inside").unwrap().node;
    let saved = guest.save().unwrap();
    fs::remove_dir_all(guest.directory.path().join("directory")).unwrap();
    fs::write(guest.directory.path().join("directory"), "now a file").unwrap();
    let mut guest = guest.restored(&saved, &["s"]).unwrap();
    for node in [directory, inside] {
        assert_eq!(guest.getattr(node), Err(libc::ESTALE));
    }
    let now = guest.lookup(root, "directory").unwrap();
    assert!(now.node != directory && now.node != inside);
    // Lost again, not found by chance.
    let mut guest = guest.save_and_restore();
    assert_eq!(guest.getattr(directory), Err(libc::ESTALE));
    assert_eq!(guest.getattr(now.node), Ok(now.inode));
    guest.forget(inside, 1);
    guest.forget(directory, 1);
    let new = guest.mkdir(root, "new").unwrap().node;
    assert!(new == directory || new == inside, "the numbers are free");
}

#[test]
fn shares_are_found_by_name() {
    let (mut guest, root) = Guest::new(Cache::Private);
    let (file, _) = guest.create(root, "file").unwrap();
    let second = path(guest.directory.path());
    guest.add("second", second, Cache::Private).unwrap();
    let in_second = guest.lookup(wire::ROOT, "second").unwrap();
    let saved = guest.save().unwrap();
    let mut guest = guest.restored(&saved, &["third", "second", "s"]).unwrap();
    assert_eq!(guest.getattr(file.node), Ok(file.inode));
    assert_eq!(guest.lookup(wire::ROOT, "second").unwrap(), in_second);
    let third = guest.lookup(wire::ROOT, "third").unwrap();
    assert_ne!(third.inode, in_second.inode);
    assert!(guest.lookup(third.node, "file").is_ok());

    let refused = match guest.restored(&saved, &["s"]) {
        Ok(_) => panic!("a share is missing"),
        Err(error) => error.to_string(),
    };
    assert_eq!(
        refused,
        "cannot restore the fs device: share \"second\" has not been added"
    );
}

/// Restores from a state that was changed by `damage`.
fn damaged(damage: impl FnOnce(&mut Value)) -> Result<Guest, RestoreError> {
    let (mut guest, root) = Guest::new(Cache::Private);
    let directory = guest.mkdir(root, "directory").unwrap().node;
    guest.create(directory, "file").unwrap();
    let mut state = serde_json::to_value(guest.save().unwrap()).unwrap();
    damage(&mut state["content"]);
    let saved: SavedState = serde_json::from_value(state).unwrap();
    guest.restored(&saved, &["s"])
}

#[test]
fn a_damaged_state_is_refused_or_its_files_are_stale() {
    assert!(damaged(|_| ()).is_ok());
    type Damage = fn(&mut Value);
    let refused: [Damage; 9] = [
        |state| state["nodes"] = json!({}),
        |state| state["nodes"]["nodes"][0]["id"] = json!(1),
        |state| state["nodes"]["nodes"][1]["id"] = json!(u64::MAX),
        |state| state["nodes"]["nodes"][1]["id"] = json!(2),
        |state| state["nodes"]["nodes"][1]["is_root"] = json!(true),
        |state| state["nodes"]["nodes"][0]["is_root"] = json!(false),
        |state| state["nodes"]["nodes"][1]["place"]["name"] = json!("../up"),
        |state| state["handles"][0]["open"] = json!({"file": {"node": 77, "flags": 0}}),
        |state| state["handles"][0]["number"] = json!(u32::MAX),
    ];
    for (index, damage) in refused.into_iter().enumerate() {
        let refused = damaged(damage);
        let mismatch = matches!(refused, Err(RestoreError::Mismatch { .. }));
        assert!(mismatch, "damage {index}");
    }
    // Nodes in each other, and a name that leads elsewhere.
    let stale: [Damage; 2] = [
        |state| {
            state["handles"] = json!([]);
            state["nodes"]["nodes"][1]["place"]["parent"] = json!(4);
        },
        |state| {
            state["handles"] = json!([]);
            state["nodes"]["nodes"][2]["inode"] = json!(1);
        },
    ];
    for damage in stale {
        let mut guest = damaged(damage).ok().unwrap();
        assert_eq!(guest.getattr(4), Err(libc::ESTALE));
        assert!(guest.lookup(wire::ROOT, "s").is_ok());
    }
}
