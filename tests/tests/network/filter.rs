//! A guest cannot impersonate others: what `network_filter` keeps from leaving it, and what it lets
//! through.

use hull_tests::network::{CniNetwork, GATEWAY, GATEWAY6, has_ipv6, number, unanswered};
use hull_tests::{Container, Hull, Options, on_every_machine};

on_every_machine!(
    a_guest_cannot_use_another_address,
    a_guest_cannot_use_another_hardware_address,
);

/// A container that may change its interfaces.
fn free<'a>(hull: &'a Hull, options: &[&str]) -> Container<'a> {
    let options = [options, &["--cap-add", "NET_ADMIN"]].concat();
    hull.start(&options, &["sleep", "1000"])
}

fn ping(container: &Container<'_>, from: Option<&str>, to: &str) -> hull_tests::Output {
    let from = from.map(|from| format!("-I {from}")).unwrap_or_default();
    container.sh(&format!("ping -c 2 -i 0.3 -W 1 {from} {to}"))
}

/// Addresses of network `default` that no plugin assigns soon.
fn foreign() -> (String, String) {
    let number = number();
    (
        format!("10.87.{}.{}", 200 + number / 250, 1 + number % 250),
        format!("fd68:756c:6c00::dead:{number:x}"),
    )
}

fn not_filtered() -> Hull {
    Hull::with(Options {
        configuration: "network = \"default\"\nnetwork_filter = \"none\"".into(),
        ..Options::default()
    })
}

fn a_guest_cannot_use_another_address(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = free(&hull, &[]);
    let (ip, ip6) = foreign();
    let own = container.addresses();
    container.sh(&format!("ip addr add {ip}/16 dev eth0")).ok();
    ping(&container, None, &GATEWAY.to_string()).ok();
    unanswered(&ping(&container, Some(&ip), &GATEWAY.to_string()));
    if has_ipv6() {
        add_ipv6(&container, &ip6);
        let own = own.iter().find(|address| address.is_ipv6()).unwrap();
        ping(&container, Some(&own.to_string()), &GATEWAY6.to_string()).ok();
        unanswered(&ping(&container, Some(&ip6), &GATEWAY6.to_string()));
    }
    // The guest's own address still works.
    let own = own.iter().find(|address| address.is_ipv4()).unwrap();
    ping(&container, Some(&own.to_string()), &GATEWAY.to_string()).ok();
}

fn a_guest_cannot_use_another_hardware_address(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = free(&hull, &[]);
    let own = container.sh("cat /sys/class/net/eth0/address").ok().text();
    let set = |mac: &str| {
        container
            .sh(&format!("ip link set eth0 address {mac}"))
            .ok();
    };
    ping(&container, None, &GATEWAY.to_string()).ok();
    set("02:42:c0:a8:01:99");
    unanswered(&ping(&container, None, &GATEWAY.to_string()));
    set(&own);
    ping(&container, None, &GATEWAY.to_string()).ok();
}

/// Adds an address, and waits until the guest's kernel has made sure that no other has it.
fn add_ipv6(container: &Container<'_>, address: &str) {
    let script = format!(
        "ip addr add {address}/64 dev eth0; i=0; \
         while ip addr show dev eth0 | grep -q tentative; do \
         [ $i -lt 200 ] || exit 1; i=$((i + 1)); sleep 0.1; done"
    );
    container.sh(&script).ok();
}

#[test]
fn without_the_filter_a_guest_uses_what_it_likes() {
    let hull = not_filtered();
    let container = free(&hull, &[]);
    let (ip, ip6) = foreign();
    container.sh(&format!("ip addr add {ip}/16 dev eth0")).ok();
    ping(&container, Some(&ip), &GATEWAY.to_string()).ok();
    if has_ipv6() {
        add_ipv6(&container, &ip6);
        ping(&container, Some(&ip6), &GATEWAY6.to_string()).ok();
    }
    container
        .sh("ip link set eth0 address 02:42:c0:a8:01:98")
        .ok();
    ping(&container, None, &GATEWAY.to_string()).ok();
}

#[test]
fn a_guest_cannot_take_the_address_of_its_neighbour() {
    let hull = Hull::networked("uml");
    let victim = hull.sleeper();
    let thief = free(&hull, &[]);
    let witness = hull.sleeper();
    let address = victim.address().to_string();
    ping(&witness, None, &address).ok();
    thief
        .sh(&format!(
            "ip addr add {address}/16 dev eth0; arping -U -c 3 -I eth0 {address}; arping -A -c 3 -I eth0 {address}; true"
        ))
        .ok();
    let mac = victim.sh("cat /sys/class/net/eth0/address").ok().text();
    let known = witness.sh("cat /proc/net/arp").ok().text();
    let line = known
        .lines()
        .find(|line| line.starts_with(&address))
        .unwrap();
    assert!(line.contains(&mac), "{known}");
    ping(&witness, None, &address).ok();
    // The host, too, asks the right one.
    ping(&victim, None, &GATEWAY.to_string()).ok();
}

#[test]
fn networks_of_the_hosts_configuration_are_filtered_too() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    let container = free(&hull, &["--network", &network.name]);
    let gateway = network.gateway.to_string();
    let other = std::net::Ipv4Addr::from(u32::from(network.gateway) + 99).to_string();
    container
        .sh(&format!("ip addr add {other}/24 dev eth0"))
        .ok();
    ping(&container, None, &gateway).ok();
    unanswered(&ping(&container, Some(&other), &gateway));
}

#[test]
fn services_on_link_local_addresses_are_not_reached_unless_the_configuration_lets_them() {
    // A network in which such a service is: the host has the address on the bridge.
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    let container = hull.start(&["--network", &network.name], &["sleep", "1000"]);
    let service = format!("169.254.{}.{}", number() / 250, 1 + number() % 250);
    hull_tests::Invocation::new("ip")
        .args([
            "address",
            "add",
            &format!("{service}/32"),
            "dev",
            &network.bridge,
        ])
        .run()
        .ok();
    unanswered(&ping(&container, None, &service));
    ping(&container, None, &network.gateway.to_string()).ok();
    drop(hull);
    let open = Hull::with(Options {
        configuration: "link_local_services = true".into(),
        ..Options::default()
    });
    let container = open.start(&["--network", &network.name], &["sleep", "1000"]);
    ping(&container, None, &service).ok();
}

#[test]
fn a_guest_does_not_reach_the_loopback_addresses_of_the_host_with_or_without_the_filter() {
    use std::net::{Ipv4Addr, TcpListener};
    let listen = |address: Ipv4Addr| {
        let listener = TcpListener::bind((address, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, format!("{address} {port}"))
    };
    for hull in [Hull::networked("uml"), not_filtered()] {
        // A published port makes the host deliver loopback addresses that come from the bridge.
        let published = hull.start(&["-p", "127.0.0.1::80"], &["sleep", "1000"]);
        let options = ["--sysctl", "net.ipv4.conf.all.route_localnet=1"];
        let container = free(&hull, &options);
        let (host, loopback) = (listen(GATEWAY), listen(Ipv4Addr::new(127, 0, 0, 9)));
        let route = format!("ip route add 127.0.0.9/32 via {GATEWAY} dev eth0");
        container
            .sh(&format!("ip addr del 127.0.0.1/8 dev lo && {route}"))
            .ok();
        let connect = |to: &str| {
            let script = format!("timeout 2 nc {to} </dev/null; true");
            container.sh(&script).ok();
        };
        connect(&host.1);
        host.0.accept().expect("the way to the host is open");
        connect(&loopback.1);
        let nothing = loopback.0.accept().unwrap_err();
        assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
        published.is_removed_by_force();
    }
}
