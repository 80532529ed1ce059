//! hosts, hostname and resolv.conf of a container, as Docker writes them: generated when its
//! network is known, and given to the guest, where they live.

use std::fs;
use std::net::IpAddr;

use hull_network::{hosts, resolv};
use hull_sandbox::RESOLVER;
use hull_sandbox::config::NetworkAddresses;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What becomes a container's `resolv.conf` and `hosts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// Name servers in place of the host's.
    pub servers: Vec<IpAddr>,
    /// Domains to search in place of the host's.
    pub search: Vec<String>,
    /// Options of the resolver in place of the host's.
    pub options: Vec<String>,
    /// Further names: their address, or nothing for the host's in the container's network.
    pub hosts: Vec<(String, Option<IpAddr>)>,
}

impl DnsConfig {
    /// The same in a network in which containers are found by their names: hull answers, and asks
    /// the servers for everything else.
    pub fn by_names(self) -> Self {
        let mut options = self.options;
        if !options.iter().any(|option| option.starts_with("ndots:")) {
            options.push("ndots:0".to_owned());
        }
        Self {
            servers: vec![IpAddr::V4(*RESOLVER.ip())],
            options,
            ..self
        }
    }
}

/// Name servers that the host asks, or those that were asked for: asked from the host's network.
pub fn upstream(config: &DnsConfig) -> Vec<IpAddr> {
    if !config.servers.is_empty() {
        return config.servers.clone();
    }
    let text = fs::read_to_string(resolv::HOST_FILE).unwrap_or_default();
    let servers = resolv::Resolv::parse(&text).servers;
    servers
        .iter()
        .filter_map(|server| server.parse().ok())
        .collect()
}

/// Names of the files.
pub const FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Their contents, by name. `network`: the name of the network and what it gave the container.
///
/// # Errors
/// `Host` if a name is to be the host's, and the host has no address in the network.
pub fn files(
    hostname: &str,
    config: &DnsConfig,
    network: (&str, Option<&NetworkAddresses>),
) -> Result<Vec<(String, String)>> {
    let contents = [
        hosts_file(hostname, config, network)?,
        format!("{hostname}\n"),
        resolv_file(config, network.1),
    ];
    let named = FILES.into_iter().map(str::to_owned).zip(contents);
    Ok(named.collect())
}

fn hosts_file(
    hostname: &str,
    config: &DnsConfig,
    (name, network): (&str, Option<&NetworkAddresses>),
) -> Result<String> {
    let gateway = network.and_then(|network| network.gateways.first());
    let mut extra = Vec::new();
    for (host, address) in &config.hosts {
        let address = address.as_ref().or(gateway).ok_or_else(|| {
            Error::new(format!(
                "cannot give {host} the host's address: it has none in network {name}"
            ))
        })?;
        extra.push((host.clone(), *address));
    }
    let addresses = network.map_or(&[][..], |network| &network.addresses);
    Ok(hosts::generate(hostname, &[], addresses, &extra, true))
}

fn resolv_file(config: &DnsConfig, network: Option<&NetworkAddresses>) -> String {
    let asked = resolv::Options {
        servers: config.servers.clone(),
        search: config.search.clone(),
        options: config.options.clone(),
    };
    // Without a network there is nobody to ask.
    let read = |file| match network {
        Some(_) => fs::read_to_string(file).unwrap_or_default(),
        None => String::new(),
    };
    let mut host = read(resolv::HOST_FILE);
    if resolv::only_loopback(&host) {
        host = read(resolv::SYSTEMD_FILE);
    }
    let has_ipv6 = network.is_some_and(|network| network.addresses.iter().any(IpAddr::is_ipv6));
    resolv::generate(&host, &asked, has_ipv6).text()
}
