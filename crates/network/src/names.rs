//! DNS messages, as far as containers of one network are found by their names (RFC 1035): reads the
//! question of a query, and answers it. Called by the sandbox process with what a guest sent.

use std::net::IpAddr;

use simple_dns::rdata::{A, AAAA, PTR, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, RCODE, ResourceRecord, TYPE};

/// Longest query that is looked into, bytes: a question of the longest name, and an OPT record with
/// options (RFC 6891). Longer ones are for other name servers.
pub const MAX_QUERY: usize = 1232;

/// Where the names of IPv4 addresses are.
const V4_REVERSE: &str = "in-addr.arpa";

/// Where those of IPv6 addresses are.
const V6_REVERSE: &str = "ip6.arpa";

/// Seconds that an answer may be kept: a container may be gone at any time.
const TTL: u32 = 5;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// The name of this address.
    Pointer(IpAddr),
    /// Anything else.
    Other,
}

/// What a query asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The name in small letters, without a dot at its end.
    pub name: String,
    /// Of which kind.
    pub wanted: Wanted,
}

/// The question of a query, if it has one and no more.
pub fn question(query: &[u8]) -> Option<Question> {
    let packet = parse(query)?;
    let [question] = &packet.questions[..] else {
        return None;
    };
    if question.qclass != QCLASS::CLASS(CLASS::IN) {
        return None;
    }
    let name = question.qname.to_string().to_ascii_lowercase();
    Some(Question {
        wanted: match question.qtype {
            QTYPE::TYPE(TYPE::A) => Wanted::A,
            QTYPE::TYPE(TYPE::AAAA) => Wanted::Aaaa,
            QTYPE::TYPE(TYPE::PTR) => reversed(&name).map_or(Wanted::Other, Wanted::Pointer),
            _ => Wanted::Other,
        },
        name,
    })
}

/// The name below which the name of an address is found: `3.2.1.10.in-addr.arpa` (RFC 1035, 3.5),
/// or its digits below `ip6.arpa` (RFC 3596, 2.5).
pub fn reverse(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.{V4_REVERSE}")
        }
        IpAddr::V6(address) => {
            let digits = address.octets().into_iter().rev();
            let digits = digits.map(|byte| format!("{:x}.{:x}.", byte & 15, byte >> 4));
            digits.collect::<String>() + V6_REVERSE
        }
    }
}

/// The address of such a name.
fn reversed(name: &str) -> Option<IpAddr> {
    let labels = |digits: &'_ str| -> Option<Vec<String>> {
        let digits = digits.strip_suffix('.')?.split('.');
        Some(digits.rev().map(str::to_owned).collect())
    };
    if let Some(digits) = name.strip_suffix(V4_REVERSE) {
        return labels(digits)?.join(".").parse().ok().map(IpAddr::V4);
    }
    let digits = labels(name.strip_suffix(V6_REVERSE)?)?;
    // Of a sign, too, a number could be read.
    let is_digit = |digit: &String| matches!(digit.as_bytes(), [byte] if byte.is_ascii_hexdigit());
    let whole = digits.len() == 32 && digits.iter().all(is_digit);
    let number = whole.then(|| u128::from_str_radix(&digits.concat(), 16).ok())??;
    Some(IpAddr::V6(number.into()))
}

fn parse(query: &[u8]) -> Option<Packet<'_>> {
    let packet = (query.len() <= MAX_QUERY).then(|| Packet::parse(query).ok())??;
    let is_query = !packet.has_flags(PacketFlag::RESPONSE)
        && packet.opcode() == simple_dns::OPCODE::StandardQuery;
    is_query.then_some(packet)
}

/// An empty reply, by who asks others, too.
fn reply_to(query: Packet<'_>) -> Packet<'_> {
    let desired = query.has_flags(PacketFlag::RECURSION_DESIRED);
    let mut reply = query.into_reply();
    let mut flags = PacketFlag::RESPONSE | PacketFlag::RECURSION_AVAILABLE;
    if desired {
        flags |= PacketFlag::RECURSION_DESIRED;
    }
    reply.set_flags(flags);
    reply
}

/// Answers a query about a name that has these addresses; those of another kind than it asks for
/// are left out. `None` when it is no query.
pub fn answer(query: &[u8], addresses: &[IpAddr]) -> Option<Vec<u8>> {
    let asked = question(query)?;
    let packet = parse(query)?;
    let name = packet.questions.first()?.qname.clone();
    let mut reply = reply_to(packet);
    for address in addresses {
        let data = match (asked.wanted, address) {
            (Wanted::A, IpAddr::V4(address)) => RData::A(A::from(*address)),
            (Wanted::Aaaa, IpAddr::V6(address)) => RData::AAAA(AAAA::from(*address)),
            _ => continue,
        };
        reply
            .answers
            .push(ResourceRecord::new(name.clone(), CLASS::IN, TTL, data));
    }
    reply.build_bytes_vec_compressed().ok()
}

/// Answers a query for the name of an address, which has these. `None` when it is no query, or a
/// name cannot be said.
pub fn answer_pointer(query: &[u8], names: &[String]) -> Option<Vec<u8>> {
    let packet = parse(query)?;
    let asked = packet.questions.first()?.qname.clone();
    let mut reply = reply_to(packet);
    for name in names {
        let data = RData::PTR(PTR(Name::new(name).ok()?));
        reply
            .answers
            .push(ResourceRecord::new(asked.clone(), CLASS::IN, TTL, data));
    }
    reply.build_bytes_vec_compressed().ok()
}

/// Answers a query that there is no such name, or that nobody is there to ask.
pub fn refuse(query: &[u8], exists: bool) -> Option<Vec<u8>> {
    let mut reply = reply_to(parse(query)?);
    *reply.rcode_mut() = match exists {
        true => RCODE::ServerFailure,
        false => RCODE::NameError,
    };
    reply.build_bytes_vec_compressed().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use simple_dns::Question as DnsQuestion;

    use super::*;

    fn query(name: &str, kind: TYPE) -> Vec<u8> {
        let mut packet = Packet::new_query(77);
        packet.set_flags(PacketFlag::RECURSION_DESIRED);
        packet.questions.push(DnsQuestion::new(
            Name::new(name).unwrap().into_owned(),
            QTYPE::TYPE(kind),
            QCLASS::CLASS(CLASS::IN),
            false,
        ));
        packet.build_bytes_vec().unwrap()
    }

    #[test]
    fn a_name_is_answered_with_addresses_of_the_kind_that_is_asked_for() {
        let addresses = ["10.1.2.3", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap());
        for (kind, wanted, found) in [
            (TYPE::A, Wanted::A, 1),
            (TYPE::AAAA, Wanted::Aaaa, 1),
            (TYPE::MX, Wanted::Other, 0),
        ] {
            let query = query("WEB", kind);
            let asked = question(&query).unwrap();
            assert_eq!((&asked.name[..], asked.wanted), ("web", wanted));
            let bytes = answer(&query, &addresses).unwrap();
            let reply = Packet::parse(&bytes).unwrap();
            assert_eq!((reply.id(), reply.rcode()), (77, RCODE::NoError));
            assert!(reply.has_flags(PacketFlag::RESPONSE | PacketFlag::RECURSION_DESIRED));
            assert_eq!(reply.questions.len(), 1);
            assert_eq!(reply.answers.len(), found, "{kind:?}");
        }
    }

    #[test]
    fn an_address_is_answered_with_names() {
        for (address, reverse) in [
            ("10.1.2.3", "3.2.1.10.in-addr.arpa"),
            (
                "fd00::12",
                "2.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa",
            ),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(super::reverse(address), reverse);
            let query = query(&reverse.to_ascii_uppercase(), TYPE::PTR);
            assert_eq!(question(&query).unwrap().wanted, Wanted::Pointer(address));
            let bytes = answer_pointer(&query, &["web.net".to_owned()]).unwrap();
            let reply = Packet::parse(&bytes).unwrap();
            let [record] = &reply.answers[..] else {
                panic!("{} answers", reply.answers.len());
            };
            let RData::PTR(PTR(name)) = &record.rdata else {
                panic!("{record:?}");
            };
            assert_eq!(name.to_string(), "web.net");
        }
        for name in [
            "in-addr.arpa",
            "1.2.3.in-addr.arpa",
            "1.2.3.4.5.in-addr.arpa",
            "1.2.3.256.in-addr.arpa",
            "1.2.3.04.in-addr.arpa",
            "x.ip6.arpa",
            "2.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.+.ip6.arpa",
            "ip6.arpa",
        ] {
            let asked = question(&query(name, TYPE::PTR)).unwrap();
            assert_eq!(asked.wanted, Wanted::Other, "{name}");
        }
    }

    #[test]
    fn what_is_no_question_has_no_answer() {
        let mut response = query("web", TYPE::A);
        response[2] |= 0x80;
        let long = [query("web", TYPE::A), vec![0; MAX_QUERY]].concat();
        for bytes in [&b""[..], b"x", &[0xff; 12], &response, &long] {
            assert_eq!(question(bytes), None);
            assert_eq!(answer(bytes, &[]), None);
        }
    }

    #[test]
    fn a_query_that_nobody_answers_is_refused() {
        let query = query("web", TYPE::A);
        for (exists, code) in [(true, RCODE::ServerFailure), (false, RCODE::NameError)] {
            let bytes = refuse(&query, exists).unwrap();
            assert_eq!(Packet::parse(&bytes).unwrap().rcode(), code);
        }
    }
}
