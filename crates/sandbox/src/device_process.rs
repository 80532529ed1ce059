//! The device process, from its first instruction: into the jail, then the devices.
//!
//! Called by the hidden subcommand `device-process`, in the namespaces that `process::guest` started it in.

use hull_devices::device_process::{self, DeviceProcessOptions};
use hull_jail::{self as jail, Confinement, FS_DEVICE_CAPABILITIES, Role, Root};

use crate::error::{Context, Result};

/// Most descriptors: the fs device holds some for files that the guest has open.
const OPEN_FILES: u64 = 1 << 20;

/// Confines the process and runs the devices until the sandbox process closes the control socket.
///
/// # Errors
/// The jail cannot be set up, or a device cannot.
pub fn run(options: DeviceProcessOptions) -> Result<()> {
    jail::enter(
        "the device process",
        &Confinement {
            role: Role::Device,
            // It acts for the users of the guest, and so begins as root, with the capabilities for just that.
            uid: 0,
            gid: 0,
            capabilities: FS_DEVICE_CAPABILITIES,
            root: Root {
                proc: true,
                ..Root::default()
            },
            open_files: OPEN_FILES,
        },
    )
    .context(|| "confine the device process".into())?;
    device_process::run(options).context(|| "run the devices".into())
}
