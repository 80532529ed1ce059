//! What the kernel is told, and the state in which it is entered: the PVH boot protocol
//! (xen/interface/hvm/start_info.h in the kernel's sources).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::Error;
use crate::memory::{GuestRam, PAGE};
use crate::x86_64::layout::{
    BASE_MEMORY_END, COMMAND_LINE, COMMAND_LINE_SIZE, EXTENDED_MEMORY, MEMORY_MAP, MODULES,
    START_INFO,
};

const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const E820_RAM: u32 = 1;

/// Where an initramfs of `size` bytes goes: at the end of the low memory, above the kernel.
///
/// # Errors
/// It does not fit.
pub fn initramfs_address(ram: &GuestRam, kernel_end: u64, size: u64) -> Result<u64, Error> {
    const WHAT: &str = "the initramfs";
    let start = ram
        .low_end()
        .checked_sub(size)
        .ok_or_else(|| ram.too_little(WHAT))?
        / PAGE
        * PAGE;
    match start >= kernel_end {
        true => Ok(start),
        false => Err(ram.too_little(WHAT)),
    }
}

/// Writes what the kernel is told: command line, memory map, and where the initramfs is.
///
/// # Errors
/// The command line is too long.
pub fn write_start_info(
    ram: &GuestRam,
    command_line: &str,
    initramfs: (u64, u64),
) -> Result<(), Error> {
    const WHAT: &str = "the start information";
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    if line.len() > COMMAND_LINE_SIZE {
        return Err(Error::CommandLine);
    }
    ram.write(WHAT, COMMAND_LINE, &line)?;

    let (address, size) = initramfs;
    ram.write(WHAT, MODULES, &words(&[address, size, 0, 0]))?;

    let mut map = Vec::new();
    let mut entries: u32 = 0;
    for (start, end) in memory_map(ram) {
        map.extend(words(&[start, end - start]));
        map.extend(E820_RAM.to_le_bytes());
        map.extend([0; 4]);
        entries += 1;
    }
    ram.write(WHAT, MEMORY_MAP, &map)?;

    let mut info = Vec::new();
    for value in [START_INFO_MAGIC, START_INFO_VERSION, 0, 1] {
        info.extend(value.to_le_bytes());
    }
    // Modules, command line, ACPI tables (none), memory map.
    info.extend(words(&[MODULES, COMMAND_LINE, 0, MEMORY_MAP]));
    info.extend(entries.to_le_bytes());
    info.extend([0; 4]);
    ram.write(WHAT, START_INFO, &info)
}

fn words(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// The guest's memory, without the hole below 1 MiB.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64)> {
    let mut map = vec![(0, BASE_MEMORY_END)];
    for (start, length) in ram.ranges() {
        let end = start + length;
        let start = if start == 0 { EXTENDED_MEMORY } else { start };
        if end > start {
            map.push((start, end));
        }
    }
    map
}

/// Changes the registers of the first virtual CPU to the state of entry: 32-bit protected mode,
/// paging off, flat segments, the start information's address in EBX.
pub fn enter(entry: u32, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x8,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let data = kvm_segment {
        selector: 0x10,
        type_: 0x3,
        ..code
    };
    // A 32-bit task state segment, busy.
    let task = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        db: 0,
        s: 0,
        g: 0,
        ..code
    };
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task;
    // Protection; the processor's type (extension type) is always set.
    sregs.cr0 = 1 | 1 << 4;
    sregs.cr4 = 0;
    sregs.efer = 0;
    *regs = kvm_regs {
        rip: u64::from(entry),
        rbx: START_INFO,
        // Bit 1 is always set.
        rflags: 2,
        ..kvm_regs::default()
    };
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn word(ram: &GuestRam, at: u64) -> u64 {
        ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn the_kernel_is_told_of_memory_initramfs_and_command_line() {
        let ram = GuestRam::new(64 << 20).unwrap();
        write_start_info(&ram, "quiet", (0x300_0000, 77)).unwrap();
        assert_eq!(word(&ram, START_INFO) as u32, START_INFO_MAGIC);
        assert_eq!(word(&ram, START_INFO + 16), MODULES);
        assert_eq!(word(&ram, START_INFO + 24), COMMAND_LINE);
        assert_eq!(word(&ram, START_INFO + 40), MEMORY_MAP);
        assert_eq!(word(&ram, START_INFO + 48), 2);
        assert_eq!(word(&ram, MODULES), 0x300_0000);
        assert_eq!(word(&ram, MODULES + 8), 77);
        assert_eq!(word(&ram, MEMORY_MAP + 24), EXTENDED_MEMORY);
        assert_eq!(word(&ram, MEMORY_MAP + 32), (64 << 20) - EXTENDED_MEMORY);
        assert_eq!(word(&ram, COMMAND_LINE).to_le_bytes(), *b"quiet\0\0\0");
        let long = "x".repeat(COMMAND_LINE_SIZE);
        assert!(write_start_info(&ram, &long, (0, 0)).is_err());
    }

    #[test]
    fn the_initramfs_lies_above_the_kernel() {
        let ram = GuestRam::new(64 << 20).unwrap();
        let at = initramfs_address(&ram, 32 << 20, 5000).unwrap();
        assert_eq!(at, (64 << 20) - 8192);
        for size in [33 << 20, 65 << 20, u64::MAX] {
            assert!(initramfs_address(&ram, 32 << 20, size).is_err());
        }
    }
}
