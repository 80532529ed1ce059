//! Applies the pod's settings to a booted guest: host name, clock, entropy, sysctls. Called by
//! `service`.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use hull_protocol::agent::ConfigureRequest;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::rpc::status::{Failure, Result};

/// Most entropy accepted in one call.
const ENTROPY_LIMIT: usize = 512;

/// Applies a request. Empty fields change nothing.
pub fn apply(request: &ConfigureRequest) -> Result<()> {
    // Checked first, so that a rejected request changes nothing.
    if request.entropy.len() > ENTROPY_LIMIT {
        return Err(Failure::invalid(format!(
            "invalid entropy: {} bytes, at most {ENTROPY_LIMIT} are taken",
            request.entropy.len()
        )));
    }
    let sysctls = request
        .sysctl
        .iter()
        .map(|(name, value)| Ok((name, sysctl_path(name)?, value)))
        .collect::<Result<Vec<_>>>()?;

    if request.clock_ns != 0 {
        let time = Timespec {
            tv_sec: (request.clock_ns / 1_000_000_000) as i64,
            tv_nsec: (request.clock_ns % 1_000_000_000) as _,
        };
        clock_settime(ClockId::Realtime, time)
            .map_err(|error| Failure::internal("set the clock", &error.into()))?;
    }
    if !request.entropy.is_empty() {
        add_entropy(&request.entropy).map_err(|error| Failure::internal("add entropy", &error))?;
    }
    if !request.hostname.is_empty() {
        rustix::system::sethostname(request.hostname.as_bytes()).map_err(|error| {
            Failure::internal(
                &format!("set the host name {:?}", request.hostname),
                &error.into(),
            )
        })?;
    }
    for (name, path, value) in sysctls {
        fs::write(path, value).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::invalid(format!("sysctl {name:?} does not exist")),
            _ => Failure::internal(&format!("set sysctl {name:?} to {value:?}"), &error),
        })?;
    }
    Ok(())
}

/// Path of a sysctl. Dots separate; a slash in the name stands for a dot (as in a VLAN interface's
/// name), as in sysctl(8).
fn sysctl_path(name: &str) -> Result<PathBuf> {
    let mut path = PathBuf::from("/proc/sys");
    for part in name.split('.') {
        if part.is_empty() || part.starts_with('/') {
            return Err(Failure::invalid(format!("invalid sysctl name {name:?}")));
        }
        path.push(part.replace('/', "."));
    }
    Ok(path)
}

/// Mixes bytes into the kernel's pool and credits them in full: they come from the host's own
/// generator.
fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h with the largest buffer.
    #[repr(C)]
    struct RandPoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; ENTROPY_LIMIT],
    }
    // linux/random.h: _IOW('R', 0x03, int[2])
    const RNDADDENTROPY: u64 = 0x4008_5203;

    let mut info = RandPoolInfo {
        entropy_count: bytes.len() as libc::c_int * 8,
        buf_size: bytes.len() as libc::c_int,
        buf: [0; ENTROPY_LIMIT],
    };
    info.buf[..bytes.len()].copy_from_slice(bytes);
    let random = fs::OpenOptions::new().write(true).open("/dev/urandom")?;
    // SAFETY: the structure lives across the call, and buf_size is not larger than its buffer.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sysctl_names_become_paths_below_proc_sys() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net.ipv4.conf.eth0/100.forwarding").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/conf/eth0.100/forwarding")
        );
        for name in ["", ".", "a..b", "/etc/passwd", "a./b", "//.x"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
