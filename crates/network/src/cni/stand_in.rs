//! Replacement for a network namespace that is gone.
//!
//! Some plugins look at the container's interface to find out what to remove: `bridge` deletes its
//! masquerading rules for the addresses found there, and leaks them without a namespace. After a
//! crash the namespace is gone, but its addresses are recorded. So plugins get a new one, with an
//! unconnected interface of the same name and addresses.

use std::io;

use super::attachment::Address;
use crate::namespace::Namespace;
use crate::netlink::Netlink;

/// Creates the namespace. Blocks; uses its own thread, because the caller's may be in a runtime.
pub(super) fn make(interface: &str, addresses: &[Address]) -> io::Result<Namespace> {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| made_here(interface, addresses)).join();
        made.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn made_here(interface: &str, addresses: &[Address]) -> io::Result<Namespace> {
    let other = |error: crate::Error| io::Error::other(error.to_string());
    let namespace = Namespace::new().map_err(other)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let netlink = Netlink::open(&namespace).map_err(other)?;
        let addresses = addresses
            .iter()
            .map(|address| (address.ip, address.prefix_len()));
        netlink.add_loose_end(interface, addresses).await
    })?;
    Ok(namespace)
}
