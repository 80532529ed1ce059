//! hosts, hostname and resolv.conf of a container, as Docker makes them: written when its network
//! is known, into a directory that is shared with the guest.

use std::fs;
use std::net::IpAddr;

use hull_network::{hosts, resolv};
use hull_sandbox::config::NetworkAddresses;
use hull_sandbox::store::Directory;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result};

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

/// Names of the files.
pub const FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Writes them. `network`: the name of the network and what it gave the container.
///
/// # Errors
/// A name is to be the host's, and the host has no address in the network; a file cannot be
/// written.
pub fn write(
    directory: &Directory,
    hostname: &str,
    config: &DnsConfig,
    network: (&str, Option<&NetworkAddresses>),
) -> Result<()> {
    let [hosts, name, resolv] = FILES;
    let text = hosts_file(hostname, config, network)?;
    directory.write(hosts, text.as_bytes())?;
    directory.write(name, format!("{hostname}\n").as_bytes())?;
    directory.write(resolv, resolv_file(config, network.1).as_bytes())?;
    make_readable(directory)
}

/// Copies them to a container that shares the network of another one: they are its own from then
/// on, and stay when the other one is removed.
///
/// # Errors
/// A file cannot be copied.
pub fn copy(from: &Directory, to: &Directory) -> Result<()> {
    for file in FILES {
        to.write(file, &from.read(file)?.unwrap_or_default())?;
    }
    make_readable(to)
}

/// Users of the container read them.
fn make_readable(directory: &Directory) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for file in FILES {
        let path = directory.path().join(file);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
            .context(|| format!("prepare {}", path.display()))?;
    }
    Ok(())
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
