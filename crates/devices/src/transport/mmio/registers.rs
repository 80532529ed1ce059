//! The page of registers of a slot (virtio 1.2, 4.2.2), as virtual CPUs read and write it.
//!
//! Every value comes from the guest. An access of the wrong width, to a register that does not
//! exist, or at the wrong time reads as zero or is ignored, as on hardware; a set-up that is
//! invalid makes the device say that it needs a reset.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::ring::MmioRing;
use super::state::{QueueSetup, SavedRegisters};
use super::{
    Command, Description, INTERRUPT_CONFIG, INTERRUPT_RING, NEEDS_RESET, SavedSlot, Shared,
};
use crate::device::Ring;
use crate::state::{RestoreError, SaveError};

// Offsets of registers (virtio 1.2, table 4.1).
const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = super::QUEUE_NOTIFY;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DESC_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xa0;
const QUEUE_DEVICE_HIGH: u64 = 0xa4;
/// Lengths and addresses of shared memory: all ones where there is none.
const SHM: std::ops::Range<u64> = 0xb0..0xc0;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// "virt"
const MAGIC_VALUE: u32 = 0x7472_6976;
/// Version 1 is the legacy interface.
const VERSION_VALUE: u32 = 2;
/// "hull"
const VENDOR_VALUE: u32 = 0x6c6c_7568;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;

/// Features of the transport and its queues.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers of a slot.
pub struct Registers {
    shared: Arc<Shared>,
    driver: Mutex<Driver>,
}

/// What the driver has written.
struct Driver {
    commands: mpsc::Sender<Command>,
    status: u8,
    device_features_select: u32,
    features_select: u32,
    features: u64,
    queue_select: u32,
    /// As many as the device has, once the driver has selected one.
    queues: Vec<QueueSetup>,
    /// The rings of an activated device.
    rings: Option<Vec<Arc<MmioRing>>>,
}

impl Registers {
    pub(super) fn new(shared: Arc<Shared>, commands: mpsc::Sender<Command>) -> Self {
        Self {
            shared,
            driver: Mutex::new(Driver {
                commands,
                status: 0,
                device_features_select: 0,
                features_select: 0,
                features: 0,
                queue_select: 0,
                queues: Vec::new(),
                rings: None,
            }),
        }
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A virtual CPU reads at `offset` of the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(position) = offset.checked_sub(CONFIG) {
            self.read_config(position, data);
            return;
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        *data = self.register(offset).to_le_bytes();
    }

    /// Beyond the config space is nothing but zeros.
    fn read_config(&self, position: u64, data: &mut [u8]) {
        let config = self.shared.config();
        let start = usize::try_from(position).unwrap_or(usize::MAX);
        let from = config.bytes.get(start..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            MAGIC => return MAGIC_VALUE,
            VERSION => return VERSION_VALUE,
            VENDOR_ID => return VENDOR_VALUE,
            INTERRUPT_STATUS => return self.shared.interrupt.status.load(Ordering::SeqCst),
            CONFIG_GENERATION => return self.shared.config().generation,
            _ => {}
        }
        // Without a device, the ID is 0, and the driver looks no further.
        let Some(description) = self.shared.description.get() else {
            return 0;
        };
        let driver = self.driver();
        match offset {
            DEVICE_ID => description.device.virtio_id(),
            DEVICE_FEATURES => half(
                description.features | TRANSPORT_FEATURES,
                driver.device_features_select,
            ),
            QUEUE_NUM_MAX => description
                .queue_sizes
                .get(driver.queue_select as usize)
                .map_or(0, |size| u32::from(*size)),
            QUEUE_READY => driver.selected().map_or(0, |queue| u32::from(queue.ready)),
            STATUS => u32::from(driver.status) | self.shared.failed.load(Ordering::SeqCst),
            offset if SHM.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    /// A virtual CPU writes at `offset` of the page. The config space is read-only: no device has
    /// a field that drivers write.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            INTERRUPT_ACK => {
                let status = &self.shared.interrupt.status;
                status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            // KVM takes this write. It comes here if it could not.
            QUEUE_NOTIFY => {
                let _ = rustix::io::write(&self.shared.kick, &1u64.to_ne_bytes());
                return;
            }
            _ => {}
        }
        let Some(description) = self.shared.description.get() else {
            return;
        };
        let mut driver = self.driver();
        let setting_up = driver.status & (FEATURES_OK | DRIVER_OK) == 0;
        match offset {
            DEVICE_FEATURES_SEL => driver.device_features_select = value,
            DRIVER_FEATURES_SEL => driver.features_select = value,
            DRIVER_FEATURES if setting_up => driver.accept(value),
            QUEUE_SEL => driver.select(value, description),
            STATUS => self.set_status(&mut driver, value, description),
            QUEUE_READY => self.set_ready(&mut driver, value == 1),
            _ => driver.set_up_queue(offset, value),
        }
    }

    fn set_status(&self, driver: &mut Driver, value: u32, description: &Description) {
        // Eight bits, of which the device sets one.
        let value = (value & 0xff) as u8 & !NEEDS_RESET;
        if value == 0 {
            self.reset(driver);
            return;
        }
        let new = value & !driver.status;
        driver.status |= value;
        if new & FEATURES_OK != 0 {
            let offered = description.features | TRANSPORT_FEATURES;
            let modern = driver.features & 1 << VIRTIO_F_VERSION_1 != 0;
            if driver.features & !offered != 0 || !modern {
                driver.status &= !FEATURES_OK;
            }
        }
        if new & DRIVER_OK != 0 {
            if driver.status & FEATURES_OK == 0 {
                self.fail();
                return;
            }
            match self.rings(driver, description) {
                Some(rings) => self.activate(driver, rings),
                None => self.fail(),
            }
        }
    }

    /// The driver's queues. `None` if one is invalid.
    fn rings(&self, driver: &Driver, description: &Description) -> Option<Vec<Arc<MmioRing>>> {
        let event_idx = driver.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let rings = description.queue_sizes.iter().enumerate();
        rings
            .map(|(index, most)| {
                let setup = driver.queues.get(index).copied().unwrap_or_default();
                let mut queue = Queue::new(*most).ok()?;
                if setup.ready {
                    // Each ignores what is invalid (size, alignment), which is seen below.
                    queue.set_size(setup.size);
                    let halves =
                        |address: u64| (Some(address as u32), Some((address >> 32) as u32));
                    let (low, high) = halves(setup.descriptors);
                    queue.set_desc_table_address(low, high);
                    let (low, high) = halves(setup.available);
                    queue.set_avail_ring_address(low, high);
                    let (low, high) = halves(setup.used);
                    queue.set_used_ring_address(low, high);
                    queue.set_event_idx(event_idx);
                    queue.set_ready(true);
                    let taken = queue.size() == setup.size
                        && queue.desc_table() == setup.descriptors
                        && queue.avail_ring() == setup.available
                        && queue.used_ring() == setup.used;
                    if !taken {
                        return None;
                    }
                }
                self.ring(queue)
            })
            .collect()
    }

    /// `None` if it is not within guest memory.
    fn ring(&self, queue: Queue) -> Option<Arc<MmioRing>> {
        let valid = !queue.ready() || queue.is_valid(self.shared.memory.as_ref());
        valid.then(|| Arc::new(MmioRing::new(queue, self.shared.clone())))
    }

    /// Quiesces the device until [`Registers::resume`], and saves it. `None` without a device. No
    /// virtual CPU may run.
    ///
    /// # Errors
    /// The device has failed, needs more than `timeout`, or cannot be saved.
    pub fn save(&self, timeout: Duration) -> Result<Option<SavedSlot>, SaveError> {
        let Some(description) = self.shared.description.get() else {
            return Ok(None);
        };
        let driver = self.driver();
        let (done, saved) = mpsc::sync_channel(1);
        self.tell(&driver, Command::Save { done });
        let device = saved
            .recv_timeout(timeout)
            .map_err(|error| SaveError::State {
                device: description.device,
                reason: no_answer(error, "it does not finish its requests in time").to_owned(),
            })??;
        Ok(Some(SavedSlot {
            registers: SavedRegisters {
                status: driver.status | self.shared.failed.load(Ordering::SeqCst) as u8,
                device_features_select: driver.device_features_select,
                features_select: driver.features_select,
                features: driver.features,
                queue_select: driver.queue_select,
                queues: driver.queues.clone(),
                interrupt_status: self.shared.interrupt.status.load(Ordering::SeqCst),
                config_generation: self.shared.config().generation,
            },
            device,
        }))
    }

    /// The device goes on. Without effect on one that is not quiesced.
    pub fn resume(&self) {
        if self.shared.description.get().is_some() {
            self.tell(&self.driver(), Command::Resume);
        }
    }

    /// Puts a saved slot into this one, whose device is of the same type and has not been used. The
    /// device is quiesced then.
    ///
    /// # Errors
    /// There is no such device, what it needs of the host is not there, or the state is invalid.
    pub fn restore(&self, saved: SavedSlot, timeout: Duration) -> Result<(), RestoreError> {
        let SavedSlot { registers, device } = saved;
        let description = self.shared.description.get();
        let description = description.ok_or_else(|| {
            RestoreError::mismatch(device.state.device(), "the machine has no such device")
        })?;
        let mismatch = |reason: &str| RestoreError::mismatch(description.device, reason);
        let queues = description.queue_sizes.len();
        if ![0, queues].contains(&registers.queues.len()) {
            return Err(mismatch("its registers are of another number of queues"));
        }
        let states = device.driver.iter().flat_map(|driver| &driver.queues);
        let rings = states.zip(&description.queue_sizes).map(|(state, most)| {
            let fits = state.max_size == *most;
            fits.then(|| self.ring(Queue::try_from(*state).ok()?))?
        });
        let rings: Option<Vec<_>> = rings.collect();
        let has_driver = device.driver.is_some();
        let rings = rings.ok_or_else(|| mismatch("one of its queues is invalid"))?;

        let mut driver = self.driver();
        let (done, restored) = mpsc::sync_channel(1);
        let shared = rings.iter().map(|ring| ring.clone() as Arc<dyn Ring>);
        let command = Command::Restore {
            saved: Box::new(device),
            rings: shared.collect(),
            done,
        };
        self.tell(&driver, command);
        restored.recv_timeout(timeout).map_err(|error| {
            mismatch(no_answer(error, "it does not take over its state in time"))
        })??;
        driver.status = registers.status & !NEEDS_RESET;
        let failed = u32::from(registers.status & NEEDS_RESET);
        self.shared.failed.store(failed, Ordering::SeqCst);
        driver.device_features_select = registers.device_features_select;
        driver.features_select = registers.features_select;
        driver.features = registers.features;
        driver.queue_select = registers.queue_select;
        driver.queues = registers.queues;
        driver.rings = has_driver.then_some(rings);
        self.shared.config().generation = registers.config_generation;
        // One that was raised before may not have arrived. Drivers expect some without a reason.
        if driver.rings.is_some() {
            let reasons = registers.interrupt_status & (INTERRUPT_RING | INTERRUPT_CONFIG);
            self.shared.interrupt.raise(reasons | INTERRUPT_RING);
        }
        Ok(())
    }

    fn activate(&self, driver: &mut Driver, rings: Vec<Arc<MmioRing>>) {
        let features = driver.features;
        let shared = rings.iter().map(|ring| ring.clone() as Arc<dyn Ring>);
        let command = Command::Activate {
            features,
            rings: shared.collect(),
        };
        driver.rings = Some(rings);
        self.tell(driver, command);
    }

    /// Waits until the device's thread has reset the device.
    fn reset(&self, driver: &mut Driver) {
        if let Some(rings) = driver.rings.take() {
            let (done, reset) = mpsc::sync_channel(1);
            self.tell(driver, Command::Reset { done });
            // A thread that has ended drops the other end.
            let _ = reset.recv();
            rings.iter().for_each(|ring| ring.abandon());
        }
        driver.status = 0;
        driver.features = 0;
        driver.queues.clear();
        self.shared.failed.store(0, Ordering::SeqCst);
        self.shared.interrupt.status.store(0, Ordering::SeqCst);
    }

    fn set_ready(&self, driver: &mut Driver, ready: bool) {
        let index = driver.queue_select as usize;
        let active = driver.rings.as_ref().map(|rings| rings.get(index).cloned());
        match active {
            // A queue is set up before the device is activated.
            Some(_) if ready => {}
            Some(ring) => {
                if let Some(ring) = ring {
                    ring.stop();
                }
                if let Some(queue) = driver.queues.get_mut(index) {
                    queue.ready = false;
                }
            }
            None => {
                if let Some(queue) = driver.queues.get_mut(index) {
                    queue.ready = ready;
                }
            }
        }
    }

    fn tell(&self, driver: &Driver, command: Command) {
        if driver.commands.send(command).is_err() {
            self.fail();
            return;
        }
        if let Err(error) = rustix::io::write(&self.shared.command, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot wake the thread of a device");
        }
    }

    /// The device needs a reset.
    fn fail(&self) {
        self.shared
            .failed
            .store(u32::from(NEEDS_RESET), Ordering::SeqCst);
        self.shared.interrupt.raise(INTERRUPT_CONFIG);
    }
}

impl Drop for Registers {
    /// The device's thread sees that nothing can come any more.
    fn drop(&mut self) {
        // The sender goes first: the thread looks for it when it wakes.
        self.driver().commands = mpsc::channel().0;
        if let Err(error) = rustix::io::write(&self.shared.command, &1u64.to_ne_bytes()) {
            tracing::debug!(%error, "cannot wake the thread of a device");
        }
    }
}

impl Driver {
    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue_select as usize)
    }

    fn accept(&mut self, value: u32) {
        let value = u64::from(value);
        match self.features_select {
            0 => self.features = self.features & !0xffff_ffff | value,
            1 => self.features = self.features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn select(&mut self, queue: u32, description: &Description) {
        self.queue_select = queue;
        if self.queues.is_empty() {
            self.queues = vec![QueueSetup::default(); description.queue_sizes.len()];
        }
    }

    /// Size and addresses of the selected queue, until it is ready.
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if queue.ready {
            return;
        }
        match offset {
            // Larger ones are invalid, as is 0.
            QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

/// Why a device's thread has not answered.
fn no_answer(error: mpsc::RecvTimeoutError, late: &'static str) -> &'static str {
    match error {
        mpsc::RecvTimeoutError::Timeout => late,
        mpsc::RecvTimeoutError::Disconnected => "it has failed",
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
