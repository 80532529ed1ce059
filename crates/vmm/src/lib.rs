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
mod sys;
#[cfg(target_arch = "x86_64")]
mod vcpu;

use std::os::fd::{OwnedFd, RawFd};

use hull_device_control::CONTROL_FD;
use hull_device_control::monitor::{INITRAMFS_FD, KERNEL_FD, KVM_FD, MONITOR_FD};

pub use error::Error;

/// What a machine is made of.
#[derive(Debug)]
pub struct Config {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// The guest kernel: an ELF file with a PVH entry.
    pub kernel: OwnedFd,
    /// The initramfs.
    pub initramfs: OwnedFd,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The socket over which the sandbox controls the devices.
    pub control: OwnedFd,
    /// The socket over which crate machine pauses and resumes the guest.
    pub monitor: OwnedFd,
}

impl Config {
    /// A machine of `memory` bytes and `vcpus` virtual CPUs, with the descriptors that crate
    /// machine passes to a machine process. Called once, before the process opens any descriptor of
    /// its own, which could get one of their numbers.
    ///
    /// # Errors
    /// A descriptor is not open: crate machine has not started this process.
    pub fn inherited(memory: u64, vcpus: u32) -> Result<Self, Error> {
        let take = |fd: RawFd| hull_ipc::inherited(fd).map_err(Error::errno("use a descriptor"));
        Ok(Self {
            memory,
            vcpus,
            kernel: take(KERNEL_FD)?,
            initramfs: take(INITRAMFS_FD)?,
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
