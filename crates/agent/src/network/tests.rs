//! Whole requests against the kernel of the machine that runs the tests, in a network namespace of
//! each test's own. It needs root and veth links, which stand for the machine's net devices;
//! without, the tests report it and pass.
#![allow(clippy::unwrap_used)]

mod kernel;

use hull_protocol::agent;

use self::kernel::*;
use super::netlink::{attributes, link_body};
use super::wanted::Neighbour;
use super::*;

#[test]
fn a_device_becomes_an_interface_with_everything() {
    let Some(socket) = machine(2) else { return };
    let kernel = Kernel(&socket);
    let loopback = kernel.link("lo").unwrap();
    let mut wanted = typical();
    wanted.interfaces[0].name = "net7".into();
    wanted.interfaces[0].mtu = 1400;
    for route in &mut wanted.routes {
        route.interface = "net7".into();
    }
    wanted.neighbours = vec![neighbour("net7", "10.1.0.1"), neighbour("net7", "fd00::1")];
    let mut network = Network::default();
    network.apply(&wanted).unwrap();

    let link = kernel.link("net7").unwrap();
    assert_eq!((link.mac, link.mtu, link.up), (Some(MAC), 1400, true));
    // No link-local address that was not asked for, and no waiting for duplicate detection.
    assert_eq!(kernel.addresses("net7"), ["10.1.0.2/24", "fd00::2/64"]);
    let routes = [
        "default/0 dev net7 metric 1024 via fd00::1",
        "default/0 dev net7 via 10.1.0.1",
    ];
    assert_eq!(kernel.routes(), routes);
    assert_eq!(kernel.neighbours("net7"), ["10.1.0.1", "fd00::1"]);
    assert_eq!(kernel.link("lo").unwrap(), loopback);
    assert!(!kernel.link("eth1").unwrap().up);
    assert!(kernel.link("eth0").is_none());
    let mut broadcasts = Vec::new();
    let body = netlink::address_body(0, 0, 0, 0);
    let mut each = |_: u16, payload: &[u8]| {
        let found = attributes(&payload[8..]).find(|(kind, _)| *kind == netlink::IFA_BROADCAST);
        broadcasts.extend(found.map(|(_, value)| value.to_vec()));
    };
    socket.list(libc::RTM_GETADDR, &body, &mut each).unwrap();
    assert_eq!(broadcasts, [[10, 1, 0, 255]]);

    network.apply(&wanted).unwrap();
    assert_eq!(kernel.addresses("net7"), ["10.1.0.2/24", "fd00::2/64"]);
    assert_eq!(kernel.routes(), routes);
}

#[test]
fn an_interface_without_ipv6_addresses_has_no_link_local_one() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let without = request(&[interface(0, "eth0", &["10.1.0.2/24"])], &[]);
    network.apply(&without).unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.1.0.2/24"]);
    // Nor when IPv6 comes to the link later.
    let mut small = without.clone();
    small.interfaces[0].mtu = 1000;
    network.apply(&small).unwrap();
    network.apply(&without).unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.1.0.2/24"]);
    let list = ["10.1.0.2/24", "fe80::42:aff:fe01:2/64"];
    network
        .apply(&request(&[interface(0, "eth0", &list)], &[]))
        .unwrap();
    assert_eq!(kernel.addresses("eth0"), list);
}

#[test]
fn a_route_s_fields_all_arrive() {
    let Some(socket) = machine(2) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let with = |change: fn(&mut agent::Route), mut route: agent::Route| {
        change(&mut route);
        route
    };
    let nowhere = |kind: u32, destination: &str| agent::Route {
        interface: String::new(),
        type_: kind,
        scope: 0,
        ..route("", destination, "")
    };
    let mut plain = interface(0, "eth0", &["10.1.0.2/24", "fd00::2/64"]);
    plain.addresses[0].no_prefix_route = true;
    plain.addresses[1].no_prefix_route = true;
    let wanted = request(
        &[plain, interface(1, "eth1", &["10.1.1.2/24"])],
        &[
            route("eth0", "10.1.0.1/32", ""),
            route("eth0", "fe80::/64", ""),
            route("eth1", "fe80::/64", ""),
            route("eth0", "10.2.0.0/16", "10.1.0.1"),
            with(
                |it| (it.source, it.metric, it.mtu) = (bytes("10.1.0.2"), 50, 1300),
                route("eth0", "10.3.0.0/16", "10.1.0.1"),
            ),
            with(
                |it| it.on_link = true,
                route("eth1", "10.4.0.0/16", "172.16.0.1"),
            ),
            with(|it| it.family = 2, route("eth0", "10.5.0.0/16", "fe80::1")),
            with(
                |it| (it.source, it.mtu) = (bytes("fd00::2"), 1290),
                route("eth0", "fd05::/16", "fe80::1"),
            ),
            nowhere(6, "10.6.0.0/16"),
            nowhere(7, "fd07::/16"),
            nowhere(8, "10.8.0.0/16"),
            // One destination, two ways: with IPv4 the second is spare, with IPv6 both are used.
            route("eth0", "10.9.0.0/16", "10.1.0.1"),
            route("eth1", "10.9.0.0/16", "10.1.1.1"),
            route("eth0", "fd09::/16", "fe80::1"),
            route("eth1", "fd09::/16", "fe80::2"),
        ],
    );
    network.apply(&wanted).unwrap();
    let expected = [
        "10.1.0.1/32 dev eth0 scope 253",
        "10.2.0.0/16 dev eth0 via 10.1.0.1",
        "10.3.0.0/16 dev eth0 metric 50 metrics 2=1300 src 10.1.0.2 via 10.1.0.1",
        "10.4.0.0/16 dev eth1 via 172.16.0.1 onlink",
        "10.5.0.0/16 dev eth0 via fe80::1",
        "10.9.0.0/16 dev eth0 via 10.1.0.1",
        "10.9.0.0/16 dev eth1 via 10.1.1.1",
        "fd05::/16 dev eth0 metric 1024 metrics 2=1290 src fd00::2 via fe80::1",
        "fd09::/16 hop fe80::1 eth0 hop fe80::2 eth1 metric 1024",
        "fe80::/64 dev eth0 metric 1024",
        "fe80::/64 dev eth1 metric 1024",
        "type 6 10.6.0.0/16",
        "type 7 fd07::/16 dev lo metric 1024",
        "type 8 10.8.0.0/16",
    ];
    assert_eq!(kernel.routes(), expected);
    // If in doubt, everything is configured anew, and is as it was.
    network.settled = false;
    network.apply(&wanted).unwrap();
    assert_eq!(kernel.routes(), expected);
    // Of addresses without a route to their network there is none; of others there is.
    let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap();
    assert!(
        !routes.contains("\n*\t0001010A") && !routes.contains("eth0\t0000010A"),
        "{routes}"
    );
    assert!(routes.contains("eth1\t0001010A"), "{routes}");
    // Then all of them go.
    network.apply(&request(&wanted.interfaces, &[])).unwrap();
    assert_eq!(kernel.routes(), [""; 0]);
}

#[test]
fn only_what_changed_changes_and_what_containers_added_stays() {
    let Some(socket) = machine(2) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = typical();
    wanted.interfaces[0] = interface(
        0,
        "eth0",
        &[
            "10.1.0.2/24",
            "10.1.0.3/24",
            "10.5.0.2/24",
            "fd00::2/64",
            "fd00::3/64",
        ],
    );
    wanted.routes.push(route("eth0", "10.7.0.0/16", "10.5.0.1"));
    wanted.neighbours = vec![neighbour("eth0", "10.1.0.1"), neighbour("eth0", "10.1.0.9")];
    network.apply(&wanted).unwrap();

    let (address4, address6) = (own_address("10.77.0.2/24"), own_address("fd77::2/64"));
    let (route4, route6) = (
        own_route("10.78.0.0/16", "10.77.0.1"),
        own_route("fd78::/32", "fd77::1"),
    );
    kernel.add("eth0", What::AddAddress(&address4));
    kernel.add("eth0", What::AddAddress(&address6));
    for route in [&route4, &route6] {
        kernel.add(
            "eth0",
            What::AddRoute {
                route,
                replace: true,
            },
        );
    }
    let own = Neighbour {
        device: 0,
        address: "10.77.0.1".parse().unwrap(),
        mac: [2; 6],
    };
    kernel.add("eth0", What::AddNeighbour(&own));

    // The first address of a network goes; the kernel would have the second go with it, and routes.
    wanted.interfaces[0].addresses.remove(0);
    wanted.interfaces[0].addresses.remove(2);
    wanted.interfaces[0].mtu = 1400;
    wanted.routes.remove(2);
    wanted.routes[0].gateway = bytes("10.1.0.4");
    wanted.neighbours.remove(1);
    network.apply(&wanted).unwrap();
    let mut addresses = kernel.addresses("eth0");
    addresses.sort();
    assert_eq!(
        addresses,
        [
            "10.1.0.3/24",
            "10.5.0.2/24",
            "10.77.0.2/24",
            "fd00::3/64",
            "fd77::2/64"
        ]
    );
    assert_eq!(
        kernel.routes(),
        [
            "10.78.0.0/16 dev eth0 metric 77 via 10.77.0.1",
            "default/0 dev eth0 metric 1024 via fd00::1",
            "default/0 dev eth0 via 10.1.0.4",
            "fd78::/32 dev eth0 metric 77 via fd77::1",
        ]
    );
    assert_eq!(kernel.neighbours("eth0"), ["10.1.0.1", "10.77.0.1"]);
    assert_eq!(kernel.link("eth0").unwrap().mtu, 1400);

    // Already gone, removed by a container.
    kernel.add(
        "eth0",
        What::RemoveNeighbour(&network.brought.neighbours[0]),
    );
    kernel.add("eth0", What::RemoveRoute(&network.brought.routes[0]));
    let gone = network.brought.interfaces[0].addresses[0].clone();
    kernel.add("eth0", What::RemoveAddress(&gone));
    wanted.interfaces[0].addresses.remove(0);
    wanted.routes.clear();
    wanted.neighbours.clear();
    network.apply(&wanted).unwrap();
    let mut addresses = kernel.addresses("eth0");
    addresses.sort();
    assert_eq!(
        addresses,
        ["10.5.0.2/24", "10.77.0.2/24", "fd00::3/64", "fd77::2/64"]
    );
}

#[test]
fn interfaces_swap_their_names_and_keep_the_rest() {
    // As for newer kernels, and as for older ones.
    for careful in [false, true] {
        let Some(socket) = machine(2) else { return };
        let kernel = Kernel(&socket);
        let mut network = Network {
            careful,
            ..Default::default()
        };
        let mut wanted = typical();
        wanted
            .interfaces
            .push(interface(1, "eth1", &["10.2.0.2/24", "fd02::2/64"]));
        wanted.routes.push(route("eth1", "10.9.0.0/16", "10.2.0.1"));
        wanted.neighbours = vec![neighbour("eth0", "10.1.0.1"), neighbour("eth0", "fd00::1")];
        network.apply(&wanted).unwrap();
        let own = own_address("10.77.0.2/24");
        kernel.add("eth0", What::AddAddress(&own));

        let swap = |name: &mut String| {
            *name = if name == "eth0" { "eth1" } else { "eth0" }.into();
        };
        for interface in &mut wanted.interfaces {
            swap(&mut interface.name);
        }
        for route in &mut wanted.routes {
            swap(&mut route.interface);
        }
        for neighbour in &mut wanted.neighbours {
            swap(&mut neighbour.interface);
        }
        // Then one gets another hardware address.
        wanted.interfaces[0].mac = vec![2, 7, 7, 7, 7, 7];
        network.apply(&wanted).unwrap();
        assert_eq!(kernel.link("eth1").unwrap().mac, Some([2, 7, 7, 7, 7, 7]));
        assert_eq!(
            kernel.addresses("eth1"),
            ["10.1.0.2/24", "10.77.0.2/24", "fd00::2/64"]
        );
        assert_eq!(kernel.addresses("eth0"), ["10.2.0.2/24", "fd02::2/64"]);
        assert_eq!(
            kernel.routes(),
            [
                "10.9.0.0/16 dev eth0 via 10.2.0.1",
                "default/0 dev eth1 metric 1024 via fd00::1",
                "default/0 dev eth1 via 10.1.0.1",
            ]
        );
        assert_eq!(kernel.neighbours("eth1"), ["10.1.0.1", "fd00::1"]);
        assert!(kernel.link("eth0").unwrap().up && kernel.link("eth1").unwrap().up);
    }
}

#[test]
fn an_interface_that_goes_leaves_a_device_for_the_next() {
    let Some(socket) = machine(2) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let second = interface(1, "eth1", &["10.2.0.2/24", "fd02::2/64"]);
    let mut wanted = typical();
    wanted.interfaces[0].name = "first".into();
    wanted.interfaces[0].mtu = 1300;
    for route in &mut wanted.routes {
        route.interface = "first".into();
    }
    wanted.neighbours = vec![neighbour("first", "10.1.0.1")];
    wanted.interfaces.push(second.clone());
    // Its source is the other interface's address.
    let from = agent::Route {
        source: bytes("10.2.0.2"),
        ..route("eth1", "10.9.0.0/16", "10.2.0.1")
    };
    wanted.routes.push(from.clone());
    network.apply(&wanted).unwrap();
    let own = own_address("10.77.0.2/24");
    kernel.add("first", What::AddAddress(&own));

    network.apply(&request(&[second], &[from])).unwrap();
    let idle = kernel.link("eth0").unwrap();
    assert_eq!(
        (idle.mac, idle.mtu, idle.up),
        (Some(net_device_mac(0)), 1500, false)
    );
    assert_eq!(kernel.addresses("eth0"), [""; 0]);
    assert_eq!(kernel.neighbours("eth0"), [""; 0]);
    let route = "10.9.0.0/16 dev eth1 src 10.2.0.2 via 10.2.0.1";
    assert_eq!(kernel.routes(), [route]);
    assert_eq!(kernel.addresses("eth1"), ["10.2.0.2/24", "fd02::2/64"]);

    network.apply(&typical()).unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.1.0.2/24", "fd00::2/64"]);
    assert_eq!(kernel.link("eth0").unwrap().mac, Some(MAC));
    assert_eq!(kernel.link("eth1").unwrap().mac, Some(net_device_mac(1)));
    assert_eq!(kernel.routes().len(), 2);
    network.apply(&SetNetworkRequest::new()).unwrap();
    assert_eq!(kernel.routes(), [""; 0]);

    // The other device is to have the name that an idle one has; then the idle one is needed too.
    let other = interface(1, "eth0", &["10.2.0.2/24"]);
    network
        .apply(&request(std::slice::from_ref(&other), &[]))
        .unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.2.0.2/24"]);
    assert!(!kernel.link("hull0").unwrap().up);
    let both = request(&[other, interface(0, "eth1", &["10.1.0.2/24"])], &[]);
    network.apply(&both).unwrap();
    assert_eq!(kernel.addresses("eth1"), ["10.1.0.2/24"]);
    assert_eq!(socket.links().unwrap().len(), 5);
}

#[test]
fn a_first_name_that_somebody_took_is_not_had_back() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = request(&[interface(0, "first", &[])], &[]);
    network.apply(&wanted).unwrap();
    kernel.add("plug0", What::Rename("eth0".into()));
    network.apply(&SetNetworkRequest::new()).unwrap();
    let idle = kernel.link("first").unwrap();
    assert_eq!((idle.mac, idle.up), (Some(net_device_mac(0)), false));
    wanted.interfaces[0].name = "second".into();
    network.apply(&wanted).unwrap();
    assert!(kernel.link("second").unwrap().up);
    // The kernel refuses a name that another link has, and the call can be repeated with another
    // one.
    wanted.interfaces[0].name = "eth0".into();
    let failure = network.apply(&wanted).unwrap_err();
    assert_eq!(failure.message, "cannot rename second to eth0: File exists");
    wanted.interfaces[0].name = "third".into();
    network.apply(&wanted).unwrap();
    assert!(kernel.link("third").unwrap().up);
}

#[test]
fn a_failure_names_what_failed_and_the_call_can_be_repeated() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = typical();
    wanted
        .routes
        .insert(0, route("eth0", "10.9.0.0/16", "10.1.0.1"));
    wanted
        .routes
        .insert(1, route("eth0", "10.0.0.0/8", "10.66.0.1"));
    wanted
        .routes
        .push(route("eth0", "10.8.0.0/16", "10.66.0.1"));
    for _ in 0..2 {
        let failure = network.apply(&wanted).unwrap_err();
        assert_eq!(failure.code, Code::INTERNAL);
        assert_eq!(
            failure.message,
            "cannot add route 10.0.0.0/8 via 10.66.0.1 dev eth0: Network is unreachable"
        );
    }
    // The host changes its mind, and nothing of what it gave up stays.
    network.apply(&typical()).unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.1.0.2/24", "fd00::2/64"]);
    assert_eq!(
        kernel.routes(),
        [
            "default/0 dev eth0 metric 1024 via fd00::1",
            "default/0 dev eth0 via 10.1.0.1",
        ]
    );
    let mut wanted = typical();
    wanted.interfaces[0].mac = vec![1, 0, 0, 0, 0, 0];
    let failure = network.apply(&wanted).unwrap_err();
    assert_eq!(
        failure.message,
        "cannot give eth0 the hardware address 01:00:00:00:00:00: Cannot assign requested address"
    );
    network.apply(&SetNetworkRequest::new()).unwrap();
    assert_eq!(kernel.addresses("eth0"), [""; 0]);
    assert!(!kernel.link("eth0").unwrap().up);
}

#[test]
fn a_device_that_is_not_there_is_refused_before_anything_changes() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = typical();
    wanted.interfaces.push(interface(1, "eth1", &[]));
    let failure = network.apply(&wanted).unwrap_err();
    assert_eq!(failure.code, Code::INVALID_ARGUMENT);
    assert_eq!(
        failure.message,
        "invalid network: this machine has no net device 1"
    );
    assert!(!kernel.link("eth0").unwrap().up);
    // It comes, and another one goes.
    network.apply(&typical()).unwrap();
    assert!(socket.change(veth(1)).unwrap().is_empty());
    network.apply(&wanted).unwrap();
    assert!(kernel.link("eth1").unwrap().up);
    let mut requests = Requests::default();
    let index = kernel.link("eth0").unwrap().index;
    requests.begin(libc::RTM_DELLINK, 0, &link_body(index, 0, 0));
    assert!(socket.change(requests).unwrap().is_empty());
    network
        .apply(&request(&wanted.interfaces[1..], &[]))
        .unwrap();
    let failure = network.apply(&wanted).unwrap_err();
    assert_eq!(
        failure.message,
        "invalid network: this machine has no net device 0"
    );
    network
        .apply(&request(&[interface(1, "eth0", &["10.2.0.2/24"])], &[]))
        .unwrap();
    assert_eq!(kernel.addresses("eth0"), ["10.2.0.2/24"]);
}

#[test]
fn a_guest_without_ipv6_says_so() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    network.apply(&SetNetworkRequest::new()).unwrap();
    network.ipv6 = false;
    let failure = network.apply(&typical());
    assert_eq!(
        failure.unwrap_err().message,
        "cannot add address fd00::2/64 of interface \"eth0\": the guest's kernel has no IPv6"
    );
    assert!(!kernel.link("eth0").unwrap().up);
    let mut wanted = typical();
    wanted.interfaces[0].addresses.pop();
    wanted.routes.pop();
    network.apply(&wanted).unwrap();
    assert_eq!(kernel.routes(), ["default/0 dev eth0 via 10.1.0.1"]);
}

#[test]
fn as_much_as_a_request_may_have_is_taken() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = typical();
    let text = |n: u32| format!("10.{}.{}.0/24", 100 + n / 256, n % 256);
    wanted.routes = (0..1024)
        .map(|n| route("eth0", &text(n), "10.1.0.1"))
        .collect();
    let single = |n: u32| format!("10.1.{}.{}", 1 + n / 256, n % 256);
    wanted.neighbours = (0..1024).map(|n| neighbour("eth0", &single(n))).collect();
    network.apply(&wanted).unwrap();
    assert_eq!(kernel.routes().len(), 1024);
    assert_eq!(kernel.neighbours("eth0").len(), 1024);
    // All fail: no answer gets lost.
    for route in &mut wanted.routes {
        route.gateway = bytes("10.66.0.1");
    }
    let failure = network.apply(&wanted).unwrap_err();
    assert_eq!(
        failure.message,
        "cannot add route 10.100.0.0/24 via 10.66.0.1 dev eth0: Network is unreachable"
    );
    network.apply(&typical()).unwrap();
    assert_eq!(kernel.routes().len(), 2);
    assert_eq!(kernel.neighbours("eth0"), [""; 0]);
}

#[test]
fn a_point_to_point_address_comes_and_goes() {
    let Some(socket) = machine(1) else { return };
    let kernel = Kernel(&socket);
    let mut network = Network::default();
    let mut wanted = request(
        &[interface(0, "eth0", &["10.9.0.1/32", "fd09::1/128"])],
        &[],
    );
    let addresses = &mut wanted.interfaces[0].addresses;
    addresses[0].peer = bytes("10.9.0.2");
    addresses[0].scope = 253;
    addresses[1].peer = bytes("fd09::2");
    network.apply(&wanted).unwrap();
    assert_eq!(
        kernel.addresses("eth0"),
        ["10.9.0.1 peer 10.9.0.2/32", "fd09::1 peer fd09::2/128"]
    );
    let scopes = socket.addresses(libc::AF_INET as u8).unwrap();
    assert_eq!(scopes[0].1.scope, 253);
    wanted.interfaces[0].addresses[0].peer = bytes("10.9.0.3");
    wanted.interfaces[0].addresses[1].peer.clear();
    network.apply(&wanted).unwrap();
    assert_eq!(
        kernel.addresses("eth0"),
        ["10.9.0.1 peer 10.9.0.3/32", "fd09::1/128"]
    );
    wanted.interfaces[0].addresses.clear();
    network.apply(&wanted).unwrap();
    assert_eq!(kernel.addresses("eth0"), [""; 0]);
}
