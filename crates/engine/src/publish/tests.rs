#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::io::Read;
use std::net::{TcpListener, TcpStream, UdpSocket};

use hull_network::ports::reserve;

use super::*;

fn one(
    host_ip: Option<&str>,
    host_port: HostPort,
    container_port: u16,
    protocol: Protocol,
) -> Published {
    let host_ip = host_ip.map(|ip| ip.parse().unwrap());
    Published {
        host_ip,
        host_port,
        container_port,
        protocol,
    }
}

#[test]
fn one_port_in_all_its_forms() {
    use HostPort::{Any, One, OneOf};
    use Protocol::{Sctp, Tcp, Udp};
    for (text, published) in [
        ("80", one(None, Any, 80, Tcp)),
        (":80", one(None, Any, 80, Tcp)),
        ("0:80", one(None, Any, 80, Tcp)),
        ("8080:80", one(None, One(8080), 80, Tcp)),
        ("8080:80/udp", one(None, One(8080), 80, Udp)),
        ("53/UDP", one(None, Any, 53, Udp)),
        ("1:2/sctp", one(None, One(1), 2, Sctp)),
        (
            "127.0.0.1:8080:80",
            one(Some("127.0.0.1"), One(8080), 80, Tcp),
        ),
        ("127.0.0.1::80", one(Some("127.0.0.1"), Any, 80, Tcp)),
        ("[::1]:8080:80", one(Some("::1"), One(8080), 80, Tcp)),
        ("[::1]::80/tcp", one(Some("::1"), Any, 80, Tcp)),
        ("::1:8080:80", one(Some("::1"), One(8080), 80, Tcp)),
        ("8000-8010:80", one(None, OneOf(8000, 8010), 80, Tcp)),
        (
            "0.0.0.0:65535:65535",
            one(Some("0.0.0.0"), One(65535), 65535, Tcp),
        ),
    ] {
        assert_eq!(publish(text), Ok(Ports(vec![published])), "{text}");
    }
}

#[test]
fn ranges() {
    let ports = publish("127.0.0.1:8000-8002:80-82/udp").unwrap().0;
    let pairs: Vec<_> = ports
        .iter()
        .map(|port| (port.host_port, port.container_port))
        .collect();
    let expected =
        [(8000, 80), (8001, 81), (8002, 82)].map(|(host, port)| (HostPort::One(host), port));
    assert_eq!(pairs, expected);
    let ports = publish("80-81").unwrap().0;
    assert_eq!(ports.len(), 2);
    assert!(ports.iter().all(|port| port.host_port == HostPort::Any));
    assert_eq!(publish("1-65535:1-65535").unwrap().0.len(), 65535);
}

#[test]
fn mistakes_name_the_argument() {
    for (text, why) in [
        ("", "no container port"),
        ("8080:", "no container port"),
        ("/tcp", "no container port"),
        ("x", "invalid container port \"x\""),
        ("80/", "invalid protocol \"\": tcp, udp or sctp"),
        ("80/icmp", "invalid protocol \"icmp\": tcp, udp or sctp"),
        ("80:0", "invalid container port \"0\""),
        ("80:65536", "invalid container port \"65536\""),
        ("80:-1", "invalid container port \"-1\""),
        ("80:+1", "invalid container port \"+1\""),
        ("80:82-81", "invalid container port \"82-81\""),
        ("x:80", "invalid host port \"x\""),
        ("0-9:80-89", "invalid host port \"0-9\""),
        (
            "8000-8002:80-81",
            "the ranges 8000-8002 and 80-81 are not of the same length",
        ),
        (
            "8000:80-81",
            "the ranges 8000 and 80-81 are not of the same length",
        ),
        (":80:80", "invalid IP address \"\""),
        ("localhost:80:80", "invalid IP address \"localhost\""),
        ("[127.0.0.1]:80:80", "invalid IP address \"[127.0.0.1]\""),
        ("[::1:80:80", "invalid IP address \"[::1\""),
        ("1.2.3.4:5:6:7", "invalid IP address \"1.2.3.4:5\""),
    ] {
        let error = publish(text).unwrap_err();
        assert_eq!(error, format!("invalid published port {text:?}: {why}"));
    }
}

#[test]
fn ports_are_found_and_held() {
    let published = publish("127.0.0.1::80-82").unwrap().0;
    let reserved = reserve(&published).unwrap();
    let ports: HashSet<u16> = reserved
        .mappings
        .iter()
        .map(|mapping| mapping.host_port)
        .collect();
    assert_eq!((ports.len(), ports.contains(&0)), (3, false));
    let containers: Vec<u16> = reserved
        .mappings
        .iter()
        .map(|mapping| mapping.container_port)
        .collect();
    assert_eq!(containers, [80, 81, 82]);

    let port = reserved.mappings[0].host_port;
    assert!(
        TcpListener::bind(("127.0.0.1", port)).is_err(),
        "held against servers of the host"
    );
    let again = publish(&format!("127.0.0.1:{port}:80")).unwrap().0;
    let expected = format!("cannot publish 127.0.0.1:{port}/tcp: port is already allocated");
    assert_eq!(reserve(&again).unwrap_err().to_string(), expected);
    let everywhere = publish(&format!("{port}:80")).unwrap().0;
    let expected = format!("cannot publish 0.0.0.0:{port}/tcp: port is already allocated");
    assert_eq!(reserve(&everywhere).unwrap_err().to_string(), expected);
    reserve(&publish(&format!("127.0.0.1:{port}:80/udp")).unwrap().0).unwrap();
    drop(reserved);
    reserve(&again).unwrap();
}

#[test]
fn connections_that_have_ended_do_not_occupy_a_port() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    // Who closes first keeps the connection in TIME_WAIT, here the side of the port.
    drop(server.accept().unwrap());
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop((client, server));

    let published = publish(&format!("{address}:80")).unwrap().0;
    let reserved = reserve(&published).unwrap();
    assert!(reserve(&published).is_err(), "held against containers");
    assert!(TcpListener::bind(address).is_err(), "held against servers");
    let error = TcpStream::connect(address).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    drop(reserved);
    reserve(&published).unwrap();
}

#[test]
fn the_first_free_port_of_a_range() {
    // A range with one taken port at its beginning, wherever this machine has one.
    let (taken, first) = (0..100)
        .find_map(|_| {
            let taken = UdpSocket::bind("127.0.0.1:0").ok()?;
            let port = taken.local_addr().ok()?.port();
            let free = port < 65535 && UdpSocket::bind(("127.0.0.1", port + 1)).is_ok();
            free.then_some((taken, port))
        })
        .unwrap();
    let range = publish(&format!("127.0.0.1:{first}-{}:53/udp", first + 1))
        .unwrap()
        .0;
    let reserved = reserve(&range).unwrap();
    assert_eq!(reserved.mappings[0].host_port, first + 1);
    let error = reserve(&range).unwrap_err().to_string();
    assert!(
        error.ends_with("/udp: port is already allocated"),
        "{error}"
    );
    drop(taken);
    assert_eq!(reserve(&range).unwrap().mappings[0].host_port, first);
}

#[test]
fn all_addresses_and_what_is_said_twice() {
    let mut published = publish("80").unwrap().0;
    let reserved = reserve(&published).unwrap();
    let port = reserved.mappings[0].host_port;
    assert!(TcpListener::bind(("0.0.0.0", port)).is_err());
    drop(reserved);
    published = publish(&format!("{port}:80")).unwrap().0;
    published.extend(published.clone());
    assert_eq!(reserve(&published).unwrap().mappings.len(), 1);
    published.extend(publish(&format!("{port}:81")).unwrap().0);
    assert!(
        reserve(&published)
            .unwrap_err()
            .to_string()
            .contains("already allocated")
    );
    let taken = publish("192.0.2.1:8080:80").unwrap().0;
    let error = reserve(&taken).unwrap_err().to_string();
    assert_eq!(
        error,
        "cannot publish 192.0.2.1:8080/tcp: the host has no such address"
    );
    reserve(&publish("127.0.0.1::80/sctp").unwrap().0).unwrap();
}

#[test]
fn hosts() {
    let ip = |text: &str| HostAddress::Ip(text.parse().unwrap());
    for (text, name, address) in [
        ("db:10.0.0.5", "db", ip("10.0.0.5")),
        ("db:::1", "db", ip("::1")),
        ("db:[fd00::5]", "db", ip("fd00::5")),
        ("db=fd00::5", "db", ip("fd00::5")),
        (
            "my_db.example:host-gateway",
            "my_db.example",
            HostAddress::Gateway,
        ),
    ] {
        assert_eq!(add_host(text), Ok((name.to_owned(), address)), "{text}");
    }
    for text in [
        "",
        "db",
        "db:",
        ":1.2.3.4",
        "db:1.2.3",
        "a b:1.2.3.4",
        "a\n:1.2.3.4",
        "a:b=1.2.3.4",
        "db:gateway",
    ] {
        let error = add_host(text).unwrap_err();
        assert!(
            error.starts_with(&format!("invalid host {text:?}: ")),
            "{error}"
        );
    }
}

#[test]
fn name_resolution() {
    assert_eq!(dns("fd00::1"), Ok("fd00::1".parse().unwrap()));
    for text in ["", "ns.example", "1.2.3.4:53"] {
        assert!(dns(text).is_err(), "{text}");
    }
    for text in [".", "example", "a.example.org", "example.org.", "_tcp.x-y"] {
        assert_eq!(dns_search(text), Ok(text.to_owned()));
    }
    for text in [
        "",
        "..",
        "a..b",
        "-a",
        "a b",
        "1.2",
        "a\nb",
        &"a".repeat(64),
    ] {
        assert!(dns_search(text).is_err(), "{text}");
    }
    assert_eq!(dns_option("ndots:2"), Ok("ndots:2".to_owned()));
    for text in ["", "a b", "a\nnameserver 1.2.3.4", "#"] {
        assert!(dns_option(text).is_err(), "{text}");
    }
}

#[test]
fn addresses_of_a_container() {
    assert_eq!(
        mac_address("92:d0:C6:0a:29:33"),
        Ok([0x92, 0xd0, 0xc6, 0x0a, 0x29, 0x33])
    );
    assert_eq!(
        mac_address("92-d0-c6-0a-29-33"),
        Ok([0x92, 0xd0, 0xc6, 0x0a, 0x29, 0x33])
    );
    for text in [
        "",
        "92:d0:c6:0a:29",
        "92:d0:c6:0a:29:33:1",
        "93:d0:c6:0a:29:33",
        "00:00:00:00:00:00",
        "+2:d0:c6:0a:29:33",
    ] {
        assert!(mac_address(text).is_err(), "{text}");
    }
    assert_eq!(ip("10.87.0.5"), Ok([10, 87, 0, 5].into()));
    for text in ["", "::1", "0.0.0.0", "127.0.0.1", "224.0.0.1", "10.0.0.5/8"] {
        assert!(ip(text).is_err(), "{text}");
    }
    assert_eq!(ip6("fd00::5"), Ok("fd00::5".parse().unwrap()));
    for text in [
        "",
        "10.0.0.1",
        "::",
        "::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "[fd00::5]",
    ] {
        assert!(ip6(text).is_err(), "{text}");
    }
}
