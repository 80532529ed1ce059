//! The plugins of networks: of those that people created, of the host's configurations, and of
//! hull's own.

use std::path::Path;

use hull_network::cni::{self, BridgeNetwork, List};
use hull_sandbox::config::OwnNetwork;

use crate::error::{Error, Result};
use crate::networks::{self, LEASES, NetworkRecord};
use crate::paths::Paths;

/// A network of hull's own, if it has this name.
pub(super) fn own_network(paths: &Paths, name: &str) -> Result<Option<OwnNetwork>> {
    Ok(match name {
        cni::DEFAULT_NAME => Some(OwnNetwork {
            bridge: cni::DEFAULT_BRIDGE.to_owned(),
            subnets: subnets()?,
            internal: false,
        }),
        _ => networks::load(paths, name)?.map(|network| network.own()),
    })
}

/// The subnets of hull's own network: one of IPv4, and one of IPv6 where the host has that.
fn subnets() -> Result<Vec<cni::Address>> {
    let mut subnets = vec![cni::DEFAULT_IPV4];
    if Path::new("/proc/net/if_inet6").exists() {
        subnets.push(cni::DEFAULT_IPV6);
    }
    let parse = |text: &str| {
        text.parse()
            .map_err(|why| Error::new(format!("{text}: {why}")))
    };
    subnets.into_iter().map(parse).collect()
}

/// The plugins of a network: one that a person created, the host's configuration of this name, or
/// hull's own, with or without `published` ports.
///
/// # Errors
/// There is no such configuration, or it is not one.
pub fn list(paths: &Paths, name: &str, published: bool) -> Result<List> {
    if let Some(network) = networks::load(paths, name)? {
        return network.list(published);
    }
    if name != cni::DEFAULT_NAME {
        let loaded = List::load(&[cni::CONFIGURATION_DIRECTORY], name);
        return loaded.map_err(|error| {
            let error = Error::from(error);
            match error.hint {
                None => {
                    error.hint("hull network ls lists what there is, hull network create makes one")
                }
                Some(_) => error,
            }
        });
    }
    default_network(published, false)
}

/// The plugins of a network of hull's own for a container whose way out is another one.
pub(super) fn beside(paths: &Paths, name: &str, published: bool) -> Result<List> {
    match networks::load(paths, name)? {
        Some(network) => NetworkRecord {
            internal: true,
            ..network
        }
        .list(published),
        None => default_network(published, true),
    }
}

/// hull's own network; `internal` without a way out.
fn default_network(published: bool, internal: bool) -> Result<List> {
    let subnets = subnets()?;
    let [ipv4, ipv6 @ ..] = subnets.as_slice() else {
        return Err(Error::new("hull's own network has no subnet"));
    };
    Ok(cni::bridge_network(&BridgeNetwork {
        name: cni::DEFAULT_NAME,
        bridge: cni::DEFAULT_BRIDGE,
        ipv4: *ipv4,
        ipv6: ipv6.first().copied(),
        gateways: &[],
        ranges: &[],
        internal,
        data_dir: Path::new(LEASES),
        published,
    })?)
}
