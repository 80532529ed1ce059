//! The host's end of a connection: what the multiplexer needs of it, and its implementation for
//! sockets.
//!
//! [`Socket`] wraps one end of a `SOCK_STREAM` socketpair. It never blocks and never raises
//! `SIGPIPE`, whatever the descriptor's own flags are. Data goes straight between guest memory and
//! the socket.
#![allow(unsafe_code)]

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vm_memory::VolatileSlice;

/// One end of a byte stream with two independently closable directions. Nothing here blocks.
pub trait HostStream {
    /// Reads into `into`, as `readv(2)`. `Ok(0)` is the end of the stream when `into` has room.
    fn receive(&mut self, into: &[VolatileSlice<'_, ()>]) -> io::Result<usize>;

    /// Writes from `from`, as `writev(2)`; may write less than all.
    fn send(&mut self, from: &[VolatileSlice<'_, ()>]) -> io::Result<usize>;

    /// Closes one or both directions. Failure means the other side is gone, which reads and writes
    /// report as well.
    fn shutdown(&mut self, how: Shutdown);

    /// Last call before the stream is dropped: the other end must see end of file after what was
    /// written to it, even if it wrote bytes that were not read.
    fn finish(&mut self);

    /// Whether it leads to a server of the host, which takes what it likes, when it likes.
    fn is_foreign(&self) -> bool {
        false
    }
}

/// More reads than a socket's buffer can need; a bound only so that `finish` ends whatever the
/// kernel says.
const MAX_DISCARDS: usize = 256;

/// A connected stream socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// Whose it is that something is sent, for servers that ask (`SO_PASSCRED`).
    user: Option<(u32, u32)>,
}

/// A `SCM_CREDENTIALS` message, as the kernel lays it out (unix(7), cmsg(3)).
#[repr(C)]
struct Credentials {
    header: libc::cmsghdr,
    credentials: libc::ucred,
}

impl Credentials {
    fn new((uid, gid): (u32, u32)) -> Self {
        // SAFETY: all zeroes is a valid header.
        let mut header: libc::cmsghdr = unsafe { std::mem::zeroed() };
        // Without the padding at the end.
        header.cmsg_len = (size_of::<libc::cmsghdr>() + size_of::<libc::ucred>()) as _;
        header.cmsg_level = libc::SOL_SOCKET;
        header.cmsg_type = libc::SCM_CREDENTIALS;
        let credentials = libc::ucred {
            pid: std::process::id().cast_signed(),
            uid,
            gid,
        };
        Self {
            header,
            credentials,
        }
    }
}

impl Socket {
    /// Takes over `fd`.
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, user: None }
    }

    /// Takes over `fd`, which leads to a server of the host if `user` is given: the user and group
    /// that it is to see.
    pub fn of(fd: OwnedFd, user: Option<(u32, u32)>) -> Self {
        Self { fd, user }
    }

    /// A connected pair: ours, and the one to hand out.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self::new(ours), theirs))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The kernel's form of a scatter list. The pointers stay valid as long as the slices they come
/// from.
fn io_vectors(slices: &[VolatileSlice<'_, ()>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

/// Calls `sendmsg` or `recvmsg` with `slices`, again when a signal interrupted it.
fn transfer(
    fd: &OwnedFd,
    slices: &[VolatileSlice<'_, ()>],
    mut credentials: Option<Credentials>,
    call: unsafe fn(libc::c_int, *mut libc::msghdr) -> libc::ssize_t,
) -> io::Result<usize> {
    let mut vectors = io_vectors(slices);
    // SAFETY: all zeroes is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len() as _;
    if let Some(credentials) = &mut credentials {
        message.msg_control = (&raw mut *credentials).cast();
        message.msg_controllen = size_of::<Credentials>() as _;
    }
    loop {
        // SAFETY: `message` points to `vectors` and `credentials`, which outlive the call, and the
        // former point to memory that `slices` keeps mapped, of the lengths given. The guest may
        // change that memory at any time; only the kernel accesses it here, and no Rust reference
        // to it exists.
        let count = unsafe { call(fd.as_raw_fd(), &raw mut message) };
        match usize::try_from(count) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// # Safety
/// As `recvmsg(2)`.
unsafe fn receive_now(fd: libc::c_int, message: *mut libc::msghdr) -> libc::ssize_t {
    // SAFETY: the caller upholds the contract of the system call.
    unsafe { libc::recvmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) }
}

/// # Safety
/// As `sendmsg(2)`.
unsafe fn send_now(fd: libc::c_int, message: *mut libc::msghdr) -> libc::ssize_t {
    // SAFETY: the caller upholds the contract of the system call.
    unsafe { libc::sendmsg(fd, message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) }
}

impl HostStream for Socket {
    fn receive(&mut self, into: &[VolatileSlice<'_, ()>]) -> io::Result<usize> {
        transfer(&self.fd, into, None, receive_now)
    }

    fn send(&mut self, from: &[VolatileSlice<'_, ()>]) -> io::Result<usize> {
        transfer(&self.fd, from, self.user.map(Credentials::new), send_now)
    }

    fn shutdown(&mut self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        if let Err(error) = rustix::net::shutdown(&self.fd, how) {
            tracing::debug!(%error, "shutdown of a host stream");
        }
    }

    fn is_foreign(&self) -> bool {
        self.user.is_some()
    }

    fn finish(&mut self) {
        // A unix socket that is closed with unread bytes gives its peer ECONNRESET in place of end
        // of file. After the shutdown no more can arrive, so this ends when the socket's buffer is
        // empty.
        self.shutdown(Shutdown::Both);
        let mut scratch = vec![0; 16 << 10];
        for _ in 0..MAX_DISCARDS {
            match self.receive(&[VolatileSlice::from(scratch.as_mut_slice())]) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = Socket::pair().unwrap();
        (ours, UnixStream::from(theirs))
    }

    #[test]
    fn scatters_and_gathers() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(b"hello world").unwrap();
        let (mut a, mut b) = ([0; 4], [0; 16]);
        let into = [
            VolatileSlice::from(&mut a[..]),
            VolatileSlice::from(&mut b[..]),
        ];
        assert_eq!(ours.receive(&into).unwrap(), 11);
        assert_eq!(
            ours.receive(&into).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        assert_eq!(ours.send(&[into[1], into[0]]).unwrap(), 20);
        let mut back = [0; 20];
        theirs.read_exact(&mut back).unwrap();
        assert_eq!(&back[..7], b"o world");
        assert_eq!(&back[16..], b"hell");
    }

    #[test]
    fn writing_to_a_closed_end_is_an_error_not_a_signal() {
        let (mut ours, theirs) = pair();
        drop(theirs);
        let mut byte = [0; 1];
        let error = ours
            .send(&[VolatileSlice::from(&mut byte[..])])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_server_that_asks_is_told_whose_bytes_they_are() {
        if !rustix::process::geteuid().is_root() {
            return println!("left out: a_server_that_asks…: not root");
        }
        let (ours, theirs) = Socket::pair().unwrap();
        rustix::net::sockopt::set_socket_passcred(&theirs, true).unwrap();
        let mut ours = Socket::of(ours.fd, Some((1234, 77)));
        let mut bytes = *b"hello";
        ours.send(&[VolatileSlice::from(&mut bytes[..])]).unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut text = [0; 5];
        let mut into = [io::IoSliceMut::new(&mut text)];
        let flags = rustix::net::RecvFlags::empty();
        rustix::net::recvmsg(&theirs, &mut into, &mut ancillary, flags).unwrap();
        let credentials = ancillary.drain().find_map(|message| match message {
            rustix::net::RecvAncillaryMessage::ScmCredentials(credentials) => Some(credentials),
            _ => None,
        });
        let credentials = credentials.unwrap();
        let seen = (credentials.uid.as_raw(), credentials.gid.as_raw());
        assert_eq!((seen, &text), ((1234, 77), b"hello"));
    }

    #[test]
    fn finish_hides_unread_bytes_from_the_other_end() {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&[1; 100_000]).unwrap();
        let mut byte = [42; 1];
        ours.send(&[VolatileSlice::from(&mut byte[..])]).unwrap();
        ours.finish();
        drop(ours);
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        assert_eq!(all, [42]);
    }
}
