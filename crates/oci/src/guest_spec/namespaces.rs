//! Namespaces: the network's on the host, the others in the guest.
//!
//! A namespace given by path is one of the host. Engines usually mean that of another container and
//! name it by the process that represents it, `/proc/PID/ns/…`: a keeper. Those become joins, which
//! `pod` resolves. A network namespace with any other path is entered on the host, where its
//! interfaces are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_sandbox::error::{Error, Result};
use serde_json::{Value, json};

use super::{Plan, refused};
use crate::bundle::Bundle;
use crate::keeper::Namespace;

/// A container's network namespace on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// A new one.
    New,
    /// An existing one.
    Path(PathBuf),
}

/// Annotations of Kubernetes engines, on containers whose pod has its namespaces on the host.
pub const POD_TYPES: [&str; 2] = [
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri.container-type",
];

pub(super) fn plan(plan: &mut Plan, bundle: &Bundle) -> Result<()> {
    let in_pod = POD_TYPES
        .iter()
        .any(|name| bundle.annotations.contains_key(*name));
    let maps = &plan.spec["linux"]["uidMappings"];
    let mapped = maps.as_array().is_some_and(|maps| !maps.is_empty());
    let Some(namespaces) = plan.spec["linux"]["namespaces"].as_array_mut() else {
        return Err(no_network());
    };
    let mut kept = Vec::new();
    let mut network = None;
    for namespace in std::mem::take(namespaces) {
        let kind = namespace["type"].as_str().unwrap_or_default().to_owned();
        let path = namespace["path"]
            .as_str()
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        let Some(path) = path else {
            plan.namespaces.extend(match kind.as_str() {
                "cgroup" => Some(Namespace::Cgroup),
                "ipc" => Some(Namespace::Ipc),
                "network" => Some(Namespace::Network),
                "user" => Some(Namespace::User),
                "uts" => Some(Namespace::Uts),
                _ => None,
            });
            if kind == "network" {
                // The container uses the guest's initial network namespace, which has the machine's
                // interfaces.
                network = Some(Network::New);
            } else {
                kept.push(namespace);
            }
            continue;
        };
        if kind == "network" {
            if let Some(pid) = process_of(&path) {
                plan.joins.push((kind, pid));
            }
            network = Some(Network::Path(path));
        } else if let Some(pid) = process_of(&path) {
            plan.joins.push((kind, pid));
            kept.push(namespace);
        } else if in_pod && matches!(kind.as_str(), "ipc" | "uts") {
            // Created on the host for the whole pod: in the guest, the machine's own is used.
        } else if in_pod && kind == "user" && mapped {
            // The same, but the machine's own maps no ids: each container gets one with the maps of
            // its spec, which are the pod's.
            kept.push(json!({"type": "user"}));
        } else {
            return Err(refused(
                format_args!("linux.namespaces: {kind} namespace {}", path.display()),
                "it is of the host's kernel, and the container runs under another",
            ));
        }
    }
    *namespaces = kept;
    plan.network = network.ok_or_else(no_network)?;
    network_parameters(plan);
    Ok(())
}

fn no_network() -> Error {
    refused(
        "linux.namespaces without a network namespace",
        "a guest has a network of its own and cannot use the host's",
    )
    .hint("give the container a network namespace: --network bridge or none instead of host")
}

/// The process id in `/proc/PID/ns/…`.
fn process_of(path: &Path) -> Option<i32> {
    let mut parts = path.strip_prefix("/proc").ok()?.iter();
    let pid = parts.next()?.to_str()?.parse().ok()?;
    (parts.next()? == "ns").then_some(pid)
}

/// Moves out the parameters of the network namespace, which in the guest is the initial one.
fn network_parameters(plan: &mut Plan) {
    let Some(sysctl) = plan.spec["linux"]["sysctl"].as_object_mut() else {
        return;
    };
    let (of_network, rest): (Vec<_>, Vec<_>) = std::mem::take(sysctl)
        .into_iter()
        .partition(|(name, _)| name.replace('/', ".").starts_with("net."));
    sysctl.extend(rest);
    plan.sysctl = of_network
        .into_iter()
        .map(|(name, value)| match value {
            Value::String(value) => (name, value),
            other => (name, other.to_string()),
        })
        .collect::<BTreeMap<_, _>>();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A container of a pod that has a user namespace of the host, which maps its ids.
    fn in_a_pod(maps: Value) -> Result<Plan> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "annotations": {"io.kubernetes.cri.container-type": "container"},
            "hullRootMapped": true,
            "linux": {
                "namespaces": [
                    {"type": "network"},
                    {"type": "user", "path": "/run/pinned-namespaces/user"},
                ],
                "uidMappings": maps,
                "gidMappings": maps,
            },
        });
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        Plan::new("c1", &Bundle::load(directory.path()).unwrap())
    }

    #[test]
    fn users_of_a_pod_are_new_ones_in_the_guest_and_files_of_its_image_are_theirs() {
        let maps = json!([{"containerID": 0, "hostID": 200_000, "size": 65_536}]);
        let mut plan = in_a_pod(maps).unwrap();
        let namespaces = &plan.spec["linux"]["namespaces"];
        assert_eq!(*namespaces, json!([{"type": "user"}]));
        assert_eq!(plan.spec["hullRootMapped"], Value::Null);
        let options = |map: &str| {
            let directories = ["lowerdir=/l", "upperdir=/u", "workdir=/w"].map(str::to_owned);
            let maps = [format!("uidmap={map}"), format!("gidmap={map}")];
            [&directories[..], &maps].concat()
        };
        let other = plan.mount_root("overlay", "overlay", &options("0:5:65536"));
        assert!(other.unwrap_err().message.contains("uidMappings 0:5:65536"));
        let mapped = options("0:200000:65536");
        plan.mount_root("overlay", "overlay", &mapped).unwrap();
        assert_eq!(plan.spec["hullRootMapped"], true);
        let overlay = plan.shares[0].overlay.as_ref().unwrap();
        assert_eq!(overlay.unmapped, Some((200_000, 200_000)));
        assert!(overlay.values.is_empty());

        let refused = in_a_pod(json!([])).unwrap_err();
        assert!(refused.message.contains("pinned-namespaces"), "{refused}");
    }

    #[test]
    fn the_process_of_a_namespace_is_in_its_path() {
        assert_eq!(process_of(Path::new("/proc/42/ns/ipc")), Some(42));
        for other in ["/run/netns/x", "/proc/self/ns/net", "/proc/42/net", "/proc"] {
            assert_eq!(process_of(Path::new(other)), None, "{other}");
        }
    }
}
