//! Creates a container of a bundle, in the pod's sandbox, which is booted for the first one.
//!
//! The machine boots while hooks run and shares are opened. Nothing is mounted where others see it:
//! the root file system that containerd asks to be mounted is a share.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use hull_oci::bundle::Bundle;
use hull_oci::container::{Container as Stored, Record, Root, new_record, state};
use hull_oci::guest_spec::{HostShare, Network, POD_TYPES, Plan};
use hull_oci::{disks, hooks, limits};
use hull_sandbox::cgroup::Place;
use hull_sandbox::config::{CgroupConfig, ContainerConfig, MachineConfig, Stdio, given_file};
use hull_sandbox::store::{Exit, ProcessId, State, Status, roots};
use hull_sandbox::{Context, Error, ErrorKind, Reason, Result, Sandbox, control};
use oci_spec::runtime::{Hooks, LinuxResources};
use protobuf::MessageField;
use serde_json::value::to_raw_value;

use crate::Settings;
use crate::boot::{self, Wanted};
use crate::pod::{Container, Pod, blocking};
use crate::process::Process;
use crate::stand_in::StandIn;
use crate::stdio::Paths;

/// Annotations of a pod's first container, with the sum of what its containers ask for: of
/// containerd's CRI plugin, and of CRI-O.
const POD_MEMORY: [&str; 2] = [
    "io.kubernetes.cri.sandbox-memory",
    "io.kubernetes.cri-o.PodLinuxResourcesMemory",
];
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// How often it is looked whether a container that has ended was removed by others.
const REMOVED_BY_OTHERS: Duration = Duration::from_secs(1);

/// How long another process may take from a container's directory to its record.
const RECORD_GRACE: Duration = Duration::from_secs(10);

/// The directory of containers of a namespace of containerd.
pub fn root(settings: &Settings, namespace: &str) -> Root {
    Root {
        path: settings.run_directory.join("containerd").join(namespace),
    }
}

/// Says what cannot be removed.
fn warn(result: Result<()>) {
    if let Err(error) = result {
        tracing::warn!("{error}");
    }
}

/// Removes what a container has on the host whose shim is no more; how it had ended, if that is
/// known. What cannot be removed is said, and does not keep the rest from being removed. `bundle`
/// is whose container it is: another containerd may have one of the same name.
pub fn clear(settings: &Settings, namespace: &str, id: &str, bundle: &Path) -> Option<Exit> {
    let mut exit = None;
    let stored = root(settings, namespace).find(id).ok();
    let record = stored.as_ref().and_then(|stored| stored.record().ok());
    let others = record.as_ref().is_some_and(|record| {
        let same = |bundle: &Path| std::fs::canonicalize(bundle).ok();
        let (own, asked) = (same(&record.details.bundle), same(bundle));
        own.is_some() && own != asked && record.creator.lives()
    });
    if others {
        tracing::warn!("container {id} is another containerd's");
        return None;
    }
    if let (Some(stored), Some(record)) = (&stored, &record) {
        if let Ok(Some(status)) = Status::read(&stored.directory) {
            exit = status.exit;
        }
        // Frozen processes cannot end.
        record.details.groups.thaw();
        if let Some(sandbox) = &record.sandbox {
            warn(control::remove(sandbox, &record.id));
        }
    }
    // The machine of a pod that has no container for it, whose bundle has no configuration.
    if bundle.is_dir() && !bundle.join("config.json").exists() {
        warn(boot::path(settings, namespace, id).and_then(|sandbox| {
            sandbox.kill()?;
            sandbox.wait_for_end()?;
            sandbox.sweep()
        }));
    }
    if let (Some(stored), Some(record)) = (&stored, &record) {
        if let Some(hooks) = hooks_of(stored) {
            let state = state(record, State::Stopped, 0);
            let warn = |warning: &str| tracing::warn!("{warning}");
            hooks::run_all("poststop", hooks.poststop().as_ref(), &state, warn);
        }
        warn(record.details.groups.remove());
    }
    if let Some(stored) = &stored {
        warn(stored.remove());
    }
    exit
}

/// The hooks of a container; none when they cannot be read.
pub fn hooks_of(stored: &Stored) -> Option<Hooks> {
    let hooks = stored.hooks();
    hooks
        .inspect_err(|error| tracing::warn!("{error}"))
        .unwrap_or_default()
}

/// The directory of a new container, in place of one that another shim has left.
fn claim(settings: &Settings, namespace: &str, id: &str, bundle: &Path) -> Result<Stored> {
    let root = root(settings, namespace);
    if let Err(error) = roots::register(&settings.run_directory, &root.path) {
        tracing::warn!("{error}");
    }
    let claimed = root.claim(id);
    match claimed {
        Err(error) if error.kind == ErrorKind::Exists => {
            let stored = root.find(id)?;
            let is_new = std::fs::metadata(stored.directory.path())
                .and_then(|found| found.modified())
                .is_ok_and(|made| made.elapsed().is_ok_and(|age| age < RECORD_GRACE));
            match stored.record() {
                Ok(record) if record.creator.lives() || record.sandbox_lives() => {
                    return Err(error);
                }
                // Somebody else is just creating it.
                Err(missing) if missing.kind == ErrorKind::NotFound && is_new => return Err(error),
                // Of a newer hull.
                Err(unknown) if unknown.kind == ErrorKind::Unsupported => return Err(unknown),
                _ => {}
            }
            clear(settings, namespace, id, bundle);
            root.claim(id)
        }
        claimed => claimed,
    }
}

/// Creates a container, whose init then waits to be started.
///
/// # Errors
/// The bundle is invalid, a limit cannot be set, a hook fails, the machine does not boot, or the
/// guest refuses the container. Nothing of it remains.
pub async fn create(pod: &Arc<Pod>, request: &CreateTaskRequest) -> Result<Arc<Container>> {
    // One at a time: the first one boots the sandbox that the others are in.
    let _creating = pod.creating.lock().await;
    pod.stays()?;
    if pod.is_idle() && pod.sandbox().is_some_and(|sandbox| sandbox.is_over()) {
        // That of containers which are all gone.
        pod.set_sandbox(None);
    }
    let (of_pod, path, id) = (pod.clone(), request.bundle.clone(), request.id.clone());
    let (bundle, stored, record) = blocking(move || {
        let bundle = Bundle::load(Path::new(&path))?;
        let stored = claim(&of_pod.settings, &of_pod.namespace, &id, Path::new(&path))?;
        let root = root(&of_pod.settings, &of_pod.namespace);
        let mut record = new_record(&stored, &bundle, &root.path);
        record.engine = "containerd".to_owned();
        Ok((Arc::new(bundle), stored, record))
    })
    .await?;
    let mut making = Making {
        pod,
        bundle,
        record,
        stored,
        sandbox: pod.sandbox(),
        own_sandbox: false,
        shares: Vec::new(),
    };
    match making.make(request).await {
        Ok(container) => Ok(container),
        Err(error) => {
            making.undo().await;
            Err(error)
        }
    }
}

struct Making<'a> {
    pod: &'a Arc<Pod>,
    bundle: Arc<Bundle>,
    record: Record,
    stored: Stored,
    sandbox: Option<Sandbox>,
    /// The sandbox was booted for this container.
    own_sandbox: bool,
    /// Names of the shares that were added.
    shares: Vec<String>,
}

/// What the bundle and containerd ask for.
fn plan(bundle: &Bundle, request: &CreateTaskRequest) -> Result<Plan> {
    if !request.checkpoint.is_empty() {
        return Err(Error::unsupported("a container from a checkpoint"));
    }
    let mut plan = Plan::new(&request.id, bundle)?;
    match request.rootfs.as_slice() {
        [] => {}
        [mount] => plan.mount_root(&mount.type_, &mount.source, &mount.options)?,
        _ => {
            return Err(Error::unsupported(
                "a root file system of several mounts on top of each other",
            ));
        }
    }
    for note in &plan.notes {
        tracing::warn!("container {}: {note}", request.id);
    }
    Ok(plan)
}

impl Making<'_> {
    async fn make(&mut self, request: &CreateTaskRequest) -> Result<Arc<Container>> {
        self.stored.store(&self.record)?;
        let (bundle, asked) = (self.bundle.clone(), request.clone());
        let mut plan = blocking(move || plan(&bundle, &asked)).await?;
        let config = serde_json::to_vec(&self.bundle.config).context(|| "keep config.json")?;
        self.stored.store_config(&config)?;
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: plan.terminal,
        };
        let opened = paths
            .open(&request.id, &self.pod.namespace, &self.pod.streams)
            .await?;
        let first = self.sandbox.is_none();
        let place = self.place(&plan)?;
        plan.place(place.path());
        self.join(&mut plan)?;
        let hold = match &self.sandbox {
            Some(sandbox) => {
                let hold = sandbox.hold();
                let disks = open_disks(&plan).await?;
                sandbox.add_disks(&plan.disks, disks).await?;
                hold
            }
            None => self.boot(&plan, place).await?,
        };
        // It was booted, or was there.
        let Some(sandbox) = self.sandbox.clone() else {
            return Err(Error::new("the sandbox was not booted"));
        };
        let network = plan.network.clone();
        let stand_in = blocking(move || StandIn::start(&network)).await?;
        self.record.details.keeper = ProcessId::of(stand_in.pid).unwrap_or_default();
        self.record.sandbox = Some(sandbox.path().clone());
        self.stored.store(&self.record)?;
        self.run_hooks(stand_in.pid).await?;
        if first {
            boot::connect(self.pod, &sandbox, &stand_in).await?;
        }
        let (mut plan, mounts) = blocking(move || {
            let mounts = plan.shares.iter().map(HostShare::open);
            let mounts = mounts.collect::<Result<Vec<_>>>()?;
            Ok((plan, mounts))
        })
        .await?;
        let shares: Vec<_> = plan
            .shares
            .iter()
            .map(|share| share.share.clone())
            .collect();
        self.shares = shares.iter().map(|share| share.name.clone()).collect();
        sandbox.add_shares(&shares, mounts).await?;
        let files = give_files(&mut plan, &request.id, self.pod.files());
        let config = ContainerConfig {
            files,
            stdio: Stdio::Handover {
                terminal: plan.terminal,
                stdin: plan.terminal || opened.has_stdin(),
            },
            start: false,
            keeper: Some(stand_in.pid),
            sysctl: self.sysctls(&plan),
            joins: plan.joins.clone(),
            disks: plan.disks.clone(),
            ..ContainerConfig::new(
                &request.id,
                to_raw_value(&plan.spec).context(|| "encode the spec")?,
            )
        };
        let (directory, kept) = (
            self.stored.directory.try_clone()?,
            self.stored.directory.try_clone()?,
        );
        let mut process = sandbox
            .create(config, directory, self.shares.clone())
            .await?;
        // They go with the container.
        self.shares.clear();
        drop(hold);
        let inner = process.container().clone();
        let connected = match self.stored.directory.is_there() {
            true => opened.connect(process.take_streams()),
            // containerd waits no more, and has had it removed.
            false => Err(Error::wrong_state("the container was deleted meanwhile")),
        };
        let io = match connected {
            Ok(io) => io,
            Err(error) => {
                inner.delete().await?;
                return Err(error);
            }
        };
        let init = Arc::new(Process::new(&request.id, "", stand_in.pid, paths));
        let process = init.enter(process, io);
        let container = Arc::new(Container {
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            inner,
            init,
            execs: Mutex::default(),
            stand_in,
            holds_pod: holds_pod(&self.bundle.annotations),
            stored: Stored {
                directory: kept,
                id: self.stored.id.clone(),
            },
            record: Mutex::new(self.record.clone()),
            deleted: tokio::sync::Mutex::default(),
        });
        self.pod.add(container.clone());
        self.announce(request, container.init.pid);
        tokio::spawn(conclude(self.pod.clone(), container.clone(), process));
        Ok(container)
    }

    fn announce(&self, request: &CreateTaskRequest, pid: i32) {
        self.pod.events.publish(&TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            pid: pid.unsigned_abs(),
            ..TaskCreate::default()
        });
    }

    fn resources(&self) -> Option<&LinuxResources> {
        self.bundle.spec.linux().as_ref()?.resources().as_ref()
    }

    /// Kernel parameters of the guest's network: its own, and those of a pod that names them apart.
    fn sysctls(&self, plan: &Plan) -> BTreeMap<String, String> {
        let mut sysctls: BTreeMap<_, _> = self.pod.sysctls().into_iter().collect();
        sysctls.extend(plan.sysctl.clone());
        sysctls
    }

    /// Where its control groups are. Engines on systemd write them in its notation.
    fn place(&self, plan: &Plan) -> Result<Place> {
        let path = plan.spec["linux"]["cgroupsPath"].as_str();
        let systemd = path.is_some_and(|path| {
            !path.contains('/') && path.bytes().filter(|byte| *byte == b':').count() == 2
        });
        Place::find(path.map(Path::new), &self.record.id, systemd)
    }

    /// Namespaces of other containers of the pod stay in the plan; the network of the pod is the
    /// guest's own.
    fn join(&self, plan: &mut Plan) -> Result<()> {
        let containers = self.pod.containers();
        let is_ours = |pid: i32| {
            containers
                .iter()
                .any(|container| container.stand_in.pid == pid)
        };
        let is_pods = |pid: i32| self.pod.holder_pid() == Some(pid);
        for (kind, pid) in std::mem::take(&mut plan.joins) {
            match (kind.as_str(), is_ours(pid), is_pods(pid)) {
                (_, true, _) => plan.joins.push((kind, pid)),
                // The pod's network is the guest's own. Or it is the host's, entered by its path.
                ("network", ..) => {}
                // The others of the pod are the guest's own, too: a container without a namespace
                // of this kind is in that.
                (kind, _, true) => {
                    if let Some(namespaces) = plan.spec["linux"]["namespaces"].as_array_mut() {
                        namespaces.retain(|namespace| namespace["type"] != kind);
                    }
                }
                (kind, false, false) => {
                    return Err(Error::unsupported(format_args!(
                        "the {kind} namespace of process {pid} of the host: the container runs \
                         under another kernel"
                    ))
                    .hint("namespaces of another container in the same pod can be joined"));
                }
            }
        }
        let joins_network = plan.joins.iter().any(|(kind, _)| kind == "network");
        // The first container has the guest's own network; a new one beside it is a namespace.
        let apart = self.sandbox.is_some() && plan.network == Network::New;
        if (joins_network || apart)
            && let Some(namespaces) = plan.spec["linux"]["namespaces"].as_array_mut()
        {
            namespaces.push(serde_json::json!({"type": "network", "path": ""}));
        }
        Ok(())
    }

    /// Boots the machine. What is returned keeps it until there is a container.
    async fn boot(&mut self, plan: &Plan, place: Place) -> Result<hull_sandbox::Hold> {
        let (memory, cpus) = size(&self.bundle.annotations, self.resources());
        let mut wanted = Wanted::new(self.pod, memory, cpus, &self.bundle.annotations)?;
        if holds_pod(&self.bundle.annotations) {
            wanted.expect_disks();
        }
        self.record.sandbox = Some(wanted.path.clone());
        // From here on a crash is recoverable: `delete` finds these in the record.
        self.record.details.groups = place.groups();
        self.stored.store(&self.record)?;
        // If this fails, the groups are not this container's.
        self.record.details.groups = Default::default();
        let resources = self.resources().cloned();
        self.record.details.groups =
            blocking(move || place.make(resources.as_ref(), MachineConfig::OVERHEAD)).await?;
        if limits::memory(self.resources()).is_some() {
            wanted.bounds.memory = None;
        }
        self.record.details.bounds = Some(wanted.bounds.clone());
        self.record.details.memory = memory.unwrap_or_default();
        self.stored.store(&self.record)?;
        wanted.cgroup = CgroupConfig::JoinMachine(self.record.details.groups.directories.clone());
        wanted.disks = plan.disks.iter().map(|disk| disk.device).collect();
        let disks = open_disks(plan).await?;
        let (sandbox, hold) = wanted.boot(self.pod, disks).await?;
        self.own_sandbox = true;
        self.sandbox = Some(sandbox);
        Ok(hold)
    }

    async fn run_hooks(&self, pid: i32) -> Result<()> {
        let Some(hooks) = self.bundle.spec.hooks().clone() else {
            return Ok(());
        };
        let state = state(&self.record, State::Creating, pid);
        blocking(move || {
            #[allow(deprecated)] // Engines use it: Docker sets up its network so.
            hooks::run("prestart", hooks.prestart().as_ref(), &state)?;
            hooks::run("createRuntime", hooks.create_runtime().as_ref(), &state)
        })
        .await
    }

    /// Removes everything that was created.
    async fn undo(self) {
        if let Some(sandbox) = &self.sandbox {
            if self.own_sandbox {
                sandbox.shutdown(Reason::Removed);
                sandbox.ended().await;
                self.pod.set_sandbox(None);
            } else if !self.shares.is_empty() {
                sandbox.remove_shares(&self.shares).await;
            }
        }
        let groups = self.record.details.groups.clone();
        warn(blocking(move || groups.remove()).await);
        warn(self.stored.remove());
    }
}

/// The block devices that are disks of the machine.
async fn open_disks(plan: &Plan) -> Result<Vec<OwnedFd>> {
    let disks = plan.disks.clone();
    blocking(move || disks.iter().map(disks::open).collect()).await
}

/// Adds files that live in the guest to a plan, but where it has mounts. Their names and contents.
fn give_files(
    plan: &mut Plan,
    id: &str,
    files: Vec<(&'static str, String)>,
) -> Vec<(String, String)> {
    let Some(mounts) = plan.spec["mounts"].as_array_mut() else {
        return Vec::new();
    };
    let mut given = Vec::new();
    for (path, content) in files {
        if mounts.iter().any(|mount| mount["destination"] == path) {
            continue;
        }
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        mounts.push(serde_json::json!({
            "destination": path,
            "type": "bind",
            "source": given_file(id, &name),
            "options": ["bind", "rw"],
        }));
        given.push((name, content));
    }
    given
}

/// Whether a container is the first one of a pod, which CRI starts to hold it.
fn holds_pod(annotations: &BTreeMap<String, String>) -> bool {
    POD_TYPES
        .iter()
        .any(|name| annotations.get(*name).is_some_and(|kind| kind == "sandbox"))
}

/// What a machine is made for: the sum of what a pod's containers ask for, where its first
/// container names it, or what this container asks for.
fn size(
    annotations: &BTreeMap<String, String>,
    resources: Option<&LinuxResources>,
) -> (Option<u64>, Option<u64>) {
    if !holds_pod(annotations) {
        return (limits::memory(resources), limits::processors(resources));
    }
    let number = |name: &str| annotations.get(name)?.parse::<i64>().ok();
    let memory = POD_MEMORY
        .iter()
        .find_map(|name| number(name))
        .and_then(|memory| u64::try_from(memory).ok())
        .filter(|memory| *memory > 0);
    let period = number(POD_PERIOD).and_then(|period| u64::try_from(period).ok());
    let cpus = number(POD_QUOTA).and_then(|quota| limits::quota(quota, period.unwrap_or_default()));
    (memory, cpus)
}

/// Waits for the end of a container's init, and tells of it after the ends of all its other
/// processes.
async fn conclude(pod: Arc<Pod>, container: Arc<Container>, process: Arc<hull_sandbox::Process>) {
    let exit = process.wait().await;
    let _announced = container.init.announcing.lock().await;
    let execs: Vec<_> = crate::process::lock(&container.execs)
        .values()
        .cloned()
        .collect();
    for exec in execs.iter().filter(|exec| exec.inner().is_some()) {
        exec.ended().await;
    }
    container.init.conclude(exit, &pod.events).await;
    drop(_announced);
    // Somebody else may remove it: containerd's `delete`, of a shim that was slow to answer.
    while pod.has(&container) {
        if !container.stored.directory.is_there() {
            pod.remove(&container);
            pod.leave_if_over();
            return;
        }
        tokio::time::sleep(REMOVED_BY_OTHERS).await;
    }
}

/// The same for a further process.
pub async fn conclude_exec(
    pod: Arc<Pod>,
    process: Arc<Process>,
    inner: Arc<hull_sandbox::Process>,
) {
    let exit = inner.wait().await;
    let _announced = process.announcing.lock().await;
    process.conclude(exit, &pod.events).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_as_big_as_its_pod_asks_for() {
        let annotations = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let pod = annotations(&[
            (POD_TYPES[0], "sandbox"),
            (POD_MEMORY[0], "268435456"),
            (POD_QUOTA, "150000"),
            (POD_PERIOD, "100000"),
        ]);
        assert_eq!(size(&pod, None), (Some(256 << 20), Some(1500)));
        let without = annotations(&[
            (POD_TYPES[0], "sandbox"),
            (POD_MEMORY[0], "0"),
            (POD_QUOTA, "-1"),
        ]);
        assert_eq!(size(&without, None), (None, None));
        assert_eq!(size(&annotations(&[]), None), (None, None));
    }
}
