//! System calls without a safe wrapper: cloning into new namespaces, executing a descriptor, and
//! those of the set-up between the two. Private to this crate.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::io::Errno;

/// Namespaces every jailed process gets of its own.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// Which side of [`clone_into_namespaces`] this is.
pub enum Clone {
    /// The caller, with the child's pid and pidfd.
    Parent(i32, OwnedFd),
    /// The new process.
    Child,
}

/// Forks into new mount, pid, network, ipc, uts and cgroup namespaces.
///
/// The child is a copy of the calling thread alone: until it executes something it must only make
/// system calls (no allocation, no locks), because another thread may have held a lock at the
/// moment of the copy.
pub fn clone_into_namespaces() -> Result<Clone, Errno> {
    let mut pidfd: RawFd = -1;
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (NAMESPACES | libc::CLONE_PIDFD) as u64;
    args.pidfd = ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: `args` is valid for the call and describes a plain fork (no shared memory, no new
    // stack), so both sides return here on their own copy of the stack.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, ptr::from_ref(&args), size_of_val(&args)) };
    match result {
        0 => Ok(Clone::Child),
        // SAFETY: the kernel stored a fresh descriptor there, which nothing else owns.
        pid if pid > 0 => Ok(Clone::Parent(pid as i32, unsafe {
            OwnedFd::from_raw_fd(pidfd)
        })),
        _ => Err(last_errno()),
    }
}

/// A list of C strings in the form that execve takes, built before the clone because the child must
/// not allocate.
pub struct Strings {
    pointers: Vec<*const libc::c_char>,
    _owned: Vec<CString>,
}

impl Strings {
    /// Takes the strings and adds the closing null pointer.
    pub fn new(owned: Vec<CString>) -> Self {
        let pointers = owned
            .iter()
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .collect();
        Self {
            pointers,
            _owned: owned,
        }
    }
}

/// Executes the file behind `program`. Returns only on failure.
pub fn execute(program: BorrowedFd<'_>, argv: &Strings, env: &Strings) -> Errno {
    // SAFETY: both arrays end with a null pointer and their strings live as long as they do.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            env.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    last_errno()
}

/// Marks every open descriptor close-on-exec.
pub fn close_all_on_exec() -> Result<(), Errno> {
    // SAFETY: changes descriptor flags only; no descriptor is closed here.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            0u32,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })
}

/// Makes `target` a copy of `fd` that stays open across exec.
pub fn place_descriptor(fd: RawFd, target: RawFd) -> Result<(), Errno> {
    // SAFETY: between clone and exec nothing in this process relies on the number `target`.
    check(unsafe { libc::dup2(fd, target) }.into())
}

/// Duplicates `fd` to a close-on-exec number of at least `lowest`, without taking ownership of the
/// copy.
pub fn duplicate_above(fd: RawFd, lowest: RawFd) -> Result<RawFd, Errno> {
    // SAFETY: creates a new descriptor; touches no existing one.
    let result = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, lowest) };
    check(result.into())?;
    Ok(result)
}

/// Sets and clears attributes (`MOUNT_ATTR_*`) of the mount, or of the whole tree of mounts, behind
/// `mount`.
pub fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> Result<(), Errno> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns_fd: u64,
    }
    let request = MountAttr {
        set: attributes,
        clear: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string, and the structure is the first version of the kernel's
    // `struct mount_attr`.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursion,
            ptr::from_ref(&request),
            size_of_val(&request),
        )
    })
}

/// Empties the bounding set of capabilities, except for the bits in `keep`.
pub fn limit_bounding_set(keep: u64) -> Result<(), Errno> {
    for capability in 0..64u64 {
        if keep & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: takes integers only.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }.into()) {
            // The kernel knows no capability with this number, so none with a higher one either.
            Err(Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// The version of Landlock's interface that the kernel has; `None` without Landlock.
pub fn landlock_version() -> Option<u32> {
    // LANDLOCK_CREATE_RULESET_VERSION (linux/landlock.h).
    const VERSION: libc::c_long = 1;
    let nothing = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the kernel reads no attributes.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) };
    u32::try_from(answer).ok()
}

/// Sets the host name of the caller's uts namespace.
pub fn set_host_name(name: &CStr) -> Result<(), Errno> {
    // SAFETY: the pointer is valid for the length given.
    check(unsafe { libc::sethostname(name.as_ptr(), name.count_bytes()) }.into())
}

/// Sets the execution domain flags (`ADDR_NO_RANDOMIZE`, …) of the calling process.
pub fn set_personality(persona: u64) -> Result<(), Errno> {
    // SAFETY: takes an integer only.
    check(unsafe { libc::personality(persona) }.into())
}

/// A kind of speculation of the processor (linux/prctl.h).
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Speculation {
    /// Loads that overtake stores to an address that is not known yet (PR_SPEC_STORE_BYPASS).
    StoreBypass = 0,
    /// Indirect branches to where other processes have been (PR_SPEC_INDIRECT_BRANCH): the kernel
    /// flushes their prediction when it switches to or from this one.
    IndirectBranches = 1,
}

/// Forbids a kind of speculation to the calling thread and all that it starts, for ever. Nothing is
/// to do where the processor does not have it, or the host's kernel decides for all processes.
pub fn forbid_speculation(kind: Speculation) -> Result<(), Errno> {
    const PR_SET_SPECULATION_CTRL: libc::c_int = 53;
    const PR_SPEC_FORCE_DISABLE: libc::c_ulong = 1 << 3;
    let kind = kind as libc::c_ulong;
    // All bits of the arguments count, those of unused ones, too.
    let none: libc::c_ulong = 0;
    // SAFETY: takes integers only.
    let result = unsafe {
        libc::prctl(
            PR_SET_SPECULATION_CTRL,
            kind,
            PR_SPEC_FORCE_DISABLE,
            none,
            none,
        )
    };
    match check(result.into()) {
        // Not of this processor; decided by the kernel's command line; a kernel without it.
        Err(Errno::NODEV | Errno::NXIO | Errno::PERM | Errno::INVAL) => Ok(()),
        other => other,
    }
}

/// Gives every signal its default action and unblocks all of them: both survive exec otherwise.
pub fn reset_signals() {
    // The kernel's own structure, all zero: default action, no flags, no mask. Not the C library's
    // function, which leaves out the signals that it keeps for itself.
    let default = [0u64; 4];
    let none = 0u64;
    // SAFETY: both pointers are valid for what the kernel reads from them. Failures are possible
    // only for signals that cannot be changed (SIGKILL, SIGSTOP), which need no reset.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                ptr::null::<u64>(),
                size_of_val(&none),
            );
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            ptr::from_ref(&none),
            ptr::null::<u64>(),
            size_of_val(&none),
        );
    }
}

/// Ends the calling process at once, running nothing.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
