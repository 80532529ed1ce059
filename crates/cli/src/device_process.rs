//! The role `device-process`: confines itself, then runs the devices of one guest.
//!
//! Started by a sandbox process in namespaces of its own, with the control socket inherited.

use hull_devices::device_process;
use hull_jail::{self as jail, Confinement, FS_DEVICE_CAPABILITIES, Role, Root};

use crate::error::{Context, Result};

/// Most descriptors: the fs device holds one for each file that the guest knows.
const OPEN_FILES: u64 = 1 << 20;

/// Runs the devices until the sandbox process closes the control socket.
///
/// # Errors
/// The process was not started by a sandbox, cannot be confined, or a device cannot be set up.
pub fn run() -> Result<()> {
    let running = || "run the devices";
    let control = device_process::take_control_socket().context(running)?;
    jail::enter(
        "the device process",
        &Confinement {
            role: Role::Device,
            // It acts for the users of the guest. So it begins as root, with the capabilities for
            // just that.
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
    .context(|| "confine the device process")?;
    device_process::run(control).context(running)
}
