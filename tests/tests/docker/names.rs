//! Names in Docker's user-defined networks, which Docker's own name server knows: dockerd runs it
//! on the loopback interface of each container's network namespace, and a guest has another
//! loopback interface.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use hull_tests::{Docker, eventually};

/// How long Docker may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The addresses that `nslookup` prints for a name.
fn lookup(docker: &Docker, container: &str, name: &str) -> String {
    docker
        .exec_sh(container, &format!("nslookup {name} 2>&1"))
        .text()
}

#[test]
fn containers_of_a_docker_network_find_each_other_by_name() {
    let docker = Docker::with_networks();
    docker.docker(["network", "create", "net"]).run().ok();
    let on_net = ["--network", "net"];
    let web = docker.ready(&on_net, "echo ready; nc -ll -p 80 -e echo hello from web");
    let client = docker.sleeper(&on_net);
    assert!(
        docker
            .exec_sh(&client, "cat /etc/resolv.conf")
            .text()
            .contains("127.0.0.11"),
        "Docker's own name server"
    );
    let address = docker.inspect(&web, "{{.NetworkSettings.Networks.net.IPAddress}}");
    let found = lookup(&docker, &client, &web);
    assert!(found.contains(&address), "{found}");
    let said = docker.exec_sh(&client, &format!("nc {web} 80 </dev/null"));
    assert_eq!(said.ok().text(), "hello from web");
    // A container that comes later, by an alias.
    let late = docker.sleeper(&["--network", "net", "--network-alias", "alias"]);
    let address = docker.inspect(&late, "{{.NetworkSettings.Networks.net.IPAddress}}");
    assert!(lookup(&docker, &client, "alias").contains(&address));
    // Over TCP.
    let question = dns_question(&["alias"]);
    let octal: String = (question.len() as u16)
        .to_be_bytes()
        .iter()
        .chain(&question)
        .map(|byte| format!("\\{byte:03o}"))
        .collect();
    let script = format!("printf '{octal}' | timeout 5 nc 127.0.0.11 53 | od -An -tu1 -v");
    let answered = docker.exec_sh(&client, &script).text();
    let answer: Vec<u8> = answered
        .split_whitespace()
        .map(|byte| byte.parse().unwrap())
        .collect();
    let address: Ipv4Addr = address.parse().unwrap();
    assert!(answer.ends_with(&address.octets()), "{answer:?}");
}

#[test]
fn names_outside_of_a_docker_network_are_resolved_too() {
    let docker = Docker::with_networks();
    let gateway = "10.99.0.1";
    docker
        .docker(["network", "create", "--subnet", "10.99.0.0/24"])
        .args(["--gateway", gateway, "net"])
        .run()
        .ok();
    // dockerd asks from inside the container's namespace.
    let server = docker
        .host()
        .enter(|| UdpSocket::bind((gateway, 53)).unwrap());
    let outside = Ipv4Addr::new(203, 0, 113, 7);
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = server.recv_from(&mut question) {
            let answer = dns_answer(&question[..length], outside);
            server.send_to(&answer, from).unwrap();
        }
    });
    let client = docker.sleeper(&["--network", "net", "--dns", gateway]);
    for name in ["one.test", "two.test"] {
        let found = lookup(&docker, &client, name);
        assert!(found.contains(&outside.to_string()), "{found}");
    }
}

#[test]
fn a_container_is_a_name_server_itself_in_a_docker_network() {
    let docker = Docker::with_networks();
    docker.docker(["network", "create", "net"]).run().ok();
    // It binds port 53 of every address, and Docker's name server answers nevertheless.
    let server = docker.ready(
        &["--network", "net", "--network-alias", "ns"],
        "nc -ll -p 53 -e echo mine & sleep 1; echo ready; wait",
    );
    assert_eq!(
        docker.exec_sh(&server, "nc 127.0.0.1 53").ok().text(),
        "mine"
    );
    let address = docker.inspect(&server, "{{.NetworkSettings.Networks.net.IPAddress}}");
    assert!(lookup(&docker, &server, "ns").contains(&address));
}

#[test]
fn names_are_resolved_from_the_moment_that_a_container_is_connected_and_after_dockerd_came_again() {
    let mut docker = Docker::with_networks();
    docker.docker(["network", "create", "net"]).run().ok();
    let client = docker.sleeper(&["--network", "bridge"]);
    let other = docker.sleeper(&["--network", "net"]);
    let address = docker.inspect(&other, "{{.NetworkSettings.Networks.net.IPAddress}}");
    let connect = ["network", "connect", "net", &client];
    docker.docker(connect).run().ok();
    let finds = |docker: &Docker| {
        let query = format!("nslookup {other} 127.0.0.11 2>&1");
        let found = docker.exec_sh(&client, &query).text();
        found.contains(&address)
    };
    eventually("the name is found", PATIENCE, || finds(&docker));
    docker.kill_daemon();
    docker.start_daemon();
    eventually("the name is found again", PATIENCE, || finds(&docker));
}

/// A DNS message that asks for the IPv4 address of a name.
fn dns_question(labels: &[&str]) -> Vec<u8> {
    // Identification, recursion desired, one question.
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in labels {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// The answer: this address, or none if the question is for an address of another kind.
fn dns_answer(question: &[u8], address: Ipv4Addr) -> Vec<u8> {
    let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
    let asks_ipv4 = question[end - 4..end] == [0, 1, 0, 1];
    let mut answer = question[..end].to_vec();
    answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(asks_ipv4), 0, 0, 0, 0]);
    if asks_ipv4 {
        // The name of the question, the time to live, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}
