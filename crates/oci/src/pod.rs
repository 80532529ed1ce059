//! Selects a container's sandbox: that of the container whose namespaces it joins, that of the pod
//! named in an annotation of the engine unless that has another network, or a new one.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::store::{SandboxPath, keepers};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest, Sha256};

use crate::container::is_valid_id;
use crate::guest_spec::{Network, Plan};

/// Annotations that name a container's pod: of podman and CRI-O, and of containerd.
pub const POD_NAMES: [&str; 2] = [
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.cri.sandbox-id",
];

/// The longest name of a pod that is part of a path as it is: a socket's path has at most 107
/// bytes.
const NAME_LENGTH: usize = 32;
/// How many characters of a longer one are, so that people recognize it, and how many bytes of its
/// digest.
const NAME_BEGIN: usize = 8;
const DIGEST_LENGTH: usize = 16;

/// The sandbox to join or start.
#[derive(Debug)]
pub struct Found {
    /// Its directory.
    pub path: SandboxPath,
    /// Other containers may be in it.
    pub shared: bool,
    /// Other containers are in it.
    pub occupied: bool,
}

impl Found {
    /// Whether the guest's own network mirrors the container's network namespace on the host. A
    /// container that joins another's network uses that one's; a new namespace in a shared sandbox
    /// is the guest's alone.
    pub fn has_network(&self, plan: &Plan) -> bool {
        !joins_network(plan) && !self.is_apart(plan)
    }

    /// Whether the container's network namespace is a new one in a machine that has others.
    pub fn is_apart(&self, plan: &Plan) -> bool {
        self.occupied && plan.network == Network::New && !joins_network(plan)
    }
}

fn joins_network(plan: &Plan) -> bool {
    plan.joins.iter().any(|(kind, _)| kind == "network")
}

/// Finds the sandbox. Removes from the plan joins of a network namespace that is not a container's.
///
/// # Errors
/// `Unsupported` if the namespaces belong to different machines, or to a process that is not
/// hull's.
pub fn find(
    run: &Path,
    id: &str,
    plan: &mut Plan,
    annotations: &BTreeMap<String, String>,
) -> Result<Found> {
    let mut joined: Option<SandboxPath> = None;
    let mut joins = Vec::new();
    for (kind, pid) in std::mem::take(&mut plan.joins) {
        let Some(keeper) = keepers::find(run, pid) else {
            if kind == "network" {
                // A network namespace of the host: the keeper enters it.
                continue;
            }
            return Err(Error::unsupported(format_args!(
                "the {kind} namespace of process {pid} of the host: the container runs under \
                 another kernel"
            ))
            .hint("namespaces of another container that runs with hull can be joined"));
        };
        let pod = keeper.sandbox;
        if joined.as_ref().is_some_and(|joined| *joined != pod) {
            return Err(Error::unsupported(
                "namespaces of containers in different machines",
            ));
        }
        joined = Some(pod);
        joins.push((kind, pid));
    }
    let named = POD_NAMES.iter().find_map(|name| annotations.get(*name));
    let found = match (joined, named) {
        (Some(pod), _) => Found {
            path: pod,
            shared: true,
            occupied: true,
        },
        (None, Some(name)) => {
            let path = SandboxPath::new(run, &directory_name(name)?);
            match is_elsewhere(run, &path, &plan.network) {
                true => alone(run, id)?,
                false => Found {
                    occupied: !keepers::of_sandbox(run, &path).is_empty(),
                    path,
                    shared: true,
                },
            }
        }
        (None, None) => alone(run, id)?,
    };
    plan.joins = joins;
    let network = serde_json::json!({"type": "network", "path": ""});
    // In a machine of its own the container uses the guest's own network; in a shared one, a new
    // namespace is created.
    if !found.has_network(plan)
        && let Some(namespaces) = plan.spec["linux"]["namespaces"].as_array_mut()
    {
        namespaces.push(network);
    }
    Ok(found)
}

fn alone(run: &Path, id: &str) -> Result<Found> {
    Ok(Found {
        path: SandboxPath::new(run, &own_name(id)?),
        shared: false,
        occupied: false,
    })
}

/// Whether a container that joins no namespace of its pod brings another network than the
/// containers that are in the pod's machine, which has one: such a pod (podman's without infra
/// container, or with `--share none`) shares nothing but its name.
fn is_elsewhere(run: &Path, pod: &SandboxPath, network: &Network) -> bool {
    let Network::Path(path) = network else {
        return false;
    };
    // What cannot be told is reported when the namespace is entered.
    let Some(wanted) = namespace(path) else {
        return false;
    };
    let keepers = keepers::of_sandbox(run, pod);
    !keepers.is_empty()
        && !keepers.iter().any(|keeper| {
            let path = format!("/proc/{}/ns/net", keeper.process.pid);
            namespace(Path::new(&path)) == Some(wanted)
        })
}

fn namespace(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

/// A directory's name for a pod, which no other pod has.
///
/// # Errors
/// The pod's name has characters that no id has.
pub fn directory_name(pod: &str) -> Result<String> {
    let begin = pod.get(..NAME_BEGIN).unwrap_or(pod);
    if !is_valid_id(begin) || pod.len() <= NAME_LENGTH && !is_valid_id(pod) {
        return Err(Error::new(format!("invalid name of a pod: {pod:?}")));
    }
    if pod.len() <= NAME_LENGTH {
        return Ok(format!("pod-{pod}"));
    }
    let digest = Sha256::digest(pod.as_bytes());
    let hex: String = digest
        .iter()
        .take(DIGEST_LENGTH)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(format!("pods-{begin}-{hex}"))
}

/// A unique name.
fn own_name(id: &str) -> Result<String> {
    let mut bytes = [0u8; 8];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random numbers")?;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{}-{hex}", id.get(..12).unwrap_or(id)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pods_with_names_that_begin_alike_share_nothing() {
        let long = "0123456789abcdef".repeat(4);
        let mut names = vec![long.clone()];
        names.extend((0..64).map(|at| {
            let mut other = long.clone().into_bytes();
            other[at] = b'x';
            String::from_utf8(other).unwrap()
        }));
        names.extend((1..64).map(|length| long[..length].to_owned()));
        let mut directories: Vec<_> = names.iter().map(|n| directory_name(n).unwrap()).collect();
        // A name that is another's directory.
        directories.push(directory_name(&directories[0][5..]).unwrap());
        directories.push(directory_name(&directories[0][4..]).unwrap());
        for directory in &directories {
            assert!(
                is_valid_id(directory) && directory.len() <= 48,
                "{directory}"
            );
        }
        let count = directories.len();
        directories.sort();
        directories.dedup();
        assert_eq!(directories.len(), count);
    }

    #[test]
    fn a_short_name_is_seen_and_a_strange_one_refused() {
        assert_eq!(directory_name("web").unwrap(), "pod-web");
        for name in [
            "",
            "..",
            "a/b",
            "a b",
            "ü",
            "aaaaaaaü-0123456789abcdef0123456789abcdef",
        ] {
            directory_name(name).unwrap_err();
        }
    }
}
