//! Drives a device for a front end in another process (QEMU, user-mode Linux) that speaks
//! vhost-user.
//!
//! [`serve`] owns one listening socket and serves exactly one front end on it. The device runs on a
//! thread of its own; nothing else calls it. When the front end disconnects, or breaks the
//! protocol, [`serve`] returns.
//!
//! User-mode Linux reads the config space of its devices over vhost-user; QEMU's fs and vsock
//! devices keep their own and never ask. Neither sends a device reset: they stop the rings, which
//! waits for the requests in flight.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::early_enable;
use super::load::Load;
use super::placement::{Placement, cpu_of_kick};
use super::ring::VhostRing;
use super::vring::{AtomicMemory, Vring};
use crate::device::{Device, DeviceError, Ring};
use crate::runner::DeviceRunner;

/// Front ends choose queue sizes themselves (user-mode Linux 256, QEMU up to 1024) and fail when
/// one is refused.
const MAX_QUEUE_SIZE: u16 = 1024;

/// Why a device is no longer served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A host call failed while setting the device up.
    #[error("cannot set up vhost-user device {device}: {source}")]
    Setup {
        /// The device's name.
        device: &'static str,
        /// The host's error.
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
    /// As the protocol requires.
    InOrder,
    /// QEMU's net device enables rings before it has set features.
    EarlyEnable,
}

/// Waits for a front end on `socket` (a listening socket) and serves `device` to it until it
/// disconnects.
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
    let backend = Arc::new(Adapter::new(name, device).map_err(setup)?);
    let memory = AtomicMemory::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new(name.to_owned(), backend.clone(), memory)
        .map_err(|error| setup(io::Error::other(error.to_string())))?;
    let handlers = daemon.get_epoll_handlers();
    let events = backend.lock().runner.events().as_raw_fd();
    for handler in &handlers {
        handler
            .register_listener(events, EventSet::IN, backend.host_token())
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

/// What the vhost-user library calls, from its threads.
struct Adapter {
    name: &'static str,
    queue_sizes: Vec<u16>,
    features: u64,
    rings: Vec<Arc<VhostRing>>,
    config: Mutex<Vec<u8>>,
    memory: Mutex<Option<AtomicMemory>>,
    /// Taken by the device's thread for each event; by the protocol's thread for features and
    /// reset only.
    state: Mutex<State>,
    failed: AtomicBool,
}

struct State {
    runner: DeviceRunner,
    placement: Placement,
    load: Load,
}

impl Adapter {
    fn new(name: &'static str, device: Box<dyn Device>) -> io::Result<Self> {
        let runner = DeviceRunner::new(device)?;
        let device = runner.device();
        let queue_sizes = device.queue_sizes().to_vec();
        Ok(Self {
            name,
            features: device.features(),
            rings: queue_sizes.iter().map(|_| Arc::default()).collect(),
            queue_sizes,
            config: Mutex::new(device.config()),
            memory: Mutex::new(None),
            state: Mutex::new(State {
                runner,
                placement: Placement::new(),
                load: Load::default(),
            }),
            failed: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The event number of the device's own descriptors; the library takes 0..=queues for itself.
    fn host_token(&self) -> u64 {
        self.queue_sizes.len() as u64 + 1
    }

    fn dispatch(&self, event: u16, vrings: &[Vring]) -> Result<(), DeviceError> {
        for (ring, vring) in self.rings.iter().zip(vrings) {
            ring.bind(vring);
        }
        // The front end sets memory before it makes a ring ready, on another thread. So a ring that
        // becomes ready during this event must not be read with the memory from before; its first
        // kick is still to come.
        let memory = {
            let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            memory.as_ref().map(|memory| memory.memory().into_inner())
        };
        let mut state = self.lock();
        let State {
            runner,
            placement,
            load,
        } = &mut *state;
        runner.set_memory(memory);
        let outcome = if u64::from(event) == self.host_token() {
            let outcome = runner.host_events()?;
            load.record(outcome.processed);
            if load.is_bulk() {
                placement.follow(None);
            }
            outcome
        } else {
            if let Some(vring) = vrings.get(usize::from(event)) {
                let cpu = cpu_of_kick(vring.last_kick());
                placement.follow(cpu.filter(|_| !load.is_bulk()));
            }
            let outcome = runner.queue_event(usize::from(event))?;
            load.record(outcome.processed);
            outcome
        };
        if outcome.config_changed {
            // The front ends support no notification for it: the driver sees it on its next read.
            *self.config.lock().unwrap_or_else(PoisonError::into_inner) = runner.device().config();
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
        let rings = self.rings.iter().map(|ring| ring.clone() as Arc<dyn Ring>);
        self.lock().runner.activate(features, rings.collect());
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The library has stopped the rings before.
    fn reset_device(&self) {
        self.lock().runner.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The front end's range must be answered in full; what is behind the config space reads as
    /// zero.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        (0..size as usize)
            .map(|index| {
                let position = offset.saturating_add(index);
                config.get(position).copied().unwrap_or(0)
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
        if self.failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.dispatch(event, vrings) {
            Ok(()) => Ok(()),
            Err(error) => {
                tracing::error!(device = self.name, %error, "device stopped");
                self.failed.store(true, Ordering::Relaxed);
                self.rings.iter().for_each(|ring| ring.abandon());
                // Ends the device's thread: a ready descriptor would keep it busy.
                Err(io::Error::other(error.to_string()))
            }
        }
    }
}
