//! What is refused, and with which message.
#![allow(clippy::unwrap_used)]
use super::*;

fn bytes(text: &str) -> Vec<u8> {
    match text.parse() {
        Ok(IpAddr::V4(address)) => address.octets().to_vec(),
        Ok(IpAddr::V6(address)) => address.octets().to_vec(),
        Err(_) => Vec::new(),
    }
}

fn address(text: &str, prefix_length: u32) -> agent::Address {
    agent::Address {
        address: bytes(text),
        prefix_length,
        ..Default::default()
    }
}

fn route(destination: &str, prefix_length: u32, gateway: &str) -> agent::Route {
    agent::Route {
        interface: "eth0".into(),
        destination: bytes(destination),
        prefix_length,
        gateway: bytes(gateway),
        type_: 1,
        ..Default::default()
    }
}

/// A valid network.
fn sound() -> SetNetworkRequest {
    let interface = |device: u32, name: &str| agent::Interface {
        device,
        name: name.into(),
        mac: vec![2, 0, 0, 0, 0, 1],
        mtu: 1500,
        addresses: vec![address("10.1.0.2", 24), address("fd00::2", 64)],
        ..Default::default()
    };
    SetNetworkRequest {
        interfaces: vec![interface(0, "eth0"), interface(1, "net1.5-ü")],
        routes: vec![route("", 0, "10.1.0.1"), route("10.2.0.0", 16, "10.1.0.3")],
        neighbours: vec![agent::Neighbour {
            interface: "eth0".into(),
            address: bytes("10.1.0.1"),
            mac: vec![2, 0, 0, 0, 0, 2],
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[track_caller]
fn refused(change: impl FnOnce(&mut SetNetworkRequest), problem: &str) {
    let mut request = sound();
    change(&mut request);
    let failure = Wanted::check(&request).unwrap_err();
    assert_eq!(failure.code, ttrpc::Code::INVALID_ARGUMENT);
    assert_eq!(failure.message, format!("invalid network: {problem}"));
}

#[test]
fn a_sound_request_is_understood() {
    let wanted = Wanted::check(&sound()).unwrap();
    assert_eq!(wanted.interfaces[1].device, 1);
    assert_eq!(wanted.interfaces[0].addresses[1].to_string(), "fd00::2/64");
    assert_eq!(wanted.routes[0].to_string(), "default via 10.1.0.1");
    assert_eq!(wanted.routes[1].to_string(), "10.2.0.0/16 via 10.1.0.3");
    assert_eq!(wanted.routes[1].device, Some(0));
    let nothing = Wanted::check(&SetNetworkRequest::new()).unwrap();
    assert_eq!(nothing, Wanted::default());
}

#[test]
fn interfaces_are_checked() {
    let name = |name: &'static str| {
        move |request: &mut SetNetworkRequest| request.interfaces[1].name = name.into()
    };
    for bad in ["", "sixteen-letters-"] {
        let problem = format!("interface {bad:?}: a name has 1 to 15 bytes");
        refused(name(bad), &problem);
    }
    for bad in [
        ".", "..", "lo", "a b", "a/b", "a:b", "eth%d", "a\tb", "a\0b", "a\u{a0}b",
    ] {
        let problem = format!("interface {bad:?}: no interface can have this name");
        refused(name(bad), &problem);
    }
    refused(name("eth0"), "interface \"eth0\": is named twice");
    refused(
        |it| it.interfaces[1].device = 0,
        "net device 0 is named twice",
    );
    refused(
        |it| it.interfaces[1].device = 256,
        "this machine has no net device 256",
    );
    refused(
        |it| it.interfaces[0].mac = vec![1; 5],
        "interface \"eth0\": hardware address of 5 bytes instead of 6",
    );
    for mtu in [0, 67, 65536] {
        let problem = format!("interface \"eth0\": MTU {mtu} is not between 68 and 65535");
        refused(|it| it.interfaces[0].mtu = mtu, &problem);
    }
    refused(
        |it| it.interfaces[0].mtu = 1279,
        "interface \"eth0\": address fd00::2/64 with MTU 1279, IPv6 needs 1280",
    );
}

#[test]
fn addresses_are_checked() {
    let cases = [
        (address("", 0), "address of 0 bytes instead of 4 or 16"),
        (
            address("10.0.0.1", 33),
            "prefix length 33 of 10.0.0.1 is more than 32",
        ),
        (
            address("fd00::1", 129),
            "prefix length 129 of fd00::1 is more than 128",
        ),
        (address("fd00::2", 48), "address fd00::2/48 is named twice"),
        (
            address("10.1.0.2", 24),
            "address 10.1.0.2/24 is named twice",
        ),
        (
            agent::Address {
                scope: 256,
                ..address("10.0.0.1", 8)
            },
            "scope 256 is more than 255",
        ),
        (
            agent::Address {
                peer: bytes("fd00::1"),
                ..address("10.0.0.1", 8)
            },
            "the peer of 10.0.0.1 is of another family",
        ),
        (
            agent::Address {
                peer: vec![1],
                ..address("10.0.0.1", 8)
            },
            "peer of 1 bytes instead of 4 or 16",
        ),
    ];
    for (address, problem) in cases {
        let problem = format!("interface \"eth0\": {problem}");
        refused(|it| it.interfaces[0].addresses.push(address), &problem);
    }
    let many = |n: u32| {
        (0..n)
            .map(|n| address(&format!("10.9.0.{n}"), 24))
            .collect()
    };
    refused(
        |it| it.interfaces[0].addresses = many(65),
        "interface \"eth0\": 65 addresses, at most 64 are taken",
    );
    let mut request = sound();
    request.interfaces[0].addresses = many(64);
    assert!(Wanted::check(&request).is_ok());
    // One IPv4 address in two networks.
    request.interfaces[0].addresses = vec![address("10.1.0.2", 24), address("10.1.0.2", 16)];
    assert!(Wanted::check(&request).is_ok());
}

#[test]
fn routes_and_neighbours_are_checked() {
    let elsewhere = agent::Route {
        interface: "eth7".into(),
        ..route("10.0.0.0", 8, "")
    };
    let blackhole = agent::Route {
        type_: 6,
        ..route("10.0.0.0", 8, "")
    };
    let from = agent::Route {
        source: bytes("fd00::2"),
        ..route("10.0.0.0", 8, "")
    };
    let cases = [
        (
            elsewhere,
            "10.0.0.0/8: there is no interface \"eth7\" in the request",
        ),
        (
            blackhole,
            "10.0.0.0/8: type 6 with an interface or a gateway",
        ),
        (from, "10.0.0.0/8: the source address is of another family"),
        (
            route("10.0.0.1", 8, ""),
            "10.0.0.1/8: the destination has bits beyond the first 8",
        ),
        (
            route("10.0.0.0", 40, ""),
            "10.0.0.0/40: prefix length 40 of 10.0.0.0 is more than 32",
        ),
        (
            route("", 8, ""),
            "default: prefix length 8 without a destination",
        ),
        (
            route("fd00::", 8, "10.1.0.1"),
            "fd00::/8: an IPv6 route with an IPv4 gateway",
        ),
        (
            agent::Route {
                type_: 2,
                ..route("10.0.0.0", 8, "")
            },
            "10.0.0.0/8: type 2 is none of 1, 6, 7 and 8",
        ),
        (
            agent::Route {
                family: 10,
                ..route("10.0.0.0", 8, "")
            },
            "10.0.0.0/8: the family 10 is not the destination's",
        ),
        (
            agent::Route {
                destination: vec![1, 2, 3],
                ..route("", 8, "")
            },
            "[1, 2, 3]/8: destination of 3 bytes instead of 4 or 16",
        ),
    ];
    for (route, problem) in cases {
        refused(|it| it.routes.push(route), &format!("route {problem}"));
    }
    refused(
        |it| it.routes = vec![route("", 0, "10.1.0.1"); 1025],
        "1025 routes, at most 1024 are taken",
    );
    refused(
        |it| it.neighbours = vec![it.neighbours[0].clone(); 1025],
        "1025 neighbours, at most 1024 are taken",
    );
    refused(
        |it| it.neighbours.push(it.neighbours[0].clone()),
        "neighbour 10.1.0.1 is named twice",
    );
    refused(
        |it| it.neighbours[0].mac.clear(),
        "neighbour 10.1.0.1: hardware address of 0 bytes instead of 6",
    );
}

#[test]
fn a_default_route_s_family_is_its_gateway_s_or_told() {
    let family = |family: u32, gateway: &str| {
        let mut request = sound();
        request.routes = vec![agent::Route {
            family,
            ..route("", 0, gateway)
        }];
        let destination = Wanted::check(&request).unwrap().routes[0].destination;
        destination.to_string()
    };
    assert_eq!(family(0, "10.1.0.1"), "0.0.0.0");
    assert_eq!(family(0, "fd00::1"), "::");
    assert_eq!(family(0, ""), "0.0.0.0");
    assert_eq!(family(10, ""), "::");
    assert_eq!(family(2, "fd00::1"), "0.0.0.0");
}

#[test]
fn broadcast_addresses_are_as_usual() {
    let broadcast = |text: &str, prefix: u32| {
        let address = check_address(&address(text, prefix)).unwrap();
        address.broadcast().map(|address| address.to_string())
    };
    assert_eq!(broadcast("10.1.2.3", 24).unwrap(), "10.1.2.255");
    assert_eq!(broadcast("10.1.2.3", 30).unwrap(), "10.1.2.3");
    assert_eq!(broadcast("10.1.2.3", 0).unwrap(), "255.255.255.255");
    assert_eq!(broadcast("10.1.2.3", 31), None);
    assert_eq!(broadcast("10.1.2.3", 32), None);
    assert_eq!(broadcast("fd00::1", 8), None);
}

#[test]
fn joined_networks_have_what_either_has() {
    let mut one = Wanted::check(&sound()).unwrap();
    let mut request = sound();
    request.interfaces.remove(0);
    request.interfaces[0].addresses = vec![address("10.1.0.2", 24), address("10.1.0.3", 24)];
    request.routes.clear();
    request.neighbours.clear();
    let other = Wanted::check(&request).unwrap();
    let before = one.clone();
    one.join(&other);
    assert_eq!(one.interfaces[0], before.interfaces[0]);
    assert_eq!(one.interfaces[1].addresses.len(), 3);
    assert_eq!(
        (&one.routes, &one.neighbours),
        (&before.routes, &before.neighbours)
    );
    let joined = one.clone();
    one.join(&before);
    assert_eq!(one, joined);
}
