//! The saved state of an fs device: its shares by name, the files that the guest knows, and what it
//! has open.
//!
//! The directories are not part of it. A restored device is given the same ones under the same
//! names before, and finds the files in them again (see [`persist`](super::nodes::persist)); open
//! files are opened again. A file that is open and has no name any more could not be found again,
//! so the device is not saved then, and the error names the file.

use std::collections::BTreeMap;

use hull_device_control::{Cache, DeviceType};
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::handles::{Handle, OpenFile};
use super::nodes::ShareId;
use super::nodes::persist::SavedNodes;
use super::server::Server;
use super::slab::Slab;
use crate::state::{RestoreError, SaveError, SavedState};

/// Version of [`State`].
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct State {
    shares: Vec<SavedShare>,
    next_share: ShareId,
    nodes: SavedNodes,
    handles: Vec<SavedHandle>,
    /// Whether the guest leaves its locks to the device.
    #[serde(default)]
    locks: bool,
    /// Whether the guest names what it watches, and nodes that it does.
    #[serde(default)]
    watches: Option<Vec<u64>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedShare {
    id: ShareId,
    name: String,
    /// Node number of its root.
    root: u64,
    cache: Cache,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedHandle {
    number: u32,
    open: Open,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Open {
    Root,
    File { node: u64, flags: u32 },
    Directory { node: u64 },
}

/// The state of a file system without requests in flight.
///
/// # Errors
/// [`SaveError::State`] if an open file or directory has no name any more, or the host has moved
/// it.
pub fn save(server: &mut Server) -> Result<SavedState, SaveError> {
    if server.has_locks() {
        return Err(SaveError::State {
            device: DeviceType::Fs,
            reason: "the guest has locked files".into(),
        });
    }
    let mut handles = Vec::new();
    for (number, handle) in server.handles.iter() {
        let open = match handle {
            Handle::Root => Open::Root,
            Handle::File(file) => Open::File {
                node: file.node,
                flags: file.flags.bits(),
            },
            Handle::Directory { node, .. } => Open::Directory { node: *node },
        };
        handles.push(SavedHandle { number, open });
    }
    for handle in &handles {
        if let Open::File { node, .. } | Open::Directory { node } = handle.open
            && !server.nodes.is_at_its_place(node)
        {
            return Err(SaveError::State {
                device: DeviceType::Fs,
                reason: format!(
                    "{} is open and has been removed or moved",
                    name(server, node)
                ),
            });
        }
    }
    let shares = server.shares.iter().map(|(id, share)| SavedShare {
        id: *id,
        name: share.name.clone(),
        root: share.root,
        cache: share.cache,
    });
    let state = State {
        shares: shares.collect(),
        next_share: server.next_share,
        nodes: server.nodes.save(),
        handles,
        locks: server.locks.agreed,
        watches: (server.watches.agreed).then(|| server.watches.nodes()),
    };
    SavedState::new(DeviceType::Fs, VERSION, state)
}

/// A node's name, for messages.
fn name(server: &Server, node: u64) -> String {
    match server.share_of(node) {
        Ok((_, share)) => format!("\"{}\" of share {}", server.nodes.path(node), share.name),
        Err(_) => "a file that the guest has forgotten".into(),
    }
}

/// Takes over a saved state. The file system is fresh, and its shares have been added.
///
/// # Errors
/// The state is damaged or of a newer version, a share is missing, or a file that was open cannot
/// be opened again.
pub fn restore(server: &mut Server, state: &SavedState) -> Result<(), RestoreError> {
    let mismatch = |reason: String| RestoreError::mismatch(DeviceType::Fs, reason);
    let (_, state) = state.read::<State>(DeviceType::Fs, VERSION)?;

    // Shares keep the numbers from which the guest's inode numbers are made; those that the state
    // does not know get new ones.
    let mut fresh: BTreeMap<_, _> = std::mem::take(&mut server.shares)
        .into_values()
        .map(|share| (share.name.clone(), share))
        .collect();
    let mut roots = BTreeMap::new();
    for saved in state.shares {
        let mut share = fresh
            .remove(&saved.name)
            .ok_or_else(|| mismatch(format!("share \"{}\" has not been added", saved.name)))?;
        let root = server.nodes.open(share.root).map_err(|error| {
            mismatch(format!("share \"{}\" cannot be used: {error}", saved.name))
        })?;
        if roots.insert(saved.id, root).is_some() || saved.id >= state.next_share {
            return Err(mismatch("two shares have one number".into()));
        }
        share.root = saved.root;
        share.cache = saved.cache;
        share.salt = Server::salt(saved.id);
        server.shares.insert(saved.id, share);
    }
    let mut others = Vec::new();
    for share in fresh.into_values() {
        others.push((server.nodes.open(share.root), share));
    }
    server.next_share = state.next_share;
    server.nodes.restore(state.nodes, roots).map_err(mismatch)?;
    if let Some(share) = (server.shares.iter())
        .find_map(|(id, share)| (server.nodes.share(share.root) != Ok(*id)).then_some(share))
    {
        return Err(mismatch(format!("share \"{}\" has no root", share.name)));
    }
    for (root, share) in others {
        root.map_err(Into::into)
            .and_then(|root| root.try_clone())
            .and_then(|root| Ok(server.add_share(&share.name, root, share.cache)?))
            .map_err(|error| {
                mismatch(format!("share \"{}\" cannot be used: {error}", share.name))
            })?;
    }
    server.locks.agreed = state.locks;
    server.watches.agreed = state.watches.is_some();
    for node in state.watches.unwrap_or_default() {
        // As at first: without it there are the events of the guest's own kernel.
        let _ = server.watch(node);
    }
    // Nobody has watched meanwhile.
    server.watches.all_have_changed();
    let mut handles = Vec::with_capacity(state.handles.len());
    for handle in state.handles {
        let opened = open(server, &handle.open).map_err(|error| {
            let node = match handle.open {
                Open::File { node, .. } | Open::Directory { node } => node,
                Open::Root => 0,
            };
            mismatch(format!("cannot open {} again: {error}", name(server, node)))
        })?;
        handles.push((handle.number, opened));
    }
    server.handles = Slab::from_entries(handles, server.handle_limit)
        .ok_or_else(|| mismatch("open files are not in order, or too many".into()))?;
    Ok(())
}

/// Opens again what was open.
fn open(server: &mut Server, open: &Open) -> Result<Handle, Errno> {
    Ok(match *open {
        Open::Root => Handle::Root,
        Open::File { node, flags } => {
            if server.nodes.kind(node)? != rustix::fs::FileType::RegularFile {
                return Err(Errno::STALE);
            }
            let flags = OFlags::from_bits_retain(flags);
            let path = server.nodes.open(node)?;
            let file = server.reopen(&path, super::names::reopen_flags(flags))?;
            let share = server.nodes.share(node)?;
            Handle::File(OpenFile::new(share, node, flags, file)?)
        }
        Open::Directory { node } => {
            let (share, path) = server.directory(node)?;
            let file = server.reopen(&path, OFlags::RDONLY | OFlags::DIRECTORY)?;
            Handle::Directory {
                share,
                node,
                file: file.into(),
            }
        }
    })
}
