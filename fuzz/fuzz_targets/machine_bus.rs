//! What virtual CPUs of kind `kvm` reach by ports and addresses, against a guest that reads and
//! writes anything anywhere: registers of a disk over virtio-mmio, the IOAPIC, the serial port.
//!
//! Looks for panics, for accesses that do not end, for a device's thread that does not end, and for
//! a disk that changes its size.
#![no_main]

use std::fs::File;
use std::sync::Mutex;

use hull_device_control::monitor::{FIRST_SLOT, SLOT_SIZE};
use hull_fuzz::disk::ServedDisk;
use hull_fuzz::{AVAILABLE, Input, descriptor, memory};
use hull_vmm::bus::{Bus, SerialInterrupt};
use hull_vmm::state::SavedBus;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const MEMORY: u64 = 0x2_0000;
const RING: u64 = 0x1000;
const STEPS: usize = 128;
const IOAPIC: u64 = 0xfec0_0000;

/// Registers in the order of a driver that sets the device up.
const SETUP: [(u64, u32); 16] = [
    (0x70, 3),
    (0x24, 0),
    (0x20, 0),
    (0x24, 1),
    (0x20, 1),
    (0x70, 11),
    (0x30, 0),
    (0x38, 16),
    (0x80, RING as u32),
    (0x84, 0),
    (0x90, (RING + AVAILABLE) as u32),
    (0x94, 0),
    (0xa0, RING as u32 + 0x800),
    (0xa4, 0),
    (0x44, 1),
    (0x70, 15),
];

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let memory = memory(MEMORY as usize);
    let (disk, registers, events) = ServedDisk::new(memory.clone());
    let routed = Mutex::new(0usize);
    let bus = Bus::new(
        vec![Some(registers), None],
        File::options()
            .write(true)
            .open("/dev/null")
            .expect("a console"),
        SerialInterrupt(EventFd::new(libc_nonblocking()).expect("an eventfd")),
        Box::new(move |routes| {
            let count = routes.iter().flatten().count();
            *routed.lock().expect("no panic") = count;
        }),
        SavedBus::default(),
    )
    .expect("a bus");
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        let mut bytes = input.u64().to_le_bytes().to_vec();
        bytes.truncate(usize::from(choice >> 5) + 1);
        match choice % 8 {
            0 => {
                for (offset, value) in SETUP {
                    bus.write(FIRST_SLOT + offset, &value.to_le_bytes());
                }
            }
            1 => bus.write(
                FIRST_SLOT + u64::from(input.u8()),
                &bytes[..bytes.len().min(4)],
            ),
            2 => bus.read(
                FIRST_SLOT + u64::from(input.u16()) % (3 * SLOT_SIZE),
                &mut bytes,
            ),
            3 => {
                let offset = [0, 0x10, u64::from(input.u8())][usize::from(input.u8() % 3)];
                bus.write(IOAPIC + offset, &bytes);
                bus.read(IOAPIC + offset, &mut bytes);
            }
            4 => {
                let port = [0x3f8, 0x64, 0x71, 0][usize::from(input.u8() % 4)];
                let port: u16 = port + u16::from(input.u8() % 8);
                let _ = bus.write_port(port, &bytes);
                bus.read_port(port, &mut bytes);
            }
            5 => {
                let index = u64::from(input.u8() % 16);
                let at = u64::from(input.u32()) % (MEMORY + 0x100);
                let bytes = descriptor(at, input.u32(), input.u16() & 7, input.u16() % 20);
                let _ = memory.write_slice(&bytes, GuestAddress(RING + index * 16));
            }
            6 => {
                let at = RING + u64::from(input.u16()) % 0x1000;
                let _ = memory.write_slice(&bytes, GuestAddress(at));
            }
            _ => {
                rustix::io::write(events.kick(), &1u64.to_ne_bytes()).expect("a kick");
            }
        }
    }
    drop(bus);
    disk.finish();
});

/// EFD_NONBLOCK (sys/eventfd.h).
fn libc_nonblocking() -> i32 {
    0o4000
}
