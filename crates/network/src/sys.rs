//! The calls that have no safe wrapper: ioctls of namespaces, interfaces and the tun driver,
//! leaving a namespace, waiting for a descriptor, and a child that ends with its parent
//! or inherits a descriptor. Called by `namespace`, `tap`, `monitor`, `pasta` and `cni` only.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::Signal;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `NS_GET_NSTYPE` of linux/nsfs.h: the CLONE_* flag of a namespace.
const NS_GET_NSTYPE: u32 = 0xb703;

/// Kind of the namespace that a descriptor of nsfs refers to: a CLONE_* flag.
pub fn namespace_kind(namespace: impl AsFd) -> io::Result<i32> {
    // SAFETY: this request takes no argument and writes no memory.
    check(unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_NSTYPE as _) })
}

/// Moves the calling thread, which the caller must own, into a new network namespace.
pub fn leave_network_namespace() -> io::Result<()> {
    // SAFETY: only UnshareFlags::FILES would be unsound.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// Makes the kernel kill the process that `command` starts when the calling thread ends.
pub fn die_with_thread(command: &mut Command) {
    let parent = std::process::id();
    let tie = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        let has_parent = rustix::process::getppid()
            .is_some_and(|id| u32::try_from(id.as_raw_nonzero().get()) == Ok(parent));
        match has_parent {
            true => Ok(()),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    };
    // SAFETY: it makes system calls only: no allocation, no lock.
    unsafe { command.pre_exec(tie) };
}

/// Leaves a descriptor open in the process that `command` starts, and in those that it starts.
pub fn inherit(command: &mut Command, descriptor: &OwnedFd) {
    let number = descriptor.as_raw_fd();
    let keep = move || {
        // SAFETY: changes a flag of a descriptor of the new process, which has the parent's.
        check(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }).map(drop)
    };
    // SAFETY: it makes one system call only: no allocation, no lock.
    unsafe { command.pre_exec(keep) };
}

/// Sets the interface up, in the calling thread's namespace.
pub fn set_up(interface: &str) -> io::Result<()> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut request = request(interface)?;
    // SAFETY: `request` is a whole ifreq, which the kernel fills with the flags.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request) })?;
    // SAFETY: the call before made the flags the valid member.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: `request` is a whole ifreq, which the kernel reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) })?;
    Ok(())
}

/// Turns the open tun device into a tap in the namespace where it was opened, and returns the tap's
/// name. A `%d` in `name` becomes the first free number. Packets are preceded by a `struct
/// virtio_net_hdr`.
pub fn become_tap(tun: impl AsFd, name: &str) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as _;
    let fd = tun.as_fd().as_raw_fd();
    // SAFETY: `request` is a whole ifreq, in which the kernel writes the name.
    check(unsafe { libc::ioctl(fd, libc::TUNSETIFF as _, &mut request) })?;
    let name: Vec<u8> = request
        .ifr_name
        .iter()
        .map(|byte| *byte as u8)
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8(name).map_err(io::Error::other)
}

/// Sets the length of the header before each packet, and that its fields are little endian, as in
/// virtio 1.
pub fn set_header(tap: impl AsFd, length: i32) -> io::Result<()> {
    let fd = tap.as_fd().as_raw_fd();
    let yes: libc::c_int = 1;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ as _, &length) })?;
    // SAFETY: the kernel reads one int.
    check(unsafe { libc::ioctl(fd, libc::TUNSETVNETLE as _, &yes) })?;
    Ok(())
}

/// Sets the user of a tap.
pub fn set_owner(tap: impl AsFd, user: u32) -> io::Result<()> {
    // SAFETY: the argument is the number itself.
    let result = unsafe {
        libc::ioctl(
            tap.as_fd().as_raw_fd(),
            libc::TUNSETOWNER as _,
            libc::c_ulong::from(user),
        )
    };
    check(result).map(drop)
}

/// Sets the group of a tap.
pub fn set_group(tap: impl AsFd, group: u32) -> io::Result<()> {
    // SAFETY: the argument is the number itself.
    let result = unsafe {
        libc::ioctl(
            tap.as_fd().as_raw_fd(),
            libc::TUNSETGROUP as _,
            libc::c_ulong::from(group),
        )
    };
    check(result).map(drop)
}

/// Registers the descriptor with the runtime for reading.
pub fn when_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, and the same, for as long as the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// An ifreq with this name; its other fields are zero.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
