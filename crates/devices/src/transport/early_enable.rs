//! A relay that puts the messages of QEMU's net device in order.
//!
//! QEMU (7.2 to 10 at least) enables the rings of a vhost-user net device
//! (VHOST_USER_SET_VRING_ENABLE) before it sets features (VHOST_USER_SET_FEATURES). The protocol
//! forbids that and the vhost-user library refuses it. [`defer_early_enable`] relays between the
//! two and holds early enable messages back until the features have passed. Everything else is
//! forwarded unchanged, with its descriptors; kicks and memory do not pass through the relay.
//!
//! The front end may be hostile: messages are bounded, and a malformed one ends the connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    getsockname, listen, shutdown, socket_with,
};

// docs/interop/vhost-user.rst of QEMU: numbers of messages, and the header of three little-endian
// words: number, flags, length of what follows.
const SET_FEATURES: u32 = 2;
const SET_VRING_ENABLE: u32 = 18;
const HEADER: usize = 12;
const NEED_REPLY: u32 = 1 << 3;
const REPLY: u32 = 1 << 2;

/// Longer than any message of the protocol.
pub const MAX_PAYLOAD: usize = 8 << 10;
/// Descriptors beside one message: one per memory region, of which there are at most eight.
const MAX_FDS: usize = 8;
/// Most rings that may be enabled too early.
pub const MAX_EARLY: usize = 16;

/// Relays between the front end that connects to `socket`, a listening socket, and the returned
/// listening socket, on which the same front end appears with its messages in order.
pub fn defer_early_enable(socket: OwnedFd) -> io::Result<OwnedFd> {
    let kind = |flags| socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let listener = kind(SocketFlags::CLOEXEC)?;
    // The kernel chooses an abstract name, in this process's network namespace.
    bind(&listener, &SocketAddrUnix::new_unnamed())?;
    listen(&listener, 1)?;
    let name = SocketAddrUnix::try_from(getsockname(&listener)?)?;
    std::thread::Builder::new()
        .name("net-front-end".into())
        .spawn(move || {
            let relayed = accept_with(&socket, SocketFlags::CLOEXEC)
                .map_err(io::Error::from)
                .and_then(|front| {
                    let back = kind(SocketFlags::CLOEXEC)?;
                    connect(&back, &name)?;
                    relay(&front, &back)
                });
            if let Err(error) = relayed {
                tracing::debug!(%error, "net front end");
            }
        })?;
    Ok(listener)
}

/// Relays between a front end and the library, two connected sockets, until one side closes.
///
/// # Errors
/// If a message is malformed, or a socket fails. Both sockets are shut down then.
pub fn relay(front: &OwnedFd, back: &OwnedFd) -> io::Result<()> {
    std::thread::scope(|scope| {
        let replies = scope.spawn(|| {
            let outcome = pass_replies(back, front);
            // Both directions end together.
            let _ = shutdown(front, rustix::net::Shutdown::Both);
            outcome
        });
        let requests = pass_requests(front, back);
        let _ = shutdown(back, rustix::net::Shutdown::Both);
        let replies = replies.join();
        requests.and(replies.unwrap_or_else(|_| Err(io::Error::other("the relay panicked"))))
    })
}

/// A message with its descriptors.
struct Message {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn word(&self, index: usize) -> u32 {
        let at = index * 4;
        let word = self
            .bytes
            .get(at..at + 4)
            .and_then(|word| word.try_into().ok());
        word.map_or(0, u32::from_le_bytes)
    }

    fn set_word(&mut self, index: usize, value: u32) {
        let at = index * 4;
        if let Some(word) = self.bytes.get_mut(at..at + 4) {
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn pass_requests(front: &OwnedFd, back: &OwnedFd) -> io::Result<()> {
    let mut early: Option<VecDeque<Message>> = Some(VecDeque::new());
    while let Some(mut message) = receive(front)? {
        match (&mut early, message.word(0)) {
            (Some(kept), SET_VRING_ENABLE) => {
                if kept.len() == MAX_EARLY {
                    return Err(invalid("too many rings are enabled early"));
                }
                let flags = message.word(1);
                if flags & NEED_REPLY != 0 {
                    send(front, &answer(&message))?;
                    message.set_word(1, flags & !NEED_REPLY);
                }
                kept.push_back(message);
            }
            (_, SET_FEATURES) => {
                send(back, &message)?;
                for kept in early.take().into_iter().flatten() {
                    send(back, &kept)?;
                }
            }
            _ => send(back, &message)?,
        }
    }
    Ok(())
}

/// The reply of success to a message that is held back.
fn answer(message: &Message) -> Message {
    let mut bytes = Vec::with_capacity(HEADER + 8);
    bytes.extend(message.word(0).to_le_bytes());
    bytes.extend(((message.word(1) & !NEED_REPLY) | REPLY).to_le_bytes());
    bytes.extend(8u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    Message {
        bytes,
        fds: Vec::new(),
    }
}

fn pass_replies(back: &OwnedFd, front: &OwnedFd) -> io::Result<()> {
    while let Some(message) = receive(back)? {
        send(front, &message)?;
    }
    Ok(())
}

/// The next message; `None` at the end.
fn receive(socket: &OwnedFd) -> io::Result<Option<Message>> {
    let mut message = Message {
        bytes: vec![0; HEADER],
        fds: Vec::new(),
    };
    if !fill(socket, &mut message.bytes, &mut message.fds)? {
        return Ok(None);
    }
    let length = message.word(2) as usize;
    if length > MAX_PAYLOAD {
        return Err(invalid("a message is too long"));
    }
    let mut payload = vec![0; length];
    if length > 0 && !fill(socket, &mut payload, &mut message.fds)? {
        return Err(invalid("a message is cut"));
    }
    message.bytes.append(&mut payload);
    Ok(Some(message))
}

/// Fills a buffer; false if the other side closed before its first byte.
fn fill(socket: &OwnedFd, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<bool> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = &mut buffer[filled..];
        let packet = hull_ipc::packet::receive(socket, rest, MAX_FDS - fds.len())?;
        if packet.truncated {
            return Err(invalid("too many descriptors"));
        }
        fds.extend(packet.fds);
        filled += match packet.length {
            0 if filled == 0 => return Ok(false),
            0 => return Err(invalid("a message is cut")),
            length => length,
        };
    }
    Ok(true)
}

fn send(socket: &OwnedFd, message: &Message) -> io::Result<()> {
    let mut fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < message.bytes.len() {
        sent += hull_ipc::packet::send(socket, &message.bytes[sent..], &fds)?;
        // They went with the first byte.
        fds.clear();
    }
    Ok(())
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::net::socketpair;

    use super::*;

    fn message(number: u32, flags: u32, payload: &[u8]) -> Message {
        let mut bytes = Vec::new();
        for word in [number, flags, payload.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(payload);
        Message {
            bytes,
            fds: Vec::new(),
        }
    }

    /// The sockets of a front end and of the library.
    fn joined() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC;
        let public = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        bind(&public, &SocketAddrUnix::new_unnamed()).unwrap();
        listen(&public, 1).unwrap();
        let name = SocketAddrUnix::try_from(getsockname(&public).unwrap()).unwrap();
        let private = defer_early_enable(public).unwrap();
        let front = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        connect(&front, &name).unwrap();
        let back = accept_with(&private, flags).unwrap();
        (front, back)
    }

    #[test]
    fn rings_are_enabled_after_the_features() {
        let (front, back) = joined();
        send(&front, &message(SET_VRING_ENABLE, 1, b"ring 0  ")).unwrap();
        send(
            &front,
            &message(SET_VRING_ENABLE, 1 | NEED_REPLY, b"ring 1  "),
        )
        .unwrap();
        let reply = receive(&front).unwrap().unwrap();
        assert_eq!(
            (reply.word(0), reply.word(1), reply.word(2), reply.word(3)),
            (SET_VRING_ENABLE, 1 | REPLY, 8, 0)
        );
        send(&front, &message(1, 1, b"")).unwrap();
        send(&front, &message(SET_FEATURES, 1, b"features")).unwrap();
        send(&front, &message(SET_VRING_ENABLE, 1, b"ring 0 x")).unwrap();
        let mut seen = Vec::new();
        for _ in 0..5 {
            let next = receive(&back).unwrap().unwrap();
            seen.push((next.word(0), next.word(1), next.bytes[HEADER..].to_vec()));
        }
        let expected: [(u32, &[u8]); 5] = [
            (1, b""),
            (SET_FEATURES, b"features"),
            (SET_VRING_ENABLE, b"ring 0  "),
            (SET_VRING_ENABLE, b"ring 1  "),
            (SET_VRING_ENABLE, b"ring 0 x"),
        ];
        let expected = expected.map(|(number, payload)| (number, 1, payload.to_vec()));
        assert_eq!(seen, expected);
    }

    #[test]
    fn descriptors_and_replies_pass_and_the_end_is_the_end_of_both() {
        let (front, back) = joined();
        let (near, far) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut kick = message(12, 1, b"12345678");
        kick.fds.push(far);
        send(&front, &kick).unwrap();
        drop(kick);
        let passed = receive(&back).unwrap().unwrap();
        rustix::io::write(&passed.fds[0], b"x").unwrap();
        rustix::io::read(&near, &mut [0]).unwrap();
        send(&back, &message(1, 1 | REPLY, b"answered")).unwrap();
        assert_eq!(
            receive(&front).unwrap().unwrap().bytes[HEADER..],
            *b"answered"
        );
        drop(back);
        assert!(receive(&front).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_ends_the_connection() {
        for bytes in [&message(1, 1, b"").bytes[..5], &[0xff; 64]] {
            let (front, back) = joined();
            rustix::io::write(&front, bytes).unwrap();
            shutdown(&front, rustix::net::Shutdown::Write).unwrap();
            assert!(receive(&back).unwrap().is_none());
        }
        let (front, back) = joined();
        for _ in 0..=MAX_EARLY {
            // The last one may come too late to be sent at all.
            let _ = send(&front, &message(SET_VRING_ENABLE, 1, b"12345678"));
        }
        assert!(receive(&back).unwrap().is_none());
    }
}
