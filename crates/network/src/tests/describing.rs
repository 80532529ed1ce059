//! Descriptions: what engines configure is described for a guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::route::{
    RouteAttribute, RouteMessage, RouteMetric, RouteNextHopFlags, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::{LinkBridge, LinkUnspec, LinkVlan, RouteMessageBuilder, RouteNextHopBuilder};

use super::support::{Place, changed, drain, has_ipv6, join, joined};
use crate::{Address, Neighbour, Route, RouteKind, Skipped};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn v4(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn address(text: &str, prefix_length: u8) -> Address {
    Address {
        address: ip(text),
        prefix_length,
        scope: 0,
        peer: None,
        no_prefix_route: false,
    }
}

fn route(destination: &str, prefix_length: u8, gateway: Option<&str>) -> Route {
    Route {
        interface: Some("eth0".to_owned()),
        destination: ip(destination),
        prefix_length,
        gateway: gateway.map(ip),
        source: None,
        metric: if destination.contains(':') { 1024 } else { 0 },
        scope: 0,
        on_link: false,
        kind: RouteKind::Unicast,
        mtu: 0,
    }
}

async fn add(place: &Place, route: RouteMessage) {
    let routes = place.engine.route();
    routes.add(route).execute().await.unwrap();
}

/// Like `ip address add` with flags.
async fn add_flagged(place: &Place, index: u32, address: &str, length: u8, flags: AddressFlags) {
    let addresses = place.engine.address();
    let mut request = addresses.add(index, ip(address), length);
    let message = request.message_mut();
    message.attributes.push(AddressAttribute::Flags(flags));
    request.execute().await.unwrap();
}

#[tokio::test]
async fn what_an_engine_sets_up() {
    let Some((here, _there)) = joined("what_an_engine_sets_up").await else {
        return;
    };
    if !has_ipv6() {
        return println!("left out: what_an_engine_sets_up: no IPv6");
    }
    let index = here.index("eth0");
    let message = LinkUnspec::new_with_index(index)
        .address(vec![0x02, 0x42, 0xac, 0x11, 0, 2])
        .mtu(1420)
        .build();
    here.set(message).await;
    here.add_address(index, "172.17.0.2/16").await;
    here.add_address(index, "172.17.0.3/16").await;
    add_flagged(&here, index, "fd00:17::2", 64, AddressFlags::Nodad).await;
    let builder = || RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index);
    add(&here, builder().gateway(v4("172.17.0.1")).build()).await;
    let mut message = builder()
        .destination_prefix(v4("10.5.0.0"), 16)
        .gateway(v4("172.17.0.9"))
        .pref_source(v4("172.17.0.3"))
        .priority(7)
        .build();
    let mtu = RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]);
    message.attributes.push(mtu);
    add(&here, message).await;
    let on_link = builder().destination_prefix(v4("192.168.7.7"), 32);
    add(&here, on_link.scope(RouteScope::Link).build()).await;
    let onlink = builder()
        .destination_prefix(v4("10.6.0.0"), 16)
        .gateway(v4("169.254.1.1"))
        .onlink();
    add(&here, onlink.build()).await;
    let blackhole = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(v4("10.66.0.0"), 16)
        .kind(RouteType::BlackHole);
    add(&here, blackhole.build()).await;
    let other_table = builder()
        .destination_prefix(v4("10.67.0.0"), 16)
        .table_id(100);
    add(&here, other_table.build()).await;
    let learned = builder().destination_prefix(v4("10.68.0.0"), 16);
    add(&here, learned.protocol(RouteProtocol::IcmpRedirect).build()).await;
    let mut of_a_kind = builder().destination_prefix(v4("10.69.0.0"), 16).build();
    of_a_kind.header.tos = 0x10;
    add(&here, of_a_kind).await;
    let builder = || RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index);
    add(&here, builder().gateway(v6("fd00:17::1")).build()).await;
    let unreachable = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(v6("fd00:66::"), 32)
        .kind(RouteType::Unreachable);
    add(&here, unreachable.build()).await;
    let neighbours = here.engine.neighbours();
    let mac = [0x02, 0x42, 0, 0, 0, 0x09];
    let neighbour = neighbours.add(index, ip("172.17.0.9"));
    let neighbour = neighbour.link_layer_address(&mac);
    neighbour.execute().await.unwrap();

    let described = here.describe().await;
    let [eth0] = described.interfaces.as_slice() else {
        panic!("{described:?}");
    };
    assert_eq!(
        (eth0.index, eth0.name.as_str(), eth0.kind.as_str()),
        (index, "eth0", "veth")
    );
    assert_eq!(
        (eth0.mac, eth0.mtu, eth0.up),
        ([2, 0x42, 0xac, 0x11, 0, 2], 1420, true)
    );
    let (link_local, others): (Vec<_>, Vec<_>) = eth0.addresses.iter().cloned().partition(
        |address| matches!(address.address, IpAddr::V6(address) if address.is_unicast_link_local()),
    );
    let expected = [
        address("172.17.0.2", 16),
        address("172.17.0.3", 16),
        address("fd00:17::2", 64),
    ];
    assert_eq!(others, expected);
    assert_eq!(link_local.len(), 1);
    assert_eq!(link_local[0].scope, libc::RT_SCOPE_LINK);
    assert!(!link_local[0].no_prefix_route);

    let expected = [
        Route {
            interface: None,
            kind: RouteKind::Unreachable,
            ..route("fd00:66::", 32, None)
        },
        Route {
            scope: libc::RT_SCOPE_LINK,
            ..route("192.168.7.7", 32, None)
        },
        Route {
            interface: None,
            kind: RouteKind::Blackhole,
            ..route("10.66.0.0", 16, None)
        },
        Route {
            source: Some(ip("172.17.0.3")),
            metric: 7,
            mtu: 1300,
            ..route("10.5.0.0", 16, Some("172.17.0.9"))
        },
        Route {
            on_link: true,
            ..route("10.6.0.0", 16, Some("169.254.1.1"))
        },
        route("0.0.0.0", 0, Some("172.17.0.1")),
        route("::", 0, Some("fd00:17::1")),
    ];
    let mut routes = described.routes.clone();
    routes.sort_by_key(|route| expected.iter().position(|expected| expected == route));
    assert_eq!(routes, expected);
    let mut ordered = expected.to_vec();
    crate::description::order(&mut ordered);
    assert_eq!(described.routes, ordered);
    assert_eq!(
        described.routes[5..],
        expected[5..],
        "default routes come last"
    );
    let neighbour = Neighbour {
        interface: "eth0".to_owned(),
        address: ip("172.17.0.9"),
        mac,
    };
    assert_eq!(described.neighbours, [neighbour]);
    let skipped = Skipped {
        name: "route 10.69.0.0/16".to_owned(),
        why: "it is for one type of service only".to_owned(),
    };
    assert_eq!(described.skipped, [skipped]);
    assert_eq!(described, here.describe().await);
}

#[tokio::test]
async fn a_network_without_its_route() {
    let Some((here, _there)) = joined("a_network_without_its_route").await else {
        return;
    };
    // Like the CNI plugin ptp: the address's own route is replaced by one through the gateway.
    let index = here.index("eth0");
    here.add_address(index, "10.22.0.5/16").await;
    let builder = || RouteMessageBuilder::<Ipv4Addr>::new().output_interface(index);
    let own = builder().destination_prefix(v4("10.22.0.0"), 16);
    let own = own
        .scope(RouteScope::Link)
        .protocol(RouteProtocol::Kernel)
        .build();
    let routes = here.engine.route();
    routes.del(own).execute().await.unwrap();
    let gateway = builder().destination_prefix(v4("10.22.0.1"), 32);
    add(&here, gateway.scope(RouteScope::Link).build()).await;
    let network = builder()
        .destination_prefix(v4("10.22.0.0"), 16)
        .gateway(v4("10.22.0.1"));
    add(&here, network.build()).await;
    add_flagged(&here, index, "10.23.0.5", 16, AddressFlags::Noprefixroute).await;
    here.add_address(index, "10.24.0.5/32").await;

    let described = here.describe().await;
    let addresses = &described.interfaces[0].addresses;
    let of = |wanted: &str| {
        addresses
            .iter()
            .find(|address| address.address == ip(wanted))
    };
    assert!(of("10.22.0.5").unwrap().no_prefix_route);
    assert!(of("10.23.0.5").unwrap().no_prefix_route);
    assert!(!of("10.24.0.5").unwrap().no_prefix_route);
    let expected = [
        Route {
            scope: libc::RT_SCOPE_LINK,
            ..route("10.22.0.1", 32, None)
        },
        route("10.22.0.0", 16, Some("10.22.0.1")),
    ];
    assert_eq!(described.routes, expected);
}

#[tokio::test]
async fn peers_and_many_hops() {
    let Some((here, there)) = joined("peers_and_many_hops").await else {
        return;
    };
    let index = here.index("eth0");
    let addresses = here.engine.address();
    let mut request = addresses.add(index, ip("10.0.0.1"), 32);
    let message = request.message_mut();
    message.attributes.retain(|attribute| {
        !matches!(
            attribute,
            AddressAttribute::Address(_) | AddressAttribute::Broadcast(_)
        )
    });
    message
        .attributes
        .push(AddressAttribute::Address(ip("10.0.0.2")));
    request.execute().await.unwrap();
    // One of the two hops is on an interface that guests do not get.
    join(&here, "tun0", &there, "peer1").await;
    here.add_address(here.index("tun0"), "10.1.0.1/24").await;
    let hop = |index: u32, gateway: &str| {
        let hop = RouteNextHopBuilder::new_ipv4().interface(index);
        hop.via(ip(gateway)).unwrap().build()
    };
    let hops = vec![hop(index, "10.0.0.2"), hop(here.index("tun0"), "10.1.0.9")];
    assert!(
        hops.iter()
            .all(|hop| hop.flags == RouteNextHopFlags::empty())
    );
    let many = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(v4("10.9.0.0"), 16)
        .multipath(hops);
    add(&here, many.build()).await;

    let described = here.describe().await;
    let peer = Address {
        peer: Some(ip("10.0.0.2")),
        ..address("10.0.0.1", 32)
    };
    assert_eq!(described.interfaces[0].addresses[0], peer);
    assert_eq!(described.routes, [route("10.9.0.0", 16, Some("10.0.0.2"))]);
}

#[tokio::test]
async fn what_a_guest_cannot_have() {
    let Some((here, there)) = joined("what_a_guest_cannot_have").await else {
        return;
    };
    let link = here.engine.link();
    let eth0 = here.index("eth0");
    let bridge = LinkBridge::new("br0").up().build();
    if let Err(error) = link.add(bridge).execute().await {
        return println!("left out: what_a_guest_cannot_have: no bridges: {error}");
    }
    let bridge = here.index("br0");
    join(&here, "port0", &there, "peer1").await;
    here.set(
        LinkUnspec::new_with_name("port0")
            .controller(bridge)
            .build(),
    )
    .await;
    let mut skipped = Vec::new();
    let link = here.engine.link();
    let vlan = LinkVlan::new("eth0.5", eth0, 5).up().build();
    match link.add(vlan).execute().await {
        Ok(()) => skipped.push(Skipped {
            name: "eth0.5".to_owned(),
            why: "it is a part of eth0, all of whose packets go to the guest".to_owned(),
        }),
        Err(error) => println!("left out: a VLAN: {error}"),
    }
    skipped.push(Skipped {
        name: "port0".to_owned(),
        why: "it is a port of br0".to_owned(),
    });
    let described = here.describe().await;
    let mut names: Vec<_> = described
        .interfaces
        .iter()
        .map(|interface| &interface.name)
        .collect();
    names.sort();
    assert_eq!(names, ["br0", "eth0"]);
    assert_eq!(described.skipped, skipped);
}

#[tokio::test]
async fn changes_are_noticed() {
    let Some((here, there)) = joined("changes_are_noticed").await else {
        return;
    };
    let monitor = here.monitor();
    drain(&monitor).await;
    let mut before = here.describe().await;
    let index = here.index("eth0");
    let mut noticed = async |what: &str| {
        changed(&monitor).await.unwrap();
        let now = here.describe().await;
        assert_ne!(before, now, "{what}");
        before = now.clone();
        drain(&monitor).await;
        now
    };
    here.add_address(index, "10.3.0.2/24").await;
    let now = noticed("an address").await;
    assert!(
        now.interfaces[0]
            .addresses
            .contains(&address("10.3.0.2", 24))
    );
    let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway(v4("10.3.0.1"));
    add(&here, default.build()).await;
    let now = noticed("a route").await;
    assert_eq!(now.routes, [route("0.0.0.0", 0, Some("10.3.0.1"))]);
    let neighbours = here.engine.neighbours();
    let neighbour = neighbours.add(index, ip("10.3.0.1"));
    let neighbour = neighbour.link_layer_address(&[2, 0, 0, 0, 0, 1]);
    neighbour.execute().await.unwrap();
    assert_eq!(noticed("a neighbour").await.neighbours.len(), 1);
    here.set(LinkUnspec::new_with_index(index).mtu(1300).build())
        .await;
    assert_eq!(noticed("an MTU").await.interfaces[0].mtu, 1300);
    join(&here, "eth1", &there, "peer1").await;
    let now = noticed("an interface").await;
    assert_eq!(now.interfaces[1].name, "eth1");
    here.delete(index).await;
    let now = noticed("an interface less").await;
    assert_eq!(
        (now.interfaces.len(), now.routes.len(), now.neighbours.len()),
        (1, 0, 0)
    );
}
