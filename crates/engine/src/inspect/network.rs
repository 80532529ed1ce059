//! `NetworkSettings`: addresses and ports, in Docker's words.

use std::net::IpAddr;

use hull_sandbox::store::{Directory, State, Status};
use serde_json::{Map, Value, json};

use super::container::Known;
use super::{extend, list};
use crate::container::{Container, Details};
use crate::endpoint::Endpoint;
use crate::networks;
use crate::options::RunOptions;
use crate::paths::Paths;

/// What is known of one address.
#[derive(Default)]
struct Address {
    ip: String,
    prefix: u8,
    gateway: String,
}

/// A container in its network.
struct Attached<'a> {
    paths: &'a Paths,
    directory: &'a Directory,
    details: &'a Details,
    options: &'a RunOptions,
    status: &'a Status,
}

/// The networks of a container, with its addresses there.
pub fn networks_of(paths: &Paths, container: &Container) -> Map<String, Value> {
    let details = &container.record.details;
    let none = RunOptions::default();
    let attached = Attached {
        paths,
        directory: &container.directory,
        details,
        options: details.options.as_deref().unwrap_or(&none),
        status: &container.status,
    };
    networks(&attached)
}

/// The addresses that a container has in a network; `first` the one that leads outside.
fn addresses(one: &Attached<'_>, network: &str, first: bool) -> Value {
    let is_up = matches!(one.status.state, State::Running | State::Paused);
    let (mac, mut ipv4, mut ipv6) = match is_up {
        true => attached(one.directory, network),
        false => <_>::default(),
    };
    // Of a network that no plugins made, and of another container's.
    for address in one.status.addresses.iter().filter(|_| is_up && first) {
        let known = if address.is_ipv4() {
            &mut ipv4
        } else {
            &mut ipv6
        };
        if known.ip.is_empty() {
            known.ip = address.to_string();
        }
    }
    json!({
        "MacAddress": mac,
        "Gateway": ipv4.gateway,
        "IPAddress": ipv4.ip,
        "IPPrefixLen": ipv4.prefix,
        "IPv6Gateway": ipv6.gateway,
        "GlobalIPv6Address": ipv6.ip,
        "GlobalIPv6PrefixLen": ipv6.prefix,
    })
}

fn networks(one: &Attached<'_>) -> Map<String, Value> {
    let mut networks = Map::new();
    let name = &one.details.network;
    if name.is_empty() || name.starts_with("container:") {
        return networks;
    }
    let asked = &one.options.network;
    let first = Endpoint {
        network: name.clone(),
        aliases: asked.aliases.clone(),
        links: asked.links.clone(),
        mac_address: asked.mac_address,
        ip: asked.ip,
        ip6: asked.ip6,
    };
    for (index, asked) in std::iter::once(&first).chain(&asked.further).enumerate() {
        let text = |address: Option<IpAddr>| address.map(|ip| ip.to_string()).unwrap_or_default();
        let fixed = json!({
            "IPv4Address": text(asked.ip.map(IpAddr::V4)),
            "IPv6Address": text(asked.ip6.map(IpAddr::V6)),
        });
        let is_fixed = asked.ip.is_some() || asked.ip6.is_some();
        let name = &asked.network;
        // Of one that people created.
        let id = networks::find(one.paths, name).map(|network| network.id);
        let mut network = json!({
            "IPAMConfig": if is_fixed { fixed } else { Value::Null },
            "Links": list(asked.links.iter().map(|(other, name)| format!("{other}:{name}"))),
            "Aliases": list(asked.aliases.iter().cloned()),
            "NetworkID": id.as_ref().unwrap_or(name),
            "EndpointID": "",
            "DriverOpts": null,
        });
        extend(&mut network, addresses(one, name, index == 0));
        if let (Some(mac), "") = (
            asked.mac_address,
            network["MacAddress"].as_str().unwrap_or(""),
        ) {
            network["MacAddress"] = json!(in_words(mac));
        }
        networks.insert(name.clone(), network);
    }
    networks
}

pub(super) fn settings(known: &Known<'_>) -> Value {
    let is_up = matches!(known.status.state, State::Running | State::Paused);
    let attached = Attached {
        paths: &known.paths,
        directory: known.directory,
        details: &known.details,
        options: &known.options,
        status: known.status,
    };
    let mut settings = json!({
        "Bridge": "",
        "SandboxID": "",
        "SandboxKey": "",
        "Ports": if is_up { ports(known) } else { json!({}) },
    });
    extend(
        &mut settings,
        addresses(&attached, &known.details.network, true),
    );
    settings["Networks"] = Value::Object(networks(&attached));
    settings
}

/// What the plugins of a network have given the container.
fn attached(directory: &Directory, network: &str) -> (String, Address, Address) {
    let (mut ipv4, mut ipv6) = (Address::default(), Address::default());
    let records = hull_sandbox::network_records(directory).unwrap_or_default();
    let Some((result, attachment)) = records
        .iter()
        .find(|record| record.list.name() == network)
        .and_then(|record| Some((record.result.as_ref()?, &record.attachment)))
    else {
        return (String::new(), ipv4, ipv6);
    };
    let name = &attachment.ifname;
    for ip in result.addresses(name) {
        let address = if ip.address.ip.is_ipv4() {
            &mut ipv4
        } else {
            &mut ipv6
        };
        if address.ip.is_empty() {
            *address = Address {
                ip: ip.address.ip.to_string(),
                prefix: ip.address.prefix_len(),
                gateway: ip.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
            };
        }
    }
    let mac = result.interface(name).and_then(|interface| interface.mac);
    (mac.map(in_words).unwrap_or_default(), ipv4, ipv6)
}

/// A hardware address as `02:42:ac:11:00:02`.
fn in_words(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Ports that are reached from outside, and those that are only named.
fn ports(known: &Known<'_>) -> Value {
    let exposed = known.image.exposed_ports.iter();
    let mut ports: Map<String, Value> = exposed
        .chain(&known.options.expose)
        .map(|port| (port.clone(), Value::Null))
        .collect();
    for port in &known.details.ports {
        let inside = format!("{}/{}", port.container_port, port.protocol.name());
        let address = port.host_ip.unwrap_or(IpAddr::from([0, 0, 0, 0]));
        let binding =
            json!({"HostIp": address.to_string(), "HostPort": port.host_port.to_string()});
        match ports.get_mut(&inside).and_then(Value::as_array_mut) {
            Some(bindings) => bindings.push(binding),
            None => {
                ports.insert(inside, json!([binding]));
            }
        }
    }
    Value::Object(ports)
}
