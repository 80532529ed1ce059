//! Connects an interface with a tap: every packet that one receives is sent by the other, so that
//! the interface's peer communicates with the guest behind the tap. Called by the sandbox process.
//!
//! Done by the kernel's traffic control, for every protocol: an `ingress` qdisc on both, each with
//! one filter that redirects (Kata calls it "tcfilter"). Packets never pass through hull, and the
//! host's own network stack in the namespace receives none.
//!
//! The tap's qdisc goes away with the tap. The interface's stays when the sandbox process is
//! killed, with a filter that leads nowhere: [`connect`] replaces it. An interface has only one
//! such qdisc, so an existing one is shared if it has no filters; if it has, [`connect`] fails: no
//! order of the two programs' filters would serve both.

use std::io;

use crate::description::Interface;
use crate::error::{Error, Result};
use crate::netlink::{Filters, Key, Netlink};
use crate::sockets::OWN_PORTS;

/// The kind of qdisc that we add.
const OURS: &str = "ingress";

/// Connects the interface with the tap, both ways. Replaces an earlier connection.
pub async fn connect(netlink: &Netlink, interface: &Interface, tap: u32) -> Result<()> {
    prepare(netlink, tap, interface).await?;
    let made = prepare(netlink, interface.index, interface).await?;
    let failed = redirect_failed(interface, "add the filter");
    // The tap's first: when the guest's packets get out, answers also get in.
    let mut connected = netlink.add_redirect(tap, interface.index).await;
    if connected.is_ok() {
        connected = netlink.add_redirect(interface.index, tap).await;
    }
    if connected.is_err() {
        // Report the first error.
        let _ = netlink.delete_redirect(tap).await;
        if made {
            let _ = netlink.delete_ingress_qdisc(interface.index).await;
        }
    }
    connected.map_err(failed)
}

/// Makes exceptions for name servers: their answers to ports of
/// [`sockets::OWN_PORTS`](crate::sockets::OWN_PORTS) go to the host's own stack in the namespace,
/// and ARP and neighbour advertisements go to both. So a server in the namespace, such as Docker's
/// for names, can query others although the interface is a guest's. Replaces earlier exceptions.
pub async fn admit_answers(netlink: &Netlink, interface: &Interface, tap: u32) -> Result<()> {
    let failed = redirect_failed(interface, "make an exception for name servers");
    let admit = async {
        netlink.delete_exceptions(interface.index).await?;
        for keys in NEIGHBOURS {
            netlink.add_copy(interface.index, tap, keys).await?;
        }
        for keys in ANSWERS {
            netlink.add_exception(interface.index, keys).await?;
        }
        Ok(())
    };
    admit.await.map_err(failed)
}

const fn key(offset: u8, mask: u32, value: u32) -> Key {
    Key {
        offset,
        mask,
        value,
    }
}

/// An ARP reply (RFC 826), and a neighbour advertisement (RFC 4861).
const NEIGHBOURS: [&[Key]; 2] = [
    &[key(0, !0, 0x0001_0800), key(4, !0, 0x0604_0002)],
    &[IPV6, next_header(58), key(40, 0xff00_0000, 136 << 24)],
];

/// From port 53 to one of our own ports, over UDP and TCP.
const ANSWERS: [&[Key]; 4] = [
    &[IPV4, WHOLE, protocol(17), answer(20)],
    &[IPV4, WHOLE, protocol(6), answer(20)],
    &[IPV6, next_header(17), answer(40)],
    &[IPV6, next_header(6), answer(40)],
];

/// A header without options.
const IPV4: Key = key(0, 0xff00_0000, 0x4500_0000);
/// Not a later fragment.
const WHOLE: Key = key(4, 0x0000_1fff, 0);
const IPV6: Key = key(0, 0xf000_0000, 0x6000_0000);

const fn protocol(number: u32) -> Key {
    key(8, 0x00ff_0000, number << 16)
}

const fn next_header(number: u32) -> Key {
    key(4, 0x0000_ff00, number << 8)
}

/// Source and destination port.
const fn answer(offset: u8) -> Key {
    let first = *OWN_PORTS.start() as u32;
    key(offset, 0xffff_0000 | first, 53 << 16 | first)
}

/// Undoes [`connect`] on the interface. The tap is left to the owner of its descriptor. Succeeds if
/// the interface or the filter is already gone.
pub async fn disconnect(netlink: &Netlink, interface: &Interface) -> Result<()> {
    let index = interface.index;
    let Some((qdisc, filters)) = look(netlink, index, interface).await? else {
        return Ok(());
    };
    if !filters.ours {
        return Ok(());
    }
    if qdisc == OURS && !filters.foreign {
        let deleted = netlink.delete_ingress_qdisc(index).await;
        unless_gone(deleted).map_err(redirect_failed(interface, "remove the qdisc"))
    } else {
        let deleted = netlink.delete_redirect(index).await;
        unless_gone(deleted).map_err(redirect_failed(interface, "remove the filter"))
    }
}

/// Ensures that the interface with this index, which is `interface` or its tap, has a qdisc without
/// filters. True if the qdisc was created.
async fn prepare(netlink: &Netlink, index: u32, interface: &Interface) -> Result<bool> {
    let Some((qdisc, filters)) = look(netlink, index, interface).await? else {
        let added = netlink.add_ingress_qdisc(index).await;
        added.map_err(redirect_failed(interface, "add an ingress qdisc"))?;
        return Ok(true);
    };
    if filters.foreign {
        return Err(Error::Occupied {
            interface: interface.name.clone(),
            qdisc,
        });
    }
    if filters.ours {
        let deleted = netlink.delete_redirect(index).await;
        deleted.map_err(redirect_failed(interface, "replace the filter"))?;
    }
    Ok(false)
}

/// The qdisc for received packets, and which filters it has.
async fn look(
    netlink: &Netlink,
    index: u32,
    interface: &Interface,
) -> Result<Option<(String, Filters)>> {
    let failed = redirect_failed(interface, "look at its filters");
    let looked = async {
        let Some(qdisc) = netlink.ingress_qdisc(index).await? else {
            return Ok(None);
        };
        Ok(Some((qdisc, netlink.ingress_filters(index).await?)))
    };
    looked.await.map_err(failed)
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    let gone = [libc::ENODEV, libc::ENOENT, libc::EINVAL];
    match result {
        Err(error)
            if error
                .raw_os_error()
                .is_some_and(|errno| gone.contains(&errno)) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn redirect_failed(interface: &Interface, step: &'static str) -> impl FnOnce(io::Error) -> Error {
    let interface = interface.name.clone();
    move |why| Error::Redirect {
        interface,
        step,
        why,
    }
}
