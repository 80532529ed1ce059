//! What there is, and what happens.

use std::os::fd::AsFd;

use hull_engine::error::of_image;
use hull_engine::events::{Describer, EventFilter, Feed, selects};
use hull_engine::listing::{Life, in_words};
use hull_engine::{info as engine_info, time, unpacker, usage as engine_usage};
use hull_image::Account;
use hull_network::cni::DEFAULT_NAME;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::call::{Call, JSON, Reply};
use crate::failure::{Failure, Result};
use crate::networks::BRIDGE;
use crate::router::{API_VERSION, OLDEST_API_VERSION};

/// Tells that somebody is there, and by the headers of every answer who.
pub fn ping(call: &mut Call) -> Result<Reply> {
    if let Some(answer) = call.answer.take() {
        let headers = vec![
            // Builds are asked for by `POST /build`.
            ("builder-version", "1".to_owned()),
            (
                "cache-control",
                "no-cache, no-store, must-revalidate".to_owned(),
            ),
            ("pragma", "no-cache".to_owned()),
        ];
        answer.whole(
            StatusCode::OK,
            "text/plain; charset=utf-8",
            headers,
            "OK".into(),
        );
    }
    Ok(Reply::Taken)
}

/// Docker's name of this machine's architecture.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// What serves here.
pub fn version(state: &Shared) -> Result<Reply> {
    let uname = rustix::system::uname();
    let kernel = uname.release().to_string_lossy();
    Ok(Reply::ok(json!({
        "Platform": {"Name": "hull"},
        "Components": [{
            "Name": "Engine",
            "Version": state.version,
            "Details": {
                "ApiVersion": API_VERSION,
                "MinAPIVersion": OLDEST_API_VERSION,
                "Os": "linux",
                "Arch": architecture(),
                "KernelVersion": kernel,
                "Experimental": "false",
            },
        }],
        "Version": state.version,
        "ApiVersion": API_VERSION,
        "MinAPIVersion": OLDEST_API_VERSION,
        "GitCommit": "",
        "GoVersion": "",
        "Os": "linux",
        "Arch": architecture(),
        "KernelVersion": kernel,
        "BuildTime": "",
    })))
}

/// What there is on this host.
pub fn info(state: &Shared) -> Result<Reply> {
    let store = unpacker::store(&state.config)?;
    let mut info = engine_info::info(&state.config, &store, state.version)?;
    for (key, value) in [
        (
            "Plugins",
            json!({"Volume": ["local"], "Network": ["bridge", "null"], "Log": ["json-file", "local", "journald", "none"]}),
        ),
        (
            "Swarm",
            json!({"LocalNodeState": "inactive", "ControlAvailable": false}),
        ),
        ("Runtimes", json!({"hull": {"path": "hull-oci"}})),
        ("DefaultRuntime", json!("hull")),
        ("SecurityOptions", json!(["name=seccomp,profile=builtin"])),
        ("LoggingDriver", json!("json-file")),
        ("CgroupDriver", json!("cgroupfs")),
        ("IndexServerAddress", json!("https://index.docker.io/v1/")),
        (
            "RegistryConfig",
            json!({"IndexConfigs": {}, "InsecureRegistryCIDRs": [], "Mirrors": []}),
        ),
        ("LiveRestoreEnabled", json!(true)),
        ("MemoryLimit", json!(true)),
        ("SwapLimit", json!(true)),
        ("CpuCfsPeriod", json!(true)),
        ("CpuCfsQuota", json!(true)),
        ("CPUShares", json!(true)),
        ("CPUSet", json!(true)),
        ("PidsLimit", json!(true)),
        ("IPv4Forwarding", json!(true)),
        ("OomKillDisable", json!(false)),
        ("Debug", json!(false)),
        ("NFd", json!(0)),
        ("NGoroutines", json!(0)),
        ("NEventsListener", json!(0)),
        ("ExperimentalBuild", json!(false)),
        ("Isolation", json!("")),
        ("InitBinary", json!("")),
        ("Labels", json!([])),
    ] {
        if info[key].is_null() {
            info[key] = value;
        }
    }
    Ok(Reply::ok(info))
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    username: String,
    password: String,
    serveraddress: String,
}

/// Checks a user name and a password with a registry.
pub fn login(call: &mut Call) -> Result<Reply> {
    let login: Login = call.json()?;
    let registry = Some(login.serveraddress.as_str()).filter(|registry| !registry.is_empty());
    let account = Account::docker(registry).map_err(of_image)?;
    account
        .check(&login.username, &login.password)
        .map_err(|error| Failure {
            status: StatusCode::UNAUTHORIZED,
            message: error.to_string(),
        })?;
    Ok(Reply::ok(
        json!({"Status": "Login Succeeded", "IdentityToken": ""}),
    ))
}

/// Disk space.
pub fn usage(state: &Shared, call: &Call) -> Result<Reply> {
    let types: Vec<&str> = call.query.all("type").collect();
    let wanted = |kind: &str| types.is_empty() || types.contains(&kind);
    let store = unpacker::store(&state.config)?;
    let usage = engine_usage::all(&state.config.paths(), &store)?;
    let mut object = json!({});
    if wanted("image") {
        let images: Vec<Value> = usage
            .images
            .iter()
            .filter_map(|image| {
                let first = image.listed.first()?;
                let tags: Vec<&String> =
                    image.listed.iter().flat_map(|one| &one.reference).collect();
                Some(json!({
                    "Id": first.id.to_string(),
                    "ParentId": "",
                    "RepoTags": tags,
                    "RepoDigests": [],
                    "Created": crate::images::seconds(first.created.as_deref()),
                    "Size": image.bytes(),
                    "SharedSize": 0,
                    "VirtualSize": image.bytes(),
                    "Labels": first.labels,
                    "Containers": image.containers,
                }))
            })
            .collect();
        object["LayersSize"] = json!(usage.image_bytes().0);
        object["Images"] = json!(images);
    }
    if wanted("container") {
        let containers: Vec<Value> = usage
            .containers
            .iter()
            .map(|one| {
                let container = &one.container;
                let created_ns = container.record.created_ns;
                json!({
                    "Id": container.record.id,
                    "Names": [format!("/{}", container.record.details.name)],
                    "Image": container.record.details.image,
                    "ImageID": container.record.details.image_id,
                    "Command": container.record.command.join(" "),
                    "Created": created_ns / 1_000_000_000,
                    "SizeRw": one.bytes,
                    "Labels": container.record.details.labels,
                    "State": hull_engine::inspect::state_name(container.status.state),
                    "Status": in_words(&container.status, created_ns, Life::of(container)),
                    "Mounts": [],
                })
            })
            .collect();
        object["Containers"] = json!(containers);
    }
    if wanted("volume") {
        let volumes: Vec<Value> = usage
            .volumes
            .iter()
            .map(|one| {
                let mut volume = one.volume.object();
                volume["UsageData"] = json!({"Size": one.bytes, "RefCount": one.containers});
                volume
            })
            .collect();
        object["Volumes"] = json!(volumes);
    }
    if wanted("build-cache") {
        object["BuildCache"] = json!([]);
        object["BuilderSize"] = json!(0);
    }
    Ok(Reply::ok(object))
}

/// Sends what happens, as it happens.
pub fn events(state: &Shared, call: &mut Call) -> Result<Reply> {
    let moment = |name: &str| match call.query.get(name) {
        None => Ok(None),
        Some(text) => time::parse_since(text).map(Some).map_err(Failure::bad),
    };
    // Docker's name of hull's own network.
    let parse = |text: &str| match EventFilter::parse(text)? {
        EventFilter::Network(name) if name == BRIDGE => {
            Ok(EventFilter::Network(DEFAULT_NAME.to_owned()))
        }
        filter => Ok(filter),
    };
    let filters = call.query.filters_as(parse)?;
    let mut feed = Feed::open(&state.config.run_dir, moment("since")?, moment("until")?)?;
    let mut stream = call.stream(JSON)?;
    let mut describer = Describer::new(state.config.paths())?;
    while let Some(event) = feed.next(stream.as_fd())? {
        let mut object = describer.describe(&event);
        if !selects(&filters, &event, &object) {
            continue;
        }
        let actor = &mut object["Actor"];
        if actor["ID"] == DEFAULT_NAME {
            actor["ID"] = json!(BRIDGE);
            actor["Attributes"]["name"] = json!(BRIDGE);
        }
        let image = actor["Attributes"]["image"].clone();
        if !image.is_null() {
            object["from"] = image;
        }
        // Docker's older keys.
        for (old, new) in [
            ("status", "Action"),
            ("id", "ID"),
            ("time", "Time"),
            ("timeNano", "TimeNano"),
            ("scope", "Scope"),
        ] {
            let value = object[new].take();
            object[old] = value.clone();
            if new == "Action" {
                object[new] = value;
            }
        }
        if let Some(object) = object.as_object_mut() {
            for key in ["ID", "Time", "TimeNano", "Scope", "Status"] {
                object.remove(key);
            }
        }
        if stream.line(&object).is_err() {
            return Ok(Reply::Taken);
        }
    }
    stream.finish();
    Ok(Reply::Taken)
}
