//! Options of a net device.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Options for the frames of one net device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetOptions {
    /// What the guest may send; without a policy, anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// Most bytes per second in each direction; 0 for no limit.
    #[serde(default)]
    pub rate: u64,
}

/// The addresses of a guest on its link: it may not send from any other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its network addresses.
    pub addresses: Vec<IpAddr>,
    /// Which link-local addresses it may reach.
    pub link_local: LinkLocal,
}

/// Link-local addresses that a guest may reach beyond what neighbour discovery needs. Hosts and
/// clouds offer services on them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkLocal {
    /// None.
    #[default]
    None,
    /// Those of IPv6: a stand-in for the host (pasta) may answer from one.
    Ipv6,
    /// All.
    All,
}
