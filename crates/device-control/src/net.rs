//! Options of a net device.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Options for the frames of one net device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetOptions {
    /// What the guest may send; anything if unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// Limit of bytes per second in each direction; 0 for none.
    #[serde(default)]
    pub rate: u64,
}

/// Addresses of a guest on its link: it may not send from others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its network addresses.
    pub addresses: Vec<IpAddr>,
    /// Link-local addresses that it may reach.
    pub link_local: LinkLocal,
}

/// Link-local addresses that a guest may reach in addition to neighbour discovery. Hosts and clouds
/// offer services on them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkLocal {
    /// No addresses.
    #[default]
    None,
    /// IPv6 addresses: a proxy for the host (pasta) may answer from one.
    Ipv6,
    /// All addresses.
    All,
}
