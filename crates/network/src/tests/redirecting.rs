//! Connections to the loopback address of a namespace, with the kernel's packet filter; and sockets
//! in a namespace.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread::{self, JoinHandle};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::support::{Place, SOON, has_ipv6};
use crate::redirect::{Family, Redirect};
use crate::{Namespace, sockets};

/// Connects inside, sends a message and returns the answer.
fn asking(namespace: &Namespace, to: SocketAddr) -> JoinHandle<std::io::Result<String>> {
    let namespace = namespace.clone();
    let dial = move || {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"hello")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    thread::spawn(move || namespace.run_in(dial).unwrap())
}

/// Opens the redirect, or reports that the kernel does not support it.
fn redirect(test: &str, place: &Place) -> Option<Redirect> {
    match Redirect::open(&place.namespace) {
        Ok(redirect) => Some(redirect),
        Err(error) if error.hint().is_some() => {
            println!("left out: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Accepts a connection to an address, and answers with the port that it was opened to.
async fn answer(redirect: &Redirect, address: IpAddr) {
    let accepted = redirect.accept().await.unwrap();
    assert_eq!(accepted.to.ip(), address);
    let (mut stream, port) = (accepted.stream, accepted.to.port());
    let mut question = [0; 5];
    stream.read_exact(&mut question).await.unwrap();
    assert_eq!(&question, b"hello");
    let answer = port.to_string();
    stream.write_all(answer.as_bytes()).await.unwrap();
}

#[tokio::test]
async fn connections_to_loopback_arrive_with_their_port() {
    let test = "connections_to_loopback_arrive_with_their_port";
    let Some(place) = Place::new(test) else {
        return;
    };
    let Some(redirect) = redirect(test, &place) else {
        return;
    };
    let families = [Family::V4, Family::V6];
    for family in families.into_iter().take(1 + usize::from(has_ipv6())) {
        for port in [1, 80, 8080, 65535] {
            let asked = asking(&place.namespace, (family.loopback(), port).into());
            answer(&redirect, family.loopback()).await;
            assert_eq!(asked.join().unwrap().unwrap(), port.to_string());
        }
    }
}

#[tokio::test]
async fn connections_to_an_interface_arrive_with_their_address() {
    let test = "connections_to_an_interface_arrive_with_their_address";
    let Some(place) = Place::new(test) else {
        return;
    };
    let bridge = place.add_bridge("eth0").await;
    place.add_address(bridge, "10.0.2.100/24").await;
    place.up("eth0").await;
    let Some(redirect) = redirect(test, &place) else {
        return;
    };
    let address = [10, 0, 2, 100].into();
    let asked = asking(&place.namespace, (address, 80).into());
    answer(&redirect, address).await;
    assert_eq!(asked.join().unwrap().unwrap(), "80");
    // Also one that comes later.
    place.add_address(bridge, "10.0.2.101/24").await;
    let address = [10, 0, 2, 101].into();
    let asked = asking(&place.namespace, (address, 81).into());
    answer(&redirect, address).await;
    assert_eq!(asked.join().unwrap().unwrap(), "81");
}

#[tokio::test]
async fn other_addresses_and_other_protocols_are_left_alone() {
    let test = "other_addresses_and_other_protocols_are_left_alone";
    let Some(place) = Place::new(test) else {
        return;
    };
    let Some(redirect) = redirect(test, &place) else {
        return;
    };
    let server = place
        .namespace
        .run_in(|| TcpListener::bind("127.0.0.11:80").unwrap())
        .unwrap();
    let serving = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(b"a name server").unwrap();
        let _ = stream.read(&mut [0; 5]);
    });
    let asked = asking(&place.namespace, ([127, 0, 0, 11], 80).into());
    assert_eq!(asked.join().unwrap().unwrap(), "a name server");
    serving.join().unwrap();

    let datagram = place.namespace.run_in(|| {
        let server = UdpSocket::bind("127.0.0.1:53").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"x", "127.0.0.1:53").unwrap();
        server.set_read_timeout(Some(SOON)).unwrap();
        server.recv(&mut [0; 1]).unwrap()
    });
    assert_eq!(datagram.unwrap(), 1);

    // Our own port is not redirected to itself: that connection is closed, the next one is served.
    let own = (Ipv4Addr::LOCALHOST, redirect.ports()[0]).into();
    let to_ourselves = asking(&place.namespace, own);
    let asked = asking(&place.namespace, ([127, 0, 0, 1], 7).into());
    answer(&redirect, Ipv4Addr::LOCALHOST.into()).await;
    assert_eq!(asked.join().unwrap().unwrap(), "7");
    assert!(!matches!(to_ourselves.join().unwrap(), Ok(text) if !text.is_empty()));
}

#[tokio::test]
async fn when_it_ends_the_namespace_is_as_before() {
    let test = "when_it_ends_the_namespace_is_as_before";
    let Some(place) = Place::new(test) else {
        return;
    };
    for turn in 0..3 {
        let Some(redirect) = redirect(test, &place) else {
            return;
        };
        // A second one at the same time is refused: a namespace has one machine.
        assert!(Redirect::open(&place.namespace).is_err());
        match turn {
            0 => drop(redirect),
            _ => redirect.end(),
        }
        let refused = asking(&place.namespace, ([127, 0, 0, 1], 80).into());
        let error = refused.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn sockets_speak_from_inside() {
    let Some(place) = Place::new("sockets_speak_from_inside") else {
        return;
    };
    let address = Ipv4Addr::new(127, 0, 0, 11);
    assert!(!sockets::listens(&place.namespace, address).unwrap());
    let server = place
        .namespace
        .run_in(|| UdpSocket::bind((address, 53)).unwrap())
        .unwrap();
    assert!(sockets::listens(&place.namespace, address).unwrap());
    let others = Ipv4Addr::LOCALHOST;
    assert!(!sockets::listens(&place.namespace, others).unwrap());

    let to = SocketAddrV4::new(address, 53);
    let client = sockets::udp(&place.namespace, to).unwrap();
    client.send(b"question").await.unwrap();
    let mut buffer = [0; 16];
    server.set_read_timeout(Some(SOON)).unwrap();
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"question");
    server.send_to(b"answer", from).unwrap();
    let length = client.recv(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..length], b"answer");

    let dialled = sockets::tcp(&place.namespace, to).unwrap();
    let error = dialled.connect(to.into()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    drop(server);
    client.send(b"question").await.unwrap();
    let error = client.recv(&mut buffer).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}
