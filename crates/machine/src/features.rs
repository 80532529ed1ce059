//! Features of kinds of machines. Callers outside this crate check a feature, never the kind.

use std::ops::RangeInclusive;

use hull_device_control::DeviceType;

/// Abilities and limits of a kind of machine.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// Maximum number of virtual CPUs, if limited.
    pub max_vcpus: Option<u32>,
    /// Maximum number of devices, if limited: fs, vsock and entropy, net devices and disks
    /// together.
    pub max_devices: Option<usize>,
    /// How a guest gets its net devices.
    pub net: NetDevices,
    /// How a guest gets its disks.
    pub disks: Disks,
    /// Whether the machine can be paused and resumed.
    pub pause: bool,
    /// Whether the machine can be saved and restored.
    pub snapshot: bool,
    /// Whether the guest boots with the host's wall clock. Otherwise the agent has to set it. After
    /// a pause it has to be set in either case.
    pub host_clock: bool,
    /// Whether guest programs can make 32-bit system calls.
    pub compat32: bool,
    /// Whether the devices are in the machine process. Otherwise a device process serves them over
    /// vhost-user.
    pub own_devices: bool,
    /// Where a guest finds device `number` of a type. `None` if that is the kernel's or another
    /// program's affair.
    pub place: fn(DeviceType, usize) -> Option<Place>,
    /// What a guest can reach beside the devices, where hull decides on it.
    pub fixed: &'static [FixedDevice],
}

/// Where a guest reaches a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Guest addresses of its registers.
    pub memory: RangeInclusive<u64>,
    /// Its interrupt.
    pub interrupt: u32,
}

/// A device at an address that never changes.
#[derive(Debug, Clone)]
pub struct FixedDevice {
    /// What it is.
    pub name: &'static str,
    /// Its ports.
    pub ports: Option<RangeInclusive<u16>>,
    /// Guest addresses of its registers.
    pub memory: Option<RangeInclusive<u64>>,
    /// What serves accesses: threads whose names begin so, or `None` for the host's kernel.
    pub threads: Option<&'static str>,
}

impl Features {
    /// The number of virtual CPUs to start for `wanted` ones.
    pub fn vcpus(&self, wanted: u32) -> u32 {
        self.max_vcpus
            .map_or(wanted, |most| wanted.min(most))
            .max(1)
    }
}

/// How a guest gets its net devices.
#[derive(Debug, Clone, Copy)]
pub enum NetDevices {
    /// All are present at boot, each making it slower.
    AtBoot {
        /// The machine's vhost-user front end enables the rings of a net device before it has set
        /// them up. The device process corrects the order.
        enables_rings_early: bool,
    },
    /// A running guest probes a device when its kernel receives a parameter.
    HotPlug {
        /// The parameter for net device `number`.
        parameter: fn(number: u8) -> String,
    },
}

impl NetDevices {
    /// Kernel parameter that makes a running guest probe net device `number`; `None` if devices
    /// are enumerated at boot.
    pub fn hotplug_parameter(&self, number: u8) -> Option<String> {
        match self {
            Self::AtBoot { .. } => None,
            Self::HotPlug { parameter } => Some(parameter(number)),
        }
    }
}

/// How a guest gets its disks.
#[derive(Debug, Clone, Copy)]
pub enum Disks {
    /// All are present at boot.
    AtBoot,
    /// A running guest probes a spare disk when its kernel receives a parameter.
    HotPlug {
        /// The parameter for disk `number`.
        parameter: fn(number: u8) -> String,
    },
}

impl Disks {
    /// Kernel parameter that makes a running guest probe disk `number`; `None` if disks are
    /// enumerated at boot.
    pub fn hotplug_parameter(&self, number: u8) -> Option<String> {
        match self {
            Self::AtBoot => None,
            Self::HotPlug { parameter } => Some(parameter(number)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Kind;

    #[test]
    fn a_kind_with_one_cpu_starts_one_whatever_is_wanted() {
        let uml = Kind::Uml.backend().features();
        assert_eq!((uml.vcpus(0), uml.vcpus(1), uml.vcpus(8)), (1, 1, 1));
        let qemu = Kind::Qemu.backend().features();
        assert_eq!((qemu.vcpus(0), qemu.vcpus(8)), (1, 8));
    }
}
