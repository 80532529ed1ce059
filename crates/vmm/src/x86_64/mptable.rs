//! The table that tells the kernel its processors and interrupts (MultiProcessor Specification
//! 1.4, 4).
//!
//! It is read in microseconds. The other way, ACPI, would need an interpreter for the description
//! of the devices, and tells nothing more: devices are on the command line.

use crate::Error;
use crate::memory::GuestRam;
use crate::x86_64::layout::{FIRST_INTERRUPT, IOAPIC, LOCAL_APIC, MP_TABLE, SERIAL_INTERRUPT};

const HEADER_SIZE: usize = 44;
/// Revision 1.4.
const REVISION: u8 = 4;
/// Version of integrated APICs.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;

// Types of entries, and flags in them.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_APICS: u8 = 0xff;

/// Writes the table for `vcpus` processors, whose APIC ids count from 0, and `slots` devices.
///
/// # Errors
/// The memory is not there.
pub fn write(ram: &GuestRam, vcpus: u32, slots: u32) -> Result<(), Error> {
    const WHAT: &str = "the table of processors";
    let table = table(vcpus, slots);
    let address = MP_TABLE + 16;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((address as u32).to_le_bytes());
    // Of one paragraph; with a table and no default configuration; in virtual wire mode.
    pointer.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    ram.write(WHAT, MP_TABLE, &pointer)?;
    ram.write(WHAT, address, &table)
}

fn table(vcpus: u32, slots: u32) -> Vec<u8> {
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend(entry);
        count += 1;
    };
    for id in 0..vcpus as u8 {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
        // Signature and features, which the kernel takes from CPUID.
        entry.extend([0; 16]);
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let ioapic_id = vcpus as u8;
    let mut entry = vec![IO_APIC, ioapic_id, APIC_VERSION, ENABLED];
    entry.extend((IOAPIC as u32).to_le_bytes());
    add(&entry);
    let devices = FIRST_INTERRUPT..FIRST_INTERRUPT + slots;
    for pin in std::iter::once(SERIAL_INTERRUPT).chain(devices) {
        // Polarity and trigger are the bus's: edges.
        add(&[
            INTERRUPT, INT, 0, 0, ISA_BUS, pin as u8, ioapic_id, pin as u8,
        ]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);

    let mut table = b"PCMP".to_vec();
    table.extend(((HEADER_SIZE + entries.len()) as u16).to_le_bytes());
    table.extend([REVISION, 0]);
    table.extend(b"HULL    ");
    table.extend(b"VMM         ");
    // No table of the manufacturer.
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend((LOCAL_APIC as u32).to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The byte with which all of them add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_adds_up_to_zero_and_says_its_length() {
        for (vcpus, slots) in [(1, 3), (32, 40)] {
            let table = table(vcpus, slots);
            assert_eq!(checksum(&table), 0);
            let length = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(length), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(u32::from(count), vcpus + 2 + 1 + slots + 2);
        }
    }
}
