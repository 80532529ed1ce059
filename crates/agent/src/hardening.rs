//! Kernel parameters that keep programs of the guest from its kernel, set at boot: those for which
//! the kernel's configuration has no option. Containers see them read-only. io_uring is refused by
//! the usual system call filter, and left to those who ask for another one.

use std::fs;
use std::io;

/// Path below /proc/sys, and value. A few only: each costs a start 30 µs on user-mode Linux.
const PARAMETERS: &[(&str, &str)] = &[
    // A process traces its descendants only.
    ("kernel/yama/ptrace_scope", "1"),
    // No addresses of the kernel in /proc, for anybody.
    ("kernel/kptr_restrict", "2"),
    // Constants in compiled filters are blinded.
    ("net/core/bpf_jit_harden", "2"),
    // Links, FIFOs and files of others in sticky directories: as on hosts with systemd, which
    // programs are used to.
    ("fs/protected_symlinks", "1"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_fifos", "1"),
    ("fs/protected_regular", "2"),
];

/// Sets them. Not all kernels have all of them; any other failure is logged.
pub fn apply() {
    for (name, value) in PARAMETERS {
        match fs::write(format!("/proc/sys/{name}"), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                crate::log::error!("cannot set {name} to {value}: {error}");
            }
            _ => {}
        }
    }
}
