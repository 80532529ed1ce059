//! The network of `hull run`: addresses, names, reachability, and what is refused.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hull_tests::network::{
    CniNetwork, GATEWAY, GATEWAY6, answers, has_ipv6, http_server, number, unanswered,
};
use hull_tests::{Container, Hull, Netns, eventually, on_every_machine};

on_every_machine!(
    a_container_has_an_address_and_reaches_the_host,
    a_container_is_reached_from_the_host,
    containers_reach_each_other,
    without_a_network_there_is_only_loopback,
);

fn web_server<'a>(hull: &'a Hull, options: &[&str], text: &str) -> Container<'a> {
    hull.start(options, &["sh", "-c", &http_server(text)])
}

fn port_80(address: IpAddr) -> SocketAddr {
    (address, 80).into()
}

/// Pings from inside, and expects an answer.
fn pings(container: &Container<'_>, address: impl ToString) {
    container
        .exec(&["ping", "-c", "1", "-W", "5", &address.to_string()])
        .ok();
}

fn a_container_has_an_address_and_reaches_the_host(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = hull.sleeper();
    let interfaces = container.sh("ls /sys/class/net").ok().text();
    assert_eq!(interfaces, "eth0\nlo");
    let addresses = container.addresses();
    let ours = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.octets()[..2] == GATEWAY.octets()[..2],
        IpAddr::V6(address) => address.octets()[..8] == GATEWAY6.octets()[..8],
    };
    assert!(addresses.iter().all(ours), "{addresses:?}");
    assert_eq!(addresses.len(), if has_ipv6() { 2 } else { 1 });
    pings(&container, GATEWAY);
    if has_ipv6() {
        pings(&container, GATEWAY6);
    }
    container.does("rm").fails(1, &["running"]);
}

fn a_container_is_reached_from_the_host(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = web_server(&hull, &[], "inside");
    for address in container.addresses() {
        answers(port_80(address), "inside");
    }
}

fn containers_reach_each_other(machine: &'static str) {
    let hull = Hull::networked(machine);
    let server = web_server(&hull, &[], "neighbour");
    let client = hull.sleeper();
    for address in server.addresses() {
        answers(port_80(address), "neighbour");
        let url = format!("http://{}/index.html", port_80(address));
        let output = client.exec(&["wget", "-q", "-O", "-", &url]);
        assert_eq!(output.ok().text(), "neighbour", "{url}");
    }
}

fn without_a_network_there_is_only_loopback(machine: &'static str) {
    let hull = Hull::networked(machine);
    let script = "ls /sys/class/net; ip route; cat /etc/resolv.conf";
    let output = hull.sh(&["--network", "none"], script).ok();
    assert_eq!(output.text(), "lo");
    assert_eq!(output.error(), "");
}

#[test]
fn bridge_is_another_word_for_the_default_network() {
    let hull = Hull::new();
    let container = hull.start(&["--network", "bridge"], &["sleep", "1000"]);
    pings(&container, GATEWAY);
    assert_eq!(container.inspect()["Hull"]["network"], "default");
}

#[test]
fn a_container_reaches_hosts_beyond_the_host_with_the_hosts_address() {
    let outside = Outside::new();
    let hull = Hull::networked("uml");
    let listener = outside
        .netns
        .enter(|| std::net::TcpListener::bind((outside.address, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let seen = std::thread::spawn(move || listener.accept().unwrap().1.ip());
    let (address, host) = (outside.address.to_string(), outside.host);
    let script = format!("ping -c 1 -W 5 {address} && nc {address} {port} </dev/null");
    hull.sh(&[], &script).ok();
    assert_eq!(seen.join().unwrap(), host);
}

#[test]
fn a_container_asks_the_name_server_that_it_was_given() {
    let outside = Outside::new();
    let hull = Hull::networked("uml");
    let socket = outside
        .netns
        .enter(|| std::net::UdpSocket::bind((outside.address, 53)).unwrap());
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let server = std::thread::spawn(move || {
        let mut question = [0; 512];
        let (length, client) = socket.recv_from(&mut question).unwrap();
        // The question again, as an answer with one record: 192.0.2.7.
        let mut answer = question[..length].to_vec();
        answer[2..4].copy_from_slice(&[0x81, 0x80]);
        answer[6..8].copy_from_slice(&[0, 1]);
        // Ignores what came after the question.
        let end = 12 + answer[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        answer.truncate(end);
        answer[8..12].fill(0);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
        socket.send_to(&answer, client).unwrap();
        String::from_utf8_lossy(&question[13..end - 5]).into_owned()
    });
    let address = outside.address.to_string();
    let output = hull.run(
        &["--dns", &address],
        &["nslookup", "-type=a", "somewhere.example."],
    );
    let asked = server.join().unwrap();
    assert!(asked.starts_with("somewhere"), "{asked:?}");
    assert!(output.text().contains("192.0.2.7"), "{}", output.text());
}

#[test]
fn what_is_asked_for_is_in_the_files_of_the_resolver() {
    let hull = Hull::networked("uml");
    let options = [
        "--dns",
        "192.0.2.53",
        "--dns",
        "2001:db8::53",
        "--dns-search",
        "one.example",
        "--dns-search",
        "two.example",
        "--dns-option",
        "ndots:3",
        "--dns-option",
        "use-vc",
    ];
    let output = hull.run(&options, &["cat", "/etc/resolv.conf"]).ok();
    assert_eq!(
        output.text(),
        "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch one.example two.example\noptions ndots:3 use-vc"
    );

    let options = [
        "--hostname",
        "box.example",
        "--add-host",
        "db:192.0.2.9",
        "--add-host",
        "db6:2001:db8::9",
        "--add-host",
        "outside:host-gateway",
    ];
    let container = hull.start(&options, &["sleep", "1000"]);
    let hosts = container.sh("cat /etc/hosts").ok().text();
    let has = |address: &str, names: &str| {
        let line = format!("{address}\t{names}");
        assert!(
            hosts.lines().any(|found| found == line),
            "{line:?} in {hosts}"
        );
    };
    has("127.0.0.1", "localhost");
    has("192.0.2.9", "db");
    has("2001:db8::9", "db6");
    has(&GATEWAY.to_string(), "outside");
    for address in container.addresses() {
        has(&address.to_string(), "box.example box");
    }
    pings(&container, "outside");
    let names = container.sh("hostname; cat /etc/hostname").ok().text();
    assert_eq!(names, "box.example\nbox.example");
}

#[test]
fn the_files_of_the_resolver_can_be_written_by_the_container() {
    let hull = Hull::networked("uml");
    let container = hull.sleeper();
    container
        .sh("echo 192.0.2.10 other >>/etc/hosts && echo nameserver 192.0.2.11 >/etc/resolv.conf")
        .ok();
    let read = container
        .sh("tail -n 1 /etc/hosts; cat /etc/resolv.conf")
        .ok();
    assert_eq!(read.text(), "192.0.2.10 other\nnameserver 192.0.2.11");
    // Another container is not disturbed.
    let text = hull.sh(&[], "cat /etc/hosts").ok().text();
    assert!(!text.contains("192.0.2.10"), "{text}");
}

#[test]
fn a_container_has_the_addresses_that_it_asks_for() {
    let hull = Hull::networked("uml");
    let number = number();
    // The next containers without `--ip` get the addresses after these, so they are far from those
    // of another test.
    let ip = format!(
        "10.87.{}.{}",
        100 + number / 10 % 100,
        1 + number / 1000 * 20
    );
    let ip6 = format!("fd68:756c:6c00::beef:{number:x}:7");
    let mut options = vec!["--ip", &ip, "--mac-address", "02:42:C0:a8:01:07"];
    if has_ipv6() {
        options.extend(["--ip6", &ip6]);
    }
    let container = hull.start(&options, &["sleep", "1000"]);
    let mac = container.sh("cat /sys/class/net/eth0/address").ok().text();
    assert_eq!(mac, "02:42:c0:a8:01:07");
    let found: Vec<String> = container
        .addresses()
        .iter()
        .map(ToString::to_string)
        .collect();
    let wanted = if has_ipv6() {
        vec![ip.clone(), ip6]
    } else {
        vec![ip.clone()]
    };
    assert_eq!(found, wanted);
    pings(&container, GATEWAY);

    // No other container can have it.
    let output = hull.run(&["--ip", &ip], &["true"]);
    output.fails(125, &["network \"default\"", "bridge", &ip]);
    pings(&container, GATEWAY);
    container.does("kill").ok();
    container.wait();
    container.does("rm").ok();
    hull.assert_clean();
    let output = hull.sh(&["--ip", &ip], "ip -o -4 addr show dev eth0").ok();
    assert!(output.text().contains(&ip), "{}", output.text());
}

#[test]
fn an_address_outside_the_network_is_refused() {
    let hull = Hull::networked("uml");
    for address in ["192.0.2.7", "10.87.0.1"] {
        let output = hull.run(&["--ip", address], &["true"]);
        output.fails(125, &[address]);
    }
    hull.assert_clean();
}

#[test]
fn values_that_make_no_sense_are_refused_in_one_line() {
    let hull = Hull::networked("uml");
    for (option, value) in [
        ("--publish", ""),
        ("-p", "http"),
        ("-p", "0"),
        ("-p", "80:65536"),
        ("-p", "80-81:80-82"),
        ("-p", "80:80/icmp"),
        ("-p", "300.0.0.1:80:80"),
        ("-p", "::1:x:80"),
        ("--dns", "name"),
        ("--dns", "192.0.2.1:53"),
        ("--dns-search", "two words"),
        ("--dns-search", "-"),
        ("--dns-option", "two words"),
        ("--dns-option", "line\nend"),
        ("--add-host", "name"),
        ("--add-host", ":192.0.2.1"),
        ("--add-host", "two words:192.0.2.1"),
        ("--add-host", "name:300.0.0.1"),
        ("--hostname", "under_score/"),
        ("--mac-address", "02:42"),
        ("--mac-address", "01:00:5e:00:00:01"),
        ("--mac-address", "00:00:00:00:00:00"),
        ("--ip", "fd00::1"),
        ("--ip", "0.0.0.0"),
        ("--ip", "127.0.0.1"),
        ("--ip6", "192.0.2.1"),
        ("--ip6", "::1"),
        ("--network", "two words"),
        ("--network", "../secrets"),
        ("--network-rate", "fast"),
        ("--network-rate", "1x"),
    ] {
        let output = hull.run(&[option, value], &["true"]);
        let name = if option == "-p" { "--publish" } else { option };
        output.fails(125, &[name]);
    }
    hull.assert_clean();
}

#[test]
fn options_of_a_network_are_refused_without_one() {
    let hull = Hull::new();
    for (option, value) in [
        ("--publish", "80"),
        ("--network-rate", "1m"),
        ("--mac-address", "02:42:c0:a8:01:07"),
        ("--ip", "10.87.3.4"),
        ("--ip6", "fd68:756c:6c00::3:4"),
        ("--add-host", "outside:host-gateway"),
    ] {
        let output = hull.run(&["--network", "none", option, value], &["true"]);
        output.fails(
            125,
            &[
                if option == "--add-host" {
                    "outside"
                } else {
                    option
                },
                "none",
            ],
        );
    }
    hull.assert_clean();
}

#[test]
fn a_network_that_is_not_there_is_refused_and_those_that_are_there_are_named() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::new();
    hull.run(&["--network", "no-such-network"], &["true"])
        .fails(125, &["\"no-such-network\"", &network.name]);
    hull.assert_clean();
}

#[test]
fn the_host_s_network_is_refused_with_a_reason() {
    let hull = Hull::new();
    hull.run(&["--network", "host"], &["true"])
        .fails(125, &["not supported", "host", "kernel"]);
    hull.assert_clean();
}

#[test]
fn a_network_can_be_chosen_in_the_configuration() {
    let network = CniNetwork::new(|_| {});
    let hull = Hull::with(hull_tests::Options {
        configuration: format!("network = {:?}", network.name),
        ..hull_tests::Options::default()
    });
    let container = hull.sleeper();
    assert_eq!(
        container.inspect()["Hull"]["network"],
        network.name.as_str()
    );
    pings(&container, network.gateway);
    // An option takes precedence.
    let output = hull.sh(&["--network", "none"], "ls /sys/class/net").ok();
    assert_eq!(output.text(), "lo");
}

#[test]
fn stats_count_the_bytes_of_the_network() {
    let hull = Hull::networked("uml");
    let container = hull.sleeper();
    let bytes = |key: &str| {
        let stats = hull
            .hull(["stats", "--no-stream", "--json", &container.name])
            .run()
            .ok()
            .json();
        stats[0]["network"][0][key].as_u64().unwrap()
    };
    let both = ["receive_bytes", "transmit_bytes"];
    let before = both.map(bytes);
    container
        .sh(&format!("ping -q -c 20 -i 0.02 -s 10000 {GATEWAY}"))
        .ok();
    let after = both.map(bytes);
    for (key, (before, after)) in both.iter().zip(before.iter().zip(after)) {
        let more = after - before;
        assert!((200_000..300_000).contains(&more), "{key}: {more}");
    }
    let shown = hull
        .hull(["stats", "--no-stream", &container.name])
        .run()
        .ok()
        .text();
    assert!(shown.contains("NET I/O"), "{shown}");
    // Without a network there is nothing to count.
    let other = hull.start(&["--network", "none"], &["sleep", "1000"]);
    let stats = hull
        .hull(["stats", "--no-stream", "--json", &other.name])
        .run()
        .ok()
        .json();
    assert_eq!(stats[0]["network"], serde_json::json!([]));
}

#[test]
fn the_order_in_which_containers_come_and_go_does_not_matter() {
    let hull = Hull::networked("uml");
    let first = hull.sleeper();
    let second = hull.sleeper();
    assert_ne!(first.address(), second.address());
    let gone = first.address();
    pings(&second, gone);
    hull.hull(["rm", "-f", &first.name]).run().ok();
    pings(&second, GATEWAY);
    unanswered(&second.exec(&["ping", "-c", "1", "-W", "1", &gone.to_string()]));
    let third = hull.sleeper();
    pings(&third, second.address());
    eventually("both", Duration::from_secs(5), || {
        second
            .exec(&["ping", "-c", "1", "-W", "1", &third.address().to_string()])
            .status
            == 0
    });
}

/// Another host, on a link of its own with this one.
struct Outside {
    netns: Netns,
    /// Address of that host.
    address: IpAddr,
    /// Address of this host.
    host: IpAddr,
}

impl Outside {
    fn new() -> Outside {
        let (netns, host, address) = Netns::beside_the_host();
        Outside {
            netns,
            address: address.into(),
            host: host.into(),
        }
    }
}
