//! What a guest may send: frames from its own hardware and network addresses only.
//!
//! The guest shares a link with its neighbours and with the host. A guest that uses the address of
//! another could receive its traffic or impersonate it, and one that advertises itself as a router
//! could receive everybody's. So with a [`Policy`] a frame passes if it is
//!
//! - ARP with the guest's own addresses as the sender's,
//! - IPv4 from one of its addresses,
//! - IPv6 from one of its addresses, or from none as long as it asks for one; neighbour
//!   advertisements only for its own addresses and with its own hardware address, and no router
//!   advertisements or redirects,
//!
//! and not meant for services on link-local addresses (169.254.0.0/16, and anything but ICMPv6 to
//! fe80::/10), which on many clouds hand out credentials. Other protocols, VLAN tags among them, do
//! not pass.
//!
//! Without a policy, and with one, no frame passes that is for a loopback address
//! ([`check_destination`]): a host delivers it to its own services where `route_localnet` is set,
//! as plugins that publish ports do (CVE-2020-8558).
//!
//! Pure: bytes in, verdict out. The bytes are a copy of the beginning of a frame, which the guest
//! cannot change.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_device_control::{LinkLocal, Policy};

const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// Tags of virtual LANs (IEEE 802.1Q and 802.1ad): four bytes before the type of what follows.
const TAGS: [u16; 2] = [0x8100, 0x88a8];
/// Most tags before a packet that a host looks behind.
const MAX_TAGS: usize = 2;

// Next headers of IPv6 (IANA's registry of protocol numbers).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const ICMPV6: u8 = 58;
const DESTINATION: u8 = 60;

// Messages of neighbour discovery (RFC 4861) that announce an address or a router.
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Option of neighbour discovery: a hardware address, of the source or target.
const LINK_ADDRESSES: [u8; 2] = [1, 2];

/// Most extension headers before the message.
const MAX_EXTENSIONS: usize = 8;

type Verdict = Result<(), &'static str>;

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Result<[u8; N], &'static str> {
    at.checked_add(N)
        .and_then(|end| frame.get(at..end))
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or("too short")
}

fn v4(frame: &[u8], at: usize) -> Result<Ipv4Addr, &'static str> {
    Ok(Ipv4Addr::from(bytes::<4>(frame, at)?))
}

fn v6(frame: &[u8], at: usize) -> Result<Ipv6Addr, &'static str> {
    Ok(Ipv6Addr::from(bytes::<16>(frame, at)?))
}

/// Whether a frame is for somebody else than the host's loopback interface. One that is too short
/// to tell is dropped by the host.
pub fn check_destination(frame: &[u8]) -> Verdict {
    let mut at = 12;
    let mut kind = u16::from_be_bytes(bytes(frame, at)?);
    for _ in 0..MAX_TAGS {
        if TAGS.contains(&kind) {
            at += 4;
            kind = u16::from_be_bytes(bytes(frame, at)?);
        }
    }
    let packet = frame.get(at + 2..).unwrap_or_default();
    let is_loopback = match kind {
        IPV4 => {
            // "This network" (0.0.0.0/8, RFC 1122) is the host itself to Linux.
            let [first] = bytes::<1>(packet, 16)?;
            first == 127 || first == 0
        }
        IPV6 => {
            let destination = v6(packet, 24)?;
            let mapped = destination.to_ipv4_mapped().is_some();
            destination.is_loopback() || destination.is_unspecified() || mapped
        }
        _ => false,
    };
    match is_loopback {
        true => Err("to a loopback address"),
        false => Ok(()),
    }
}

/// Checks frames against a [`Policy`].
#[derive(Debug)]
pub struct Filter(Policy);

impl Filter {
    /// A filter for the guest that `policy` describes.
    pub fn new(policy: Policy) -> Self {
        Self(policy)
    }

    /// Whether a frame may pass, by its first bytes (all of it, if it is short).
    pub fn check(&self, frame: &[u8]) -> Verdict {
        if bytes::<6>(frame, 6)? != self.0.mac {
            return Err("not from the guest's hardware address");
        }
        let packet = frame.get(14..).unwrap_or_default();
        match u16::from_be_bytes(bytes(frame, 12)?) {
            ARP => self.arp(packet),
            IPV4 => self.ipv4(packet),
            IPV6 => self.ipv6(packet),
            _ => Err("neither ARP nor IP"),
        }
    }

    fn owns(&self, address: IpAddr) -> bool {
        self.0.addresses.contains(&address)
    }

    /// RFC 826, for Ethernet and IPv4.
    fn arp(&self, packet: &[u8]) -> Verdict {
        if bytes::<6>(packet, 0)? != [0, 1, 8, 0, 6, 4] {
            return Err("ARP for something else than Ethernet and IPv4");
        }
        if bytes::<6>(packet, 8)? != self.0.mac {
            return Err("ARP for another's hardware address");
        }
        let sender = v4(packet, 14)?;
        // Unspecified in a probe for an address in use (RFC 5227).
        match sender.is_unspecified() || self.owns(sender.into()) {
            true => Ok(()),
            false => Err("ARP for another's address"),
        }
    }

    fn ipv4(&self, packet: &[u8]) -> Verdict {
        if bytes::<1>(packet, 0)?[0] >> 4 != 4 {
            return Err("IPv4 of another version");
        }
        if !self.owns(v4(packet, 12)?.into()) {
            return Err("IPv4 from another's address");
        }
        match self.0.link_local == LinkLocal::All || !v4(packet, 16)?.is_link_local() {
            true => Ok(()),
            false => Err("IPv4 to a link-local address"),
        }
    }

    fn ipv6(&self, packet: &[u8]) -> Verdict {
        if bytes::<1>(packet, 0)?[0] >> 4 != 6 {
            return Err("IPv6 of another version");
        }
        let (source, destination) = (v6(packet, 8)?, v6(packet, 24)?);
        let (protocol, message) = behind_extensions(packet)?;
        if source.is_unspecified() {
            // Allowed without an address: duplicate address detection (RFC 4862) and multicast
            // reports (RFC 3590).
            const LISTENING: [u8; 4] = [130, 131, 132, 143];
            let kind = bytes::<1>(packet, message)?[0];
            let asks = kind == NEIGHBOUR_SOLICITATION || kind == 133 || LISTENING.contains(&kind);
            if protocol != ICMPV6 || !asks {
                return Err("IPv6 from no address");
            }
        } else if !self.owns(source.into()) {
            return Err("IPv6 from another's address");
        }
        if protocol == ICMPV6 {
            return self.discovery(packet, message);
        }
        match self.0.link_local != LinkLocal::None || !destination.is_unicast_link_local() {
            true => Ok(()),
            false => Err("IPv6 to a link-local address"),
        }
    }

    fn discovery(&self, packet: &[u8], message: usize) -> Verdict {
        // A fragment other than the first has no message header.
        let kind = match packet.get(message) {
            Some(kind) => *kind,
            None => return Err("too short"),
        };
        let options = match kind {
            ROUTER_ADVERTISEMENT | REDIRECT => return Err("it says to be a router"),
            NEIGHBOUR_ADVERTISEMENT => {
                if !self.owns(v6(packet, message + 8)?.into()) {
                    return Err("neighbour advertisement for another's address");
                }
                message + 24
            }
            NEIGHBOUR_SOLICITATION => message + 24,
            _ => return Ok(()),
        };
        self.link_addresses(packet, options)
    }

    fn link_addresses(&self, packet: &[u8], mut at: usize) -> Verdict {
        let end = 40 + usize::from(u16::from_be_bytes(bytes(packet, 4)?));
        while at < end {
            let [kind, length] = bytes::<2>(packet, at)?;
            if length == 0 {
                return Err("option without a length");
            }
            if LINK_ADDRESSES.contains(&kind) && bytes::<6>(packet, at + 2)? != self.0.mac {
                return Err("neighbour discovery for another's hardware address");
            }
            at += usize::from(length) * 8;
        }
        Ok(())
    }
}

/// The protocol after IPv6's extension headers, and where its message begins.
fn behind_extensions(packet: &[u8]) -> Result<(u8, usize), &'static str> {
    let mut next = bytes::<1>(packet, 6)?[0];
    let mut at = 40;
    for _ in 0..MAX_EXTENSIONS {
        let length = match next {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                8 + 8 * usize::from(bytes::<1>(packet, at + 1)?[0])
            }
            FRAGMENT => {
                // Neighbour discovery is not fragmented (RFC 6980); receivers ignore it when it is.
                let [behind] = bytes::<1>(packet, at)?;
                let offset = u16::from_be_bytes(bytes(packet, at + 2)?);
                let whole = offset & !0x6 == 0;
                if whole {
                    8
                } else {
                    // There is no message to examine as neighbour discovery.
                    return match behind {
                        ICMPV6 => Ok((FRAGMENT, at)),
                        other => Ok((other, at + 8)),
                    };
                }
            }
            _ => return Ok((next, at)),
        };
        next = bytes::<1>(packet, at)?[0];
        at += length;
    }
    Err("too many extension headers")
}

#[cfg(test)]
mod tests {
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

    fn frame(source: [u8; 6], kind: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(source);
        frame.extend(kind.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn arp(hardware: [u8; 6], address: &str) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
        packet.extend(hardware);
        packet.extend(address.parse::<Ipv4Addr>().unwrap().octets());
        packet.extend([0; 10]);
        frame(MAC, ARP, &packet)
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
        let mut with_options = vec![ICMPV6, 0, 5, 2, 0, 0, 0, 0];
        with_options.extend(&own);
        let mut fragment = vec![17, 0, 0, 1, 0, 0, 0, 1];
        fragment.extend([0; 40]);
        for good in [
            arp(MAC, "10.0.0.2"),
            arp(MAC, "0.0.0.0"),
            ipv4("10.0.0.2", "8.8.8.8"),
            ipv6("fd00::2", "2001:db8::1", 6, &[0; 20]),
            ipv6("fd00::2", "ff02::1", ICMPV6, &own),
            ipv6("fe80::2", "ff02::1:ff00:1", ICMPV6, &question),
            ipv6("fd00::2", "fe80::1", ICMPV6, &question),
            ipv6("fd00::2", "ff02::1", HOP_BY_HOP, &with_options),
            ipv6("fd00::2", "2001:db8::1", FRAGMENT, &fragment),
            // Is this address somebody's?
            ipv6("::", "ff02::1:ff00:2", ICMPV6, &question[..24]),
            ipv6(
                "::",
                "ff02::16",
                HOP_BY_HOP,
                &[ICMPV6, 0, 5, 2, 0, 0, 0, 0, 143, 0, 0, 0],
            ),
        ] {
            assert_eq!(Filter::new(policy()).check(&good), Ok(()), "{good:02x?}");
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
            assert!(Filter::new(policy()).check(&bad).is_err(), "{bad:02x?}");
        }
        let mut allowed = policy();
        allowed.link_local = LinkLocal::All;
        assert_eq!(
            Filter::new(allowed.clone()).check(&ipv4("10.0.0.2", "169.254.169.254")),
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
                let _ = Filter::new(policy()).check(&sample[..length]);
            }
        }
    }
}
