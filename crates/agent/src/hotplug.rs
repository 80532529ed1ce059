//! Devices that the host adds while the guest runs: their driver is told where each one is.

use std::io;

/// Parameter of a user-mode kernel that adds a device to it.
const PARAMETER: &str = "/sys/module/virtio_uml/parameters/device";

/// Makes the kernel probe a device; the host says how it names it.
///
/// # Errors
/// The kernel cannot add devices, or not this one.
pub fn add(device: &str) -> io::Result<()> {
    std::fs::write(PARAMETER, device)
}
