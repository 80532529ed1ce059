//! System calls that rustix does not wrap, as thin functions: same names, same order, errors as
//! `io::Result`.
//!
//! Called by the files of this module only. No policy here.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

pub(super) const CLONE_NEWTIME: u64 = 0x80;
pub(super) const CLONE_NEWNS: u64 = 0x2_0000;
pub(super) const CLONE_PARENT: u64 = 0x8000;
pub(super) const CLONE_NEWCGROUP: u64 = 0x200_0000;
pub(super) const CLONE_NEWUTS: u64 = 0x400_0000;
pub(super) const CLONE_NEWIPC: u64 = 0x800_0000;
pub(super) const CLONE_NEWUSER: u64 = 0x1000_0000;
pub(super) const CLONE_NEWPID: u64 = 0x2000_0000;
pub(super) const CLONE_NEWNET: u64 = 0x4000_0000;
const CLONE_PIDFD: u64 = 0x1000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

pub(super) const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub(super) const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub(super) const MOUNT_ATTR_NODEV: u64 = 0x4;
pub(super) const MOUNT_ATTR_NOEXEC: u64 = 0x8;
/// The three modes of access times are one field: 0 is relatime.
pub(super) const MOUNT_ATTR_ATIME: u64 = 0x70;
pub(super) const MOUNT_ATTR_RELATIME: u64 = 0x00;
pub(super) const MOUNT_ATTR_NOATIME: u64 = 0x10;
pub(super) const MOUNT_ATTR_STRICTATIME: u64 = 0x20;
pub(super) const MOUNT_ATTR_NODIRATIME: u64 = 0x80;
pub(super) const MOUNT_ATTR_NOSYMFOLLOW: u64 = 0x20_0000;
pub(super) const MOUNT_ATTR_IDMAP: u64 = 0x10_0000;

/// Argument of `mount_setattr`, as the kernel lays it out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MountAttributes {
    pub(super) set: u64,
    pub(super) clear: u64,
    pub(super) propagation: u64,
    pub(super) user_namespace: u64,
}

/// Argument of `clone3`, as the kernel lays it out.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Where `clone3` returned.
pub(super) enum Cloned {
    /// In the caller.
    Parent { pid: u32, pidfd: OwnedFd },
    /// In the new process.
    Child,
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Clones this process, with `flags` for namespaces (and CLONE_PARENT), into `cgroup`. Signal
/// handlers are reset in the child.
///
/// # Safety
/// The process must have one thread. The child must end by `execve` or `_exit`, never by returning
/// to code that belongs to the parent.
pub(super) unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: RawFd = -1;
    let mut arguments = CloneArguments {
        flags: flags | CLONE_PIDFD | CLONE_CLEAR_SIGHAND,
        pidfd: (&raw mut pidfd) as u64,
        // With CLONE_PARENT the new process gets its sibling's exit signal and must not name one.
        exit_signal: if flags & CLONE_PARENT == 0 {
            libc::SIGCHLD as u64
        } else {
            0
        },
        ..Default::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the arguments outlive the call; without CLONE_VM the child has its own copy of all
    // memory. The caller upholds the rest.
    let pid = unsafe {
        check(libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<CloneArguments>(),
        ))?
    };
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel stored a new descriptor there, which has no other owner.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent {
        pid: pid as u32,
        pidfd,
    })
}

/// Moves the caller (for PID namespaces: its future children) into the namespace `of`, or, if `of`
/// is a pidfd, into those in `flags` of its process.
pub(super) fn setns(of: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_setns, of.as_raw_fd(), flags as libc::c_int) }).map(drop)
}

/// Waits for a signal.
pub(super) fn pause() {
    // SAFETY: takes nothing.
    unsafe { libc::pause() };
}

/// Moves the caller into new namespaces.
pub(super) fn unshare(flags: u64) -> io::Result<()> {
    // SAFETY: only namespace flags are passed by this module; none of them shares or unshares
    // memory or descriptors.
    check(unsafe { libc::syscall(libc::SYS_unshare, flags as libc::c_int) }).map(drop)
}

/// Changes attributes of the mount at `path` (or of the mount `at`, when `path` is empty), with
/// `recursive` also of all mounts below it.
pub(super) fn mount_setattr(
    at: BorrowedFd<'_>,
    path: &CStr,
    recursive: bool,
    attributes: &MountAttributes,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: path and attributes are valid for the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    })
    .map(drop)
}

/// `mount(2)` on the current directory.
pub(super) fn mount_here(
    source: &CStr,
    filesystem: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> io::Result<()> {
    let data = if data.is_empty() {
        std::ptr::null()
    } else {
        data.as_ptr()
    };
    // SAFETY: all strings are valid for the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            c".".as_ptr(),
            filesystem.as_ptr(),
            flags,
            data.cast(),
        )
    };
    check(result.into()).map(drop)
}

/// Changes the propagation of the mount at `path`.
pub(super) fn mount_propagation(path: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the path is valid for the call, the other strings are unused by the kernel for this
    // operation.
    let result = unsafe {
        libc::mount(
            std::ptr::null(),
            path.as_ptr(),
            std::ptr::null(),
            flags,
            std::ptr::null(),
        )
    };
    check(result.into()).map(drop)
}

/// Duplicates `from` as `to`. They must differ.
pub(super) fn duplicate(from: BorrowedFd<'_>, to: RawFd, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the former `to` is not used again: this module calls it in the child only.
    let result = unsafe { libc::dup3(from.as_raw_fd(), to, flags) };
    check(result.into()).map(drop)
}

/// Closes every descriptor from `first` on.
pub(super) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: only the child calls this, and it drops no descriptor afterwards.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) }).map(drop)
}

/// `prctl(2)` with two numbers.
pub(super) fn prctl(operation: libc::c_int, a: libc::c_ulong, b: libc::c_ulong) -> io::Result<()> {
    // SAFETY: used with operations that take numbers.
    check(unsafe { libc::syscall(libc::SYS_prctl, operation, a, b, 0, 0) }).map(drop)
}

/// `ioctl(2)` with a number.
pub(super) fn ioctl_number(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    argument: libc::c_ulong,
) -> io::Result<()> {
    // SAFETY: used with requests that take a number.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd.as_raw_fd(), request, argument) }).map(drop)
}

/// Leaves a fresh descriptor of the child to its `close_from` (or `execve`): closing each would
/// cost a system call.
pub(super) fn leak(fd: OwnedFd) -> BorrowedFd<'static> {
    let raw = fd.as_raw_fd();
    std::mem::forget(fd);
    // SAFETY: open until close_from, after which the child uses none of its earlier descriptors.
    unsafe { BorrowedFd::borrow_raw(raw) }
}

/// Replaces the process image. Returns only on failure.
pub(super) fn execve(
    path: &CStr,
    arguments: &[*const c_char],
    environment: &[*const c_char],
) -> io::Error {
    debug_assert!(arguments.last().is_some_and(|last| last.is_null()));
    debug_assert!(environment.last().is_some_and(|last| last.is_null()));
    // SAFETY: both arrays end with a null pointer and hold pointers to strings that are alive.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process without running anything more of this program.
pub(super) fn exit(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

/// A null-terminated array of pointers to strings, for [`execve`]. Valid as long as `strings`.
pub(super) fn pointers<'a>(strings: impl Iterator<Item = &'a CString>) -> Vec<*const c_char> {
    strings
        .map(|string| string.as_ptr())
        .chain(std::iter::once(std::ptr::null()))
        .collect()
}

/// Writes `value` to an existing file in one call.
pub(super) fn write_file<P: rustix::path::Arg>(
    directory: impl AsFd,
    path: P,
    value: &[u8],
) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    let file = rustix::fs::openat(
        directory,
        path,
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let written = rustix::io::write(&file, value)?;
    if written == value.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

/// Converts a path or word of the spec to a C string.
pub(super) fn c_string(field: &str, value: impl AsRef<[u8]>) -> super::Result<CString> {
    CString::new(value.as_ref())
        .map_err(|_| super::CreateError::invalid(field, "contains a NUL byte"))
}

/// As [`c_string`], for a path.
pub(super) fn c_path(field: &str, path: &Path) -> super::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    c_string(field, path.as_os_str().as_bytes())
}
