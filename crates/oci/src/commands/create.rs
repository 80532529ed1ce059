//! `create` and `run`.
//!
//! The machine boots while hooks run and shares are opened. Until the keeper has the connection to
//! the sandbox, everything depends on this process: if it dies, the keeper and the container in the
//! guest die too, and a directory remains that reads as stopped, for `delete` to remove.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use hull_network::Namespace;
use hull_sandbox::cgroup::{Bounds, Groups, Place};
use hull_sandbox::config::{
    CgroupConfig, ContainerConfig, EndPolicy, MAX_NETS, MachineConfig, NetworkConfig,
    NetworkSource, RawArgs, SandboxConfig, Stdio,
};
use hull_sandbox::control::client::Client;
use hull_sandbox::control::launch::{join_or_launch, launch};
use hull_sandbox::control::protocol::{CreateRequest, MAX_SHARES, Received, Reply, Request};
use hull_sandbox::error::{Context, Error, ErrorKind, Result};
use hull_sandbox::store::{ProcessId, SandboxPath, State, keepers, roots};
use serde_json::value::to_raw_value;

use super::{Settings, life, refuse_descriptors, with_runc_wording, write_pid_file};
use crate::bundle::Bundle;
use crate::container::{Container, Record, new_record, state};
use crate::guest_spec::{HostShare, Network, Plan};
use crate::keeper::{self, HeldSignals, Keeper, Kept, Mode, World};
use crate::{console, disks, hooks, limits, pod};

/// How often to retry when the pod is just ending.
const MAX_RETRIES: usize = 10;

/// Keepers in a container's control groups: one for each process that an engine started there.
const KEEPERS: u64 = 4096;

/// Options of `create` and `run`.
#[derive(Debug, Default)]
pub struct CreateOptions {
    /// The new container's id.
    pub id: String,
    /// Directory of the bundle.
    pub bundle: PathBuf,
    /// Socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// File that receives the keeper's process id.
    pub pid_file: Option<PathBuf>,
    /// Number of descriptors to pass on; refused unless 0.
    pub preserve_fds: u32,
}

/// Creates a container, whose init then waits for `start`.
///
/// # Errors
/// The bundle is invalid, a limit cannot be set, a hook fails, the machine does not boot, or the
/// guest refuses the container. Nothing of the container remains.
pub fn create(settings: &Settings, options: &CreateOptions) -> Result<()> {
    make(settings, options, true).map(drop)
}

/// Creates and starts a container. Unless `detach` is set, waits for it to exit, removes it (unless
/// `keep` is set), and returns its exit status.
///
/// # Errors
/// Those of [`create`] and of `start`.
pub fn run(settings: &Settings, options: &CreateOptions, detach: bool, keep: bool) -> Result<i32> {
    let mut made = make(settings, options, detach)?;
    let started = match detach {
        true => life::start(settings, &options.id).map(|()| 0),
        false => HeldSignals::hold().and_then(|held| {
            life::start(settings, &options.id)?;
            made.wait(&held)
        }),
    };
    if started.is_err() || (!detach && !keep) {
        let deleted = life::delete(settings, &options.id, true);
        // Report the first error.
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
        record: new_record(&container, &bundle, &settings.root.path),
        container,
        own_sandbox: false,
    };
    making
        .make(&bundle, options, detach)
        .map_err(with_runc_wording)
        .inspect_err(|_| making.undo())
}

struct Making<'a> {
    settings: &'a Settings,
    container: Container,
    record: Record,
    /// No other container can be in the sandbox.
    own_sandbox: bool,
}

impl Making<'_> {
    fn make(&mut self, bundle: &Bundle, options: &CreateOptions, detach: bool) -> Result<Kept> {
        self.container.store(&self.record)?;
        if let Err(error) = roots::register(&self.settings.run_directory, &self.settings.root.path)
        {
            (self.settings.warn)(&error.message);
        }
        let mut plan = Plan::new(&self.container.id, bundle)?;
        check_terminal(&plan, options, detach)?;
        for note in &plan.notes {
            (self.settings.warn)(note);
        }
        let config = serde_json::to_vec(&bundle.config).context(|| "keep config.json")?;
        self.container.store_config(&config)?;

        let linux = bundle.spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let place = Place::find(
            linux.and_then(|linux| linux.cgroups_path().as_deref()),
            &self.container.id,
            self.settings.systemd_cgroup,
        )?;
        plan.place(place.path());
        let found = pod::find(
            &self.settings.run_directory,
            &self.container.id,
            &mut plan,
            &bundle.annotations,
        )?;
        self.own_sandbox = !found.shared;
        let has_network = found.has_network(&plan);
        self.record.details.apart = found.is_apart(&plan);
        let path = found.path;
        self.record.sandbox = Some(path.clone());
        // From here on a crash is recoverable: `delete` finds these from the record.
        self.record.details.groups = place.groups();
        self.container.store(&self.record)?;
        // If this fails, the groups are not this container's.
        self.record.details.groups = Groups::default();
        self.record.details.groups = place.make(resources, MachineConfig::OVERHEAD)?;
        if let Ok(inside) = self.record.details.groups.processes()
            && !inside.is_empty()
        {
            let count = inside.len();
            let warning = format!("container's cgroup is not empty: {count} process(es) found");
            (self.settings.warn)(&warning);
        }

        let memory = limits::memory(resources);
        self.record.details.memory = memory.unwrap_or_default();
        let settings = self.settings;
        let hostname: String = self.container.id.chars().take(12).collect();
        let cgroups = self.record.details.groups.directories.clone();
        let bounds = Cell::new(None);
        let config = || {
            let disks = plan.disks.iter().map(disks::open).collect::<Result<_>>()?;
            let mut machine = (settings.machine)(memory, limits::processors(resources))?;
            // Hooks set up the network namespace, and engines do so until `start` or later.
            machine.nets = MAX_NETS;
            let host_bounds = host_bounds(&machine, memory)?;
            bounds.set(Some(host_bounds.clone()));
            let config = SandboxConfig {
                machine,
                hostname: hostname.clone(),
                cgroup: CgroupConfig::Join(cgroups.clone()),
                bounds: host_bounds,
                core_scheduling: settings.core_scheduling,
                disks: plan.disks.iter().map(|disk| disk.device).collect(),
                end: EndPolicy::LastContainer,
                began_ns: 0,
            };
            Ok((config, disks))
        };
        let mut client = match self.own_sandbox {
            true => {
                let (config, disks): (_, Vec<_>) = config()?;
                launch(&path, &config, &disks)?
            }
            false => join_or_launch(&path, config)?,
        };
        self.record.details.bounds = bounds.take();
        // The machine boots meanwhile.
        let keeper = self.start_keeper(&plan, options, detach, &path)?;
        self.run_hooks(bundle, keeper.pid())?;
        let slave = match (&options.console_socket, plan.terminal) {
            (Some(socket), true) => Some(console::send_master(socket, plan.console_size)?),
            _ => None,
        };
        // Engines have configured it by now.
        let namespace = match has_network {
            true => Some(keeper.network_namespace()?),
            false => None,
        };
        let mut tries = 0;
        let streams = loop {
            match self.create(&client, &plan, keeper.pid(), namespace.as_ref())? {
                Some(streams) => break streams,
                None if tries < MAX_RETRIES => {
                    tries += 1;
                    drop(client);
                    path.wait_for_end()?;
                    client = join_or_launch(&path, config)?;
                }
                None => return Err(Error::new("the sandbox process ends again and again")),
            }
        };
        let mode = match (plan.terminal, &slave) {
            (false, _) => Mode::Pipes,
            (true, Some(_)) => Mode::Terminal,
            (true, None) => Mode::OwnTerminal,
        };
        let kept = keeper.keep(mode, client, streams, slave)?;
        write_pid_file(options.pid_file.as_deref(), kept.pid())?;
        Ok(kept)
    }

    fn start_keeper(
        &mut self,
        plan: &Plan,
        options: &CreateOptions,
        detach: bool,
        sandbox: &SandboxPath,
    ) -> Result<Keeper> {
        let network = match &plan.network {
            Network::New => None,
            Network::Path(path) => {
                // An invalid one is reported here, where its path is known.
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
            .ok_or_else(|| Error::new("the container has no root file system"))?;
        let world = World {
            namespaces: plan.namespaces.clone(),
            network,
            root: root.open()?,
            covered: plan.covered(),
        };
        let session = detach || options.console_socket.is_some();
        let groups = &self.record.details.groups.directories;
        let keeper = keeper::spawn(&self.record.command, Some(&world), groups, session)?;
        let process = ProcessId::of(keeper.pid()).unwrap_or_default();
        self.record.details.keeper = process;
        self.container.store(&self.record)?;
        let run = &self.settings.run_directory;
        keepers::register(run, process, sandbox, &self.container.id)?;
        Ok(keeper)
    }

    fn run_hooks(&self, bundle: &Bundle, pid: i32) -> Result<()> {
        let Some(hooks) = bundle.spec.hooks() else {
            return Ok(());
        };
        let state = state(&self.record, State::Creating, pid);
        #[allow(deprecated)] // Engines use it: Docker sets up its network so.
        hooks::run("prestart", hooks.prestart().as_ref(), &state)?;
        hooks::run("createRuntime", hooks.create_runtime().as_ref(), &state)
    }

    /// Requests the container and returns its streams; `None` if the sandbox is ending.
    fn create(
        &self,
        client: &Client,
        plan: &Plan,
        keeper: i32,
        namespace: Option<&OwnedFd>,
    ) -> Result<Option<Vec<OwnedFd>>> {
        let mut asked = 0;
        let told = (|| {
            if let Some(namespace) = namespace {
                let request = Request::Network(Box::new(NetworkConfig {
                    source: NetworkSource::Namespace,
                    limits: self.settings.network,
                    owner: None,
                }));
                client.tell(&request, &[namespace.as_fd()])?;
                asked += 1;
            }
            for shares in plan.shares.chunks(MAX_SHARES) {
                let mounts = shares
                    .iter()
                    .map(HostShare::open)
                    .collect::<Result<Vec<_>>>()?;
                let fds: Vec<_> = mounts.iter().map(AsFd::as_fd).collect();
                let request = Request::AddShares {
                    shares: shares.iter().map(|share| share.share.clone()).collect(),
                };
                client.tell(&request, &fds)?;
                asked += 1;
            }
            client.tell(
                &self.request(plan, keeper)?,
                &[self.container.directory.as_fd()],
            )
        })();
        match told {
            Err(error) if self.is_ending(&error) => return Ok(None),
            told => told?,
        }
        for _ in 0..asked {
            if self.answer(client)?.is_none() {
                return Ok(None);
            }
        }
        Ok(self.answer(client)?.map(|received| received.fds))
    }

    fn request(&self, plan: &Plan, keeper: i32) -> Result<Request> {
        Ok(Request::Create(Box::new(CreateRequest {
            container: ContainerConfig {
                id: self.container.id.clone(),
                spec: to_raw_value(&plan.spec).context(|| "encode the spec")?,
                raw: RawArgs::default(),
                stdio: Stdio::Handover {
                    terminal: plan.terminal,
                    stdin: true,
                },
                start: false,
                keeper: Some(keeper),
                again: false,
                journal: None,
                sysctl: plan.sysctl.clone(),
                files: Vec::new(),
                joins: plan.joins.clone(),
                disks: plan.disks.clone(),
                volatile: false,
                removal: None,
            },
            attach: None,
        })))
    }

    /// Receives the next reply; `None` if the sandbox is ending, or ended before it read the
    /// request.
    fn answer(&self, client: &Client) -> Result<Option<Received<Reply>>> {
        match client.receive() {
            Ok(Received {
                message: Reply::Ending,
                ..
            }) => Ok(None),
            Err(error) if self.is_ending(&error) => Ok(None),
            answer => answer.map(Some),
        }
    }

    fn is_ending(&self, error: &Error) -> bool {
        !self.own_sandbox && error.kind == ErrorKind::Gone
    }

    /// Removes everything that was created. By now the keeper is dead and the connection closed, so
    /// the container in the guest ends as well.
    fn undo(&self) {
        let warn = |result: Result<()>| {
            if let Err(error) = result {
                (self.settings.warn)(&error.message);
            }
        };
        if self.own_sandbox
            && let Some(path) = &self.record.sandbox
        {
            warn(path.wait_for_end().and_then(|()| path.sweep()));
        }
        let details = &self.record.details;
        keepers::forget(&self.settings.run_directory, details.keeper);
        warn(details.groups.remove());
        warn(self.container.remove());
    }
}

/// The most that a machine may take of its host, beside the limits that the specification sets.
fn host_bounds(machine: &MachineConfig, memory: Option<u64>) -> Result<Bounds> {
    let bounds = machine.bounds();
    Ok(Bounds {
        memory: bounds.memory.filter(|_| memory.is_none()),
        processes: bounds
            .processes
            .map(|processes| processes.saturating_add(KEEPERS)),
        // The engine's to decide.
        cpus: None,
        ..bounds
    })
}

fn check_terminal(plan: &Plan, options: &CreateOptions, detach: bool) -> Result<()> {
    // runc's messages.
    match (plan.terminal, &options.console_socket) {
        (true, None) if detach => Err(Error::new(
            "cannot allocate tty if hull-oci will detach without setting console socket",
        )),
        (false, Some(_)) => Err(Error::new(
            "cannot use console socket if hull-oci will not detach or allocate tty",
        )),
        _ => Ok(()),
    }
}
