//! Says to the kernel's packet filter (nf_tables) the one thing that is asked of it: that connections to the loopback
//! address lead to a port. Called by `redirect` only, in the namespace that is meant; never calls `nft` or `iptables`.
//!
//! The messages are those of linux/netfilter/nf_tables.h: a batch that is carried out whole or not at all. For each family
//! there is a table `hull` with one chain and one rule, in the words of nft:
//!
//! ```text
//! table ip hull { flags owner; chain loopback { type nat hook output priority dstnat;
//!     ip daddr 127.0.0.1 meta l4proto tcp tcp dport != PORT redirect to :PORT } }
//! ```
//!
//! A table with an owner goes away with the socket that made it, and so with this process, however that ends. Kernels before
//! 5.12 know no owners: there it is deleted in the end, and one that was left is replaced.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
};

use crate::redirect::Family;

const TABLE: &[u8] = b"hull\0";
const CHAIN: &[u8] = b"loopback\0";

/// Most bytes of answers read at once; each is an error with the head of a message.
const ANSWERS: usize = 4096;

/// The tables of a namespace, at most one for each family. Dropping it deletes them, and waits until the kernel has
/// freed them.
#[derive(Debug)]
pub struct Rules {
    socket: OwnedFd,
    made: Vec<Family>,
}

impl Rules {
    /// With no table yet, in the namespace of the calling thread.
    pub fn new() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (netlink, raw) = (AddressFamily::NETLINK, SocketType::RAW);
        Ok(Self {
            socket: socket_with(netlink, raw, flags, Some(NETFILTER))?,
            made: Vec::new(),
        })
    }

    /// Leads connections to the family's loopback address to `port`.
    pub fn redirect(&mut self, family: Family, port: u16) -> io::Result<()> {
        match exchange(&self.socket, &redirecting(family, port, true)) {
            // Does not know the flag.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return self.redirect_unowned(family, port),
            made => made?,
        }
        self.made.push(family);
        Ok(())
    }

    fn redirect_unowned(&mut self, family: Family, port: u16) -> io::Result<()> {
        exchange(&self.socket, &redirecting(family, port, false))?;
        self.made.push(family);
        Ok(())
    }

    /// Deletes the tables, and waits for nothing.
    pub fn delete(&mut self) {
        for family in self.made.drain(..) {
            let mut batch = Batch::new();
            batch.table(DELETE_TABLE, family, 0, ACK);
            if let Err(errno) = exchange(&self.socket, &batch.end()) {
                tracing::debug!("cannot delete the table hull: {errno}");
            }
        }
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        self.delete();
    }
}

/// Sends a batch, which the kernel carries out before it returns, and reads what it says: the first error, if any.
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

/// The codes of the answers in a datagram: 0, or an errno below it.
fn codes(mut datagram: &[u8]) -> Vec<i32> {
    let mut codes = Vec::new();
    while let Some((length, rest)) = datagram.split_first_chunk() {
        let length = u32::from_ne_bytes(*length) as usize;
        let kind = rest.first_chunk().map(|kind| u16::from_ne_bytes(*kind));
        let code = rest.get(HEADER - 4..).and_then(<[u8]>::first_chunk);
        if let (Some(NLMSG_ERROR), Some(code)) = (kind, code) {
            codes.push(i32::from_ne_bytes(*code));
        }
        datagram = datagram
            .get(length.next_multiple_of(4).max(HEADER)..)
            .unwrap_or_default();
    }
    codes
}

// linux/netlink.h
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;

// linux/netfilter/nfnetlink.h
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NF_TABLES: u16 = 10;

// linux/netfilter/nf_tables.h, enum nf_tables_msg_types
const NEW_TABLE: u16 = NF_TABLES << 8;
const DELETE_TABLE: u16 = NF_TABLES << 8 | 2;
const NEW_CHAIN: u16 = NF_TABLES << 8 | 3;
const NEW_RULE: u16 = NF_TABLES << 8 | 6;

const FLAG_OWNER: u32 = 2;
const HOOK_OUTPUT: u32 = 3;
/// `NF_IP_PRI_NAT_DST`, the same for both families.
const PRIORITY_DSTNAT: i32 = -100;
const ACCEPT: u32 = 1;
const REGISTER: u32 = 1;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const KEY_L4PROTO: u32 = 16;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

/// The batch that makes a family's table.
fn redirecting(family: Family, port: u16, owned: bool) -> Vec<u8> {
    let mut batch = Batch::new();
    if owned {
        batch.table(NEW_TABLE, family, FLAG_OWNER, CREATE | EXCLUSIVE);
    } else {
        // Made unless it is there, so that it can be deleted whether it was or not.
        batch.table(NEW_TABLE, family, 0, CREATE);
        batch.table(DELETE_TABLE, family, 0, 0);
        batch.table(NEW_TABLE, family, 0, CREATE);
    }
    batch.message(NEW_CHAIN, CREATE, family.number(), 0, |chain| {
        chain.bytes(1, TABLE);
        chain.bytes(3, CHAIN);
        chain.nested(4, |hook| {
            hook.number(1, HOOK_OUTPUT);
            hook.bytes(2, &PRIORITY_DSTNAT.to_be_bytes());
        });
        chain.number(5, ACCEPT);
        chain.bytes(7, b"nat\0");
    });
    let (offset, address): (u32, &[u8]) = match family {
        Family::V4 => (16, &[127, 0, 0, 1]),
        Family::V6 => (24, &std::net::Ipv6Addr::LOCALHOST.octets()),
    };
    let flags = CREATE | APPEND | ACK;
    batch.message(NEW_RULE, flags, family.number(), 0, |rule| {
        rule.bytes(1, TABLE);
        rule.bytes(2, CHAIN);
        rule.nested(4, |expressions| {
            expressions.payload(BASE_NETWORK, offset, address.len() as u32);
            expressions.compare(EQUAL, address);
            expressions.expression(b"meta\0", |meta| {
                meta.number(1, REGISTER);
                meta.number(2, KEY_L4PROTO);
            });
            expressions.compare(EQUAL, &[libc::IPPROTO_TCP as u8]);
            expressions.payload(BASE_TRANSPORT, 2, 2);
            expressions.compare(NOT_EQUAL, &port.to_be_bytes());
            expressions.expression(b"immediate\0", |immediate| {
                immediate.number(1, REGISTER);
                immediate.nested(2, |data| data.bytes(1, &port.to_be_bytes()));
            });
            expressions.expression(b"redir\0", |redir| redir.number(1, REGISTER));
        });
    });
    batch.end()
}

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

    fn table(&mut self, kind: u16, family: Family, table_flags: u32, flags: u16) {
        self.message(kind, flags, family.number(), 0, |table| {
            table.bytes(1, TABLE);
            if table_flags != 0 {
                table.number(2, table_flags);
            }
        });
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

    /// Takes a part of the packet.
    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.expression(b"payload\0", |payload| {
            payload.number(1, REGISTER);
            payload.number(2, base);
            payload.number(3, offset);
            payload.number(4, length);
        });
    }

    /// Goes on if what was taken is, or is not, this.
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
    #![allow(clippy::unwrap_used)]
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;
    use crate::Namespace;

    /// The messages of a batch: type, flags, what follows the header.
    fn messages(mut batch: &[u8]) -> Vec<(u16, u16, &[u8])> {
        let mut messages = Vec::new();
        while !batch.is_empty() {
            let length = u32::from_ne_bytes(batch[..4].try_into().unwrap()) as usize;
            let half = |at: usize| u16::from_ne_bytes(batch[at..at + 2].try_into().unwrap());
            assert_eq!(length % 4, 0);
            messages.push((half(4), half(6), &batch[HEADER..length]));
            batch = &batch[length..];
        }
        messages
    }

    #[test]
    fn a_batch_is_framed_and_aligned() {
        for (family, owned) in [(Family::V4, true), (Family::V6, false)] {
            let batch = redirecting(family, 0x1234, owned);
            let messages = messages(&batch);
            let kinds: Vec<u16> = messages.iter().map(|message| message.0).collect();
            let mut expected = vec![BATCH_BEGIN, NEW_TABLE];
            if !owned {
                expected.extend([DELETE_TABLE, NEW_TABLE]);
            }
            expected.extend([NEW_CHAIN, NEW_RULE, BATCH_END]);
            assert_eq!(kinds, expected);
            // struct nfgenmsg: family, version, the subsystem in network order.
            assert_eq!(messages[0].2, [0, 0, 0, 10]);
            assert_eq!(messages[1].2[..2], [family.number(), 0]);
            // nla_len, nla_type, "hull", padding.
            assert_eq!(messages[1].2[4..16], *b"\x09\0\x01\0hull\0\0\0\0");
            let asked: Vec<u16> = messages
                .iter()
                .filter(|message| message.1 & ACK != 0)
                .map(|message| message.0)
                .collect();
            assert_eq!(asked, [NEW_RULE], "one answer, when all is done");
        }
    }

    #[test]
    fn on_an_old_kernel_a_table_is_replaced_and_deleted_in_the_end() {
        let Ok(namespace) = Namespace::new() else {
            return println!("left out: on_an_old_kernel…: no namespace to be had");
        };
        let connect = || {
            let to = (Ipv4Addr::LOCALHOST, 80).into();
            TcpStream::connect_timeout(&to, Duration::from_secs(5)).is_ok()
        };
        let inside = || -> io::Result<()> {
            let family = Family::V4;
            let mut left = Rules::new()?;
            left.redirect_unowned(family, 1)?;
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let port = listener.local_addr()?.port();
            let mut next = Rules::new()?;
            next.redirect_unowned(family, port)?;
            assert!(connect());
            // As if it had been killed.
            left.made.clear();
            drop(next);
            assert!(!connect());
            // The same for the kernel that runs here.
            let mut new = Rules::new()?;
            new.redirect(family, port)?;
            assert!(connect());
            drop(new);
            assert!(!connect());
            Ok(())
        };
        match namespace.run_in(inside).unwrap() {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                println!("left out: on_an_old_kernel…: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }

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
        // A length of nothing does not keep the reader for ever.
        assert!(codes(&[0; 64]).is_empty());
        assert!(codes(&[0xff; 64]).is_empty());
    }
}
