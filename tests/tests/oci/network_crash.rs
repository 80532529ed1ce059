//! Network namespaces of engines, and what can go wrong with them: interfaces that go, too many of
//! them, namespaces of others, crashes.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hull_tests::network::{Receiver, answers, http_server};
use hull_tests::{Link, Oci, digest, eventually, left_out};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const WORLD: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));

/// Log of the only pod's sandbox process.
fn log(oci: &Oci) -> String {
    let pods = fs::read_dir(oci.path("run/sandboxes")).unwrap().flatten();
    pods.map(|pod| fs::read_to_string(pod.path().join("sandbox.log")).unwrap_or_default())
        .collect()
}

#[test]
fn an_interface_that_goes_while_traffic_flows_does_no_harm() {
    let link = Link::new();
    link.add("net1", "198.51.100");
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    let listener = link
        .world
        .enter(|| std::net::TcpListener::bind(("198.51.100.1", 5000)).unwrap());
    init.goes_on("nc 198.51.100.1 5000 </dev/zero");
    let (mut stream, _) = listener.accept().unwrap();
    let mut bytes = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut stream, &mut bytes).unwrap();
    link.pod.ip("link delete net1");
    init.prints("ls /sys/class/net", |text| !text.contains("net1"));
    init.reaches("192.0.2.1");
    assert_eq!(init.status(), "running");
    init.delete().ok();
    oci.assert_clean();
}

#[test]
fn a_namespace_that_goes_while_the_container_runs_does_no_harm() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    init.goes_on("ping -q -i 0.01 192.0.2.1");
    init.reaches("192.0.2.1");
    link.pod.delete();
    link.world.delete();
    std::thread::sleep(Duration::from_millis(500));
    init.sh("echo well").ok();
    assert_eq!(init.status(), "running");
    init.kill("KILL").ok();
    assert_eq!(init.ends(), 137);
    init.does("delete").ok();
    oci.assert_clean();
}

#[test]
fn more_interfaces_than_the_machine_has_are_told_and_the_others_are_not_disturbed() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    link.add("net1", "198.51.100");
    init.prints("ip -o addr", |text| text.contains(" 198.51.100.2/24"));
    assert!(!log(&oci).contains("ERROR"), "{}", log(&oci));
    for number in 2..=7 {
        link.add(&format!("net{number}"), &format!("198.18.{number}"));
    }
    init.prints("ip -o addr", |text| text.contains(" 198.18.7.2/24"));
    link.add("net8", "198.18.8");
    eventually("it is logged", Duration::from_secs(2), || {
        log(&oci).contains("interface net8: the machine was started for 8")
    });
    assert_eq!(init.status(), "running");
    for address in ["192.0.2.1", "198.51.100.1"] {
        init.reaches(address);
    }
    // There is room for it once another one is gone.
    link.pod.ip("link delete net1");
    init.prints("ip -o addr", |text| text.contains(" 198.18.8.2/24"));
    init.reaches("198.18.8.1");
}

#[test]
fn changes_follow_while_there_are_more_interfaces_than_the_machine_has() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    for number in 1..=8 {
        link.add(&format!("net{number}"), &format!("198.18.{number}"));
    }
    init.prints("ip -o addr", |text| text.contains(" 198.18.1.2/24"));
    link.pod.ip("address add 192.0.2.7/24 dev eth0");
    init.prints("ip -o addr", |text| text.contains(" 192.0.2.7/24"));
}

#[test]
fn the_hosts_own_network_is_refused_by_name() {
    let oci = Oci::new();
    // By any path.
    let file = oci.path("netns");
    fs::write(&file, "").unwrap();
    mount("/proc/self/ns/net", &file, "", MountFlags::BIND, None).unwrap();
    let own = format!("/proc/{}/ns/net", std::process::id());
    let mut paths = vec!["/proc/self/ns/net", own.as_str(), file.to_str().unwrap()];
    // Not if process 1 belongs to another user.
    if fs::File::open("/proc/1/ns/net").is_ok() {
        paths.push("/proc/1/ns/net");
    }
    let create = |path| oci.creates(&oci.init(), &oci.bundle().at_network(path), &[]);
    let refused: Vec<_> = paths.into_iter().map(|path| (path, create(path))).collect();
    unmount(&file, UnmountFlags::DETACH).unwrap();
    for (path, output) in refused {
        eprintln!("{path}");
        output.fails(1, &["not supported", "host"]);
    }
    oci.assert_clean();
    let interfaces = hull_tests::Invocation::new("ip")
        .args(["-o", "link"])
        .run()
        .ok()
        .text();
    assert!(!interfaces.contains("hulltap"), "{interfaces}");
}

#[test]
fn what_is_no_network_namespace_is_refused_by_name() {
    let oci = Oci::new();
    let file = oci.path("file");
    fs::write(&file, "").unwrap();
    for path in [
        "/no/such/namespace",
        file.to_str().unwrap(),
        "/proc/self/ns/mnt",
        "/",
    ] {
        let init = oci.init();
        oci.creates(&init, &oci.bundle().at_network(path), &[])
            .fails(1, &[path]);
        oci.assert_clean();
    }
}

#[test]
fn an_interface_that_another_program_redirects_is_refused_and_left_alone() {
    let link = Link::new();
    link.pod.tc("qdisc add dev eth0 ingress").ok();
    link.pod
        .tc("filter add dev eth0 ingress protocol ip pref 7 u32 match ip dport 99 0xffff flowid 1:1")
        .ok();
    let filters = || link.pod.tc("filter show dev eth0 ingress").ok().text();
    let before = filters();
    let oci = Oci::new();
    let init = oci.init();
    oci.creates(&init, &oci.bundle().inside(&link.pod), &[])
        .fails(1, &["eth0", "filters of another program"])
        .hint("tc filter");
    assert_eq!(filters(), before);
    assert_eq!(link.pod.interfaces(), ["lo", "eth0"]);
    oci.assert_clean();
}

#[test]
fn two_machines_cannot_have_one_namespace() {
    let link = Link::new();
    let oci = Oci::new();
    let one = oci.start(&oci.bundle().inside(&link.pod));
    let two = oci.init();
    let output = oci.creates(&two, &oci.bundle().inside(&link.pod), &[]);
    assert!(
        one.pings("192.0.2.1"),
        "the first one is cut off; the second one: {output:?}"
    );
    output.fails(1, &["not supported", "two machines"]);
}

#[test]
fn nothing_is_left_in_the_namespace() {
    let link = Link::new();
    link.add("net1", "198.51.100");
    let oci = Oci::new();
    for end in ["kill", "delete --force", "exit", "create"] {
        let bundle = match end {
            "exit" => oci.bundle().sh("exit 3"),
            _ => oci.bundle(),
        };
        let init = oci.create(&bundle.inside(&link.pod));
        if end != "create" {
            init.does("start").ok();
        }
        match end {
            "kill" => {
                init.kill("KILL").ok();
                init.ends();
                init.does("delete").ok();
            }
            "exit" => {
                assert_eq!(init.ends(), 3);
                init.does("delete").ok();
            }
            _ => drop(init.delete().ok()),
        }
        oci.assert_clean();
        assert_eq!(link.pod.traces(), [""; 0], "after {end}");
        // The existing ones work as before.
        let address: IpAddr = "198.51.100.2".parse().unwrap();
        let server = link
            .pod
            .enter(|| std::net::TcpListener::bind((address, 5000)).unwrap());
        link.world
            .enter(|| hull_tests::network::connect((address, 5000)).unwrap());
        drop(server);
    }
}

#[test]
fn after_a_crash_the_next_container_in_the_namespace_works() {
    let link = Link::new();
    let oci = Oci::new();
    for process in ["pod", "machine", "devices", "keeper"] {
        let script = format!("({}) & echo ready; sleep 1000", http_server("hello"));
        let init = oci.start(&oci.bundle().sh(&script).inside(&link.pod));
        init.says("ready");
        link.world.enter(|| answers((POD, 80), "hello"));
        init.kill_host_process(process);
        init.is_gone_after_delete();
        eprintln!("after {process}");
    }
    let init = oci.start(&oci.bundle().inside(&link.pod));
    init.reaches("192.0.2.1");
    assert_eq!(
        init.sh("ip -o -4 addr show dev eth0")
            .ok()
            .text()
            .lines()
            .count(),
        1
    );
}

#[test]
fn after_a_crash_the_next_container_in_the_namespace_works_before_anybody_cleans_up() {
    let link = Link::new();
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    init.kill_host_process("pod");
    init.becomes("stopped");
    let next = oci.start(&oci.bundle().inside(&link.pod));
    next.reaches("192.0.2.1");
    init.delete().ok();
    next.reaches("192.0.2.1");
}

#[test]
fn a_lossy_link_carries_tcp() {
    let link = Link::new();
    let netem = link.world.tc("qdisc add dev eth0 root netem loss 20%");
    if netem.status != 0 {
        return left_out(&format!(
            "the kernel has no netem: {}",
            netem.error().trim()
        ));
    }
    let oci = Oci::new();
    let init = oci.start(&oci.bundle().inside(&link.pod));
    let receiver = link.world.enter(Receiver::new);
    let script = format!(
        "head -c 1000000 /dev/urandom >/dev/shm/data; sha256sum /dev/shm/data | cut -c 1-64; \
         nc {WORLD} {} </dev/shm/data",
        receiver.port
    );
    let sent = init.sh(&script).ok().text();
    assert_eq!(digest(&receiver.finish()), format!("sha256:{sent}"));
}
