//! The vhost-user library's queue, with three additions: it reports what was written to the kick
//! descriptor, stopping it waits for the requests in flight, and its descriptors do not block.
//!
//! The library calls it from its threads, through [`VringT`]; the device through
//! [`VhostRing`](super::ring::VhostRing).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::in_flight::InFlight;

/// Guest memory that a front end can replace.
pub type AtomicMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// One queue. Clones are the same queue.
#[derive(Clone)]
pub struct Vring {
    inner: VringMutex<AtomicMemory>,
    kick: Arc<AtomicU64>,
    in_flight: Arc<InFlight>,
}

impl Vring {
    /// What the last kick added to the event counter.
    pub fn last_kick(&self) -> u64 {
        self.kick.load(Ordering::Relaxed)
    }

    /// Its requests in flight.
    pub fn in_flight(&self) -> &InFlight {
        &self.in_flight
    }

    fn stop(&self) {
        self.in_flight.stop(|| self.inner.get_ref());
    }

    /// Notifies the driver of completions without a notification.
    fn flush(&self) {
        if let Err(error) = self.inner.signal_used_queue() {
            tracing::debug!(%error, "cannot notify the driver");
        }
    }
}

/// Makes a descriptor of the front end non-blocking: on an empty or full one, the device's thread
/// would stall, and all that waits for it. The flag is the front end's, too, which can clear it;
/// requests of the sandbox have a timeout for that.
fn non_blocking(file: Option<File>) -> Option<File> {
    let file = file?;
    match fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK)) {
        Ok(()) => Some(file),
        Err(error) => {
            tracing::error!(%error, "a descriptor of a queue cannot be made non-blocking");
            None
        }
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
            in_flight: Arc::default(),
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
                // Nothing to read: the library treats that as a kick, too.
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
        match enabled {
            true => self.in_flight.start(),
            false => {
                self.stop();
                self.flush();
            }
        }
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

    /// The library calls this first when the front end stops the ring (GET_VRING_BASE).
    fn set_queue_ready(&self, ready: bool) {
        match ready {
            true => self.in_flight.start(),
            false => {
                self.stop();
                self.flush();
            }
        }
        self.inner.set_queue_ready(ready);
    }

    fn set_kick(&self, file: Option<File>) {
        self.inner.set_kick(non_blocking(file));
    }

    fn set_call(&self, file: Option<File>) {
        self.inner.set_call(non_blocking(file));
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(non_blocking(file));
    }
}
