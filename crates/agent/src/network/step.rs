//! One request to the kernel: its encoding, its name, and which failures do not matter. Created by
//! `plan`, carried out by `mod`.

use std::fmt;
use std::net::IpAddr;

use rustix::io::Errno;

use super::netlink::{self, Requests, address_body, family, link_body};
use super::wanted::{Address, Neighbour, Route};

// linux/rtnetlink.h
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTNH_F_ONLINK: u32 = 4;
const RTA_VIA: u16 = 18;
const RTAX_MTU: u16 = 2;

/// A change, and the link that it applies to.
#[derive(Debug)]
pub struct Step<'a> {
    /// The link's index; 0 for a route without one.
    pub link: u32,
    /// The link's name in messages; empty for a route without a link.
    pub name: &'a str,
    /// The link is no longer wanted, and may be gone.
    pub leaving: bool,
    pub what: What<'a>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What<'a> {
    Down,
    Up,
    Rename(String),
    Mac([u8; 6]),
    Mtu(u32),
    /// No automatic IPv6 address when the link comes up.
    NoLinkLocal,
    RemoveAddress(&'a Address),
    AddAddress(&'a Address),
    RemoveRoute(&'a Route),
    AddRoute {
        route: &'a Route,
        /// Replaces routes with the same destination and metric. Otherwise added beside them.
        replace: bool,
    },
    RemoveNeighbour(&'a Neighbour),
    AddNeighbour(&'a Neighbour),
}

impl Step<'_> {
    /// Adds the request.
    pub fn encode(&self, requests: &mut Requests) {
        use libc::{IFF_UP, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
        let mut set = |body| requests.begin(libc::RTM_NEWLINK, 0, body);
        match &self.what {
            What::Down => set(&link_body(self.link, 0, IFF_UP)),
            What::Up => set(&link_body(self.link, IFF_UP, IFF_UP)),
            What::Rename(name) => {
                set(&link_body(self.link, 0, 0));
                let mut zero_terminated = name.clone().into_bytes();
                zero_terminated.push(0);
                requests.attribute(netlink::IFLA_IFNAME, &zero_terminated);
            }
            What::Mac(mac) => {
                set(&link_body(self.link, 0, 0));
                requests.attribute(netlink::IFLA_ADDRESS, mac);
            }
            What::Mtu(mtu) => {
                set(&link_body(self.link, 0, 0));
                requests.attribute(netlink::IFLA_MTU, &mtu.to_ne_bytes());
            }
            What::NoLinkLocal => {
                set(&link_body(self.link, 0, 0));
                requests.nested(netlink::IFLA_AF_SPEC, |requests| {
                    requests.nested(libc::AF_INET6 as u16, |requests| {
                        let mode = [netlink::IN6_ADDR_GEN_MODE_NONE];
                        requests.attribute(netlink::IFLA_INET6_ADDR_GEN_MODE, &mode);
                    });
                });
            }
            What::RemoveAddress(address) => {
                self.encode_address(requests, libc::RTM_DELADDR, 0, address);
            }
            What::AddAddress(address) => {
                let flags = NLM_F_CREATE | NLM_F_REPLACE;
                self.encode_address(requests, libc::RTM_NEWADDR, flags, address);
                // The host has the address already: no duplicate detection.
                let mut flags = libc::IFA_F_NODAD;
                if address.no_prefix_route {
                    flags |= netlink::IFA_F_NOPREFIXROUTE;
                }
                requests.attribute(netlink::IFA_FLAGS, &flags.to_ne_bytes());
                if let Some(broadcast) = address.broadcast() {
                    requests.address(netlink::IFA_BROADCAST, broadcast.into());
                }
            }
            What::RemoveRoute(route) => {
                self.encode_route(requests, libc::RTM_DELROUTE, 0, RT_SCOPE_NOWHERE, route);
            }
            What::AddRoute { route, replace } => {
                let flags = match (*replace, route.destination) {
                    (true, _) => NLM_F_CREATE | NLM_F_REPLACE,
                    // For IPv6 the flag means a route with several next hops.
                    (false, IpAddr::V6(_)) => NLM_F_CREATE,
                    (false, IpAddr::V4(_)) => NLM_F_CREATE | NLM_F_APPEND,
                };
                self.encode_route(requests, libc::RTM_NEWROUTE, flags, route.scope, route);
                if route.mtu != 0 {
                    requests.nested(libc::RTA_METRICS, |requests| {
                        requests.attribute(RTAX_MTU, &route.mtu.to_ne_bytes());
                    });
                }
            }
            What::RemoveNeighbour(neighbour) => {
                self.encode_neighbour(requests, libc::RTM_DELNEIGH, 0, neighbour);
            }
            What::AddNeighbour(neighbour) => {
                let flags = NLM_F_CREATE | NLM_F_REPLACE;
                self.encode_neighbour(requests, libc::RTM_NEWNEIGH, flags, neighbour);
                requests.attribute(libc::NDA_LLADDR, &neighbour.mac);
            }
        }
    }

    fn encode_address(&self, requests: &mut Requests, kind: u16, flags: i32, address: &Address) {
        let family = family(address.address);
        let body = address_body(family, address.prefix, address.scope, self.link);
        requests.begin(kind, flags, &body);
        requests.address(netlink::IFA_LOCAL, address.address);
        requests.address(
            netlink::IFA_ADDRESS,
            address.peer.unwrap_or(address.address),
        );
    }

    fn encode_route(
        &self,
        requests: &mut Requests,
        kind: u16,
        flags: i32,
        scope: u8,
        route: &Route,
    ) {
        let family = family(route.destination);
        // struct rtmsg
        let mut body = [0; 12];
        body[..8].copy_from_slice(&[
            family,
            route.prefix,
            0,
            0,
            RT_TABLE_MAIN,
            RTPROT_STATIC,
            scope,
            route.kind,
        ]);
        if route.on_link {
            body[8..].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        }
        requests.begin(kind, flags, &body);
        requests.address(libc::RTA_DST, route.destination);
        match route.gateway {
            Some(gateway) if netlink::family(gateway) == family => {
                requests.address(libc::RTA_GATEWAY, gateway);
            }
            // struct rtvia
            Some(IpAddr::V6(gateway)) => {
                let mut via = [0; 18];
                via[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
                via[2..].copy_from_slice(&gateway.octets());
                requests.attribute(RTA_VIA, &via);
            }
            _ => {}
        }
        if self.link != 0 {
            requests.attribute(libc::RTA_OIF, &self.link.to_ne_bytes());
        }
        if let Some(source) = route.source {
            requests.address(libc::RTA_PREFSRC, source);
        }
        let metric = route.key().2;
        if metric != 0 {
            requests.attribute(libc::RTA_PRIORITY, &metric.to_ne_bytes());
        }
    }

    fn encode_neighbour(
        &self,
        requests: &mut Requests,
        kind: u16,
        flags: i32,
        neighbour: &Neighbour,
    ) {
        // struct ndmsg
        let mut body = [0; 12];
        body[0] = family(neighbour.address);
        body[4..8].copy_from_slice(&self.link.to_ne_bytes());
        body[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        requests.begin(kind, flags, &body);
        requests.address(libc::NDA_DST, neighbour.address);
    }

    /// Whether the result is as wanted although the kernel refused.
    pub fn tolerates(&self, error: Errno) -> bool {
        if self.leaving && error == Errno::NODEV {
            return true;
        }
        match &self.what {
            // Another link has its first name by now. It keeps the one it has.
            What::Rename(_) => self.leaving && error == Errno::EXIST,
            // Gone already; NXIO if IPv6 is gone from the link.
            What::RemoveAddress(_) => {
                matches!(error, Errno::ADDRNOTAVAIL | Errno::NODEV | Errno::NXIO)
            }
            What::RemoveRoute(_) => matches!(error, Errno::SRCH | Errno::NODEV),
            What::RemoveNeighbour(_) => matches!(error, Errno::NOENT | Errno::NODEV),
            // There already.
            What::AddRoute { replace: false, .. } => error == Errno::EXIST,
            _ => false,
        }
    }

    /// Whether the kernel may accept it while the link is down.
    pub fn is_busy(&self, error: Errno) -> bool {
        error == Errno::BUSY && matches!(self.what, What::Rename(_) | What::Mac(_))
    }
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name;
        match &self.what {
            What::Down => write!(f, "set {name} down"),
            What::Up => write!(f, "set {name} up"),
            What::Rename(new) => write!(f, "rename {name} to {new}"),
            What::Mac(mac) => write!(f, "give {name} the hardware address {}", Mac(mac)),
            What::Mtu(mtu) => write!(f, "set the MTU of {name} to {mtu}"),
            What::NoLinkLocal => write!(f, "turn automatic IPv6 addresses of {name} off"),
            What::RemoveAddress(address) => write!(f, "remove address {address} of {name}"),
            What::AddAddress(address) => write!(f, "add address {address} to {name}"),
            What::RemoveRoute(route) => write!(f, "remove route {route}{}", Dev(name)),
            What::AddRoute { route, .. } => write!(f, "add route {route}{}", Dev(name)),
            What::RemoveNeighbour(neighbour) => {
                write!(f, "remove neighbour {}{}", neighbour.address, Dev(name))
            }
            What::AddNeighbour(neighbour) => {
                let (address, mac) = (neighbour.address, Mac(&neighbour.mac));
                write!(f, "add neighbour {address} with {mac}{}", Dev(name))
            }
        }
    }
}

/// A hardware address in the usual notation.
struct Mac<'a>(&'a [u8; 6]);

impl fmt::Display for Mac<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The device of a route, if it has one.
struct Dev<'a>(&'a str);

impl fmt::Display for Dev<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            name => write!(f, " dev {name}"),
        }
    }
}
