//! Boots the machine of a pod, for its first container or when containerd asks for a sandbox.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_sandbox::cgroup::Bounds;
use hull_sandbox::config::{
    CgroupConfig, DiskConfig, EndPolicy, MAX_NETS, MachineConfig, NetworkConfig, NetworkSource,
    SandboxConfig,
};
use hull_sandbox::control::{launch, serve};
use hull_sandbox::store::SandboxPath;
use hull_sandbox::{Context, Error, Hold, Result, Sandbox};

use crate::pod::{Pod, blocking, follow};
use crate::stand_in::StandIn;
use crate::{Settings, Size};

/// Longest host name of a guest itself, characters: the beginning of the pod's id.
const HOSTNAME: usize = 12;

/// A sandbox that is wanted.
pub struct Wanted {
    /// Where it will be.
    pub path: SandboxPath,
    machine: MachineConfig,
    /// The most that the machine may take of the host.
    pub bounds: Bounds,
    /// Its control groups.
    pub cgroup: CgroupConfig,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
    /// Host name of the guest itself.
    pub hostname: String,
    /// When it ends by itself.
    pub end: EndPolicy,
}

/// Where the sandbox of a pod is.
///
/// # Errors
/// The pod's name has characters that no id has.
pub fn path(settings: &Settings, namespace: &str, pod: &str) -> Result<SandboxPath> {
    // Neither has a plus.
    let name = hull_oci::pod::directory_name(&format!("{pod}+{namespace}"))?;
    Ok(SandboxPath::new(&settings.run_directory, &name))
}

impl Wanted {
    /// One with a machine for these limits: bytes, and thousandths of a processor. Of the pod's
    /// annotations only those that begin with hull's name are looked at.
    ///
    /// # Errors
    /// The configuration is invalid, or no machine can be had; `Unsupported` for an annotation that
    /// pods may not have.
    pub fn new(
        pod: &Pod,
        memory: Option<u64>,
        cpus: Option<u64>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let size = Size {
            memory,
            cpus,
            annotations: allowed(&pod.settings, annotations)?,
        };
        let mut machine = (pod.settings.machine)(&size)?;
        // Engines set up the network namespace until the start, or later.
        machine.nets = MAX_NETS;
        let mut bounds = machine.bounds();
        // The engine's to decide.
        bounds.cpus = None;
        Ok(Self {
            path: path(&pod.settings, &pod.namespace, &pod.id)?,
            machine,
            bounds,
            cgroup: CgroupConfig::None,
            disks: Vec::new(),
            hostname: pod.id.chars().take(HOSTNAME).collect(),
            end: EndPolicy::LastContainer,
        })
    }

    /// Containers that come later may have disks.
    pub fn expect_disks(&mut self) {
        self.machine.spare_disks = MachineConfig::POD_SPARE_DISKS;
    }

    /// Boots it in this process, which serves its control socket from then on. What comes with the
    /// sandbox keeps it until there is a container. `disks` are the opened ones.
    ///
    /// # Errors
    /// A process of the machine cannot be started.
    pub async fn boot(self, pod: &Arc<Pod>, disks: Vec<OwnedFd>) -> Result<(Sandbox, Hold)> {
        let config = SandboxConfig {
            machine: self.machine,
            hostname: self.hostname,
            cgroup: self.cgroup,
            bounds: self.bounds,
            core_scheduling: pod.settings.core_scheduling,
            disks: self.disks,
            end: self.end,
            began_ns: 0,
        };
        let path = self.path.clone();
        let (dir, listener) = blocking(move || launch::claim(&path)).await?;
        let booted = async {
            // What the device process and the machine say is where it is looked for when they end.
            let messages = File::options().append(true).open(self.path.diagnostics());
            let messages = messages.context(|| "open the log of the sandbox")?;
            rustix::stdio::dup2_stderr(&messages).context(|| "redirect standard error")?;
            Sandbox::boot(config, dir, disks).await
        };
        let sandbox = booted.await.inspect_err(|_| {
            // The error that is reported is the one that made this necessary.
            let _ = self.path.sweep();
        })?;
        pod.set_sandbox(Some(sandbox.clone()));
        let hold = sandbox.hold();
        tokio::spawn(follow(pod.clone(), sandbox.clone()));
        let served = sandbox.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(&served, None, listener).await {
                tracing::error!("{error}");
            }
        });
        Ok((sandbox, hold))
    }
}

/// What the names of hull's annotations begin with.
const ANNOTATIONS: &str = "hull.dev/";

fn allowed(
    settings: &Settings,
    annotations: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    let ours = annotations
        .iter()
        .filter(|(name, _)| name.starts_with(ANNOTATIONS));
    let allowed = ours.map(|(name, value)| match settings.annotations.contains(name) {
        true => Ok((name.clone(), value.clone())),
        false => Err(Error::unsupported(format_args!(
            "annotation {name} of a pod: this host's configuration does not allow it"
        ))
        .hint(format!(
            "pod_annotations = [\"{name}\"] in hull's configuration, if it is known"
        ))),
    });
    allowed.collect()
}

/// Connects a sandbox with the network namespace of what stands for its pod.
///
/// # Errors
/// The network cannot be the guest's.
pub async fn connect(pod: &Pod, sandbox: &Sandbox, stand_in: &StandIn) -> Result<()> {
    let config = NetworkConfig {
        source: NetworkSource::Namespace,
        limits: pod.settings.network,
        owner: None,
    };
    let namespace = stand_in.network.as_fd().try_clone_to_owned();
    let namespace = namespace.context(|| "keep the network namespace")?;
    sandbox.connect_network(config, vec![namespace]).await?;
    Ok(())
}
