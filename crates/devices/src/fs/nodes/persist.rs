//! The saved form of the node table, and a fresh table over the same directories.
//!
//! A node is saved by its place: share, parent and name, with the kind and inode number of the file
//! that was there. When it is restored, the file at that place must have the same kind and number;
//! the host's device and mount numbers may differ. Otherwise the node is *lost*: its number stays
//! taken until the guest forgets it, and every use of it is answered with `ESTALE`, on which the
//! guest looks the name up again. A file without a name is lost, too; whether it may be is for the
//! caller to decide ([`Nodes::is_at_its_place`]).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{FIRST, Key, MAX_DEPTH, MAX_NODES, Node, Nodes, ShareId, stat_at, stat_fd};
use crate::fs::slab::Slab;
use crate::fs::wire;

/// The parent of a lost node: no node has this number.
const NOWHERE: u64 = 0;

/// A node table.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedNodes {
    generation: u64,
    nodes: Vec<SavedNode>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedNode {
    id: u64,
    generation: u64,
    lookups: u64,
    share: ShareId,
    kind: u16,
    inode: u64,
    /// `None` for the root of a share, and for a lost node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<SavedPlace>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_root: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedPlace {
    parent: u64,
    name: SavedName,
}

/// A file name. Most are text.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum SavedName {
    Text(String),
    Bytes(Vec<u8>),
}

impl SavedName {
    fn new(name: &CString) -> Self {
        match name.to_str() {
            Ok(text) => Self::Text(text.to_owned()),
            Err(_) => Self::Bytes(name.to_bytes().to_vec()),
        }
    }

    /// The name, if it is one step of a path.
    fn decode(self) -> Option<CString> {
        let bytes = match self {
            Self::Text(text) => text.into_bytes(),
            Self::Bytes(bytes) => bytes,
        };
        let is_step = !matches!(bytes.as_slice(), b"" | b"." | b"..") && !bytes.contains(&b'/');
        CString::new(bytes).ok().filter(|_| is_step)
    }
}

impl Nodes {
    /// The table's saved form.
    pub fn save(&self) -> SavedNodes {
        let nodes = self.nodes.iter().map(|(index, node)| {
            let is_root = node.parent == wire::ROOT;
            SavedNode {
                id: FIRST + u64::from(index),
                generation: node.generation,
                lookups: node.lookups,
                share: node.key.share,
                kind: node.key.kind,
                inode: node.key.inode,
                place: (!is_root && !node.pinned && node.parent != NOWHERE).then(|| SavedPlace {
                    parent: node.parent,
                    name: SavedName::new(&node.name),
                }),
                is_root,
            }
        });
        SavedNodes {
            generation: self.generation,
            nodes: nodes.collect(),
        }
    }

    /// Whether a node's file is where the guest knows it, so that it would be found there again.
    pub fn is_at_its_place(&mut self, id: u64) -> bool {
        let Some(node) = self.get(id) else {
            return false;
        };
        if node.parent == wire::ROOT {
            return true;
        }
        if node.pinned {
            return false;
        }
        let (key, parent, name) = (node.key, node.parent, node.name.clone());
        self.open(parent)
            .and_then(|directory| stat_at(&directory, &name))
            .is_ok_and(|stat| Key::new(key.share, &stat) == key)
    }

    /// The path by which the guest knew a node last, within its share; for messages.
    pub fn path(&self, id: u64) -> String {
        let mut names = Vec::new();
        let mut at = id;
        while let Some(node) = self.get(at)
            && node.parent != wire::ROOT
            && names.len() < MAX_DEPTH
        {
            names.push(node.name.to_string_lossy());
            at = node.parent;
        }
        names.reverse();
        names.join("/")
    }

    /// Replaces the table by a saved one, over the root directories of the shares. The cache's
    /// limits stay.
    ///
    /// # Errors
    /// If the saved table contradicts itself, or a root directory cannot be examined.
    pub fn restore(
        &mut self,
        saved: SavedNodes,
        mut roots: BTreeMap<ShareId, Arc<OwnedFd>>,
    ) -> Result<(), String> {
        let mut entries = Vec::with_capacity(saved.nodes.len());
        for node in saved.nodes {
            let index = Self::index(node.id).ok_or_else(|| format!("it has a node {}", node.id))?;
            entries.push((index, Self::restored(node, &mut roots)?));
        }
        if !roots.is_empty() {
            return Err("a share has no root in it".into());
        }
        self.nodes = Slab::from_entries(entries, MAX_NODES)
            .ok_or("its nodes are not in order, or too many")?;
        self.by_key.clear();
        self.cached.clear();
        self.pinned = 0;
        self.generation = saved.generation;

        let ids: Vec<u64> = (self.nodes.iter())
            .map(|(index, _)| FIRST + u64::from(index))
            .collect();
        let mut resolved = vec![false; ids.last().map_or(0, |last| (last - FIRST) as usize + 1)];
        for id in &ids {
            self.resolve(*id, &mut resolved);
        }
        for id in &ids {
            let parent = self.get(*id).map_or(NOWHERE, |node| node.parent);
            self.hold(parent);
        }
        // Directories that were known for the sake of nodes that are lost.
        for id in ids {
            self.drop_unused(id);
        }
        Ok(())
    }

    /// A node whose file is not looked for yet.
    fn restored(
        saved: SavedNode,
        roots: &mut BTreeMap<ShareId, Arc<OwnedFd>>,
    ) -> Result<Node, String> {
        let mut node = Node {
            // No file has it, and no other node: see `Key`.
            key: Key {
                share: saved.share,
                kind: saved.kind,
                mount: u64::MAX,
                device: u64::MAX - saved.id,
                inode: saved.inode,
            },
            lookups: saved.lookups,
            holders: 0,
            parent: NOWHERE,
            name: CString::default(),
            fd: None,
            pinned: false,
            recent: false,
            queued: false,
            generation: saved.generation,
        };
        if saved.is_root {
            let root = roots
                .remove(&saved.share)
                .ok_or("it has a root of no share, or two of one")?;
            node.key = stat_fd(&root)
                .map(|stat| Key::new(saved.share, &stat))
                .map_err(|error| format!("the root of a share cannot be examined: {error}"))?;
            node.parent = wire::ROOT;
            node.holders = 1;
            node.pinned = true;
            node.fd = Some(root);
        } else if let Some(SavedPlace { parent, name }) = saved.place {
            node.parent = parent;
            node.name = name.decode().ok_or("it has a node without a name")?;
        }
        Ok(node)
    }

    /// Finds the file of a node again, after those of its parents. The node is lost if that fails.
    fn resolve(&mut self, id: u64, resolved: &mut [bool]) {
        let mut chain = Vec::new();
        let mut at = id;
        while let Some(index) = Self::index(at)
            && resolved.get(index as usize) == Some(&false)
            && chain.len() < MAX_DEPTH
            && let Some(node) = self.nodes.get(index)
        {
            chain.push(at);
            // A loop ends at MAX_DEPTH, or here: each is visited once.
            resolved[index as usize] = true;
            at = node.parent;
        }
        while let Some(id) = chain.pop() {
            let key = self.find_again(id);
            let Some(index) = Self::index(id) else {
                continue;
            };
            let is_new = |key: &Key| !self.by_key.contains_key(key);
            let key = key.ok().filter(is_new);
            let Some(node) = self.nodes.get_mut(index) else {
                continue;
            };
            match key {
                Some(key) => {
                    node.key = key;
                    self.by_key.insert(key, index);
                }
                None => node.parent = NOWHERE,
            }
        }
    }

    /// The key of the file that is at a node's place now, if it can be the same file.
    fn find_again(&mut self, id: u64) -> Result<Key, Errno> {
        let node = self.get(id).ok_or(Errno::STALE)?;
        let (saved, parent, name) = (node.key, node.parent, node.name.clone());
        if parent == wire::ROOT {
            return Ok(saved);
        }
        let parent_share = self.get(parent).ok_or(Errno::STALE)?.key.share;
        let directory = self.open(parent)?;
        let key = Key::new(saved.share, &stat_at(&directory, &name)?);
        if parent_share == saved.share && (key.kind, key.inode) == (saved.kind, saved.inode) {
            Ok(key)
        } else {
            Err(Errno::STALE)
        }
    }
}
