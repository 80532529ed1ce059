//! The interface between virtio devices and the rest of hull.
//!
//! A device implements [`Device`] and knows no transport: it sees its queues through [`Queues`],
//! guest memory through [`Memory`], and waits for host descriptors through [`EventRegistry`]. A
//! transport (vhost-user here, virtio-mmio in the built-in VMM) owns one thread per device, drives
//! the device through a [`DeviceRunner`] from that thread only, and offers each virtqueue as a
//! [`Ring`].
//!
//! Everything read from queues and guest memory was written by the guest: nothing here panics on
//! it, every loop over it is bounded, and a queue that breaks the rules ends the device with a
//! [`DeviceError`].
//!
//! [`DeviceRunner`]: crate::runner::DeviceRunner

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_device_control::DeviceType;
use rustix::event::epoll;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::state::{QueueState, RestoreError, SaveError, SavedState};

/// Guest memory as devices see it: one snapshot of the memory map, cheap to clone.
pub type Memory = Arc<GuestMemoryMmap<()>>;

/// One request of the driver: a chain of descriptors, read lazily from guest memory.
///
/// Iterating it is bounded (loops, and lengths over 4 GiB in total, end the iteration), but each
/// descriptor's address and length are untrusted and must be resolved through [`Memory`].
pub type Chain = DescriptorChain<Memory>;

/// Readiness of a host descriptor, `epoll` events.
pub use rustix::event::epoll::EventFlags;

/// Why a device stopped. The transport logs it and stops this device, no other.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of the virtqueue itself.
    #[error("queue {queue} is broken: {source}")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// The error of the queue's code.
        source: virtio_queue::Error,
    },
    /// The device has no such queue.
    #[error("queue {0} does not exist")]
    NoSuchQueue(usize),
    /// A request that the device cannot parse and cannot answer either.
    #[error("queue {queue}: malformed request: {reason}")]
    Request {
        /// Index of the queue.
        queue: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A host call that the device depends on failed.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// One virtio device. All state is owned by the one thread that runs it; nothing is shared.
///
/// # Lifecycle
///
/// [`DeviceRunner`](crate::runner::DeviceRunner) makes these calls in this order only:
///
/// ```text
///   register ─► activate ─► queue_event, host_event ─► quiesce ─► (save) ─► queue_event, …
///                  ▲                 │                    │
///                  └───── reset ◄────┴────────────────────┘
///
///   another instance:  register ─► restore ─► activate ─► queue_event, …
/// ```
///
/// [`Device::host_event`] also comes before `activate`: the queues are empty then.
///
/// A request is *in flight* from the moment the device pops it until it adds it to the used ring.
pub trait Device: Send + 'static {
    /// The device's virtio type.
    fn device_type(&self) -> DeviceType;

    /// Maximum size of each queue, a power of two; the number of queues is the length.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits. The transport adds VERSION_1, RING_EVENT_IDX and
    /// RING_INDIRECT_DESC.
    fn features(&self) -> u64;

    /// The config space, little endian.
    fn config(&self) -> Vec<u8>;

    /// Whether [`Device::config`] has changed since the last call. Asked after each event; the
    /// transport then notifies the driver, if it can.
    fn config_changed(&mut self) -> bool {
        false
    }

    /// Called once, on the device's thread or before it starts, before any event. The device adds
    /// the host descriptors that it waits for and keeps `events` for later changes.
    fn register(&mut self, _events: EventRegistry) -> io::Result<()> {
        Ok(())
    }

    /// The driver has accepted `features` of [`Device::features`]. Called before any event that
    /// depends on them; again after a reset, and when a front end changes them during setup.
    fn activate(&mut self, _features: u64) {}

    /// The driver notified `queue`, or the transport wants it checked (after it was enabled, or
    /// after a quiesce or restore). May be spurious.
    ///
    /// The driver notifies again only after [`Queues::rearm`] reported an empty queue. So a device
    /// pops until the queue is empty, rearms, and starts over when rearm reports more.
    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError>;

    /// A registered descriptor is ready. May be spurious.
    fn host_event(
        &mut self,
        _token: u64,
        _ready: EventFlags,
        _queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Finishes every request in flight and sends notifications that were held back. When this
    /// returns, the device does not touch guest memory until the next event.
    fn quiesce(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError>;

    /// The device's own state, without its queues. Only while it is quiesced.
    ///
    /// # Errors
    /// [`SaveError::NotSupported`] by default; [`SaveError::State`] names the state that cannot be
    /// saved.
    fn save(&mut self) -> Result<SavedState, SaveError> {
        Err(SaveError::NotSupported(self.device_type()))
    }

    /// Takes over what [`Device::save`] of another instance returned. The host's side of it
    /// (directories of shares, taps, disks) must be there already or is attached later, depending
    /// on the device.
    ///
    /// # Errors
    /// [`RestoreError`]: the device does not support it, the state is of another device or a newer
    /// version, or the host's side does not match. The device is unusable then.
    fn restore(&mut self, _state: &SavedState) -> Result<(), RestoreError> {
        Err(RestoreError::NotSupported(self.device_type()))
    }

    /// The driver reset the device, which drops what it negotiated and every request: those in
    /// flight are finished or discarded before this returns, and none completes or touches guest
    /// memory later.
    fn reset(&mut self);
}

/// One virtqueue, as a transport offers it. Shared, so that a device's worker threads can complete
/// requests.
pub trait Ring: Send + Sync {
    /// The next chain that the driver made available; `None` if there is none or the queue is not
    /// set up.
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, virtio_queue::Error>;

    /// Undoes the last [`Ring::pop`]. Only right after it.
    fn undo_pop(&self);

    /// Adds a chain to the used ring, with `len` bytes written to it. Ignored if the queue is no
    /// longer set up.
    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), virtio_queue::Error>;

    /// Notifies the driver of used chains, if it asked for notifications (EVENT_IDX).
    fn notify(&self, memory: &Memory) -> Result<(), virtio_queue::Error>;

    /// Enables the driver's notifications again. True if chains arrived meanwhile, for which there
    /// may be no notification.
    fn rearm(&self, memory: &Memory) -> Result<bool, virtio_queue::Error>;

    /// Disables the driver's notifications while the device works on the queue anyway (a hint).
    fn silence(&self, memory: &Memory) -> Result<(), virtio_queue::Error>;

    /// The ring's addresses and indices, to be saved. Only while the device is quiesced.
    fn state(&self) -> QueueState;
}

/// A device's queues and guest memory, during one event.
pub struct Queues<'a> {
    rings: &'a [Arc<dyn Ring>],
    memory: Memory,
    processed: usize,
}

impl<'a> Queues<'a> {
    /// A view of `rings` over `memory`; for transports and tests.
    pub fn new(rings: &'a [Arc<dyn Ring>], memory: Memory) -> Self {
        Self {
            rings,
            memory,
            processed: 0,
        }
    }

    /// Number of queues.
    pub fn count(&self) -> usize {
        self.rings.len()
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The ring behind `queue`, for a device that completes requests from a thread of its own.
    pub fn ring(&self, queue: usize) -> Result<&Arc<dyn Ring>, DeviceError> {
        self.rings.get(queue).ok_or(DeviceError::NoSuchQueue(queue))
    }

    /// The next available chain of `queue`.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        self.on(queue, |ring, memory| ring.pop(memory))
    }

    /// The next available chain of `queue`; if there is none, enables the driver's notifications.
    pub fn pop_or_rearm(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        loop {
            let chain = self.pop(queue)?;
            if chain.is_some() || !self.rearm(queue)? {
                return Ok(chain);
            }
        }
    }

    /// Undoes the last [`Queues::pop`] of `queue`.
    pub fn undo_pop(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.ring(queue)?.undo_pop();
        Ok(())
    }

    /// Completes the chain that starts at `head`, with `len` bytes written.
    pub fn add_used(&mut self, queue: usize, head: u16, len: u32) -> Result<(), DeviceError> {
        self.on(queue, |ring, memory| ring.add_used(memory, head, len))
    }

    /// Notifies the driver of used chains of `queue`, if it asked for notifications. Call once per
    /// batch.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.on(queue, |ring, memory| ring.notify(memory))
    }

    /// Enables notifications of `queue` again; true if there is more to pop already.
    pub fn rearm(&mut self, queue: usize) -> Result<bool, DeviceError> {
        self.on(queue, |ring, memory| ring.rearm(memory))
    }

    /// Disables notifications of `queue` while the device pops from it.
    pub fn silence(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.on(queue, |ring, memory| ring.silence(memory))
    }

    /// Reports `count` units of bulk traffic (frames), from which a transport may decide where the
    /// device's thread runs.
    pub fn add_processed(&mut self, count: usize) {
        self.processed = self.processed.saturating_add(count);
    }

    /// Sum of [`Queues::add_processed`] in this event.
    pub fn processed(&self) -> usize {
        self.processed
    }

    fn on<T>(
        &self,
        queue: usize,
        call: impl FnOnce(&dyn Ring, &Memory) -> Result<T, virtio_queue::Error>,
    ) -> Result<T, DeviceError> {
        call(self.ring(queue)?.as_ref(), &self.memory)
            .map_err(|source| DeviceError::Queue { queue, source })
    }
}

/// Suppression of driver notifications on a device's first `N` queues: enabled once when a queue is
/// empty, and disabled while the device works on it.
#[derive(Debug)]
pub struct NotificationState<const N: usize>([bool; N]);

impl<const N: usize> Default for NotificationState<N> {
    fn default() -> Self {
        Self([false; N])
    }
}

impl<const N: usize> NotificationState<N> {
    /// The next chain of `queue`. If there is none, enables the driver's notifications.
    pub fn pop(
        &mut self,
        queues: &mut Queues<'_>,
        queue: usize,
    ) -> Result<Option<Chain>, DeviceError> {
        let enabled = self
            .0
            .get_mut(queue)
            .ok_or(DeviceError::NoSuchQueue(queue))?;
        loop {
            if let Some(chain) = queues.pop(queue)? {
                if std::mem::take(enabled) {
                    queues.silence(queue)?;
                }
                return Ok(Some(chain));
            }
            if *enabled {
                return Ok(None);
            }
            *enabled = true;
            if !queues.rearm(queue)? {
                return Ok(None);
            }
        }
    }

    /// The driver has notified `queue`, possibly for chains that are popped by now: notifications
    /// must be enabled again.
    pub fn on_kick(&mut self, queue: usize) {
        if let Some(enabled) = self.0.get_mut(queue) {
            *enabled = false;
        }
    }
}

/// The host descriptors that a device waits for. Clones are the same registry.
///
/// It is an `epoll` instance of the device's own; the transport waits for it together with the
/// queues' notifications. Events are level-triggered unless [`EventFlags::ET`] is set.
#[derive(Clone, Debug)]
pub struct EventRegistry {
    epoll: Arc<OwnedFd>,
}

impl EventRegistry {
    /// An empty registry.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?),
        })
    }

    /// Starts waiting for `interest` on `fd`; its events carry `token`.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, fd, data, interest)?)
    }

    /// Changes the events waited for on `fd`.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::modify(&self.epoll, fd, data, interest)?)
    }

    /// Stops waiting for `fd`. An event that was fetched before may still be delivered.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Appends the events that are ready now to `ready`, without waiting; for transports and tests.
    pub fn poll(&self, ready: &mut Vec<(u64, EventFlags)>) -> io::Result<()> {
        let mut events = [const {
            epoll::Event {
                flags: EventFlags::empty(),
                data: epoll::EventData::new_u64(0),
            }
        }; 64];
        let now = rustix::event::Timespec::default();
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&now)) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        ready.extend(
            events
                .iter()
                .take(count)
                .map(|event| (event.data.u64(), event.flags)),
        );
        Ok(())
    }
}

impl AsFd for EventRegistry {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
