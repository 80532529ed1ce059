//! The asynchronous part: a message socket in tokio's event loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::message::{self, Limits, Prepared, Received};
use crate::sys::watch;

/// One end of a connection. Several tasks may send; one receives.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Takes a socket and makes it non-blocking. Called within a runtime.
    ///
    /// # Errors
    /// As [`watch`].
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(watch(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Sends one message. If the future is dropped, all or nothing was sent.
    ///
    /// # Errors
    /// As [`message::send`], except `WouldBlock`.
    pub async fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let prepared = Prepared::new(message)?;
        self.0
            .async_io(Interest::WRITABLE, |socket| prepared.send(socket, fds))
            .await
    }

    /// Receives one message; `None` if the peer has closed. If the future is dropped, nothing was
    /// received.
    ///
    /// # Errors
    /// As [`message::receive`], except `WouldBlock`.
    pub async fn receive<M: DeserializeOwned>(
        &self,
        limits: Limits,
    ) -> io::Result<Option<Received<M>>> {
        self.0
            .async_io(Interest::READABLE, |socket| {
                message::receive(socket, limits)
            })
            .await
    }

    /// Waits until the peer has closed, ignoring unread messages.
    ///
    /// # Errors
    /// `EMFILE` if there are too many open files, or an error of [`watch`].
    pub async fn closed(&self) -> io::Result<()> {
        // A separate registration does not consume the readiness that `receive` waits for.
        let copy = watch(self.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
        loop {
            let mut ready = copy.readable().await?;
            if ready.ready().is_read_closed() {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::pair;

    #[tokio::test]
    async fn the_end_of_the_peer_is_noticed_behind_unread_messages() {
        let (a, b) = pair().unwrap();
        let (a, b) = (Socket::new(a).unwrap(), Socket::new(b).unwrap());
        let wait = std::time::Duration::from_millis(20);
        a.send(&"unread", &[]).await.unwrap();
        assert!(tokio::time::timeout(wait, b.closed()).await.is_err());
        drop(a);
        b.closed().await.unwrap();
        let received = b.receive::<String>(Limits::default()).await.unwrap();
        assert_eq!(received.unwrap().message, "unread");
        assert!(
            b.receive::<String>(Limits::default())
                .await
                .unwrap()
                .is_none()
        );
    }

    #[tokio::test]
    async fn messages_wait_for_room_and_for_each_other() {
        let (a, b) = pair().unwrap();
        let (a, b) = (Socket::new(a).unwrap(), Socket::new(b).unwrap());
        const MESSAGES: usize = 1000;
        let text = "x".repeat(message::MAX_INLINE);
        let sender = async {
            for _ in 0..MESSAGES {
                a.send(&text, &[a.as_fd()]).await.unwrap();
            }
        };
        let receiver = async {
            for _ in 0..MESSAGES {
                let received = b
                    .receive::<String>(Limits::default())
                    .await
                    .unwrap()
                    .unwrap();
                assert_eq!(
                    (received.message.len(), received.fds.len()),
                    (text.len(), 1)
                );
            }
        };
        tokio::join!(sender, receiver);
        drop(a);
        assert!(
            b.receive::<String>(Limits::default())
                .await
                .unwrap()
                .is_none()
        );
    }
}
