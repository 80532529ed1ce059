//! Bytes with descriptors beside them, on unix sockets of any type.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors beside one packet: the kernel's limit (`SCM_MAX_FD`, net/scm.h).
pub const MAX_FDS: usize = 253;

/// Sends `bytes` with `fds`; returns how many bytes were sent.
///
/// On a stream socket that may be fewer than all of them; the descriptors are sent with the first
/// byte.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`] descriptors. `WouldBlock` on a non-blocking socket if
/// nothing was sent. `BrokenPipe` if the peer has closed; no signal is raised.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} descriptors are too many for one message", fds.len()),
        ));
    }
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        // The buffer has room for exactly this entry.
        ancillary.push(SendAncillaryMessage::ScmRights(fds));
    }
    Ok(rustix::io::retry_on_intr(|| {
        sendmsg(
            socket.as_fd(),
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?)
}

/// A received packet.
#[derive(Debug)]
pub struct Packet {
    /// Number of bytes written to the buffer. 0 if the peer has closed.
    pub length: usize,
    /// The descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The packet was longer than the buffer, or had more descriptors than accepted. The kernel
    /// drops the excess bytes and closes the excess descriptors.
    pub truncated: bool,
}

/// Receives into `buffer`, with at most `max_fds` descriptors.
///
/// # Errors
/// `WouldBlock` on a non-blocking socket without anything to receive. `ConnectionReset` if the peer
/// has closed with unread bytes on its side.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], max_fds: usize) -> io::Result<Packet> {
    let max_fds = max_fds.min(MAX_FDS);
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(max_fds))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(buffer)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let mut truncated = received
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    // The kernel may use the buffer's padding for one more descriptor.
    if fds.len() > max_fds {
        fds.truncate(max_fds);
        truncated = true;
    }
    Ok(Packet {
        length: received.bytes,
        fds,
        truncated,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::pair;

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn surplus_descriptors_are_closed() {
        let (a, b) = pair().unwrap();
        for (sent, accepted) in [(1, 0), (2, 1), (3, 2), (MAX_FDS, 1)] {
            send(&a, b"x", &vec![a.as_fd(); sent]).unwrap();
            let packet = receive(&b, &mut [0; 8], accepted).unwrap();
            assert!(packet.truncated, "{sent} sent, {accepted} accepted");
            assert_eq!(packet.fds.len(), accepted);
        }
        // Only the accepted descriptors count: a hundred rounds leave none open.
        let before = open_descriptors();
        for _ in 0..100 {
            send(&a, b"x", &[a.as_fd(); 20]).unwrap();
            drop(receive(&b, &mut [0; 8], 3).unwrap());
        }
        // Other tests of this process open some meanwhile.
        assert!(open_descriptors() < before + 50);
    }

    #[test]
    fn too_many_descriptors_are_not_sent() {
        let (a, _b) = pair().unwrap();
        let error = send(&a, b"x", &vec![a.as_fd(); MAX_FDS + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_closed_peer_is_an_error_for_the_sender_and_an_end_for_the_receiver() {
        let (a, b) = pair().unwrap();
        drop(b);
        let error = send(&a, b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(receive(&a, &mut [0; 8], 0).unwrap().length, 0);
    }
}
