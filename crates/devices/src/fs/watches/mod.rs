//! What the guest watches (inotify(7), fanotify(7)): what others do to it is told.
//!
//! hull's guest kernel names what is watched (WATCH) and leaves a request that waits for events
//! (EVENTS). A watch lasts until the guest forgets the node, which it does not while it watches.
//! Shares that only the guest changes are not watched. What the guest itself does, its kernel
//! knows: events of this process are left out.
//!
//! When too much happens at once, each watched file has an event that says that something of it has
//! changed.

mod group;

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::os::fd::OwnedFd;

use hull_device_control::Cache;
use libc::{
    FAN_ATTRIB, FAN_CLOSE_WRITE, FAN_CREATE, FAN_DELETE, FAN_DELETE_SELF, FAN_MODIFY,
    FAN_MOVE_SELF, FAN_MOVED_FROM, FAN_MOVED_TO, FAN_ONDIR, FAN_Q_OVERFLOW, FAN_RENAME,
};
use rustix::fs::FileType;
use rustix::io::Errno;

use super::nodes::{Nodes, ShareId, stat_at};
use super::server::Server;
use super::wire::{self, Input};
use crate::device::{EventFlags, EventRegistry};
use group::{FileId, Group, Told};

/// The most files that are watched.
const MAX_WATCHES: usize = 64 << 10;
/// The most events that wait for the guest; then one for each watched file takes their place.
const MAX_EVENTS: usize = 8 << 10;
/// The size of an event before its name (`struct fuse_event` of hull's guest kernel).
const EVENT: usize = 24;

/// What an event may have when it is one of a file itself.
const OF_ITSELF: u64 = FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_DELETE_SELF | FAN_MOVE_SELF;
/// Names that come, that stay, and that go.
const COMES: [u64; 2] = [FAN_CREATE, FAN_MOVED_TO];
const STAYS: [u64; 3] = [FAN_MODIFY, FAN_ATTRIB, FAN_CLOSE_WRITE];
const GOES: [u64; 2] = [FAN_MOVED_FROM, FAN_DELETE];

/// Something for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Event {
    node: u64,
    mask: u32,
    /// Of both halves of a move.
    cookie: u32,
    /// Empty: of the node itself.
    name: Vec<u8>,
}

#[derive(Debug)]
struct Watch {
    id: FileId,
    directory: bool,
}

/// The watches, and events that the guest has not taken yet.
#[derive(Debug, Default)]
pub struct Watches {
    /// Whether the guest's kernel knows of watches.
    pub agreed: bool,
    /// Made at the first watch.
    group: Option<Group>,
    events: Option<(EventRegistry, u64)>,
    by_node: HashMap<u64, Watch>,
    by_file: HashMap<FileId, u64>,
    /// Marks on the host, of which some may be on files that cannot be found any more.
    marks: usize,
    waiting: VecDeque<Event>,
    /// The events that wait are one for each watched file; and whether there were more since.
    lost: bool,
    lost_more: bool,
    cookie: u32,
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
    pub fn add(
        &mut self,
        node: u64,
        fd: &OwnedFd,
        directory: bool,
        descriptors: &OwnedFd,
    ) -> Result<(), Errno> {
        if self.marks >= MAX_WATCHES {
            return Err(Errno::NOSPC);
        }
        let group = match &self.group {
            Some(group) => group,
            None => {
                let group = Group::new()?;
                if let Some((events, token)) = &self.events {
                    let added = events.add(&group, *token, EventFlags::IN);
                    added.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
                }
                self.group.insert(group)
            }
        };
        let id = group.add(fd, directory, descriptors)?;
        let watch = Watch {
            id: id.clone(),
            directory,
        };
        // Again: the file may be another one, with the inode number of one that is gone.
        match self.by_node.insert(node, watch) {
            Some(before) => drop(self.by_file.remove(&before.id)),
            None => self.marks += 1,
        }
        self.by_file.insert(id, node);
        Ok(())
    }

    /// Ends the watch of a node, by its descriptor if the file can still be found.
    pub fn remove(&mut self, node: u64, fd: Option<&OwnedFd>, descriptors: &OwnedFd) {
        let Some(watch) = self.by_node.remove(&node) else {
            return;
        };
        self.by_file.remove(&watch.id);
        let group = self.group.as_ref();
        if let (Some(group), Some(fd)) = (group, fd)
            && group.remove(fd, watch.directory, descriptors).is_ok()
        {
            self.marks -= 1;
        }
    }

    /// Ends all.
    pub fn clear(&mut self) {
        if let (Some(group), Some((events, _))) = (&self.group, &self.events) {
            // It goes with its descriptor, too.
            let _ = events.remove(group);
        }
        *self = Self {
            events: self.events.take(),
            ..Self::default()
        };
    }

    /// Takes what the host tells.
    fn receive(&mut self, nodes: &mut Nodes) {
        let own = std::process::id().cast_signed();
        while let Some(group) = &self.group {
            let told = group.read();
            if told.is_empty() {
                return;
            }
            for told in told {
                if told.mask & FAN_Q_OVERFLOW != 0 {
                    self.all_have_changed();
                } else if told.process != own {
                    self.told(told, nodes);
                }
            }
        }
    }

    fn told(&mut self, told: Told, nodes: &mut Nodes) {
        if told.mask & FAN_RENAME != 0 {
            self.cookie = self.cookie.wrapping_add(1).max(1);
            let halves = [(told.before, FAN_MOVED_FROM), (told.after, FAN_MOVED_TO)];
            for (place, bit) in halves {
                if let Some((directory, name)) = place
                    && let Some(&node) = self.by_file.get(&directory)
                {
                    self.push(node, bit | told.mask & FAN_ONDIR, self.cookie, &name);
                }
            }
        }
        let (place, itself) = match told.place {
            Some((directory, name)) if name == b"." => (None, Some(directory)),
            place => (place, told.file),
        };
        if let Some((directory, name)) = place
            && let Some(&node) = self.by_file.get(&directory)
        {
            let has_any = |bits: [u64; 2]| bits.iter().any(|bit| told.mask & bit != 0);
            let swap = has_any(COMES) && has_any(GOES) && has_name(nodes, node, &name);
            let bits = match swap {
                false => [&COMES[..], &STAYS, &GOES],
                true => [&GOES[..], &COMES, &STAYS],
            };
            for bit in bits.into_iter().flatten() {
                if told.mask & bit != 0 {
                    self.push(node, bit | told.mask & FAN_ONDIR, 0, &name);
                }
            }
        }
        if let Some(&node) = itself.and_then(|file| self.by_file.get(&file)) {
            let mut mask = told.mask & OF_ITSELF;
            if mask & FAN_ATTRIB != 0 && mask & FAN_DELETE_SELF == 0 && nodes.is_removed(node) {
                mask |= FAN_DELETE_SELF;
            }
            for bit in STAYS.iter().chain(&[FAN_MOVE_SELF, FAN_DELETE_SELF]) {
                if mask & bit != 0 {
                    self.push(node, bit | told.mask & FAN_ONDIR, 0, b"");
                }
            }
            if mask & FAN_DELETE_SELF != 0 {
                // The mark goes with the file.
                if let Some(watch) = self.by_node.remove(&node) {
                    self.by_file.remove(&watch.id);
                    self.marks -= 1;
                }
            }
        }
    }

    fn push(&mut self, node: u64, mask: u64, cookie: u32, name: &[u8]) {
        if self.waiting.len() >= MAX_EVENTS {
            self.all_have_changed();
        }
        if self.lost {
            self.lost_more = true;
            return;
        }
        let event = Event {
            node,
            // All of them are in the lower half.
            mask: mask as u32,
            cookie,
            name: name.to_vec(),
        };
        // As inotify does.
        if self.waiting.back() != Some(&event) {
            self.waiting.push_back(event);
        }
    }

    /// Nobody knows what has happened.
    fn all_have_changed(&mut self) {
        if std::mem::replace(&mut self.lost, true) {
            self.lost_more = true;
            return;
        }
        self.waiting = (self.by_node.iter())
            .map(|(node, watch)| Event {
                node: *node,
                mask: (FAN_ATTRIB | if watch.directory { FAN_ONDIR } else { 0 }) as u32,
                cookie: 0,
                name: Vec::new(),
            })
            .collect();
    }

    /// Whether there is something for the guest.
    pub fn has_events(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes as many events as have room.
    pub fn take(&mut self, room: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        while let Some(event) = self.waiting.front() {
            let size = (EVENT + event.name.len()).next_multiple_of(8);
            if taken.len() + size > room {
                break;
            }
            taken.extend(event.node.to_le_bytes());
            // A name has at most 255 bytes.
            for word in [event.mask, event.cookie, event.name.len() as u32, 0] {
                taken.extend(word.to_le_bytes());
            }
            taken.extend(&event.name);
            taken.resize(taken.len().next_multiple_of(8), 0);
            self.waiting.pop_front();
        }
        if self.waiting.is_empty()
            && std::mem::take(&mut self.lost)
            && std::mem::take(&mut self.lost_more)
        {
            self.all_have_changed();
        }
        taken
    }
}

/// Whether a directory has the name now.
fn has_name(nodes: &mut Nodes, directory: u64, name: &[u8]) -> bool {
    let Ok(name) = CString::new(name) else {
        return false;
    };
    (nodes.open(directory)).is_ok_and(|directory| stat_at(&directory, &name).is_ok())
}

impl Server {
    /// The guest watches a node from now on.
    pub(super) fn watch(&mut self, node: u64) -> Result<(), Errno> {
        let (_, share) = self.share_of(node)?;
        // Nobody else changes it.
        if share.cache == Cache::Private {
            return Ok(());
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
    pub(super) fn wants_events(body: &mut Input<'_>) -> Result<bool, Errno> {
        Ok(body.u32()? & wire::EVENTS_STOP != 0)
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
        self.watches.receive(&mut self.nodes);
    }
}
