//! What crate machine and the machine process of kind `kvm` have in common: descriptors, the places
//! of devices, and the protocol of the monitor socket.
//!
//! The monitor socket is a socket pair of [`hull_ipc`]. Each [`Command`] is answered by an
//! [`Answer`], in order.

use hull_ipc::Limits;
use serde::{Deserialize, Serialize};

use crate::{DeviceType, MAX_DISKS, MAX_NETS};

/// Descriptor of the monitor socket in the machine process.
pub const MONITOR_FD: i32 = 4;
/// Descriptor of the guest kernel.
pub const KERNEL_FD: i32 = 5;
/// Descriptor of the initramfs.
pub const INITRAMFS_FD: i32 = 6;
/// Descriptor of `/dev/kvm`.
pub const KVM_FD: i32 = 7;
/// Descriptor of the saved state, in the place of the kernel.
pub const STATE_FD: i32 = KERNEL_FD;
/// Descriptor of the saved memory, in the place of the initramfs.
pub const MEMORY_FD: i32 = INITRAMFS_FD;

/// Most virtual CPUs.
pub const MAX_VCPUS: u32 = 32;

/// What KVM must have: number (linux/kvm.h, KVM_CAP_*) and name.
pub const CAPABILITIES: [(u32, &str); 6] = [
    (32, "interrupts by eventfd"),
    (36, "notifications by eventfd"),
    (39, "setting the guest's clock"),
    (72, "the TSC deadline timer"),
    (121, "a split interrupt controller"),
    (136, "immediate exits"),
];

/// The IOAPIC, as every kernel expects it (MultiProcessor Specification 1.4, 3.6.5).
pub const IOAPIC: u64 = 0xfec0_0000;
/// Its window of registers.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// The local APIC, which KVM emulates.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// First port of the serial port (COM1).
pub const SERIAL: u16 = 0x3f8;
/// Number of its ports.
pub const SERIAL_PORTS: u16 = 8;
/// Status and command port of the keyboard controller, of which there is only the command that
/// resets the machine.
pub const RESET: u16 = 0x64;

/// What the names of the threads of virtual CPUs begin with.
pub const VCPU_THREADS: &str = "vcpu";

/// Address of the first slot for a device.
pub const FIRST_SLOT: u64 = 0xd000_0000;
/// Bytes of a slot's registers.
pub const SLOT_SIZE: u64 = 0x1000;
/// Interrupt of the first slot. Lower ones belong to what a PC has.
pub const FIRST_INTERRUPT: u32 = 5;
/// Devices of which a machine has one: fs, vsock, entropy, balloon.
const SINGLE: u32 = 4;
/// Number of slots.
pub const MAX_SLOTS: u32 = SINGLE + MAX_NETS as u32 + MAX_DISKS as u32;

/// A place for a device: its registers and its interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotAddress {
    /// Number of the slot.
    pub slot: u32,
}

impl SlotAddress {
    /// The place of device `number` of a type. `None` if there is none.
    pub fn of(device: DeviceType, number: usize) -> Option<Self> {
        let (first, most) = match device {
            DeviceType::Vsock => (0, 1),
            DeviceType::Fs => (1, 1),
            DeviceType::Entropy => (2, 1),
            DeviceType::Balloon => (3, 1),
            DeviceType::Net => (SINGLE, MAX_NETS),
            DeviceType::Disk => (SINGLE + MAX_NETS as u32, MAX_DISKS),
        };
        let number = (number < most).then_some(number as u32)?;
        Some(Self {
            slot: first + number,
        })
    }

    /// Guest address of its registers.
    pub fn registers(self) -> u64 {
        FIRST_SLOT + u64::from(self.slot) * SLOT_SIZE
    }

    /// Number of its interrupt.
    pub fn interrupt(self) -> u32 {
        FIRST_INTERRUPT + self.slot
    }

    /// The device in the guest kernel's parameter `virtio_mmio.device`.
    pub fn parameter(self) -> String {
        format!(
            "{}K@{:#x}:{}",
            SLOT_SIZE >> 10,
            self.registers(),
            self.interrupt()
        )
    }
}

/// What crate machine asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Stop the guest. Answered when no virtual CPU runs.
    Pause,
    /// Let it go on. The first time after a restore, its devices take over their states before:
    /// the sandbox has given them what they had on the host.
    Resume,
    /// Save the stopped guest to the two files that come with the command, which are empty: its
    /// state and its memory. Devices stand still meanwhile.
    Save,
}

/// The answer to a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// Why it failed; `None` on success.
    pub error: Option<String>,
}

/// Limits of both sides for a message.
pub const LIMITS: Limits = Limits {
    bytes: 4 << 10,
    fds: 2,
};

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_device_has_a_place_of_its_own() {
        let mut slots = Vec::new();
        for (device, most) in [
            (DeviceType::Fs, 1),
            (DeviceType::Vsock, 1),
            (DeviceType::Entropy, 1),
            (DeviceType::Balloon, 1),
            (DeviceType::Net, MAX_NETS),
            (DeviceType::Disk, MAX_DISKS),
        ] {
            slots.extend((0..most).map(|number| SlotAddress::of(device, number).unwrap().slot));
            assert_eq!(SlotAddress::of(device, most), None);
        }
        slots.sort_unstable();
        assert_eq!(slots, (0..MAX_SLOTS).collect::<Vec<_>>());
    }

    #[test]
    fn the_kernel_is_told_where_a_device_is() {
        let net = SlotAddress::of(DeviceType::Net, 1).unwrap();
        assert_eq!(net.parameter(), "4K@0xd0005000:10");
    }
}
