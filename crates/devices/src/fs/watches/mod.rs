//! What the guest watches (inotify(7), fanotify(7)): what others do to it is told.
//!
//! hull's guest kernel names what is watched (WATCH) and leaves a request that waits for events
//! (EVENTS). A watch lasts until the guest forgets the node, which it does not while it watches.
//! Shares that only the guest changes are not watched.
//!
//! What the guest itself does, its kernel knows: events of this process are left out. But one file
//! may be in several shares, which are different files to the guest: what it does in one is told in
//! the others. For that, events are read after each request that changes something, if there are
//! several shares.
//!
//! Marks are on files, wherever they are moved. No names are told of a directory that the guest
//! could not reach any more.
//!
//! When too much happens at once, each watched file has an event that says that something of it has
//! changed.

mod group;
mod queue;

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;

use hull_device_control::Cache;
use libc::{
    FAN_ATTRIB, FAN_CLOSE_WRITE, FAN_CREATE, FAN_DELETE, FAN_DELETE_SELF, FAN_MODIFY,
    FAN_MOVE_SELF, FAN_MOVED_FROM, FAN_MOVED_TO, FAN_ONDIR, FAN_Q_OVERFLOW, FAN_RENAME,
};
use rustix::fs::FileType;
use rustix::io::Errno;

use super::handles::Handle;
use super::nodes::{Nodes, ShareId, has_no_name, stat_at};
use super::server::{Server, Share};
use super::slab::Slab;
use super::wire::{self, Header, Input};
use crate::device::{EventFlags, EventRegistry};
use group::{FileId, Group, Told, file_id};
use queue::{Event, Queue};

/// The most files that are watched.
const MAX_WATCHES: usize = 64 << 10;
/// The most groups of marks: subvolumes of btrfs need one each.
const MAX_GROUPS: usize = 8;
/// Reads at once, of some 100 events each; then other requests have their turn.
const MAX_READS: usize = 16;

/// Names that come, that stay, and that go.
const COMES: [u64; 2] = [FAN_CREATE, FAN_MOVED_TO];
const STAYS: [u64; 3] = [FAN_MODIFY, FAN_ATTRIB, FAN_CLOSE_WRITE];
const GOES: [u64; 2] = [FAN_MOVED_FROM, FAN_DELETE];

/// A file of the host with a mark.
#[derive(Debug)]
struct Marked {
    /// What it is to the guest, in each share that it is watched in.
    nodes: Vec<u64>,
    /// Index of its group.
    group: usize,
    directory: bool,
}

/// The watches, and events that the guest has not taken yet.
#[derive(Debug, Default)]
pub struct Watches {
    /// Whether the guest's kernel knows of watches.
    pub agreed: bool,
    /// The first is made at the first watch.
    groups: Vec<Group>,
    events: Option<(EventRegistry, u64)>,
    by_node: HashMap<u64, FileId>,
    by_file: HashMap<FileId, Marked>,
    /// Marks on files that could not be found when their watch ended.
    left: usize,
    queue: Queue,
    cookie: u32,
}

/// What is needed to know of files, beside their events.
struct Files<'a> {
    nodes: &'a mut Nodes,
    handles: &'a Slab<Handle>,
    /// The share that the guest has just used.
    doer: Option<ShareId>,
    /// Whether the guest can reach a node.
    reachable: HashMap<u64, bool>,
}

impl Files<'_> {
    fn is_reachable(&mut self, node: u64) -> bool {
        let nodes = &mut *self.nodes;
        *(self.reachable)
            .entry(node)
            .or_insert_with(|| nodes.is_reachable(node))
    }

    /// Whether an event is told to a node: of others, or of what the guest did in another share.
    fn is_told(&self, node: u64, is_own: bool) -> bool {
        !is_own || (self.doer).is_some_and(|doer| self.nodes.share(node) != Ok(doer))
    }

    /// Whether a directory has the name now.
    fn has_name(&mut self, directory: u64, name: &[u8]) -> bool {
        let Ok(name) = CString::new(name) else {
            return false;
        };
        (self.nodes.open(directory)).is_ok_and(|directory| stat_at(&directory, &name).is_ok())
    }

    /// Whether a file that is open here has no name left: the host does not tell of its end then.
    fn is_removed(&self, node: u64) -> bool {
        let is_removed = |handle: &Handle| match handle {
            Handle::File(open) if open.node == node => has_no_name(&open.file),
            _ => false,
        };
        self.nodes.is_removed(node) || self.handles.iter().any(|(_, handle)| is_removed(handle))
    }
}

impl Watches {
    /// Where events of the host are waited for, with which token.
    pub fn register(&mut self, events: EventRegistry, token: u64) {
        self.events = Some((events, token));
    }

    /// Whether a node is watched.
    pub fn has(&self, node: u64) -> bool {
        self.by_node.contains_key(&node)
    }

    /// All nodes that are watched.
    pub fn nodes(&self) -> Vec<u64> {
        self.by_node.keys().copied().collect()
    }

    /// Watches a node, by its descriptor.
    ///
    /// # Errors
    /// `ENOSPC`: there are too many watches; those of the host.
    fn add(
        &mut self,
        node: u64,
        fd: &OwnedFd,
        directory: bool,
        descriptors: &OwnedFd,
    ) -> Result<(), Errno> {
        let id = file_id(fd)?;
        match self.by_node.get(&node) {
            Some(before) if *before == id => return Ok(()),
            // Another file, with the inode number of one that is gone.
            Some(_) => drop(self.detach(node)),
            None => {}
        }
        if let Some(marked) = self.by_file.get_mut(&id) {
            marked.nodes.push(node);
        } else {
            if self.by_file.len() + self.left >= MAX_WATCHES {
                return Err(Errno::NOSPC);
            }
            let marked = Marked {
                nodes: vec![node],
                group: self.mark(fd, directory, descriptors)?,
                directory,
            };
            self.by_file.insert(id.clone(), marked);
        }
        self.by_node.insert(node, id);
        Ok(())
    }

    /// Adds a mark; the index of its group.
    fn mark(
        &mut self,
        fd: &OwnedFd,
        directory: bool,
        descriptors: &OwnedFd,
    ) -> Result<usize, Errno> {
        for (index, group) in self.groups.iter().enumerate() {
            match group.add(fd, directory, descriptors) {
                // Its file system and the group's others cannot be told from each other.
                Err(Errno::XDEV) => {}
                added => return added.map(|()| index),
            }
        }
        if self.groups.len() == MAX_GROUPS {
            return Err(Errno::XDEV);
        }
        let group = Group::new()?;
        group.add(fd, directory, descriptors)?;
        if let Some((events, token)) = &self.events {
            let added = events.add(&group, *token, EventFlags::IN);
            added.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        }
        self.groups.push(group);
        Ok(self.groups.len() - 1)
    }

    /// Forgets the watch of a node; the file's mark, if it was the last one.
    fn detach(&mut self, node: u64) -> Option<Marked> {
        let id = self.by_node.remove(&node)?;
        let marked = self.by_file.get_mut(&id)?;
        marked.nodes.retain(|other| *other != node);
        match marked.nodes.is_empty() {
            true => self.by_file.remove(&id),
            false => None,
        }
    }

    /// Ends the watch of a node, by its descriptor if the file can still be found.
    fn remove(&mut self, node: u64, fd: Option<&OwnedFd>, descriptors: &OwnedFd) {
        self.queue.forget(node);
        let Some(marked) = self.detach(node) else {
            return;
        };
        let removed = self
            .groups
            .get(marked.group)
            .zip(fd)
            .is_some_and(|(group, fd)| group.remove(fd, marked.directory, descriptors).is_ok());
        self.left += usize::from(!removed);
    }

    /// Ends all.
    pub fn clear(&mut self) {
        if let Some((events, _)) = &self.events {
            for group in &self.groups {
                // It goes with its descriptor, too.
                let _ = events.remove(group);
            }
        }
        *self = Self {
            events: self.events.take(),
            ..Self::default()
        };
    }

    /// Takes some of what the host tells.
    fn receive(&mut self, files: &mut Files<'_>) {
        for index in 0..self.groups.len() {
            for _ in 0..MAX_READS {
                let told = self.groups[index].read();
                if told.is_empty() {
                    break;
                }
                for told in told {
                    match told.mask & FAN_Q_OVERFLOW {
                        0 => self.told(told, files),
                        _ => self.all_have_changed(),
                    }
                }
            }
        }
    }

    /// The nodes of a file that an event is told to: all that are watched, but not in the share
    /// that the guest itself has used.
    fn audience(&self, file: &FileId, is_own: bool, files: &Files<'_>) -> Vec<u64> {
        let mut nodes = self.nodes_of(file);
        nodes.retain(|node| files.is_told(*node, is_own));
        nodes
    }

    fn nodes_of(&self, file: &FileId) -> Vec<u64> {
        let marked = self.by_file.get(file);
        marked.map_or_else(Vec::new, |marked| marked.nodes.clone())
    }

    fn told(&mut self, told: Told, files: &mut Files<'_>) {
        let is_own = told.process == std::process::id().cast_signed();
        let kind = told.mask & FAN_ONDIR;
        if told.mask & FAN_RENAME != 0 {
            self.cookie = self.cookie.wrapping_add(1).max(1);
            let halves = [(told.before, FAN_MOVED_FROM), (told.after, FAN_MOVED_TO)];
            for ((directory, name), bit) in
                (halves.into_iter()).filter_map(|(place, bit)| Some((place?, bit)))
            {
                for node in self.audience(&directory, is_own, files) {
                    if files.is_reachable(node) {
                        self.push(node, bit | kind, self.cookie, &name);
                    }
                }
            }
        }
        let (place, itself) = match told.place {
            Some((directory, name)) if name == b"." => (None, Some(directory)),
            place => (place, told.file),
        };
        if let Some((directory, name)) = place {
            for node in self.audience(&directory, is_own, files) {
                if files.is_reachable(node) {
                    self.told_in(node, told.mask, &name, files);
                }
            }
        }
        if let Some(file) = itself {
            self.told_of(&file, told.mask, is_own, files);
        }
    }

    /// An event of a name in a directory.
    fn told_in(&mut self, directory: u64, mask: u64, name: &[u8], files: &mut Files<'_>) {
        let has_any = |bits: [u64; 2]| bits.iter().any(|bit| mask & bit != 0);
        let swap = has_any(COMES) && has_any(GOES) && files.has_name(directory, name);
        let bits = match swap {
            false => [&COMES[..], &STAYS, &GOES],
            true => [&GOES[..], &COMES, &STAYS],
        };
        for bit in bits.into_iter().flatten() {
            if mask & bit != 0 {
                self.push(directory, bit | mask & FAN_ONDIR, 0, name);
            }
        }
        if mask & FAN_DELETE != 0 && mask & FAN_ONDIR != 0 {
            // A directory that is open here has no end that the host would tell of.
            for node in self.by_node.keys() {
                files.nodes.let_go_if_called(*node, directory, name);
            }
        }
    }

    /// An event of a file itself.
    fn told_of(&mut self, file: &FileId, mask: u64, is_own: bool, files: &mut Files<'_>) {
        for node in self.nodes_of(file) {
            // Its end is told whoever has noticed it.
            let is_over = mask & FAN_DELETE_SELF != 0;
            let mask = match files.is_told(node, is_own) {
                true => mask & !FAN_DELETE_SELF,
                false => 0,
            };
            let ended = is_over || mask & FAN_ATTRIB != 0 && files.is_removed(node);
            let bits = STAYS.iter().chain(&[FAN_MOVE_SELF]);
            for bit in bits.filter(|bit| mask & **bit != 0) {
                self.push(node, bit | mask & FAN_ONDIR, 0, b"");
            }
            if ended {
                self.push(node, FAN_DELETE_SELF | mask & FAN_ONDIR, 0, b"");
                // The mark goes with the file.
                self.detach(node);
            }
        }
    }

    fn push(&mut self, node: u64, mask: u64, cookie: u32, name: &[u8]) {
        let event = Event {
            node,
            // All of them are in the lower half.
            mask: mask as u32,
            cookie,
            name: name.to_vec(),
        };
        if !self.queue.push(event) {
            self.all_have_changed();
        }
    }

    /// Nobody knows what has happened.
    pub fn all_have_changed(&mut self) {
        let files = self.by_file.values();
        let all = files.flat_map(|file| file.nodes.iter().map(|node| (*node, file.directory)));
        self.queue.replace(all.map(|(node, directory)| Event {
            node,
            mask: (FAN_ATTRIB | if directory { FAN_ONDIR } else { 0 }) as u32,
            cookie: 0,
            name: Vec::new(),
        }));
    }

    /// Whether there is something for the guest.
    pub fn has_events(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Takes as many events as have room.
    pub fn take(&mut self, room: usize) -> Vec<u8> {
        let taken = self.queue.take(room);
        if self.queue.has_lost() {
            self.all_have_changed();
        }
        taken
    }
}

/// Whether requests of a kind change files, and are done when they are answered.
fn changes(opcode: u32) -> bool {
    matches!(
        opcode,
        wire::SETATTR
            | wire::SYMLINK
            | wire::MKNOD
            | wire::MKDIR
            | wire::UNLINK
            | wire::RMDIR
            | wire::RENAME
            | wire::RENAME2
            | wire::LINK
            | wire::OPEN
            | wire::WRITE
            | wire::RELEASE
            | wire::SETXATTR
            | wire::REMOVEXATTR
            | wire::CREATE
    )
}

impl Server {
    /// The guest watches a node from now on.
    ///
    /// # Errors
    /// The guest does not know the node, or as [`Watches::add`].
    pub(super) fn watch(&mut self, node: u64) -> Result<(), Errno> {
        let (_, share) = self.share_of(node)?;
        // Nobody else changes it.
        if share.cache == Cache::Private {
            return Ok(());
        }
        // Or its watch would not end with the last lookup.
        if self.nodes.lookups(node) == 0 {
            return Err(Errno::STALE);
        }
        let directory = self.nodes.kind(node)? == FileType::Directory;
        let fd = self.nodes.open(node)?;
        let watched = (self.watches).add(node, &fd, directory, &self.descriptors);
        drop(fd);
        // A file that is open here has no end that the host would tell of.
        self.nodes.let_go(node);
        watched.inspect_err(|error| tracing::warn!(%error, "cannot watch a file of the host"))
    }

    /// A request for events: whether it is the last.
    pub(super) fn wants_events(&mut self, body: &mut Input<'_>) -> Result<bool, Errno> {
        let last = body.u32()? & wire::EVENTS_STOP != 0;
        // One that was sent before and comes after it must not wait.
        self.watches.agreed = !last;
        Ok(last)
    }

    /// The guest forgets some lookups of a node, and with the last one its watch.
    pub(super) fn forget(&mut self, node: u64, count: u64) {
        if self.watches.has(node) && self.nodes.lookups(node) <= count {
            self.unwatch(node);
        }
        self.nodes.forget(node, count);
    }

    /// Ends the watches of a share.
    pub(super) fn unwatch_share(&mut self, share: ShareId) {
        for node in self.watches.nodes() {
            if self.nodes.share(node) == Ok(share) {
                self.unwatch(node);
            }
        }
    }

    fn unwatch(&mut self, node: u64) {
        let fd = self.nodes.open(node).ok();
        (self.watches).remove(node, fd.as_deref(), &self.descriptors);
    }

    /// Takes what the host tells of watched files.
    pub(super) fn receive_events(&mut self) {
        self.receive_events_of(None);
    }

    /// After a request: what it has done to files that other shares have, too.
    pub(super) fn receive_own_events(&mut self, header: &Header) {
        let is_common = |share: &&Share| share.cache != Cache::Private;
        if !self.watches.by_node.is_empty()
            && changes(header.opcode)
            && self.shares.values().filter(is_common).nth(1).is_some()
            && let Ok(share) = self.nodes.share(header.node)
        {
            self.receive_events_of(Some(share));
        }
    }

    fn receive_events_of(&mut self, doer: Option<ShareId>) {
        let mut files = Files {
            nodes: &mut self.nodes,
            handles: &self.handles,
            doer,
            reachable: HashMap::new(),
        };
        self.watches.receive(&mut files);
    }
}
