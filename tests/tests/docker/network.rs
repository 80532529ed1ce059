//! Docker's networks, on a host of the test's own.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hull_tests::network::{
    Receiver, addresses, answers, ask, digest_of, get, http_server, noise, send,
};
use hull_tests::{Docker, digest, eventually, udp_echo_program};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const BRIDGE: &[&str] = &["--network", "bridge"];

/// All addresses of a container, as it sees them itself.
fn addresses_of(docker: &Docker, name: &str) -> Vec<IpAddr> {
    addresses(&docker.exec_sh(name, "ip -o addr").ok().text())
}

fn server(docker: &Docker, options: &[&str], text: &str) -> String {
    let script = format!("({}) & echo ready; sleep 1000", http_server(text));
    docker.ready(options, &script)
}

/// A container gets this answer from a server.
#[track_caller]
fn fetches(docker: &Docker, client: &str, host: IpAddr, wanted: &str) {
    let url = format!("http://{host}/index.html");
    let what = format!("{wanted:?} from {url}");
    eventually(&what, Duration::from_secs(20), || {
        // A request sent before the interface was there must not use up the time.
        let output = docker.exec(client, &["timeout", "5", "wget", "-q", "-O", "-", &url]);
        output.text() == wanted
    });
}

/// Whether a container gets an answer from there.
fn reaches(docker: &Docker, client: &str, host: IpAddr) -> bool {
    docker
        .exec(client, &["ping", "-c", "1", "-W", "2", &host.to_string()])
        .status
        == 0
}

fn network(docker: &Docker, name: &str, options: &[&str]) {
    docker
        .docker(["network", "create"])
        .args(options)
        .arg(name)
        .run()
        .ok();
}

#[test]
fn docker_a_network_of_its_own_in_the_machine_of_another_container_is_refused() {
    let docker = Docker::with_networks();
    let one = docker.sleeper(BRIDGE);
    let pid = format!("--pid=container:{one}");
    let run = |network: &str| {
        docker
            .docker(["run", "--rm", &pid, "--network", network])
            .args(["busybox", "ip", "-o", "addr"])
            .run()
    };
    let error = run("bridge").ends(125).error();
    assert!(
        error.contains("not supported: a network of its own"),
        "{error}"
    );
    assert!(!run("none").ok().text().contains("eth0"));
    let other = format!("container:{one}");
    assert_eq!(
        addresses(&run(&other).ok().text()),
        addresses_of(&docker, &one)
    );
}

#[test]
fn docker_containers_are_in_the_default_network() {
    let docker = Docker::with_networks();
    let one = server(&docker, BRIDGE, "one");
    let two = docker.sleeper(BRIDGE);
    let found = addresses_of(&docker, &one);
    let [address] = found[..] else {
        panic!("{found:?}");
    };
    let told = docker.inspect(&one, "{{.NetworkSettings.Networks.bridge.IPAddress}}");
    assert_eq!(told, address.to_string());
    let mac = docker.inspect(&one, "{{.NetworkSettings.Networks.bridge.MacAddress}}");
    let inside = docker.exec(&one, &["cat", "/sys/class/net/eth0/address"]);
    assert_eq!(inside.ok().text(), mac);
    docker.host().enter(|| answers((address, 80), "one"));
    fetches(&docker, &two, address, "one");
    let gateway = docker.inspect(&one, "{{.NetworkSettings.Networks.bridge.Gateway}}");
    assert!(reaches(&docker, &two, gateway.parse().unwrap()));
    let hosts = docker.exec(&one, &["cat", "/etc/hosts"]).ok().text();
    assert!(hosts.contains(&told), "{hosts}");
    docker.does("kill", &two).ok();
    docker.host().enter(|| answers((address, 80), "one"));
    docker.assert_clean();
}

#[test]
fn docker_containers_have_no_interfaces_but_those_of_their_networks() {
    let docker = Docker::with_networks();
    let list = ["ls", "/sys/class/net"];
    let name = docker.sleeper(BRIDGE);
    assert_eq!(docker.exec(&name, &list).ok().text(), "eth0\nlo");
    assert_eq!(docker.run(&["--network", "none"], &list).ok().text(), "lo");
}

#[test]
fn docker_carries_much_both_ways() {
    const LENGTH: usize = 5_000_000;
    let docker = Docker::with_networks();
    let name = docker.sleeper(BRIDGE);
    let address = addresses_of(&docker, &name)[0];
    docker
        .docker(["exec", "-d", &name, "sh", "-c"])
        .arg("nc -l -p 5000 | sha256sum >/sum.new; mv /sum.new /sum")
        .run()
        .ok();
    let bytes = noise(LENGTH);
    docker.host().enter(|| send((address, 5000), &bytes));
    let script = "until test -e /sum; do sleep 0.05; done; cat /sum";
    let arrived = docker.exec_sh(&name, script).ok().text();
    assert_eq!(digest_of(&arrived), digest(&bytes));

    let receiver = docker.host().enter(Receiver::new);
    let gateway = docker.inspect(&name, "{{.NetworkSettings.Networks.bridge.Gateway}}");
    let script = format!(
        "head -c {LENGTH} /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data; nc {gateway} {} </dev/shm/data",
        receiver.port
    );
    let sent = docker.exec_sh(&name, &script).ok().text();
    assert_eq!(digest(&receiver.finish()), digest_of(&sent));
}

#[test]
fn docker_networks_have_ipv6_and_addresses_of_choice() {
    let docker = Docker::with_networks();
    let options = [
        "--ipv6",
        "--subnet",
        "10.20.30.0/24",
        "--subnet",
        "fd00:20:30::/64",
        "--opt",
        "com.docker.network.driver.mtu=1400",
    ];
    network(&docker, "own", &options);
    let options = [
        "--network",
        "own",
        "--ip",
        "10.20.30.40",
        "--ip6",
        "fd00:20:30::40",
        "--mac-address",
        "02:42:0a:14:1e:28",
    ];
    let name = server(&docker, &options, "here");
    let wanted: [IpAddr; 2] = ["10.20.30.40", "fd00:20:30::40"].map(|text| text.parse().unwrap());
    assert_eq!(addresses_of(&docker, &name), wanted);
    let link = docker
        .exec(&name, &["ip", "-o", "link", "show", "eth0"])
        .ok()
        .text();
    assert!(
        link.contains("mtu 1400") && link.contains("02:42:0a:14:1e:28"),
        "{link}"
    );
    for address in wanted {
        docker.host().enter(|| answers((address, 80), "here"));
    }
    for gateway in ["10.20.30.1", "fd00:20:30::1"] {
        assert!(
            reaches(&docker, &name, gateway.parse().unwrap()),
            "{gateway}"
        );
    }
}

#[test]
fn docker_networks_are_apart() {
    let docker = Docker::with_networks();
    network(&docker, "own", &["--subnet", "10.20.30.0/24"]);
    let one = server(&docker, &["--network", "own"], "one");
    let two = docker.sleeper(&["--network", "own"]);
    let other = docker.sleeper(BRIDGE);
    let address = addresses_of(&docker, &one)[0];
    fetches(&docker, &two, address, "one");
    assert!(!reaches(&docker, &other, address));
    docker.docker(["rm", "-f", &one, &two, &other]).run().ok();
    docker.docker(["network", "rm", "own"]).run().ok();
    docker.assert_clean();
}

#[test]
fn docker_publishes_ports() {
    let docker = Docker::with_networks();
    let program = format!("{}:/udp-echo:ro", udp_echo_program().display());
    let options = [
        BRIDGE,
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
    let name = docker.ready(&options, &script);
    let gateway: IpAddr = docker
        .inspect(&name, "{{.NetworkSettings.Networks.bridge.Gateway}}")
        .parse()
        .unwrap();
    docker.host().enter(|| {
        answers((LOOPBACK, 8080), "out");
        answers((LOOPBACK, 8081), "out");
        answers((gateway, 8080), "out");
        assert!(get((gateway, 8081)).is_err(), "published on loopback only");
        eventually("an answer", Duration::from_secs(10), || {
            ask((gateway, 4000), b"question").as_deref() == Some(b"QUESTION")
        });
    });
    let shown = docker.does("port", &name).ok().text();
    assert!(shown.contains("80/tcp -> 0.0.0.0:8080"), "{shown}");
    docker.docker(["rm", "-f", &name]).run().ok();
    docker
        .host()
        .enter(|| assert!(get((LOOPBACK, 8080)).is_err()));
    docker.assert_clean();
}

#[test]
fn docker_connects_and_disconnects_networks_of_a_running_container() {
    let docker = Docker::with_networks();
    network(&docker, "first", &["--subnet", "10.20.1.0/24"]);
    network(&docker, "second", &["--subnet", "10.20.2.0/24"]);
    let name = server(&docker, &["--network", "first"], "movable");
    let other = docker.sleeper(&["--network", "second"]);
    let change = |arguments: &[&str]| {
        docker.docker(["network"]).args(arguments).run().ok();
    };
    let becomes = |wanted: &[&str]| {
        let mut wanted: Vec<IpAddr> = wanted.iter().map(|text| text.parse().unwrap()).collect();
        wanted.sort();
        let what = format!("{wanted:?}");
        eventually(&what, Duration::from_secs(5), || {
            let mut found = addresses_of(&docker, &name);
            found.sort();
            found == wanted
        });
    };
    let at = |address: &str| {
        let address: IpAddr = address.parse().unwrap();
        docker.host().enter(|| answers((address, 80), "movable"));
    };
    becomes(&["10.20.1.2"]);
    let second: IpAddr = "10.20.2.77".parse().unwrap();
    assert!(!reaches(&docker, &other, second));

    change(&["connect", "--ip", "10.20.2.77", "second", &name]);
    becomes(&["10.20.1.2", "10.20.2.77"]);
    fetches(&docker, &other, second, "movable");
    at("10.20.2.77");
    at("10.20.1.2");

    change(&["disconnect", "second", &name]);
    becomes(&["10.20.1.2"]);
    assert!(!reaches(&docker, &other, second));
    at("10.20.1.2");

    change(&["connect", "--ip", "10.20.2.77", "second", &name]);
    change(&["disconnect", "first", &name]);
    becomes(&["10.20.2.77"]);
    fetches(&docker, &other, second, "movable");
    docker.docker(["rm", "-f", &name, &other]).run().ok();
    change(&["rm", "first", "second"]);
    docker.assert_clean();
}

#[test]
fn docker_containers_can_be_in_many_networks() {
    let docker = Docker::with_networks();
    let name = docker.unique("many");
    let networks = ["one", "two", "three", "four"];
    for (index, network_name) in networks.iter().enumerate() {
        let subnet = format!("10.20.{index}.0/24");
        network(&docker, network_name, &["--subnet", &subnet]);
    }
    docker
        .docker(["create", "--network", networks[0], "--name", &name])
        .args(["busybox", "sleep", "1000"])
        .run()
        .ok();
    for network_name in &networks[1..] {
        docker
            .docker(["network", "connect", network_name, &name])
            .run()
            .ok();
    }
    docker.does("start", &name).ok();
    eventually("an address in each", Duration::from_secs(5), || {
        addresses_of(&docker, &name).len() == networks.len()
    });
    for index in 0..networks.len() {
        let gateway: IpAddr = format!("10.20.{index}.1").parse().unwrap();
        assert!(reaches(&docker, &name, gateway), "{gateway}");
    }
}

#[test]
fn docker_containers_can_join_the_network_of_another_one() {
    let docker = Docker::with_networks();
    let options = [BRIDGE, &["-p", "8080:80"]].concat();
    let owner = docker.sleeper(&options);
    let web = server(
        &docker,
        &["--network", &format!("container:{owner}")],
        "guest",
    );
    assert_eq!(addresses_of(&docker, &owner), addresses_of(&docker, &web));
    fetches(&docker, &owner, LOOPBACK, "guest");
    docker.host().enter(|| answers((LOOPBACK, 8080), "guest"));
}

#[test]
fn docker_restarts_a_container_in_its_network() {
    let docker = Docker::with_networks();
    let options = [BRIDGE, &["-p", "8080:80"]].concat();
    let name = server(&docker, &options, "again");
    docker.host().enter(|| answers((LOOPBACK, 8080), "again"));
    docker.docker(["restart", "-t", "0", &name]).run().ok();
    docker.host().enter(|| answers((LOOPBACK, 8080), "again"));
    docker.does("kill", &name).ok();
    docker
        .host()
        .enter(|| assert!(get((LOOPBACK, 8080)).is_err()));
    docker.does("start", &name).ok();
    docker.host().enter(|| answers((LOOPBACK, 8080), "again"));
    docker.assert_clean();
}

#[test]
fn docker_restarted_finds_its_containers_in_their_networks() {
    let mut docker = Docker::with_networks();
    let name = server(&docker, BRIDGE, "still here");
    let address = addresses_of(&docker, &name)[0];
    docker.kill_daemon();
    docker.host().enter(|| answers((address, 80), "still here"));
    docker.start_daemon();
    docker.host().enter(|| answers((address, 80), "still here"));
    docker.does("kill", &name).ok();
}
