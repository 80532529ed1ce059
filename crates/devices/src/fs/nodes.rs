//! The files that the guest knows ("nodes"): their identity on the host, and how to open them.
//!
//! A node is a host file, known by share, mount, device, inode and kind. (Not by its time of birth,
//! which changes when overlayfs copies a file up.) Where the guest found it (its parent node and
//! name) is kept up to date through the guest's own renames. A descriptor (`O_PATH`) is opened when
//! one is needed and kept in a bounded cache: a guest may know far more files than a process may
//! have open. A closed node is reopened by its place, step by step from a parent that is open, and
//! must be the same file; otherwise the answer is `ESTALE`, on which the guest looks the name up
//! again.
//!
//! A node whose place is about to disappear (the guest removes or replaces the name) is opened
//! before and kept open for as long as the guest knows it.
//!
//! Nothing here follows a symbolic link or takes more than one step of a path at a time.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::slab::Slab;
use super::wire;

pub mod persist;

/// Number of a share, never reused.
pub type ShareId = u32;

/// The most nodes there can be, however much memory the guest has: some 4 GiB of host memory.
const MAX_NODES: usize = 8 << 20;
/// The least that a guest may have.
const MIN_NODES: usize = 64 << 10;
/// Guest memory that Linux needs for an inode and a dentry of its fuse client at least, bytes
/// (`struct fuse_inode` and `struct dentry`, fs/fuse/fuse_i.h and linux/dcache.h): a guest that
/// keeps more nodes has not kept them in its caches.
const GUEST_BYTES_PER_NODE: u64 = 1 << 10;
/// Steps from a node to one that is open; more are a loop, or a path that the host could not walk
/// either.
const MAX_DEPTH: usize = 4096;
/// Node numbers start after the root's.
const FIRST: u64 = wire::ROOT + 1;

/// Which host file a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    share: ShareId,
    kind: u16,
    mount: u64,
    device: u64,
    inode: u64,
}

impl Key {
    fn new(share: ShareId, stat: &Statx) -> Self {
        Self {
            share,
            kind: stat.stx_mode & 0o170000,
            mount: stat.stx_mnt_id,
            device: device_of(stat),
            inode: stat.stx_ino,
        }
    }
}

struct Node {
    key: Key,
    /// Number of lookups that the guest has to forget.
    lookups: u64,
    /// Number of nodes whose place is in this one, plus one if it is the root of a share.
    holders: u32,
    parent: u64,
    name: CString,
    fd: Option<Arc<OwnedFd>>,
    /// The place is not reliable: the descriptor stays open.
    pinned: bool,
    /// Used since the cache was last swept over it.
    recent: bool,
    /// It is in [`Nodes::cached`].
    queued: bool,
    /// Distinguishes nodes that had the same number.
    generation: u64,
}

/// All nodes.
pub struct Nodes {
    nodes: Slab<Node>,
    by_key: HashMap<Key, u32>,
    /// Nodes with a descriptor that is not pinned, in the order in which the sweep comes to them.
    /// May name nodes that have gone since.
    cached: VecDeque<u32>,
    cache_limit: usize,
    pinned: usize,
    pin_limit: usize,
    node_limit: usize,
    generation: u64,
}

/// What [`Nodes::remember`] returns of a node.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    pub id: u64,
    pub generation: u64,
}

impl Nodes {
    /// An empty table that caches about `cache_limit` descriptors and pins at most `pin_limit`.
    pub fn new(cache_limit: usize, pin_limit: usize) -> Self {
        Self {
            nodes: Slab::new(),
            by_key: HashMap::new(),
            cached: VecDeque::new(),
            cache_limit: cache_limit.max(16),
            pinned: 0,
            pin_limit,
            node_limit: MAX_NODES,
            generation: 0,
        }
    }

    /// Bounds the number of nodes by the guest's memory, bytes.
    pub fn bound(&mut self, guest_memory: u64) {
        let nodes = usize::try_from(guest_memory / GUEST_BYTES_PER_NODE).unwrap_or(MAX_NODES);
        self.node_limit = nodes.clamp(MIN_NODES, MAX_NODES);
    }

    /// The node of the file `name` in `parent` whose status is `stat`, and one more lookup of it by
    /// the guest.
    pub fn remember(
        &mut self,
        stat: &Statx,
        share: ShareId,
        parent: u64,
        name: &CStr,
    ) -> Result<Known, Errno> {
        let key = Key::new(share, stat);
        if let Some(&index) = self.by_key.get(&key) {
            let known = self.set_place(index, parent, name)?;
            if let Some(node) = self.nodes.get_mut(index) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(known);
        }
        self.insert(key, parent, name, 1, 0)
    }

    /// The node that is the root of a share; it stays until [`Nodes::remove_share`].
    pub fn add_root(&mut self, share: ShareId, directory: OwnedFd) -> Result<u64, Errno> {
        let stat = stat_fd(&directory)?;
        let known = self.insert(Key::new(share, &stat), wire::ROOT, c"", 0, 1)?;
        if let Some(node) = self.get_mut(known.id) {
            node.fd = Some(Arc::new(directory));
            node.pinned = true;
        }
        Ok(known.id)
    }

    fn insert(
        &mut self,
        key: Key,
        parent: u64,
        name: &CStr,
        lookups: u64,
        holders: u32,
    ) -> Result<Known, Errno> {
        // Linux keeps 32 bits of it.
        self.generation = (self.generation + 1) & u64::from(u32::MAX >> 1);
        let generation = self.generation;
        let node = Node {
            key,
            lookups,
            holders,
            parent,
            name: name.to_owned(),
            fd: None,
            pinned: false,
            recent: false,
            queued: false,
            generation,
        };
        let index = self
            .nodes
            .insert(node, self.node_limit)
            .ok_or(Errno::NFILE)?;
        self.by_key.insert(key, index);
        self.hold(parent);
        Ok(Known {
            id: FIRST + u64::from(index),
            generation,
        })
    }

    fn index(id: u64) -> Option<u32> {
        u32::try_from(id.checked_sub(FIRST)?).ok()
    }

    fn get(&self, id: u64) -> Option<&Node> {
        self.nodes.get(Self::index(id)?)
    }

    fn get_mut(&mut self, id: u64) -> Option<&mut Node> {
        self.nodes.get_mut(Self::index(id)?)
    }

    /// The share that a node is in.
    pub fn share(&self, id: u64) -> Result<ShareId, Errno> {
        Ok(self.get(id).ok_or(Errno::STALE)?.key.share)
    }

    /// A node's kind of file.
    pub fn kind(&self, id: u64) -> Result<FileType, Errno> {
        let key = self.get(id).ok_or(Errno::STALE)?.key;
        Ok(FileType::from_raw_mode(key.kind.into()))
    }

    /// The node of the file whose status is `stat`, if the guest knows it.
    pub fn find(&self, share: ShareId, stat: &Statx) -> Option<u64> {
        let index = *self.by_key.get(&Key::new(share, stat))?;
        Some(FIRST + u64::from(index))
    }

    /// A descriptor (`O_PATH`) of a node.
    pub fn open(&mut self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        // From the node up to one that is open, then down again.
        let mut closed = Vec::new();
        let mut at = id;
        let mut fd = loop {
            let node = self.get_mut(at).ok_or(Errno::STALE)?;
            if let Some(fd) = &node.fd {
                node.recent = true;
                break fd.clone();
            }
            if closed.len() == MAX_DEPTH {
                return Err(Errno::STALE);
            }
            closed.push(at);
            at = node.parent;
        };
        while let Some(next) = closed.pop() {
            let node = self.get(next).ok_or(Errno::STALE)?;
            let opened = open_path(&fd, &node.name).map_err(|error| match error {
                Errno::NOENT | Errno::NOTDIR => Errno::STALE,
                other => other,
            });
            let opened = match opened {
                Err(Errno::MFILE | Errno::NFILE) => {
                    self.shrink(self.cached.len() / 2);
                    let node = self.get(next).ok_or(Errno::STALE)?;
                    open_path(&fd, &node.name)?
                }
                other => other?,
            };
            let key = self.get(next).ok_or(Errno::STALE)?.key;
            if Key::new(key.share, &stat_fd(&opened)?) != key {
                return Err(Errno::STALE);
            }
            fd = Arc::new(opened);
            self.cache(next, fd.clone());
        }
        Ok(fd)
    }

    /// Keeps a descriptor that was opened for a node.
    fn cache(&mut self, id: u64, fd: Arc<OwnedFd>) {
        if let Some(node) = self.get_mut(id) {
            node.fd = Some(fd);
            node.recent = true;
            self.enqueue(id);
        }
    }

    /// Lets the sweep come to a node. However often that is called, for whatever nodes, the queue
    /// is bounded.
    fn enqueue(&mut self, id: u64) {
        if self.cached.len() >= self.cache_limit {
            self.shrink(self.cache_limit - 1);
        }
        if let Some(index) = Self::index(id)
            && let Some(node) = self.nodes.get_mut(index)
            && !std::mem::replace(&mut node.queued, true)
        {
            self.cached.push_back(index);
        }
    }

    /// How many nodes there are.
    #[cfg(fuzzing)]
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// How long the queue of the sweep is.
    #[cfg(any(test, fuzzing))]
    pub fn queue_length(&self) -> usize {
        self.cached.len()
    }

    /// Closes descriptors that were not used recently until `target` are left.
    fn shrink(&mut self, target: usize) {
        // Each is passed over at most once, so this ends.
        let mut chances = self.cached.len();
        while self.cached.len() > target {
            let Some(index) = self.cached.pop_front() else {
                return;
            };
            let Some(node) = self.nodes.get_mut(index) else {
                continue;
            };
            node.queued = false;
            if node.pinned || node.fd.is_none() {
                continue;
            }
            if node.recent && chances > 0 {
                chances -= 1;
                node.recent = false;
                node.queued = true;
                self.cached.push_back(index);
                continue;
            }
            node.fd = None;
        }
    }

    /// The status of a node's file.
    pub fn stat(&mut self, id: u64) -> Result<Statx, Errno> {
        let node = self.get(id).ok_or(Errno::STALE)?;
        if let Some(fd) = &node.fd {
            return stat_fd(fd);
        }
        let parent = node.parent;
        let directory = self.open(parent)?;
        let node = self.get(id).ok_or(Errno::STALE)?;
        let stat = stat_at(&directory, &node.name).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => Errno::STALE,
            other => other,
        })?;
        if Key::new(node.key.share, &stat) == node.key {
            Ok(stat)
        } else {
            Err(Errno::STALE)
        }
    }

    /// Keeps a node open, with `fd` if it is given.
    pub fn pin(&mut self, id: u64, fd: Option<OwnedFd>) -> Result<(), Errno> {
        if self.get(id).ok_or(Errno::STALE)?.pinned {
            return Ok(());
        }
        if self.pinned >= self.pin_limit {
            return Err(Errno::NFILE);
        }
        let fd = match fd {
            Some(fd) => Arc::new(fd),
            None => self.open(id)?,
        };
        let node = self.get_mut(id).ok_or(Errno::STALE)?;
        node.fd = Some(fd);
        node.pinned = true;
        self.pinned += 1;
        Ok(())
    }

    /// The guest is about to take `name` out of `parent`, whose file has the status `stat`. The
    /// node that was pinned for that, if any.
    pub fn leaving(
        &mut self,
        share: ShareId,
        stat: &Statx,
        parent: u64,
        name: &CStr,
    ) -> Option<u64> {
        let id = self.find(share, stat)?;
        let node = self.get(id)?;
        // Another name of the same file does not matter.
        if node.pinned || node.parent != parent || node.name.as_c_str() != name {
            return None;
        }
        match self.pin(id, None) {
            Ok(()) => Some(id),
            // The guest may lose access to a file that it has removed; that must not keep it from
            // removing files.
            Err(_) => None,
        }
    }

    /// How often the guest has looked a node up and not forgotten it.
    pub fn lookups(&self, id: u64) -> u64 {
        self.get(id).map_or(0, |node| node.lookups)
    }

    /// Closes the descriptor of a node, unless its place is not reliable.
    pub fn let_go(&mut self, id: u64) {
        if let Some(node) = self.get_mut(id)
            && !node.pinned
        {
            node.fd = None;
        }
    }

    /// The same for a node that has this name in `parent`.
    pub fn let_go_if_called(&mut self, id: u64, parent: u64, name: &[u8]) {
        if let Some(node) = self.get(id)
            && node.parent == parent
            && node.name.as_bytes() == name
        {
            self.let_go(id);
        }
    }

    /// Whether the guest would find a node again from the root of its share.
    pub fn is_reachable(&mut self, id: u64) -> bool {
        let mut at = id;
        for _ in 0..MAX_DEPTH {
            if !self.is_at_its_place(at) {
                return false;
            }
            match self.get(at) {
                Some(node) if node.parent == wire::ROOT => return true,
                Some(node) => at = node.parent,
                None => return false,
            }
        }
        false
    }

    /// Whether a file that is open here has no name left.
    pub fn is_removed(&self, id: u64) -> bool {
        let fd = self.get(id).and_then(|node| node.fd.as_ref());
        fd.is_some_and(has_no_name)
    }

    /// Undoes [`Nodes::pin`]: the node's place is reliable after all.
    pub fn unpin(&mut self, id: u64) {
        let Some(index) = Self::index(id) else {
            return;
        };
        if let Some(node) = self.nodes.get_mut(index)
            && node.pinned
            && node.parent != wire::ROOT
        {
            node.pinned = false;
            self.pinned -= 1;
            self.enqueue(id);
        }
    }

    /// The guest has moved the file that had the status `stat` to `name` in `parent`.
    pub fn moved(
        &mut self,
        share: ShareId,
        stat: &Statx,
        parent: u64,
        name: &CStr,
    ) -> Result<(), Errno> {
        if let Some(index) = self.find(share, stat).and_then(Self::index) {
            self.set_place(index, parent, name)?;
        }
        Ok(())
    }

    fn set_place(&mut self, index: u32, parent: u64, name: &CStr) -> Result<Known, Errno> {
        let node = self.nodes.get_mut(index).ok_or(Errno::STALE)?;
        let known = Known {
            id: FIRST + u64::from(index),
            generation: node.generation,
        };
        // The root of a share has no place, even if the host's mounts lead back to it.
        if node.parent == wire::ROOT {
            return Ok(known);
        }
        if node.pinned {
            self.unpin(known.id);
        }
        let node = self.nodes.get_mut(index).ok_or(Errno::STALE)?;
        if node.parent == parent && node.name.as_c_str() == name {
            return Ok(known);
        }
        node.name = name.to_owned();
        let before = std::mem::replace(&mut node.parent, parent);
        if before != parent {
            self.hold(parent);
            self.release(before);
        }
        Ok(known)
    }

    fn hold(&mut self, id: u64) {
        if let Some(node) = self.get_mut(id) {
            node.holders = node.holders.saturating_add(1);
        }
    }

    fn release(&mut self, id: u64) {
        if let Some(node) = self.get_mut(id) {
            node.holders = node.holders.saturating_sub(1);
        }
        self.drop_unused(id);
    }

    /// The guest forgets `count` lookups.
    pub fn forget(&mut self, id: u64, count: u64) {
        if let Some(node) = self.get_mut(id) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.drop_unused(id);
    }

    /// Drops a node that is not used, and then its parents.
    fn drop_unused(&mut self, mut id: u64) {
        while let Some(index) = Self::index(id)
            && let Some(node) = self.nodes.get(index)
            && node.lookups == 0
            && node.holders == 0
        {
            let Some(node) = self.nodes.remove(index) else {
                return;
            };
            self.by_key.remove(&node.key);
            if node.pinned {
                self.pinned -= 1;
            }
            id = node.parent;
            if let Some(parent) = self.get_mut(id) {
                parent.holders = parent.holders.saturating_sub(1);
            }
        }
    }

    /// Forgets everything about a share.
    pub fn remove_share(&mut self, share: ShareId) {
        self.drop_where(|node| node.key.share == share);
    }

    /// Forgets all that the guest knew; shares stay.
    pub fn clear(&mut self) {
        for node in self.nodes.iter_mut() {
            if node.parent == wire::ROOT {
                node.lookups = 0;
                node.holders = 1;
            }
        }
        self.drop_where(|node| node.parent != wire::ROOT);
    }

    fn drop_where(&mut self, drop: impl Fn(&Node) -> bool) {
        let Self {
            nodes,
            by_key,
            pinned,
            ..
        } = self;
        nodes.retain(|node| {
            let keep = !drop(node);
            if !keep {
                by_key.remove(&node.key);
                if node.pinned && node.parent != wire::ROOT {
                    *pinned -= 1;
                }
            }
            keep
        });
    }
}

const STATUS: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// The device that a file is on, as one number.
pub fn device_of(stat: &Statx) -> u64 {
    u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor)
}

/// The status of an open file.
pub fn stat_fd(fd: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, STATUS)
}

/// Whether an open file has no name left.
pub fn has_no_name(fd: impl AsFd) -> bool {
    stat_fd(fd).is_ok_and(|stat| stat.stx_nlink == 0)
}

/// The status of `name` in `directory`, of the link itself if it is one.
pub fn stat_at(directory: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(directory, name, flags, STATUS)
}

/// An `O_PATH` descriptor of `name` in `directory`.
fn open_path(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_as_many_nodes_as_it_can_keep_in_its_caches() {
        let mut nodes = Nodes::new(0, 0);
        for (memory, limit) in [
            (0, MIN_NODES),
            (48 << 20, MIN_NODES),
            (256 << 20, 256 << 10),
            (32 << 30, MAX_NODES),
            (u64::MAX, MAX_NODES),
        ] {
            nodes.bound(memory);
            assert_eq!(nodes.node_limit, limit, "{memory}");
        }
    }
}
