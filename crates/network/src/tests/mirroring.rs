//! Taps and mirroring: frames arrive at the other end, both ways, and nothing is left over.

use std::net::UdpSocket;
use std::time::Instant;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::support::{
    NEVER, Place, SOON, changed, drain, frame, hear, is_silent, joined, read, send, write,
};
use crate::{Error, Interface, Tap, TapOptions, mirror, sockets, tap};

const ARP: &[u8] = &[0x08, 0x06];
const IP4: &[u8] = &[0x08, 0x00];
const UNKNOWN: &[u8] = &[0x88, 0xb5];
/// VLAN 5, with IPv4 inside.
const VLAN: &[u8] = &[0x81, 0x00, 0x00, 0x05, 0x08, 0x00];

async fn tap(place: &Place, interface: &Interface) -> Tap {
    let options = TapOptions::default();
    Tap::create(&place.namespace, &place.netlink, interface, &options)
        .await
        .unwrap()
}

/// True, with a message, if taps cannot be created here.
fn no_taps(test: &str) -> bool {
    let opened = std::fs::File::open("/dev/net/tun");
    if let Err(error) = &opened {
        println!("left out: {test}: /dev/net/tun: {error}");
    }
    opened.is_err()
}

/// Asserts that frames go both ways between a tap and the peer of its interface.
fn assert_carries(tap: &Tap, there: &Place, what: &str) {
    let peer = there.packets(there.index("peer"));
    for kind in [ARP, IP4, UNKNOWN] {
        let out = frame(kind, &format!("out {what}"));
        write(&tap.fd, &out);
        assert!(hear(&peer, &out, SOON), "{what}: {kind:x?} from the tap");
    }
    for kind in [ARP, IP4, UNKNOWN, VLAN] {
        let into = frame(kind, &format!("into {what}"));
        send(&peer, &into);
        assert!(read(&tap.fd, &into, SOON), "{what}: {kind:x?} to the tap");
    }
}

#[tokio::test]
async fn frames_go_both_ways() {
    const TEST: &str = "frames_go_both_ways";
    let Some((here, there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let eth0 = here.interface().await;
    let tap = tap(&here, &eth0).await;
    let out = frame(ARP, "too early");
    write(&tap.fd, &out);
    let peer = there.packets(there.index("peer"));
    assert!(!hear(&peer, &out, NEVER), "nothing is connected yet");
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    assert_carries(&tap, &there, "connected");
    // Too short to match any key.
    let mut short = frame(UNKNOWN, "");
    short.truncate(14);
    write(&tap.fd, &short);
    assert!(hear(&peer, &short, SOON), "a header only");
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    assert_carries(&tap, &there, "connected twice");
    mirror::disconnect(&here.netlink, &eth0).await.unwrap();
    let into = frame(ARP, "too late");
    send(&peer, &into);
    assert!(
        !read(&tap.fd, &into, NEVER),
        "nothing is connected any more"
    );
    assert_eq!(here.netlink.ingress_qdisc(eth0.index).await.unwrap(), None);
    mirror::disconnect(&here.netlink, &eth0).await.unwrap();
}

#[tokio::test]
async fn a_tap_is_quiet_and_not_described() {
    const TEST: &str = "a_tap_is_quiet_and_not_described";
    let Some((here, _there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let mut eth0 = here.interface().await;
    eth0.mtu = 9000;
    let options = TapOptions {
        owner: Some(1234),
        group: Some(4321),
        queue_length: 77,
    };
    let tap = Tap::create(&here.namespace, &here.netlink, &eth0, &options)
        .await
        .unwrap();
    assert_eq!(tap.name, "hulltap0");
    assert_eq!(here.index(&tap.name), tap.index);
    assert_eq!(here.interface().await.name, "eth0");
    // Answers of the host's stack would be read here.
    assert!(is_silent(&tap.fd, NEVER * 8));
    let attribute = |name: &str| {
        let path = format!("/sys/class/net/{}/{name}", tap.name);
        here.namespace
            .run_in(move || {
                // sysfs shows the namespace that it was mounted in.
                let mounted = std::process::Command::new("unshare")
                    .args([
                        "-m",
                        "sh",
                        "-c",
                        "mount -t sysfs sysfs /sys && cat \"$0\"",
                        &path,
                    ])
                    .output()
                    .unwrap();
                String::from_utf8(mounted.stdout).unwrap().trim().to_owned()
            })
            .unwrap()
    };
    for (name, value) in [
        ("mtu", "9000"),
        ("tx_queue_len", "77"),
        ("owner", "1234"),
        ("group", "4321"),
        ("tun_flags", "0x5002"),
    ] {
        assert_eq!(attribute(name), value, "{name}");
    }
    let addresses = || std::fs::read_to_string("/proc/thread-self/net/if_inet6");
    match here.namespace.run_in(addresses).unwrap() {
        Ok(addresses) => {
            assert!(addresses.contains("eth0"), "{addresses}");
            assert!(!addresses.contains(&tap.name), "{addresses}");
        }
        Err(error) => println!("left out: IPv6 of the tap: {error}"),
    }
    eth0.mtu = 70_000;
    tap::set_mtu(&here.netlink, tap.index, &eth0).await.unwrap();
    assert_eq!(attribute("mtu"), "65521");
}

#[tokio::test]
async fn an_interface_that_goes_away() {
    const TEST: &str = "an_interface_that_goes_away";
    let Some((here, there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let eth0 = here.interface().await;
    let tap = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    let monitor = here.monitor();
    drain(&monitor).await;
    // Like `podman network disconnect`: the pair is deleted from its other end.
    there.delete(there.index("peer")).await;
    changed(&monitor).await.unwrap();
    assert_eq!(here.describe().await.interfaces, []);
    assert_eq!(here.find(&tap.name).unwrap(), tap.index);
    write(&tap.fd, &frame(ARP, "to nobody"));
    mirror::disconnect(&here.netlink, &eth0).await.unwrap();
    let error = mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap_err();
    assert!(error.is_gone(), "{error}");
    // An interface added later gets the same tap.
    super::support::join(&here, "eth0", &there, "peer").await;
    let eth0 = here.interface().await;
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    assert_carries(&tap, &there, "a later interface");
}

#[tokio::test]
async fn leftovers_are_replaced() {
    const TEST: &str = "leftovers_are_replaced";
    let Some((here, there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let eth0 = here.interface().await;
    let first = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, first.index)
        .await
        .unwrap();
    let name = first.name.clone();
    // As if all processes with its descriptor had been killed.
    drop(first);
    assert!(here.find(&name).is_err(), "the tap is gone");
    let qdisc = here.netlink.ingress_qdisc(eth0.index).await.unwrap();
    assert_eq!(qdisc.as_deref(), Some("ingress"));
    assert!(here.netlink.ingress_filters(eth0.index).await.unwrap().ours);
    let second = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, second.index)
        .await
        .unwrap();
    assert_carries(&second, &there, "after a crash");
    // A second tap replaces a live first one.
    let third = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, third.index)
        .await
        .unwrap();
    assert_carries(&third, &there, "taken over");
}

/// Adds a qdisc of this kind for received packets, like another program.
async fn add_qdisc(place: &Place, index: u32, kind: &str) {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle::from(0xffff_0000);
    message.attributes = vec![TcAttribute::Kind(kind.to_owned())];
    let message = RouteNetlinkMessage::NewQueueDiscipline(message);
    place
        .netlink
        .request(message, NLM_F_CREATE | NLM_F_EXCL)
        .await
        .unwrap();
}

#[tokio::test]
async fn the_qdiscs_of_others() {
    const TEST: &str = "the_qdiscs_of_others";
    if no_taps(TEST) {
        return;
    }
    for kind in ["ingress", "clsact"] {
        let Some((here, there)) = joined(TEST).await else {
            return;
        };
        let eth0 = here.interface().await;
        let tap = tap(&here, &eth0).await;
        add_qdisc(&here, eth0.index, kind).await;
        mirror::connect(&here.netlink, &eth0, tap.index)
            .await
            .unwrap();
        assert_carries(&tap, &there, kind);
        mirror::disconnect(&here.netlink, &eth0).await.unwrap();
        let left = here.netlink.ingress_qdisc(eth0.index).await.unwrap();
        assert_eq!(left.as_deref(), (kind == "clsact").then_some("clsact"));
        // Another program's filter is in place: it is neither removed nor bypassed.
        if left.is_none() {
            add_qdisc(&here, eth0.index, kind).await;
        }
        let mut filters = here.engine.traffic_filter(eth0.index as i32);
        let foreign = filters.add().ingress().priority(0x6875).protocol(0x0008);
        foreign.redirect(1).unwrap().execute().await.unwrap();
        let error = mirror::connect(&here.netlink, &eth0, tap.index)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Occupied { qdisc, .. } if qdisc == kind),
            "{error}"
        );
        mirror::disconnect(&here.netlink, &eth0).await.unwrap();
        let filters = here.netlink.ingress_filters(eth0.index).await.unwrap();
        assert!(filters.foreign && !filters.ours);
    }
}

#[tokio::test]
async fn nothing_remains() {
    const TEST: &str = "nothing_remains";
    let Some((here, there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let eth0 = here.interface().await;
    let tap = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    // The tap exists until the last descriptor, such as a device process's, is closed.
    let Tap { fd, name, .. } = tap;
    let copy = fd.try_clone().unwrap();
    drop(fd);
    assert!(here.find(&name).is_ok());
    drop(copy);
    assert!(here.find(&name).is_err());
    assert_eq!(here.interface().await, eth0);
    // The pair goes away with the other namespace: nothing holds this one.
    drop(here);
    let end = std::time::Instant::now() + SOON;
    while there.find("peer").is_ok() {
        assert!(
            std::time::Instant::now() < end,
            "the namespace is still there"
        );
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn answers_of_name_servers_reach_the_namespace_itself() {
    const TEST: &str = "answers_of_name_servers_reach_the_namespace_itself";
    let Some((here, there)) = joined(TEST).await else {
        return;
    };
    if no_taps(TEST) {
        return;
    }
    let eth0 = here.interface().await;
    for (place, name, last) in [(&here, "eth0", 2), (&there, "peer", 1)] {
        let index = place.index(name);
        place.add_address(index, &format!("10.9.0.{last}/24")).await;
    }
    let tap = tap(&here, &eth0).await;
    mirror::connect(&here.netlink, &eth0, tap.index)
        .await
        .unwrap();
    let server = |port| {
        let open = move || UdpSocket::bind(("10.9.0.1", port)).unwrap();
        let socket = there.namespace.run_in(open).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket
    };
    let client = |port| {
        let open = move || UdpSocket::bind(("10.9.0.2", port)).unwrap();
        let socket = here.namespace.run_in(open).unwrap();
        socket.set_read_timeout(Some(NEVER)).unwrap();
        socket
    };
    let (names, other) = (server(53), server(54));
    let asks = |from: &UdpSocket, whom: &UdpSocket| {
        from.connect(whom.local_addr().unwrap()).unwrap();
        from.send(b"?").unwrap();
        // Packets queued for address resolution arrived late.
        let of = from.local_addr().unwrap();
        while let Ok((_, asker)) = whom.recv_from(&mut [0; 1]) {
            if asker == of {
                whom.send_to(b"!", asker).unwrap();
                return from.recv(&mut [0; 1]).is_ok();
            }
        }
        false
    };
    // Not even its hardware address is learned: nothing is received.
    let own = client(*sockets::OWN_PORTS.start());
    names.set_read_timeout(Some(NEVER)).unwrap();
    assert!(!asks(&own, &names));
    names.set_read_timeout(Some(SOON)).unwrap();
    for _ in 0..2 {
        mirror::admit_answers(&here.netlink, &eth0, tap.index)
            .await
            .unwrap();
    }
    let end = Instant::now() + SOON;
    while !asks(&own, &names) {
        assert!(Instant::now() < end, "an exception");
    }
    assert!(!asks(&own, &other), "from port 53 only");
    assert!(!asks(&client(40000), &names), "to its own ports only");
    assert!(asks(&client(*sockets::OWN_PORTS.end()), &names));

    // The kernel chooses its ephemeral ports from these.
    let (first, last) = sockets::OWN_PORTS.into_inner();
    let range = format!("{first} {last}");
    let before = sockets::choose_ports(&here.namespace, &range).unwrap();
    assert!(asks(&client(0), &names));
    sockets::choose_ports(&here.namespace, &before).unwrap();
    assert!(!asks(&client(0), &names));

    mirror::disconnect(&here.netlink, &eth0).await.unwrap();
    assert_eq!(here.netlink.ingress_qdisc(eth0.index).await.unwrap(), None);
}
