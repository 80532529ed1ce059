//! Drives one device for a transport: the loop without queues of its own.
//!
//! A transport creates a [`DeviceRunner`] per device, gives it the device's rings and guest memory,
//! and calls it when a queue was notified or [`DeviceRunner::events`] is readable. The runner keeps
//! the device in one of these stages and makes sure that it is called only where that is allowed:
//!
//! ```text
//!                 activate                    quiesce
//!   Inactive ───────────────────► Active ◄──────────────► Quiesced ── save
//!      ▲ │                           │        resume          │
//!      │ └─ restore ─► Quiesced      │                        │
//!      └──────── reset ──────────────┴────────────────────────┘
//!
//!   any ── the device returns an error ─► Failed ── reset ─► Inactive
//! ```
//!
//! Used by the transports `vhost_user` and `mmio`. All
//! calls come from one thread, or are made exclusive by the transport's lock. While a device is
//! quiesced or has failed, the transport must not wait for [`DeviceRunner::events`], which stays
//! readable.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::device::{Chain, Device, DeviceError, EventFlags, EventRegistry, Memory, Queues, Ring};
use crate::state::{
    QueueState, QueueStates, RestoreError, SaveError, SavedDevice, SavedDriver, VERSION,
};

/// What the driver has set up.
struct Driver {
    features: u64,
    rings: Vec<Arc<dyn Ring>>,
}

/// See the module's documentation.
enum Stage {
    Inactive,
    Active(Driver),
    Quiesced(Option<Driver>),
    Failed,
}

/// Result of an event, besides used chains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The config space has changed: the driver is to be notified.
    pub config_changed: bool,
    /// Units of bulk traffic that the device processed.
    pub processed: usize,
}

/// One device and its stage.
pub struct DeviceRunner {
    device: Box<dyn Device>,
    events: EventRegistry,
    memory: Option<Memory>,
    stage: Stage,
    ready: Vec<(u64, EventFlags)>,
    /// Empty queues, used while there is no driver or no memory.
    idle: Vec<Arc<dyn Ring>>,
}

impl DeviceRunner {
    /// A runner of a fresh device.
    ///
    /// # Errors
    /// If there are too many open files, or the device cannot register its descriptors.
    pub fn new(mut device: Box<dyn Device>) -> io::Result<Self> {
        let events = EventRegistry::new()?;
        device.register(events.clone())?;
        let idle = device.queue_sizes().iter().map(|_| Arc::new(Idle) as _);
        Ok(Self {
            idle: idle.collect(),
            device,
            events,
            memory: None,
            stage: Stage::Inactive,
            ready: Vec::new(),
        })
    }

    /// The device, for its type, queues, features and config space.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// Readable when the device has host events: call [`DeviceRunner::host_events`] then.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    /// Sets guest memory, or changes it. Without memory the device sees empty queues.
    pub fn set_memory(&mut self, memory: Option<Memory>) {
        self.memory = memory;
    }

    /// The driver has accepted `features` and sets up `rings`, one for each queue of the device. A
    /// front end that negotiates again calls it again.
    pub fn activate(&mut self, features: u64, rings: Vec<Arc<dyn Ring>>) {
        match self.stage {
            Stage::Failed => {}
            Stage::Inactive | Stage::Active(_) | Stage::Quiesced(_) => {
                self.device.activate(features);
                self.stage = Stage::Active(Driver { features, rings });
            }
        }
    }

    /// The driver notified `queue`. Ignored unless the device is active.
    ///
    /// # Errors
    /// The device's error. It has failed then; further calls are ignored.
    pub fn queue_event(&mut self, queue: usize) -> Result<Outcome, DeviceError> {
        match self.stage {
            Stage::Active(_) => self.run(|device, queues, _| device.queue_event(queue, queues)),
            Stage::Inactive | Stage::Quiesced(_) | Stage::Failed => Ok(Outcome::default()),
        }
    }

    /// Delivers the events of the device's host descriptors. Ignored while it is quiesced.
    ///
    /// # Errors
    /// As [`DeviceRunner::queue_event`].
    pub fn host_events(&mut self) -> Result<Outcome, DeviceError> {
        match self.stage {
            Stage::Active(_) | Stage::Inactive => {}
            Stage::Quiesced(_) | Stage::Failed => return Ok(Outcome::default()),
        }
        self.ready.clear();
        let polled = self.events.poll(&mut self.ready);
        self.run(|device, queues, ready| {
            polled.map_err(|source| DeviceError::Host {
                action: "wait for host descriptors",
                source,
            })?;
            ready
                .iter()
                .try_for_each(|(token, flags)| device.host_event(*token, *flags, queues))
        })
    }

    /// Finishes the requests in flight and stops: until [`DeviceRunner::resume`], the device does
    /// not touch guest memory and no request completes. Returns the queues' states; empty without a
    /// driver.
    ///
    /// # Errors
    /// As [`DeviceRunner::queue_event`].
    pub fn quiesce(&mut self) -> Result<QueueStates, DeviceError> {
        if let Stage::Active(_) = self.stage {
            self.run(|device, queues, _| device.quiesce(queues))?;
        }
        self.stage = match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Active(driver) => Stage::Quiesced(Some(driver)),
            Stage::Inactive => Stage::Quiesced(None),
            other @ (Stage::Quiesced(_) | Stage::Failed) => other,
        };
        Ok(self.queue_states())
    }

    fn queue_states(&self) -> QueueStates {
        match &self.stage {
            Stage::Active(driver) | Stage::Quiesced(Some(driver)) => {
                driver.rings.iter().map(|ring| ring.state()).collect()
            }
            Stage::Inactive | Stage::Quiesced(None) | Stage::Failed => QueueStates::new(),
        }
    }

    /// Resumes after [`DeviceRunner::quiesce`], with what the driver made available meanwhile.
    ///
    /// # Errors
    /// As [`DeviceRunner::queue_event`].
    pub fn resume(&mut self) -> Result<Outcome, DeviceError> {
        self.stage = match std::mem::replace(&mut self.stage, Stage::Failed) {
            Stage::Quiesced(Some(driver)) => Stage::Active(driver),
            Stage::Quiesced(None) => Stage::Inactive,
            other => {
                self.stage = other;
                return Ok(Outcome::default());
            }
        };
        self.check_queues()
    }

    /// Has the device check every queue: notifications of the driver may have been missed, or do
    /// not say which queue they are for.
    ///
    /// # Errors
    /// As [`DeviceRunner::queue_event`].
    pub fn check_queues(&mut self) -> Result<Outcome, DeviceError> {
        let mut all = Outcome::default();
        for queue in 0..self.device.queue_sizes().len() {
            let outcome = self.queue_event(queue)?;
            all.config_changed |= outcome.config_changed;
            all.processed = all.processed.saturating_add(outcome.processed);
        }
        Ok(all)
    }

    /// The state of the quiesced device and its queues.
    ///
    /// # Errors
    /// It is not quiesced, or as [`Device::save`].
    pub fn save(&mut self) -> Result<SavedDevice, SaveError> {
        let driver = match &self.stage {
            Stage::Quiesced(Some(driver)) => Some(SavedDriver {
                features: driver.features,
                queues: self.queue_states(),
            }),
            Stage::Quiesced(None) => None,
            Stage::Inactive | Stage::Active(_) | Stage::Failed => {
                return Err(SaveError::NotQuiesced);
            }
        };
        Ok(SavedDevice {
            version: VERSION,
            state: self.device.save()?,
            driver,
        })
    }

    /// Takes over a saved device, which is then quiesced. `rings` are the rings that the transport
    /// created from the states in `saved`; memory must be set before [`DeviceRunner::resume`].
    ///
    /// # Errors
    /// This device has been activated before, the state has a newer version or not as many queues
    /// as there are rings, or as [`Device::restore`]. The device has failed then.
    pub fn restore(
        &mut self,
        saved: &SavedDevice,
        rings: Vec<Arc<dyn Ring>>,
    ) -> Result<(), RestoreError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        if !matches!(stage, Stage::Inactive) {
            self.stage = stage;
            return Err(RestoreError::NotFresh);
        }
        if saved.version > VERSION {
            return Err(RestoreError::Version {
                what: self.device.device_type().name(),
                version: saved.version,
                supported: VERSION,
            });
        }
        let queues = saved.driver.as_ref().map(|driver| driver.queues.len());
        let expected = queues.map(|_| self.device.queue_sizes().len());
        if queues != expected || rings.len() != expected.unwrap_or(0) {
            return Err(RestoreError::mismatch(
                self.device.device_type(),
                "the saved state has another number of queues",
            ));
        }
        self.device.restore(&saved.state)?;
        self.stage = Stage::Quiesced(saved.driver.as_ref().map(|driver| {
            self.device.activate(driver.features);
            Driver {
                features: driver.features,
                rings,
            }
        }));
        Ok(())
    }

    /// The driver reset the device. When this returns, none of its requests completes any more.
    pub fn reset(&mut self) {
        self.device.reset();
        self.stage = Stage::Inactive;
    }

    /// Calls the device with its queues and what is in `ready`.
    fn run(
        &mut self,
        call: impl FnOnce(
            &mut dyn Device,
            &mut Queues<'_>,
            &[(u64, EventFlags)],
        ) -> Result<(), DeviceError>,
    ) -> Result<Outcome, DeviceError> {
        // A ring must not be read without the memory it is in.
        let mut queues = match (&self.stage, &self.memory) {
            (Stage::Active(driver), Some(memory)) => Queues::new(&driver.rings, memory.clone()),
            _ => Queues::new(&self.idle, Arc::new(GuestMemoryMmap::new())),
        };
        let result = call(self.device.as_mut(), &mut queues, &self.ready);
        let processed = queues.processed();
        match result {
            Ok(()) => Ok(Outcome {
                config_changed: self.device.config_changed(),
                processed,
            }),
            Err(error) => {
                self.stage = Stage::Failed;
                Err(error)
            }
        }
    }
}

/// A queue without a driver.
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

    fn state(&self) -> QueueState {
        QueueState::unused()
    }
}
