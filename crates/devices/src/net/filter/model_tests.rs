//! Frames of which it is known how they were made, and so whether they may pass: the filter has to
//! find out the same from their bytes.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN4: [u8; 4] = [10, 0, 0, 2];
const ADDRESSES4: [[u8; 4]; 8] = [
    OWN4,
    [10, 0, 0, 3],
    [0, 0, 0, 0],
    [127, 0, 0, 1],
    [0, 1, 2, 3],
    [169, 254, 169, 254],
    [224, 0, 0, 1],
    [8, 8, 8, 8],
];
const OWN6: [&str; 2] = ["fd00::2", "fe80::2"];
const ADDRESSES6: [&str; 10] = [
    "fd00::2",
    "fe80::2",
    "fd00::3",
    "fe80::3",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "ff02::1",
    "2001:db8::1",
];
const TCP: u8 = 6;
const UDP: u8 = 17;

fn policy(link_local: LinkLocal) -> Policy {
    let mut addresses: Vec<IpAddr> = vec![IpAddr::from(OWN4)];
    addresses.extend(OWN6.map(|address| address.parse::<IpAddr>().unwrap()));
    Policy {
        mac: MAC,
        addresses,
        link_local,
    }
}

/// A message of ICMPv6 with options.
#[derive(Debug, Clone)]
struct Icmp {
    kind: u8,
    target: &'static str,
    /// Type, length in units of 8 bytes, and whether the hardware address in it is the guest's.
    options: Vec<(u8, u8, bool)>,
}

#[derive(Debug, Clone)]
enum Packet {
    Arp {
        own_hardware: bool,
        sender: [u8; 4],
        target: [u8; 4],
    },
    V4 {
        source: [u8; 4],
        destination: [u8; 4],
        words: u8,
    },
    V6 {
        source: &'static str,
        destination: &'static str,
        /// Types of headers, and their lengths in units of 8 bytes beyond the first.
        extensions: Vec<(u8, u8)>,
        /// None for a segment of TCP or UDP.
        icmp: Option<Icmp>,
        /// The payload length says so many bytes more or less.
        wrong_by: i16,
    },
    Other(u16),
}

#[derive(Debug, Clone)]
struct Frame {
    own_source: bool,
    packet: Packet,
    checksum: Option<u16>,
}

impl Icmp {
    fn is_discovery(&self) -> bool {
        (133..=137).contains(&self.kind)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind, 0, 0, 0, 0, 0, 0, 0];
        if matches!(self.kind, 135..=137) {
            bytes.extend(self.target.parse::<Ipv6Addr>().unwrap().octets());
        }
        for (kind, units, own) in &self.options {
            let mut option = vec![*kind, *units];
            option.extend(if *own { MAC } else { OTHER });
            option.resize(usize::from(*units).max(1) * 8, 0);
            bytes.extend(option);
        }
        bytes
    }

    fn may_pass(&self) -> bool {
        let speaks_for_itself = match self.kind {
            134 | 137 => false,
            136 => OWN6.contains(&self.target),
            _ => true,
        };
        let option_passes =
            |(kind, units, own): &(u8, u8, bool)| *units > 0 && (*own || !matches!(kind, 1 | 2));
        speaks_for_itself && (!self.is_discovery() || self.options.iter().all(option_passes))
    }
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(if self.own_source { MAC } else { OTHER });
        match &self.packet {
            Packet::Arp {
                own_hardware,
                sender,
                target,
            } => {
                frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend(if *own_hardware { MAC } else { OTHER });
                frame.extend(sender);
                frame.extend([0; 6]);
                frame.extend(target);
            }
            Packet::V4 {
                source,
                destination,
                words,
            } => {
                frame.extend([
                    0x08,
                    0x00,
                    0x40 | words,
                    0,
                    0,
                    40,
                    0,
                    0,
                    0,
                    0,
                    64,
                    TCP,
                    0,
                    0,
                ]);
                frame.extend(source);
                frame.extend(destination);
                frame.extend([0; 60]);
            }
            Packet::V6 {
                source,
                destination,
                extensions,
                icmp,
                wrong_by,
            } => {
                let upper = if icmp.is_some() { ICMPV6 } else { UDP };
                let mut nexts: Vec<u8> = extensions.iter().map(|(kind, _)| *kind).collect();
                nexts.push(upper);
                let mut payload = Vec::new();
                for ((_, units), next) in extensions.iter().zip(&nexts[1..]) {
                    let start = payload.len();
                    payload.extend([*next, *units]);
                    payload.resize(start + 8 + usize::from(*units) * 8, 0);
                }
                match icmp {
                    Some(icmp) => payload.extend(icmp.bytes()),
                    None => payload.extend([0; 20]),
                }
                let length = (payload.len() as u16).wrapping_add_signed(*wrong_by);
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([nexts[0], 255]);
                frame.extend(source.parse::<Ipv6Addr>().unwrap().octets());
                frame.extend(destination.parse::<Ipv6Addr>().unwrap().octets());
                frame.extend(payload);
            }
            Packet::Other(kind) => {
                frame.extend(kind.to_be_bytes());
                frame.extend([0x45; 60]);
            }
        }
        frame
    }

    fn header(&self) -> [u8; 12] {
        let mut header = [0; 12];
        if let Some(start) = self.checksum {
            header[0] = NEEDS_CHECKSUM;
            header[6..8].copy_from_slice(&start.to_le_bytes());
        }
        header
    }

    fn is_for_loopback(&self) -> bool {
        match &self.packet {
            Packet::V4 { destination, .. } => matches!(destination[0], 0 | 127),
            Packet::V6 { destination, .. } => {
                matches!(*destination, "::" | "::1") || destination.starts_with("::ffff:")
            }
            Packet::Arp { .. } | Packet::Other(_) => false,
        }
    }

    fn may_pass(&self, link_local: LinkLocal) -> bool {
        let of_whole = self.checksum.is_none();
        let from = |end: usize| self.checksum.is_none_or(|start| usize::from(start) >= end);
        let passes = match &self.packet {
            Packet::Arp {
                own_hardware,
                sender,
                target,
            } => {
                let own_probe = *sender == [0; 4] && *target == OWN4;
                of_whole && *own_hardware && (*sender == OWN4 || own_probe)
            }
            Packet::V4 {
                source,
                destination,
                words,
            } => {
                let far = link_local == LinkLocal::All || destination[..2] != [169, 254];
                *source == OWN4 && far && *words >= 5 && from(14 + usize::from(*words) * 4)
            }
            Packet::V6 {
                source,
                destination,
                extensions,
                icmp,
                wrong_by,
            } => {
                let headers: usize = extensions
                    .iter()
                    .map(|(_, n)| 8 + usize::from(*n) * 8)
                    .sum();
                let own = OWN6.contains(source);
                let far = link_local != LinkLocal::None || !destination.starts_with("fe80");
                match icmp {
                    None => own && far && from(54 + headers),
                    Some(icmp) => {
                        let asks = match icmp.kind {
                            135 => OWN6.contains(&icmp.target),
                            kind => matches!(kind, 130..=133 | 143),
                        };
                        let right_length = *wrong_by == 0 && self.bytes().len() < LOOK;
                        let from = own || *source == "::" && asks;
                        let length = right_length || !icmp.is_discovery();
                        of_whole && from && icmp.may_pass() && length
                    }
                }
            }
            Packet::Other(_) => false,
        };
        self.own_source && passes
    }
}

fn icmp() -> impl Strategy<Value = Icmp> {
    let kinds = prop_oneof![
        Just(128u8),
        130..=137u8,
        135..=136u8,
        Just(135u8),
        Just(143u8)
    ];
    let option = (prop_oneof![1..=2u8, Just(14u8)], 0..3u8, any::<bool>());
    let option = option.prop_map(|(kind, units, own)| match units {
        // Rarely without a length.
        0 if kind != 14 => (kind, 1, own),
        units => (kind, units, own),
    });
    (
        kinds,
        prop::sample::select(&ADDRESSES6[..]),
        prop::collection::vec(option, 0..3),
    )
        .prop_map(|(kind, target, options)| Icmp {
            kind,
            target,
            options,
        })
}

fn packets() -> impl Strategy<Value = Packet> {
    let address4 = || prop_oneof![2 => Just(OWN4), 3 => prop::sample::select(&ADDRESSES4[..])];
    let address6 = || {
        let own = prop::sample::select(&OWN6[..]);
        prop_oneof![2 => own, 3 => prop::sample::select(&ADDRESSES6[..])]
    };
    let arp = (prop::bool::weighted(0.8), address4(), address4());
    let extension = (prop::sample::select(&[0u8, 43, 60][..]), 0..3u8);
    let wrong_by = prop_oneof![6 => Just(0i16), 1 => -40..40i16, 1 => any::<i16>()];
    prop_oneof![
        1 => arp.prop_map(|(own_hardware, sender, target)| Packet::Arp {
            own_hardware,
            sender,
            target
        }),
        1 => (address4(), address4(), 3..16u8).prop_map(|(source, destination, words)| Packet::V4 {
            source,
            destination,
            words
        }),
        4 => (
            address6(),
            address6(),
            prop::collection::vec(extension, 0..4),
            prop::option::weighted(0.7, icmp()),
            wrong_by
        )
            .prop_map(|(source, destination, extensions, icmp, wrong_by)| Packet::V6 {
                source,
                destination,
                extensions,
                icmp,
                wrong_by
            }),
        1 => prop::sample::select(&[0x8100u16, 0x88a8, 0x88cc, 0x8847, 0x0842, 60][..])
            .prop_map(Packet::Other),
    ]
}

fn frames() -> impl Strategy<Value = Frame> {
    let checksum = prop::option::weighted(0.3, prop_oneof![0..120u16, any::<u16>()]);
    (prop::bool::weighted(0.9), packets(), checksum).prop_map(|(own_source, packet, checksum)| {
        Frame {
            own_source,
            packet,
            checksum,
        }
    })
}

fn link_local() -> impl Strategy<Value = LinkLocal> {
    prop::sample::select(&[LinkLocal::None, LinkLocal::Ipv6, LinkLocal::All][..])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..Default::default() })]

    #[test]
    fn a_frame_passes_when_it_was_made_to(frame in frames(), link_local in link_local()) {
        let bytes = frame.bytes();
        let seen = &bytes[..bytes.len().min(LOOK)];
        let verdict = Filter::new(policy(link_local)).check(&frame.header(), seen);
        prop_assert_eq!(verdict.is_ok(), frame.may_pass(link_local), "{:?}", verdict);
        prop_assert_eq!(check_destination(seen).is_err(), frame.is_for_loopback());
    }

    /// Whatever becomes of a frame's bytes, one that passes has the guest's addresses.
    #[test]
    fn no_frame_that_passes_is_from_another(
        frame in frames(),
        changes in prop::collection::vec((any::<u16>(), any::<u8>()), 0..6),
        cut in any::<u16>(),
    ) {
        let mut bytes = frame.bytes();
        for (at, byte) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        let length = bytes.len();
        bytes.truncate(length - usize::from(cut) % length / 4);
        let seen = &bytes[..bytes.len().min(LOOK)];
        if Filter::new(policy(LinkLocal::None)).check(&frame.header(), seen).is_err() {
            return Ok(());
        }
        prop_assert_eq!(&bytes[6..12], &MAC);
        match bytes[12..14] {
            [0x08, 0x06] => {
                prop_assert_eq!(&bytes[22..28], &MAC);
                let own_probe = bytes[28..32] == [0; 4] && bytes[38..42] == OWN4;
                prop_assert!(bytes[28..32] == OWN4 || own_probe);
            }
            [0x08, 0x00] => {
                prop_assert_eq!(&bytes[26..30], &OWN4);
                prop_assert_ne!(&bytes[30..32], &[169, 254]);
            }
            [0x86, 0xdd] => {
                let source = Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[22..38]).unwrap());
                let own = |address: &str| address.parse() == Ok(source);
                prop_assert!(source.is_unspecified() || OWN6.into_iter().any(own));
            }
            _ => prop_assert!(false, "another protocol"),
        }
    }
}
