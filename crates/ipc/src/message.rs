//! JSON messages with descriptors beside them, one per packet.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::invalid;
use crate::packet::{self, MAX_FDS};

/// Longest message that is sent inline.
pub const MAX_INLINE: usize = 16 << 10;

/// Longest message: an OCI spec of 10 MB must fit.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Content of a packet whose message is in the attached memory file. It is not JSON.
pub const LONG_MESSAGE: &[u8] = b"@";

/// Required seals of a memory file.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::WRITE);

/// Limits of a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Length of a message in bytes of JSON.
    pub bytes: usize,
    /// Number of descriptors of a message.
    pub fds: usize,
}

impl Default for Limits {
    /// The maximum that can be sent: for peers with the same privileges.
    fn default() -> Self {
        Self {
            bytes: MAX_MESSAGE,
            fds: MAX_FDS - 1,
        }
    }
}

/// A message with its descriptors.
#[derive(Debug)]
pub struct Received<M> {
    /// The message.
    pub message: M,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

/// A message ready to be sent, with retries on a non-blocking socket.
#[derive(Debug)]
pub struct Prepared {
    text: Vec<u8>,
    file: Option<File>,
}

impl Prepared {
    /// Encodes a message.
    ///
    /// # Errors
    /// `InvalidInput` if the message is longer than [`MAX_MESSAGE`]; `OutOfMemory` or `StorageFull`
    /// if there is no memory for the file of a long one.
    pub fn new<M: Serialize>(message: &M) -> io::Result<Self> {
        let text = serde_json::to_vec(message)?;
        if text.len() <= MAX_INLINE {
            return Ok(Self { text, file: None });
        }
        if text.len() > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "a message of {} bytes is longer than {MAX_MESSAGE}",
                    text.len()
                ),
            ));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(memfd_create("hull-message", flags)?);
        file.write_all(&text)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        Ok(Self {
            text: LONG_MESSAGE.to_vec(),
            file: Some(file),
        })
    }

    /// Sends it with `fds`.
    ///
    /// # Errors
    /// As [`packet::send`].
    pub fn send(&self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let sent = match &self.file {
            None => packet::send(socket, &self.text, fds)?,
            Some(file) => {
                let mut all = Vec::with_capacity(fds.len() + 1);
                all.push(file.as_fd());
                all.extend_from_slice(fds);
                packet::send(socket, &self.text, &all)?
            }
        };
        // A packet is sent as a whole or not at all.
        debug_assert_eq!(sent, self.text.len());
        Ok(())
    }
}

/// Sends one message. `WouldBlock` on a non-blocking socket means that nothing was sent.
///
/// # Errors
/// As [`Prepared::new`] and [`packet::send`].
pub fn send<M: Serialize>(
    socket: impl AsFd,
    message: &M,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    Prepared::new(message)?.send(socket, fds)
}

/// Receives one message; `None` if the peer has closed and all its messages were received.
///
/// # Errors
/// `WouldBlock` on a non-blocking socket without a message. `InvalidData` if the message is not an
/// `M`, exceeds `limits` or has an invalid memory file; it is consumed, its descriptors are closed,
/// and the next one can be received.
pub fn receive<M: DeserializeOwned>(
    socket: impl AsFd,
    limits: Limits,
) -> io::Result<Option<Received<M>>> {
    let mut text = vec![0; limits.bytes.clamp(LONG_MESSAGE.len(), MAX_INLINE)];
    let with_file = usize::from(limits.bytes > MAX_INLINE);
    let mut receive = || packet::receive(&socket, &mut text, limits.fds.saturating_add(with_file));
    let received = match receive() {
        // The peer closed with messages of ours unread: the kernel reports that once, before the
        // peer's remaining messages.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => receive(),
        received => received,
    };
    let packet = match received {
        Ok(packet) => packet,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(error),
    };
    if packet.length == 0 {
        return Ok(None);
    }
    if packet.truncated {
        return Err(invalid(format!(
            "a message is longer than {} bytes or carries more than {} descriptors",
            limits.bytes, limits.fds
        )));
    }
    text.truncate(packet.length);
    let mut fds = packet.fds;
    if text == LONG_MESSAGE {
        if fds.is_empty() {
            return Err(invalid("a long message came without its file"));
        }
        text = read_memory_file(fds.remove(0), limits.bytes)?;
    }
    if fds.len() > limits.fds {
        return Err(invalid(format!(
            "a message carries more than {} descriptors",
            limits.fds
        )));
    }
    let message = serde_json::from_slice(&text)
        .map_err(|error| invalid(format!("a message cannot be parsed: {error}")))?;
    Ok(Some(Received { message, fds }))
}

/// The content of a sealed memory file.
fn read_memory_file(file: OwnedFd, max_bytes: usize) -> io::Result<Vec<u8>> {
    // Other files have no seals: a pipe would block, a FUSE file could be slow.
    let seals = fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
    if !seals.contains(SEALS) {
        return Err(invalid(
            "the file of a long message is not a sealed memory file",
        ));
    }
    let mut file = File::from(file);
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
    if length > max_bytes {
        return Err(invalid(format!(
            "a message of {length} bytes is longer than {max_bytes}"
        )));
    }
    file.rewind()?;
    let mut text = vec![0; length];
    file.read_exact(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::pair;

    fn of_length(length: usize) -> String {
        "x".repeat(length)
    }

    fn kind_of<M: std::fmt::Debug + DeserializeOwned>(
        socket: &OwnedFd,
        limits: Limits,
    ) -> io::ErrorKind {
        receive::<M>(socket, limits).unwrap_err().kind()
    }

    #[test]
    fn short_and_long_messages_arrive_with_their_descriptors() {
        let (a, b) = pair().unwrap();
        let (near, far) = pair().unwrap();
        for length in [0, MAX_INLINE, 10 << 20] {
            send(&a, &of_length(length), &[near.as_fd(), far.as_fd()]).unwrap();
            let received = receive::<String>(&b, Limits::default()).unwrap().unwrap();
            assert_eq!(received.fds.len(), 2);
            assert_eq!(received.message.len(), length);
        }
    }

    #[test]
    fn the_end_is_no_message_and_nonsense_is_an_error() {
        let (a, b) = pair().unwrap();
        for text in [&b"{"[..], LONG_MESSAGE, &[b' '; MAX_INLINE + 1]] {
            packet::send(&a, text, &[]).unwrap();
        }
        for _ in 0..3 {
            assert_eq!(
                kind_of::<String>(&b, Limits::default()),
                io::ErrorKind::InvalidData
            );
        }
        send(&a, &"fine", &[]).unwrap();
        drop(a);
        let received = receive::<String>(&b, Limits::default()).unwrap().unwrap();
        assert_eq!(received.message, "fine");
        assert!(receive::<String>(&b, Limits::default()).unwrap().is_none());
    }

    #[test]
    fn limits_of_the_receiver_hold() {
        let (a, b) = pair().unwrap();
        let limits = Limits { bytes: 100, fds: 1 };
        send(&a, &of_length(98), &[a.as_fd()]).unwrap();
        assert!(receive::<String>(&b, limits).unwrap().is_some());
        send(&a, &of_length(99), &[]).unwrap();
        send(&a, &of_length(MAX_INLINE), &[]).unwrap();
        send(&a, &"x", &[a.as_fd(), a.as_fd()]).unwrap();
        for _ in 0..3 {
            assert_eq!(kind_of::<String>(&b, limits), io::ErrorKind::InvalidData);
        }
        let limits = Limits {
            bytes: MAX_INLINE + 100,
            fds: 1,
        };
        send(&a, &of_length(MAX_INLINE), &[a.as_fd()]).unwrap();
        assert_eq!(receive::<String>(&b, limits).unwrap().unwrap().fds.len(), 1);
        send(&a, &of_length(MAX_INLINE + 99), &[]).unwrap();
        send(&a, &of_length(MAX_INLINE), &[a.as_fd(), a.as_fd()]).unwrap();
        send(&a, &"x", &[a.as_fd(), a.as_fd()]).unwrap();
        for _ in 0..3 {
            assert_eq!(kind_of::<String>(&b, limits), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn only_sealed_memory_is_read() {
        let (a, b) = pair().unwrap();
        // A pipe without a writer, a file on disk, and memory that can still change.
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        let disk = OwnedFd::from(File::open("/proc/self/exe").unwrap());
        let memory = memfd_create("unsealed", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::io::write(&memory, b"\"text\"").unwrap();
        for fd in [&pipe, &disk, &memory] {
            packet::send(&a, LONG_MESSAGE, &[fd.as_fd()]).unwrap();
            assert_eq!(
                kind_of::<String>(&b, Limits::default()),
                io::ErrorKind::InvalidData
            );
        }
        fcntl_add_seals(&memory, SEALS).unwrap();
        packet::send(&a, LONG_MESSAGE, &[memory.as_fd()]).unwrap();
        let received = receive::<String>(&b, Limits::default()).unwrap().unwrap();
        assert_eq!(received.message, "text");
    }

    #[test]
    fn a_non_blocking_socket_would_block() {
        let (_a, b) = pair().unwrap();
        rustix::io::ioctl_fionbio(&b, true).unwrap();
        assert_eq!(
            kind_of::<String>(&b, Limits::default()),
            io::ErrorKind::WouldBlock
        );
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let (a, _b) = pair().unwrap();
        let error = send(&a, &of_length(MAX_MESSAGE), &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
