//! The saved state of a machine of kind `kvm`, read back: a whole one, or that of a disk, which
//! then serves a guest with a queue where the state says.
//!
//! Looks for panics, for accesses that do not end, and for a disk that changes its size.
#![no_main]

use std::fs::File;
use std::time::Duration;

use hull_devices::transport::mmio::SavedSlot;
use hull_fuzz::disk::ServedDisk;
use hull_fuzz::memory;
use hull_vmm::bus::{Bus, SerialInterrupt};
use hull_vmm::state::SavedMachine;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;

const MEMORY: usize = 0x2_0000;

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
    let (disk, registers, events) = ServedDisk::new(memory(MEMORY));
    if registers.restore(saved, TIMEOUT).is_ok() {
        registers.resume();
        rustix::io::write(events.kick(), &1u64.to_ne_bytes()).expect("a kick");
        // A queue with nonsense in it fails the device.
        let _ = registers.save(TIMEOUT);
    }
    drop(registers);
    disk.finish();
}
