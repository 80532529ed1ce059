//! vsock sockets: dialling the host, listening for its streams. All of them are non-blocking and
//! close-on-exec. Called by `main` and `streams`. Knows nothing of what is sent.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::Notify;

use crate::io::reactor;

const ADDRESS_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: sockaddr_vm is plain integers, for which zero is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Starts to connect and returns at once. The connection is established when the socket is
/// writable, see [`Connection::established`].
pub fn dial(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: the address lives across the call and the length is its size.
    match check(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_LENGTH,
        )
    }) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Listens on a port of the guest.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives across the call and the length is its size.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_LENGTH,
        )
    })?;
    rustix::net::listen(&socket, 1024)?;
    Ok(socket)
}

/// Accepts one pending connection and returns the host's port that it comes from. `WouldBlock` if
/// there is none.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, u32)> {
    let mut peer = address(0, 0);
    let mut length = ADDRESS_LENGTH;
    // SAFETY: both pointers live across the call and the length says how much may be written.
    let fd = check(unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            (&raw mut peer).cast(),
            &raw mut length,
            libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
        )
    })?;
    // SAFETY: accept4 returned a new descriptor without another owner.
    Ok((unsafe { OwnedFd::from_raw_fd(fd) }, peer.svm_port))
}

/// Whether the other side of a connection has closed both directions.
pub fn hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut poll = [PollFd::new(&socket, PollFlags::empty())];
    let polled = rustix::event::poll(&mut poll, Some(&Timespec::default()));
    let gone = PollFlags::HUP | PollFlags::ERR;
    polled.is_ok() && poll[0].revents().intersects(gone)
}

/// State of a connection, as seen from outside of it.
#[derive(Default)]
pub struct Link {
    ended: Notify,
    received: AtomicBool,
}

impl Link {
    /// Waits until the connection has ended or broken.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Whether anything has come from the other side.
    pub fn has_received(&self) -> bool {
        self.received.load(Ordering::Relaxed)
    }
}

/// A connected socket, for ttrpc and others that read and write. Its link reports when it has
/// ended, which ttrpc does not.
pub struct Connection {
    socket: AsyncFd<OwnedFd>,
    link: Arc<Link>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.link.ended.notify_one();
    }
}

impl Connection {
    /// Takes over a socket that was dialled or accepted.
    pub fn new(socket: OwnedFd, link: Arc<Link>) -> io::Result<Self> {
        Ok(Self {
            socket: reactor::watch(socket, Interest::READABLE | Interest::WRITABLE)?,
            link,
        })
    }

    /// Waits until the connection is established.
    pub async fn established(&self) -> io::Result<()> {
        let _ = self.socket.writable().await?;
        rustix::net::sockopt::socket_error(&self.socket)??;
        Ok(())
    }

    /// Whether nobody takes what is sent any more. Of a vsock connection only before this side has
    /// ended its own direction.
    pub fn is_deaf(&self) -> bool {
        // The first is for unix sockets, the second for vsock: it fails before there is anything to
        // send.
        hung_up(self.socket.get_ref().as_fd())
            || rustix::net::send(&self.socket, &[], SendFlags::NOSIGNAL) == Err(Errno::PIPE)
    }

    /// Does not take anything any more.
    pub fn stop_receiving(&self) {
        // It fails when the other side is gone already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        pin!(&*self).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        pin!(&*self).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(&*self).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(&*self).poll_shutdown(cx)
    }
}

/// Reading and writing at the same time, by one task each or one for both.
impl AsyncRead for &Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            let received = guard.try_io(|socket| {
                Ok(rustix::net::recv(socket, buf.initialize_unfilled(), RecvFlags::empty())?.0)
            });
            match received {
                Ok(Ok(n)) => {
                    if n > 0 {
                        self.link.received.store(true, Ordering::Relaxed);
                    } else if buf.remaining() > 0 {
                        self.link.ended.notify_one();
                    }
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.link.ended.notify_one();
                    return Poll::Ready(Err(error));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for &Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.socket.poll_write_ready(cx))?;
            match guard.try_io(|socket| Ok(rustix::net::send(socket, buf, SendFlags::NOSIGNAL)?)) {
                Ok(Ok(n)) => return Poll::Ready(Ok(n)),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.link.ended.notify_one();
                    return Poll::Ready(Err(error));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(&self.socket, Shutdown::Write)?))
    }
}
