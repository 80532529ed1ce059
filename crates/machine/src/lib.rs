//! Machines: what runs a guest kernel.
//!
//! One trait, [`Machine`], and its kinds: `uml` (a Linux kernel as an ordinary process) and `qemu`.
//! [`choose()`] picks one by what [`probe()`] finds; [`jail`] is what the machine process and the
//! device process run in; a [`ConsoleRing`] keeps what the guest kernel prints; [`exit`] says in
//! one line why a machine ended.
//!
//! Called by crate sandbox (start, console, exit) and crate cli (`hull check`). It never parses
//! what a guest wrote, but for cleaning up console text before people see it, and knows nothing of
//! containers or images.

pub mod choose;
pub mod console;
pub mod exit;
pub mod probe;
mod qemu;
mod uml;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use choose::{Choice, Requirements, choose};
pub use console::ConsoleRing;
pub use exit::Exit;
pub use hull_jail::Started;
pub use probe::{Report, probe};

/// The kinds of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// hull's own virtual machine monitor, on hardware virtualization.
    Kvm,
    /// QEMU's microvm, with KVM where it works and emulating where not.
    Qemu,
    /// A user-mode Linux kernel: no virtualization needed.
    Uml,
}

impl Kind {
    /// Its name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
            Self::Uml => "uml",
        }
    }

    /// The architecture of the guest kernel it runs, as `guest/kernel/build` names it.
    pub fn kernel_architecture(self) -> &'static str {
        match self {
            Self::Uml => "um",
            Self::Kvm | Self::Qemu => std::env::consts::ARCH,
        }
    }

    /// What its guest's kernel is told to find net device `number`, if it does not have it since it
    /// booted.
    pub fn plug(self, number: u8) -> Option<String> {
        match self {
            Self::Uml => Some(uml::device(&net_socket(number), NET)),
            Self::Kvm | Self::Qemu => None,
        }
    }

    /// How many devices it has room for, if that is few: vsock, fs and entropy, net devices and
    /// disks.
    pub fn most_devices(self) -> Option<usize> {
        match self {
            // As many transports as QEMU's microvm has without ACPI (hw/i386/microvm.c).
            Self::Qemu => Some(8),
            Self::Kvm | Self::Uml => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Self::Kvm, Self::Qemu, Self::Uml]
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| Error::UnknownKind(text.to_owned()))
    }
}

/// What to start. The same for every pod of one size: it says nothing of containers.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Directory with the sockets that the device process listens on: `fs.sock`, `vsock.sock`,
    /// `entropy.sock`, `net0.sock` and `disk0.sock`, …; a device without a socket is left out.
    /// They, and it, are given to the jail's user.
    pub sockets: PathBuf,
    /// Hardware addresses of the net devices, which are at `net0.sock`, ….
    pub nets: Vec<[u8; 6]>,
    /// How many disks there are.
    pub disks: u32,
    /// User and group of the machine process.
    pub jail_uid: u32,
}

/// The least memory a machine is started with; the guest kernel and the agent do not fit into less.
pub const MIN_MEMORY: u64 = 48 << 20;

/// A kind of machine.
pub trait Machine {
    /// Which.
    fn kind(&self) -> Kind;

    /// Starts it, jailed; the guest kernel boots after this returns. `console` is the writing end
    /// of a pipe, which gets everything the guest kernel prints and is closed when the machine has
    /// ended.
    fn start(&self, spec: &MachineSpec, console: OwnedFd) -> Result<Started, Error>;
}

/// What can go wrong when choosing or starting a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No kind has this name.
    #[error("no such kind of machine: \"{0}\"")]
    UnknownKind(String),
    /// Kind `kvm` does not exist yet.
    #[error(
        "machine kind kvm is not supported yet: hull's own virtual machine monitor is not built"
    )]
    KvmNotSupported,
    /// QEMU is missing.
    #[error("{program} is not installed")]
    NoQemu {
        /// The executable's name.
        program: String,
    },
    /// QEMU is there but of no use.
    #[error("cannot use {}: {why}", program.display())]
    BadQemu {
        /// Where it is.
        program: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file the machine needs cannot be used.
    #[error("cannot use the {what} {}: {errno}", path.display())]
    File {
        /// Guest kernel, initramfs, ….
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong with it.
        errno: Errno,
    },
    /// Too little memory to boot.
    #[error("cannot start a machine with {} MiB of memory: at least {} MiB are needed", memory >> 20, MIN_MEMORY >> 20)]
    Memory {
        /// Bytes asked for.
        memory: u64,
    },
    /// More processors than the kind has.
    #[error("machine kind {kind} is not supported with {cpus} cpus: {why}")]
    Cpus {
        /// The kind.
        kind: Kind,
        /// How many were asked for.
        cpus: u32,
        /// What limits them.
        why: &'static str,
    },
    /// More devices than the kind has room for.
    #[error(
        "not supported: {disks} disks: machine kind {kind} has room for {most} devices, and {count} are asked for"
    )]
    Devices {
        /// The kind.
        kind: Kind,
        /// Disks among them.
        disks: u32,
        /// How many were asked for.
        count: usize,
        /// How many it takes.
        most: usize,
    },
    /// No kind works here.
    #[error("no machine works on this host: {0}")]
    NoMachine(String),
    /// The kind asked for does not work here.
    #[error("machine kind {kind} does not work on this host: {why}")]
    DoesNotWork {
        /// The kind.
        kind: Kind,
        /// Why not.
        why: String,
    },
    /// Hardware isolation is required and not to be had.
    #[error(
        "machine kind {kind} is not hardware isolation, which the configuration requires (isolation = \"hardware\")"
    )]
    NotHardware {
        /// The kind.
        kind: Kind,
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
            Self::KvmNotSupported => Some("--machine auto picks one that works".into()),
            Self::NoQemu { .. } => Some("apt-get install qemu-system-x86".into()),
            Self::NoMachine(_) | Self::DoesNotWork { .. } => Some("hull check".into()),
            Self::NotHardware { .. } => {
                Some("isolation = \"any\" in the configuration allows it".into())
            }
            _ => None,
        }
    }
}

/// Opens a file that a machine is started from.
fn open(what: &'static str, path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::File {
            what,
            path: path.to_owned(),
            errno,
        }
    })
}

/// Virtio's type of a net device (5.1.1).
const NET: u32 = 1;

/// The socket of a net device.
fn net_socket(number: u8) -> String {
    format!("net{number}.sock")
}

/// The sockets of a machine's devices that exist, by virtio device type, given to the jail's user.
fn device_sockets(spec: &MachineSpec) -> Result<Vec<(String, u32)>, Error> {
    const FS: u32 = 26;
    const VSOCK: u32 = 19;
    const ENTROPY: u32 = 4;
    const BLOCK: u32 = 2;
    // The vsock device first: the agent dials home over it.
    let mut devices: Vec<(String, u32)> = vec![
        ("vsock.sock".into(), VSOCK),
        ("fs.sock".into(), FS),
        ("entropy.sock".into(), ENTROPY),
    ];
    devices.extend(
        (0..)
            .zip(&spec.nets)
            .map(|(index, _)| (net_socket(index), NET)),
    );
    devices.extend((0..spec.disks).map(|index| (format!("disk{index}.sock"), BLOCK)));

    give(&spec.sockets, spec.jail_uid).map_err(|errno| Error::File {
        what: "socket directory",
        path: spec.sockets.clone(),
        errno,
    })?;
    let mut found = Vec::new();
    for (name, device_type) in devices {
        let path = spec.sockets.join(&name);
        match give(&path, spec.jail_uid) {
            Ok(()) => found.push((name, device_type)),
            Err(Errno::NOENT) => {}
            Err(errno) => {
                return Err(Error::File {
                    what: "device socket",
                    path,
                    errno,
                });
            }
        }
    }
    Ok(found)
}

/// Makes the jail's user the owner of a file of the sandbox.
fn give(path: &Path, uid: u32) -> Result<(), Errno> {
    let (user, group) = (
        rustix::fs::Uid::from_raw(uid),
        rustix::fs::Gid::from_raw(uid),
    );
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(rustix::fs::CWD, path, Some(user), Some(group), flags)
}
