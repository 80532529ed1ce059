#![allow(clippy::unwrap_used)]
use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn policy() -> Policy {
    Policy {
        mac: MAC,
        addresses: vec![
            "10.0.0.2".parse().unwrap(),
            "fd00::2".parse().unwrap(),
            "fe80::2".parse().unwrap(),
        ],
        link_local: LinkLocal::None,
    }
}

/// A header that leaves nothing to the host.
const PLAIN: [u8; 12] = [0; 12];

fn check(frame: &[u8]) -> Verdict {
    Filter::new(policy()).check(&PLAIN, frame)
}

fn frame(source: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(source);
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

/// A question for `target`.
fn arp_request(hardware: [u8; 6], sender: &str, target: &str) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(hardware);
    packet.extend(sender.parse::<Ipv4Addr>().unwrap().octets());
    packet.extend([0; 6]);
    packet.extend(target.parse::<Ipv4Addr>().unwrap().octets());
    frame(MAC, ARP, &packet)
}

fn arp(hardware: [u8; 6], address: &str) -> Vec<u8> {
    arp_request(hardware, address, "10.0.0.9")
}

fn ipv4(source: &str, destination: &str) -> Vec<u8> {
    let mut packet = vec![0x45; 12];
    packet.extend(source.parse::<Ipv4Addr>().unwrap().octets());
    packet.extend(destination.parse::<Ipv4Addr>().unwrap().octets());
    frame(MAC, IPV4, &packet)
}

#[test]
fn nothing_is_for_the_hosts_loopback_interface() {
    for destination in ["127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3"] {
        let plain = ipv4("10.0.0.2", destination);
        check_destination(&plain).unwrap_err();
        for tags in [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 1, 0x81, 0, 0, 5]] {
            let tagged = [&plain[..12], tags, &plain[12..]].concat();
            check_destination(&tagged).unwrap_err();
        }
    }
    for destination in ["::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1"] {
        check_destination(&ipv6("fd00::2", destination, 17, &[0; 8])).unwrap_err();
    }
    for destination in [
        "10.0.0.1",
        "169.254.169.254",
        "128.0.0.1",
        "255.255.255.255",
    ] {
        check_destination(&ipv4("10.0.0.2", destination)).unwrap();
    }
    for destination in ["fd00::1", "fe80::1", "ff02::1", "::2"] {
        check_destination(&ipv6("fd00::2", destination, 17, &[0; 8])).unwrap();
    }
    check_destination(&arp(MAC, "10.0.0.2")).unwrap();
    // The host drops what is cut off.
    for length in 0..14 {
        check_destination(&vec![0; length]).ok();
    }
    check_destination(&ipv4("10.0.0.2", "127.0.0.1")[..30]).unwrap_err();
}

fn ipv6(source: &str, destination: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(destination.parse::<Ipv6Addr>().unwrap().octets());
    packet.extend(payload);
    frame(MAC, IPV6, &packet)
}

fn neighbour(kind: u8, target: &str, option: u8, hardware: [u8; 6]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.parse::<Ipv6Addr>().unwrap().octets());
    message.extend([option, 1]);
    message.extend(hardware);
    message
}

#[test]
fn what_the_guest_says_of_itself_passes() {
    let own = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, MAC);
    let question = neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", 1, MAC);
    let own_question = neighbour(NEIGHBOUR_SOLICITATION, "fe80::2", 1, MAC);
    // Linux sends a nonce (RFC 7527).
    let with_nonce = neighbour(NEIGHBOUR_SOLICITATION, "fd00::2", 14, OTHER);
    let mut with_options = vec![ICMPV6, 0, 5, 2, 0, 0, 0, 0];
    with_options.extend(&own);
    let mut fragment = vec![17, 0, 0, 1, 0, 0, 0, 1];
    fragment.extend([0; 40]);
    for good in [
        arp(MAC, "10.0.0.2"),
        arp_request(MAC, "0.0.0.0", "10.0.0.2"),
        ipv4("10.0.0.2", "8.8.8.8"),
        ipv6("fd00::2", "2001:db8::1", 6, &[0; 20]),
        ipv6("fd00::2", "ff02::1", ICMPV6, &own),
        ipv6("fe80::2", "ff02::1:ff00:1", ICMPV6, &question),
        ipv6("fd00::2", "fe80::1", ICMPV6, &question),
        ipv6("fd00::2", "ff02::1", HOP_BY_HOP, &with_options),
        ipv6("fd00::2", "2001:db8::1", FRAGMENT, &fragment),
        // Is this address somebody's?
        ipv6("::", "ff02::1:ff00:2", ICMPV6, &own_question[..24]),
        ipv6("::", "ff02::1:ff00:2", ICMPV6, &with_nonce),
        ipv6(
            "::",
            "ff02::2",
            ICMPV6,
            &[ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0],
        ),
        ipv6(
            "::",
            "ff02::16",
            HOP_BY_HOP,
            &[ICMPV6, 0, 5, 2, 0, 0, 0, 0, 143, 0, 0, 0],
        ),
    ] {
        assert_eq!(check(&good), Ok(()), "{good:02x?}");
    }
}

#[test]
fn what_speaks_for_others_does_not() {
    let other = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::1", 2, MAC);
    let stolen = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, OTHER);
    let lie = neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", 1, OTHER);
    let mut hidden = vec![ICMPV6, 0, 5, 2, 0, 0, 0, 0];
    hidden.extend(&other);
    let mut whole_fragment = vec![ICMPV6, 0, 0, 0, 0, 0, 0, 1];
    whole_fragment.extend(&other);
    let mut two_fragments = vec![FRAGMENT, 0, 0, 0, 0, 0, 0, 1];
    two_fragments.extend(&whole_fragment);
    let endless = [HOP_BY_HOP, 0, 0, 0, 0, 0, 0, 0].repeat(10);
    for bad in [
        frame(OTHER, IPV4, &ipv4("10.0.0.2", "8.8.8.8")[14..]),
        frame(MAC, 0x8100, &[0; 40]),
        frame(MAC, 0x88cc, &[0; 40]),
        arp(OTHER, "10.0.0.2"),
        arp(MAC, "10.0.0.1"),
        ipv4("10.0.0.3", "8.8.8.8"),
        ipv4("0.0.0.0", "255.255.255.255"),
        ipv4("10.0.0.2", "169.254.169.254"),
        ipv6("fd00::3", "2001:db8::1", 6, &[0; 20]),
        ipv6("::", "2001:db8::1", 17, &[0; 20]),
        ipv6("fd00::2", "fe80::1", 6, &[0; 20]),
        ipv6("fd00::2", "ff02::1", ICMPV6, &other),
        ipv6("fd00::2", "ff02::1", ICMPV6, &stolen),
        ipv6("fd00::2", "ff02::1", ICMPV6, &lie),
        ipv6("fd00::2", "ff02::1", HOP_BY_HOP, &hidden),
        ipv6("fd00::2", "ff02::1", FRAGMENT, &whole_fragment),
        ipv6("fd00::2", "ff02::1", FRAGMENT, &two_fragments),
        ipv6("fe80::2", "ff02::1", ICMPV6, &[ROUTER_ADVERTISEMENT; 16]),
        ipv6("fe80::2", "ff02::1", ICMPV6, &[REDIRECT; 40]),
        ipv6("fd00::2", "ff02::1", HOP_BY_HOP, &endless),
    ] {
        assert!(check(&bad).is_err(), "{bad:02x?}");
    }
    let mut allowed = policy();
    allowed.link_local = LinkLocal::All;
    assert_eq!(
        Filter::new(allowed.clone()).check(&PLAIN, &ipv4("10.0.0.2", "169.254.169.254")),
        Ok(())
    );
}

#[test]
fn no_bytes_are_too_few() {
    let samples = [
        arp(MAC, "10.0.0.2"),
        ipv4("10.0.0.2", "8.8.8.8"),
        ipv6(
            "fd00::2",
            "ff02::1",
            HOP_BY_HOP,
            &neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, MAC),
        ),
    ];
    for sample in samples {
        for length in 0..sample.len() {
            // It must say something.
            let _ = check(&sample[..length]);
        }
    }
}

#[test]
fn nobody_is_kept_from_an_address_by_questions_for_it() {
    let of_another = neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", 14, [0; 6]);
    let link_local = neighbour(NEIGHBOUR_SOLICITATION, "fe80::1", 14, [0; 6]);
    for bad in [
        arp_request(MAC, "0.0.0.0", "10.0.0.1"),
        arp_request(MAC, "0.0.0.0", "0.0.0.0"),
        ipv6("::", "ff02::1:ff00:1", ICMPV6, &of_another),
        ipv6("::", "ff02::1:ff00:1", ICMPV6, &of_another[..24]),
        ipv6("::", "ff02::1:ff00:1", ICMPV6, &link_local),
    ] {
        assert!(check(&bad).is_err(), "{bad:02x?}");
    }
}

#[test]
fn options_of_neighbour_discovery_cannot_be_hidden_by_lengths() {
    let stolen = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, OTHER);
    let lie = neighbour(NEIGHBOUR_SOLICITATION, "fd00::1", 1, OTHER);
    let mut router_lie = vec![ROUTER_SOLICITATION, 0, 0, 0, 0, 0, 0, 0, 1, 1];
    router_lie.extend(OTHER);
    let own = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, MAC);
    // A jumbo payload's option (RFC 2675), with the length of everything behind the header.
    let jumbo = |message: &[u8]| {
        let mut payload = vec![ICMPV6, 0, 0xc2, 4, 0, 0, 0, 8 + message.len() as u8];
        payload.extend(message);
        ipv6("fd00::2", "ff02::1", HOP_BY_HOP, &payload)
    };
    let with_length = |mut frame: Vec<u8>, length: usize| {
        frame[18..20].copy_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        frame
    };
    let plain = |message: &[u8]| ipv6("fd00::2", "ff02::1", ICMPV6, message);
    assert_eq!(check(&plain(&own)), Ok(()));
    for message in [&stolen, &lie, &router_lie, &own] {
        for length in (0..message.len()).chain([message.len() + 1, message.len() + 8, 0xffff]) {
            let bad = with_length(plain(message), length);
            assert!(check(&bad).is_err(), "{bad:02x?}");
        }
        let bad = with_length(jumbo(message), 0);
        assert!(check(&bad).is_err(), "{bad:02x?}");
    }
    assert!(check(&plain(&router_lie)).is_err());
    let mut long = own.clone();
    long[25] = 2;
    assert!(check(&plain(&long)).is_err());
    // A lie behind the bytes that are examined.
    let mut far = own;
    far.resize(LOOK - 56, 0);
    let units = (far.len() - 24) / 8;
    far[24..26].copy_from_slice(&[14, units as u8]);
    far.resize(LOOK - 54 + 6, 1);
    assert!(check(&plain(&far)[..LOOK]).is_err());
    assert!(check(&with_length(plain(&far), LOOK - 54)[..LOOK]).is_err());
}

#[test]
fn a_checksum_that_the_host_adds_cannot_change_what_was_examined() {
    let check_with = |start: u16, offset: u16, frame: &[u8]| {
        let mut header = PLAIN;
        header[0] = NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
        Filter::new(policy()).check(&header, frame)
    };
    let mut tcp = ipv4("10.0.0.2", "8.8.8.8");
    tcp[14] = 0x45;
    tcp.extend([0; 20]);
    let tcp6 = ipv6("fd00::2", "2001:db8::1", 6, &[0; 20]);
    let mut behind_options = vec![6, 0, 1, 4, 0, 0, 0, 0];
    behind_options.extend([0; 20]);
    let options6 = ipv6("fd00::2", "2001:db8::1", DESTINATION, &behind_options);
    for (frame, transport) in [(&tcp, 34), (&tcp6, 54), (&options6, 62)] {
        assert_eq!(check_with(transport, 16, frame), Ok(()));
        // Of a packet within a tunnel.
        assert_eq!(check_with(transport + 8, 6, frame), Ok(()));
        for start in 0..transport {
            check_with(start, 0, frame).unwrap_err();
            check_with(start, 12, frame).unwrap_err();
        }
    }
    tcp[14] = 0x4f;
    check_with(34, 16, &tcp).unwrap_err();
    let own = neighbour(NEIGHBOUR_ADVERTISEMENT, "fd00::2", 2, MAC);
    for frame in [
        arp(MAC, "10.0.0.2"),
        ipv6("fd00::2", "ff02::1", ICMPV6, &own),
    ] {
        assert_eq!(check(&frame), Ok(()));
        for start in 0..frame.len() {
            check_with(u16::try_from(start).unwrap(), 2, &frame).unwrap_err();
        }
    }
}
