//! Containers: listed, inspected, removed.

pub mod archive;
pub mod changes;
pub mod create;
pub mod description;
pub mod lifecycle;
pub mod logs;
pub mod stats;

use std::net::IpAddr;

use hull_engine::Paths;
use hull_engine::container::{self, Any, Container, Removing};
use hull_engine::endpoint;
use hull_engine::lifecycle::{self as engine, Pruned};
use hull_engine::listing::{self, Filter, PruneFilter, Row, Selection, in_words};
use hull_engine::top::{Columns, Processes};
use hull_engine::{inspect, unpacker};
use hull_sandbox::store::State as ContainerState;
use serde_json::{Map, Value, json};

use crate::Shared;
use crate::call::{Call, Reply};
use crate::failure::{Failure, Result};
use crate::networks::BRIDGE;

/// The container of a name or id.
pub fn find(state: &Shared, name: &str) -> Result<Container> {
    let name = name.trim_start_matches('/');
    container::find(&state.config.paths(), name).map_err(|error| {
        let missing = error.kind == hull_engine::error::ErrorKind::NotFound;
        let mut failure = Failure::from(error);
        if missing {
            // Some clients look for these words.
            failure.message = format!("No such container: {name}");
        }
        failure
    })
}

/// Conditions in Docker's words.
fn filters(state: &Shared, call: &Call) -> Result<Vec<Filter>> {
    let filters = call.query.filters()?;
    let known = filters.iter().filter(|text| {
        // What every container of hull's is.
        !matches!(
            text.split_once('='),
            Some(("is-task", "false") | ("isolation", _))
        )
    });
    known
        .map(|text| {
            let parsed = Filter::parse(text).map_err(Failure::bad)?;
            Ok(match parsed {
                Filter::Network(name) => Filter::Network(endpoint::name_of(&state.config, &name)?),
                other => other,
            })
        })
        .collect()
}

/// Lists containers.
pub fn list(state: &Shared, call: &Call) -> Result<Reply> {
    let paths = state.config.paths();
    container::sweep(&paths);
    let selection = Selection {
        all: call.query.flag("all"),
        engines: false,
        last: call
            .query
            .number::<i64>("limit")?
            .and_then(|last| usize::try_from(last).ok())
            .filter(|last| *last > 0),
        filters: filters(state, call)?,
    };
    let (mut rows, wrong) = listing::list(&paths, selection)?;
    for error in wrong {
        tracing::warn!("{error}");
    }
    if call.query.flag("size") {
        listing::measure(&mut rows, &unpacker::store(&state.config)?)?;
    }
    Ok(Reply::ok(
        rows.iter().map(|row| listed(&paths, row)).collect(),
    ))
}

fn listed(paths: &Paths, row: &Row) -> Value {
    let is_up = !matches!(
        row.status.state,
        ContainerState::Stopped | ContainerState::Created
    );
    let ports: Vec<Value> = row
        .ports
        .iter()
        .filter(|_| is_up)
        .map(|port| {
            let address = port.host_ip.unwrap_or(IpAddr::from([0, 0, 0, 0]));
            json!({
                "IP": address.to_string(),
                "PrivatePort": port.container_port,
                "PublicPort": port.host_port,
                "Type": port.protocol.name(),
            })
        })
        .collect();
    let mounts: Vec<Value> = row
        .mounts
        .iter()
        .map(|mount| {
            json!({
                "Type": if mount.is_volume { "volume" } else { "bind" },
                "Name": if mount.is_volume { mount.source.as_str() } else { "" },
                "Source": if mount.is_volume { "" } else { mount.source.as_str() },
                "Destination": mount.destination,
                "Driver": if mount.is_volume { "local" } else { "" },
                "Mode": if mount.read_only { "ro" } else { "" },
                "RW": !mount.read_only,
                "Propagation": "",
            })
        })
        .collect();
    let network = row.networks.first().map_or("", |name| network_name(name));
    let mut object = json!({
        "Id": row.id,
        "Names": [format!("/{}", row.name)],
        "Image": row.image,
        "ImageID": row.image_id,
        "Command": row.command.join(" "),
        "Created": row.created_ns / 1_000_000_000,
        "Ports": ports,
        "Labels": row.labels,
        "State": row.state(),
        "Status": in_words(&row.status, row.created_ns, row.life),
        "HostConfig": {"NetworkMode": network},
        "NetworkSettings": {"Networks": networks(paths, &row.id)},
        "Mounts": mounts,
    });
    if let Some(size) = row.size {
        object["SizeRw"] = json!(size.written);
        object["SizeRootFs"] = json!(size.image.saturating_add(size.written));
    }
    object
}

/// The networks of a container, by Docker's names.
fn networks(paths: &Paths, id: &str) -> Value {
    let Ok(Some(container)) = container::load(paths, id) else {
        return json!({});
    };
    dockers(inspect::networks_of(paths, &container)).into()
}

/// The same by Docker's names.
fn dockers(networks: Map<String, Value>) -> Map<String, Value> {
    let named = networks.into_iter().map(|(name, mut network)| {
        if network["NetworkID"] == "default" {
            network["NetworkID"] = BRIDGE.into();
        }
        (network_name(&name).to_owned(), network)
    });
    named.collect()
}

/// Docker's name of a network.
fn network_name(name: &str) -> &str {
    match name {
        "default" => BRIDGE,
        name => name,
    }
}

/// All that is known of a container.
pub fn inspect(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let id = container.record.id.clone();
    let container = Any::Own(Box::new(container));
    let mut object = inspect::container(&state.config, &container);
    object["ExecIDs"] = state.execs.of(&id);
    let mode = &mut object["HostConfig"]["NetworkMode"];
    if let Some(name) = mode.as_str() {
        *mode = network_name(name).into();
    }
    if let Some(networks) = object["NetworkSettings"]["Networks"].as_object_mut() {
        *networks = dockers(std::mem::take(networks));
    }
    if call.query.flag("size") {
        inspect::add_size(&state.config, &container, &mut object)?;
    }
    Ok(Reply::ok(object))
}

/// Removes a container.
pub fn remove(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    if call.query.flag("link") {
        return Err(Failure::unsupported("links"));
    }
    let container = find(state, id)?;
    let removing = Removing {
        force: call.query.flag("force"),
        volumes: call.query.flag("v"),
    };
    container::remove(&state.config.paths(), &container.record.id, removing)?;
    Ok(Reply::done())
}

/// Removes containers that have ended.
pub fn prune(state: &Shared, call: &Call) -> Result<Reply> {
    let paths = state.config.paths();
    let filters = call.query.filters_as(PruneFilter::parse)?;
    let mut removed = Vec::new();
    let bytes = engine::prune(&paths, &filters, |pruned| {
        // What cannot be removed, as it is just being started, stays.
        if let Pruned::Removed(id) = pruned {
            removed.push(id);
        }
        Ok(())
    })?;
    Ok(Reply::ok(
        json!({"ContainersDeleted": removed, "SpaceReclaimed": bytes}),
    ))
}

/// The processes of a container.
pub fn top(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let options = call.query.get("ps_args").unwrap_or_default();
    let words: Vec<&str> = options.split_whitespace().collect();
    let columns = Columns::parse(&words).map_err(Failure::bad)?;
    let container = Any::Own(Box::new(find(state, id)?));
    let processes = Processes::of(&container)?;
    Ok(Reply::ok(json!({
        "Titles": columns.headings(),
        "Processes": columns.rows(&processes),
    })))
}
