//! The requests of one queue that were popped and not completed: how many there may be, and how a
//! queue is stopped without one of them completing later.
//!
//! Both transports use it, each with its own lock around the queue. The lock here is taken after
//! that one.

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use crate::device::{Chain, Memory};

/// How long a ring that is stopped waits for its requests in flight. They are system calls of the
/// fs device, which end unless the host's storage hangs.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether requests can be popped and completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Requests are popped and completed.
    Running,
    /// The driver stops the ring: those in flight complete.
    Stopping,
    /// Requests are neither popped nor completed.
    Stopped,
    /// As `Stopped`, permanently: the device has failed, or requests in flight did not complete in
    /// time.
    Abandoned,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct InFlight {
    state: Mutex<(Stage, usize)>,
    none_left: Condvar,
}

impl Default for InFlight {
    fn default() -> Self {
        Self {
            state: Mutex::new((Stage::Running, 0)),
            none_left: Condvar::new(),
        }
    }
}

impl InFlight {
    fn lock(&self) -> MutexGuard<'_, (Stage, usize)> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pops the next request of `queue`, which the caller has locked. `None` if there is none, or
    /// the ring is stopped.
    ///
    /// # Errors
    /// As `Queue::iter`; `InvalidAvailRingIndex` if as many are in flight as the queue has entries
    /// and there is one more: a driver that makes more available has made one available twice
    /// (virtio 1.2, 2.7.13), and could grow the device's memory without bound.
    pub fn pop(&self, queue: &mut Queue, memory: &Memory) -> Result<Option<Chain>, Error> {
        {
            let mut state = self.lock();
            if state.0 != Stage::Running {
                return Ok(None);
            }
            if state.1 >= usize::from(queue.size()) {
                let available = queue.avail_idx(memory.as_ref(), Ordering::Acquire)?;
                return match available.0 == queue.next_avail() {
                    true => Ok(None),
                    false => Err(Error::InvalidAvailRingIndex),
                };
            }
            state.1 += 1;
        }
        let chain = queue.iter(memory.clone()).map(|mut chains| chains.next());
        if !matches!(chain, Ok(Some(_))) {
            self.put_back();
        }
        chain
    }

    /// Undoes the last pop of `queue`.
    pub fn undo_pop(&self, queue: &mut Queue) {
        queue.go_to_previous_position();
        self.put_back();
    }

    /// Completes a request of `queue`, which the caller has locked. Ignored if the ring has been
    /// stopped, which waits for the requests in flight.
    ///
    /// # Errors
    /// As `Queue::add_used`.
    pub fn add_used(
        &self,
        queue: &mut Queue,
        memory: &Memory,
        head: u16,
        len: u32,
    ) -> Result<(), Error> {
        if !matches!(self.lock().0, Stage::Running | Stage::Stopping) {
            tracing::debug!(head, "a request completed after its queue was stopped");
            return Ok(());
        }
        let used = queue.add_used(memory.as_ref(), head, len);
        self.put_back();
        used
    }

    /// Enables the driver's notifications. True if there is more to pop.
    ///
    /// # Errors
    /// As `Queue::enable_notification`.
    pub fn rearm(&self, queue: &mut Queue, memory: &Memory) -> Result<bool, Error> {
        let more = queue.enable_notification(memory.as_ref())?;
        // Nothing is popped from a ring that is being stopped.
        Ok(more && self.lock().0 == Stage::Running)
    }

    /// How many requests are in flight.
    #[cfg(fuzzing)]
    pub fn count(&self) -> usize {
        self.lock().1
    }

    /// A request is not in flight any more, or was not there.
    fn put_back(&self) {
        let mut state = self.lock();
        state.1 = state.1.saturating_sub(1);
        // Notifying is a system call, also when nobody waits.
        if state.1 == 0 && state.0 == Stage::Stopping {
            self.none_left.notify_all();
        }
    }

    /// The device has failed: its requests in flight never complete.
    pub fn abandon(&self) {
        self.lock().0 = Stage::Abandoned;
        self.none_left.notify_all();
    }

    /// Waits for the requests in flight. Then none completes any more, until the next start.
    /// `lock_queue` takes the lock of the queue.
    pub fn stop<G>(&self, lock_queue: impl FnOnce() -> G) {
        let mut state = self.lock();
        if state.0 != Stage::Running {
            return;
        }
        state.0 = Stage::Stopping;
        // One that is popped at this moment is counted.
        let (state, timeout) = self
            .none_left
            .wait_timeout_while(state, STOP_TIMEOUT, |(stage, count)| {
                *stage == Stage::Stopping && *count > 0
            })
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        // No completion is halfway through while the queue is locked.
        let _queue = lock_queue();
        let mut state = self.lock();
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

    /// Starts a stopped ring.
    pub fn start(&self) {
        let mut state = self.lock();
        if state.0 == Stage::Stopped {
            state.0 = Stage::Running;
        }
    }
}
