//! Why a machine cannot run, or has broken down.

use std::fmt;
use std::io;

use hull_device_control::monitor::MAX_VCPUS;
use rustix::io::Errno;

/// An error of the monitor. Its text is for display.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor has no code for this architecture.
    #[error("machine kind kvm is not supported on {}", std::env::consts::ARCH)]
    Architecture,
    /// KVM of this host lacks something.
    #[error("KVM of this host does not support {0}")]
    Capability(&'static str),
    /// A call of KVM failed.
    #[error("cannot {action}: {source}")]
    Kvm {
        /// What was tried.
        action: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// A call of the host failed.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The kernel cannot be booted.
    #[error("cannot boot the guest kernel: {0}")]
    Kernel(&'static str),
    /// Kernel and initramfs do not fit into the guest's memory.
    #[error("cannot boot the guest kernel: {what} does not fit into {} MiB of memory", memory >> 20)]
    TooLittleMemory {
        /// What does not fit.
        what: &'static str,
        /// Guest memory in bytes.
        memory: u64,
    },
    /// The machine cannot be saved, or a saved one cannot be restored here. The reason is for
    /// display.
    #[error("cannot use the snapshot: {0}")]
    Snapshot(String),
    /// The command line is longer than the kernel reads.
    #[error("cannot boot the guest kernel: its command line is too long")]
    CommandLine,
    /// The devices cannot be set up, or the sandbox's requests cannot be served.
    #[error(transparent)]
    Devices(#[from] hull_devices::served::Error),
    /// A number of virtual CPUs that no machine has.
    #[error("a machine has 1 to {MAX_VCPUS} virtual CPUs, and not {vcpus}")]
    Vcpus {
        /// Number requested.
        vcpus: u32,
    },
    /// The process cannot be confined.
    #[error(transparent)]
    Jail(#[from] hull_jail::Error),
    /// The guest broke down.
    #[error(transparent)]
    Guest(#[from] Breakdown),
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
impl Error {
    pub(crate) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { action, source }
    }

    pub(crate) fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }

    pub(crate) fn errno(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Host {
            action,
            source: errno.into(),
        }
    }
}

/// How a guest broke down: what KVM reported of a virtual CPU.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Breakdown {
    /// A fault while a fault was handled while a fault was handled.
    #[error("the guest kernel crashed: virtual CPU {vcpu} had a triple fault{at}")]
    TripleFault {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// Where.
        at: At,
    },
    /// The processor refuses the state of a virtual CPU.
    #[error("the processor refuses to run virtual CPU {vcpu} (hardware reason {reason:#x})")]
    EntryFailure {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// What the hardware says.
        reason: u64,
    },
    /// KVM cannot go on.
    #[error("KVM had an internal error in virtual CPU {vcpu} (suberror {suberror}){at}")]
    InternalError {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// What KVM says (linux/kvm.h, KVM_INTERNAL_ERROR_*).
        suberror: u32,
        /// Where.
        at: At,
    },
    /// KVM cannot execute an instruction, which the processor left to it.
    #[error("KVM cannot emulate an instruction of virtual CPU {vcpu}{at}")]
    Emulation {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// Which, and where.
        at: At,
    },
    /// KVM gave control back for a reason that does not occur in this machine.
    #[error("KVM stopped virtual CPU {vcpu} for an unknown reason: {reason}")]
    Unknown {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// The reason.
        reason: String,
    },
    /// The call to run a virtual CPU failed.
    #[error("cannot run virtual CPU {vcpu}: {errno}")]
    Run {
        /// Number of the virtual CPU.
        vcpu: u32,
        /// KVM's error.
        errno: Errno,
    },
}

/// Where the guest was when it broke down, as far as KVM says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct At {
    /// The instruction pointer.
    pub rip: Option<u64>,
    /// Bytes of the instruction; empty where they are not known.
    pub instruction: Vec<u8>,
}

impl fmt::Display for At {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(rip) = self.rip {
            write!(out, " at {rip:#x}")?;
        }
        if !self.instruction.is_empty() {
            out.write_str(":")?;
        }
        self.instruction
            .iter()
            .try_for_each(|byte| write!(out, " {byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_breakdown_says_where_it_was_as_far_as_that_is_known() {
        let emulation = |rip, instruction: &[u8]| {
            let instruction = instruction.to_vec();
            let at = At { rip, instruction };
            Breakdown::Emulation { vcpu: 1, at }.to_string()
        };
        let text = "KVM cannot emulate an instruction of virtual CPU 1";
        assert_eq!(emulation(None, &[]), text);
        assert_eq!(
            emulation(Some(0xffff_0000), &[0x0f, 0xae]),
            format!("{text} at 0xffff0000: 0f ae")
        );
    }
}
