//! What the fuzz targets of devices share: numbers out of the fuzzer's bytes, guest memory, queues
//! in it.
//!
//! The guest's side writes without checks of its own: whatever it writes, the device has to bear
//! it.

pub mod disk;
pub mod tar;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hull_devices::device::{Chain, Memory, Ring};
use hull_devices::state::QueueState;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Entries of a queue.
pub const QUEUE: u16 = 16;
/// Where the parts of a queue are, seen from its beginning, which is where its descriptors are.
pub const AVAILABLE: u64 = 0x400;
const USED: u32 = 0x800;

/// Numbers out of the fuzzer's bytes; zero when they are used up.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    /// Whether all bytes are used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    pub fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

/// Waits for the end of threads that a run has started: what they hold would look like leaks.
pub fn finish_threads() {
    static BEFORE: OnceLock<usize> = OnceLock::new();
    let count = || std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    let before = *BEFORE.get_or_init(count);
    let end = Instant::now() + Duration::from_secs(5);
    while count() > before {
        assert!(Instant::now() < end, "a thread does not end");
        std::thread::yield_now();
    }
}

/// Guest memory from address 0 on.
pub fn memory(size: usize) -> Memory {
    let ranges = [(GuestAddress(0), size)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("guest memory"))
}

/// A descriptor as it stands in a queue.
pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// A queue, and how many chains were taken from it and given back: the guest can have its buffers
/// in the rings themselves, so those tell nothing.
pub struct FuzzRing {
    queue: Mutex<Queue>,
    taken: AtomicUsize,
    given: AtomicUsize,
}

impl FuzzRing {
    /// A queue that begins at `base`, with event indices or without.
    pub fn new(base: u32, event_index: bool) -> Arc<Self> {
        let mut queue = Queue::new(QUEUE).expect("a valid size");
        queue.set_desc_table_address(Some(base), None);
        queue.set_avail_ring_address(Some(base + AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(base + USED), None);
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        Arc::new(Self {
            queue: Mutex::new(queue),
            taken: AtomicUsize::new(0),
            given: AtomicUsize::new(0),
        })
    }

    /// Whether each chain that was taken was given back.
    pub fn all_given(&self) -> bool {
        self.given.load(Relaxed) == self.taken.load(Relaxed)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring for FuzzRing {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, Error> {
        let chain = self.queue().iter(memory.clone())?.next();
        self.taken.fetch_add(usize::from(chain.is_some()), Relaxed);
        Ok(chain)
    }

    fn undo_pop(&self) {
        self.queue().go_to_previous_position();
        self.taken.fetch_sub(1, Relaxed);
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.given.fetch_add(1, Relaxed);
        self.queue().add_used(memory.as_ref(), head, len)
    }

    fn notify(&self, memory: &Memory) -> Result<(), Error> {
        self.queue().needs_notification(memory.as_ref()).map(|_| ())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, Error> {
        self.queue().enable_notification(memory.as_ref())
    }

    fn silence(&self, memory: &Memory) -> Result<(), Error> {
        self.queue().disable_notification(memory.as_ref())
    }

    fn state(&self) -> QueueState {
        QueueState::from(&*self.queue())
    }
}
