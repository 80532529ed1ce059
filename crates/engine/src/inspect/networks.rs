//! Networks, in Docker's words.

use hull_network::cni::{Address, CONFIGURATION_DIRECTORY, DEFAULT_NAME, List};
use serde_json::{Map, Value, json};

use super::network::networks_of;
use crate::container;
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

/// One condition on networks.
#[derive(Clone, Debug)]
pub enum NetworkFilter {
    /// A part of its name.
    Name(String),
    /// The beginning of its id.
    Id(String),
    /// What makes it.
    Driver(String),
    /// Where it reaches.
    Scope(String),
    /// Whether it is always there.
    BuiltIn(bool),
    /// A label, with this value.
    Label(String, Option<String>),
    /// Whether no container is in it.
    Dangling(bool),
}

impl NetworkFilter {
    /// Reads `KEY=VALUE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("invalid filter {text:?}: {why}");
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        let owned = value.to_owned();
        Ok(match (key, value) {
            // Docker's are patterns; these signs are all that people use of that.
            ("name", _) => {
                let plain = value.trim_start_matches('^').trim_end_matches('$');
                Self::Name(plain.to_owned())
            }
            ("id", _) => Self::Id(owned),
            ("driver", _) => Self::Driver(owned),
            ("scope", _) => Self::Scope(owned),
            ("type", "builtin") => Self::BuiltIn(true),
            ("type", "custom") => Self::BuiltIn(false),
            ("type", _) => return Err(wrong("type is builtin or custom")),
            ("label", _) => match value.split_once('=') {
                Some((name, value)) => Self::Label(name.to_owned(), Some(value.to_owned())),
                None => Self::Label(owned, None),
            },
            ("dangling", "true" | "1") => Self::Dangling(true),
            ("dangling", "false" | "0") => Self::Dangling(false),
            ("dangling", _) => return Err(wrong("dangling is true or false")),
            _ => {
                return Err(wrong(
                    "give name=, id=, driver=, scope=, type=, label= or dangling=",
                ));
            }
        })
    }

    fn matches(&self, paths: &Paths, network: &Value) -> Result<bool> {
        let text = |key: &str| network[key].as_str().unwrap_or_default();
        Ok(match self {
            Self::Name(part) => text("Name").contains(part.as_str()),
            Self::Id(beginning) => text("Id").starts_with(beginning.as_str()),
            Self::Driver(driver) => text("Driver") == driver,
            Self::Scope(scope) => text("Scope") == scope,
            Self::BuiltIn(wanted) => network["Id"].is_null() == *wanted,
            Self::Label(name, value) => {
                let has = network["Labels"][name].as_str();
                has.is_some_and(|has| value.as_ref().is_none_or(|value| has == value))
            }
            Self::Dangling(wanted) => networks::users(paths, text("Name"))?.is_empty() == *wanted,
        })
    }
}

/// The networks that conditions select. Several of one key are alternatives, but all labels have to
/// be there.
///
/// # Errors
/// A network or a container cannot be read.
pub fn select_networks(paths: &Paths, filters: &[NetworkFilter]) -> Result<Vec<Value>> {
    let key = std::mem::discriminant::<NetworkFilter>;
    let mut selected = Vec::new();
    'networks: for network in networks(paths)? {
        for filter in filters {
            let alternatives: Vec<&NetworkFilter> = match filter {
                NetworkFilter::Label(..) => vec![filter],
                _ => filters
                    .iter()
                    .filter(|other| key(other) == key(filter))
                    .collect(),
            };
            let mut holds = false;
            for alternative in alternatives {
                holds |= alternative.matches(paths, &network)?;
            }
            if !holds {
                continue 'networks;
            }
        }
        selected.push(network);
    }
    Ok(selected)
}

/// All that is known of a network.
///
/// # Errors
/// `NotFound`, or what is known of it cannot be read.
pub fn network(paths: &Paths, name: &str) -> Result<Value> {
    let name = match name {
        // Docker's name of it, which no other network has.
        "bridge" => DEFAULT_NAME,
        name => name,
    };
    match networks::find(paths, name) {
        Ok(network) => {
            let mut object = of_record(&network);
            object["Containers"] = containers(paths, &network.name)?;
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
            object["Containers"] = containers(paths, name)?;
            Ok(object)
        }
    }
}

/// The containers that are in a network now, by their ids.
fn containers(paths: &Paths, network: &str) -> Result<Value> {
    let mut containers = Map::new();
    for container in container::list(paths)?.into_iter().flatten() {
        if container::is_idle(&container) {
            continue;
        }
        let networks = networks_of(paths, &container);
        let Some(endpoint) = networks.get(network) else {
            continue;
        };
        containers.insert(
            container.record.id.clone(),
            json!({
                "Name": container.record.details.name,
                "EndpointID": "",
                "MacAddress": endpoint["MacAddress"],
                "IPv4Address": with_prefix(endpoint, "IPAddress", "IPPrefixLen"),
                "IPv6Address": with_prefix(endpoint, "GlobalIPv6Address", "GlobalIPv6PrefixLen"),
            }),
        );
    }
    Ok(Value::Object(containers))
}

/// An address as `10.0.0.2/24`; nothing when there is none.
fn with_prefix(endpoint: &Value, address: &str, prefix: &str) -> String {
    match endpoint[address].as_str() {
        None | Some("") => String::new(),
        Some(address) => format!("{address}/{}", endpoint[prefix]),
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
    let config = network.subnets().into_iter().map(|subnet| {
        let mut config = json!({"Subnet": subnet, "Gateway": network.gateway(&subnet)});
        let mut ranges = network.ranges.iter();
        if let Some(range) = ranges.find(|range| range.ip.is_ipv4() == subnet.ip.is_ipv4()) {
            config["IPRange"] = json!(range);
        }
        config
    });
    let config: Vec<Value> = config.collect();
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
