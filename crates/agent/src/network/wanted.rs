//! A network as the host wants it: the request of `agent.proto`, checked whole. Called by the other
//! files of `network`.
//!
//! Nothing here asks the kernel or changes anything.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_protocol::agent::{self, SetNetworkRequest};

use super::netlink::{address, family};
use crate::rpc::status::{Failure, Result};

/// Limits of a request, besides the number of devices.
const MOST_ADDRESSES: usize = 64;
const MOST_ROUTES: usize = 1024;
const MOST_NEIGHBOURS: usize = 1024;

/// linux/if.h: IFNAMSIZ without the zero at the end.
const LONGEST_NAME: usize = 15;

/// linux/ipv6.h: a link with less takes no part in IPv6.
pub const IPV6_MIN_MTU: u32 = 1280;

/// linux/ipv6_route.h: what a metric of 0 becomes.
const IPV6_DEFAULT_METRIC: u32 = 1024;

const RTN_UNICAST: u32 = 1;
const RTN_PROHIBIT: u32 = 8;

/// The network. `Default` is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub interfaces: Vec<Interface>,
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub device: u8,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
    pub addresses: Vec<Address>,
    /// Parameter that adds the device to the kernel, if it is not there yet.
    pub plug: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub address: IpAddr,
    pub prefix: u8,
    pub scope: u8,
    pub peer: Option<IpAddr>,
    /// The kernel adds no route to the address's network.
    pub no_prefix_route: bool,
}

/// Interfaces are named by their device, which stays the same when the name changes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Route {
    pub device: Option<u8>,
    /// Unspecified with a prefix of 0: the default route of this family.
    pub destination: IpAddr,
    pub prefix: u8,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub metric: u32,
    pub scope: u8,
    pub on_link: bool,
    /// `RTN_…`
    pub kind: u8,
    pub mtu: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Neighbour {
    pub device: u8,
    pub address: IpAddr,
    pub mac: [u8; 6],
}

impl Wanted {
    /// Checks and converts a request, or says what is wrong with it.
    pub fn check(request: &SetNetworkRequest) -> Result<Self> {
        let mut wanted = Self::default();
        for interface in &request.interfaces {
            let interface = check_interface(interface)?;
            for other in &wanted.interfaces {
                if other.device == interface.device {
                    let device = interface.device;
                    return Err(invalid(format!("net device {device} is named twice")));
                }
                if other.name == interface.name {
                    return Err(refused(&interface.name, "is named twice"));
                }
            }
            wanted.interfaces.push(interface);
        }
        if request.routes.len() > MOST_ROUTES {
            return Err(too_many("routes", request.routes.len(), MOST_ROUTES));
        }
        for route in &request.routes {
            let route = wanted
                .check_route(route)
                .map_err(|problem| invalid(format!("route {}: {problem}", raw_route(route))))?;
            wanted.routes.push(route);
        }
        if request.neighbours.len() > MOST_NEIGHBOURS {
            let number = request.neighbours.len();
            return Err(too_many("neighbours", number, MOST_NEIGHBOURS));
        }
        let mut known = HashSet::new();
        for neighbour in &request.neighbours {
            let neighbour = wanted.check_neighbour(neighbour).map_err(|problem| {
                let address = raw_address(&neighbour.address);
                invalid(format!("neighbour {address}: {problem}"))
            })?;
            if !known.insert((neighbour.device, neighbour.address)) {
                let address = neighbour.address;
                return Err(invalid(format!("neighbour {address} is named twice")));
            }
            wanted.neighbours.push(neighbour);
        }
        Ok(wanted)
    }

    /// The interface on a device.
    pub fn interface(&self, device: u8) -> Option<&Interface> {
        self.interfaces
            .iter()
            .find(|interface| interface.device == device)
    }

    /// The first part that needs IPv6, for messages.
    pub fn first_ipv6(&self) -> Option<String> {
        let addresses = self.interfaces.iter().flat_map(|interface| {
            let named = |address| format!("address {address} of interface {:?}", interface.name);
            interface
                .addresses
                .iter()
                .filter(|address| address.address.is_ipv6())
                .map(named)
        });
        let routes = self
            .routes
            .iter()
            .filter(|route| {
                route.destination.is_ipv6() || route.gateway.is_some_and(|it| it.is_ipv6())
            })
            .map(|route| format!("route {route}"));
        let neighbours = self
            .neighbours
            .iter()
            .filter(|neighbour| neighbour.address.is_ipv6())
            .map(|neighbour| format!("neighbour {}", neighbour.address));
        addresses.chain(routes).chain(neighbours).next()
    }

    /// Union of two networks: all that there can be after one was half replaced by the other.
    pub fn join(&mut self, other: &Self) {
        for interface in &other.interfaces {
            let mine = self
                .interfaces
                .iter_mut()
                .find(|mine| mine.device == interface.device);
            match mine {
                Some(mine) => extend(&mut mine.addresses, &interface.addresses),
                None => self.interfaces.push(interface.clone()),
            }
        }
        extend(&mut self.routes, &other.routes);
        extend(&mut self.neighbours, &other.neighbours);
    }

    fn device_of(&self, name: &str) -> std::result::Result<u8, String> {
        self.interfaces
            .iter()
            .find(|interface| interface.name == name)
            .map(|interface| interface.device)
            .ok_or_else(|| format!("there is no interface {name:?} in the request"))
    }

    fn check_route(&self, route: &agent::Route) -> std::result::Result<Route, String> {
        let optional = |what: &str, bytes: &[u8]| match bytes {
            [] => Ok(None),
            bytes => checked_address(what, bytes).map(Some),
        };
        let gateway = optional("gateway", &route.gateway)?;
        let source = optional("source", &route.source)?;
        let destination = match (optional("destination", &route.destination)?, route.family) {
            (Some(destination), _) => destination,
            (None, 0) if gateway.is_some_and(|gateway| gateway.is_ipv6()) => {
                Ipv6Addr::UNSPECIFIED.into()
            }
            (None, number) if number == libc::AF_INET6 as u32 => Ipv6Addr::UNSPECIFIED.into(),
            (None, _) => Ipv4Addr::UNSPECIFIED.into(),
        };
        if route.family != 0 && route.family != u32::from(family(destination)) {
            return Err(format!(
                "the family {} is not the destination's",
                route.family
            ));
        }
        let prefix = checked_prefix(destination, route.prefix_length)?;
        if route.destination.is_empty() && prefix != 0 {
            return Err(format!("prefix length {prefix} without a destination"));
        }
        if has_host_bits(destination, prefix) {
            return Err(format!(
                "the destination has bits beyond the first {prefix}"
            ));
        }
        if destination.is_ipv6() && gateway.is_some_and(|gateway| gateway.is_ipv4()) {
            return Err("an IPv6 route with an IPv4 gateway".into());
        }
        if source.is_some_and(|source| source.is_ipv6() != destination.is_ipv6()) {
            return Err("the source address is of another family".into());
        }
        let device = match route.type_ {
            RTN_UNICAST => Some(self.device_of(&route.interface)?),
            kind @ 6..=RTN_PROHIBIT => {
                if !route.interface.is_empty() || gateway.is_some() || route.on_link {
                    return Err(format!("type {kind} with an interface or a gateway"));
                }
                None
            }
            kind => return Err(format!("type {kind} is none of 1, 6, 7 and 8")),
        };
        Ok(Route {
            device,
            destination,
            prefix,
            gateway,
            source,
            metric: route.metric,
            scope: checked_scope(route.scope)?,
            on_link: route.on_link,
            kind: route.type_ as u8,
            mtu: route.mtu,
        })
    }

    fn check_neighbour(
        &self,
        neighbour: &agent::Neighbour,
    ) -> std::result::Result<Neighbour, String> {
        Ok(Neighbour {
            device: self.device_of(&neighbour.interface)?,
            address: checked_address("address", &neighbour.address)?,
            mac: checked_mac(&neighbour.mac)?,
        })
    }
}

/// Adds elements that are missing.
fn extend<T: Clone + PartialEq>(list: &mut Vec<T>, more: &[T]) {
    for item in more {
        if !list.contains(item) {
            list.push(item.clone());
        }
    }
}

fn check_interface(interface: &agent::Interface) -> Result<Interface> {
    let name = &interface.name;
    let refuse = |problem: String| refused(name, &problem);
    check_name(name).map_err(|problem| refuse(problem.into()))?;
    let device = u8::try_from(interface.device).map_err(|_| no_device(interface.device))?;
    let mac = checked_mac(&interface.mac).map_err(refuse)?;
    let mtu = interface.mtu;
    if !(68..=65535).contains(&mtu) {
        return Err(refuse(format!("MTU {mtu} is not between 68 and 65535")));
    }
    if interface.addresses.len() > MOST_ADDRESSES {
        let number = interface.addresses.len();
        return Err(refuse(format!(
            "{number} addresses, at most {MOST_ADDRESSES} are taken"
        )));
    }
    let mut addresses: Vec<Address> = Vec::with_capacity(interface.addresses.len());
    for address in &interface.addresses {
        let address = check_address(address).map_err(refuse)?;
        if address.address.is_ipv6() && mtu < IPV6_MIN_MTU {
            return Err(refuse(format!(
                "address {address} with MTU {mtu}, IPv6 needs {IPV6_MIN_MTU}"
            )));
        }
        if addresses.iter().any(|other| other.is_same(&address)) {
            return Err(refuse(format!("address {address} is named twice")));
        }
        addresses.push(address);
    }
    Ok(Interface {
        device,
        name: name.clone(),
        mac,
        mtu,
        addresses,
        plug: (!interface.plug.is_empty()).then(|| interface.plug.clone()),
    })
}

/// Accepts what the kernel allows and does not treat as a pattern.
fn check_name(name: &str) -> std::result::Result<(), &'static str> {
    let forbidden = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | '%');
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err("a name has 1 to 15 bytes");
    }
    if matches!(name, "." | ".." | "lo" | "all" | "default") || name.contains(forbidden) {
        return Err("no interface can have this name");
    }
    Ok(())
}

fn check_address(address: &agent::Address) -> std::result::Result<Address, String> {
    let own = checked_address("address", &address.address)?;
    let peer = match &address.peer[..] {
        [] => None,
        bytes => Some(checked_address("peer", bytes)?),
    };
    if peer.is_some_and(|peer| peer.is_ipv6() != own.is_ipv6()) {
        return Err(format!("the peer of {own} is of another family"));
    }
    Ok(Address {
        address: own,
        prefix: checked_prefix(own, address.prefix_length)?,
        scope: checked_scope(address.scope)?,
        // To the kernel these are the same.
        peer: peer.filter(|peer| *peer != own),
        no_prefix_route: address.no_prefix_route,
    })
}

fn checked_address(what: &str, bytes: &[u8]) -> std::result::Result<IpAddr, String> {
    address(bytes).ok_or_else(|| format!("{what} of {} bytes instead of 4 or 16", bytes.len()))
}

fn checked_mac(bytes: &[u8]) -> std::result::Result<[u8; 6], String> {
    let wrong = |_| format!("hardware address of {} bytes instead of 6", bytes.len());
    bytes.try_into().map_err(wrong)
}

fn checked_prefix(of: IpAddr, prefix: u32) -> std::result::Result<u8, String> {
    let most = bits(of).1;
    u8::try_from(prefix)
        .ok()
        .filter(|prefix| *prefix <= most)
        .ok_or_else(|| format!("prefix length {prefix} of {of} is more than {most}"))
}

fn checked_scope(scope: u32) -> std::result::Result<u8, String> {
    u8::try_from(scope).map_err(|_| format!("scope {scope} is more than 255"))
}

/// An address as a number, and how many bits it has.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (address.to_bits().into(), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

fn has_host_bits(address: IpAddr, prefix: u8) -> bool {
    let (number, length) = bits(address);
    let beyond = 1u128
        .checked_shl(u32::from(length - prefix))
        .map_or(u128::MAX, |bit| bit - 1);
    number & beyond != 0
}

fn invalid(problem: String) -> Failure {
    Failure::invalid(format!("invalid network: {problem}"))
}

fn refused(interface: &str, problem: &str) -> Failure {
    invalid(format!("interface {interface:?}: {problem}"))
}

fn too_many(what: &str, number: usize, most: usize) -> Failure {
    invalid(format!("{number} {what}, at most {most} are taken"))
}

/// The error for a device that this machine does not have.
pub fn no_device(number: u32) -> Failure {
    invalid(format!("this machine has no net device {number}"))
}

/// An address of a request, valid or not, for messages.
fn raw_address(bytes: &[u8]) -> String {
    address(bytes).map_or_else(|| format!("{bytes:?}"), |address| address.to_string())
}

/// A route of a request, valid or not, for messages.
fn raw_route(route: &agent::Route) -> String {
    match route.destination.is_empty() {
        true => "default".into(),
        false => format!(
            "{}/{}",
            raw_address(&route.destination),
            route.prefix_length
        ),
    }
}

impl Address {
    /// Whether the kernel treats both as one: a link cannot have them together.
    fn is_same(&self, other: &Self) -> bool {
        self.address == other.address
            && (self.address.is_ipv6() || (self.prefix, self.peer) == (other.prefix, other.peer))
    }

    /// Broadcast address of the network, if it has one.
    pub fn broadcast(&self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(address) if self.prefix < 31 && self.peer.is_none() => {
                Some((address.to_bits() | (u32::MAX >> self.prefix)).into())
            }
            _ => None,
        }
    }
}

impl Route {
    /// The kernel replaces a route by another one with the same key.
    pub fn key(&self) -> (IpAddr, u8, u32) {
        let metric = match (self.destination, self.metric) {
            (IpAddr::V6(_), 0) => IPV6_DEFAULT_METRIC,
            (_, metric) => metric,
        };
        (self.destination, self.prefix, metric)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.peer {
            None => write!(f, "{}/{}", self.address, self.prefix),
            Some(peer) => write!(f, "{} peer {peer}/{}", self.address, self.prefix),
        }
    }
}

/// Without the interface: the route knows its device only.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            6 => f.write_str("blackhole ")?,
            7 => f.write_str("unreachable ")?,
            8 => f.write_str("prohibit ")?,
            _ => {}
        }
        match (self.prefix, self.destination) {
            (0, IpAddr::V4(_)) => f.write_str("default")?,
            (0, IpAddr::V6(_)) => f.write_str("default (IPv6)")?,
            (prefix, destination) => write!(f, "{destination}/{prefix}")?,
        }
        self.gateway
            .map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
    }
}

#[cfg(test)]
mod tests;
