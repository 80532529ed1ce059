//! Parameters of an attachment: a namespace, its interface, and what plugins can be told about
//! them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// One interface of one container. Serializable, to be stored in a [`super::Record`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container, unique on this host: letters, digits, `_`, `.` and `-`.
    pub container_id: String,
    /// The network namespace. With a persistent path (a mount of the namespace) plugins can clean
    /// up more after a crash than with `/proc/PID/ns/net`.
    pub netns: PathBuf,
    /// Name of the interface in the namespace.
    pub ifname: String,
    /// Ports of the host forwarded to the container. (Capability `portMappings`)
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// Requested addresses, with or without a prefix. (Capability `ips`)
    #[serde(default)]
    pub ips: Vec<Address>,
    /// Requested hardware address. (Capability `mac`)
    #[serde(default)]
    pub mac: Option<[u8; 6]>,
    /// Requested name servers; the domain is not passed on. (Capability `dns`)
    #[serde(default)]
    pub dns: Option<Dns>,
    /// Further names of the container in this network. (Capability `aliases`)
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Other capabilities by name, such as `bandwidth`.
    #[serde(default)]
    pub capabilities: Map<String, Value>,
    /// Passed to every plugin as `CNI_ARGS`.
    #[serde(default)]
    pub args: Vec<(String, String)>,
}

/// A port of the host that is forwarded to a port of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Restricted to this address of the host; `None` means all.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the container.
    pub container_port: u16,
    /// Protocol of both ports.
    pub protocol: Protocol,
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Lowercase name, as in CNI.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }

    /// Parses the name, ignoring case.
    pub fn parse(text: &str) -> Option<Protocol> {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
            .into_iter()
            .find(|protocol| protocol.name().eq_ignore_ascii_case(text))
    }
}

/// Name resolution of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses of the servers, in order of preference.
    #[serde(deserialize_with = "null_is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain, or empty.
    #[serde(deserialize_with = "null_is_empty")]
    pub domain: String,
    /// Domains to search.
    #[serde(deserialize_with = "null_is_empty")]
    pub search: Vec<String>,
    /// Options of the resolver.
    #[serde(deserialize_with = "null_is_empty")]
    pub options: Vec<String>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    value: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(value).map(Option::unwrap_or_default)
}

/// An address, often with the prefix of its network: `10.87.0.2/16`, `fd00::2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address {
    /// The IP address.
    pub ip: IpAddr,
    /// Prefix length of the network.
    pub prefix: Option<u8>,
}

impl Address {
    /// The prefix length; all bits of the address if not set.
    pub fn prefix_len(&self) -> u8 {
        self.prefix.unwrap_or(most(self.ip))
    }

    /// The first and the last address of its network.
    pub fn ends(&self) -> (IpAddr, IpAddr) {
        let host_bits = u32::from(most(self.ip).saturating_sub(self.prefix_len()));
        match self.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
                let first = ip.to_bits() & mask;
                let last = Ipv4Addr::from_bits(first | !mask);
                (Ipv4Addr::from_bits(first).into(), last.into())
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
                let first = ip.to_bits() & mask;
                let last = Ipv6Addr::from_bits(first | !mask);
                (Ipv6Addr::from_bits(first).into(), last.into())
            }
        }
    }

    /// The same without bits of a host.
    pub fn network(self) -> Address {
        Address {
            ip: self.ends().0,
            ..self
        }
    }

    /// Whether the two networks have an address in common.
    pub fn overlaps(&self, other: Address) -> bool {
        // One of two networks that overlap is in the other.
        self.holds(other.ends().0) || other.holds(self.ends().0)
    }

    /// Whether an address is in its network.
    pub fn holds(&self, address: IpAddr) -> bool {
        let (first, last) = self.ends();
        address.is_ipv4() == self.ip.is_ipv4() && (first..=last).contains(&address)
    }
}

/// Number of bits of an address.
fn most(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let wrong = || format!("invalid address {text:?}");
        let (ip, prefix) = match text.split_once('/') {
            Some((ip, prefix)) => (ip, Some(prefix)),
            None => (text, None),
        };
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let prefix = match prefix {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                let bits: u8 = digits.parse().map_err(|_| wrong())?;
                Some(bits)
                    .filter(|bits| *bits <= most(ip))
                    .ok_or_else(wrong)
                    .map(Some)?
            }
            Some(_) => return Err(wrong()),
            None => None,
        };
        Ok(Address { ip, prefix })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            Some(prefix) => write!(f, "{}/{prefix}", self.ip),
            None => write!(f, "{}", self.ip),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Address {
        Address { ip, prefix: None }
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Address, String> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> String {
        address.to_string()
    }
}

impl Attachment {
    /// Checks it against the specification, independent of the network.
    pub(super) fn check(&self) -> Result<(), String> {
        if !is_identifier(&self.container_id) {
            return Err(format!("invalid container id {:?}", self.container_id));
        }
        if !is_interface_name(&self.ifname) {
            return Err(format!("invalid interface name {:?}", self.ifname));
        }
        if !self.netns.is_absolute() {
            return Err(format!(
                "the network namespace {:?} is not an absolute path",
                self.netns
            ));
        }
        let separators = |text: &str| text.contains([';', '=', '\0']);
        match self
            .args
            .iter()
            .find(|(name, value)| name.is_empty() || separators(name) || separators(value))
        {
            Some((name, value)) => Err(format!(
                "invalid argument {name}={value}: no = or ; is possible in it"
            )),
            None => Ok(()),
        }
    }

    /// `runtimeConfig` for plugins, by capability.
    pub(super) fn capability_arguments(&self, network: &str) -> Map<String, Value> {
        let mut all = self.capabilities.clone();
        let mut set = |name: &str, value: Value| all.insert(name.to_owned(), value);
        if !self.port_mappings.is_empty() {
            set(
                "portMappings",
                self.port_mappings
                    .iter()
                    .map(PortMapping::to_json)
                    .collect(),
            );
        }
        if !self.ips.is_empty() {
            set("ips", json!(self.ips));
        }
        if let Some(mac) = self.mac {
            set(
                "mac",
                json!(mac.map(|byte| format!("{byte:02x}")).join(":")),
            );
        }
        if let Some(Dns {
            nameservers,
            search,
            options,
            ..
        }) = &self.dns
        {
            set(
                "dns",
                json!({ "servers": nameservers, "searches": search, "options": options }),
            );
        }
        if !self.aliases.is_empty() {
            // Not the list of CONVENTIONS.md: keyed by network, as podman passes it and its plugin
            // dnsname, the only one, reads it.
            set("aliases", json!({ network: self.aliases }));
        }
        all
    }

    /// Capabilities that the attachment depends on.
    pub(super) fn needed_capabilities(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        [
            (
                !self.port_mappings.is_empty(),
                "portMappings",
                "publish ports",
            ),
            (!self.ips.is_empty(), "ips", "give a chosen address"),
            (self.mac.is_some(), "mac", "give a chosen hardware address"),
        ]
        .into_iter()
        .filter(|(asked, ..)| *asked)
        .map(|(_, capability, what)| (capability, what))
    }
}

impl PortMapping {
    fn to_json(&self) -> Value {
        let mut mapping = json!({
            "hostPort": self.host_port,
            "containerPort": self.container_port,
            "protocol": self.protocol.name(),
        });
        // The unspecified address must be left out: portmap would match packets against 0.0.0.0.
        if let Some(ip) = self.host_ip.filter(|ip| !ip.is_unspecified()) {
            mapping["hostIP"] = json!(ip);
        }
        mapping
    }
}

/// Whether it is valid as a container id or a network's name.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// Whether the kernel accepts it as an interface name.
pub(super) fn is_interface_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 15
        && !matches!(text, "." | "..")
        && !text.contains(|c: char| c == '/' || c == ':' || c == '\0' || c.is_whitespace())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn addresses() {
        for text in ["10.87.0.2/16", "10.0.0.1", "fd00::2/64", "::", "0.0.0.0/0"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "10.0.0.1/33",
            "::/129",
            "10.0.0.1/",
            "10.0.0.1/+8",
            "10.0.0",
            "a/8",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        assert_eq!("10.0.0.1".parse::<Address>().unwrap().prefix_len(), 32);
    }

    #[test]
    fn ends_of_networks() {
        for (network, first, last) in [
            ("10.0.5.7/24", "10.0.5.0", "10.0.5.255"),
            ("10.0.5.7", "10.0.5.7", "10.0.5.7"),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
            ("fd00::7/120", "fd00::", "fd00::ff"),
        ] {
            let network: Address = network.parse().unwrap();
            let ends = (first.parse().unwrap(), last.parse().unwrap());
            assert_eq!(network.ends(), ends);
            assert!(network.holds(ends.1));
        }
        let network: Address = "10.0.5.0/24".parse().unwrap();
        assert!(!network.holds("10.0.6.0".parse().unwrap()));
        assert!(!network.holds("::".parse().unwrap()));
    }

    #[test]
    fn identifiers() {
        assert!(is_identifier("a1-b_c.d"));
        for text in ["", "-a", "a/b", "a b", "ä", ".."] {
            assert!(!is_identifier(text), "{text}");
        }
        assert!(is_interface_name("eth0"));
        for text in ["", ".", "a/b", "a b", "a:b", "0123456789abcdef"] {
            assert!(!is_interface_name(text), "{text}");
        }
    }

    #[test]
    fn arguments_of_an_attachment() {
        let mut attachment = Attachment {
            container_id: "c1".into(),
            netns: "/proc/1/ns/net".into(),
            ifname: "eth0".into(),
            args: vec![("K8S_POD_NAME".into(), "web".into())],
            ..Attachment::default()
        };
        assert_eq!(attachment.check(), Ok(()));
        attachment.args.push(("A".into(), "b;C=d".into()));
        assert!(attachment.check().unwrap_err().contains("no = or ;"));
    }
}
