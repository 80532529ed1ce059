//! Drives a device in the process that runs the guest's virtual CPUs, over virtio-mmio (virtio 1.2,
//! 4.2).
//!
//! A *slot* is a place for one device: a page of registers, a notification of the driver's and an
//! interrupt. [`slot`] creates its two ends. [`Registers`] is called by virtual CPUs, which read
//! and write the page. [`Slot`] belongs to the thread that serves the device ([`Worker`]). Until
//! there is one, the page says that no device is there (device ID 0), and a driver that is told of
//! the slot later finds it.
//!
//! ```text
//!   vCPU ── read, write ──► Registers ── activate, reset ──► device's thread
//!   vCPU ── QueueNotify ──► (KVM) ── ioeventfd: kick ──────►   │  DeviceRunner
//!   guest ◄── interrupt ──── (KVM) ◄── irqfd ────────────────── ┘  MmioRing
//! ```
//!
//! A slot is saved with its device while no virtual CPU runs ([`Registers::save`]): the device is
//! quiesced until [`Registers::resume`]. A saved slot is put into a fresh one that has the same
//! device ([`Registers::restore`]), which is quiesced then.
//!
//! Nothing on the data path takes a lock but that of the queue. Registers have a lock for each
//! device, which its driver's accesses take. A write that resets the device waits for the device's
//! thread, and so for its requests in flight.

mod registers;
mod ring;
mod state;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};

use rustix::event::{EventfdFlags, eventfd};

use hull_device_control::DeviceType;

use crate::device::{Memory, Ring};
use crate::state::{RestoreError, SaveError, SavedDevice};

pub use registers::Registers;
pub use state::SavedSlot;
pub use worker::{Error, Worker, attach};

/// Offset of the register QueueNotify in the page, for an ioeventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// Bits of the register InterruptStatus.
const INTERRUPT_RING: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The status bit with which a device refuses what a driver has set up (virtio 1.2, 2.1).
const NEEDS_RESET: u8 = 64;

/// What the driver reads of a device.
#[derive(Debug)]
struct Description {
    device: DeviceType,
    features: u64,
    queue_sizes: Vec<u16>,
}

/// The config space, and how often it has changed.
#[derive(Debug, Default)]
struct ConfigSpace {
    bytes: Vec<u8>,
    generation: u32,
}

/// What registers tell the device's thread.
enum Command {
    /// The driver has set the device up.
    Activate {
        features: u64,
        rings: Vec<Arc<dyn Ring>>,
    },
    /// The driver has reset the device. Answered when none of its requests completes any more.
    Reset { done: mpsc::SyncSender<()> },
    /// Quiesce the device and save it.
    Save {
        done: mpsc::SyncSender<Result<SavedDevice, SaveError>>,
    },
    /// Take over a saved device, quiesced. `rings` are the driver's, empty without one.
    Restore {
        saved: Box<SavedDevice>,
        rings: Vec<Arc<dyn Ring>>,
        done: mpsc::SyncSender<Result<(), RestoreError>>,
    },
    /// Continue after a save or restore.
    Resume,
}

/// What both ends of a slot share.
struct Shared {
    memory: Memory,
    /// Empty until there is a device.
    description: OnceLock<Description>,
    config: Mutex<ConfigSpace>,
    interrupt: Interrupt,
    /// The driver has made requests available.
    kick: OwnedFd,
    /// There is a command.
    command: OwnedFd,
    /// [`NEEDS_RESET`], or 0.
    failed: AtomicU32,
}

impl Shared {
    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The interrupt of a slot.
#[derive(Debug)]
struct Interrupt {
    /// Its reasons, which the driver reads and acknowledges.
    status: AtomicU32,
    /// KVM raises it when this is written (irqfd).
    event: OwnedFd,
}

impl Interrupt {
    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        match rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            // A full counter means that it is pending.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
            Err(error) => tracing::error!(%error, "cannot interrupt the guest"),
        }
    }
}

/// The end of a slot that serves its device.
pub struct Slot {
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
}

/// Descriptors of a slot that KVM uses.
pub struct SlotEvents {
    shared: Arc<Shared>,
}

impl SlotEvents {
    /// An eventfd to be written when the driver writes [`QUEUE_NOTIFY`], whatever value and width.
    pub fn kick(&self) -> BorrowedFd<'_> {
        self.shared.kick.as_fd()
    }

    /// An eventfd that raises the slot's interrupt when it is written.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.shared.interrupt.event.as_fd()
    }
}

/// Creates a slot.
///
/// # Errors
/// There are too many open files.
pub fn slot(memory: Memory) -> io::Result<(Registers, Slot, SlotEvents)> {
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let shared = Arc::new(Shared {
        memory,
        description: OnceLock::new(),
        config: Mutex::default(),
        interrupt: Interrupt {
            status: AtomicU32::new(0),
            event: event()?,
        },
        kick: event()?,
        command: event()?,
        failed: AtomicU32::new(0),
    });
    let (sender, commands) = mpsc::channel();
    let slot = Slot {
        shared: shared.clone(),
        commands,
    };
    let events = SlotEvents {
        shared: shared.clone(),
    };
    Ok((Registers::new(shared, sender), slot, events))
}
