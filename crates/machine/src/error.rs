//! Errors of choosing, starting or operating a machine.

use std::path::PathBuf;

use rustix::io::Errno;

use crate::{Kind, MIN_MEMORY};

/// An error of this crate. The text is for display; callers match the variant.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Unknown name of a kind.
    #[error("no such kind of machine: \"{0}\"")]
    UnknownKind(String),
    /// The kind does not support the operation.
    #[error("machine kind {kind} does not support {operation}")]
    NotSupported {
        /// The kind.
        kind: Kind,
        /// The operation.
        operation: &'static str,
    },
    /// QEMU is missing.
    #[error("{program} is not installed")]
    NoQemu {
        /// Name of the executable.
        program: String,
    },
    /// QEMU is installed but cannot be used.
    #[error("cannot use {}: {why}", program.display())]
    BadQemu {
        /// Path of the executable.
        program: PathBuf,
        /// The reason.
        why: String,
    },
    /// A file that the machine needs cannot be used.
    #[error("cannot use the {what} {}: {errno}", path.display())]
    File {
        /// Guest kernel, initramfs, ….
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The error of the system call.
        errno: Errno,
    },
    /// The socket of a device cannot be given to the machine's user.
    #[error("cannot use the socket of device {device}: {errno}")]
    Socket {
        /// Name of the device.
        device: String,
        /// The error of the system call.
        errno: Errno,
    },
    /// Too little memory to boot.
    #[error(
        "cannot start a machine with {} MiB of memory: at least {} MiB are needed",
        memory >> 20,
        MIN_MEMORY >> 20
    )]
    Memory {
        /// Bytes requested.
        memory: u64,
    },
    /// More virtual CPUs than the kind supports.
    #[error("machine kind {kind} is not supported with {vcpus} cpus: it has {most} at most")]
    Vcpus {
        /// The kind.
        kind: Kind,
        /// Number requested.
        vcpus: u32,
        /// The limit.
        most: u32,
    },
    /// More devices than the kind supports.
    #[error(
        "not supported: {disks} disks: machine kind {kind} has room for {most} devices, \
         and {count} are asked for"
    )]
    Devices {
        /// The kind.
        kind: Kind,
        /// Number of disks among them.
        disks: usize,
        /// Number requested.
        count: usize,
        /// The limit.
        most: usize,
    },
    /// No kind works on this host.
    #[error("no machine works on this host: {0}")]
    NoMachine(String),
    /// The requested kind does not work on this host.
    #[error("machine kind {kind} does not work on this host: {why}")]
    DoesNotWork {
        /// The kind.
        kind: Kind,
        /// The reason.
        why: String,
    },
    /// Hardware isolation is required and the kind does not have it here.
    #[error(
        "machine kind {kind} is not hardware isolation, which the configuration requires \
         (isolation = \"hardware\")"
    )]
    NotHardware {
        /// The kind.
        kind: Kind,
    },
    /// The caller has wired the devices of another kind.
    #[error("cannot start a machine of kind {kind}: its devices are wired for another kind")]
    Wiring {
        /// The kind.
        kind: Kind,
    },
    /// The machine did not stop or answer in time.
    #[error("cannot {operation} the machine: {why}")]
    Operation {
        /// Pause, resume, ….
        operation: &'static str,
        /// The reason.
        why: String,
    },
    /// The jail could not be set up.
    #[error(transparent)]
    Jail(#[from] hull_jail::Error),
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownKind(_) => Some("one of auto, kvm, uml, qemu".into()),
            Self::NoQemu { .. } => Some("apt-get install qemu-system-x86".into()),
            Self::NoMachine(_) | Self::DoesNotWork { .. } => Some("hull check".into()),
            Self::NotHardware { .. } => {
                Some("isolation = \"any\" in the configuration allows it".into())
            }
            Self::Jail(error) => error.hint(),
            _ => None,
        }
    }
}
