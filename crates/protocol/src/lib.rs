//! The contract between the host and the agent in the guest: messages, service, ports, paths.
//!
//! Called by `sandbox` (client) and `agent` (server). Holds no behaviour: what is here is either
//! generated from `proto/`, or a constant or a layout that both sides must agree on.

#[allow(missing_docs, clippy::all, clippy::unwrap_used, unused, unsafe_code)]
#[rustfmt::skip]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::{agent, agent_ttrpc};

/// Version of this contract: counts the changes that an older peer cannot ignore. See "Versions" in
/// `agent.proto`.
pub const PROTOCOL_VERSION: u32 = 1;

/// Oldest version of a host that the agent answers.
pub const MIN_HOST_VERSION: u32 = 1;

/// vsock port of the host that the agent dials when it is ready. The connection is both the event
/// "ready" and the channel on which the agent then serves [`agent_ttrpc`]: no listener, no second
/// round trip. When it ends, as after a restore from a snapshot, the agent dials again: see
/// "Connections" in `agent.proto`.
pub const AGENT_PORT: u32 = 1024;

/// How long the agent dials without a host that calls before it powers the machine off. Long enough
/// for a host process to be replaced on a busy machine; short enough that a machine does not stay
/// for long when nothing on the host has ended it.
pub const NO_HOST_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Key of the ttrpc metadata under which a call that changes something has its id.
pub const CALL_ID_KEY: &str = "hull-call-id";

/// Longest id of a call, bytes.
pub const MAX_CALL_ID: usize = 64;

/// Most calls with an id that a host has in flight; answers to so many are kept by the agent.
pub const MAX_CALLS: usize = 256;

/// Events that the agent keeps.
pub const EVENTS_KEPT: usize = 1024;

/// Bytes that the agent keeps of each output that it has sent to the host, to send them again when
/// the connection breaks: as many as the host's vsock device takes from the guest before it has
/// passed them on (the largest `buf_alloc` that it announces).
pub const STREAM_REPLAY: usize = 256 << 10;

/// Bytes that the agent keeps of all outputs together that have ended, the latest ones.
pub const ENDED_REPLAY: usize = 1 << 20;

/// vsock port of the guest to which the host connects one stream each for stdin, stdout, stderr or
/// a terminal.
pub const STREAM_PORT: u32 = 1025;

/// vsock port of the host that the agent dials for each connection of the guest to a socket of the
/// host. The agent sends a [`SocketRequest`], and the host a [`SocketAnswer`], which ends it.
pub const SOCKETS_PORT: u32 = 1026;

/// Most connections of a guest to sockets of the host at a time.
pub const MAX_HOST_CONNECTIONS: usize = 256;

/// Most of them that wait for the host's answer.
pub const MAX_SOCKET_REQUESTS: usize = 8;

/// How long the host may take for its answer. The guest's kernel waits longer for a connect(2) that
/// must not wait (`UNIX_HOST_TIMEOUT`, net/unix/af_unix.c as patched).
pub const SOCKET_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// vsock context id of the host, as every guest sees it (`VMADDR_CID_HOST`, linux/vm_sockets.h).
pub const HOST_CID: u32 = 2;

/// vsock context id of the guest. Every machine has a vsock device to itself, so all can have the
/// same one.
pub const GUEST_CID: u32 = 3;

/// Tag of the fs device that carries all shares of the pod.
pub const SHARES_TAG: &str = "hull";

/// Where the agent mounts the fs device. Each share is a directory in it, named as the host named
/// it.
pub const SHARES_DIR: &str = "/run/hull/shares";

/// What the source of a bind mount in a container's spec begins with when it is memory that
/// containers of the guest share. 16 hexadecimal digits follow: containers that name the same
/// digits share it. The agent keeps it as a tmpfs, with the mount's options `size=`, `mode=`,
/// `uid=` and `gid=`, as long as there is a container that has it.
pub const SHARED_MEMORY_SOURCE: &str = "hull-shm:";

/// The same for memory that belongs to the pod: the agent keeps it as long as the guest lives. With
/// the option `part=PATH`, what is mounted is that file or directory in it; a directory is created
/// if nothing is there.
pub const POD_MEMORY_SOURCE: &str = "hull-pod:";

/// What the source of a bind mount in a container's spec begins with when it is a file that the
/// host gave a container with its creation. The container's id, a slash and the file's name follow.
/// The agent keeps such files as long as there is a container that has one.
pub const GIVEN_FILES_SOURCE: &str = "hull-file:";

/// Hardware address that net device `number` of a machine bears until the agent gives it the one of
/// the interface that it stands for: locally administered, "hull", and the number, by which the
/// agent knows it.
pub const fn net_device_mac(number: u8) -> [u8; 6] {
    [0x02, b'h', b'u', b'l', b'l', number]
}

/// Most connections to ports of a guest that are forwarded at a time.
pub const MAX_FORWARDS: usize = 256;

/// Where Docker's name server is in a container's network namespace, and where the agent answers
/// for it in a guest.
pub const RESOLVER: std::net::SocketAddrV4 =
    std::net::SocketAddrV4::new(std::net::Ipv4Addr::new(127, 0, 0, 11), 53);

/// Most questions that wait for their answers at a time.
pub const MAX_QUESTIONS: u16 = 64;

/// What stands before each message in the stream between the agent and the host's end of the name
/// server: the agent's questions and the host's answers, DNS messages that neither looks into. The
/// answer to a question has its slot and its transport; every question gets exactly one, which is
/// empty when there is none to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameHeader {
    /// Which question, of those that wait: below [`MAX_QUESTIONS`].
    pub slot: u16,
    /// It came over TCP, and is to be asked so; otherwise UDP.
    pub tcp: bool,
    /// How many bytes follow.
    pub length: u16,
}

impl NameHeader {
    /// Length of a header.
    pub const LENGTH: usize = 5;

    /// As it travels.
    pub const fn encode(self) -> [u8; Self::LENGTH] {
        let ([a, b], [c, d]) = (self.slot.to_be_bytes(), self.length.to_be_bytes());
        [a, b, self.tcp as u8, c, d]
    }

    /// Reads a header; `None` if it is not one.
    pub const fn decode(bytes: [u8; Self::LENGTH]) -> Option<Self> {
        let [a, b, tcp, c, d] = bytes;
        let slot = u16::from_be_bytes([a, b]);
        if slot >= MAX_QUESTIONS || tcp > 1 {
            return None;
        }
        Some(Self {
            slot,
            tcp: tcp == 1,
            length: u16::from_be_bytes([c, d]),
        })
    }
}

/// Which socket of the host a process of the guest connects to, and as whom. Little endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRequest {
    /// The socket's node in the fs device.
    pub node: u64,
    /// The process's effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// Its supplementary groups, at most [`SocketRequest::MAX_GROUPS`].
    pub groups: Vec<u32>,
}

impl SocketRequest {
    /// Length of what stands before the groups; the last four bytes are their number.
    pub const HEAD: usize = 20;
    /// Most groups.
    pub const MAX_GROUPS: usize = 64;

    /// As it travels. Groups above the limit are left out.
    pub fn encode(&self) -> Vec<u8> {
        let groups = &self.groups[..self.groups.len().min(Self::MAX_GROUPS)];
        let mut bytes = Vec::with_capacity(Self::HEAD + 4 * groups.len());
        bytes.extend(self.node.to_le_bytes());
        // The limit fits.
        let count = groups.len() as u32;
        for number in [self.uid, self.gid, count].iter().chain(groups) {
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }

    /// Reads what stands before the groups, and the number of these; `None` if they are too many.
    pub fn decode(head: [u8; Self::HEAD]) -> Option<(Self, usize)> {
        let (node, rest) = head.split_first_chunk()?;
        let mut numbers = Self::numbers(rest);
        let (uid, gid) = (numbers.next()?, numbers.next()?);
        let count = usize::try_from(numbers.next()?).ok()?;
        let request = Self {
            node: u64::from_le_bytes(*node),
            uid,
            gid,
            groups: Vec::new(),
        };
        (count <= Self::MAX_GROUPS).then_some((request, count))
    }

    /// Numbers as they travel.
    pub fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|four| u32::from_le_bytes(*four))
    }
}

/// Whether the host has connected. Little endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketAnswer {
    /// The port from which the connection comes to [`STREAM_PORT`]. Not 0.
    Connected(u32),
    /// The error of connect(2) on the host, errno(3). Not 0.
    Refused(u32),
}

impl SocketAnswer {
    /// Length of an answer.
    pub const LENGTH: usize = 8;

    /// As it travels.
    pub fn encode(self) -> [u8; Self::LENGTH] {
        let (port, error) = match self {
            Self::Connected(port) => (port, 0),
            Self::Refused(error) => (0, error),
        };
        let ([a, b, c, d], [e, f, g, h]) = (port.to_le_bytes(), error.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }

    /// Reads an answer.
    pub fn decode([a, b, c, d, e, f, g, h]: [u8; Self::LENGTH]) -> Self {
        match u32::from_le_bytes([a, b, c, d]) {
            0 => Self::Refused(u32::from_le_bytes([e, f, g, h])),
            port => Self::Connected(port),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_request_for_a_socket_and_its_answer_are_what_they_were() {
        let mut request = SocketRequest {
            node: 7 << 40,
            uid: 1000,
            gid: u32::MAX,
            groups: vec![4, 5, 1 << 31],
        };
        let bytes = request.encode();
        let (head, rest) = bytes.split_first_chunk().unwrap();
        let (mut decoded, count) = SocketRequest::decode(*head).unwrap();
        decoded.groups = SocketRequest::numbers(rest).collect();
        assert_eq!((&decoded, count), (&request, 3));

        request.groups = vec![1; SocketRequest::MAX_GROUPS + 1];
        let length = SocketRequest::HEAD + 4 * SocketRequest::MAX_GROUPS;
        assert_eq!(request.encode().len(), length);
        let mut head = *head;
        head[16] = 65;
        assert_eq!(SocketRequest::decode(head), None);

        for answer in [SocketAnswer::Connected(1 << 16), SocketAnswer::Refused(111)] {
            assert_eq!(SocketAnswer::decode(answer.encode()), answer);
        }
    }

    #[test]
    fn a_header_of_a_question_is_what_it_was() {
        for (slot, tcp, length) in [(0, false, 0), (63, true, 65535), (7, true, 0x0102)] {
            let header = NameHeader { slot, tcp, length };
            assert_eq!(NameHeader::decode(header.encode()), Some(header));
        }
        assert_eq!(NameHeader::decode([0, 64, 0, 0, 0]), None);
        assert_eq!(NameHeader::decode([1, 0, 0, 0, 0]), None);
        assert_eq!(NameHeader::decode([0, 0, 2, 0, 0]), None);
    }
}
