//! Traffic on a network of `hull run`: much, many at a time, large, and within its limits.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use hull_tests::network::{
    CniNetwork, GATEWAY, GATEWAY6, Receiver, answers, connect, digest_of, get, has_ipv6,
    http_server, noise, send,
};
use hull_tests::{
    Container, Hull, digest, eventually, left_out, many_echo_program, on_every_machine,
};

on_every_machine!(
    much_arrives_whole_in_both_directions,
    large_packets_arrive_in_fragments,
);

const MUCH: usize = 50_000_000;

/// The host as a container reaches it, with each family of addresses.
fn gateways() -> Vec<IpAddr> {
    let mut all = vec![GATEWAY.into()];
    if has_ipv6() {
        all.push(GATEWAY6.into());
    }
    all
}

/// Computes the checksum of what comes to port 5000. The server sends nothing and closes last: a
/// fifo that it has open itself does not end, and `nc` at the other end exits when it receives an
/// end.
const SERVER: &str = "rm -f /dev/shm/fifo; mkfifo /dev/shm/fifo; \
    nc -l -p 5000 0<>/dev/shm/fifo | sha256sum >/sum.new; mv /sum.new /sum";

/// Waits for the checksum.
const SUM: &str = "until test -e /sum; do sleep 0.05; done; cat /sum; rm /sum";

/// Sends bytes from the host to port 5000 of a container; the checksum of what arrived there.
fn sends_to(container: &Container<'_>, address: IpAddr, bytes: &[u8]) -> String {
    container.exec_with(&["-d"], &["sh", "-c", SERVER]).ok();
    send((address, 5000), bytes);
    digest_of(&container.sh(SUM).ok().text())
}

/// Lets a container generate bytes and send them to the host; checks that all arrived.
#[track_caller]
fn receives_from(container: &Container<'_>, host: IpAddr, length: usize) {
    let receiver = Receiver::new();
    let port = receiver.port;
    let script = format!(
        "head -c {length} /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data; nc {host} {port} </dev/shm/data"
    );
    let sent = digest_of(&container.sh(&script).ok().text());
    let received = receiver.finish();
    assert_eq!(received.len(), length, "{host}");
    assert_eq!(digest(&received), sent, "{host}");
}

fn much_arrives_whole_in_both_directions(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = hull.sleeper();
    // IPv4 and IPv6 differ in their headers only.
    let length = |address: &IpAddr| if address.is_ipv4() { MUCH } else { MUCH / 5 };
    for address in container.addresses() {
        let bytes = noise(length(&address));
        let arrived = sends_to(&container, address, &bytes);
        assert_eq!(arrived, digest(&bytes), "{address}");
    }
    for host in gateways() {
        receives_from(&container, host, length(&host));
    }
}

fn large_packets_arrive_in_fragments(machine: &'static str) {
    let hull = Hull::networked(machine);
    let container = hull.sleeper();
    for host in gateways() {
        let script = format!("ping -c 5 -i 0.1 -W 5 -s 20000 {host}");
        let text = container.sh(&script).ok().text();
        assert!(text.contains(" 0% packet loss"), "{text}");
    }
}

#[test]
fn two_containers_are_served_at_a_time() {
    let hull = Hull::networked("uml");
    let containers = [hull.sleeper(), hull.sleeper()];
    let bytes = noise(MUCH / 5);
    let wanted = digest(&bytes);
    std::thread::scope(|scope| {
        for container in &containers {
            let (bytes, wanted) = (&bytes, &wanted);
            scope.spawn(move || {
                let arrived = sends_to(container, container.address(), bytes);
                assert_eq!(&arrived, wanted);
            });
            scope.spawn(|| receives_from(container, GATEWAY.into(), MUCH / 5));
        }
    });
}

#[test]
fn one_container_sends_much_to_another() {
    let hull = Hull::networked("uml");
    let (here, there) = (hull.sleeper(), hull.sleeper());
    there.exec_with(&["-d"], &["sh", "-c", SERVER]).ok();
    let script = format!(
        "head -c {} /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data; \
         until nc {} 5000 </dev/shm/data; do sleep 0.1; done",
        MUCH / 5,
        there.address()
    );
    let sent = here.sh(&script).ok().text();
    let arrived = there.sh(SUM).ok().text();
    assert_eq!(digest_of(&arrived), digest_of(&sent));
}

#[test]
fn a_thousand_connections_in_a_row_are_served() {
    let hull = Hull::networked("uml");
    let container = hull.start(&[], &["sh", "-c", &http_server("once more")]);
    let address = (container.address(), 80);
    answers(address, "once more");
    for index in 0..1000 {
        match get(address) {
            Ok(text) => assert_eq!(text, "once more"),
            Err(error) => panic!("connection {index}: {error}"),
        }
    }
}

#[test]
fn ten_thousand_connections_at_a_time_are_served() {
    const MANY: usize = 10_000;
    let limit = rustix::process::Rlimit {
        current: Some(2 * MANY as u64),
        maximum: Some(2 * MANY as u64),
    };
    if rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).is_err() {
        return left_out("so many open files are not allowed here");
    }
    let hull = Hull::networked("uml");
    let mount = format!("{}:/many-echo:ro", many_echo_program().display());
    let options = ["-v", &mount, "--ulimit", "nofile=20000:20000"];
    let container = hull.start(&options, &["/many-echo", "7000"]);
    eventually("it listens", Duration::from_secs(10), || {
        container.does("logs").ok().text() == "listening"
    });
    let address = (container.address(), 7000);
    let mut connections: Vec<_> = (0..MANY)
        .map(|index| connect(address).unwrap_or_else(|error| panic!("{index}: {error}")))
        .collect();
    // Twice, while all are open.
    for round in 0..2u32 {
        for (index, connection) in connections.iter_mut().enumerate() {
            connection
                .write_all(&(index as u32 ^ round).to_be_bytes())
                .unwrap();
        }
        for (index, connection) in connections.iter_mut().enumerate() {
            let mut answer = [0; 4];
            connection.read_exact(&mut answer).unwrap();
            assert_eq!(u32::from_be_bytes(answer), index as u32 ^ round);
        }
    }
}

#[test]
fn a_guest_has_the_mtu_of_its_network() {
    let network = CniNetwork::new(|configuration| configuration["plugins"][0]["mtu"] = 9000.into());
    let hull = Hull::new();
    let container = hull.start(&["--network", &network.name], &["sleep", "1000"]);
    let mtu = container.sh("cat /sys/class/net/eth0/mtu").ok().text();
    assert_eq!(mtu, "9000");
    let host = IpAddr::from(network.gateway);
    // One packet, as large as may be, and the way back.
    container
        .sh(&format!("ping -c 1 -W 5 -s {} {host}", 9000 - 28))
        .ok();
    let bytes = noise(5_000_000);
    let arrived = sends_to(&container, container.address(), &bytes);
    assert_eq!(arrived, digest(&bytes));
    receives_from(&container, host, 5_000_000);
    // The default is Ethernet's.
    let options = ["--network", "default"];
    let mtu = hull.run(&options, &["cat", "/sys/class/net/eth0/mtu"]).ok();
    assert_eq!(mtu.text(), "1500");
}

#[test]
fn a_rate_is_not_exceeded() {
    const LENGTH: usize = 3_000_000;
    // The burst, and inaccuracy between a guest's and the host's clocks, are left out.
    let least = Duration::from_millis(1500);
    let hull = Hull::networked("uml");
    let container = hull.start(&["--network-rate", "1m"], &["sleep", "1000"]);
    let bytes = noise(LENGTH);
    let begin = Instant::now();
    let arrived = sends_to(&container, container.address(), &bytes);
    assert!(
        begin.elapsed() > least,
        "to the guest: {:?}",
        begin.elapsed()
    );
    assert_eq!(arrived, digest(&bytes));
    let begin = Instant::now();
    receives_from(&container, GATEWAY.into(), LENGTH);
    assert!(
        begin.elapsed() > least,
        "from the guest: {:?}",
        begin.elapsed()
    );
}
