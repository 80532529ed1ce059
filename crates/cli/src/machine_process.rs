//! The role `machine-process`: builds a machine of kind `kvm`, confines itself, and runs the guest.
//!
//! Started by a sandbox process in new namespaces, with its descriptors inherited.

use std::ffi::OsString;

use hull_jail::{self as jail, Role};
use hull_machine::RESTORE;
use hull_vmm::{Config, Start};

use crate::device_process::confinement;
use crate::error::{Error, Result};

/// Runs a machine with guest memory in bytes and a number of virtual CPUs, or a saved one, until
/// the guest powers off or the sandbox process closes the control socket.
///
/// # Errors
/// The descriptors were not inherited, the machine cannot be built, the process cannot be confined,
/// or the guest broke down.
pub fn run(arguments: &[OsString]) -> Result<()> {
    let number = |index: usize| arguments.get(index)?.to_str()?.parse::<u64>().ok();
    let start = match (arguments.first(), number(0), number(1)) {
        (Some(first), _, _) if first == RESTORE => Start::Restore,
        (_, Some(memory), Some(vcpus)) => Start::Boot {
            memory,
            vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
        },
        _ => return Err(Error::new("internal command: no memory or CPUs")),
    };
    let config = Config::inherited(start).map_err(broken)?;
    let confine = || jail::enter("the machine process", &confinement(Role::Vmm));
    hull_vmm::run(config, confine).map_err(broken)
}

/// An error of the machine, whose text says what was tried.
fn broken(error: hull_vmm::Error) -> Error {
    Error::new(error.to_string())
}
