//! The role `device-process`: confines itself, then runs the devices of one guest.
//!
//! Started by a sandbox process in new namespaces, with the control socket inherited.

use hull_devices::device_process;
use hull_jail::{self as jail, Confinement, FS_DEVICE_CAPABILITIES, Limits, Role, Root};

use crate::error::{Context, Result};

/// Maximum of open files: the fs device holds one for each file that the guest knows.
const OPEN_FILES: u64 = 1 << 20;

/// Runs the devices until the sandbox process closes the control socket.
///
/// # Errors
/// The control socket was not inherited, the process cannot be confined, or a device cannot be set
/// up.
pub fn run() -> Result<()> {
    let running = || "run the devices";
    let control = device_process::take_control_socket().context(running)?;
    jail::enter("the device process", &confinement(Role::Device))
        .context(|| "confine the device process")?;
    device_process::run(control).context(running)
}

/// What a process with an fs device is confined to. It acts for the guest's users, so it starts as
/// root, with only the capabilities for that.
pub fn confinement(role: Role) -> Confinement {
    Confinement {
        role,
        uid: 0,
        gid: 0,
        capabilities: FS_DEVICE_CAPABILITIES,
        root: Root {
            proc: true,
            ..Root::default()
        },
        limits: Limits::open_files(OPEN_FILES),
        // The machine process is isolated from it, which is enough for both.
        isolate_branches: false,
    }
}
