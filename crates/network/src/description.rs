//! The contents of a namespace, as far as a guest needs them. Created by
//! [`Netlink::describe`](crate::Netlink::describe); the sandbox process sends it to the guest's
//! agent, and compares two of them to find out whether an update is needed.
//!
//! `netlink::reading` decides what belongs to it. Here are only the types, and the order of routes.

use std::net::IpAddr;

/// A namespace as the guest is to see it. If two are equal, the guest needs no update.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// In the order of their indices.
    pub interfaces: Vec<Interface>,
    /// In an order in which they can be added: see [`order`].
    pub routes: Vec<Route>,
    /// Permanent entries only.
    pub neighbours: Vec<Neighbour>,
    /// What a guest cannot have, for reporting to the user.
    pub skipped: Vec<Skipped>,
}

/// An Ethernet device of the namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index, unique for the lifetime of the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind, as in `ip -d link`: `veth`, `macvlan`, …; empty for hardware devices.
    pub kind: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// MTU.
    pub mtu: u32,
    /// Whether it is set up (IFF_UP).
    pub up: bool,
    /// In the kernel's order: with IPv4 the primary address of a network comes before the others.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Length of the prefix of its network, or of the peer's if there is one.
    pub prefix_length: u8,
    /// RT_SCOPE_* of linux/rtnetlink.h.
    pub scope: u8,
    /// Other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// The guest must add the address without a route to its network (IFA_F_NOPREFIXROUTE): the
    /// host's was removed (as the CNI plugin ptp does), or changed and is then listed among the
    /// routes. False if the host has the route that a kernel adds by itself, which is not listed.
    pub no_prefix_route: bool,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Name of one of the interfaces; none if `kind` is not [`RouteKind::Unicast`].
    pub interface: Option<String>,
    /// Destination: `0.0.0.0` or `::` for a default route. Its family is the route's.
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
    /// The gateway is reachable through the interface although no route covers it.
    pub on_link: bool,
    /// What happens to packets.
    pub kind: RouteKind,
    /// Path MTU; 0 for none.
    pub mtu: u32,
}

/// What a route does. As a number: RTN_* of linux/rtnetlink.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum RouteKind {
    /// Forwards packets.
    Unicast = libc::RTN_UNICAST,
    /// Drops packets.
    Blackhole = libc::RTN_BLACKHOLE,
    /// Rejects packets: unreachable.
    Unreachable = libc::RTN_UNREACHABLE,
    /// Rejects packets: prohibited.
    Prohibit = libc::RTN_PROHIBIT,
}

/// A permanent neighbour (ARP or NDP) entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Name of one of the interfaces.
    pub interface: String,
    /// Its IP address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
}

/// Something that a guest cannot have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Name of an interface, or "route 192.0.2.0/24".
    pub name: String,
    /// The reason: completes "NAME is left out: …".
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

    /// Whether it matches every destination.
    pub fn is_default(&self) -> bool {
        self.prefix_length == 0
    }
}

/// Sorts routes so that the kernel accepts them one after the other: a gateway must be reachable
/// when a route names it. On-link routes (also a default route) come first, then routes through a
/// gateway, a default route last. Within these, longer prefixes come first. The result does not
/// depend on the kernel's order.
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
