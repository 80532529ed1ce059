//! The tap: a descriptor that frames are read from and written to, each after its header.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
};

/// `_IOW('T', 208, unsigned int)` of linux/if_tun.h.
pub const TUNSETOFFLOAD: u64 = 0x4004_54d0;

// linux/if_tun.h: what the reader of the tap supports.
const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;

/// An attached tap, or a socket that preserves message boundaries, as one end of a cable.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Takes the descriptor over and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Sets, from the features that the guest's driver accepted, which offloads it supports.
    pub fn set_offload(&self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & 1 << bit != 0;
        let mut offload = 0;
        // The kernel requires checksum offload for segmentation offload.
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= TUN_F_CSUM;
            for (feature, flag) in [
                (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
            ] {
                if has(feature) {
                    offload |= flag;
                }
            }
            if has(VIRTIO_NET_F_GUEST_ECN) && offload & (TUN_F_TSO4 | TUN_F_TSO6) != 0 {
                offload |= TUN_F_TSO_ECN;
            }
        }
        // SAFETY: the argument is a number, not a pointer.
        let done = unsafe {
            libc::ioctl(
                self.fd.as_raw_fd(),
                TUNSETOFFLOAD as _,
                libc::c_ulong::from(offload),
            )
        };
        if done < 0 {
            let error = io::Error::last_os_error();
            // A socket has no such setting.
            if error.raw_os_error() != Some(libc::ENOTTY) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reads one frame with its header.
    pub fn read(&self, frame: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.fd, frame)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
