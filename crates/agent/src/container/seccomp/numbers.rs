//! The numbers of system calls and architectures: libseccomp's, and those that Debian's libseccomp
//! does not know yet.

use libseccomp::{ScmpArch, ScmpSyscall};

use super::program::{Comparison, Test};

/// Newer than libseccomp 2.5, in the order of their numbers: the same on all architectures.
const NEWER: [&str; 22] = [
    "cachestat",
    "fchmodat2",
    "map_shadow_stack",
    "futex_wake",
    "futex_wait",
    "futex_requeue",
    "statmount",
    "listmount",
    "lsm_get_self_attr",
    "lsm_set_self_attr",
    "lsm_list_modules",
    "mseal",
    "setxattrat",
    "getxattrat",
    "listxattrat",
    "removexattrat",
    "open_tree_attr",
    "file_getattr",
    "file_setattr",
    "listns",
    "rseq_slice_yield",
    "fchroot",
];
const FIRST_NEWER: u32 = 451;

/// System calls that 32-bit x86 has in two forms: name, own number if there is one, number of the
/// multiplexing system call, and number within that.
const THROUGH_ANOTHER: [(&str, Option<u32>, u32, u32); 32] = [
    ("socket", Some(359), SOCKETCALL, 1),
    ("bind", Some(361), SOCKETCALL, 2),
    ("connect", Some(362), SOCKETCALL, 3),
    ("listen", Some(363), SOCKETCALL, 4),
    ("accept", None, SOCKETCALL, 5),
    ("getsockname", Some(367), SOCKETCALL, 6),
    ("getpeername", Some(368), SOCKETCALL, 7),
    ("socketpair", Some(360), SOCKETCALL, 8),
    ("send", None, SOCKETCALL, 9),
    ("recv", None, SOCKETCALL, 10),
    ("sendto", Some(369), SOCKETCALL, 11),
    ("recvfrom", Some(371), SOCKETCALL, 12),
    ("shutdown", Some(373), SOCKETCALL, 13),
    ("setsockopt", Some(366), SOCKETCALL, 14),
    ("getsockopt", Some(365), SOCKETCALL, 15),
    ("sendmsg", Some(370), SOCKETCALL, 16),
    ("recvmsg", Some(372), SOCKETCALL, 17),
    ("accept4", Some(364), SOCKETCALL, 18),
    ("recvmmsg", Some(337), SOCKETCALL, 19),
    ("sendmmsg", Some(345), SOCKETCALL, 20),
    ("semop", None, IPC, 1),
    ("semget", Some(393), IPC, 2),
    ("semctl", Some(394), IPC, 3),
    ("semtimedop", None, IPC, 4),
    ("msgsnd", Some(400), IPC, 11),
    ("msgrcv", Some(401), IPC, 12),
    ("msgget", Some(399), IPC, 13),
    ("msgctl", Some(402), IPC, 14),
    ("shmat", Some(397), IPC, 21),
    ("shmdt", Some(398), IPC, 22),
    ("shmget", Some(395), IPC, 23),
    ("shmctl", Some(396), IPC, 24),
];
const SOCKETCALL: u32 = 102;
const IPC: u32 = 117;

/// Calls `found` for each number of a system call, with the number within it if it multiplexes
/// several.
pub(super) fn each(architecture: ScmpArch, name: &str, mut found: impl FnMut(u32, Option<u32>)) {
    if architecture == ScmpArch::X86
        && let Some((_, own, through, which)) =
            THROUGH_ANOTHER.iter().find(|(other, ..)| *other == name)
    {
        if let Some(number) = own {
            found(*number, None);
        }
        found(*through, Some(*which));
    } else if let Some(position) = NEWER.iter().position(|other| *other == name) {
        found(FIRST_NEWER + position as u32, None);
    } else if let Ok(number) = ScmpSyscall::from_name_by_arch(name, architecture)
        // Negative: there is one of this name on other architectures.
        && let Ok(number) = u32::try_from(i32::from(number))
    {
        found(number, None);
    }
}

/// The condition that a multiplexing system call is this one of its calls.
pub(super) fn is(which: u32) -> Comparison {
    Comparison {
        argument: 0,
        // The upper half of ipc's is a version.
        test: Test::Masked(0xffff, which.into()),
    }
}

/// Whether programs of another architecture can be executed here.
pub(super) fn is_executed(architecture: ScmpArch) -> bool {
    match (architecture, std::env::consts::ARCH) {
        // Kernels that execute them have this sysctl. User-mode kernels do not.
        (ScmpArch::X86, "x86_64") => {
            cfg!(test) || std::path::Path::new("/proc/sys/abi/vsyscall32").exists()
        }
        (ScmpArch::Arm, "aarch64") => true,
        _ => false,
    }
}

/// `AUDIT_ARCH_*` of linux/audit.h.
pub(super) fn of_architecture(architecture: ScmpArch) -> u32 {
    match architecture {
        ScmpArch::X86 => 0x4000_0003,
        ScmpArch::Arm => 0x4000_0028,
        ScmpArch::Aarch64 => 0xc000_00b7,
        _ => 0xc000_003e,
    }
}
