//! The table that masquerades a network's containers: outside the network they have the host's
//! address. One for each network and family, not per container: it stays as long as the network's
//! bridge. In nft's syntax:
//!
//! ```text
//! table ip hull-NETWORK { chain outside { type nat hook postrouting priority srcnat;
//!     ip saddr SUBNET oifname != BRIDGE masquerade } }
//! ```
//!
//! Plugin `bridge` can do the same with a chain for each container, which takes 12 runs of iptables
//! at its start and 11 at its end.

use std::net::IpAddr;

use super::{BASE_NETWORK, Batch, CREATE, EQUAL, EXCLUSIVE, KEY_OUT_NAME, NEW_TABLE, NOT_EQUAL};
use crate::error::Error;
use crate::redirect::Family;

const CHAIN: &[u8] = b"outside\0";

const HOOK_POSTROUTING: u32 = 4;
/// `NF_IP_PRI_NAT_SRC`, the same for both families.
const PRIORITY_SRCNAT: i32 = 100;

/// Creates the table of a network for a subnet of its bridge, in the namespace of the calling
/// thread, unless it exists.
///
/// # Errors
/// `Masquerade` if the kernel has no nf_tables, or rejects the table.
pub fn ensure(network: &str, bridge: &str, subnet: IpAddr, prefix_length: u8) -> Result<(), Error> {
    super::ensure(&masquerading(network, bridge, subnet, prefix_length)).map_err(|why| {
        Error::Masquerade {
            network: network.to_owned(),
            why,
        }
    })
}

/// The batch that creates it, or nothing if it exists.
fn masquerading(network: &str, bridge: &str, subnet: IpAddr, prefix_length: u8) -> Vec<u8> {
    let (family, source, subnet) = match subnet {
        IpAddr::V4(subnet) => (Family::V4, 12, subnet.octets().to_vec()),
        IpAddr::V6(subnet) => (Family::V6, 8, subnet.octets().to_vec()),
    };
    let mask: Vec<u8> = (0..subnet.len())
        .map(|byte| {
            let bits = usize::from(prefix_length).saturating_sub(byte * 8).min(8) as u32;
            0xffu8.checked_shl(8 - bits).unwrap_or(0)
        })
        .collect();
    let subnet: Vec<u8> = subnet
        .iter()
        .zip(&mask)
        .map(|(byte, mask)| byte & mask)
        .collect();
    let mut table = format!("hull-{network}").into_bytes();
    table.push(0);

    let mut batch = Batch::new();
    batch.table(&table, NEW_TABLE, family, 0, CREATE | EXCLUSIVE);
    batch.nat_chain(&table, CHAIN, family, HOOK_POSTROUTING, PRIORITY_SRCNAT);
    batch.rule(&table, CHAIN, family, |expressions| {
        expressions.payload(BASE_NETWORK, source, subnet.len() as u32);
        expressions.mask(&mask);
        expressions.compare(EQUAL, &subnet);
        expressions.interface(KEY_OUT_NAME, NOT_EQUAL, bridge);
        expressions.expression(b"masq\0", |_| {});
    });
    batch.end()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Namespace;

    #[test]
    fn a_table_is_made_once_for_each_network_and_family() {
        let Ok(namespace) = Namespace::new() else {
            return println!("left out: a_table_is_made_once…: no namespace to be had");
        };
        let inside = || -> Result<(), Error> {
            for (network, subnet, prefix_length) in [
                ("a", "10.87.0.0", 16),
                ("a", "10.87.0.0", 16),
                ("a", "fd68:756c:6c00::", 64),
                ("b", "10.99.160.0", 19),
                ("b", "fd00::", 7),
            ] {
                ensure(network, "hull0", subnet.parse().unwrap(), prefix_length)?;
            }
            Ok(())
        };
        match namespace.run_in(inside).unwrap() {
            Err(error) if error.hint().is_some() => {
                println!("left out: a_table_is_made_once…: {error}");
            }
            made => made.unwrap(),
        }
    }
}
