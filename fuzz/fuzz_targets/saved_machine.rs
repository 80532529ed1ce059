//! The saved state of a machine of kind `kvm`, read back: a whole one, or that of a disk, which
//! then serves a guest with a queue where the state says.
//!
//! Looks for panics, for accesses that do not end, and for a disk that changes its size.
#![no_main]

use std::fs::File;
use std::time::Duration;

use hull_devices::block::Block;
use hull_devices::transport::mmio::{self, SavedSlot};
use hull_fuzz::{finish_threads, memory};
use hull_vmm::bus::{Bus, SerialInterrupt};
use hull_vmm::state::SavedMachine;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 0x2_0000;
const SIZE: u64 = 64 << 9;

/// A device that does not answer has hung.
const TIMEOUT: Duration = Duration::from_secs(5);

fuzz_target!(|data: &[u8]| {
    if let Ok(machine) = SavedMachine::parse(data) {
        let console = File::options().write(true).open("/dev/null");
        let interrupt = EventFd::new(0).expect("an eventfd");
        let _ = Bus::new(
            Vec::new(),
            console.expect("a console"),
            SerialInterrupt(interrupt),
            Box::new(|_| {}),
            machine.bus,
        );
    }
    if let Ok(saved) = serde_json::from_slice::<SavedSlot>(data) {
        continue_disk(saved);
    }
});

fn continue_disk(saved: SavedSlot) {
    let disk = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
    disk.set_len(SIZE).expect("a size");
    let device = Block::new(disk.try_clone().expect("a copy"), false, "disk").expect("a device");
    let (registers, slot, events) = mmio::slot(memory(MEMORY)).expect("a slot");
    let worker = mmio::attach("disk", Box::new(device), slot).expect("a device");
    let thread = std::thread::spawn(move || worker.serve());
    if registers.restore(saved, TIMEOUT).is_ok() {
        registers.resume();
        rustix::io::write(events.kick(), &1u64.to_ne_bytes()).expect("a kick");
        // A queue with nonsense in it fails the device.
        let _ = registers.save(TIMEOUT);
    }
    drop(registers);
    let served = thread.join().expect("no panic");
    let broken = |error| matches!(error, mmio::Error::Device { .. });
    assert!(served.err().is_none_or(broken));
    finish_threads();
    assert_eq!(disk.metadata().expect("a disk").len(), SIZE);
}
