//! Translates a bundle's configuration to the guest's.
//!
//! Parts that apply to the host are removed and handled here (hooks, the network namespace, limits
//! on processors and disks), host paths become shares, and what neither side supports is refused by
//! name. The agent checks everything that remains. docs/oci-spec.md lists all fields.

mod devices;
mod mounts;
mod namespaces;
mod overlay;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use hull_sandbox::config::{ContainerDisk, Share, Writers, share_name};
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::shares::{self, EngineOverlay, ReadOnly};
use oci_spec::runtime::LinuxResources;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use crate::bundle::Bundle;
use crate::keeper::Namespace;
pub use namespaces::{Network, POD_TYPES};

/// Longest spec for the guest, bytes: the agent accepts messages up to 4 MiB.
const MAX_SPEC: usize = (4 << 20) - (64 << 10);

/// What a container needs from the host, and its spec for the guest.
#[derive(Debug)]
pub struct Plan {
    /// The spec for the guest.
    pub spec: Value,
    /// Shares of host files; the root file system is the first.
    pub shares: Vec<HostShare>,
    /// Block devices of the host that become disks of the machine, without duplicates.
    pub disks: Vec<ContainerDisk>,
    /// The network namespace that the spec asks for.
    pub network: Network,
    /// New namespaces that the spec asks for and the keeper creates on the host.
    pub namespaces: Vec<Namespace>,
    /// Namespaces of other processes to join: type and process id on the host.
    pub joins: Vec<(String, i32)>,
    /// Kernel parameters of the guest's own network.
    pub sysctl: BTreeMap<String, String>,
    /// Init has a terminal.
    pub terminal: bool,
    /// Initial size of the terminal: rows, columns.
    pub console_size: Option<(u16, u16)>,
    /// Warnings for the user: settings that are not applied.
    pub notes: Vec<String>,
}

/// A directory or file of the host to share.
#[derive(Debug)]
pub struct HostShare {
    /// What the guest sees.
    pub share: Share,
    /// Path on the host.
    pub source: PathBuf,
    /// Instead of the path: an overlay to be mounted.
    pub overlay: Option<EngineOverlay>,
    /// Include mounts below it.
    pub recursive: bool,
    /// Read-only, enforced by the host.
    pub read_only: ReadOnly,
}

impl HostShare {
    /// Opens a detached mount of it.
    ///
    /// # Errors
    /// Its source does not exist, or cannot be mounted.
    pub fn open(&self) -> Result<OwnedFd> {
        if let Some(overlay) = &self.overlay {
            return shares::engine(overlay, self.read_only != ReadOnly::No);
        }
        shares::host(&self.source, self.recursive, self.read_only)
    }
}

fn refused(what: impl std::fmt::Display, why: impl std::fmt::Display) -> Error {
    Error::unsupported(format_args!("{what}: {why}"))
}

/// What an option of a root file system says of mapped ids: the field of `linux` that has the same,
/// and the map (`uidmap=CONTAINER:HOST:SIZE,…`, containerd's).
fn id_map(option: &str) -> Option<(&'static str, &str)> {
    match option.split_once('=')? {
        ("uidmap", map) => Some(("uidMappings", map)),
        ("gidmap", map) => Some(("gidMappings", map)),
        _ => None,
    }
}

/// Mappings of the spec in the form of [`id_map`].
fn ids(mappings: &Value) -> String {
    let one = |range: &Value| {
        let numbers = ["containerID", "hostID", "size"];
        numbers.map(|field| range[field].to_string()).join(":")
    };
    let ranges = mappings.as_array().into_iter().flatten();
    ranges.map(one).collect::<Vec<_>>().join(",")
}

/// Which id 0 is outside; 0 without a mapping of it.
fn root_of(mappings: &Value) -> u32 {
    let mut ranges = mappings.as_array().into_iter().flatten();
    let range = ranges.find(|range| range["containerID"] == 0);
    let id = range.and_then(|range| range["hostID"].as_u64());
    id.and_then(|id| u32::try_from(id).ok()).unwrap_or(0)
}

impl Plan {
    /// Plans the container `id`.
    ///
    /// # Errors
    /// `Unsupported` if the spec asks for something of the host that a guest cannot have; `Host` if
    /// a path that it names does not exist or cannot be read.
    pub fn new(id: &str, bundle: &Bundle) -> Result<Plan> {
        let mut plan = Plan {
            spec: bundle.config.clone(),
            shares: Vec::new(),
            disks: Vec::new(),
            network: Network::New,
            namespaces: Vec::new(),
            joins: Vec::new(),
            sysctl: BTreeMap::new(),
            terminal: false,
            console_size: None,
            notes: bundle.notes.clone(),
        };
        // Written only by the sandbox: see `Request::Create`.
        if let Some(spec) = plan.spec.as_object_mut() {
            spec.remove("hullDisks");
            spec.remove("hullRootMapped");
        }
        plan.process(bundle);
        plan.share_root(id, bundle);
        let bound = mounts::plan(&mut plan, id, bundle)?;
        namespaces::plan(&mut plan, bundle)?;
        plan.resources();
        devices::plan(&mut plan, bundle, bound)?;
        plan.hooks();
        plan.check_length()?;
        Ok(plan)
    }

    /// Takes the root file system from a mount that an engine asks for instead of a directory.
    ///
    /// # Errors
    /// `Unsupported` for a kind that is not mounted here, and for overlays that are not complete.
    pub fn mount_root(&mut self, kind: &str, source: &str, options: &[String]) -> Result<()> {
        let has = |wanted: &str| options.iter().any(|option| option == wanted);
        let Some(root) = self.shares.first_mut() else {
            return Err(Error::new("the container has no root file system"));
        };
        match kind {
            "overlay" => {
                // Of an engine for which the runtime maps the ids of the image's files.
                let (maps, options): (Vec<_>, Vec<_>) =
                    options.iter().partition(|option| id_map(option).is_some());
                let mut mount = serde_json::json!({"destination": "/", "options": options});
                let planned = overlay::plan(root.share.name.clone(), &mut mount)?;
                root.overlay = planned.overlay;
                root.read_only = planned.read_only;
                for (field, map) in maps.into_iter().filter_map(|option| id_map(option)) {
                    if map != ids(&self.spec["linux"][field]) {
                        return Err(refused(
                            format_args!("root file system: {field} {map}"),
                            "only the ids of the container's user namespace are mapped",
                        ));
                    }
                    self.spec["hullRootMapped"] = serde_json::json!(true);
                    if let Some(overlay) = &mut root.overlay {
                        overlay.unmapped = Some((
                            root_of(&self.spec["linux"]["uidMappings"]),
                            root_of(&self.spec["linux"]["gidMappings"]),
                        ));
                    }
                }
            }
            "bind" | "" if has("bind") || has("rbind") || kind == "bind" => {
                root.source = PathBuf::from(source);
                root.recursive = has("rbind");
                if has("ro") {
                    root.read_only = ReadOnly::Top;
                }
            }
            _ => {
                return Err(refused(
                    format_args!("root file system of type {kind:?}"),
                    "overlay and bind are mounted here",
                )
                .hint("the snapshotters overlayfs and native make such"));
            }
        }
        Ok(())
    }

    /// Sets the container's control group in the guest, where no group is anybody else's and
    /// systemd is not asked: the path that its group has on the host.
    pub fn place(&mut self, group: &Path) {
        if let Some(linux) = self.spec["linux"].as_object_mut() {
            let path = format!("/{}", group.display());
            linux.insert("cgroupsPath".to_owned(), Value::String(path));
        }
    }

    fn process(&mut self, bundle: &Bundle) {
        let Some(process) = bundle.spec.process() else {
            // The specification allows it to be absent until `start`; the agent decides.
            return;
        };
        self.terminal = process.terminal().unwrap_or_default();
        self.console_size = process.console_size().and_then(|size| {
            let number = |number: u64| u16::try_from(number).ok().filter(|number| *number > 0);
            Some((number(size.height())?, number(size.width())?))
        });
        let object = &mut self.spec["process"];
        // Labels of the host's security modules: the guest's kernel has none, and the host
        // resources they protect are out of its reach.
        for label in ["apparmorProfile", "selinuxLabel"] {
            if let Some(object) = object.as_object_mut()
                && let Some(Value::String(value)) = object.remove(label)
                && !value.is_empty()
            {
                self.notes.push(format!(
                    "process.{label} {value:?} is not applied: it is a policy of the host's kernel, and the process runs under another"
                ));
            }
        }
        if let Some(linux) = self.spec["linux"].as_object_mut()
            && let Some(Value::String(label)) = linux.remove("mountLabel")
            && !label.is_empty()
        {
            self.notes.push(format!(
                "linux.mountLabel {label:?} is not applied: labels of files are the host's"
            ));
        }
    }

    fn share_root(&mut self, id: &str, bundle: &Bundle) {
        let share = Share {
            name: share_name(id, "root"),
            is_file: false,
            // `docker cp` and the like write to it from the host.
            writers: Writers::HostRarely,
            sealed: self.spec["root"]["readonly"] == true,
        };
        self.spec["root"]["path"] = Value::String(share.path());
        self.shares.push(HostShare {
            share,
            source: bundle.rootfs.clone(),
            overlay: None,
            recursive: true,
            // Sealed when the guest has mounted onto it.
            read_only: ReadOnly::No,
        });
    }

    /// Limits on processors, memory nodes and disks apply on the host: they are not the guest's.
    fn resources(&mut self) {
        let Some(resources) = self.spec["linux"]["resources"].as_object_mut() else {
            return;
        };
        self.notes.extend(not_applied(resources));
        for_guest(resources);
    }

    fn hooks(&mut self) {
        if let Some(hooks) = self.spec["hooks"].as_object_mut() {
            hooks.retain(|kind, _| kind == "createContainer" || kind == "startContainer");
            if !hooks.is_empty() {
                return;
            }
        }
        // Only the state passed to hooks contains them.
        if let Some(spec) = self.spec.as_object_mut() {
            spec.remove("annotations");
        }
    }

    /// Where the guest has file systems in memory, which the host does not see.
    pub fn covered(&self) -> Vec<String> {
        let mounts = self.spec["mounts"].as_array().into_iter().flatten();
        mounts
            .filter(|mount| {
                matches!(mount["type"].as_str(), Some("tmpfs" | "ramfs"))
                    || mount["destination"] == "/dev/shm"
            })
            .filter_map(|mount| mount["destination"].as_str().map(str::to_owned))
            .collect()
    }

    fn check_length(&self) -> Result<()> {
        let length = self.spec.to_string().len();
        if length <= MAX_SPEC {
            return Ok(());
        }
        Err(refused(
            format_args!("config.json: {length} bytes for the guest"),
            format_args!("it takes {MAX_SPEC} at most"),
        ))
    }
}

/// Warnings for settings of `linux.resources` that are applied on neither side.
fn not_applied(resources: &serde_json::Map<String, Value>) -> Vec<String> {
    const FIELDS: [(&str, &str, &str); 6] = [
        (
            "cpu",
            "realtimeRuntime",
            "the guest's control groups have nothing like it",
        ),
        (
            "cpu",
            "realtimePeriod",
            "the guest's control groups have nothing like it",
        ),
        ("blockIO", "leafWeight", "kernels have had none since 5.0"),
        (
            "network",
            "classID",
            "it marks packets that processes of the host send",
        ),
        (
            "network",
            "priorities",
            "they are for packets that processes of the host send",
        ),
        (
            "blockIO",
            "leafWeightDevice",
            "kernels have had none since 5.0",
        ),
    ];
    FIELDS
        .into_iter()
        .filter(|(group, field, _)| {
            let value = resources.get(*group).and_then(|group| group.get(field));
            // Engines write null or 0 for "not set".
            !matches!(value, None | Some(Value::Null)) && value != Some(&Value::from(0))
        })
        .map(|(group, field, why)| format!("linux.resources.{group}.{field} is not applied: {why}"))
        .collect()
}

/// `linux.resources` for the guest, with warnings for settings that are applied on neither side.
///
/// # Errors
/// None that a specification can cause.
pub fn limits(resources: &LinuxResources) -> Result<(Box<RawValue>, Vec<String>)> {
    let encoding = || "encode linux.resources";
    let mut guest = serde_json::to_value(resources).context(encoding)?;
    let mut notes = Vec::new();
    if let Some(guest) = guest.as_object_mut() {
        notes = not_applied(guest);
        for_guest(guest);
    }
    Ok((to_raw_value(&guest).context(encoding)?, notes))
}

/// Removes from `linux.resources` what applies on the host.
fn for_guest(resources: &mut serde_json::Map<String, Value>) {
    resources.remove("blockIO");
    // Applies to packets on the host's interfaces.
    resources.remove("network");
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        cpu.remove("cpus");
        cpu.remove("mems");
        // The real-time scheduler's runtime applies to the host's group with the machine in it.
        cpu.remove("realtimeRuntime");
        cpu.remove("realtimePeriod");
    }
}
