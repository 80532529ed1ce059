//! The loader of kernels against any file: it refuses it, or loads it into guest memory.
//!
//! Looks for panics, and for files that are loaded outside of memory.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use hull_vmm::memory::GuestRam;
use hull_vmm::x86_64::kernel::Kernel;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

const MEMORY: u64 = 32 << 20;

fuzz_target!(|data: &[u8]| {
    // Its addresses are kept for the life of the process.
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    let ram = RAM.get_or_init(|| GuestRam::new(MEMORY).expect("guest memory"));
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).expect("a file"));
    file.write_all(data).expect("written");
    if let Ok(kernel) = Kernel::read(&file) {
        let fits = kernel.end() <= MEMORY;
        let loaded = kernel.load(&file, ram);
        assert!(loaded.is_err() || fits);
    }
});
