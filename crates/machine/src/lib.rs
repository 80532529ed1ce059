//! Machines, which run guest kernels.
//!
//! A kind of machine is a [`Backend`]: `kvm` (hull's own monitor), `uml` (a Linux kernel as an
//! ordinary process) and `qemu`. A running one is a [`Machine`]. The differences between kinds are
//! in [`Features`]; nothing outside this crate matches on the [`Kind`]. [`choose()`] picks one by
//! the results of [`probe()`], and a [`ConsoleRing`] keeps the guest kernel's output.
//!
//! Called by crate sandbox (start, pause, end) and by the commands (`hull check`). It parses two
//! kinds of untrusted input: console text, which is sanitized before it is displayed and never
//! acted on, and QEMU's answers, limited in size and time. It is independent of containers and
//! images.

pub mod choose;
pub mod console;
mod error;
mod exit;
mod features;
mod kvm;
pub mod probe;
mod process;
mod qemu;
mod text;
mod uml;
mod wiring;

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

pub use choose::{Choice, Host, Requirements, choose};
pub use console::ConsoleRing;
pub use error::Error;
pub use exit::Exit;
pub use features::{Disks, Features, FixedDevice, NetDevices, Place};
pub use hull_device_control::DeviceConfig;
pub use kvm::{RESTORE, ROLE as MACHINE_PROCESS};
pub use probe::{Report, probe};
pub use process::{Process, ProcessRole};
pub use text::printable;
pub use wiring::{DeviceWiring, Devices, Wiring};

/// The kinds of machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// hull's own virtual machine monitor, on hardware virtualization.
    Kvm,
    /// A user-mode Linux kernel: no virtualization needed.
    Uml,
    /// QEMU's microvm, with KVM where it works, otherwise with emulation.
    Qemu,
}

impl Kind {
    /// All kinds, in the order in which `auto` tries them.
    pub const ALL: [Self; 3] = [Self::Kvm, Self::Uml, Self::Qemu];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
            Self::Uml => "uml",
        }
    }

    /// The architecture of its guest kernel, as `guest/kernel/build` names it.
    pub fn kernel_architecture(self) -> &'static str {
        match self {
            Self::Uml => "um",
            Self::Kvm | Self::Qemu => std::env::consts::ARCH,
        }
    }

    /// Its backend.
    pub fn backend(self) -> &'static dyn Backend {
        match self {
            Self::Kvm => &kvm::Kvm,
            Self::Uml => &uml::Uml,
            Self::Qemu => &qemu::Qemu,
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
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| Error::UnknownKind(text.to_owned()))
    }
}

/// The guest kernels of machines: each architecture with its kinds.
pub fn kernels() -> Vec<(&'static str, Vec<Kind>)> {
    let mut kernels: Vec<(&'static str, Vec<Kind>)> = Vec::new();
    for kind in Kind::ALL {
        let architecture = kind.kernel_architecture();
        match kernels.iter_mut().find(|(other, _)| *other == architecture) {
            Some((_, kinds)) => kinds.push(kind),
            None => kernels.push((architecture, vec![kind])),
        }
    }
    kernels
}

/// The minimum memory of a machine; guest kernel and agent do not fit into less.
pub const MIN_MEMORY: u64 = 48 << 20;

/// Configuration of a machine. The same for every pod of one size, independent of containers.
#[derive(Debug, Clone)]
pub struct MachineConfig {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs that holds the agent.
    pub initramfs: PathBuf,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Use hardware virtualization (see [`Choice::hardware`]).
    pub hardware: bool,
    /// Keep its branches apart from those of other processes: see
    /// [`hull_jail::Confinement::isolate_branches`]. KVM does that for its guests by itself.
    pub isolate_branches: bool,
}

/// A kind of machine.
pub trait Backend: Sync {
    /// The kind of machine.
    fn kind(&self) -> Kind;

    /// Features and limits of the kind.
    fn features(&self) -> Features;

    /// The most processes and threads of the host that a machine may have.
    fn max_processes(&self, memory: u64, vcpus: u32) -> u64;

    /// Memory of the host that the machine process may take beside the guest's, bytes.
    fn own_memory(&self) -> u64;

    /// Whether it works on this host. Cheap enough for each start: slow results are cached.
    ///
    /// # Errors
    /// [`Error::DoesNotWork`] or [`Error::NoQemu`] with the reason.
    fn probe(&self, host: &Host) -> Result<probe::Works, Error>;

    /// Whether it works on this host, tested more thoroughly than for a start.
    fn diagnose(&self, host: &Host) -> probe::State;

    /// Starts a machine, jailed; the guest kernel boots after this returns.
    ///
    /// Call it from a thread that lives as long as the machine (see [`hull_jail::spawn`]).
    ///
    /// # Errors
    /// The configuration is invalid for this kind, a file cannot be used, or the jail cannot be set
    /// up. No process is left behind.
    fn start(&self, config: &MachineConfig, wiring: Wiring) -> Result<Box<dyn Machine>, Error>;

    /// Starts a machine from a snapshot, with the same devices. It is paused. The caller gives the
    /// devices what they had on the host, then resumes it: they take over their states. A machine
    /// whose first resume fails can only be dropped.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for kinds without [`Features::snapshot`].
    fn restore(&self, snapshot: &Snapshot, wiring: Wiring) -> Result<Box<dyn Machine>, Error> {
        let _ = (snapshot, wiring);
        Err(self.kind().unsupported("restoring"))
    }
}

/// A running machine. Dropping it kills it.
///
/// All methods have a timeout and may block that long.
pub trait Machine: Send + fmt::Debug {
    /// The kind of machine.
    fn kind(&self) -> Kind;

    /// Its processes. Excludes the device process of a kind without [`Features::own_devices`],
    /// which the caller owns.
    fn processes(&self) -> &[Process];

    /// Stops the guest: when this returns, no guest code runs, neither kernel nor user space, until
    /// [`Self::resume`]. Devices continue, and complete pending requests. Without effect on a
    /// paused machine.
    ///
    /// # Errors
    /// [`Error::Operation`] if the machine has ended, or does not stop in time; then it continues.
    fn pause(&mut self) -> Result<(), Error>;

    /// Resumes the guest. Its monotonic clock continues from where it stopped. Its wall clock lags
    /// by the time of the pause, until the agent sets it. Without effect on a machine that is not
    /// paused.
    ///
    /// # Errors
    /// [`Error::Operation`] if the machine has ended, or does not answer in time.
    fn resume(&mut self) -> Result<(), Error>;

    /// Saves the state of a paused machine to files that are empty. Takes as long as it takes to
    /// write the guest's memory.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for kinds without [`Features::snapshot`].
    fn save(&mut self, to: &Snapshot) -> Result<(), Error> {
        let _ = to;
        Err(self.kind().unsupported("saving"))
    }

    /// Adds a device to the running machine. (A guest of a kind with [`NetDevices::HotPlug`] adds
    /// the net devices of its [`Wiring`] itself.)
    ///
    /// # Errors
    /// [`Error::NotSupported`] for kinds that cannot.
    fn attach(&mut self, device: DeviceWiring) -> Result<(), Error> {
        let _ = device;
        Err(self.kind().unsupported("adding a device"))
    }

    /// Changes the size of the running machine.
    ///
    /// # Errors
    /// [`Error::NotSupported`] for kinds that cannot.
    fn resize(&mut self, resize: Resize) -> Result<(), Error> {
        let _ = resize;
        Err(self.kind().unsupported("changing its size"))
    }

    /// Why it ended; `None` while it runs. Call it when the pidfd of [`ProcessRole::Machine`] is
    /// readable.
    fn exit(&mut self) -> Option<Exit>;
}

impl Kind {
    fn unsupported(self, operation: &'static str) -> Error {
        Error::NotSupported {
            kind: self,
            operation,
        }
    }
}

/// Files that a machine's state is saved to and restored from.
#[derive(Debug)]
pub struct Snapshot {
    /// Guest memory.
    pub memory: OwnedFd,
    /// The state of virtual CPUs and devices.
    pub state: OwnedFd,
}

/// A change of a machine's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// Guest memory in bytes.
    Memory(u64),
    /// Number of virtual CPUs.
    Vcpus(u32),
}

/// Checks the limits on the configuration.
fn check(kind: Kind, features: &Features, config: &MachineConfig) -> Result<(), Error> {
    if config.memory < MIN_MEMORY {
        return Err(Error::Memory {
            memory: config.memory,
        });
    }
    match features.max_vcpus {
        Some(most) if config.vcpus > most => Err(Error::Vcpus {
            kind,
            vcpus: config.vcpus,
            most,
        }),
        _ => Ok(()),
    }
}

/// Opens a file needed to start a machine, for its path only.
fn open(what: &'static str, path: &Path) -> Result<OwnedFd, Error> {
    open_for(OFlags::PATH, what, path)
}

/// Opens a file needed to start a machine.
fn open_for(access: OFlags, what: &'static str, path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| Error::File {
        what,
        path: path.to_owned(),
        errno,
    })
}
