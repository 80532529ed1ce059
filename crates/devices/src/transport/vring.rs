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
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory that a front end can replace.
pub type AtomicMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// How long a ring that is stopped waits for its requests in flight. They are system calls of the
/// fs device, which end unless the host's storage hangs.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// One queue. Clones are the same queue.
#[derive(Clone)]
pub struct Vring {
    inner: VringMutex<AtomicMemory>,
    kick: Arc<AtomicU64>,
    in_flight: Arc<InFlight>,
}

/// A driver makes more requests available than its queue has entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany;

/// Whether requests can be popped and completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Requests are popped and completed.
    Running,
    /// The front end stops the ring: those in flight complete.
    Stopping,
    /// Requests are neither popped nor completed.
    Stopped,
    /// As `Stopped`, permanently: the device has failed, or requests in flight did not complete in
    /// time.
    Abandoned,
}

/// The requests of one queue that were popped and not completed. Its lock is taken after that of
/// the queue.
struct InFlight {
    state: Mutex<(Stage, usize)>,
    none_left: Condvar,
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, (Stage, usize)> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vring {
    /// What the last kick added to the event counter.
    pub fn last_kick(&self) -> u64 {
        self.kick.load(Ordering::Relaxed)
    }

    /// Whether requests can be popped; if so, counts the one that the caller, which holds the
    /// queue's lock, is about to pop. It calls [`Vring::put_back`] if there is none.
    ///
    /// # Errors
    /// [`TooMany`] if as many are in flight as the queue has entries: a driver that makes more
    /// available has made one available twice (virtio 1.2, 2.7.13), and could grow the device's
    /// memory without bound.
    pub fn begin_pop(&self, queue_size: u16) -> Result<bool, TooMany> {
        let mut state = self.in_flight.lock();
        if state.0 != Stage::Running {
            return Ok(false);
        }
        if state.1 >= usize::from(queue_size) {
            return Err(TooMany);
        }
        state.1 += 1;
        Ok(true)
    }

    /// Whether requests can be popped.
    pub fn is_running(&self) -> bool {
        self.in_flight.lock().0 == Stage::Running
    }

    /// How many requests are in flight.
    #[cfg(fuzzing)]
    pub fn in_flight(&self) -> usize {
        self.in_flight.lock().1
    }

    /// A request is not in flight any more, or was not there.
    pub fn put_back(&self) {
        let mut state = self.in_flight.lock();
        state.1 = state.1.saturating_sub(1);
        // Notifying is a system call, also when nobody waits.
        if state.1 == 0 && state.0 == Stage::Stopping {
            self.in_flight.none_left.notify_all();
        }
    }

    /// Whether requests in flight can be completed. The caller holds the queue's lock.
    pub fn can_complete(&self) -> bool {
        matches!(self.in_flight.lock().0, Stage::Running | Stage::Stopping)
    }

    /// The device has failed: its requests in flight never complete.
    pub fn abandon(&self) {
        self.in_flight.lock().0 = Stage::Abandoned;
        self.in_flight.none_left.notify_all();
    }

    /// Waits for the requests in flight. Then none completes any more, until the next start.
    fn stop(&self) {
        let mut state = self.in_flight.lock();
        if state.0 != Stage::Running {
            return;
        }
        state.0 = Stage::Stopping;
        // One that is popped at this moment is counted.
        let (state, timeout) = self
            .in_flight
            .none_left
            .wait_timeout_while(state, STOP_TIMEOUT, |(stage, count)| {
                *stage == Stage::Stopping && *count > 0
            })
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        // No completion is halfway through while the queue is locked.
        let _queue = self.inner.get_ref();
        let mut state = self.in_flight.lock();
        if timeout.timed_out() {
            tracing::error!(
                requests = state.1,
                "requests in flight did not complete in {STOP_TIMEOUT:?}: their queue stays stopped"
            );
            state.0 = Stage::Abandoned;
        } else if state.0 == Stage::Stopping {
            state.0 = Stage::Stopped;
        }
    }

    fn start(&self) {
        let mut state = self.in_flight.lock();
        if state.0 == Stage::Stopped {
            state.0 = Stage::Running;
        }
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
            in_flight: Arc::new(InFlight {
                state: Mutex::new((Stage::Running, 0)),
                none_left: Condvar::new(),
            }),
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
            true => self.start(),
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
            true => self.start(),
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
