//! `NetworkSettings`: addresses and ports, in Docker's words.

use std::net::IpAddr;

use hull_sandbox::store::State;
use serde_json::{Map, Value, json};

use super::container::Known;
use super::extend;

/// What is known of one address.
#[derive(Default)]
struct Address {
    ip: String,
    prefix: u8,
    gateway: String,
}

pub(super) fn settings(known: &Known<'_>) -> Value {
    let is_up = matches!(known.status.state, State::Running | State::Paused);
    let (mac, mut ipv4, mut ipv6) = match is_up {
        true => attached(known),
        false => <_>::default(),
    };
    // Of a network that no plugins made, and of another container's.
    for address in known.status.addresses.iter().filter(|_| is_up) {
        let known = if address.is_ipv4() {
            &mut ipv4
        } else {
            &mut ipv6
        };
        if known.ip.is_empty() {
            known.ip = address.to_string();
        }
    }
    let asked = &known.options.network;
    let fixed = json!({
        "IPv4Address": asked.ip.map(|ip| ip.to_string()).unwrap_or_default(),
        "IPv6Address": asked.ip6.map(|ip| ip.to_string()).unwrap_or_default(),
    });
    let is_fixed = asked.ip.is_some() || asked.ip6.is_some();
    let addresses = json!({
        "MacAddress": mac,
        "Gateway": ipv4.gateway,
        "IPAddress": ipv4.ip,
        "IPPrefixLen": ipv4.prefix,
        "IPv6Gateway": ipv6.gateway,
        "GlobalIPv6Address": ipv6.ip,
        "GlobalIPv6PrefixLen": ipv6.prefix,
    });
    let mut networks = Map::new();
    let name = &known.details.network;
    if !name.is_empty() && !name.starts_with("container:") {
        let mut network = json!({
            "IPAMConfig": if is_fixed { fixed } else { Value::Null },
            "Links": null,
            "Aliases": null,
            "NetworkID": name,
            "EndpointID": "",
            "DriverOpts": null,
        });
        extend(&mut network, addresses.clone());
        networks.insert(name.clone(), network);
    }
    let mut settings = json!({
        "Bridge": "",
        "SandboxID": "",
        "SandboxKey": "",
        "Ports": if is_up { ports(known) } else { json!({}) },
    });
    extend(&mut settings, addresses);
    settings["Networks"] = Value::Object(networks);
    settings
}

/// What plugins have given the container.
fn attached(known: &Known<'_>) -> (String, Address, Address) {
    let (mut ipv4, mut ipv6) = (Address::default(), Address::default());
    let record = hull_sandbox::network_record(known.directory).ok().flatten();
    let Some((result, attachment)) = record
        .as_ref()
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
    let mac = mac.map(|bytes| bytes.map(|byte| format!("{byte:02x}")).join(":"));
    (mac.unwrap_or_default(), ipv4, ipv6)
}

/// Ports that are reached from outside, and those that the image only names.
fn ports(known: &Known<'_>) -> Value {
    let mut ports: Map<String, Value> = known
        .image
        .exposed_ports
        .iter()
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
