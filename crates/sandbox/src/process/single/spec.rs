//! The specification as the guest gets it: with what only the host knows.

use std::os::fd::OwnedFd;

use hull_protocol::SHARES_DIR;
use serde_json::json;

use super::ETC_SHARE;
use crate::error::{Context, Failure, Result};
use crate::process::boot::is_network_sysctl;
use crate::process::container::Container;
use crate::process::mounts;
use crate::record;

/// A directory to be shared, by name.
pub type Share = (String, OwnedFd);

/// Name of the share of a container's root file system. `prefix` tells containers of one machine apart.
pub fn root_share(prefix: &str) -> String {
    format!("{prefix}rootfs")
}

/// The request's spec, with what only the host knows, and the volumes to share with it, whose names begin with `prefix`.
pub fn guest_spec(container: &Container, prefix: &str) -> Result<(Vec<u8>, Vec<Share>)> {
    let request = container.request();
    let files = container.paths();
    let mut spec =
        serde_json::to_value(&request.spec).context(|| "read the container's spec".into())?;
    spec["root"]["path"] = json!(format!("{SHARES_DIR}/{}", root_share(prefix)));
    let mut shares = Vec::new();
    let mut sources = Vec::new();
    for (index, volume) in request.volumes.iter().enumerate() {
        let share = mounts::volume(&files, index, volume)?;
        let name = format!("{prefix}volume{index}");
        sources.push(format!("{SHARES_DIR}/{name}/{}", share.inside));
        shares.push((name, share.directory));
    }
    let mut sources = sources.into_iter();
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        let is_volume =
            |mount: &serde_json::Value| mount["type"] == "bind" && mount["source"] == "";
        for mount in mounts.iter_mut().filter(|mount| is_volume(mount)) {
            let source = sources
                .next()
                .ok_or_else(|| Failure::new("the spec has more volumes than the request"))?;
            mount["source"] = json!(source);
        }
        let etc = ["hosts", "hostname", "resolv.conf"].map(|name| {
            json!({
                "destination": format!("/etc/{name}"),
                "type": "bind",
                "source": format!("{SHARES_DIR}/{ETC_SHARE}/{name}"),
                "options": ["bind", "rprivate"],
            })
        });
        // Before the volumes: a person may want to replace them.
        let at = mounts
            .iter()
            .position(|mount| {
                request
                    .volumes
                    .iter()
                    .any(|v| mount["destination"] == json!(v.target))
            })
            .unwrap_or(mounts.len());
        mounts.splice(at..at, etc);
    }
    // These belong to the guest's network, which is the container's: see `configuration`.
    if let Some(sysctl) = spec["linux"]["sysctl"].as_object_mut() {
        sysctl.retain(|name, _| !is_network_sysctl(name));
    }
    let text = serde_json::to_vec(&spec).context(|| "encode the spec".into())?;
    record::write_by_rename(&files.spec(), &text)?;
    Ok((text, shares))
}
