//! Drives a device for a front end in another process (QEMU, user-mode Linux) that speaks vhost-user.
//!
//! [`serve`] owns one listening socket and serves exactly one front end on it. The device runs on a thread of
//! its own; it is called from nowhere else. When the front end goes away, or breaks the protocol, [`serve`] returns.
//!
//! Both front ends read the config space of `virtio_uml` devices over vhost-user; QEMU's fs and vsock devices
//! keep their own and never ask. Device reset is what each front end makes of it: stopping the rings.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::early_enable;
use super::placement::{Placement, cpu_of_kick};
use super::vring::{AtomicMemory, Vring};
use crate::device::{Chain, Device, DeviceError, EventFlags, EventRegistry, Memory, Queues, Ring};

/// Front ends choose queue sizes themselves (user-mode Linux 256, QEMU up to 1024) and fail when one is refused.
const MAX_QUEUE_SIZE: u16 = 1024;

/// Why a device is not served any longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host call failed while setting the device up.
    #[error("cannot set up vhost-user device {device}: {source}")]
    Setup {
        /// The device's name.
        device: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// The front end broke the protocol.
    #[error("vhost-user front end of device {device} broke the protocol: {reason}")]
    Protocol {
        /// The device's name.
        device: &'static str,
        /// What it did.
        reason: String,
    },
}

/// The order in which a front end configures a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// As the protocol says.
    InOrder,
    /// QEMU's net device enables rings before it has set features.
    EarlyEnable,
}

/// Waits for a front end on `socket` (a listening socket) and serves `device` to it until it goes away.
pub fn serve(
    name: &'static str,
    device: Box<dyn Device>,
    socket: OwnedFd,
    front_end: FrontEnd,
) -> Result<(), Error> {
    let setup = |source| Error::Setup {
        device: name,
        source,
    };
    let events = EventRegistry::new().map_err(setup)?;
    let backend = Arc::new(Adapter::new(name, device, events.clone()).map_err(setup)?);
    let memory = AtomicMemory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new(name.to_owned(), backend.clone(), memory)
        .map_err(|error| setup(io::Error::other(error.to_string())))?;
    let handlers = daemon.get_epoll_handlers();
    for handler in &handlers {
        handler
            .register_listener(events_fd(&events), EventSet::IN, backend.host_token())
            .map_err(setup)?;
    }
    let socket = match front_end {
        FrontEnd::InOrder => socket,
        FrontEnd::EarlyEnable => early_enable::defer_early_enable(socket).map_err(setup)?,
    };
    let mut listener = Listener::from(UnixListener::from(socket));
    let outcome = daemon.start(&mut listener).and_then(|()| daemon.wait());
    for handler in &handlers {
        handler.send_exit_event();
    }
    match outcome {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostError::Disconnected | VhostError::PartialMessage | VhostError::SocketBroken(_),
        )) => Ok(()),
        Err(error) => Err(Error::Protocol {
            device: name,
            reason: error.to_string(),
        }),
    }
}

fn events_fd(events: &EventRegistry) -> std::os::fd::RawFd {
    use std::os::fd::AsFd;
    events.as_fd().as_raw_fd()
}

/// What the vhost-user library calls, from its threads.
struct Adapter {
    name: &'static str,
    queue_sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
    events: EventRegistry,
    memory: Mutex<Option<AtomicMemory>>,
    /// Only the device's thread takes this lock; and reset and the choice of features, with all rings stopped.
    state: Mutex<State>,
    broken: AtomicBool,
}

struct State {
    device: Box<dyn Device>,
    rings: Vec<Arc<dyn Ring>>,
    ready: Vec<(u64, EventFlags)>,
    placement: Placement,
}

impl Adapter {
    fn new(
        name: &'static str,
        mut device: Box<dyn Device>,
        events: EventRegistry,
    ) -> io::Result<Self> {
        device.register(events.clone())?;
        Ok(Self {
            name,
            queue_sizes: device.queue_sizes().to_vec(),
            features: device.features(),
            config: device.config(),
            events,
            memory: Mutex::new(None),
            state: Mutex::new(State {
                device,
                rings: Vec::new(),
                ready: Vec::new(),
                placement: Placement::new(),
            }),
            broken: AtomicBool::new(false),
        })
    }

    /// The event number of the device's own descriptors; the library takes 0..=queues for itself.
    fn host_token(&self) -> u64 {
        self.queue_sizes.len() as u64 + 1
    }

    fn dispatch(&self, event: u16, vrings: &[Vring]) -> Result<(), DeviceError> {
        let memory = {
            let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            memory.as_ref().map(|memory| memory.memory().into_inner())
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State {
            device,
            rings,
            ready,
            placement,
        } = &mut *state;
        if rings.is_empty() {
            rings.extend(
                vrings
                    .iter()
                    .map(|vring| Arc::new(SharedVring(vring.clone())) as Arc<dyn Ring>),
            );
        }
        // The front end tells of its memory before it makes a ring ready, on another thread: a ring that becomes ready
        // while this event is dealt with must not be read with the memory of before. Its first kick is still to come.
        let idle: Vec<Arc<dyn Ring>>;
        let mut queues = match memory {
            Some(memory) => Queues::new(rings, memory),
            None => {
                idle = vrings
                    .iter()
                    .map(|_| Arc::new(Idle) as Arc<dyn Ring>)
                    .collect();
                Queues::new(&idle, Arc::new(GuestMemoryMmap::new()))
            }
        };
        if u64::from(event) != self.host_token() {
            if let Some(vring) = vrings.get(usize::from(event)) {
                let cpu = cpu_of_kick(vring.last_kick());
                placement.follow(cpu.filter(|_| !device.is_streaming()));
            }
            return device.queue_event(usize::from(event), &mut queues);
        }
        ready.clear();
        self.events
            .poll(ready)
            .map_err(|source| DeviceError::Host {
                action: "wait for host descriptors",
                source,
            })?;
        for (token, flags) in ready.drain(..) {
            device.host_event(token, flags, &mut queues)?;
        }
        if device.is_streaming() {
            placement.follow(None);
        }
        Ok(())
    }
}

impl VhostUserBackend for Adapter {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.queue_sizes.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(
            self.queue_sizes
                .iter()
                .copied()
                .fold(MAX_QUEUE_SIZE, u16::max),
        )
    }

    fn features(&self) -> u64 {
        self.features
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.device.acked_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn reset_device(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The front end's range must be answered in full; what lies behind the config space reads as zero.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        (0..size as usize)
            .map(|index| {
                let position = offset.saturating_add(index);
                self.config.get(position).copied().unwrap_or(0)
            })
            .collect()
    }

    fn update_memory(&self, memory: AtomicMemory) -> io::Result<()> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC | EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _ready: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.dispatch(event, vrings) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(device = self.name, %error, "device stopped");
                self.broken.store(true, Ordering::Relaxed);
                // Ends the device's thread: nothing more is to be done on it, and a ready descriptor would spin.
                Err(io::Error::other(error.to_string()))
            }
        }
    }
}

/// A vring as devices see it as long as there is no guest memory.
struct Idle;

impl Ring for Idle {
    fn pop(&self, _: &Memory) -> Result<Option<Chain>, virtio_queue::Error> {
        Ok(None)
    }

    fn undo_pop(&self) {}

    fn add_used(&self, _: &Memory, _: u16, _: u32) -> Result<(), virtio_queue::Error> {
        Ok(())
    }

    fn notify(&self, _: &Memory) -> Result<(), virtio_queue::Error> {
        Ok(())
    }

    fn rearm(&self, _: &Memory) -> Result<bool, virtio_queue::Error> {
        Ok(false)
    }

    fn silence(&self, _: &Memory) -> Result<(), virtio_queue::Error> {
        Ok(())
    }
}

/// A vring as devices see it.
struct SharedVring(Vring);

impl Ring for SharedVring {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, virtio_queue::Error> {
        let mut vring = self.0.get_mut();
        if !vring.is_enabled() {
            return Ok(None);
        }
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Ok(None);
        }
        Ok(queue.iter(memory.clone())?.next())
    }

    fn undo_pop(&self) {
        self.0.get_mut().get_queue_mut().go_to_previous_position();
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), virtio_queue::Error> {
        let mut vring = self.0.get_mut();
        vring.get_queue_mut().add_used(memory.as_ref(), head, len)
    }

    fn notify(&self, memory: &Memory) -> Result<(), virtio_queue::Error> {
        let mut vring = self.0.get_mut();
        if !vring.get_queue().ready() {
            return Ok(());
        }
        if vring.get_queue_mut().needs_notification(memory.as_ref())?
            && let Err(error) = vring.signal_used_queue()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            // A full pipe or counter means that a notification is on its way already; a broken one that the front
            // end is going away, which its socket tells.
            tracing::debug!(%error, "cannot notify the driver");
        }
        Ok(())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, virtio_queue::Error> {
        let mut vring = self.0.get_mut();
        if !vring.get_queue().ready() || !vring.is_enabled() {
            return Ok(false);
        }
        vring.get_queue_mut().enable_notification(memory.as_ref())
    }

    fn silence(&self, memory: &Memory) -> Result<(), virtio_queue::Error> {
        let mut vring = self.0.get_mut();
        if !vring.get_queue().ready() {
            return Ok(());
        }
        vring.get_queue_mut().disable_notification(memory.as_ref())
    }
}
