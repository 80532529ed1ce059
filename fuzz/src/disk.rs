//! A disk over virtio-mmio, served by a thread as in a machine process.

use std::fs::File;
use std::thread::JoinHandle;

use hull_devices::block::Block;
use hull_devices::device::Memory;
use hull_devices::transport::mmio::{self, Error, Registers, SlotEvents};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::finish_threads;

/// Bytes of the disk.
const SIZE: u64 = 64 << 9;

/// The disk behind [`Registers`], which end its thread when they are dropped.
pub struct ServedDisk {
    file: File,
    thread: JoinHandle<Result<(), Error>>,
}

impl ServedDisk {
    /// A disk for a guest with this memory, and what the guest reaches of it.
    pub fn new(memory: Memory) -> (Self, Registers, SlotEvents) {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
        file.set_len(SIZE).expect("a size");
        let copy = file.try_clone().expect("a copy");
        let device = Block::new(copy, false, "disk").expect("a device");
        let (registers, slot, events) = mmio::slot(memory).expect("a slot");
        let worker = mmio::attach("disk", Box::new(device), slot).expect("a device");
        let thread = std::thread::spawn(move || worker.serve());
        (Self { file, thread }, registers, events)
    }

    /// Waits for the end of the thread, and checks what is left.
    pub fn finish(self) {
        let served = self.thread.join().expect("no panic");
        // A guest that breaks the rules of a queue ends its machine.
        let broken = |error| matches!(error, Error::Device { .. });
        assert!(served.err().is_none_or(broken));
        finish_threads();
        assert_eq!(self.file.metadata().expect("a disk").len(), SIZE);
    }
}
