//! `create` and `run`.
//!
//! The machine boots while hooks run and shares are opened. Until the keeper has the connection to the pod, everything
//! hangs on this process: when it dies, the keeper and the container in the guest go with it, and what remains is a
//! directory that reads as stopped, for `delete` to remove.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use hull_network::Namespace;
use hull_sandbox::detached::{self, Attributes};
use hull_sandbox::error::{Context, Failure, Result};
use hull_sandbox::pod::client::{self, Connection, join_or_launch};
use hull_sandbox::pod::wire::{self, MAX_SHARES, Received, Reply, Request};
use hull_sandbox::pod::{PodPaths, PodRequest, Status};
use hull_sandbox::request::MAX_NETS;
use oci_spec::runtime::LinuxResources;

use super::{OVERHEAD, Settings, in_runcs_words, life, refuse_descriptors, write_pid_file};
use crate::bundle::Bundle;
use crate::cgroup::{Groups, Place};
use crate::container::{Container, Record, process_started, state};
use crate::guest_spec::{HostShare, Network, Plan};
use crate::keeper::{self, Keeper, Kept, Mode, World};
use crate::{console, disks, hooks, pod};

/// How often a pod that is just ending is waited for.
const MAX_RETRIES: usize = 10;

/// What `create` and `run` are told.
#[derive(Debug, Default)]
pub struct CreateOptions {
    /// The new container's id.
    pub id: String,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Who gets the master of the terminal.
    pub console_socket: Option<PathBuf>,
    /// Where the keeper's process id is written.
    pub pid_file: Option<PathBuf>,
    /// Descriptors to pass on.
    pub preserve_fds: u32,
}

/// Creates a container, whose init then waits for `start`.
///
/// # Errors
/// The bundle cannot be used, the machine does not come up, a hook fails, or the guest refuses; nothing of the
/// container is left then.
pub fn create(settings: &Settings, options: &CreateOptions) -> Result<()> {
    make(settings, options, true).map(drop)
}

/// Creates and starts a container. Unless `detach`ed, waits for its end, removes it (but for `keep`), and returns its
/// exit status.
///
/// # Errors
/// As [`create`], and as `start`.
pub fn run(settings: &Settings, options: &CreateOptions, detach: bool, keep: bool) -> Result<i32> {
    let mut made = make(settings, options, detach)?;
    let started = life::start(settings, &options.id).and_then(|()| match detach {
        true => Ok(0),
        false => made.wait(),
    });
    if started.is_err() || (!detach && !keep) {
        let deleted = life::delete(settings, &options.id, true);
        // The first error is the one to tell.
        return started.and_then(|status| deleted.map(|()| status));
    }
    started
}

fn make(settings: &Settings, options: &CreateOptions, detach: bool) -> Result<Kept> {
    refuse_descriptors(options.preserve_fds)?;
    let bundle = Bundle::load(&options.bundle)?;
    let container = settings.root.claim(&options.id)?;
    let mut making = Making {
        settings,
        record: Record::new(&container, &bundle),
        container,
        own_pod: false,
    };
    making
        .make(&bundle, options, detach)
        .map_err(in_runcs_words)
        .inspect_err(|_| making.undo())
}

struct Making<'a> {
    settings: &'a Settings,
    container: Container,
    record: Record,
    /// The pod is this container's alone.
    own_pod: bool,
}

impl Making<'_> {
    fn make(&mut self, bundle: &Bundle, options: &CreateOptions, detach: bool) -> Result<Kept> {
        let mut plan = Plan::new(&self.container.id, bundle)?;
        check_terminal(&plan, options, detach)?;
        for note in &plan.notes {
            (self.settings.warn)(note);
        }
        let config = serde_json::to_vec(&bundle.config).context(|| "keep config.json".into())?;
        self.container.store_config(&config)?;

        let linux = bundle.spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let place = Place::find(
            linux.and_then(|linux| linux.cgroups_path().as_deref()),
            &self.container.id,
            self.settings.systemd_cgroup,
        )?;
        let found = pod::find(
            &self.settings.run_directory,
            &self.container.id,
            &mut plan,
            &bundle.annotations,
        )?;
        self.own_pod = !found.shared;
        let has_network = found.has_network(&plan);
        let paths = found.paths;
        (self.record.pods, self.record.pod) = (paths.all.clone(), paths.id.clone());
        // Whoever dies from here on: `delete` knows what there may be.
        self.record.groups = place.groups();
        self.container.store(&self.record)?;
        // When that fails, none of them is ours.
        self.record.groups = Groups::default();
        self.record.groups = place.make(resources, OVERHEAD)?;

        let memory = memory_limit(resources);
        self.record.memory = memory.unwrap_or_default();
        let settings = self.settings;
        let hostname: String = self.container.id.chars().take(12).collect();
        let cgroups = self.record.groups.directories.clone();
        let request = || {
            let disks = plan.disks.iter().map(disks::open).collect::<Result<_>>()?;
            let mut machine = (settings.machine)(memory, processors(resources))?;
            machine.nets = nets(&plan.network, bundle);
            let request = PodRequest {
                machine,
                hostname: hostname.clone(),
                cgroups: cgroups.clone(),
                disks: plan.disks.iter().map(|disk| disk.device).collect(),
            };
            Ok((request, disks))
        };
        let mut connection = match self.own_pod {
            true => {
                let (request, disks): (_, Vec<_>) = request()?;
                client::launch(&paths, &request, &disks)?
            }
            false => join_or_launch(&paths, request)?,
        };
        // The machine boots meanwhile.
        let keeper = self.start_keeper(bundle, &plan, options, detach, &paths)?;
        self.run_hooks(bundle, keeper.pid())?;
        let slave = match (&options.console_socket, plan.terminal) {
            (Some(socket), true) => Some(console::send_master(socket, plan.console_size)?),
            _ => None,
        };
        // Engines have filled it by now.
        let namespace = match has_network {
            true => Some(keeper.network_namespace()?),
            false => None,
        };
        let mut tries = 0;
        let streams = loop {
            match self.create(&connection, &plan, keeper.pid(), namespace.as_ref())? {
                Some(streams) => break streams,
                None if tries < MAX_RETRIES => {
                    tries += 1;
                    drop(connection);
                    client::wait_for_end(&paths)?;
                    connection = join_or_launch(&paths, request)?;
                }
                None => return Err(Failure::new("the sandbox process ends again and again")),
            }
        };
        let mode = match (plan.terminal, &slave) {
            (false, _) => Mode::Pipes,
            (true, Some(_)) => Mode::Terminal,
            (true, None) => Mode::OwnTerminal,
        };
        let kept = keeper.keep(mode, connection, streams, slave)?;
        write_pid_file(options.pid_file.as_deref(), kept.pid())?;
        Ok(kept)
    }

    fn start_keeper(
        &mut self,
        bundle: &Bundle,
        plan: &Plan,
        options: &CreateOptions,
        detach: bool,
        paths: &PodPaths,
    ) -> Result<Keeper> {
        let network = match &plan.network {
            Network::New => None,
            Network::Path(path) => {
                // One that is none is found out here, where its path is known.
                let namespace = Namespace::open(path)?;
                let namespace = namespace.as_fd().try_clone_to_owned();
                Some(File::from(
                    namespace.context(|| format!("keep {}", path.display()))?,
                ))
            }
        };
        let root = plan
            .shares
            .first()
            .ok_or_else(|| Failure::new("the container has no root file system"))?;
        let world = World {
            namespaces: plan.namespaces.clone(),
            network,
            root: open(root)?,
        };
        let args = bundle
            .spec
            .process()
            .as_ref()
            .and_then(|process| process.args().clone())
            .unwrap_or_default();
        let session = detach || options.console_socket.is_some();
        let keeper = keeper::spawn(
            paths,
            &args,
            Some(&world),
            &self.record.groups.directories,
            session,
        )?;
        self.record.keeper = keeper.pid();
        self.record.keeper_started = process_started(keeper.pid()).unwrap_or_default();
        self.container.store(&self.record)?;
        Ok(keeper)
    }

    fn run_hooks(&self, bundle: &Bundle, pid: i32) -> Result<()> {
        let Some(hooks) = bundle.spec.hooks() else {
            return Ok(());
        };
        let state = state(&self.record, Status::Creating, pid);
        #[allow(deprecated)] // Engines use it: Docker sets up its network so.
        hooks::run("prestart", hooks.prestart().as_ref(), &state)?;
        hooks::run("createRuntime", hooks.create_runtime().as_ref(), &state)
    }

    /// Asks for the container; its streams. `None` when the pod is ending.
    fn create(
        &self,
        connection: &Connection,
        plan: &Plan,
        keeper: i32,
        namespace: Option<&OwnedFd>,
    ) -> Result<Option<Vec<OwnedFd>>> {
        if let Some(namespace) = namespace {
            let request = Request::Network(self.settings.network);
            if self
                .ask(connection, &request, &[namespace.as_fd()])?
                .is_none()
            {
                return Ok(None);
            }
        }
        for shares in plan.shares.chunks(MAX_SHARES) {
            let mounts = shares.iter().map(open).collect::<Result<Vec<_>>>()?;
            let fds: Vec<_> = mounts.iter().map(AsFd::as_fd).collect();
            let request = Request::AddShares {
                container: self.container.id.clone(),
                shares: shares.iter().map(|share| share.share.clone()).collect(),
            };
            if self.ask(connection, &request, &fds)?.is_none() {
                return Ok(None);
            }
        }
        let request = Request::Create(wire::CreateRequest {
            container: self.container.id.clone(),
            spec: plan.spec.clone(),
            keeper,
            terminal: plan.terminal,
            network: plan.sysctl.clone(),
            joins: plan.joins.clone(),
            disks: plan.disks.clone(),
        });
        let directory = self.container.open()?;
        let received = self.ask(connection, &request, &[directory.as_fd()])?;
        Ok(received.map(|received| received.fds))
    }

    /// Asks; `None` when the pod is ending, or has ended before it saw the question.
    fn ask(
        &self,
        connection: &Connection,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Option<Received<Reply>>> {
        match connection.ask(request, fds) {
            Ok(Received {
                message: Reply::Ending,
                ..
            }) => Ok(None),
            Err(failure) if !self.own_pod && client::is_gone(&failure) => Ok(None),
            answer => answer.map(Some),
        }
    }

    /// Leaves nothing behind. By now the keeper is dead and the connection closed, on which the container hung.
    fn undo(&self) {
        let warn = |result: Result<()>| {
            if let Err(failure) = result {
                (self.settings.warn)(&failure.message);
            }
        };
        if self.own_pod {
            let paths = self.record.pod_paths();
            warn(client::wait_for_end(&paths).and_then(|()| client::sweep(&paths)));
        }
        warn(self.record.groups.remove());
        warn(self.container.remove());
    }
}

/// How many network interfaces the machine is to have. Where an engine sets them up, or hooks will, more may come at any time;
/// otherwise nobody knows of the namespace.
fn nets(network: &Network, bundle: &Bundle) -> u8 {
    match network {
        Network::Path(_) => MAX_NETS,
        Network::New if has_network_hooks(bundle) => MAX_NETS,
        Network::New => 0,
    }
}

/// Whether there are hooks that run when the namespaces have been made, which is where engines set up networks.
#[allow(deprecated)] // Docker uses prestart.
fn has_network_hooks(bundle: &Bundle) -> bool {
    bundle.spec.hooks().as_ref().is_some_and(|hooks| {
        [hooks.prestart(), hooks.create_runtime()]
            .into_iter()
            .flatten()
            .any(|hooks| !hooks.is_empty())
    })
}

/// The limit of memory, bytes.
fn memory_limit(resources: Option<&LinuxResources>) -> Option<u64> {
    let limit = resources?.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// The limit of processors, in thousandths.
fn processors(resources: Option<&LinuxResources>) -> Option<u64> {
    let cpu = resources?.cpu().as_ref()?;
    let quota = u64::try_from(cpu.quota()?)
        .ok()
        .filter(|quota| *quota > 0)?;
    // The kernel's own default (kernel/sched/fair.c), microseconds.
    let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
    Some(quota.saturating_mul(1000) / period)
}

fn check_terminal(plan: &Plan, options: &CreateOptions, detach: bool) -> Result<()> {
    // In runc's words.
    match (plan.terminal, &options.console_socket) {
        (true, None) if detach => Err(Failure::new(
            "cannot allocate tty if hull-oci will detach without setting console socket",
        )),
        (false, Some(_)) => Err(Failure::new(
            "cannot use console socket if hull-oci will not detach or allocate tty",
        )),
        _ => Ok(()),
    }
}

/// A detached mount of what is to be shared.
fn open(share: &HostShare) -> Result<OwnedFd> {
    let doing = || format!("share {}", share.source.display());
    let mount = detached::copy(&share.source, share.recursive).context(doing)?;
    let mut attributes = Attributes {
        read_only: false,
        no_devices: true,
        no_suid: true,
    };
    detached::set(mount.as_fd(), attributes).context(doing)?;
    if share.read_only {
        attributes.read_only = true;
        detached::set_top(mount.as_fd(), attributes).context(doing)?;
    }
    Ok(mount)
}
