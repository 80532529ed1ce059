//! Devices that the host adds while the guest runs: their driver is told where each one is.

use std::io;
use std::path::Path;

/// Parameters of drivers by which a kernel adds a device; a kernel has one of them. hull's patches
/// make them writable.
const PARAMETERS: [&str; 2] = [
    "/sys/module/virtio_uml/parameters/device",
    "/sys/module/virtio_mmio/parameters/device",
];

/// Makes the kernel probe a device; the host says how it names it.
///
/// # Errors
/// The kernel cannot add devices, or not this one.
pub fn add(device: &str) -> io::Result<()> {
    let parameter = PARAMETERS.into_iter().find(|path| Path::new(path).exists());
    let parameter = parameter.ok_or(io::ErrorKind::Unsupported)?;
    std::fs::write(parameter, device)
}
