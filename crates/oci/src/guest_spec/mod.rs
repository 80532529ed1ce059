//! From a bundle's configuration to the one that the guest receives.
//!
//! What is of the host is taken out and done here (hooks, the network namespace, processors and
//! disks that limits name), paths of the host become shares, and what can be honoured on neither
//! side is refused by its name. The agent has the last word on everything that remains.
//! docs/oci-spec.md has all of it, field by field.

mod devices;
mod mounts;
mod namespaces;

use std::collections::BTreeMap;
use std::path::PathBuf;

use hull_sandbox::config::{ContainerDisk, Share, Writers, share_name};
use hull_sandbox::error::{Error, Result};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::keeper::Namespace;
pub use namespaces::Network;

/// Longest spec for the guest, bytes: a message to the agent has 4 MiB at most.
const MAX_SPEC: usize = (4 << 20) - (64 << 10);

/// What a container needs of the host, and what the guest is told.
#[derive(Debug)]
pub struct Plan {
    /// The spec for the guest.
    pub spec: Value,
    /// What it sees of the host; the root file system first.
    pub shares: Vec<HostShare>,
    /// Block devices of the host that the machine has as disks, each once.
    pub disks: Vec<ContainerDisk>,
    /// The network namespace that the spec asks for.
    pub network: Network,
    /// New namespaces that the keeper has on the host, as the spec has them.
    pub namespaces: Vec<Namespace>,
    /// Namespaces of other processes that are to be joined: kind and process id on the host.
    pub joins: Vec<(String, i32)>,
    /// Kernel parameters of the guest's own network.
    pub sysctl: BTreeMap<String, String>,
    /// Init has a terminal.
    pub terminal: bool,
    /// Rows and columns of the terminal at first.
    pub console_size: Option<(u16, u16)>,
    /// What the user should know: a wish that is fulfilled in another way.
    pub notes: Vec<String>,
}

/// A directory or file of the host to be shared.
#[derive(Debug)]
pub struct HostShare {
    /// What the guest sees.
    pub share: Share,
    /// Where it is on the host.
    pub source: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// The host enforces it.
    pub read_only: bool,
}

fn refused(what: impl std::fmt::Display, why: impl std::fmt::Display) -> Error {
    Error::unsupported(format_args!("{what}: {why}"))
}

impl Plan {
    /// Plans the container `id`.
    ///
    /// # Errors
    /// The spec asks for something of the host that a guest cannot have, or names what is not
    /// there.
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
        // The pod's to write: see `Request::Create`.
        if let Some(spec) = plan.spec.as_object_mut() {
            spec.remove("hullDisks");
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

    fn process(&mut self, bundle: &Bundle) {
        let Some(process) = bundle.spec.process() else {
            // The specification lets it be absent until `start`; the agent says what it thinks of
            // that.
            return;
        };
        self.terminal = process.terminal().unwrap_or_default();
        self.console_size = process.console_size().and_then(|size| {
            let number = |number: u64| u16::try_from(number).ok().filter(|number| *number > 0);
            Some((number(size.height())?, number(size.width())?))
        });
        let object = &mut self.spec["process"];
        // Labels of the host's security modules: the guest's kernel has none, and what they keep a
        // process from on the host is out of its reach.
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
        };
        self.spec["root"]["path"] = Value::String(share.path());
        self.shares.push(HostShare {
            share,
            source: bundle.rootfs.clone(),
            recursive: true,
            // The agent makes it so when it has made what is mounted on it.
            read_only: false,
        });
    }

    /// Limits on what is the host's hold on the host: its processors, memory nodes and disks are
    /// not the guest's.
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
        // The state that hooks are told has them; nobody else in the guest asks.
        if let Some(spec) = self.spec.as_object_mut() {
            spec.remove("annotations");
        }
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

/// What `linux.resources` names that holds on neither side, in words for the log.
pub fn not_applied(resources: &serde_json::Map<String, Value>) -> Vec<String> {
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
            // What engines write for "nothing".
            !matches!(value, None | Some(Value::Null)) && value != Some(&Value::from(0))
        })
        .map(|(group, field, why)| format!("linux.resources.{group}.{field} is not applied: {why}"))
        .collect()
}

/// Takes out of `linux.resources` what holds on the host.
pub fn for_guest(resources: &mut serde_json::Map<String, Value>) {
    resources.remove("blockIO");
    // Set by the host's kernel on packets of the host's interfaces.
    resources.remove("network");
    if let Some(cpu) = resources.get_mut("cpu").and_then(Value::as_object_mut) {
        cpu.remove("cpus");
        cpu.remove("mems");
        // Runtime of the real-time scheduler: of the group on the host that the machine is in.
        cpu.remove("realtimeRuntime");
        cpu.remove("realtimePeriod");
    }
}
