//! Configures the kernel's packet filter (nf_tables): redirects connections to a namespace's own
//! addresses to a port ([`loopback`]), gives a network's containers the host's address outside
//! ([`masquerade`]), and drops what comes from a bridge for the host's loopback interface
//! ([`guard`]). Never calls `nft` or `iptables`.
//!
//! The messages are those of linux/netfilter/nf_tables.h: a batch is applied whole or not at all.

pub mod guard;
pub mod loopback;
pub mod masquerade;

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use crate::redirect::Family;

/// Most bytes of replies read at once; each is an error with the head of a message.
const ANSWERS: usize = 4096;

/// The most that the kernel returns of a dump at once.
const DUMPED: usize = 64 << 10;

/// A socket to the packet filter of the calling thread's namespace.
fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (netlink, raw) = (AddressFamily::NETLINK, SocketType::RAW);
    Ok(socket_with(netlink, raw, flags, Some(NETFILTER))?)
}

/// Deletes the tables of a network, as far as they are there.
///
/// # Errors
/// The kernel refuses.
pub fn forget(network: &str) -> io::Result<()> {
    let tables = [
        (Family::V4, format!("hull-{network}\0")),
        (Family::V6, format!("hull-{network}\0")),
        (Family::V4, format!("hull-{network}-guard\0")),
    ];
    for (family, table) in tables {
        let mut batch = Batch::new();
        // Created when it is missing, so that the deletion always succeeds.
        batch.table(table.as_bytes(), NEW_TABLE, family, 0, CREATE);
        batch.table(table.as_bytes(), DELETE_TABLE, family, 0, ACK);
        ensure(&batch.end())?;
    }
    Ok(())
}

/// The rules of a chain, in the calling thread's namespace, in the kernel's encoding; empty if
/// there is no such chain.
pub fn rules(family: Family, table: &str, chain: &str) -> io::Result<Vec<Vec<u8>>> {
    let zero_terminated = |name: &str| [name.as_bytes(), &[0]].concat();
    let mut question = Batch {
        bytes: Vec::new(),
        count: 0,
    };
    question.message(GET_RULE, DUMP, family.number(), 0, |wanted| {
        wanted.bytes(1, &zero_terminated(table));
        wanted.bytes(2, &zero_terminated(chain));
    });
    let socket = socket()?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&socket, &question.bytes, SendFlags::empty(), &kernel)?;
    let mut rules = Vec::new();
    let mut answers = vec![0; DUMPED];
    loop {
        // The kernel has the next part ready when it is read.
        let (length, _) = recv(&socket, &mut answers[..], RecvFlags::DONTWAIT)?;
        for (kind, content) in messages(&answers[..length]) {
            match kind {
                NEW_RULE => rules.push(content.to_vec()),
                NLMSG_DONE => return Ok(rules),
                NLMSG_ERROR => {
                    let code = content
                        .first_chunk()
                        .map_or(0, |code| i32::from_ne_bytes(*code));
                    return match Errno::from_raw_os_error(code.saturating_neg()) {
                        Errno::NOENT => Ok(Vec::new()),
                        errno => Err(errno.into()),
                    };
                }
                _ => {}
            }
        }
    }
}

/// The messages of a datagram: type, and content after the header.
fn messages(mut datagram: &[u8]) -> Vec<(u16, &[u8])> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = datagram.split_first_chunk() {
        let length = u32::from_ne_bytes(*length) as usize;
        let kind = rest.first_chunk().map(|kind| u16::from_ne_bytes(*kind));
        if let (Some(kind), Some(content)) =
            (kind, datagram.get(HEADER..length.min(datagram.len())))
        {
            messages.push((kind, content));
        }
        datagram = datagram
            .get(length.next_multiple_of(4).max(HEADER)..)
            .unwrap_or_default();
    }
    messages
}

/// Sends a batch, which the kernel applies before the call returns, and reads its replies: the
/// first error, if any.
fn exchange(socket: &OwnedFd, batch: &[u8]) -> Result<(), Errno> {
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(socket, batch, SendFlags::empty(), &kernel)?;
    let mut confirmed = false;
    let mut answers = [0; ANSWERS];
    loop {
        match recv(socket, &mut answers[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) => {
                for code in codes(&answers[..length]) {
                    match code {
                        0 => confirmed = true,
                        code => return Err(Errno::from_raw_os_error(code.saturating_neg())),
                    }
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if confirmed => return Ok(()),
            Err(Errno::AGAIN) => return Err(Errno::PROTO),
            Err(errno) => return Err(errno),
        }
    }
}

/// The codes of the replies in a datagram: 0, or a negative errno.
fn codes(datagram: &[u8]) -> Vec<i32> {
    messages(datagram)
        .into_iter()
        .filter(|(kind, _)| *kind == NLMSG_ERROR)
        .filter_map(|(_, content)| content.first_chunk())
        .map(|code| i32::from_ne_bytes(*code))
        .collect()
}

// linux/netlink.h
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const DUMP: u16 = 0x300;
const NESTED: u16 = 0x8000;

// linux/netfilter/nfnetlink.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NF_TABLES: u16 = 10;

// linux/netfilter/nf_tables.h, enum nf_tables_msg_types
const NEW_TABLE: u16 = NF_TABLES << 8;
const DELETE_TABLE: u16 = NF_TABLES << 8 | 2;
const NEW_CHAIN: u16 = NF_TABLES << 8 | 3;
const GET_RULE: u16 = NF_TABLES << 8 | 7;
const NEW_RULE: u16 = NF_TABLES << 8 | 6;

const FLAG_OWNER: u32 = 2;
const ACCEPT: u32 = 1;
const REGISTER: u32 = 1;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const KEY_L4PROTO: u32 = 16;
const KEY_IN_NAME: u32 = 6;
const KEY_OUT_NAME: u32 = 7;
/// `NFT_FIB_RESULT_ADDRTYPE`
const FIB_ADDRESS_TYPE: u32 = 3;
/// `NFTA_FIB_F_DADDR`
const FIB_DESTINATION: u32 = 2;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

/// Messages, one after the other.
struct Batch {
    bytes: Vec<u8>,
    count: u32,
}

impl Batch {
    fn new() -> Self {
        let mut batch = Self {
            bytes: Vec::with_capacity(1024),
            count: 0,
        };
        batch.message(BATCH_BEGIN, 0, 0, NF_TABLES, |_| {});
        batch
    }

    fn end(mut self) -> Vec<u8> {
        self.message(BATCH_END, 0, 0, NF_TABLES, |_| {});
        self.bytes
    }

    /// A `struct nlmsghdr`, a `struct nfgenmsg`, and attributes.
    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        content: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.count.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        content(&mut Attributes(&mut self.bytes));
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
        self.count += 1;
    }

    fn table(&mut self, name: &[u8], kind: u16, family: Family, table_flags: u32, flags: u16) {
        self.message(kind, flags, family.number(), 0, |table| {
            table.bytes(1, name);
            if table_flags != 0 {
                table.number(2, table_flags);
            }
        });
    }

    /// A chain of type nat.
    fn nat_chain(&mut self, table: &[u8], name: &[u8], family: Family, hook: u32, priority: i32) {
        self.chain(b"nat\0", table, name, family, (hook, priority));
    }

    /// A chain of a type, at a hook and with a priority. It accepts what no rule of it drops.
    fn chain(
        &mut self,
        kind: &[u8],
        table: &[u8],
        name: &[u8],
        family: Family,
        (hook, priority): (u32, i32),
    ) {
        self.message(NEW_CHAIN, CREATE, family.number(), 0, |chain| {
            chain.bytes(1, table);
            chain.bytes(3, name);
            chain.nested(4, |place| {
                place.number(1, hook);
                place.bytes(2, &priority.to_be_bytes());
            });
            chain.number(5, ACCEPT);
            chain.bytes(7, kind);
        });
    }

    /// A rule at the end of a chain. The kernel answers to it, and so to all before it.
    fn rule(
        &mut self,
        table: &[u8],
        chain: &[u8],
        family: Family,
        expressions: impl FnOnce(&mut Attributes<'_>),
    ) {
        let flags = CREATE | APPEND | ACK;
        self.message(NEW_RULE, flags, family.number(), 0, |rule| {
            rule.bytes(1, table);
            rule.bytes(2, chain);
            rule.nested(4, expressions);
        });
    }
}

/// Applies a batch that creates a table, in the namespace of the calling thread, unless the table
/// is there.
fn ensure(batch: &[u8]) -> io::Result<()> {
    match socket().and_then(|socket| Ok(exchange(&socket, batch)?)) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        done => done,
    }
}

/// Attributes (`struct nlattr`) at the end of a message.
struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    fn attribute(&mut self, kind: u16, content: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        content(&mut Attributes(self.0));
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn bytes(&mut self, kind: u16, bytes: &[u8]) {
        self.attribute(kind, |content| content.0.extend(bytes));
    }

    fn number(&mut self, kind: u16, number: u32) {
        self.bytes(kind, &number.to_be_bytes());
    }

    fn nested(&mut self, kind: u16, content: impl FnOnce(&mut Attributes<'_>)) {
        self.attribute(kind | NESTED, content);
    }

    /// One of a rule's expressions.
    fn expression(&mut self, name: &[u8], data: impl FnOnce(&mut Attributes<'_>)) {
        self.nested(1, |element| {
            element.bytes(1, name);
            element.nested(2, data);
        });
    }

    /// Loads a part of the packet into the register.
    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.expression(b"payload\0", |payload| {
            payload.number(1, REGISTER);
            payload.number(2, base);
            payload.number(3, offset);
            payload.number(4, length);
        });
    }

    /// Masks the register.
    fn mask(&mut self, mask: &[u8]) {
        self.expression(b"bitwise\0", |bitwise| {
            bitwise.number(1, REGISTER);
            bitwise.number(2, REGISTER);
            bitwise.number(3, mask.len() as u32);
            bitwise.nested(4, |data| data.bytes(1, mask));
            bitwise.nested(5, |data| data.bytes(1, &vec![0; mask.len()]));
        });
    }

    /// Loads the type of the destination address, `RTN_*` of linux/rtnetlink.h.
    fn destination_type(&mut self) {
        self.expression(b"fib\0", |fib| {
            fib.number(1, REGISTER);
            fib.number(2, FIB_ADDRESS_TYPE);
            fib.number(3, FIB_DESTINATION);
        });
    }

    /// Loads what the kernel knows of the packet by this key.
    fn meta(&mut self, key: u32) {
        self.expression(b"meta\0", |meta| {
            meta.number(1, REGISTER);
            meta.number(2, key);
        });
    }

    /// Goes on if the interface of this key is, or is not, the named one.
    fn interface(&mut self, key: u32, how: u32, interface: &str) {
        self.meta(key);
        let mut name = [0; libc::IFNAMSIZ];
        for (to, from) in name.iter_mut().zip(interface.bytes()) {
            *to = from;
        }
        self.compare(how, &name);
    }

    /// Continues if the register compares so with `with`.
    fn compare(&mut self, how: u32, with: &[u8]) {
        self.expression(b"cmp\0", |compare| {
            compare.number(1, REGISTER);
            compare.number(2, how);
            compare.nested(3, |data| data.bytes(1, with));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_and_garbage_is_survived() {
        let answer = |code: i32| {
            let mut answer = 36u32.to_ne_bytes().to_vec();
            answer.extend(NLMSG_ERROR.to_ne_bytes());
            answer.extend([0; 10]);
            answer.extend(code.to_ne_bytes());
            answer.resize(36, 0);
            answer
        };
        assert_eq!(codes(&[answer(-95), answer(0)].concat()), [-95, 0]);
        assert!(codes(&[]).is_empty());
        for length in 0..36 {
            let expected: &[i32] = if length < 20 { &[] } else { &[-1] };
            assert_eq!(codes(&answer(-1)[..length]), expected);
        }
        // A zero length does not loop forever.
        assert!(codes(&[0; 64]).is_empty());
        assert!(codes(&[0xff; 64]).is_empty());
    }
}
