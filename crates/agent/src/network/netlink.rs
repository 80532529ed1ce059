//! As much of rtnetlink as a guest's network needs: encodes requests into one buffer, sends them in
//! one batch, and reads the kernel's answers. Called by the other files of `network`.
//!
//! The kernel processes a batch before `send` returns, one request after the other, whether or not
//! one fails. Only the last one asks for an answer; failures are reported anyway. So a batch costs
//! two system calls if all goes well. Nothing here waits: an answer that is not there after sending
//! never comes.
//!
//! It knows the format of messages, not their purpose. Answers are read with bounds checked: a
//! process with CAP_NET_ADMIN in the guest can write to any netlink socket, though what does not
//! come from the kernel is dropped.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::wanted::Address;

// linux/if_link.h
pub const IFLA_ADDRESS: u16 = 1;
pub const IFLA_IFNAME: u16 = 3;
pub const IFLA_MTU: u16 = 4;
pub const IFLA_AF_SPEC: u16 = 26;
pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
pub const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_PERM_ADDRESS: u16 = 54;
// linux/rtnetlink.h
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
// linux/if_addr.h
pub const IFA_ADDRESS: u16 = 1;
pub const IFA_LOCAL: u16 = 2;
pub const IFA_BROADCAST: u16 = 4;
pub const IFA_FLAGS: u16 = 8;
pub const IFA_F_NOPREFIXROUTE: u32 = 0x200;

/// `sizeof(struct nlmsghdr)`, and of `struct nlattr`.
const MESSAGE_HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// The upper two bits of an attribute's type are flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;

/// Room for one answer: the kernel's pieces of a list are no larger than the room of the previous
/// call, and the first one is smaller. Memory that is not written to costs nothing.
const ANSWER_ROOM: usize = 32 * 1024;

/// Requests sent to the kernel in one batch, numbered from 0.
#[derive(Default)]
pub struct Requests {
    bytes: Vec<u8>,
    /// Start of the last one.
    last: usize,
    count: u32,
}

impl Requests {
    /// Starts the next one: its type (`RTM_…`), flags (`NLM_F_…`) besides NLM_F_REQUEST, and the
    /// structure that messages of its kind begin with.
    pub fn begin(&mut self, kind: u16, flags: i32, body: &[u8]) {
        self.last = self.bytes.len();
        let flags = (flags | libc::NLM_F_REQUEST) as u16;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&self.count.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(body);
        self.count += 1;
        self.set_length();
    }

    /// Adds an attribute to the last one.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.set_length();
    }

    /// Adds an attribute that contains attributes.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.attribute(kind | NLA_F_NESTED, &[]);
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Adds an attribute that is an address.
    pub fn address(&mut self, kind: u16, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    fn set_length(&mut self) {
        let length = (self.bytes.len() - self.last) as u32;
        self.bytes[self.last..self.last + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Requests an answer to the last one even if it succeeds.
    fn ask_for_end(&mut self) {
        if let Some([low, high]) = self.bytes.get_mut(self.last + 6..self.last + 8) {
            let flags = u16::from_ne_bytes([*low, *high]) | libc::NLM_F_ACK as u16;
            [*low, *high] = flags.to_ne_bytes();
        }
    }
}

/// `struct ifinfomsg` for the link `index`: `flags` of those in `change`.
pub fn link_body(index: u32, flags: i32, change: i32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

/// `struct ifaddrmsg`; the flags go into an attribute.
pub fn address_body(family: u8, prefix: u8, scope: u8, index: u32) -> [u8; 8] {
    let mut body = [family, prefix, 0, scope, 0, 0, 0, 0];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body
}

/// `AF_INET` or `AF_INET6`.
pub fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// An address of 4 or 16 bytes.
pub fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// One message of an answer.
struct Message<'a> {
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The messages of an answer, up to the first that is damaged.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = number(bytes.get(..4)?)? as usize;
        let message = Message {
            kind: half(bytes.get(4..6)?)?,
            sequence: number(bytes.get(8..12)?)?,
            payload: bytes.get(MESSAGE_HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes after a message's first structure, up to the first that is damaged: types and
/// values.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes.get(..2)?)?);
        let kind = half(bytes.get(2..4)?)?;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NLA_TYPE_MASK, value))
    })
}

/// Four bytes as a u32 in the kernel's byte order.
pub fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn half(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

/// A link as the kernel describes it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    pub up: bool,
    /// `None` if the link is not Ethernet.
    pub mac: Option<[u8; 6]>,
    /// The permanent address.
    pub permanent_mac: Option<[u8; 6]>,
    /// IPv6 is enabled on it.
    pub ipv6: bool,
}

impl Link {
    fn parse(payload: &[u8]) -> Option<Self> {
        let mut link = Self {
            index: number(payload.get(4..8)?)?,
            up: number(payload.get(8..12)?)? & libc::IFF_UP as u32 != 0,
            ..Default::default()
        };
        for (kind, value) in attributes(payload.get(16..)?) {
            match kind {
                IFLA_IFNAME => {
                    let name = value.strip_suffix(&[0]).unwrap_or(value);
                    link.name = String::from_utf8_lossy(name).into_owned();
                }
                IFLA_MTU => link.mtu = number(value)?,
                IFLA_ADDRESS => link.mac = value.try_into().ok(),
                IFLA_PERM_ADDRESS => link.permanent_mac = value.try_into().ok(),
                IFLA_AF_SPEC => {
                    link.ipv6 = attributes(value).any(|(kind, _)| kind == libc::AF_INET6 as u16);
                }
                _ => {}
            }
        }
        Some(link)
    }
}

/// An address as the kernel describes it: of which link, and its flags (`IFA_F_…`).
fn parse_address(payload: &[u8]) -> Option<(u32, Address, u32)> {
    let [_, prefix, flags, scope] = *payload.first_chunk()?;
    let index = number(payload.get(4..8)?)?;
    let (mut local, mut other, mut flags) = (None, None, u32::from(flags));
    for (kind, value) in attributes(payload.get(8..)?) {
        match kind {
            IFA_LOCAL => local = address(value),
            IFA_ADDRESS => other = address(value),
            IFA_FLAGS => flags = number(value)?,
            _ => {}
        }
    }
    let own = local.or(other)?;
    let address = Address {
        address: own,
        prefix,
        scope,
        peer: other.filter(|other| *other != own),
        no_prefix_route: flags & IFA_F_NOPREFIXROUTE != 0,
    };
    Some((index, address, flags))
}

/// A socket of rtnetlink.
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket in the caller's network namespace.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let socket = rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
        Ok(Self(socket))
    }

    /// Has the kernel carry out requests. Returns which of them failed, by number, in order.
    pub fn change(&self, mut requests: Requests) -> io::Result<Vec<(usize, Errno)>> {
        let mut failures = Vec::new();
        if requests.count == 0 {
            return Ok(failures);
        }
        requests.ask_for_end();
        self.send(&requests)?;
        let last = requests.count - 1;
        let mut answer = Vec::with_capacity(ANSWER_ROOM);
        loop {
            self.receive(&mut answer)?;
            for message in messages(&answer) {
                if message.kind != NLMSG_ERROR || message.sequence > last {
                    continue;
                }
                if let Some(error) = error_of(&message)? {
                    failures.push((message.sequence as usize, error));
                }
                if message.sequence == last {
                    return Ok(failures);
                }
            }
        }
    }

    /// Requests a list and passes on each message of it: the type, and what follows the header.
    pub fn list(&self, kind: u16, body: &[u8], each: &mut dyn FnMut(u16, &[u8])) -> io::Result<()> {
        let mut requests = Requests::default();
        requests.begin(kind, libc::NLM_F_DUMP, body);
        if kind == libc::RTM_GETLINK {
            requests.attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
        }
        self.send(&requests)?;
        let mut answer = Vec::with_capacity(ANSWER_ROOM);
        loop {
            self.receive(&mut answer)?;
            for message in messages(&answer) {
                match message.kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => match error_of(&message)? {
                        Some(error) => return Err(error.into()),
                        None => return Ok(()),
                    },
                    kind => each(kind, message.payload),
                }
            }
        }
    }

    /// All links.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let mut links = Vec::new();
        self.list(libc::RTM_GETLINK, &link_body(0, 0, 0), &mut |_, payload| {
            links.extend(Link::parse(payload));
        })?;
        Ok(links)
    }

    /// Addresses of all links, of a family (`AF_…`): link, address, flags.
    pub fn addresses(&self, family: u8) -> io::Result<Vec<(u32, Address, u32)>> {
        let mut addresses = Vec::new();
        let body = address_body(family, 0, 0, 0);
        self.list(libc::RTM_GETADDR, &body, &mut |_, payload| {
            addresses.extend(parse_address(payload));
        })?;
        Ok(addresses)
    }

    fn send(&self, requests: &Requests) -> io::Result<()> {
        let sent =
            retry_on_intr(|| rustix::net::send(&self.0, &requests.bytes, SendFlags::empty()))?;
        match sent == requests.bytes.len() {
            true => Ok(()),
            false => Err(io::Error::other("the kernel took only a part of a message")),
        }
    }

    /// Reads one piece of an answer of the kernel.
    fn receive(&self, answer: &mut Vec<u8>) -> io::Result<()> {
        loop {
            answer.clear();
            let (_, length, from) = retry_on_intr(|| {
                rustix::net::recvfrom(
                    &self.0,
                    rustix::buffer::spare_capacity(answer),
                    RecvFlags::DONTWAIT | RecvFlags::TRUNC,
                )
            })?;
            if from.and_then(|from| SocketAddrNetlink::try_from(from).ok())
                != Some(SocketAddrNetlink::new(0, 0))
            {
                continue;
            }
            if length > answer.len() {
                return Err(io::Error::other("an answer of the kernel is too large"));
            }
            return Ok(());
        }
    }
}

/// The error in a message of type NLMSG_ERROR; `None` is success.
fn error_of(message: &Message<'_>) -> io::Result<Option<Errno>> {
    let code = message.payload.get(..4).and_then(number);
    match code.map(|code| code as i32) {
        Some(0) => Ok(None),
        Some(code @ -4095..0) => Ok(Some(Errno::from_raw_os_error(-code))),
        _ => Err(io::Error::other("an answer of the kernel is damaged")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let mut requests = Requests::default();
        requests.begin(
            libc::RTM_NEWLINK,
            0,
            &link_body(7, libc::IFF_UP, libc::IFF_UP),
        );
        requests.attribute(IFLA_IFNAME, b"eth0\0");
        requests.nested(IFLA_AF_SPEC, |requests| {
            requests.nested(10, |requests| requests.attribute(8, &[1]));
        });
        let first = requests.bytes.len();
        requests.begin(
            libc::RTM_DELADDR,
            libc::NLM_F_REPLACE,
            &[2, 24, 0, 0, 7, 0, 0, 0],
        );
        requests.address(IFA_LOCAL, "10.0.0.1".parse().unwrap());

        let all: Vec<_> = messages(&requests.bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].sequence), (libc::RTM_NEWLINK, 0));
        assert_eq!((all[1].kind, all[1].sequence), (libc::RTM_DELADDR, 1));
        assert_eq!(first, 16 + 16 + 12 + 4 + 4 + 8);
        let found: Vec<_> = attributes(&all[0].payload[16..]).collect();
        assert_eq!(found[0], (IFLA_IFNAME, &b"eth0\0"[..]));
        assert_eq!(found[1].0, IFLA_AF_SPEC);
        let (kind, inner) = attributes(found[1].1).next().unwrap();
        assert_eq!(kind, 10);
        assert_eq!(attributes(inner).next(), Some((8, &[1][..])));
        assert_eq!(&all[1].payload[8..], [8, 0, 2, 0, 10, 0, 0, 1]);

        let flags = |bytes: &[u8], at: usize| half(&bytes[at + 6..at + 8]).unwrap();
        requests.ask_for_end();
        assert_eq!(flags(&requests.bytes, 0), 1);
        assert_eq!(flags(&requests.bytes, first), 0x105);
    }

    #[test]
    fn links_are_read() {
        let mut requests = Requests::default();
        requests.begin(libc::RTM_NEWLINK, 0, &link_body(3, libc::IFF_UP, 0));
        requests.attribute(IFLA_IFNAME, b"eth1\0");
        requests.attribute(IFLA_MTU, &1400u32.to_ne_bytes());
        requests.attribute(IFLA_ADDRESS, &[2, 0, 0, 0, 0, 9]);
        requests.attribute(IFLA_PERM_ADDRESS, &[2, 0, 0, 0, 0, 8]);
        requests.nested(IFLA_AF_SPEC, |requests| {
            requests.nested(libc::AF_INET as u16, |_| {});
            requests.nested(libc::AF_INET6 as u16, |_| {});
        });
        let message = messages(&requests.bytes).next().unwrap();
        let link = Link {
            index: 3,
            name: "eth1".into(),
            mtu: 1400,
            up: true,
            mac: Some([2, 0, 0, 0, 0, 9]),
            permanent_mac: Some([2, 0, 0, 0, 0, 8]),
            ipv6: true,
        };
        assert_eq!(Link::parse(message.payload), Some(link));
        // An InfiniBand link's address is longer.
        requests.begin(libc::RTM_NEWLINK, 0, &link_body(4, 0, 0));
        requests.attribute(IFLA_ADDRESS, &[0; 20]);
        let message = messages(&requests.bytes).nth(1).unwrap();
        assert_eq!(Link::parse(message.payload).unwrap().mac, None);
    }

    #[test]
    fn addresses_are_read() {
        let parse = |attributes: &[(u16, &str)]| {
            let mut requests = Requests::default();
            let body = address_body(2, 24, 253, 5);
            requests.begin(libc::RTM_NEWADDR, 0, &body);
            requests.attribute(IFA_FLAGS, &0x202u32.to_ne_bytes());
            for (kind, text) in attributes {
                requests.address(*kind, text.parse().unwrap());
            }
            let message = messages(&requests.bytes).next().unwrap();
            parse_address(message.payload)
        };
        let mut address = Address {
            address: "10.0.0.1".parse().unwrap(),
            prefix: 24,
            scope: 253,
            peer: None,
            no_prefix_route: true,
        };
        let both = [(IFA_ADDRESS, "10.0.0.1"), (IFA_LOCAL, "10.0.0.1")];
        assert_eq!(parse(&both), Some((5, address.clone(), 0x202)));
        assert_eq!(parse(&both[..1]), Some((5, address.clone(), 0x202)));
        address.peer = Some("10.0.0.2".parse().unwrap());
        let both = [(IFA_ADDRESS, "10.0.0.2"), (IFA_LOCAL, "10.0.0.1")];
        assert_eq!(parse(&both), Some((5, address, 0x202)));
        assert_eq!(parse(&[]), None);
    }

    #[test]
    fn damaged_answers_are_not_read_past_their_end() {
        let mut requests = Requests::default();
        requests.begin(libc::RTM_NEWLINK, 0, &link_body(3, 0, 0));
        requests.attribute(IFLA_IFNAME, b"eth1\0");
        requests.attribute(IFLA_MTU, &1400u32.to_ne_bytes());
        let whole = requests.bytes;
        for end in 0..whole.len() {
            assert_eq!(messages(&whole[..end]).count(), 0, "{end}");
            let _ = Link::parse(&whole[16.min(end)..end]);
            let _ = parse_address(&whole[16.min(end)..end]);
        }
        for place in 0..whole.len() {
            for value in [0, 1, 3, 4, 15, 255] {
                let mut bytes = whole.clone();
                bytes[place] = value;
                for message in messages(&bytes).take(100) {
                    let _ = Link::parse(message.payload);
                    let _ = error_of(&message);
                }
            }
        }
        // A length of zero would be read forever.
        assert_eq!(messages(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }
}
