//! A driver that writes registers, with good and hostile values.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::block::Block;
use crate::entropy::Entropy;
use crate::testing::{Guest, WRITE};

const STATUS: u64 = 0x70;
const ACKNOWLEDGED: u32 = 1 | 2;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const VERSION_1: u64 = 1 << 32;
const BUFFER: u64 = 0x10_0000;

/// A slot with a device and a guest that drives it.
struct Machine {
    guest: Guest,
    registers: Registers,
    events: SlotEvents,
}

impl Machine {
    fn new(device: Option<Box<dyn crate::device::Device>>) -> Self {
        let guest = Guest::new(&[64]);
        let (registers, slot, events) = slot(guest.memory().clone()).unwrap();
        if let Some(device) = device {
            let worker = attach("test", device, slot).unwrap();
            // It ends with the registers.
            std::thread::spawn(move || worker.serve());
        }
        Self {
            guest,
            registers,
            events,
        }
    }

    /// Another machine with the same memory.
    fn beside(&self, device: Box<dyn crate::device::Device>) -> (Registers, SlotEvents) {
        let (registers, slot, events) = slot(self.guest.memory().clone()).unwrap();
        let worker = attach("test", device, slot).unwrap();
        std::thread::spawn(move || worker.serve());
        (registers, events)
    }

    fn entropy() -> Self {
        Self::new(Some(Box::new(Entropy::new().unwrap())))
    }

    fn read(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.registers.read(offset, &mut value);
        u32::from_le_bytes(value)
    }

    fn write(&self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    /// Up to the features.
    fn negotiate(&self, features: u64) {
        self.write(STATUS, ACKNOWLEDGED);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, half);
        }
        self.write(STATUS, ACKNOWLEDGED | FEATURES_OK);
    }

    /// Sets up queue 0 of [`Guest`].
    fn set_up_queue(&self, size: u32, descriptors: u64) {
        self.write(0x30, 0);
        self.write(0x38, size);
        for (register, address) in [(0x80, descriptors), (0x90, 0x2000), (0xa0, 0x3000)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }

    fn activate(&self) {
        self.negotiate(VERSION_1);
        assert_eq!(self.read(STATUS), ACKNOWLEDGED | FEATURES_OK);
        self.set_up_queue(64, 0x1000);
        self.write(STATUS, ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
    }

    /// As KVM does when the driver notifies the device.
    fn kick(&self) {
        rustix::io::write(self.events.kick(), &1u64.to_ne_bytes()).unwrap();
    }

    /// Waits for an interrupt, and acknowledges it.
    fn interrupted(&self) -> Option<u32> {
        let mut ready = [PollFd::from_borrowed_fd(
            self.events.interrupt(),
            PollFlags::IN,
        )];
        let timeout = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        if poll(&mut ready, Some(&timeout)).unwrap() == 0 {
            return None;
        }
        let mut count = [0; 8];
        rustix::io::read(self.events.interrupt(), &mut count).unwrap();
        let reasons = self.read(0x60);
        self.write(0x64, reasons);
        Some(reasons)
    }

    /// Asks for random bytes in buffer `head`.
    fn request(&mut self, head: u16) {
        self.guest.offer_at(0, head, &[(BUFFER, 16, WRITE, 0)]);
        self.kick();
    }
}

#[test]
fn a_driver_finds_the_device_and_its_requests_are_served() {
    let mut machine = Machine::entropy();
    assert_eq!(machine.read(0x00).to_le_bytes(), *b"virt");
    assert_eq!(machine.read(0x04), 2);
    assert_eq!(machine.read(0x08), 4);
    machine.activate();
    for head in 0..3 {
        machine.request(head);
        assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
        assert_eq!(machine.guest.next_used(0), Some((head, 16)));
        assert_eq!(machine.read(0x60), 0);
    }
}

#[test]
fn requests_made_before_the_driver_is_ready_are_served_then() {
    let mut machine = Machine::entropy();
    machine.negotiate(VERSION_1);
    machine.set_up_queue(64, 0x1000);
    machine.request(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.guest.used(0), None);
    machine.write(STATUS, ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
}

#[test]
fn after_a_reset_nothing_completes_and_the_device_can_be_used_again() {
    let mut machine = Machine::entropy();
    for _ in 0..3 {
        machine.activate();
        machine.request(0);
        assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
        assert_eq!(machine.guest.used(0), Some(16));
        machine.write(STATUS, 0);
        assert_eq!(machine.read(STATUS), 0);
        machine.request(1);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(machine.guest.used(0), None);
        // A driver begins with empty rings.
        let memory = machine.guest.memory().clone();
        machine.guest = Guest::new(&[64]);
        machine.guest.memory = memory.clone();
        for offset in (0x2000..0x2100).chain(0x3000..0x3300) {
            vm_memory::Bytes::write_obj(memory.as_ref(), 0u8, vm_memory::GuestAddress(offset))
                .unwrap();
        }
    }
}

#[test]
fn features_that_are_not_offered_and_old_drivers_are_refused() {
    let machine = Machine::entropy();
    for features in [0, VERSION_1 | 1 << 5, u64::MAX] {
        machine.negotiate(features);
        assert_eq!(machine.read(STATUS), ACKNOWLEDGED);
        machine.write(STATUS, 0);
    }
}

#[test]
fn an_invalid_queue_makes_the_device_need_a_reset() {
    let machine = Machine::entropy();
    // Sizes that are no power of two, too large or zero; a table that is not aligned or in memory.
    for (size, table) in [
        (63, 0x1000),
        (0, 0x1000),
        (1 << 15, 0x1000),
        (0x1_0040, 0x1000),
        (64, 0x1001),
        (64, u64::MAX - 15),
        (64, 1 << 40),
    ] {
        machine.negotiate(VERSION_1);
        machine.set_up_queue(size, table);
        machine.write(STATUS, ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
        assert_ne!(
            machine.read(STATUS) & u32::from(NEEDS_RESET),
            0,
            "{size} {table:#x}"
        );
        machine.write(STATUS, 0);
        assert_eq!(machine.read(STATUS), 0);
    }
}

#[test]
fn a_device_that_fails_ends_its_thread_with_the_reason() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let disk = Block::new(file, false, "disk").unwrap();
    let guest = Guest::new(&[64]);
    let (registers, slot, events) = slot(guest.memory().clone()).unwrap();
    let worker = attach("disk", Box::new(disk), slot).unwrap();
    let served = std::thread::spawn(move || worker.serve());
    let mut machine = Machine {
        guest,
        registers,
        events,
    };
    machine.activate();
    // The size of the disk, in the config space.
    assert_eq!(machine.read(0x100), 8);
    // A request without room for its status.
    machine.guest.offer(0, &[(BUFFER, 16, 0, 0)]);
    machine.kick();
    let error = served.join().unwrap().unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("device disk failed: queue 0: "),
        "{error}"
    );
    // A reset does not wait for it.
    machine.write(STATUS, 0);
    assert_eq!(machine.read(STATUS), 0);
}

#[test]
fn a_reset_discards_requests_that_wait_for_the_host() {
    let mut machine = Machine::entropy();
    machine.activate();
    // More than the device gives at once: the rest waits.
    for round in 0..40 {
        machine
            .guest
            .offer_at(0, round, &[(BUFFER, 4096, WRITE, 0)]);
    }
    machine.kick();
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
    let start = Instant::now();
    machine.write(STATUS, 0);
    assert!(start.elapsed() < Duration::from_secs(5));
    machine.guest.all_used(0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(machine.guest.all_used(0).is_empty());
}

#[test]
fn a_slot_without_a_device_has_none() {
    let machine = Machine::new(None);
    assert_eq!(machine.read(0x00).to_le_bytes(), *b"virt");
    assert_eq!(machine.read(0x08), 0);
    machine.negotiate(VERSION_1);
    assert_eq!(machine.read(STATUS), 0);
}

#[test]
fn a_queue_can_be_stopped_alone() {
    let mut machine = Machine::entropy();
    machine.activate();
    assert_eq!(machine.read(0x44), 1);
    machine.write(0x44, 0);
    assert_eq!(machine.read(0x44), 0);
    machine.request(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.guest.used(0), None);
}

/// Longer than any device takes here.
const TIMEOUT: Duration = Duration::from_secs(20);

fn saved(registers: &Registers) -> SavedSlot {
    let saved = registers.save(TIMEOUT).unwrap().unwrap();
    serde_json::from_slice(&serde_json::to_vec(&saved).unwrap()).unwrap()
}

#[test]
fn a_saved_device_continues_in_another_machine_and_here() {
    let mut machine = Machine::entropy();
    machine.activate();
    machine.request(0);
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
    assert_eq!(machine.guest.next_used(0), Some((0, 16)));
    let saved = saved(&machine.registers);
    // Quiesced: nothing is served.
    machine.request(1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(machine.guest.next_used(0), None);

    let (registers, events) = machine.beside(Box::new(Entropy::new().unwrap()));
    registers.restore(saved.clone(), TIMEOUT).unwrap();
    let old = std::mem::replace(&mut machine.registers, registers);
    let old_events = std::mem::replace(&mut machine.events, events);
    assert_eq!(machine.read(STATUS), ACKNOWLEDGED | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.read(0x44), 1);
    // The driver looks for what may have been lost.
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
    assert_eq!(machine.guest.next_used(0), None);
    machine.registers.resume();
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
    assert_eq!(machine.guest.next_used(0), Some((1, 16)));

    // The first one goes on as well, from where it was.
    machine.registers = old;
    machine.events = old_events;
    machine.registers.resume();
    assert_eq!(machine.interrupted(), Some(INTERRUPT_RING));
    machine.write(STATUS, 0);
    assert_eq!(machine.read(STATUS), 0);
}

#[test]
fn a_saved_slot_is_refused_where_it_does_not_fit() {
    let machine = Machine::entropy();
    machine.activate();
    let saved = saved(&machine.registers);
    let restored = |device: Box<dyn crate::device::Device>, saved: &SavedSlot| {
        let (registers, _events) = machine.beside(device);
        registers.restore(saved.clone(), TIMEOUT)
    };
    let entropy = || Box::new(Entropy::new().unwrap());
    let disk = Block::new(tempfile::tempfile().unwrap(), false, "disk").unwrap();
    restored(Box::new(disk), &saved).unwrap_err();
    assert!(
        Machine::new(None)
            .registers
            .restore(saved.clone(), TIMEOUT)
            .is_err()
    );
    let mut outside = saved.clone();
    let driver = outside.device.driver.as_mut().unwrap();
    driver.queues[0].used_ring = 1 << 40;
    restored(entropy(), &outside).unwrap_err();
    let mut many = saved.clone();
    many.registers.queues = vec![state::QueueSetup::default(); 3];
    restored(entropy(), &many).unwrap_err();
    let mut newer = saved.clone();
    newer.device.version += 1;
    let error = restored(entropy(), &newer).unwrap_err();
    assert!(error.to_string().contains("version"), "{error}");
    restored(entropy(), &saved).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_any_driver_has_set_up_can_be_saved_and_restored(
        writes in prop::collection::vec(
            (
                prop_oneof![0u64..0x110, Just(STATUS), Just(0x44)],
                prop_oneof![0u32..16, any::<u32>()],
            ),
            0..60,
        ),
        activated in any::<bool>(),
    ) {
        let machine = Machine::entropy();
        if activated {
            machine.activate();
        }
        for (offset, value) in writes {
            machine.write(offset & !3, value);
        }
        let saved = saved(&machine.registers);
        let (registers, _events) = machine.beside(Box::new(Entropy::new().unwrap()));
        registers.restore(saved.clone(), TIMEOUT).unwrap();
        let again = registers.save(TIMEOUT).unwrap().unwrap();
        prop_assert_eq!(again.device, saved.device);
        prop_assert_eq!(
            state::SavedRegisters { interrupt_status: 0, ..again.registers },
            state::SavedRegisters { interrupt_status: 0, ..saved.registers }
        );
    }

    #[test]
    fn any_accesses_end_soon(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x110, 0u64..0x1000], 0usize..9, any::<u64>()),
            1..200,
        )
    ) {
        let machine = Machine::entropy();
        let start = Instant::now();
        for (writes, offset, length, value) in accesses {
            let mut data = value.to_le_bytes().to_vec();
            data.resize(length, 0);
            match writes {
                true => machine.registers.write(offset, &data),
                false => machine.registers.read(offset, &mut data),
            }
        }
        prop_assert!(start.elapsed() < Duration::from_secs(10));
    }
}
