//! Networks, in Docker's words.

use hull_network::cni::{Address, CONFIGURATION_DIRECTORY, DEFAULT_NAME, List};
use serde_json::{Value, json};

use crate::error::{ErrorKind, Result};
use crate::networks::{self, NetworkRecord};
use crate::paths::Paths;
use crate::time;

/// The networks that there are: those that are always there, those that people created, and the
/// host's.
///
/// # Errors
/// A network cannot be read.
pub fn networks(paths: &Paths) -> Result<Vec<Value>> {
    let mut all: Vec<Value> = ["default", "none"].map(of_hull).into();
    all.extend(networks::list(paths)?.iter().map(of_record));
    let names = List::names(&[CONFIGURATION_DIRECTORY]).unwrap_or_default();
    all.extend(names.iter().map(|name| of_host(name)));
    Ok(all)
}

/// All that is known of a network.
///
/// # Errors
/// `NotFound`, or what is known of it cannot be read.
pub fn network(paths: &Paths, name: &str) -> Result<Value> {
    match networks::find(paths, name) {
        Ok(network) => {
            let mut object = of_record(&network);
            object["Containers"] = json!(networks::users(paths, &network.name)?);
            Ok(object)
        }
        Err(error) if error.kind != ErrorKind::NotFound => Err(error),
        Err(_) if name == "none" => Ok(of_hull("none")),
        Err(missing) => {
            let plugins = crate::network::list(paths, name, true).map_err(|_| missing)?;
            let mut object = match name == DEFAULT_NAME {
                true => of_hull(name),
                false => of_host(name),
            };
            object["Plugins"] = plugins.into();
            object["Containers"] = json!(networks::users(paths, name)?);
            Ok(object)
        }
    }
}

/// One that is always there.
fn of_hull(name: &str) -> Value {
    let driver = if name == "none" { "null" } else { "bridge" };
    json!({"Name": name, "Driver": driver, "Scope": "local", "Internal": false})
}

/// One of the host's CNI configurations.
fn of_host(name: &str) -> Value {
    json!({"Name": name, "Driver": "cni", "Scope": "local", "Internal": false})
}

/// In Docker's words.
fn of_record(network: &NetworkRecord) -> Value {
    let subnets: Vec<String> = network.subnets().iter().map(Address::to_string).collect();
    let config: Vec<Value> = subnets
        .iter()
        .map(|subnet| json!({"Subnet": subnet}))
        .collect();
    json!({
        "Name": network.name,
        "Id": network.id,
        "Created": time::format_rfc3339(i128::from(network.created_ns)),
        "Driver": "bridge",
        "Scope": "local",
        "EnableIPv6": network.ipv6.is_some(),
        "IPAM": {"Driver": "host-local", "Config": config},
        "Internal": network.internal,
        "Labels": network.labels,
        "Options": {"com.docker.network.bridge.name": network.bridge},
        "Subnets": subnets,
    })
}
