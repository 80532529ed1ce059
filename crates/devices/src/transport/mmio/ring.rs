//! A queue of a virtio-mmio device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Error, Queue, QueueT};

use super::{INTERRUPT_RING, Shared};
use crate::device::{Chain, Memory, Ring};
use crate::state::QueueState;
use crate::transport::in_flight::InFlight;

/// One queue, from the driver's set-up to the device's reset.
pub struct MmioRing {
    queue: Mutex<Queue>,
    in_flight: InFlight,
    shared: Arc<Shared>,
}

impl MmioRing {
    /// A ring that the driver has set up. A queue that is not ready stays empty.
    pub fn new(queue: Queue, shared: Arc<Shared>) -> Self {
        Self {
            queue: Mutex::new(queue),
            in_flight: InFlight::default(),
            shared,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops it: requests in flight have completed when this returns, or never do.
    pub fn stop(&self) {
        self.in_flight.stop(|| self.lock());
        self.lock().set_ready(false);
    }

    /// The device has failed: its requests in flight never complete.
    pub fn abandon(&self) {
        self.in_flight.abandon();
    }
}

impl Ring for MmioRing {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, Error> {
        let mut queue = self.lock();
        match queue.ready() {
            true => self.in_flight.pop(&mut queue, memory),
            false => Ok(None),
        }
    }

    fn undo_pop(&self) {
        self.in_flight.undo_pop(&mut self.lock());
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.in_flight.add_used(&mut self.lock(), memory, head, len)
    }

    fn notify(&self, memory: &Memory) -> Result<(), Error> {
        let mut queue = self.lock();
        if queue.ready() && queue.needs_notification(memory.as_ref())? {
            drop(queue);
            self.shared.interrupt.raise(INTERRUPT_RING);
        }
        Ok(())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, Error> {
        let mut queue = self.lock();
        match queue.ready() {
            true => self.in_flight.rearm(&mut queue, memory),
            false => Ok(false),
        }
    }

    fn silence(&self, memory: &Memory) -> Result<(), Error> {
        let mut queue = self.lock();
        match queue.ready() {
            true => queue.disable_notification(memory.as_ref()),
            false => Ok(()),
        }
    }

    fn state(&self) -> QueueState {
        QueueState::from(&*self.lock())
    }
}
