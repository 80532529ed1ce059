//! Network namespaces that an engine has set up, with `hull-oci`: the guest has their contents, and
//! follows changes.

use std::net::{IpAddr, Ipv4Addr};

use hull_tests::network::{Receiver, answers, http_server, noise, send};
use hull_tests::{Bundle, Init, Invocation, Link, Netns, Oci, descendants, digest, left_out};
use serde_json::json;

hull_tests::on_every_machine!(
    what_is_in_the_namespace_is_in_the_guest,
    traffic_goes_both_ways,
    changes_of_the_namespace_follow,
);

const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

fn in_pod(bundle: Bundle, pod: &str) -> Bundle {
    bundle.with(|config| config["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!(pod))
}

fn what_is_in_the_namespace_is_in_the_guest(machine: &'static str) {
    let link = Link::new();
    link.add("net1", "198.51.100");
    for command in [
        "link set eth0 address 02:42:c0:00:02:02",
        "link set net1 mtu 9000",
        "address add 192.0.2.3/24 dev eth0",
        "address add 203.0.113.1/32 dev net1",
        "route add 10.1.0.0/16 via 192.0.2.9 metric 77",
        "route add 10.2.0.0/16 dev net1",
        "route add blackhole 10.3.0.0/16",
        "route add 2001:db8:1::/48 via 2001:db8::9 dev eth0 metric 78",
        "route add default via 2001:db8::1 dev eth0",
        "neighbour add 192.0.2.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "neighbour add 2001:db8::77 lladdr 02:00:00:00:00:78 dev eth0 nud permanent",
    ] {
        link.pod.ip(command);
    }
    let oci = Oci::on(machine);
    let init = oci.start(&oci.bundle().inside(&link.pod));
    let links = init.sh("ip -o link").ok().text();
    for (name, parts) in [
        ("eth0", ["mtu 1500", "02:42:c0:00:02:02", "LOWER_UP"]),
        ("net1", ["mtu 9000", "link/ether", "LOWER_UP"]),
    ] {
        let line = links
            .lines()
            .find(|line| line.contains(&format!(" {name}: ")))
            .unwrap_or_else(|| panic!("no {name}: {links}"));
        for part in parts {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    let mac = link.pod.ip("-o link show net1");
    let mac = mac.split("link/ether ").nth(1).unwrap().split(' ').next();
    let found = init.sh("cat /sys/class/net/net1/address").ok().text();
    assert_eq!(mac, Some(found.as_str()));

    let lines = |script: &str, wanted: &[&str]| {
        let text = init.sh(script).ok().text();
        for line in wanted {
            let words: Vec<&str> = line.split(' ').collect();
            let found = text
                .lines()
                .any(|line| words.iter().all(|word| line.contains(word)));
            assert!(found, "{script}: no {line:?} in\n{text}");
        }
    };
    lines(
        "ip -o addr",
        &[
            "eth0 192.0.2.2/24",
            "eth0 192.0.2.3/24 secondary",
            "eth0 2001:db8::2/64",
            "eth0 fe80::",
            "net1 198.51.100.2/24",
            "net1 203.0.113.1/32",
        ],
    );
    lines(
        "ip route",
        &[
            "default 192.0.2.1 eth0",
            "192.0.2.0/24 eth0",
            "10.1.0.0/16 192.0.2.9 eth0 metric 77",
            "10.2.0.0/16 net1",
            "blackhole 10.3.0.0/16",
        ],
    );
    lines(
        "ip -6 route",
        &[
            "2001:db8::/64 eth0",
            "2001:db8:1::/48 2001:db8::9 eth0 78",
            "default 2001:db8::1 eth0",
        ],
    );
    lines(
        "ip neigh; ip -6 neigh",
        &[
            "192.0.2.77 eth0 02:00:00:00:00:77 PERMANENT",
            "2001:db8::77 eth0 02:00:00:00:00:78 PERMANENT",
        ],
    );
    for address in ["192.0.2.1", "2001:db8::1", "198.51.100.1"] {
        init.reaches(address);
    }
}

#[test]
fn a_guest_has_the_interfaces_of_the_namespace_and_no_others() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    assert_eq!(init.sh("ls /sys/class/net").ok().text(), "eth0\nlo");
    let empty = Netns::new();
    let init = oci.start(&oci.bundle().inside(&empty));
    assert_eq!(init.sh("ls /sys/class/net").ok().text(), "lo");
}

fn traffic_goes_both_ways(machine: &'static str) {
    const LENGTH: usize = 5_000_000;
    let link = Link::new();
    // Large packets on the way, too.
    link.add("net1", "198.51.100");
    link.world.ip("link set net1 mtu 9000");
    link.pod.ip("link set net1 mtu 9000");
    let oci = Oci::on(machine);
    let script = format!("({}) & echo ready; sleep 1000", http_server("hello"));
    let init = oci.start(&oci.bundle().sh(&script).inside(&link.pod));
    init.says("ready");
    let bytes = noise(LENGTH);
    for (world, pod) in [
        ("192.0.2.1", "192.0.2.2"),
        ("2001:db8::1", "2001:db8::2"),
        ("198.51.100.1", "198.51.100.2"),
    ] {
        let pod: IpAddr = pod.parse().unwrap();
        link.world.enter(|| answers((pod, 80), "hello"));
        init.goes_on("nc -l -p 5000 | sha256sum >/sum.new; mv /sum.new /sum");
        link.world.enter(|| send((pod, 5000), &bytes));
        let script = "until test -e /sum; do sleep 0.05; done; cut -c 1-64 /sum; rm /sum";
        let arrived = init.sh(script).ok().text();
        assert_eq!(format!("sha256:{arrived}"), digest(&bytes), "to {pod}");

        let receiver = link.world.enter(Receiver::new);
        let script = format!(
            "head -c {LENGTH} /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data | cut -c 1-64; \
             nc {world} {} </dev/shm/data",
            receiver.port
        );
        let sent = init.sh(&script).ok().text();
        assert_eq!(
            digest(&receiver.finish()),
            format!("sha256:{sent}"),
            "to {world}"
        );
        init.reaches(&format!("-s 20000 {world}"));
    }
}

fn changes_of_the_namespace_follow(machine: &'static str) {
    let link = Link::new();
    let oci = Oci::on(machine);
    let init = oci.start(&oci.bundle().inside(&link.pod));
    init.reaches("192.0.2.1");

    // Addresses.
    link.pod.ip("address add 192.0.2.4/24 dev eth0");
    init.prints("ip -o addr", |text| text.contains(" 192.0.2.4/24"));
    link.pod.ip("address add 2001:db8::4/64 dev eth0 nodad");
    init.prints("ip -o addr", |text| text.contains(" 2001:db8::4/64"));
    link.pod.ip("address delete 192.0.2.4/24 dev eth0");
    init.prints("ip -o addr", |text| !text.contains(" 192.0.2.4/24"));

    // Routes and neighbours.
    link.pod.ip("route add 10.9.0.0/16 via 192.0.2.9");
    init.prints("ip route", |text| {
        text.contains("10.9.0.0/16 via 192.0.2.9")
    });
    link.pod.ip("route delete 10.9.0.0/16");
    init.prints("ip route", |text| !text.contains("10.9.0.0/16"));
    link.pod
        .ip("neighbour add 192.0.2.78 lladdr 02:00:00:00:00:78 dev eth0 nud permanent");
    init.prints("ip neigh", |text| text.contains("02:00:00:00:00:78"));

    // The interface itself.
    link.pod.ip("link set eth0 mtu 1400");
    init.prints("ip -o link", |text| text.contains("mtu 1400"));
    link.pod.ip("link set eth0 address 02:42:c0:00:02:99");
    init.prints("ip -o link", |text| text.contains("02:42:c0:00:02:99"));
    init.reaches("192.0.2.1");

    // Another interface comes, carries traffic, and goes.
    link.add("net1", "198.51.100");
    init.prints("ip -o addr", |text| text.contains(" 198.51.100.2/24"));
    init.reaches("198.51.100.1");
    link.pod.ip("link delete net1");
    init.prints("ls /sys/class/net", |text| !text.contains("net1"));
    init.reaches("192.0.2.1");
    // One of the same name.
    link.add("net1", "203.0.113");
    init.prints("ip -o addr", |text| {
        text.contains(" 203.0.113.2/24") && !text.contains("198.51.100.2")
    });
    init.reaches("203.0.113.1");

    // All of them go.
    link.pod.ip("link delete net1");
    link.pod.ip("link delete eth0");
    init.prints("ip -o addr", |text| {
        !text.contains("192.0.2.") && !text.contains("203.0.113.")
    });
    link.pod.join("eth0", &link.world, "eth0");
    link.pod.ip("address add 192.0.2.5/24 dev eth0");
    link.world.ip("address add 192.0.2.1/24 dev eth0");
    init.prints("ip -o addr", |text| text.contains(" 192.0.2.5/24"));
    init.reaches("192.0.2.1");
}

#[test]
fn what_is_set_up_while_the_container_waits_for_its_start_is_there_when_it_starts() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.create(&oci.bundle().sh("ip -o addr; sleep 1000").inside(&link.pod));
    link.pod.ip("address add 192.0.2.6/24 dev eth0");
    init.does("start").ok();
    init.says(" 192.0.2.6/24");
}

#[test]
fn an_engine_can_fill_a_new_namespace_between_create_and_start() {
    // As Docker does since version 28: no path, no hook, only the process id.
    let world = Netns::new();
    let oci = Oci::new();
    let script = "ip -o addr; ping -c 1 -W 5 192.0.2.1; sleep 1000";
    let init = oci.create(&oci.bundle().pinging().sh(script));
    let pid = init.keeper();
    world.ip(&format!(
        "link add eth0 type veth peer name eth0 netns {pid}"
    ));
    world.ip("address add 192.0.2.1/24 dev eth0");
    world.ip("link set eth0 up");
    for command in ["address add 192.0.2.2/24 dev eth0", "link set eth0 up"] {
        Invocation::new("nsenter")
            .arg(format!("--net=/proc/{pid}/ns/net"))
            .arg("ip")
            .args(command.split(' '))
            .run()
            .ok();
    }
    init.does("start").ok();
    init.says(" 192.0.2.2/24");
    init.says("1 packets received");
}

#[test]
fn what_hooks_set_up_in_the_containers_namespace_is_in_the_guest() {
    // As Docker does.
    let world = Netns::new();
    let oci = Oci::new();
    let script = format!(
        "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/') && \
         ip -n {0} link add eth0 type veth peer name eth0 netns $pid && \
         ip -n {0} address add 192.0.2.1/24 dev eth0 && ip -n {0} link set eth0 up && \
         nsenter --net=/proc/$pid/ns/net sh -c 'ip address add 192.0.2.2/24 dev eth0 && ip link set eth0 up'",
        world.name
    );
    let bundle = oci.bundle().hook("prestart", &script).pinging();
    let init = oci.start(&bundle);
    init.prints("ip -o addr", |text| text.contains(" 192.0.2.2/24"));
    init.reaches("192.0.2.1");
}

#[test]
fn a_macvlan_is_brought_into_the_guest() {
    let link = Link::new();
    for command in [
        "link add w1 type veth peer name w2",
        "link set w1 up",
        "link set w2 up",
        "address add 198.51.100.1/24 dev w2",
    ] {
        link.world.ip(command);
    }
    let made = hull_tests::Invocation::new("ip")
        .args(["-n", &link.world.name])
        .args("link add link w1 name net1 type macvlan mode bridge".split(' '))
        .run();
    if made.status != 0 {
        return left_out(&format!("no macvlan is to be had: {}", made.error().trim()));
    }
    link.world
        .ip(&format!("link set net1 netns {}", link.pod.name));
    link.pod.ip("address add 198.51.100.2/24 dev net1");
    link.pod.ip("link set net1 up");
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    init.reaches("198.51.100.1");
    init.reaches("192.0.2.1");
}

#[test]
fn containers_of_a_pod_share_its_namespace() {
    let link = Link::new();
    let oci = Oci::new();
    let pod = oci.unique();
    let script = format!("({}) & echo ready; sleep 1000", http_server("sidecar"));
    let one = oci.start(&in_pod(oci.bundle().sh(&script).inside(&link.pod), &pod));
    one.says("ready");
    let two = oci.start(&in_pod(oci.bundle().inside(&link.pod), &pod));
    let machines = descendants();
    let machines = machines
        .values()
        .filter(|command| command.contains("sandbox-process"));
    assert_eq!(machines.count(), 1);
    let addresses = |init: &Init<'_>| init.sh("ip -o addr").ok().text();
    assert_eq!(addresses(&one), addresses(&two));
    link.world.enter(|| answers((POD, 80), "sidecar"));
    let output = two.sh("wget -q -O - http://127.0.0.1/index.html").ok();
    assert_eq!(output.text(), "sidecar");
    one.delete().ok();
    two.reaches("192.0.2.1");
    two.delete().ok();
    oci.assert_clean();
}

#[test]
fn a_container_of_a_pod_in_another_namespace_has_a_machine_of_its_own() {
    let (link, other) = (Link::new(), Link::new());
    let oci = Oci::new();
    let pod = oci.unique();
    let one = oci.start(&in_pod(oci.bundle().inside(&link.pod), &pod));
    let two = oci.start(&in_pod(oci.bundle().inside(&other.pod), &pod));
    let machine = |init: &Init<'_>| init.sh("cat /proc/sys/kernel/random/boot_id").ok().text();
    assert_ne!(machine(&one), machine(&two));
    one.reaches("192.0.2.1");
    two.reaches("192.0.2.1");
}
