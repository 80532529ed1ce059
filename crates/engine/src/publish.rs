//! Options of a container's network: `--publish`, `--add-host`, `--dns`, `--dns-search`,
//! `--dns-option`, `--mac-address`, `--ip` and `--ip6`. Functions of one value return it checked,
//! or one line that names the value and says what is wrong. Called by the argument parser.
//!
//! Forwards nothing: which port leads where is carried out by plugins of the network (crate
//! `network`, module `cni`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hull_network::cni::Protocol;
use hull_network::ports::{HostPort, Published};
use serde::{Deserialize, Serialize};

#[cfg(test)]
mod tests;

/// The host itself, as a value of `--add-host`.
pub const HOST_GATEWAY: &str = "host-gateway";

/// All ports of one `--publish`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports(pub Vec<Published>);

/// Reads `[[IP:][HOST_PORT|HOST_RANGE]:]CONTAINER_PORT|RANGE[/tcp|udp|sctp]`. An IPv6 address is
/// written in brackets; Docker takes it without them, too.
///
/// Ranges are of the same length, or there is one container port: then it gets the first free host
/// port of its range.
pub fn publish(text: &str) -> Result<Ports, String> {
    let wrong = |why: String| format!("invalid published port {text:?}: {why}");
    let (rest, protocol) = match text.rsplit_once('/') {
        Some((rest, name)) => {
            let protocol = Protocol::parse(name);
            (
                rest,
                protocol
                    .ok_or_else(|| wrong(format!("invalid protocol {name:?}: tcp, udp or sctp")))?,
            )
        }
        None => (text, Protocol::default()),
    };
    let (rest, container) = rest
        .rsplit_once(':')
        .map_or((None, rest), |(rest, port)| (Some(rest), port));
    let (host_ip, host) = match rest.and_then(|rest| rest.rsplit_once(':')) {
        Some((ip, port)) => (Some(host_address(ip).map_err(wrong)?), port),
        None => (None, rest.unwrap_or_default()),
    };
    if container.is_empty() {
        return Err(wrong("no container port".to_owned()));
    }
    let (first, last) = port_range(container)
        .filter(|(first, _)| *first != 0)
        .ok_or_else(|| wrong(format!("invalid container port {container:?}")))?;
    let (host_first, host_last) = match host {
        "" | "0" => (0, 0),
        _ => port_range(host)
            .filter(|(first, _)| *first != 0)
            .ok_or_else(|| wrong(format!("invalid host port {host:?}")))?,
    };
    let host_port = |index: u16| match host_last - host_first {
        _ if host_first == 0 => Some(HostPort::Any),
        length if length == last - first => Some(HostPort::One(host_first + index)),
        _ if first == last => Some(HostPort::OneOf(host_first, host_last)),
        _ => None,
    };
    let each = (0..=last - first).map(|index| {
        Some(Published {
            host_ip,
            host_port: host_port(index)?,
            container_port: first + index,
            protocol,
        })
    });
    each.collect::<Option<_>>().map(Ports).ok_or_else(|| {
        wrong(format!(
            "the ranges {host} and {container} are not of the same length"
        ))
    })
}

/// Reads `PORT[/tcp|udp|sctp]` of `--expose`; with its protocol.
pub fn expose(text: &str) -> Result<String, String> {
    match publish(text) {
        Ok(ports) if !text.contains(':') && ports.0.len() == 1 => {
            let port = &ports.0[0];
            Ok(format!("{}/{}", port.container_port, port.protocol.name()))
        }
        _ => Err(format!("invalid port {text:?}: give PORT[/tcp|udp|sctp]")),
    }
}

/// Ports that a container listens at: `80`, `8000-8010/udp`.
pub fn expose_all(text: &str) -> Result<Vec<String>, String> {
    let (range, protocol) = match text.split_once('/') {
        Some((range, protocol)) => (range, format!("/{protocol}")),
        None => (text, String::new()),
    };
    match port_range(range) {
        Some((first, last)) if first <= last => (first..=last)
            .map(|port| expose(&format!("{port}{protocol}")))
            .collect(),
        _ => expose(text).map(|one| vec![one]),
    }
}

/// The address before the ports, which is not empty when there is a colon after it.
fn host_address(text: &str) -> Result<IpAddr, String> {
    let invalid = || format!("invalid IP address {text:?}");
    match text.strip_prefix('[') {
        Some(rest) => {
            let ip = rest.strip_suffix(']').ok_or_else(invalid)?;
            ip.parse::<Ipv6Addr>()
                .map(IpAddr::V6)
                .map_err(|_| invalid())
        }
        None => text.parse().map_err(|_| invalid()),
    }
}

/// A port, or a range of them: `80`, `8000-8010`.
pub fn port_range(text: &str) -> Option<(u16, u16)> {
    // Numbers as Docker reads them: no sign.
    let port = |digits: &str| {
        digits
            .bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| digits.parse().ok())
            .flatten()
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    (first <= last).then_some((first, last))
}

/// The address of a name in `--add-host`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostAddress {
    /// As given.
    Ip(IpAddr),
    /// The host itself, as the container reaches it: the gateway of its network.
    Gateway,
}

/// Reads `NAME:IP`, or `NAME=IP`; an IPv6 address with or without brackets, or `host-gateway`.
pub fn add_host(text: &str) -> Result<(String, HostAddress), String> {
    let wrong = |why: &str| format!("invalid host {text:?}: {why}");
    let (name, address) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .ok_or_else(|| wrong("give NAME:IP, like db:10.0.0.5"))?;
    // It becomes a word of a file with one host a line.
    let valid = |c: char| !c.is_whitespace() && !c.is_control() && !"#:;".contains(c);
    if name.is_empty() || name.len() > 255 || !name.chars().all(valid) {
        return Err(wrong(&format!("{name:?} is no name of a host")));
    }
    if address == HOST_GATEWAY {
        return Ok((name.to_owned(), HostAddress::Gateway));
    }
    let plain = address
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(address);
    match plain.parse() {
        Ok(ip) => Ok((name.to_owned(), HostAddress::Ip(ip))),
        Err(_) => Err(wrong(&format!(
            "invalid IP address {address:?}, nor {HOST_GATEWAY}"
        ))),
    }
}

/// The address of a name server.
pub fn dns(text: &str) -> Result<IpAddr, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("invalid name server {text:?}: give an IP address"))
}

/// A domain to search, or `.` for none.
pub fn dns_search(text: &str) -> Result<String, String> {
    let domain = text.trim();
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
    };
    let valid = domain == "."
        || domain.len() <= 255
            && domain.chars().any(|c| c.is_ascii_alphabetic())
            && domain
                .strip_suffix('.')
                .unwrap_or(domain)
                .split('.')
                .all(label);
    if valid {
        Ok(domain.to_owned())
    } else {
        Err(format!(
            "invalid search domain {text:?}: give a domain like example.org, or . for none"
        ))
    }
}

/// An option of the resolver: `ndots:2`.
pub fn dns_option(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_graphic() && !"#;".contains(c);
    if !text.is_empty() && text.chars().all(valid) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "invalid resolver option {text:?}: give one word like ndots:2"
        ))
    }
}

/// A hardware address that an interface can have: `92:d0:c6:0a:29:33`, or with hyphens.
pub fn mac_address(text: &str) -> Result<[u8; 6], String> {
    let wrong = |why: &str| format!("invalid MAC address {text:?}: {why}");
    let shape = || wrong("give six bytes like 92:d0:c6:0a:29:33");
    let separator = if text.contains('-') { '-' } else { ':' };
    let mut parts = text.split(separator);
    let mut bytes = [0; 6];
    for byte in &mut bytes {
        let digits = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = digits
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .ok_or_else(shape)?;
    }
    if parts.next().is_some() {
        return Err(shape());
    }
    if bytes[0] & 1 != 0 {
        return Err(wrong(
            "it is one of a group; the first byte of an interface's is even",
        ));
    }
    if bytes == [0; 6] {
        return Err(wrong("an interface cannot have it"));
    }
    Ok(bytes)
}

/// An IPv4 address of a container.
pub fn ip(text: &str) -> Result<Ipv4Addr, String> {
    text.parse::<Ipv4Addr>()
        .ok()
        .filter(|ip| {
            !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast() && !ip.is_broadcast()
        })
        .ok_or_else(|| {
            format!("invalid IPv4 address {text:?} of a container: give one like 10.87.0.5")
        })
}

/// An IPv6 address of a container.
pub fn ip6(text: &str) -> Result<Ipv6Addr, String> {
    text.parse::<Ipv6Addr>()
        .ok()
        .filter(|ip| !ip.is_unspecified() && !ip.is_loopback() && !ip.is_multicast())
        .filter(|ip| ip.to_ipv4_mapped().is_none())
        .ok_or_else(|| {
            format!("invalid IPv6 address {text:?} of a container: give one like fd00::5")
        })
}
