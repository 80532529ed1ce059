//! Describes a namespace: which of its interfaces, addresses, routes and neighbours a guest gets,
//! and how they are represented. Called by [`Netlink::describe`] only; changes nothing.
//!
//! - Interfaces: Ethernet devices, but neither our taps nor loopback. Not those that another one of
//!   the namespace has already taken the packets of (the ports of a bridge, the VLANs of a device).
//! - Addresses: all but those that failed duplicate address detection, and those learned from
//!   router advertisements: the guest receives these itself, and the host's kernel, which no longer
//!   does, lets them expire.
//! - Routes: those of the main table. Not those that the guest's kernel adds by itself (to the
//!   networks of its addresses), nor those learned from router advertisements or redirects. Of a
//!   multipath route, the first hop that works: the kernel would reject a second hop added as a
//!   route of its own.
//! - Neighbours: permanent ones.

use std::net::IpAddr;

use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol,
};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
    RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Netlink;
use crate::description::{
    Address, Description, Interface, Neighbour, Route, RouteKind, Skipped, network, order,
};
use crate::error::{Error, Result};
use crate::tap;

/// Devices that tunnel drivers put into every namespace. Not reported while they are down.
const UNASKED: [&str; 9] = [
    "erspan0", "gre0", "gretap0", "ip6_vti0", "ip6gre0", "ip6tnl0", "ip_vti0", "sit0", "tunl0",
];

/// Metric of the route to the network of an IPv6 address (IP6_RT_PRIO_ADDRCONF).
const PREFIX_ROUTE_METRIC_6: u32 = 256;

pub(super) async fn describe(netlink: &Netlink) -> Result<Description> {
    let mut links = Vec::new();
    let message = RouteNetlinkMessage::GetLink(LinkMessage::default());
    for listed in list(netlink, "interfaces", message).await? {
        if let RouteNetlinkMessage::NewLink(link) = listed {
            links.push(Link::read(link));
        }
    }
    let mut described = Description::default();
    for link in &links {
        match link.why_not(&links) {
            WhyNot::Wanted => described.interfaces.extend(link.interface()),
            WhyNot::Unasked => {}
            WhyNot::Because(why) => described.skipped.push(Skipped {
                name: link.name.clone(),
                why,
            }),
        }
    }
    described
        .interfaces
        .sort_by_key(|interface| interface.index);

    let message = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    for listed in list(netlink, "addresses", message).await? {
        if let RouteNetlinkMessage::NewAddress(message) = listed
            && let Some(interface) = described
                .interfaces
                .iter_mut()
                .find(|interface| interface.index == message.header.index)
        {
            interface.addresses.extend(address(&message, interface.up));
        }
    }

    let message = RouteNetlinkMessage::GetRoute(RouteMessage::default());
    for listed in list(netlink, "routes", message).await? {
        if let RouteNetlinkMessage::NewRoute(message) = listed {
            add_route(&mut described, message);
        }
    }
    order(&mut described.routes);

    let message = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let listed = list(netlink, "neighbours", message).await?;
    described.neighbours = listed
        .into_iter()
        .filter_map(|listed| match listed {
            RouteNetlinkMessage::NewNeighbour(message) => neighbour(&described.interfaces, message),
            _ => None,
        })
        .collect();
    described
        .neighbours
        .sort_by(|a, b| (&a.interface, a.address).cmp(&(&b.interface, b.address)));
    described.skipped.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(described)
}

async fn list(
    netlink: &Netlink,
    what: &'static str,
    message: RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>> {
    let listed = netlink.dump(message).await;
    listed.map_err(|why| Error::Read { what, why })
}

/// The fields needed from the kernel's link message.
#[derive(Default)]
struct Link {
    index: u32,
    name: String,
    kind: Option<InfoKind>,
    layer: LinkLayerType,
    flags: LinkFlags,
    mac: Vec<u8>,
    mtu: u32,
    /// Index of the bridge, bond or VRF that it is a port of.
    controller: Option<u32>,
    /// Index of the device that it is based on, or of its peer.
    parent: Option<u32>,
    /// The parent is in another namespace.
    parent_elsewhere: bool,
}

/// Whether an interface is for a guest, or why not.
enum WhyNot {
    Wanted,
    Unasked,
    Because(String),
}

impl Link {
    fn read(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            layer: message.header.link_layer_type,
            flags: message.header.flags,
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Link(index) => link.parent = Some(index),
                LinkAttribute::LinkNetNsId(_) => link.parent_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }

    fn why_not(&self, all: &[Link]) -> WhyNot {
        let is_up = self.flags.contains(LinkFlags::Up);
        let is_our_tap = self.name.starts_with(tap::PREFIX) && self.kind == Some(InfoKind::Tun);
        let is_unasked = !is_up && UNASKED.contains(&self.name.as_str());
        if self.flags.contains(LinkFlags::Loopback) || is_our_tap || is_unasked {
            return WhyNot::Unasked;
        }
        if self.layer != LinkLayerType::Ether {
            return WhyNot::Because("it is not an Ethernet device".to_owned());
        }
        if self.mac.len() != 6 {
            return WhyNot::Because("it has no hardware address".to_owned());
        }
        let find = |index| all.iter().find(|link| link.index == index);
        if let Some(controller) = self.controller.and_then(find)
            && controller.kind != Some(InfoKind::Vrf)
        {
            return WhyNot::Because(format!("it is a port of {}", controller.name));
        }
        let is_part = matches!(
            self.kind,
            Some(
                InfoKind::Vlan
                    | InfoKind::MacVlan
                    | InfoKind::MacVtap
                    | InfoKind::IpVlan
                    | InfoKind::IpVtap
            )
        );
        if is_part
            && !self.parent_elsewhere
            && let Some(parent) = self.parent.and_then(find)
        {
            return WhyNot::Because(format!(
                "it is a part of {}, all of whose packets go to the guest",
                parent.name
            ));
        }
        WhyNot::Wanted
    }

    fn interface(&self) -> Option<Interface> {
        Some(Interface {
            index: self.index,
            name: self.name.clone(),
            kind: self
                .kind
                .as_ref()
                .map(InfoKind::to_string)
                .unwrap_or_default(),
            mac: self.mac.as_slice().try_into().ok()?,
            mtu: self.mtu,
            up: self.flags.contains(LinkFlags::Up),
            addresses: Vec::new(),
        })
    }
}

/// An address, if it is for a guest. Whether its prefix route exists is known after reading the
/// routes.
fn address(message: &AddressMessage, interface_is_up: bool) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(AddressProtocol::RouterAnnouncement) => return None,
            _ => {}
        }
    }
    if flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    // IPv4 always has both, IPv6 only if there is a peer.
    let address = local.or(other)?;
    let peer = other.filter(|other| *other != address);
    let prefix_length = message.header.prefix_len;
    let is_alone = match address {
        IpAddr::V4(_) => prefix_length == 32 && peer.is_none(),
        // Each device has a route to fe80::/64.
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    Some(Address {
        address,
        prefix_length,
        scope: message.header.scope.into(),
        peer,
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute)
            || (interface_is_up && !is_alone),
    })
}

/// The fields needed from the kernel's route message, or from a hop of it.
#[derive(Default)]
struct Parts {
    interface: Option<u32>,
    destination: Option<IpAddr>,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    metric: u32,
    mtu: u32,
    table: Option<u32>,
    hops: Vec<RouteNextHop>,
    from_somewhere: bool,
    encapsulated: bool,
}

impl Parts {
    fn read(&mut self, attributes: Vec<RouteAttribute>) {
        for attribute in attributes {
            match attribute {
                RouteAttribute::Oif(index) => self.interface = Some(index),
                RouteAttribute::Destination(address) => self.destination = ip(&address),
                RouteAttribute::Gateway(address) => self.gateway = ip(&address),
                RouteAttribute::Via(RouteVia::Inet(address)) => self.gateway = Some(address.into()),
                RouteAttribute::Via(RouteVia::Inet6(address)) => {
                    self.gateway = Some(address.into())
                }
                RouteAttribute::PrefSource(address) => self.source = ip(&address),
                RouteAttribute::Priority(metric) => self.metric = metric,
                RouteAttribute::Table(table) => self.table = Some(table),
                RouteAttribute::MultiPath(hops) => self.hops = hops,
                RouteAttribute::Source(_) => self.from_somewhere = true,
                RouteAttribute::Encap(_) | RouteAttribute::EncapType(_) => self.encapsulated = true,
                RouteAttribute::Metrics(metrics) => {
                    let mtu = metrics.into_iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(mtu),
                        _ => None,
                    });
                    self.mtu = mtu.unwrap_or(0);
                }
                _ => {}
            }
        }
    }
}

/// Adds a route, if it is for a guest, or records that it is an address's prefix route.
fn add_route(described: &mut Description, message: RouteMessage) {
    let header = message.header;
    let mut parts = Parts::default();
    parts.read(message.attributes);
    let table = parts.table.unwrap_or(header.table.into());
    let learned = [RouteProtocol::Ra, RouteProtocol::IcmpRedirect];
    if table != u32::from(RouteHeader::RT_TABLE_MAIN)
        || header.flags.contains(RouteFlags::Cloned)
        || learned.contains(&header.protocol)
    {
        return;
    }
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => [0; 4].into(),
        AddressFamily::Inet6 => [0; 16].into(),
        _ => return,
    };
    let kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        RouteType::Unreachable => RouteKind::Unreachable,
        RouteType::Prohibit => RouteKind::Prohibit,
        _ => return,
    };
    let mut on_link = header.flags.contains(RouteFlags::Onlink);
    let is_described = |index: u32| {
        described
            .interfaces
            .iter()
            .any(|interface| interface.index == index)
    };
    let hop = std::mem::take(&mut parts.hops).into_iter().find(|hop| {
        !hop.flags.contains(RouteNextHopFlags::Dead) && is_described(hop.interface_index)
    });
    if let Some(hop) = hop {
        on_link = hop.flags.contains(RouteNextHopFlags::Onlink);
        parts.interface = Some(hop.interface_index);
        parts.read(hop.attributes);
    }
    let mut route = Route {
        interface: None,
        destination: parts.destination.unwrap_or(unspecified),
        prefix_length: header.destination_prefix_length,
        gateway: parts.gateway,
        source: parts.source,
        metric: parts.metric,
        scope: header.scope.into(),
        on_link,
        kind,
        mtu: parts.mtu,
    };
    if kind == RouteKind::Unicast {
        // Routes of other devices are not reported: the device was.
        let Some(interface) = described
            .interfaces
            .iter_mut()
            .find(|interface| Some(interface.index) == parts.interface)
        else {
            return;
        };
        if header.protocol == RouteProtocol::Kernel && is_own(&route, interface) {
            return;
        }
        route.interface = Some(interface.name.clone());
    } else if header.protocol == RouteProtocol::Kernel {
        return;
    }
    let why = if parts.from_somewhere || header.source_prefix_length > 0 {
        "it is for packets from some addresses only"
    } else if header.tos != 0 {
        "it is for one type of service only"
    } else if parts.encapsulated {
        "it encapsulates packets"
    } else {
        described.routes.push(route);
        return;
    };
    described.skipped.push(Skipped {
        name: format!("route {}/{}", route.destination, route.prefix_length),
        why: why.to_owned(),
    });
}

/// Whether the kernel added the route for an address or the interface, and would do so in a guest.
/// If for an address, records it there.
fn is_own(route: &Route, interface: &mut Interface) -> bool {
    if route.gateway.is_some() {
        return false;
    }
    let metric = match route.destination {
        IpAddr::V4(_) => 0,
        IpAddr::V6(destination) if destination.is_unicast_link_local() => return true,
        IpAddr::V6(destination) if destination.is_multicast() => return true,
        IpAddr::V6(_) => PREFIX_ROUTE_METRIC_6,
    };
    if route.metric != metric {
        return false;
    }
    let mut own = false;
    for address in &mut interface.addresses {
        let of = address.peer.unwrap_or(address.address);
        if address.prefix_length == route.prefix_length
            && network(of, address.prefix_length) == route.destination
        {
            address.no_prefix_route = false;
            own = true;
        }
    }
    own
}

fn neighbour(interfaces: &[Interface], message: NeighbourMessage) -> Option<Neighbour> {
    let header = message.header;
    if header.state != NeighbourState::Permanent || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let interface = interfaces
        .iter()
        .find(|interface| interface.index == header.ifindex)?;
    let (mut address, mut mac) = (None, None);
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(to)) => {
                address = Some(IpAddr::V4(to));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(to)) => {
                address = Some(IpAddr::V6(to));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        interface: interface.name.clone(),
        address: address?,
        mac: mac?,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: InfoKind, layer: LinkLayerType, flags: LinkFlags) -> Link {
        Link {
            name: name.to_owned(),
            kind: Some(kind),
            layer,
            flags,
            mac: vec![2, 0, 0, 0, 0, 1],
            ..Link::default()
        }
    }

    #[test]
    fn interfaces_that_are_not_for_guests() {
        let (up, down) = (LinkFlags::Up, LinkFlags::empty());
        let wanted = link("eth0", InfoKind::Veth, LinkLayerType::Ether, up);
        assert!(matches!(wanted.why_not(&[]), WhyNot::Wanted));
        for silent in [
            link("sit0", InfoKind::SitTun, LinkLayerType::Sit, down),
            link("gretap0", InfoKind::GreTap, LinkLayerType::Ether, down),
            link("hulltap7", InfoKind::Tun, LinkLayerType::Ether, up),
            link(
                "lo",
                InfoKind::Dummy,
                LinkLayerType::Loopback,
                up | LinkFlags::Loopback,
            ),
        ] {
            assert!(
                matches!(silent.why_not(&[]), WhyNot::Unasked),
                "{}",
                silent.name
            );
        }
        for told in [
            link("sit0", InfoKind::SitTun, LinkLayerType::Sit, up),
            link("wg0", InfoKind::Wireguard, LinkLayerType::None, up),
        ] {
            assert!(
                matches!(told.why_not(&[]), WhyNot::Because(_)),
                "{}",
                told.name
            );
        }
    }

    #[test]
    fn addresses_that_a_guest_gets_by_itself_or_not_at_all() {
        let read = |attribute: Option<AddressAttribute>| {
            let mut message = AddressMessage::default();
            message.header.prefix_len = 64;
            message.attributes = vec![AddressAttribute::Address([0x20; 16].into())];
            message.attributes.extend(attribute);
            address(&message, true)
        };
        assert!(read(None).is_some());
        assert!(read(Some(AddressAttribute::Flags(AddressFlags::Tentative))).is_some());
        assert!(read(Some(AddressAttribute::Flags(AddressFlags::Dadfailed))).is_none());
        let protocol = AddressProtocol::RouterAnnouncement;
        assert!(read(Some(AddressAttribute::Protocol(protocol))).is_none());
    }
}
