//! The table that redirects connections to a namespace's own addresses. Called by `redirect` only,
//! in the target namespace. For each family there is a table `hull` with one chain and two rules,
//! in nft's syntax:
//!
//! ```text
//! table ip hull { flags owner; chain loopback { type nat hook output priority dstnat;
//!     ip daddr 127.0.0.1 meta l4proto tcp tcp dport != PORT redirect to :PORT
//!     ip daddr != 127.0.0.0/8 fib daddr type local meta l4proto tcp tcp dport != PORT
//!         redirect to :PORT } }
//! ```
//!
//! The second rule is left out where the host's kernel has no `fib` expression.
//!
//! A table with an owner goes away with the socket that created it, and so with this process,
//! however that ends. Kernels before 5.12 do not support owners: there the table is deleted at the
//! end, and a leftover one is replaced.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::{
    ACK, Attributes, BASE_NETWORK, BASE_TRANSPORT, Batch, CREATE, DELETE_TABLE, EQUAL, EXCLUSIVE,
    FLAG_OWNER, KEY_L4PROTO, NEW_TABLE, NOT_EQUAL, REGISTER, exchange, socket,
};
use crate::redirect::Family;

const TABLE: &[u8] = b"hull\0";
const CHAIN: &[u8] = b"loopback\0";

/// Where a `struct iphdr` has its destination.
const DESTINATION_V4: u32 = 16;
const HOOK_OUTPUT: u32 = 3;
/// `NF_IP_PRI_NAT_DST`, the same for both families.
const PRIORITY_DSTNAT: i32 = -100;

/// The tables of a namespace, at most one for each family. Dropping it deletes them, and waits
/// until the kernel has freed them.
#[derive(Debug)]
pub struct Rules {
    socket: OwnedFd,
    made: Vec<Family>,
}

impl Rules {
    /// Without tables yet, in the namespace of the calling thread.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            socket: socket()?,
            made: Vec::new(),
        })
    }

    /// Redirects connections to the family's loopback address and, if possible, to the addresses of
    /// interfaces, to `port`.
    pub fn redirect(&mut self, family: Family, port: u16) -> io::Result<()> {
        match exchange(&self.socket, &redirecting(family, port, true)) {
            // The kernel does not know the owner flag.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => self.redirect_unowned(family, port)?,
            made => {
                made?;
                self.made.push(family);
            }
        }
        if let Err(errno) = exchange(&self.socket, &redirecting_interfaces(family, port)) {
            tracing::debug!("only connections to the loopback address are redirected: {errno}");
        }
        Ok(())
    }

    fn redirect_unowned(&mut self, family: Family, port: u16) -> io::Result<()> {
        exchange(&self.socket, &redirecting(family, port, false))?;
        self.made.push(family);
        Ok(())
    }

    /// Deletes the tables without waiting for the kernel to free them.
    pub fn delete(&mut self) {
        for family in self.made.drain(..) {
            let mut batch = Batch::new();
            batch.table(TABLE, DELETE_TABLE, family, 0, ACK);
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

/// The batch that creates a family's table with the rule for the loopback address.
fn redirecting(family: Family, port: u16, owned: bool) -> Vec<u8> {
    let mut batch = Batch::new();
    if owned {
        batch.table(TABLE, NEW_TABLE, family, FLAG_OWNER, CREATE | EXCLUSIVE);
    } else {
        // Create it if missing, so that the deletion always succeeds.
        batch.table(TABLE, NEW_TABLE, family, 0, CREATE);
        batch.table(TABLE, DELETE_TABLE, family, 0, 0);
        batch.table(TABLE, NEW_TABLE, family, 0, CREATE);
    }
    batch.nat_chain(TABLE, CHAIN, family, HOOK_OUTPUT, PRIORITY_DSTNAT);
    let (offset, address): (u32, &[u8]) = match family {
        Family::V4 => (DESTINATION_V4, &[127, 0, 0, 1]),
        Family::V6 => (24, &std::net::Ipv6Addr::LOCALHOST.octets()),
    };
    batch.rule(TABLE, CHAIN, family, |expressions| {
        expressions.payload(BASE_NETWORK, offset, address.len() as u32);
        expressions.compare(EQUAL, address);
        redirect_tcp(expressions, port);
    });
    batch.end()
}

/// The batch that adds the rule for the addresses of interfaces.
fn redirecting_interfaces(family: Family, port: u16) -> Vec<u8> {
    let mut batch = Batch::new();
    batch.rule(TABLE, CHAIN, family, |expressions| {
        if family == Family::V4 {
            expressions.payload(BASE_NETWORK, DESTINATION_V4, 1);
            expressions.compare(NOT_EQUAL, &[127]);
        }
        expressions.destination_type();
        expressions.compare(EQUAL, &u32::from(libc::RTN_LOCAL).to_ne_bytes());
        redirect_tcp(expressions, port);
    });
    batch.end()
}

fn redirect_tcp(expressions: &mut Attributes<'_>, port: u16) {
    expressions.meta(KEY_L4PROTO);
    expressions.compare(EQUAL, &[libc::IPPROTO_TCP as u8]);
    expressions.payload(BASE_TRANSPORT, 2, 2);
    expressions.compare(NOT_EQUAL, &port.to_be_bytes());
    expressions.expression(b"immediate\0", |immediate| {
        immediate.number(1, REGISTER);
        immediate.nested(2, |data| data.bytes(1, &port.to_be_bytes()));
    });
    expressions.expression(b"redir\0", |redir| redir.number(1, REGISTER));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;
    use crate::Namespace;
    use crate::nftables::{BATCH_BEGIN, BATCH_END, HEADER, NEW_CHAIN, NEW_RULE};

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
            // As if the process had been killed.
            left.made.clear();
            drop(next);
            assert!(!connect());
            // With the running kernel's features.
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
}
