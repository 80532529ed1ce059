//! hosts, hostname and resolv.conf of a container of hull's own, as Docker makes them. Written when its network is known;
//! they are shared with the guest as files of the host's.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use hull_network::{hosts, resolv};

use crate::attachment::Attached;
use crate::error::{Context, Failure, Result};
use crate::request::RunRequest;

/// Writes them into a directory that exists.
///
/// # Errors
/// A name is to be the host's, and there is no network in which the host has an address; a file cannot be written.
pub fn write(directory: &Path, request: &RunRequest, attached: Option<&Attached>) -> Result<()> {
    let hostname = request.spec.hostname().clone().unwrap_or_default();
    for (name, text) in [
        ("hosts", hosts_file(&hostname, request, attached)?),
        ("hostname", format!("{hostname}\n")),
        ("resolv.conf", resolv_file(request, attached)),
    ] {
        let path = directory.join(name);
        fs::write(&path, text).context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn hosts_file(hostname: &str, request: &RunRequest, attached: Option<&Attached>) -> Result<String> {
    let gateway = attached.and_then(|attached| attached.gateways.first());
    let mut extra = Vec::new();
    for (name, address) in &request.names.hosts {
        let address = address.as_ref().or(gateway).ok_or_else(|| {
            Failure::new(format!(
                "cannot give {name} the host's address: it has none in network {}",
                request.network.name
            ))
        })?;
        extra.push((name.clone(), *address));
    }
    let addresses = attached.map_or(&[][..], |attached| &attached.addresses);
    Ok(hosts::generate(hostname, &[], addresses, &extra, true))
}

fn resolv_file(request: &RunRequest, attached: Option<&Attached>) -> String {
    let asked = resolv::Options {
        servers: request.names.servers.clone(),
        search: request.names.search.clone(),
        options: request.names.options.clone(),
    };
    // Without a network there is nobody to ask.
    let read = |file| match attached {
        Some(_) => fs::read_to_string(file).unwrap_or_default(),
        None => String::new(),
    };
    let mut host = read(resolv::HOST_FILE);
    if resolv::only_loopback(&host) {
        host = read(resolv::SYSTEMD_FILE);
    }
    let has_ipv6 = attached.is_some_and(|attached| attached.addresses.iter().any(IpAddr::is_ipv6));
    resolv::generate(&host, &asked, has_ipv6).text()
}
