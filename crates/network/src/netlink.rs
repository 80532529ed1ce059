//! Netlink (rtnetlink(7)) in a namespace, through the crate `rtnetlink`. Only this file and those
//! below it use that crate: its interface changes often.
//!
//! The socket is created inside the namespace and stays there; it is used from the caller's
//! runtime. Every request is acknowledged by the kernel, and the caller waits for that. Attributes
//! that this crate does not understand are ignored.

mod reading;
mod traffic;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::StreamExt;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};

use crate::description::{Description, Interface};
use crate::error::{Error, Result};
use crate::namespace::Namespace;

pub(crate) use traffic::{Filters, Key};

/// Attempts to list objects that change during the dump.
const DUMP_ATTEMPTS: u32 = 8;

/// A netlink socket in a namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Netlink {
    handle: rtnetlink::Handle,
}

impl Netlink {
    /// Opens a socket in the namespace. A task of the calling tokio runtime serves it until the
    /// last clone of this is dropped; fails without a runtime.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let read = |why| Error::Read {
            what: "interfaces",
            why,
        };
        let runtime =
            tokio::runtime::Handle::try_current().map_err(|error| read(io::Error::other(error)))?;
        let connection = namespace.run_in(|| {
            // The socket registers with the runtime.
            let _inside = runtime.enter();
            rtnetlink::new_connection()
        })?;
        let (mut connection, handle, _) = connection.map_err(read)?;
        // Without these a lost connection looks like a successful request.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        runtime.spawn(connection);
        Ok(Self { handle })
    }

    /// Describes the contents of the namespace, as far as a guest needs them.
    pub async fn describe(&self) -> Result<Description> {
        reading::describe(self).await
    }

    /// Sets up a tap: MTU, queue length, no link-local address, up.
    pub(crate) async fn prepare_tap(
        &self,
        index: u32,
        mtu: u32,
        queue_length: u32,
    ) -> io::Result<()> {
        let attributes = vec![
            LinkAttribute::Mtu(mtu),
            LinkAttribute::TxQueueLen(queue_length),
        ];
        self.set_link(index, LinkFlags::empty(), attributes).await?;
        // With no link-local address there is no duplicate address detection and no router
        // solicitation.
        let quiet =
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
                In6AddrGenMode::None,
            )])]);
        match self.set_link(index, LinkFlags::empty(), vec![quiet]).await {
            // A kernel without IPv6 assigns no such address.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            result => result?,
        }
        self.set_link(index, LinkFlags::Up, Vec::new()).await
    }

    /// Creates an unconnected interface with addresses.
    pub(crate) async fn add_loose_end(
        &self,
        name: &str,
        addresses: impl Iterator<Item = (IpAddr, u8)>,
    ) -> io::Result<()> {
        const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;
        // A new namespace's interfaces get the lowest free indices; a chosen one needs no lookup.
        const INDEX: u32 = 1000;
        // The peer is not used.
        let mut veth = rtnetlink::LinkVeth::new(name, "other").build();
        veth.header.index = INDEX;
        self.request(RouteNetlinkMessage::NewLink(veth), NEW)
            .await?;
        for (address, prefix) in addresses {
            let mut addition = self.handle.address().add(INDEX, address, prefix);
            let message = std::mem::take(addition.message_mut());
            self.request(RouteNetlinkMessage::NewAddress(message), NEW)
                .await?;
        }
        Ok(())
    }

    /// Leads packets to all destinations that no other route leads to, of the gateway's family, to
    /// a gateway on an interface.
    ///
    /// # Errors
    /// The kernel's: there is such a route already, or no network of the interface has the gateway.
    pub async fn add_default_route(&self, interface: &Interface, gateway: IpAddr) -> Result<()> {
        let index = interface.index;
        let route = match gateway {
            IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
                .output_interface(index)
                .gateway(gateway)
                .build(),
            IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(index)
                .gateway(gateway)
                .build(),
        };
        let message = RouteNetlinkMessage::NewRoute(route);
        let added = self.request(message, NLM_F_CREATE | NLM_F_EXCL).await;
        added.map_err(|why| Error::Set {
            what: "default route",
            interface: interface.name.clone(),
            why,
        })
    }

    /// Changes the MTU of an interface.
    pub(crate) async fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        let attributes = vec![LinkAttribute::Mtu(mtu)];
        self.set_link(index, LinkFlags::empty(), attributes).await
    }

    /// Sets attributes and, if `flags` has any, these flags.
    async fn set_link(
        &self,
        index: u32,
        flags: LinkFlags,
        attributes: Vec<LinkAttribute>,
    ) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = flags;
        message.header.change_mask = flags;
        message.attributes = attributes;
        self.request(RouteNetlinkMessage::SetLink(message), 0).await
    }

    /// Sends a request and waits for its acknowledgement. The error is the kernel's.
    pub(crate) async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self
            .handle
            .clone()
            .request(message)
            .map_err(io::Error::other)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return match error.code {
                    None => Ok(()),
                    Some(code) => Err(from_code(code.get())),
                };
            }
        }
        Err(lost())
    }

    /// Lists all objects of a kind. A list that changed during the dump may be inconsistent: it is
    /// retried up to [`DUMP_ATTEMPTS`] times.
    async fn dump(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut attempts = 0;
        loop {
            let (listed, interrupted) = self.dump_once(message.clone()).await?;
            attempts += 1;
            if !interrupted || attempts == DUMP_ATTEMPTS {
                return Ok(listed);
            }
        }
    }

    async fn dump_once(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<(Vec<RouteNetlinkMessage>, bool)> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self
            .handle
            .clone()
            .request(message)
            .map_err(io::Error::other)?;
        let mut listed = Vec::new();
        let mut interrupted = false;
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => listed.push(message),
                NetlinkPayload::Done(done) if done.code < 0 => return Err(from_code(done.code)),
                NetlinkPayload::Done(_) => return Ok((listed, interrupted)),
                NetlinkPayload::Error(error) => {
                    return Err(error.code.map_or_else(lost, |code| from_code(code.get())));
                }
                _ => {}
            }
        }
        Err(lost())
    }
}

/// The error for netlink's code, a negative errno.
fn from_code(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.saturating_neg())
}

fn lost() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the netlink socket was closed")
}
