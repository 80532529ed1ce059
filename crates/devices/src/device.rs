//! What a virtio device is to the rest of hull, and what it may touch.
//!
//! A device implements [`Device`] and knows no transport: it sees its queues through [`Queues`], guest memory
//! through [`Memory`], and waits for host descriptors through [`EventRegistry`]. A transport (vhost-user here,
//! virtio-mmio in the built-in VMM) owns one thread per device, calls the device from that thread only, and
//! offers each virtqueue as a [`Ring`].
//!
//! Everything read from queues and guest memory was written by the guest: nothing here panics on it, every
//! loop over it is bounded, and a queue that breaks the rules ends the device with a [`DeviceError`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

/// Guest memory as devices see it: one snapshot of the memory map, cheap to clone.
pub type Memory = Arc<GuestMemoryMmap<()>>;

/// One request of the driver: a chain of descriptors, read lazily from guest memory.
///
/// Iterating it is bounded (loops, and lengths over 4 GiB in total, end the iteration), but each descriptor's
/// address and length are still the guest's word and must be resolved through [`Memory`].
pub type Chain = DescriptorChain<Memory>;

/// Readiness of a host descriptor, `epoll` events.
pub use rustix::event::epoll::EventFlags;

/// Why a device cannot go on. The transport logs it and stops this device, no other.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of the virtqueue itself.
    #[error("queue {queue} is broken: {source}")]
    Queue {
        /// Index of the queue.
        queue: usize,
        /// What the queue's code says.
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
        /// The host's answer.
        source: io::Error,
    },
}

/// One virtio device. All state is owned by the one thread that runs it; nothing is shared.
pub trait Device: Send + 'static {
    /// The virtio device ID: 26 fs, 19 vsock, 4 rng, 2 block, 1 net.
    fn device_type(&self) -> u32;

    /// Maximum size of each queue, a power of two; the number of queues is the length.
    fn queue_sizes(&self) -> &[u16];

    /// Device-specific feature bits. The transport adds VERSION_1, RING_EVENT_IDX and RING_INDIRECT_DESC.
    fn features(&self) -> u64;

    /// The config space, little endian.
    fn config(&self) -> Vec<u8>;

    /// What the driver took of [`Device::features`], as soon as it has; before any event that depends on it.
    fn acked_features(&mut self, _features: u64) {}

    /// Called once, on the device's thread or before it starts, before any event. The device adds the host
    /// descriptors it wants events of and keeps `events` for later changes.
    fn register(&mut self, events: EventRegistry) -> io::Result<()>;

    /// The driver kicked `queue`, or the transport wants it looked at (after it was enabled). May be spurious.
    ///
    /// The driver kicks again only after [`Queues::rearm`] said that nothing is left, so a device loops:
    /// pop until empty, rearm, and start over when rearm reports more.
    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError>;

    /// A registered descriptor is ready. May be spurious.
    fn host_event(
        &mut self,
        token: u64,
        ready: EventFlags,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError>;

    /// So much comes at once that the device had better run beside the guest than in turns with it.
    fn is_streaming(&self) -> bool {
        false
    }

    /// The driver reset the device: forget its requests and the state it negotiated.
    fn reset(&mut self) {}
}

/// One virtqueue, as a transport offers it. Shared so that a device's own worker threads can complete requests.
pub trait Ring: Send + Sync {
    /// The next chain that the driver made available; `None` when there is none or the queue is not set up.
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, virtio_queue::Error>;

    /// Takes back the last [`Ring::pop`], as if it had not happened. Only right after it.
    fn undo_pop(&self);

    /// Hands a chain back to the driver, `len` bytes written to it.
    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), virtio_queue::Error>;

    /// Tells the driver about used chains, if it wants to hear of them (EVENT_IDX).
    fn notify(&self, memory: &Memory) -> Result<(), virtio_queue::Error>;

    /// Asks the driver for kicks again. True when chains came in meanwhile, which may not be kicked for.
    fn rearm(&self, memory: &Memory) -> Result<bool, virtio_queue::Error>;

    /// Asks the driver not to kick while the device is at work on the queue anyway (only a hint).
    fn silence(&self, memory: &Memory) -> Result<(), virtio_queue::Error>;
}

/// A device's queues and guest memory, during one event.
pub struct Queues<'a> {
    rings: &'a [Arc<dyn Ring>],
    memory: Memory,
}

impl<'a> Queues<'a> {
    /// A view of `rings` over `memory`; for transports and tests.
    pub fn new(rings: &'a [Arc<dyn Ring>], memory: Memory) -> Self {
        Self { rings, memory }
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
        let memory = self.memory.clone();
        self.on(queue, |ring| ring.pop(&memory))
    }

    /// The next available chain of `queue`; when there is none, the driver is asked to kick.
    pub fn pop_or_rearm(&mut self, queue: usize) -> Result<Option<Chain>, DeviceError> {
        loop {
            let chain = self.pop(queue)?;
            if chain.is_some() || !self.rearm(queue)? {
                return Ok(chain);
            }
        }
    }

    /// Takes back the last [`Queues::pop`] of `queue`.
    pub fn undo_pop(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.ring(queue)?.undo_pop();
        Ok(())
    }

    /// Hands the chain that starts at `head` back to the driver, `len` bytes written.
    pub fn add_used(&mut self, queue: usize, head: u16, len: u32) -> Result<(), DeviceError> {
        let memory = self.memory.clone();
        self.on(queue, |ring| ring.add_used(&memory, head, len))
    }

    /// Tells the driver about used chains of `queue`, if it asked to be told. Call once per batch.
    pub fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        let memory = self.memory.clone();
        self.on(queue, |ring| ring.notify(&memory))
    }

    /// Asks for kicks on `queue` again; true when there is more to pop already.
    pub fn rearm(&mut self, queue: usize) -> Result<bool, DeviceError> {
        let memory = self.memory.clone();
        self.on(queue, |ring| ring.rearm(&memory))
    }

    /// Asks the driver not to kick `queue` while the device is popping from it.
    pub fn silence(&mut self, queue: usize) -> Result<(), DeviceError> {
        let memory = self.memory.clone();
        self.on(queue, |ring| ring.silence(&memory))
    }

    fn on<T>(
        &self,
        queue: usize,
        call: impl FnOnce(&dyn Ring) -> Result<T, virtio_queue::Error>,
    ) -> Result<T, DeviceError> {
        call(self.ring(queue)?.as_ref()).map_err(|source| DeviceError::Queue { queue, source })
    }
}

/// Which of a device's `N` first queues the driver was asked to kick, and has not kicked since: asked once is enough, and
/// while the device is at work on a queue it is asked not to.
#[derive(Debug)]
pub struct Kicks<const N: usize>([bool; N]);

impl<const N: usize> Default for Kicks<N> {
    fn default() -> Self {
        Self([false; N])
    }
}

impl<const N: usize> Kicks<N> {
    /// The next chain of `queue`. When there is none, the driver is asked to kick.
    pub fn pop(
        &mut self,
        queues: &mut Queues<'_>,
        queue: usize,
    ) -> Result<Option<Chain>, DeviceError> {
        let asked = self
            .0
            .get_mut(queue)
            .ok_or(DeviceError::NoSuchQueue(queue))?;
        loop {
            if let Some(chain) = queues.pop(queue)? {
                if std::mem::take(asked) {
                    queues.silence(queue)?;
                }
                return Ok(Some(chain));
            }
            if *asked {
                return Ok(None);
            }
            *asked = true;
            if !queues.rearm(queue)? {
                return Ok(None);
            }
        }
    }

    /// The driver has kicked, maybe for what is popped by now: then it must be asked again.
    pub fn came(&mut self, queue: usize) {
        if let Some(asked) = self.0.get_mut(queue) {
            *asked = false;
        }
    }
}

/// Where a device says which host descriptors it waits for. Clones mean the same registry.
///
/// It is an `epoll` instance of the device's own; the transport waits for it together with the queues' kicks.
/// Events are level-triggered unless [`EventFlags::ET`] is asked for.
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

    /// Changes what is waited for on `fd`.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::modify(&self.epoll, fd, data, interest)?)
    }

    /// Stops waiting for `fd`. An event of it that was fetched before may still be delivered.
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
