//! The loopback interface of an engine's network namespace and that of the guest: an engine that
//! dials 127.0.0.1 in the namespace of a pod, as for `kubectl port-forward`, reaches the servers of
//! its containers.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use hull_tests::{Bundle, Init, Netns, Oci, eventually, tcp_echo_program};
use serde_json::json;

hull_tests::on_every_machine!(a_server_is_reached_from_the_namespace);

/// How long a peer may keep a test waiting.
const PATIENCE: Duration = Duration::from_secs(20);

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// A container whose network namespace was created by an engine.
fn inside(bundle: Bundle, netns: &Netns) -> Bundle {
    bundle.with(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == "network" {
                namespace["path"] = json!(netns.path());
            }
        }
    })
}

/// A container with an echo server on port 8080.
fn echo<'a>(oci: &'a Oci, netns: &Netns) -> Init<'a> {
    let bundle = inside(oci.bundle(), netns).args(&["/tcp-echo", "8080"]);
    std::fs::copy(tcp_echo_program(), bundle.root("tcp-echo")).unwrap();
    let init = oci.start(&bundle);
    init.says("ready");
    init
}

/// Dials in the namespace, as an engine does.
fn dial(netns: &Netns, address: IpAddr, port: u16) -> std::io::Result<TcpStream> {
    let to = SocketAddr::new(address, port);
    let stream = netns.enter(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Sends all of it while reading, and returns what came back.
fn exchange(mut stream: TcpStream, message: &[u8]) -> Vec<u8> {
    let mut sending = stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            sending.write_all(message).unwrap();
            sending.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answer
    })
}

/// How a connection fails if nothing listens: before or after it is established.
fn refusal(netns: &Netns, port: u16) -> ErrorKind {
    match dial(netns, V4, port) {
        Ok(mut stream) => stream.read(&mut [0; 1]).unwrap_err().kind(),
        Err(error) => error.kind(),
    }
}

fn a_server_is_reached_from_the_namespace(machine: &'static str) {
    let netns = Netns::new();
    let oci = Oci::on(machine);
    let _init = echo(&oci, &netns);
    let message: Vec<u8> = (0..=250u8).cycle().take(1 << 20).collect();
    let mut addresses = vec![V4];
    if hull_tests::network::has_ipv6() {
        addresses.push(V6);
    }
    for address in addresses {
        let stream = dial(&netns, address, 8080).unwrap();
        assert!(exchange(stream, &message) == message, "{address}");
    }
    assert_eq!(refusal(&netns, 8081), ErrorKind::ConnectionReset);
}

#[test]
fn a_server_on_one_address_is_reached_by_either() {
    let netns = Netns::new();
    let oci = Oci::new();
    let script = "mkdir /www; echo page >/www/page; httpd -f -p 127.0.0.1:80 -h /www";
    let init = oci.start(&inside(oci.bundle(), &netns).sh(script));
    eventually("the server listens", PATIENCE, || {
        init.sh("netstat -tln").text().contains("127.0.0.1:80 ")
    });
    for address in [V4, V6] {
        if address == V6 && !hull_tests::network::has_ipv6() {
            continue;
        }
        let stream = dial(&netns, address, 80).unwrap();
        let answer = exchange(stream, b"GET /page HTTP/1.0\r\n\r\n");
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.ends_with("\r\n\r\npage\n"), "{answer}");
    }
}

#[test]
fn a_hundred_connections_at_once() {
    let netns = Netns::new();
    let oci = Oci::new();
    let _init = echo(&oci, &netns);
    let streams: Vec<TcpStream> = (0..100).map(|_| dial(&netns, V4, 8080).unwrap()).collect();
    std::thread::scope(|scope| {
        for (number, stream) in streams.into_iter().enumerate() {
            scope.spawn(move || {
                let message = format!("connection {number}");
                assert_eq!(exchange(stream, message.as_bytes()), message.as_bytes());
            });
        }
    });
    // Many more than can be carried at a time, and most of them are never accepted.
    let many: Vec<_> = (0..400).map(|_| dial(&netns, V4, 8081)).collect();
    drop(many);
    let stream = dial(&netns, V4, 8080).unwrap();
    assert_eq!(exchange(stream, b"still"), b"still");
}

#[test]
fn a_client_that_does_not_read_stops_the_server() {
    let netns = Netns::new();
    let oci = Oci::new();
    let script = "nc -ll -p 8080 -e sh -c 'dd if=/dev/zero bs=64k count=1000 2>/dev/null; echo done >/done' & echo ready; wait";
    let init = oci.start(&inside(oci.bundle(), &netns).sh(script));
    init.says("ready");
    eventually("the server listens", PATIENCE, || {
        init.sh("netstat -tln").text().contains(":8080 ")
    });
    let mut stream = dial(&netns, V4, 8080).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    init.sh("test ! -e /done").ok();
    let mut length = 0;
    let mut piece = vec![0; 1 << 16];
    loop {
        match stream.read(&mut piece).unwrap() {
            0 => break,
            count => length += count,
        }
    }
    assert_eq!(length, 64 * 1024 * 1000);
}

#[test]
fn what_listens_in_the_namespace_elsewhere_stays_reachable() {
    let netns = Netns::new();
    let oci = Oci::new();
    let other = Ipv4Addr::new(127, 0, 0, 53);
    let server = netns.enter(|| TcpListener::bind((other, 8080)).unwrap());
    let _init = echo(&oci, &netns);
    let mut stream = dial(&netns, other.into(), 8080).unwrap();
    server.accept().unwrap().0.write_all(b"the host's").unwrap();
    let mut said = [0; 10];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"the host's");
}

#[test]
fn containers_of_a_pod_are_reached_by_their_ports_and_nothing_stays_behind() {
    let netns = Netns::new();
    let oci = Oci::new();
    let pod = oci.unique();
    let of_pod = |bundle: Bundle| {
        inside(bundle, &netns)
            .with(|config| config["annotations"]["io.kubernetes.cri-o.SandboxID"] = json!(pod))
    };
    let one = oci.start(&of_pod(oci.bundle()).sh("nc -ll -p 8080 -e echo one"));
    let two = oci.start(&of_pod(oci.bundle()).sh("nc -ll -p 8081 -e echo two"));
    for (port, said) in [(8080, "one\n"), (8081, "two\n")] {
        eventually(said, PATIENCE, || {
            let Ok(mut stream) = dial(&netns, V4, port) else {
                return false;
            };
            let mut text = String::new();
            stream.read_to_string(&mut text).is_ok() && text == said
        });
    }
    one.delete().ok();
    assert_eq!(refusal(&netns, 8080), ErrorKind::ConnectionReset);
    two.delete().ok();
    // The container is gone, and the namespace is as it was.
    assert_eq!(refusal(&netns, 8080), ErrorKind::ConnectionRefused);
    let server = netns.enter(|| TcpListener::bind((V4, 8080)).unwrap());
    dial(&netns, V4, 8080).unwrap();
    server.accept().unwrap();
}

#[test]
fn after_a_crash_the_next_pod_has_the_namespace() {
    let netns = Netns::new();
    let oci = Oci::new();
    let init = echo(&oci, &netns);
    init.kill_host_process("pod");
    init.ends();
    assert_eq!(refusal(&netns, 8080), ErrorKind::ConnectionRefused);
    init.delete().ok();
    let _next = echo(&oci, &netns);
    let stream = dial(&netns, V4, 8080).unwrap();
    assert_eq!(exchange(stream, b"again"), b"again");
}
