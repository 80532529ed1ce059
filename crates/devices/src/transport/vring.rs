//! The vhost-user library's queue, with one thing more: it tells what was written to the kick descriptor.
//!
//! The library calls it from its threads; [`vhost_user`](super::vhost_user) asks for the last kick.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use rustix::io::Errno;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

pub type AtomicMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// One queue. Clones are the same queue.
#[derive(Clone)]
pub struct Vring {
    inner: VringMutex<AtomicMemory>,
    kick: Arc<AtomicU64>,
}

impl Vring {
    /// What the last kick added to the event counter.
    pub fn last_kick(&self) -> u64 {
        self.kick.load(Ordering::Relaxed)
    }
}

impl<'a> VringStateGuard<'a, AtomicMemory> for Vring {
    type G = MutexGuard<'a, VringState<AtomicMemory>>;
}

impl<'a> VringStateMutGuard<'a, AtomicMemory> for Vring {
    type G = MutexGuard<'a, VringState<AtomicMemory>>;
}

impl VringT<AtomicMemory> for Vring {
    fn new(memory: AtomicMemory, max_queue_size: u16) -> Result<Self, Error> {
        Ok(Self {
            inner: VringMutex::new(memory, max_queue_size)?,
            kick: Arc::default(),
        })
    }

    fn read_kick(&self) -> io::Result<bool> {
        let state = self.inner.get_ref();
        if let Some(kick) = state.get_kick() {
            // SAFETY: open for as long as `state` is locked.
            let kick = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
            let mut value = [0; 8];
            match rustix::io::read(kick, &mut value) {
                Ok(_) => {}
                // Somebody else's counter is as good as read, as it is for the library.
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.kick
                .store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        Ok(state.is_enabled())
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, AtomicMemory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, AtomicMemory>>::G {
        self.inner.get_mut()
    }

    fn add_used(&self, index: u16, length: u32) -> Result<(), Error> {
        self.inner.add_used(index, length)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.inner.needs_notification()
    }

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
    }

    fn set_queue_info(&self, table: u64, available: u64, used: u64) -> Result<(), Error> {
        self.inner.set_queue_info(table, available, used)
    }

    fn queue_next_avail(&self) -> u16 {
        self.inner.queue_next_avail()
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
    }

    fn set_queue_next_used(&self, index: u16) {
        self.inner.set_queue_next_used(index);
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.inner.queue_used_idx()
    }

    fn set_queue_size(&self, count: u16) {
        self.inner.set_queue_size(count);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(file);
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(file);
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
