//! The table that keeps a network's containers from the host's loopback interface, where plugins
//! that publish ports have set `route_localnet` for its bridge (CVE-2020-8558). The net device
//! drops such frames of hull's own guests; this is for whatever else is on the bridge. It stays, as
//! the network's bridge does. In the words of nft:
//!
//! ```text
//! table ip hull-NETWORK-guard { chain inside { type filter hook prerouting priority raw;
//!     iifname BRIDGE ip daddr 127.0.0.0/8 drop } }
//! ```
//!
//! Connections of the host to published ports on 127.0.0.1 are not concerned: what comes back on
//! the bridge has the bridge's address until it is translated, which is later.

use super::{BASE_NETWORK, Batch, CREATE, EQUAL, EXCLUSIVE, KEY_IN_NAME, NEW_TABLE};
use crate::error::Error;
use crate::redirect::Family;

const CHAIN: &[u8] = b"inside\0";

// linux/netfilter.h, linux/netfilter_ipv4.h
const HOOK_PREROUTING: u32 = 0;
const PRIORITY_RAW: i32 = -300;
const DROP: u32 = 0;

/// Where the destination is in the header of IPv4, bytes.
const DESTINATION: u32 = 16;

/// Register for verdicts (`NFT_REG_VERDICT`).
const VERDICT_REGISTER: u32 = 0;

/// Creates the table of a network for its bridge, in the namespace of the calling thread, unless it
/// is there.
///
/// # Errors
/// [`Error::Masquerade`] if the kernel has no nf_tables.
pub fn ensure(network: &str, bridge: &str) -> Result<(), Error> {
    super::ensure(&guarding(network, bridge)).map_err(|why| Error::Masquerade {
        network: network.to_owned(),
        why,
    })
}

/// The batch that creates it, or nothing when it is there.
fn guarding(network: &str, bridge: &str) -> Vec<u8> {
    let family = Family::V4;
    let table = format!("hull-{network}-guard\0").into_bytes();
    let mut batch = Batch::new();
    batch.table(&table, NEW_TABLE, family, 0, CREATE | EXCLUSIVE);
    let place = (HOOK_PREROUTING, PRIORITY_RAW);
    batch.chain(b"filter\0", &table, CHAIN, family, place);
    batch.rule(&table, CHAIN, family, |expressions| {
        expressions.interface(KEY_IN_NAME, EQUAL, bridge);
        expressions.payload(BASE_NETWORK, DESTINATION, 1);
        expressions.compare(EQUAL, &[127]);
        expressions.expression(b"immediate\0", |immediate| {
            immediate.number(1, VERDICT_REGISTER);
            immediate.nested(2, |data| data.nested(2, |verdict| verdict.number(1, DROP)));
        });
    });
    batch.end()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Namespace;

    #[test]
    fn a_table_is_created_once_for_each_network() {
        let Ok(namespace) = Namespace::new() else {
            return println!("left out: a_table_is_created_once…: no namespace to be had");
        };
        let inside = || -> Result<usize, Error> {
            for (network, bridge) in [("a", "hull0"), ("a", "hull0"), ("b", "hull1")] {
                ensure(network, bridge)?;
            }
            let rules = super::super::rules(Family::V4, "hull-a-guard", "inside");
            Ok(rules.unwrap().len())
        };
        match namespace.run_in(inside).unwrap() {
            Err(error) if error.hint().is_some() => {
                println!("left out: a_table_is_created_once…: {error}");
            }
            rules => assert_eq!(rules.unwrap(), 1),
        }
    }
}
