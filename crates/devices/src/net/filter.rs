//! What a guest may send: frames from its own hardware and network addresses only.
//!
//! The guest shares a link with its neighbours and with the host. A guest that uses the address of
//! another could receive its traffic or impersonate it, and one that advertises itself as a router
//! could receive everybody's. So with a [`Policy`] a frame passes if it is
//!
//! - ARP with the guest's own addresses as the sender's, or a probe for one of them,
//! - IPv4 from one of its addresses,
//! - IPv6 from one of its addresses, or from none as long as it asks for one; neighbour
//!   advertisements, and duplicate address detection, only for its own addresses, neighbour
//!   discovery only with its own hardware address, and no router advertisements or redirects,
//!
//! and not meant for services on link-local addresses (169.254.0.0/16, and anything but ICMPv6 to
//! fe80::/10), which on many clouds hand out credentials. Other protocols, VLAN tags among them, do
//! not pass.
//!
//! Without a policy, and with one, no frame passes that is for a loopback address
//! ([`check_destination`]): a host delivers it to its own services where `route_localnet` is set,
//! as plugins that publish ports do (CVE-2020-8558).
//!
//! A link-local IPv6 address is the guest's own if the policy lists it, as any other: the host's
//! interface has it, and the agent configures it without duplicate address detection. Addresses
//! that a guest derives by itself can send nothing, so it need not ask whether they are in use.
//!
//! Pure: bytes in, verdict out. The bytes are a copy of the beginning of a frame, which the guest
//! cannot change.

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_device_control::{LinkLocal, Policy};

/// How much of a frame is examined: Ethernet, IPv6, a few extension headers, neighbour discovery.
pub const LOOK: usize = 192;

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

// Messages of neighbour discovery (RFC 4861).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Option of neighbour discovery: a hardware address, of the source or target.
const LINK_ADDRESSES: [u8; 2] = [1, 2];

/// Length of IPv6's header without extensions.
const IPV6_HEADER: usize = 40;
/// Most extension headers before the message.
const MAX_EXTENSIONS: usize = 8;

// The header that taps and virtio have in common (linux/virtio_net.h).
const NEEDS_CHECKSUM: u8 = 1;
const CHECKSUM_START: usize = 6;

/// Of a frame that was examined as a whole: ARP, and ICMPv6, whose checksums no driver leaves to
/// the host.
const ALL: usize = usize::MAX;

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

    /// Whether a frame may pass, by its header for the tap (`struct virtio_net_hdr_v1`) and its
    /// first [`LOOK`] bytes (all of it, if it is shorter).
    pub fn check(&self, header: &[u8], frame: &[u8]) -> Verdict {
        let examined = self.examine(frame)?;
        let ([flags], start) = (bytes(header, 0)?, bytes(header, CHECKSUM_START)?);
        // The host adds such a checksum when the frame leaves by an interface that cannot: two
        // bytes of the guest's choice, behind the place from which it is computed.
        match flags & NEEDS_CHECKSUM != 0 && usize::from(u16::from_le_bytes(start)) < examined {
            true => Err("a checksum would change what was examined"),
            false => Ok(()),
        }
    }

    /// Checks the frame; returns how many of its bytes must stay as they are for that to hold.
    fn examine(&self, frame: &[u8]) -> Result<usize, &'static str> {
        if bytes::<6>(frame, 6)? != self.0.mac {
            return Err("not from the guest's hardware address");
        }
        let packet = frame.get(14..).unwrap_or_default();
        match u16::from_be_bytes(bytes(frame, 12)?) {
            ARP => self.arp(packet).map(|()| ALL),
            IPV4 => Ok(14 + self.ipv4(packet)?),
            IPV6 => Ok(self.ipv6(packet)?.saturating_add(14)),
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
        let (sender, target) = (v4(packet, 14)?, v4(packet, 24)?);
        // Unspecified in a probe (RFC 5227), which makes a neighbour that probes for the same
        // address do without it.
        let claimed = match sender.is_unspecified() {
            true => target,
            false => sender,
        };
        match self.owns(claimed.into()) {
            true => Ok(()),
            false => Err("ARP for another's address"),
        }
    }

    /// Returns the length of the header.
    fn ipv4(&self, packet: &[u8]) -> Result<usize, &'static str> {
        let [first] = bytes::<1>(packet, 0)?;
        let length = 4 * usize::from(first & 0xf);
        if first >> 4 != 4 || length < 20 {
            return Err("IPv4 of another version, or with too short a header");
        }
        if !self.owns(v4(packet, 12)?.into()) {
            return Err("IPv4 from another's address");
        }
        match self.0.link_local == LinkLocal::All || !v4(packet, 16)?.is_link_local() {
            true => Ok(length),
            false => Err("IPv4 to a link-local address"),
        }
    }

    /// Returns how much was examined: the headers, or [`ALL`] of ICMPv6.
    fn ipv6(&self, packet: &[u8]) -> Result<usize, &'static str> {
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
            let asks = match kind {
                // It makes a neighbour that asks for the same address do without it.
                NEIGHBOUR_SOLICITATION => self.owns(v6(packet, message + 8)?.into()),
                ROUTER_SOLICITATION => true,
                kind => LISTENING.contains(&kind),
            };
            if protocol != ICMPV6 || !asks {
                return Err("IPv6 from no address");
            }
        } else if !self.owns(source.into()) {
            return Err("IPv6 from another's address");
        }
        if protocol == ICMPV6 {
            return self.discovery(packet, message).map(|()| ALL);
        }
        match self.0.link_local != LinkLocal::None || !destination.is_unicast_link_local() {
            true => Ok(message),
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
            ROUTER_SOLICITATION => message + 8,
            _ => return Ok(()),
        };
        // Options are looked for in the bytes that are there: a length that says something else
        // (0 with a jumbo payload's option) could hide them from here, and not from the receiver.
        // These messages are longer than the shortest frame, so there is no padding behind them.
        let length = usize::from(u16::from_be_bytes(bytes(packet, 4)?));
        if packet.len() != IPV6_HEADER + length || packet.len() + 14 >= LOOK {
            return Err("neighbour discovery of a length that cannot be examined");
        }
        self.link_addresses(packet.get(options..).ok_or("too short")?)
    }

    /// Checks the options of a message of neighbour discovery.
    fn link_addresses(&self, mut options: &[u8]) -> Verdict {
        while !options.is_empty() {
            let [kind, length] = bytes::<2>(options, 0)?;
            if length == 0 {
                return Err("option without a length");
            }
            if LINK_ADDRESSES.contains(&kind) && bytes::<6>(options, 2)? != self.0.mac {
                return Err("neighbour discovery for another's hardware address");
            }
            let rest = options.get(usize::from(length) * 8..);
            options = rest.ok_or("option that is longer than its message")?;
        }
        Ok(())
    }
}

/// The protocol after IPv6's extension headers, and where its message begins.
fn behind_extensions(packet: &[u8]) -> Result<(u8, usize), &'static str> {
    let mut next = bytes::<1>(packet, 6)?[0];
    let mut at = IPV6_HEADER;
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
