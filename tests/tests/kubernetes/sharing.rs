//! What the containers of a pod share: a machine, its network, and namespaces.

use hull_tests::kubernetes::{Cluster, container, pod, with};
use serde_json::json;

#[test]
fn containers_of_a_pod_share_a_machine_an_address_and_loopback() {
    let cluster = Cluster::new();
    let two = with(
        pod(
            "two",
            "echo hello >/index.html; exec httpd -f -p 127.0.0.1:8080 -h /",
        ),
        &[("/spec/containers/1", container("other", "exec sleep 1000"))],
    );
    cluster.run(&two);
    let boot = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(cluster.sh("two/main", boot), cluster.sh("two/other", boot));
    assert_eq!(
        cluster.sh("two/other", "wget -qO- http://127.0.0.1:8080"),
        "hello"
    );
    assert_eq!(cluster.sh("two/other", "hostname"), "two");
    let address = cluster.address("two");
    assert!(
        cluster
            .sh("two/main", "ip addr show eth0")
            .contains(&address)
    );
    let resolver = cluster.sh("two/main", "cat /etc/resolv.conf");
    assert!(resolver.contains("nameserver 10.96.0.10"), "{resolver}");
    assert!(cluster.sh("two/main", "cat /etc/hosts").contains(&address));
}

#[test]
fn processes_are_seen_by_all_containers_when_the_pod_says_so() {
    let cluster = Cluster::new();
    let two = |name: &str, shared: bool| {
        with(
            pod(name, "exec sleep 12345"),
            &[
                ("/spec/shareProcessNamespace", json!(shared)),
                ("/spec/containers/1", container("other", "exec sleep 1000")),
            ],
        )
    };
    cluster.run(&two("shared", true));
    assert!(cluster.sh("shared/other", "ps").contains("sleep 12345"));
    cluster.run(&two("apart", false));
    assert!(!cluster.sh("apart/other", "ps").contains("sleep 12345"));
}

#[test]
fn processes_and_ipc_of_the_host_are_those_of_the_machine() {
    let cluster = Cluster::new();
    let one = with(
        pod("one", "exec sleep 1000"),
        &[
            ("/spec/hostPID", json!(true)),
            ("/spec/hostIPC", json!(true)),
        ],
    );
    cluster.run(&one);
    let seen = cluster.sh("one", "ps");
    assert!(seen.contains("sleep 1000"), "{seen}");
    // Of the node's own, none is there.
    assert!(!seen.contains("kubelet"), "{seen}");
}

#[test]
fn aliases_of_hosts_are_in_the_hosts_file() {
    let cluster = Cluster::new();
    let one = with(
        pod("one", "exec sleep 1000"),
        &[(
            "/spec/hostAliases",
            json!([{"ip": "192.0.2.7", "hostnames": ["db", "db.example"]}]),
        )],
    );
    cluster.run(&one);
    let line = cluster.sh("one", "grep 192.0.2.7 /etc/hosts");
    assert_eq!(
        line.split_whitespace().collect::<Vec<_>>(),
        ["192.0.2.7", "db", "db.example"]
    );
}

#[test]
fn a_port_of_the_node_leads_into_the_pod() {
    let cluster = Cluster::new();
    let web = with(
        pod("web", "echo hello >/index.html; exec httpd -f -p 8080 -h /"),
        &[(
            "/spec/containers/0/ports",
            json!([{"containerPort": 8080, "hostPort": 18080}]),
        )],
    );
    cluster.run(&web);
    let got = || {
        use std::io::{Read, Write};
        let mut connection = std::net::TcpStream::connect("192.0.2.1:18080").ok()?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    hull_tests::eventually("an answer", std::time::Duration::from_secs(20), || {
        got().is_some_and(|answer| answer.ends_with("hello\n"))
    });
}
