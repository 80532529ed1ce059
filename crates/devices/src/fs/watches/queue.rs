//! The events that wait for the guest.

use std::collections::VecDeque;

/// The most events that wait; then one for each watched file takes their place.
const MAX_EVENTS: usize = 8 << 10;
/// The size of an event before its name (`struct fuse_event` of hull's guest kernel).
const EVENT: usize = 24;

/// Something for the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub node: u64,
    /// IN_*, one of them, and whether it is about a directory.
    pub mask: u32,
    /// Of both halves of a move.
    pub cookie: u32,
    /// Empty: of the node itself.
    pub name: Vec<u8>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: VecDeque<Event>,
    /// What waits stands for events that were lost.
    replaced: bool,
    /// There were more since.
    lost: bool,
}

impl Queue {
    /// Adds an event; false when there are too many: see [`Queue::replace`].
    pub fn push(&mut self, event: Event) -> bool {
        if self.replaced {
            self.lost = true;
            return true;
        }
        // As inotify does.
        if self.waiting.back() != Some(&event) {
            if self.waiting.len() >= MAX_EVENTS {
                return false;
            }
            self.waiting.push_back(event);
        }
        true
    }

    /// Events that stand for all that was lost.
    pub fn replace(&mut self, events: impl Iterator<Item = Event>) {
        if self.replaced {
            self.lost = true;
            return;
        }
        self.waiting = events.collect();
        self.replaced = !self.waiting.is_empty();
    }

    /// Drops those of a node, whose number may become another's.
    pub fn forget(&mut self, node: u64) {
        self.waiting.retain(|event| event.node != node);
        self.replaced &= !self.waiting.is_empty();
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether all is taken, and more was lost: asked once.
    pub fn has_lost(&mut self) -> bool {
        if !self.waiting.is_empty() {
            return false;
        }
        self.replaced = false;
        std::mem::take(&mut self.lost)
    }

    /// Takes as many as have room, as the guest's kernel reads them.
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
        taken
    }
}
