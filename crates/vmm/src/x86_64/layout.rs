//! Addresses of all that a guest can reach.
//!
//! ```text
//!          0 ─┬─────────────────────────┐
//!             │ memory                  │ 0x6000 start information, 0x20000 command line
//!    0xa_0000 ─┼─────────────────────────┤
//!             │ reserved                │ 0xf_0000 table of processors and interrupts
//!   0x10_0000 ─┼─────────────────────────┤
//!             │ memory                  │ kernel where it wants to be, initramfs at the end
//! 0xc000_0000 ─┼─────────────────────────┤
//!             │ devices                 │ 0xd000_0000 virtio-mmio, a page for each slot
//!             │                         │ 0xfec0_0000 IOAPIC, 0xfee0_0000 local APIC (KVM)
//!             │                         │ 0xfffb_d000 KVM's own (task state segment)
//!       4 GiB ─┼─────────────────────────┤
//!             │ memory                  │
//! ```
//!
//! Ports: 0x3f8 to 0x3ff serial port, 0x64 reset.

/// The structure that tells the kernel what was loaded (hvm_start_info).
pub const START_INFO: u64 = 0x6000;
/// Its list of modules: the initramfs.
pub const MODULES: u64 = 0x6040;
/// Its memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// As long as the kernel reads it, with the zero byte (COMMAND_LINE_SIZE in asm/setup.h).
pub const COMMAND_LINE_SIZE: usize = 2048;

/// End of the memory below 1 MiB.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// Where the kernel looks for the table of processors, among other places (MultiProcessor
/// Specification 1.4, 4).
pub const MP_TABLE: u64 = 0xf_0000;
/// Memory goes on here.
pub const EXTENDED_MEMORY: u64 = 0x10_0000;

/// End of the memory below 4 GiB.
pub const LOW_MEMORY_END: u64 = 0xc000_0000;
/// Memory that does not fit below the devices.
pub const HIGH_MEMORY: u64 = 0x1_0000_0000;

pub use hull_device_control::monitor::{
    FIRST_INTERRUPT, FIRST_SLOT, IOAPIC, IOAPIC_SIZE, LOCAL_APIC, MAX_SLOTS, RESET, SERIAL,
    SERIAL_PORTS, SLOT_SIZE,
};

/// Three pages that KVM needs on processors of Intel without unrestricted guests.
pub const TASK_STATE: usize = 0xfffb_d000;

/// Interrupt of the serial port.
pub const SERIAL_INTERRUPT: u32 = 4;
/// The command that resets the machine.
pub const RESET_COMMAND: u8 = 0xfe;

const _: () = assert!(START_INFO + 56 <= MODULES && MODULES + 32 <= MEMORY_MAP);
const _: () = assert!(FIRST_SLOT >= LOW_MEMORY_END && FIRST_SLOT < IOAPIC);
