//! The steps from one network to another, as text.
#![allow(clippy::unwrap_used)]
use super::super::wanted::Neighbour;
use super::*;

fn device(number: u8, name: &str) -> Device {
    Device {
        number,
        index: u32::from(number) + 2,
        first_name: format!("eth{number}"),
        first_mtu: 1500,
        name: name.into(),
        mac: net_device_mac(number),
        mtu: 1500,
        up: false,
    }
}

fn interface(device: u8, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        device,
        name: name.into(),
        mac: [2, 0, 0, 0, 0, device],
        mtu: 1500,
        plug: None,
        addresses: addresses.iter().map(|text| address(text)).collect(),
    }
}

fn address(text: &str) -> Address {
    let (address, prefix) = text.split_once('/').unwrap();
    Address {
        address: address.parse().unwrap(),
        prefix: prefix.parse().unwrap(),
        scope: 0,
        peer: None,
        no_prefix_route: false,
    }
}

fn route(device: u8, destination: &str, gateway: &str) -> Route {
    let Address {
        address, prefix, ..
    } = self::address(destination);
    Route {
        device: Some(device),
        destination: address,
        prefix,
        gateway: gateway.parse().ok(),
        source: None,
        metric: 0,
        scope: 0,
        on_link: false,
        kind: 1,
        mtu: 0,
    }
}

/// The machine's devices after `wanted` has been brought.
fn brought(wanted: &Wanted) -> Vec<Device> {
    let bring = |interface: &Interface| Device {
        mac: interface.mac,
        mtu: interface.mtu,
        up: true,
        ..device(interface.device, &interface.name)
    };
    wanted.interfaces.iter().map(bring).collect()
}

fn situation<'a>(devices: &'a [Device], old: &'a Wanted, new: &'a Wanted) -> Situation<'a> {
    Situation {
        devices,
        old,
        new,
        leftover_addresses: &[],
        settled: true,
        careful: false,
        ipv6: true,
    }
}

#[track_caller]
fn check(situation: &Situation<'_>, expected: &[&str]) {
    let steps: Vec<String> = plan(situation).iter().map(ToString::to_string).collect();
    assert_eq!(steps, expected);
}

fn typical() -> Wanted {
    Wanted {
        interfaces: vec![interface(0, "eth0", &["10.1.0.2/24", "fd00::2/64"])],
        routes: vec![
            route(0, "0.0.0.0/0", "10.1.0.1"),
            route(0, "::/0", "fd00::1"),
        ],
        neighbours: vec![Neighbour {
            device: 0,
            address: "10.1.0.1".parse().unwrap(),
            mac: [2; 6],
        }],
    }
}

#[test]
fn an_interface_is_made_from_a_device() {
    let (old, new) = (Wanted::default(), typical());
    let devices = [device(0, "eth0")];
    let expected = [
        "give eth0 the hardware address 02:00:00:00:00:00",
        "turn automatic IPv6 addresses of eth0 off",
        "set eth0 up",
        "add address 10.1.0.2/24 to eth0",
        "add address fd00::2/64 to eth0",
        "add route default via 10.1.0.1 dev eth0",
        "add route default (IPv6) via fd00::1 dev eth0",
        "add neighbour 10.1.0.1 with 02:02:02:02:02:02 dev eth0",
    ];
    check(&situation(&devices, &old, &new), &expected);
    let without_ipv6 = Situation {
        ipv6: false,
        ..situation(&devices, &old, &new)
    };
    assert_eq!(plan(&without_ipv6).len(), expected.len() - 1);
}

#[test]
fn what_is_there_is_not_touched_unless_in_doubt() {
    let network = typical();
    let devices = brought(&network);
    check(&situation(&devices, &network, &network), &[]);
    let doubtful = Situation {
        settled: false,
        ..situation(&devices, &network, &network)
    };
    check(
        &doubtful,
        &[
            "turn automatic IPv6 addresses of eth0 off",
            "add address 10.1.0.2/24 to eth0",
            "add address fd00::2/64 to eth0",
            "add route default via 10.1.0.1 dev eth0",
            "add route default (IPv6) via fd00::1 dev eth0",
            "add neighbour 10.1.0.1 with 02:02:02:02:02:02 dev eth0",
        ],
    );
}

#[test]
fn differences_are_carried_out_and_what_goes_along_is_brought_back() {
    let mut old = typical();
    old.interfaces[0].addresses.push(address("10.1.0.3/24"));
    old.interfaces.push(interface(1, "eth1", &["10.2.0.2/24"]));
    let devices = brought(&old);

    let mut new = old.clone();
    new.interfaces[0].addresses.remove(0);
    new.routes.push(route(1, "10.9.0.0/16", "10.2.0.1"));
    check(
        &situation(&devices, &old, &new),
        &[
            "remove address 10.1.0.2/24 of eth0",
            "add address 10.1.0.3/24 to eth0",
            "add route default via 10.1.0.1 dev eth0",
            "add route 10.9.0.0/16 via 10.2.0.1 dev eth1",
        ],
    );

    let mut new = old.clone();
    new.interfaces[0].addresses.remove(1);
    new.routes[0].gateway = "10.1.0.9".parse().ok();
    new.neighbours.clear();
    new.interfaces[1].mtu = 1400;
    check(
        &situation(&devices, &old, &new),
        &[
            "remove neighbour 10.1.0.1 dev eth0",
            "remove route default via 10.1.0.1 dev eth0",
            "remove address fd00::2/64 of eth0",
            "set the MTU of eth1 to 1400",
            "add route default via 10.1.0.9 dev eth0",
            "add route default (IPv6) via fd00::1 dev eth0",
        ],
    );
}

#[test]
fn neighbours_come_back_after_a_change_of_hardware_address() {
    let old = typical();
    let devices = brought(&old);
    let mut new = typical();
    new.interfaces[0].mac = [2, 9, 9, 9, 9, 9];
    check(
        &situation(&devices, &old, &new),
        &[
            "give eth0 the hardware address 02:09:09:09:09:09",
            "add neighbour 10.1.0.1 with 02:02:02:02:02:02 dev eth0",
        ],
    );
    new = typical();
    new.neighbours[0].mac = [4; 6];
    check(
        &situation(&devices, &old, &new),
        &["add neighbour 10.1.0.1 with 04:04:04:04:04:04 dev eth0"],
    );
}

#[test]
fn an_interface_that_goes_leaves_its_device_as_it_was() {
    let mut old = typical();
    old.interfaces[0].name = "net".into();
    old.interfaces[0].mtu = 1400;
    old.interfaces.push(interface(1, "eth1", &[]));
    old.routes.push(Route {
        kind: 6,
        device: None,
        ..route(0, "10.66.0.0/16", "")
    });
    let new = Wanted {
        interfaces: old.interfaces[1..].to_vec(),
        ..Default::default()
    };
    let devices = brought(&old);
    let leftover_addresses = [(2, address("10.1.0.2/24")), (3, address("10.3.0.3/24"))];
    let situation = Situation {
        leftover_addresses: &leftover_addresses,
        ..situation(&devices, &old, &new)
    };
    check(
        &situation,
        &[
            "remove route blackhole 10.66.0.0/16",
            "remove address 10.1.0.2/24 of net",
            "set net down",
            "give net the hardware address 02:68:75:6c:6c:00",
            "set the MTU of net to 1500",
            "rename net to eth0",
        ],
    );
    assert!(plan(&situation)[1..].iter().all(|step| step.leaving));
}

#[test]
fn names_are_swapped_by_way_of_spare_ones() {
    let old = Wanted {
        interfaces: vec![interface(0, "a", &[]), interface(1, "b", &[])],
        ..Default::default()
    };
    let mut new = old.clone();
    new.interfaces[0].name = "b".into();
    new.interfaces[1].name = "a".into();
    let devices = brought(&old);
    let names = [
        "rename a to hull0",
        "rename b to hull1",
        "rename a to b",
        "rename b to a",
    ];
    check(&situation(&devices, &old, &new), &names);
    let careful = Situation {
        careful: true,
        ..situation(&devices, &old, &new)
    };
    let mut expected = vec!["set a down", "set b down"];
    expected.extend(names);
    expected.extend([
        "turn automatic IPv6 addresses of b off",
        "set b up",
        "turn automatic IPv6 addresses of a off",
        "set a up",
    ]);
    check(&careful, &expected);
}

#[test]
fn idle_devices_make_way() {
    let old = Wanted::default();
    let new = Wanted {
        interfaces: vec![interface(1, "eth0", &[])],
        ..Default::default()
    };
    let devices = [device(0, "eth0"), device(1, "eth1")];
    check(
        &Situation {
            ipv6: false,
            ..situation(&devices, &old, &new)
        },
        &[
            "rename eth0 to hull0",
            "rename eth1 to eth0",
            "give eth0 the hardware address 02:00:00:00:00:01",
            "set eth0 up",
        ],
    );
    // A first name that an interface has meanwhile is not restored; a spare name that is wanted is
    // not used.
    let mut old = typical();
    old.interfaces[0].name = "hull0".into();
    let new = Wanted {
        interfaces: vec![interface(1, "eth0", &[]), interface(2, "hull0", &[])],
        ..Default::default()
    };
    let devices = [device(0, "hull0"), device(1, "eth1"), device(2, "eth2")];
    let steps = plan(&situation(&devices, &old, &new));
    let renames: Vec<String> = steps
        .iter()
        .filter(|step| matches!(step.what, What::Rename(_)))
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        renames,
        [
            "rename hull0 to hull0-1",
            "rename eth1 to eth0",
            "rename eth2 to hull0"
        ]
    );
}

#[test]
fn ipv6_comes_to_a_link_while_it_is_down() {
    let mut old = typical();
    old.interfaces[0].mtu = 1000;
    old.interfaces[0].addresses.pop();
    old.routes.pop();
    let devices = brought(&old);
    check(
        &situation(&devices, &old, &typical()),
        &[
            "set eth0 down",
            "set the MTU of eth0 to 1500",
            "turn automatic IPv6 addresses of eth0 off",
            "set eth0 up",
            "add address 10.1.0.2/24 to eth0",
            "add address fd00::2/64 to eth0",
            "add route default via 10.1.0.1 dev eth0",
            "add route default (IPv6) via fd00::1 dev eth0",
            "add neighbour 10.1.0.1 with 02:02:02:02:02:02 dev eth0",
        ],
    );
}

#[test]
fn only_a_route_that_is_alone_replaces() {
    let mut new = typical();
    let metric = |metric: u32, gateway: &str| Route {
        metric,
        ..route(0, "fd01::/64", gateway)
    };
    new.routes = vec![
        route(0, "10.0.0.0/8", "10.1.0.1"),
        route(0, "10.0.0.0/8", "10.1.0.9"),
        route(0, "10.0.0.0/9", "10.1.0.1"),
        metric(0, "fd00::1"),
        metric(1024, "fd00::9"),
        metric(7, "fd00::1"),
        route(0, "fe80::/64", ""),
    ];
    let (devices, old) = (brought(&new), Wanted::default());
    let replaces: Vec<bool> = plan(&situation(&devices, &old, &new))
        .iter()
        .filter_map(|step| match step.what {
            What::AddRoute { replace, .. } => Some(replace),
            _ => None,
        })
        .collect();
    assert_eq!(replaces, [false, false, true, false, false, true, false]);
}
