//! What is in a namespace, as far as a guest needs it. Made by
//! [`Netlink::describe`](crate::Netlink::describe); the sandbox process sends it to the guest's
//! agent, and compares two of them to see whether there is something to send.
//!
//! The rules of what belongs to it are in `netlink::reading`. Here are only the words, and the
//! order of routes.

use std::net::IpAddr;

/// A namespace as a guest is to have it. Two that are equal need nothing done in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// In the order of their indices.
    pub interfaces: Vec<Interface>,
    /// In an order in which they can be added: see [`order`].
    pub routes: Vec<Route>,
    /// Permanent entries only.
    pub neighbours: Vec<Neighbour>,
    /// What a guest cannot have, so that a person can be told.
    pub skipped: Vec<Skipped>,
}

/// An Ethernet device of the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace: another interface never gets it as long as the namespace lives.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is, as in `ip -d link`: `veth`, `macvlan`, …; empty for a device of hardware.
    pub kind: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest packet.
    pub mtu: u32,
    /// Somebody set it up.
    pub up: bool,
    /// In the kernel's order: with IPv4 the primary address of a network comes before the others.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Of the network that it is in; of the peer, if there is one.
    pub prefix_length: u8,
    /// RT_SCOPE_* of linux/rtnetlink.h.
    pub scope: u8,
    /// Other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The guest is to add the address without a route to its network (IFA_F_NOPREFIXROUTE): the
    /// host has no such route, because somebody took it away (the CNI plugin ptp does) or changed
    /// it, and then it is among the routes. False when the route is the one that a kernel makes by
    /// itself: then it is not among the routes.
    pub no_prefix_route: bool,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Name of one of the interfaces; none if `kind` is not [`RouteKind::Unicast`].
    pub interface: Option<String>,
    /// Where it leads to: `0.0.0.0` or `::` for a default route. Its family is the route's.
    pub destination: IpAddr,
    /// 0 for a default route.
    pub prefix_length: u8,
    /// Next hop. May be an IPv6 address although the destination is IPv4.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// 0 for none. The kernel's default is 0 for IPv4, 1024 for IPv6.
    pub metric: u32,
    /// RT_SCOPE_* of linux/rtnetlink.h.
    pub scope: u8,
    /// The gateway is reached through the interface although no route says so.
    pub on_link: bool,
    /// What becomes of packets.
    pub kind: RouteKind,
    /// Path MTU; 0 for none.
    pub mtu: u32,
}

/// What a route does. As a number: RTN_* of linux/rtnetlink.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RouteKind {
    /// Sends packets.
    Unicast = libc::RTN_UNICAST,
    /// Drops them.
    Blackhole = libc::RTN_BLACKHOLE,
    /// Answers: unreachable.
    Unreachable = libc::RTN_UNREACHABLE,
    /// Answers: prohibited.
    Prohibit = libc::RTN_PROHIBIT,
}

/// A permanent neighbour (ARP or NDP) entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Name of one of the interfaces.
    pub interface: String,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// Something that a guest cannot have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Name of an interface, or "route 192.0.2.0/24".
    pub name: String,
    /// Why not: completes "NAME is left out: …".
    pub why: String,
}

impl Route {
    /// AF_INET or AF_INET6.
    pub fn family(&self) -> u8 {
        match self.destination {
            IpAddr::V4(_) => libc::AF_INET as u8,
            IpAddr::V6(_) => libc::AF_INET6 as u8,
        }
    }

    /// It leads everywhere.
    pub fn is_default(&self) -> bool {
        self.prefix_length == 0
    }
}

/// Puts routes in an order in which the kernel takes them: a gateway must be reachable when a route
/// names it. So first what is on the link (the default route, too, if it is), then what is behind a
/// gateway, a default route last. Among these the narrower come first. The order does not depend on
/// that in which the kernel lists them.
pub fn order(routes: &mut [Route]) {
    routes.sort_by_cached_key(|route| {
        (
            route.gateway.is_some(),
            std::cmp::Reverse(route.prefix_length),
            route.destination,
            route.metric,
            route.interface.clone(),
            route.gateway,
            route.kind,
        )
    });
}

/// The network that an address is in: its first `prefix_length` bits.
pub(crate) fn network(address: IpAddr, prefix_length: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix_length.min(32)));
            IpAddr::V4((u32::from(address) & mask.unwrap_or(0)).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix_length.min(128)));
            IpAddr::V6((u128::from(address) & mask.unwrap_or(0)).into())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn route(destination: &str, prefix_length: u8, gateway: Option<&str>) -> Route {
        Route {
            interface: Some("eth0".to_owned()),
            destination: destination.parse().unwrap(),
            prefix_length,
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            source: None,
            metric: 0,
            scope: 0,
            on_link: false,
            kind: RouteKind::Unicast,
            mtu: 0,
        }
    }

    #[test]
    fn gateways_are_reachable_when_they_are_named() {
        let sorted = [
            route("169.254.1.1", 32, None),
            route("10.9.0.0", 16, None),
            route("0.0.0.0", 0, None),
            route("10.8.7.6", 32, Some("10.9.0.1")),
            route("10.8.0.0", 16, Some("10.9.0.1")),
            route("0.0.0.0", 0, Some("169.254.1.1")),
        ];
        let mut routes = sorted.to_vec();
        routes.reverse();
        order(&mut routes);
        assert_eq!(routes, sorted);
    }

    #[test]
    fn networks_of_addresses() {
        for (address, length, expected) in [
            ("10.1.2.3", 24, "10.1.2.0"),
            ("10.1.2.3", 32, "10.1.2.3"),
            ("10.1.2.3", 0, "0.0.0.0"),
            ("fd00:1::5", 64, "fd00:1::"),
            ("fd00:1::5", 128, "fd00:1::5"),
            ("fd00:1::5", 0, "::"),
        ] {
            assert_eq!(
                network(address.parse().unwrap(), length),
                expected.parse::<IpAddr>().unwrap()
            );
        }
    }
}
