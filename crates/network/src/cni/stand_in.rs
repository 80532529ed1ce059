//! A namespace in place of one that is gone.
//!
//! Some plugins find out what they are to undo by looking at the container's interface: `bridge`
//! takes its rules of address translation back for the addresses that it finds there, and leaves
//! them for ever when there is no namespace. After a crash the namespace is gone, but its addresses
//! are written down. So plugins get a new one, with an interface of the same name and the same
//! addresses, which leads nowhere.

use std::io;

use super::attachment::Address;
use crate::namespace::Namespace;
use crate::netlink::Netlink;

/// Makes one. Blocks; on a thread of its own, because the caller's may be a runtime's.
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
