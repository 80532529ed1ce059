//! A network namespace with net devices, requests for it, and the state of its kernel as text.

use std::io;
use std::net::IpAddr;

use hull_protocol::agent::{self, SetNetworkRequest};
use hull_protocol::net_device_mac;
use rustix::io::Errno;

use super::super::netlink::{self, Link, Requests, Socket, address, attributes, link_body, number};
use super::super::run;
use super::super::step::{Step, What};
use super::super::wanted::{Address, Route};

pub const MAC: [u8; 6] = [0x02, 0x42, 10, 1, 0, 2];

/// A network namespace for this thread, with `devices` net devices: `eth0`, `eth1`, …, and what
/// they are plugged into, `plug0`, ….
#[allow(unsafe_code)]
pub fn machine(devices: u8) -> Option<Socket> {
    // SAFETY: takes a number; the thread gets a network namespace of its own, and nothing else
    // changes.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        let error = io::Error::last_os_error();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        eprintln!("left out: the guest's network: cannot make a network namespace: {error}");
        return None;
    }
    let socket = Socket::open().unwrap();
    for number in 0..devices {
        let failures = socket.change(veth(number)).unwrap();
        if let Some((_, error)) = failures.first() {
            assert!(matches!(*error, Errno::PERM | Errno::OPNOTSUPP), "{error}");
            eprintln!("left out: the guest's network: cannot make a veth link: {error}");
            return None;
        }
    }
    for number in 0..devices {
        Kernel(&socket).add(&format!("plug{number}"), What::Up);
    }
    Some(socket)
}

pub fn veth(device: u8) -> Requests {
    const IFLA_LINKINFO: u16 = 18;
    let mut requests = Requests::default();
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    requests.begin(libc::RTM_NEWLINK, flags, &link_body(0, 0, 0));
    requests.attribute(netlink::IFLA_IFNAME, format!("eth{device}\0").as_bytes());
    requests.attribute(netlink::IFLA_ADDRESS, &net_device_mac(device));
    requests.nested(IFLA_LINKINFO, |requests| {
        requests.attribute(1, b"veth\0");
        requests.nested(2, |requests| {
            // The peer: a link's structure, and its name as an attribute.
            let name = format!("plug{device}\0");
            let mut peer = link_body(0, 0, 0).to_vec();
            peer.extend((4 + name.len() as u16).to_ne_bytes());
            peer.extend(netlink::IFLA_IFNAME.to_ne_bytes());
            peer.extend(name.as_bytes());
            requests.attribute(1, &peer);
        });
    });
    requests
}

pub fn bytes(text: &str) -> Vec<u8> {
    match text.parse() {
        Ok(IpAddr::V4(address)) => address.octets().to_vec(),
        Ok(IpAddr::V6(address)) => address.octets().to_vec(),
        Err(_) => Vec::new(),
    }
}

pub fn with_prefix(text: &str) -> (Vec<u8>, u32) {
    let (address, prefix) = text.split_once('/').unwrap();
    (bytes(address), prefix.parse().unwrap())
}

pub fn interface(device: u32, name: &str, addresses: &[&str]) -> agent::Interface {
    let mut mac = MAC.to_vec();
    mac[5] += device as u8;
    agent::Interface {
        device,
        name: name.into(),
        mac,
        mtu: 1500,
        addresses: addresses
            .iter()
            .map(|text| {
                let (address, prefix_length) = with_prefix(text);
                agent::Address {
                    address,
                    prefix_length,
                    ..Default::default()
                }
            })
            .collect(),
        ..Default::default()
    }
}

pub fn route(interface: &str, destination: &str, gateway: &str) -> agent::Route {
    let (destination, prefix_length) = with_prefix(destination);
    agent::Route {
        interface: interface.into(),
        destination,
        prefix_length,
        gateway: bytes(gateway),
        scope: match gateway {
            "" => 253,
            _ => 0,
        },
        type_: 1,
        ..Default::default()
    }
}

pub fn neighbour(interface: &str, address: &str) -> agent::Neighbour {
    agent::Neighbour {
        interface: interface.into(),
        address: bytes(address),
        mac: vec![2, 0, 0, 0, 0, 1],
        ..Default::default()
    }
}

pub fn request(interfaces: &[agent::Interface], routes: &[agent::Route]) -> SetNetworkRequest {
    SetNetworkRequest {
        interfaces: interfaces.to_vec(),
        routes: routes.to_vec(),
        ..Default::default()
    }
}

pub fn typical() -> SetNetworkRequest {
    request(
        &[interface(0, "eth0", &["10.1.0.2/24", "fd00::2/64"])],
        &[
            route("eth0", "0.0.0.0/0", "10.1.0.1"),
            route("eth0", "::/0", "fd00::1"),
        ],
    )
}

/// The state of a kernel, as text.
pub struct Kernel<'a>(pub &'a Socket);

impl Kernel<'_> {
    pub fn link(&self, name: &str) -> Option<Link> {
        let mut links = self.0.links().unwrap().into_iter();
        links.find(|link| link.name == name)
    }

    pub fn name(&self, index: u32) -> String {
        let mut links = self.0.links().unwrap().into_iter();
        links.find(|link| link.index == index).unwrap().name
    }

    pub fn addresses(&self, name: &str) -> Vec<String> {
        let link = self.link(name).unwrap().index;
        let addresses = self.0.addresses(libc::AF_UNSPEC as u8).unwrap();
        addresses
            .iter()
            .filter(|address| address.0 == link)
            .map(|(_, address, flags)| {
                let tentative = flags & libc::IFA_F_TENTATIVE != 0;
                format!("{address}{}", if tentative { " tentative" } else { "" })
            })
            .collect()
    }

    /// Routes of the main table, without those that the kernel added by itself.
    pub fn routes(&self) -> Vec<String> {
        let mut routes = Vec::new();
        let mut each = |_: u16, payload: &[u8]| {
            let [_, prefix, _, _, table, protocol, scope, kind] = *payload.first_chunk().unwrap();
            if table != 254 || protocol == 2 {
                return;
            }
            let flags = number(&payload[8..12]).unwrap();
            let mut words = vec![match kind {
                1 => String::new(),
                kind => format!("type {kind} "),
            }];
            let (mut destination, mut rest) = (format!("default/{prefix}"), Vec::new());
            for (kind, value) in attributes(&payload[12..]) {
                match kind {
                    libc::RTA_DST => destination = format!("{}/{prefix}", address(value).unwrap()),
                    libc::RTA_GATEWAY => rest.push(format!("via {}", address(value).unwrap())),
                    18 => rest.push(format!("via {}", address(&value[2..]).unwrap())),
                    libc::RTA_OIF => {
                        rest.push(format!("dev {}", self.name(number(value).unwrap())))
                    }
                    libc::RTA_PREFSRC => rest.push(format!("src {}", address(value).unwrap())),
                    libc::RTA_PRIORITY => rest.push(format!("metric {}", number(value).unwrap())),
                    libc::RTA_MULTIPATH => {
                        let mut hops = value;
                        while let Some(hop) = hops.get(8..) {
                            let length = usize::from(u16::from_ne_bytes([hops[0], hops[1]]));
                            let link = self.name(number(&hops[4..8]).unwrap());
                            let via = attributes(&hop[..length - 8]).next().unwrap().1;
                            rest.push(format!("hop {} {link}", address(via).unwrap()));
                            hops = &hops[length..];
                        }
                    }
                    libc::RTA_METRICS => {
                        for (kind, value) in attributes(value) {
                            rest.push(format!("metrics {kind}={}", number(value).unwrap()));
                        }
                    }
                    _ => {}
                }
            }
            rest.sort();
            words[0] += &destination;
            words.append(&mut rest);
            if scope != 0 {
                words.push(format!("scope {scope}"));
            }
            if flags & 4 != 0 {
                words.push("onlink".into());
            }
            if protocol != 4 {
                words.push(format!("proto {protocol}"));
            }
            routes.push(words.join(" "));
        };
        let second = Socket::open().unwrap();
        second
            .list(libc::RTM_GETROUTE, &[0; 12], &mut each)
            .unwrap();
        routes.sort();
        routes
    }

    pub fn neighbours(&self, name: &str) -> Vec<String> {
        let link = self.link(name).unwrap().index;
        let mut neighbours = Vec::new();
        let mut each = |_: u16, payload: &[u8]| {
            let permanent = payload[8] == 0x80;
            if permanent && number(&payload[4..8]).unwrap() == link {
                let mut found = attributes(&payload[12..]);
                let address = found.find(|(kind, _)| *kind == libc::NDA_DST).unwrap();
                neighbours.push(netlink::address(address.1).unwrap().to_string());
            }
        };
        let list = self.0.list(libc::RTM_GETNEIGH, &[0; 12], &mut each);
        list.unwrap();
        neighbours.sort();
        neighbours
    }

    /// A change made by a container.
    pub fn add(&self, name: &str, what: What<'_>) {
        let step = Step {
            link: self.link(name).unwrap().index,
            name,
            leaving: false,
            what,
        };
        assert!(run(self.0, &[step]).is_ok());
    }
}

pub fn own_address(text: &str) -> Address {
    let (bytes, prefix) = with_prefix(text);
    Address {
        address: address(&bytes).unwrap(),
        prefix: prefix as u8,
        scope: 0,
        peer: None,
        no_prefix_route: false,
    }
}

pub fn own_route(destination: &str, gateway: &str) -> Route {
    let (bytes, prefix) = with_prefix(destination);
    Route {
        device: Some(0),
        destination: address(&bytes).unwrap(),
        prefix: prefix as u8,
        gateway: gateway.parse().ok(),
        source: None,
        metric: 77,
        scope: 0,
        on_link: false,
        kind: 1,
        mtu: 0,
    }
}
