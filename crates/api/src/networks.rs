//! Networks.

use std::collections::BTreeMap;

use hull_engine::error::{Error, ErrorKind};
use hull_engine::inspect::NetworkFilter;
use hull_engine::listing::PruneFilter;
use hull_engine::networks::{self, NetworkRequest};
use hull_engine::{endpoint, inspect as objects};
use hull_network::cni::{Address, first_address};
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{Call, Reply};
use crate::containers::description::EndpointConfig;
use crate::containers::find;
use crate::failure::{Failure, Result};

/// Docker's name for the network of containers that ask for none.
pub const BRIDGE: &str = "bridge";

/// In Docker's words: every network has all keys.
fn complete(mut object: Value) -> Value {
    if object["Name"] == "default" {
        object["Name"] = json!(BRIDGE);
    }
    let name = object["Name"].clone();
    let config = object["IPAM"]["Config"].as_array().cloned();
    let config = config.unwrap_or_else(|| ranges(&object["Plugins"]));
    if let Some(object) = object.as_object_mut() {
        // hull's own keys.
        object.remove("Plugins");
        object.remove("Subnets");
        // Not what was asked for: docker-compose would make the network anew.
        object.remove("Options");
    }
    for (key, value) in [
        ("Id", name),
        ("Created", json!("0001-01-01T00:00:00Z")),
        ("EnableIPv4", json!(true)),
        ("EnableIPv6", json!(false)),
        ("Attachable", json!(false)),
        ("Ingress", json!(false)),
        ("ConfigFrom", json!({"Network": ""})),
        ("ConfigOnly", json!(false)),
        ("Options", json!({})),
        ("Labels", json!({})),
        ("Containers", json!({})),
    ] {
        if object[key].is_null() {
            object[key] = value;
        }
    }
    object["IPAM"] = json!({"Driver": "default", "Options": null, "Config": config});
    object
}

/// The subnets of a network that plugins make.
fn ranges(plugins: &Value) -> Vec<Value> {
    let plugins = plugins["plugins"].as_array().into_iter().flatten();
    let sets = plugins.filter_map(|plugin| plugin["ipam"]["ranges"].as_array());
    let ranges = sets.flatten().filter_map(Value::as_array).flatten();
    ranges
        .map(|range| {
            let subnet: Option<Address> = serde_json::from_value(range["subnet"].clone()).ok();
            let gateway = subnet.and_then(|subnet| first_address(&subnet));
            json!({"Subnet": range["subnet"], "Gateway": gateway})
        })
        .collect()
}

fn filters(call: &Call) -> Result<Vec<NetworkFilter>> {
    call.query.filters_as(|text| match text {
        // As it is called here.
        "name=bridge" => Ok(NetworkFilter::Name("default".to_owned())),
        text => NetworkFilter::parse(text),
    })
}

/// Lists networks.
pub fn list(state: &Shared, call: &Call) -> Result<Reply> {
    let selected = objects::select_networks(&state.config.paths(), &filters(call)?)?;
    Ok(Reply::ok(selected.into_iter().map(complete).collect()))
}

/// What is known of a network, with the containers that are in it.
pub fn inspect(state: &Shared, name: &str) -> Result<Reply> {
    let paths = state.config.paths();
    let object = objects::network(&paths, name).map_err(|error| no_such(error, name))?;
    Ok(Reply::ok(complete(object)))
}

fn no_such(error: Error, name: &str) -> Failure {
    let missing = error.kind == ErrorKind::NotFound;
    let mut failure = Failure::from(error);
    if missing {
        failure.message = format!("network {name} not found");
    }
    failure
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Asked {
    name: String,
    driver: String,
    internal: bool,
    options: BTreeMap<String, String>,
    #[serde(rename = "EnableIPv4")]
    enable_ipv4: Option<bool>,
    #[serde(rename = "EnableIPv6")]
    enable_ipv6: Option<bool>,
    #[serde(rename = "IPAM")]
    ipam: Ipam,
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Ipam {
    config: Vec<Range>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Range {
    subnet: String,
    gateway: String,
    #[serde(rename = "IPRange")]
    ip_range: String,
    auxiliary_addresses: BTreeMap<String, String>,
}

/// Creates a network.
pub fn create(state: &Shared, call: &mut Call) -> Result<Reply> {
    let asked: Asked = call.json()?;
    if !matches!(asked.driver.as_str(), "" | "bridge" | "default") {
        return Err(Failure::unsupported(format_args!(
            "network driver {:?}: networks are bridges",
            asked.driver
        )));
    }
    if let Some(option) = asked.options.keys().next() {
        return Err(Failure::unsupported(format_args!(
            "option {option} of a network"
        )));
    }
    if asked.enable_ipv4 == Some(false) {
        return Err(Failure::unsupported("a network without IPv4"));
    }
    let (mut subnets, mut gateways, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
    for range in asked.ipam.config {
        if range.subnet.is_empty() {
            continue;
        }
        let wrong = || Failure::bad(format!("invalid subnet {:?}", range.subnet));
        let subnet: Address = range.subnet.parse().map_err(|_| wrong())?;
        if subnet.prefix.is_none() {
            return Err(wrong());
        }
        if !range.gateway.is_empty() {
            let wrong = || Failure::bad(format!("invalid gateway {:?}", range.gateway));
            gateways.push(range.gateway.parse().map_err(|_| wrong())?);
        }
        if !range.ip_range.is_empty() {
            let wrong = || Failure::bad(format!("invalid IPRange {:?}", range.ip_range));
            ranges.push(range.ip_range.parse().map_err(|_| wrong())?);
        }
        if !range.auxiliary_addresses.is_empty() {
            return Err(Failure::unsupported("AuxiliaryAddresses of a network"));
        }
        subnets.push(subnet);
    }
    // Docker's have none unless it is asked for.
    let has_ipv6 = subnets.iter().any(|subnet| subnet.ip.is_ipv6());
    let created = networks::create(
        &state.config.paths(),
        NetworkRequest {
            name: asked.name,
            subnets,
            gateways,
            ranges,
            internal: asked.internal,
            without_ipv6: asked.enable_ipv6 != Some(true) && !has_ipv6,
            labels: asked.labels,
        },
    )?;
    Ok(Reply::Json(
        StatusCode::CREATED,
        json!({"Id": created.id, "Warning": ""}),
    ))
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Connection {
    container: String,
    endpoint_config: EndpointConfig,
}

/// Puts a container into one more network.
pub fn connect(state: &Shared, call: &mut Call, name: &str) -> Result<Reply> {
    let asked: Connection = call.json()?;
    let container = find(state, &asked.container)?.record.id;
    let endpoint = asked.endpoint_config.parse()?;
    endpoint::connect(&state.config, name, &container, endpoint)?;
    Ok(Reply::Empty(StatusCode::OK))
}

/// Takes a container out of a network.
pub fn disconnect(state: &Shared, call: &mut Call, name: &str) -> Result<Reply> {
    let asked: Connection = call.json()?;
    let container = find(state, &asked.container)?.record.id;
    endpoint::disconnect(&state.config, name, &container)?;
    Ok(Reply::Empty(StatusCode::OK))
}

/// Removes a network.
pub fn remove(state: &Shared, name: &str) -> Result<Reply> {
    networks::remove(&state.config.paths(), name).map_err(|error| no_such(error, name))?;
    Ok(Reply::done())
}

/// Says why networks cannot be changed without root.
pub fn refuse(state: &Shared) -> Result<Reply> {
    networks::need_root(&state.config)?;
    Ok(Reply::done())
}

/// Removes networks that no container is in, and that all conditions select.
pub fn prune(state: &Shared, call: &Call) -> Result<Reply> {
    let paths = state.config.paths();
    let filters = call.query.filters_as(PruneFilter::parse)?;
    let removed = networks::prune(&paths, &filters)?;
    Ok(Reply::ok(json!({"NetworksDeleted": removed})))
}
