//! What is attached to a network: a namespace, its interface, and what plugins may be told about
//! them.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// One interface of one container. Serializable, so that it can be kept in a [`super::Record`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The container, unique on this host: letters, digits, `_`, `.` and `-`.
    pub container_id: String,
    /// The network namespace. A path that outlives processes (a mount of the namespace) lets
    /// plugins clean up more after a crash than `/proc/PID/ns/net`.
    pub netns: PathBuf,
    /// Name of the interface in the namespace.
    pub ifname: String,
    /// Ports of the host that lead to ports of the container. (Capability `portMappings`)
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
    /// Addresses asked for, with or without a prefix. (Capability `ips`)
    #[serde(default)]
    pub ips: Vec<Address>,
    /// Hardware address asked for. (Capability `mac`)
    #[serde(default)]
    pub mac: Option<[u8; 6]>,
    /// Name servers asked for; its domain is not passed on. (Capability `dns`)
    #[serde(default)]
    pub dns: Option<Dns>,
    /// Further names of the container in this network. (Capability `aliases`)
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Other capabilities by their name, like `bandwidth`.
    #[serde(default)]
    pub capabilities: Map<String, Value>,
    /// Told to every plugin as `CNI_ARGS`.
    #[serde(default)]
    pub args: Vec<(String, String)>,
}

/// A port of the host that leads to a port of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Only on this address of the host; `None` is all.
    #[serde(default)]
    pub host_ip: Option<IpAddr>,
    /// On the host.
    pub host_port: u16,
    /// In the container.
    pub container_port: u16,
    /// Of both.
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
    /// In small letters, as CNI wants it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }

    /// By its name, in any letters.
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
    /// Addresses of servers, the first one first.
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
    /// The address itself, whatever the prefix.
    pub ip: IpAddr,
    /// Bits of the network.
    pub prefix: Option<u8>,
}

impl Address {
    /// The prefix; without one all bits of the address.
    pub fn prefix_len(&self) -> u8 {
        self.prefix.unwrap_or(most(self.ip))
    }
}

/// Bits of an address.
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
    /// What is wrong with it by the rules of the specification, whatever the network.
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

    /// What plugins can be told, by capability.
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
            // Not the list of CONVENTIONS.md: by network is what podman says and its plugin
            // dnsname, the only one, reads.
            set("aliases", json!({ network: self.aliases }));
        }
        all
    }

    /// Capabilities without which the container would not get what was asked for.
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
        // An address that means all must be left out: portmap would compare packets with 0.0.0.0
        // itself.
        if let Some(ip) = self.host_ip.filter(|ip| !ip.is_unspecified()) {
            mapping["hostIP"] = json!(ip);
        }
        mapping
    }
}

/// A container id or a network's name.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// A name that the kernel takes for an interface.
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
