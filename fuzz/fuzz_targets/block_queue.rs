//! The block device against a guest that writes anything: requests that nearly make sense,
//! nonsense, and broken descriptor chains.
//!
//! Looks for panics, for requests that never complete, for a disk that changes its size, and for a
//! read-only disk that is written to.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use hull_devices::block::Block;
use hull_devices::device::{Device, Memory, Queues, Ring};
use hull_fuzz::{AVAILABLE, FuzzRing, Input, QUEUE, descriptor, memory};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x2_0000;
const RING: u64 = 0x1000;
const BUFFERS: u64 = 0x1_0000;
const SECTORS: u64 = 64;
const SECTOR: u64 = 512;
const STEPS: usize = 64;
/// Types of requests that the device knows, and one that it does not.
const TYPES: [u32; 7] = [0, 1, 4, 8, 11, 13, 99];
const CONTENT: u8 = 0x5a;

struct Guest {
    device: Block,
    memory: Memory,
    rings: Vec<Arc<dyn Ring>>,
    count: Arc<FuzzRing>,
    available: u16,
}

impl Guest {
    fn new(device: Block) -> Self {
        let count = FuzzRing::new(RING as u32, false);
        Self {
            device,
            memory: memory(MEMORY as usize),
            rings: vec![count.clone()],
            count,
            available: 0,
        }
    }

    fn write(&self, bytes: &[u8], at: u64) {
        // What is outside of memory is not written: it is the fuzzer's loss.
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
    }

    /// A chain of descriptors from number 0 on.
    fn offer(&mut self, chain: &[[u8; 16]]) {
        for (index, descriptor) in chain.iter().enumerate() {
            self.write(descriptor, RING + index as u64 * 16);
        }
        let slot = u64::from(self.available % QUEUE) * 2;
        self.available = self.available.wrapping_add(1);
        self.write(&[0, 0], RING + AVAILABLE + 4 + slot);
        self.write(&self.available.to_le_bytes(), RING + AVAILABLE + 2);
    }

    /// Whether the device goes on.
    fn kick(&mut self) -> bool {
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        self.device.queue_event(0, &mut queues).is_ok()
    }
}

fn step(guest: &mut Guest, input: &mut Input<'_>) {
    let choice = input.u8();
    if choice % 4 == 0 {
        // Anything.
        let chain: Vec<_> = (0..1 + choice / 4 % 6)
            .map(|_| {
                let at = u64::from(input.u32() % (2 * MEMORY as u32));
                descriptor(at, input.u32() % 0x1_0000, input.u16() & 7, input.u16() % 8)
            })
            .collect();
        guest.offer(&chain);
        return;
    }
    // A header, data, a status.
    let mut header = [0; 16];
    header[..4].copy_from_slice(&TYPES[usize::from(input.u8()) % TYPES.len()].to_le_bytes());
    let sector = match choice / 4 % 4 {
        0 => input.u64(),
        _ => u64::from(input.u8()) % (SECTORS + 2),
    };
    header[8..].copy_from_slice(&sector.to_le_bytes());
    guest.write(&header, BUFFERS);
    let length = match choice / 16 % 4 {
        0 => u32::from(input.u16()),
        _ => u32::from(input.u8() % 8) * SECTOR as u32,
    };
    let data = BUFFERS + 0x100;
    guest.write(&input.bytes::<16>(), data);
    let write = u16::from(choice & 0x80 != 0) * 2;
    guest.offer(&[
        descriptor(BUFFERS, 16, 1, 1),
        descriptor(data, length, 1 | write, 2),
        descriptor(BUFFERS + 0x80, 1, 2, 0),
    ]);
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let read_only = input.u8() & 1 != 0;
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a memory file"));
    let content = [CONTENT; (SECTORS * SECTOR) as usize];
    file.write_all_at(&content, 0).expect("a disk");
    let device = file
        .try_clone()
        .and_then(|file| Block::new(file, read_only, "disk"));
    let mut guest = Guest::new(device.expect("a device"));
    let mut alive = true;
    for _ in 0..STEPS {
        if input.is_empty() || !alive {
            break;
        }
        step(&mut guest, &mut input);
        alive = guest.kick();
    }
    if alive {
        assert!(guest.count.all_given(), "a request did not complete");
    }
    let length = file.metadata().expect("its size").len();
    assert_eq!(length, SECTORS * SECTOR, "the disk has another size");
    if read_only {
        let mut now = vec![0; content.len()];
        file.read_exact_at(&mut now, 0).expect("its content");
        assert!(now == content, "a read-only disk was written to");
    }
});
