//! podman's networks, with netavark and aardvark-dns, on a host of the test's own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use hull_tests::network::{
    Receiver, addresses, answers, ask, digest_of, get, http_server, noise, send,
};
use hull_tests::{Podman, descendants, digest, eventually, udp_echo_program};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const NETWORK: &[&str] = &["--network", "podman"];

/// The addresses of a container's interface, as it sees them itself.
fn addresses_of(podman: &Podman, name: &str, interface: &str) -> Vec<IpAddr> {
    let script = format!("ip -o addr show dev {interface}");
    addresses(&podman.exec_sh(name, &script).ok().text())
}

fn address_of(podman: &Podman, name: &str) -> IpAddr {
    let all = addresses_of(podman, name, "eth0");
    *all.iter().find(|address| address.is_ipv4()).unwrap()
}

fn server(podman: &Podman, options: &[&str], text: &str) -> String {
    let script = format!("({}) & echo ready; sleep 1000", http_server(text));
    podman.ready(options, &script)
}

/// A container gets this answer from a server.
#[track_caller]
fn fetches(podman: &Podman, client: &str, host: &str, wanted: &str) {
    let url = format!("http://{host}/index.html");
    let mut last = None;
    let what = format!("{wanted:?} from {url}");
    eventually(&what, Duration::from_secs(20), || {
        let output = podman.exec(client, &["wget", "-q", "-O", "-", &url]);
        let found = output.text() == wanted;
        last = Some(output);
        found
    });
}

/// Whether a container gets an answer from there.
fn reaches(podman: &Podman, client: &str, host: &str) -> bool {
    podman
        .exec(client, &["ping", "-c", "1", "-W", "2", host])
        .status
        == 0
}

fn network(podman: &Podman, name: &str, options: &[&str]) {
    podman
        .podman(["network", "create"])
        .args(options)
        .arg(name)
        .run()
        .ok();
}

#[test]
fn podman_containers_are_in_the_default_network() {
    let podman = Podman::with_networks();
    let one = server(&podman, NETWORK, "one");
    let two = podman.sleeper(NETWORK);
    let address = address_of(&podman, &one);
    assert_eq!(
        podman.inspect(&one, "{{.NetworkSettings.IPAddress}}"),
        address.to_string()
    );
    assert_eq!(
        podman.inspect(&one, "{{.NetworkSettings.MacAddress}}"),
        podman
            .exec(&one, &["cat", "/sys/class/net/eth0/address"])
            .ok()
            .text()
    );
    podman.host().enter(|| answers((address, 80), "one"));
    fetches(&podman, &two, &address.to_string(), "one");
    let gateway = podman.inspect(&one, "{{.NetworkSettings.Gateway}}");
    assert!(reaches(&podman, &two, &gateway));
    podman.does("stop", &two).ok();
    podman.host().enter(|| answers((address, 80), "one"));
    podman.assert_clean();
}

#[test]
fn podman_containers_have_no_interfaces_but_those_of_their_networks() {
    let podman = Podman::with_networks();
    network(&podman, "own", &[]);
    let name = podman.sleeper(NETWORK);
    let interfaces = || podman.exec(&name, &["ls", "/sys/class/net"]).ok().text();
    assert_eq!(interfaces(), "eth0\nlo");
    podman
        .podman(["network", "connect", "own", &name])
        .run()
        .ok();
    eventually("eth1 comes", Duration::from_secs(5), || {
        interfaces() == "eth0\neth1\nlo"
    });
    podman
        .podman(["network", "disconnect", "own", &name])
        .run()
        .ok();
    eventually("eth1 goes", Duration::from_secs(5), || {
        interfaces() == "eth0\nlo"
    });
}

#[test]
fn podman_carries_much_both_ways() {
    const LENGTH: usize = 5_000_000;
    let podman = Podman::with_networks();
    let name = podman.sleeper(NETWORK);
    let address = address_of(&podman, &name);
    podman
        .podman(["exec", "-d", &name, "sh", "-c"])
        .arg("nc -l -p 5000 | sha256sum >/sum.new; mv /sum.new /sum")
        .run()
        .ok();
    let bytes = noise(LENGTH);
    podman.host().enter(|| send((address, 5000), &bytes));
    let script = "until test -e /sum; do sleep 0.05; done; cat /sum";
    let arrived = podman.exec_sh(&name, script).ok().text();
    assert_eq!(digest_of(&arrived), digest(&bytes));

    let receiver = podman.host().enter(Receiver::new);
    let gateway = podman.inspect(&name, "{{.NetworkSettings.Gateway}}");
    let script = format!(
        "head -c {LENGTH} /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data; nc {gateway} {} </dev/shm/data",
        receiver.port
    );
    let sent = podman.exec_sh(&name, &script).ok().text();
    assert_eq!(digest(&receiver.finish()), digest_of(&sent));
}

#[test]
fn podman_containers_find_each_other_by_name() {
    let podman = Podman::with_networks();
    network(&podman, "own", &[]);
    let options = ["--network", "own"];
    let one = server(
        &podman,
        &[&options[..], &["--network-alias", "web"]].concat(),
        "one",
    );
    let two = server(&podman, &options, "two");
    for host in [one.as_str(), "web"] {
        fetches(&podman, &two, host, "one");
    }
    fetches(&podman, &one, &two, "two");
    assert!(reaches(&podman, &one, &two));
    let unknown = podman.exec(&one, &["ping", "-c", "1", "no-such-name"]);
    assert_ne!(unknown.status, 0);
    // The other network does not know them.
    let other = podman.sleeper(NETWORK);
    assert!(!reaches(&podman, &other, &one));
    podman
        .podman(["rm", "-f", "-t", "0", &one, &two, &other])
        .run()
        .ok();
    podman.podman(["network", "rm", "own"]).run().ok();
    podman.assert_clean();
}

#[test]
fn podman_networks_have_ipv6_and_addresses_of_choice() {
    let podman = Podman::with_networks();
    let options = [
        "--ipv6",
        "--subnet",
        "10.20.30.0/24",
        "--subnet",
        "fd00:20:30::/64",
        "--opt",
        "mtu=1400",
    ];
    network(&podman, "own", &options);
    let options = [
        "--network",
        "own:ip=10.20.30.40,ip6=fd00:20:30::40,mac=02:42:0a:14:1e:28",
    ];
    let name = server(&podman, &options, "here");
    let wanted: [IpAddr; 2] = ["10.20.30.40", "fd00:20:30::40"].map(|text| text.parse().unwrap());
    assert_eq!(addresses_of(&podman, &name, "eth0"), wanted);
    let link = podman
        .exec(&name, &["ip", "-o", "link", "show", "eth0"])
        .ok()
        .text();
    assert!(
        link.contains("mtu 1400") && link.contains("02:42:0a:14:1e:28"),
        "{link}"
    );
    for address in wanted {
        podman.host().enter(|| answers((address, 80), "here"));
    }
    for gateway in ["10.20.30.1", "fd00:20:30::1"] {
        assert!(reaches(&podman, &name, gateway), "{gateway}");
    }
}

#[test]
fn podman_publishes_ports() {
    let podman = Podman::with_networks();
    let program = format!("{}:/udp-echo:ro", udp_echo_program().display());
    let options = [
        NETWORK,
        &[
            "-p",
            "8080:80",
            "-p",
            "127.0.0.1:8081:80",
            "-p",
            "4000:4000/udp",
            "-v",
            &program,
        ],
    ]
    .concat();
    let script = format!(
        "/udp-echo 4000 & ({}) & echo ready; sleep 1000",
        http_server("out")
    );
    let name = podman.ready(&options, &script);
    let gateway: IpAddr = podman
        .inspect(&name, "{{.NetworkSettings.Gateway}}")
        .parse()
        .unwrap();
    podman.host().enter(|| {
        answers((LOOPBACK, 8080), "out");
        answers((LOOPBACK, 8081), "out");
        answers((gateway, 8080), "out");
        assert!(get((gateway, 8081)).is_err(), "published on loopback only");
        eventually("an answer", Duration::from_secs(10), || {
            ask((gateway, 4000), b"question").as_deref() == Some(b"QUESTION")
        });
    });
    let shown = podman.podman(["port", &name]).run().ok().text();
    assert!(shown.contains("80/tcp -> 0.0.0.0:8080"), "{shown}");
    podman.podman(["rm", "-f", "-t", "0", &name]).run().ok();
    podman
        .host()
        .enter(|| assert!(get((LOOPBACK, 8080)).is_err()));
    podman.assert_clean();
}

// Its port handler dials the container's own address, inside.
#[test]
fn podman_publishes_ports_of_slirp4netns() {
    let podman = Podman::with_networks();
    let options = ["--network", "slirp4netns", "-p", "8080:80"];
    let name = server(&podman, &options, "slirp");
    podman.host().enter(|| answers((LOOPBACK, 8080), "slirp"));
    podman.podman(["rm", "-f", "-t", "0", &name]).run().ok();
    podman.assert_clean();
}

#[test]
fn podman_connects_and_disconnects_networks_of_a_running_container() {
    let podman = Podman::with_networks();
    network(&podman, "first", &[]);
    network(&podman, "second", &[]);
    let name = server(&podman, &["--network", "first"], "movable");
    let other = podman.sleeper(&["--network", "second"]);
    let change = |verb: &str, network: &str| {
        podman.podman(["network", verb, network, &name]).run().ok();
    };
    // Of all interfaces, whichever exist.
    let count = || {
        let listed = podman.exec_sh(&name, "ip -o addr").ok().text();
        addresses(&listed).len()
    };
    let becomes = |wanted: usize| {
        let what = format!("{wanted} addresses");
        eventually(&what, Duration::from_secs(5), || count() == wanted);
    };
    assert_eq!(count(), 1);
    assert!(!reaches(&podman, &other, &name));

    change("connect", "second");
    becomes(2);
    fetches(&podman, &other, &name, "movable");
    let address = addresses_of(&podman, &name, "eth1")[0];
    podman.host().enter(|| answers((address, 80), "movable"));
    // The first network still works.
    let address = address_of(&podman, &name);
    podman.host().enter(|| answers((address, 80), "movable"));

    change("disconnect", "second");
    becomes(1);
    assert!(!reaches(&podman, &other, &name));
    podman.host().enter(|| answers((address, 80), "movable"));

    // Again, and the other one away.
    change("connect", "second");
    change("disconnect", "first");
    becomes(1);
    fetches(&podman, &other, &name, "movable");
    // All, and back.
    change("disconnect", "second");
    becomes(0);
    change("connect", "first");
    becomes(1);
    let address = addresses(&podman.exec_sh(&name, "ip -o addr").ok().text())[0];
    podman.host().enter(|| answers((address, 80), "movable"));
    podman
        .podman(["rm", "-f", "-t", "0", &name, &other])
        .run()
        .ok();
    podman
        .podman(["network", "rm", "first", "second"])
        .run()
        .ok();
    podman.assert_clean();
}

#[test]
fn podman_pods_share_one_network_and_its_ports() {
    let podman = Podman::with_networks();
    let pod = podman.unique("pod");
    podman
        .podman([
            "pod",
            "create",
            "--network",
            "podman",
            "-p",
            "8080:80",
            "--name",
            &pod,
        ])
        .run()
        .ok();
    let web = server(&podman, &["--pod", &pod], "of the pod");
    let side = podman.sleeper(&["--pod", &pod]);
    fetches(&podman, &side, "127.0.0.1", "of the pod");
    podman
        .host()
        .enter(|| answers((LOOPBACK, 8080), "of the pod"));
    let address = address_of(&podman, &web);
    assert_eq!(address_of(&podman, &side), address);
    podman.host().enter(|| answers((address, 80), "of the pod"));
    podman
        .podman(["pod", "rm", "-f", "-t", "0", &pod])
        .run()
        .ok();
    podman.assert_clean();
}

#[test]
fn podman_containers_can_join_the_network_of_another_one() {
    let podman = Podman::with_networks();
    let options = [NETWORK, &["-p", "8080:80"]].concat();
    let owner = podman.sleeper(&options);
    let machines = || {
        let found = descendants();
        found
            .values()
            .filter(|command| command.contains("sandbox-process"))
            .count()
    };
    let before = machines();
    let web = server(
        &podman,
        &["--network", &format!("container:{owner}")],
        "guest",
    );
    if podman.runtime.is_hull() {
        assert_eq!(machines(), before, "one machine for both");
    }
    assert_eq!(address_of(&podman, &owner), address_of(&podman, &web));
    fetches(&podman, &owner, "127.0.0.1", "guest");
    podman.host().enter(|| answers((LOOPBACK, 8080), "guest"));
    // Not together with the other one, which it depends on.
    podman.podman(["rm", "-f", "-t", "0", &web]).run().ok();
}

#[test]
fn podman_containers_without_a_network_have_only_loopback() {
    let podman = Podman::with_networks();
    let output = podman
        .run(&["--network", "none"], &["ls", "/sys/class/net"])
        .ok();
    assert_eq!(output.text(), "lo");
}

#[test]
fn podman_restarts_a_container_in_its_network() {
    let podman = Podman::with_networks();
    let options = [NETWORK, &["-p", "8080:80"]].concat();
    let name = server(&podman, &options, "again");
    podman.host().enter(|| answers((LOOPBACK, 8080), "again"));
    podman.podman(["restart", "-t", "0", &name]).run().ok();
    podman.host().enter(|| answers((LOOPBACK, 8080), "again"));
    podman.podman(["stop", "-t", "0", &name]).run().ok();
    podman.host().enter(|| {
        let address: SocketAddr = (LOOPBACK, 8080).into();
        assert!(get(address).is_err());
    });
    podman.does("start", &name).ok();
    podman.host().enter(|| answers((LOOPBACK, 8080), "again"));
}
