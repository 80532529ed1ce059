//! The virtual machine monitor of machine kind `kvm`: one guest, its virtual CPUs and its devices,
//! in one jailed process.
//!
//! [`run`] is the main function of that process. Crate machine starts it; the sandbox sends it the
//! configuration of the devices over the control socket, as to a device process. The machine has
//! what a container needs: memory, virtual CPUs, the devices of crate devices over virtio-mmio, a
//! serial port for the kernel's messages, and a port that ends it. `layout` has the addresses of
//! all that a guest can reach.
//!
//! The process builds the machine first, from input of the host only. Then it confines itself, and
//! only then does guest code run. It never opens a file by name.

mod error;
#[cfg(all(target_arch = "x86_64", not(fuzzing)))]
mod x86_64;
#[cfg(all(target_arch = "x86_64", fuzzing))]
pub mod x86_64;

#[cfg(all(target_arch = "x86_64", not(fuzzing)))]
mod bus;
#[cfg(all(target_arch = "x86_64", fuzzing))]
pub mod bus;
#[cfg(target_arch = "x86_64")]
mod machine;
#[cfg(all(target_arch = "x86_64", not(fuzzing)))]
mod memory;
#[cfg(all(target_arch = "x86_64", fuzzing))]
pub mod memory;
#[cfg(target_arch = "x86_64")]
mod monitor;
#[cfg(all(target_arch = "x86_64", not(fuzzing)))]
mod state;
#[cfg(all(target_arch = "x86_64", fuzzing))]
pub mod state;
#[cfg(target_arch = "x86_64")]
mod sys;
#[cfg(target_arch = "x86_64")]
mod vcpu;

use std::os::fd::{OwnedFd, RawFd};

use hull_device_control::CONTROL_FD;
use hull_device_control::monitor::{
    INITRAMFS_FD, KERNEL_FD, KVM_FD, MEMORY_FD, MONITOR_FD, STATE_FD,
};

pub use error::Error;

/// Where a machine comes from.
#[derive(Debug)]
pub enum Origin {
    /// It boots a kernel.
    Boot {
        /// Guest memory in bytes.
        memory: u64,
        /// Number of virtual CPUs.
        vcpus: u32,
        /// The guest kernel: an ELF file with a PVH entry.
        kernel: OwnedFd,
        /// The initramfs.
        initramfs: OwnedFd,
    },
    /// It continues where another one was saved, which takes the same devices. It is paused first:
    /// its devices get their state when it is resumed.
    Snapshot {
        /// The state of virtual CPUs and devices.
        state: OwnedFd,
        /// Guest memory.
        memory: OwnedFd,
    },
}

/// What a machine is made of.
#[derive(Debug)]
pub struct Config {
    /// Where it comes from.
    pub origin: Origin,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The socket over which the sandbox controls the devices.
    pub control: OwnedFd,
    /// The socket over which crate machine pauses, resumes and saves the guest.
    pub monitor: OwnedFd,
}

/// What crate machine asks a machine process for, besides the descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// To boot a kernel.
    Boot {
        /// Guest memory in bytes.
        memory: u64,
        /// Number of virtual CPUs.
        vcpus: u32,
    },
    /// To restore a machine.
    Restore,
}

impl Config {
    /// A machine with the descriptors that crate machine passes to a machine process. Called once,
    /// before the process opens any descriptor of its own, which could get one of their numbers.
    ///
    /// # Errors
    /// A descriptor is not open: crate machine has not started this process.
    pub fn inherited(start: Start) -> Result<Self, Error> {
        let take = |fd: RawFd| hull_ipc::inherited(fd).map_err(Error::errno("use a descriptor"));
        let origin = match start {
            Start::Boot { memory, vcpus } => Origin::Boot {
                memory,
                vcpus,
                kernel: take(KERNEL_FD)?,
                initramfs: take(INITRAMFS_FD)?,
            },
            Start::Restore => Origin::Snapshot {
                state: take(STATE_FD)?,
                memory: take(MEMORY_FD)?,
            },
        };
        Ok(Self {
            origin,
            kvm: take(KVM_FD)?,
            control: take(CONTROL_FD)?,
            monitor: take(MONITOR_FD)?,
        })
    }
}

/// Runs a machine until the guest powers off, or the sandbox closes the control socket. Called with
/// one thread. `confine` confines the process; it is called once everything that needs the host is
/// done, before guest code runs.
///
/// # Errors
/// The machine cannot be built, or the guest broke down.
#[cfg(target_arch = "x86_64")]
pub fn run(
    config: Config,
    confine: impl FnOnce() -> Result<(), hull_jail::Error>,
) -> Result<(), Error> {
    machine::run(config, confine)
}

/// Not supported on this architecture.
///
/// # Errors
/// [`Error::Architecture`].
#[cfg(not(target_arch = "x86_64"))]
pub fn run(
    _config: Config,
    _confine: impl FnOnce() -> Result<(), hull_jail::Error>,
) -> Result<(), Error> {
    Err(Error::Architecture)
}
