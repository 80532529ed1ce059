//! `hull run`, `hull create` and `hull start`: from options to a container that runs.
//!
//! What a container is was asked for once, and is in its record from then on: a start reads it
//! there, whether it is the first one or a later one.
//!
//! The machine boots while the root file system is mounted and plugins attach the network: the
//! sandbox is launched as soon as it is known what machine it is, and everything that belongs to
//! the container follows on the same connection. Until the container is there, this process holds
//! all of it: when it is killed, the sandbox ends by itself, and what remains is a directory and a
//! name that the next command sweeps.

mod again;
mod contents;
mod place;
mod reserve;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use hull_image::Image;
use hull_machine::Choice;
use hull_sandbox::cgroup::Bounds;
use hull_sandbox::config::{
    CgroupConfig, ContainerConfig, EndPolicy, MachineConfig, NetworkConfig, NetworkSource,
    SandboxConfig,
};
use hull_sandbox::control::client::{Client, unexpected};
use hull_sandbox::control::launch::launch;
use hull_sandbox::control::protocol::{CreateRequest, Received, Reply, Request};
use hull_sandbox::rootless;
use hull_sandbox::store::{CONFIG_FILE, Directory, SandboxPath, Status};
use hull_sandbox::timings::{Step, Timings, now_ns};

use self::contents::send_shares;
use crate::attach::Attachment;
use crate::config::Config;
use crate::container::{self, Container};
use crate::dns;
use crate::error::{Error, Result};
use crate::guest_files::GuestFiles;
use crate::names;
use crate::network::{Attach, Plan};
use crate::networks;
use crate::options::RunOptions;
use crate::paths::Paths;
use crate::supervise;
use crate::values::Restart;

pub use self::again::{Again, Attempt, start_again};
pub use self::place::cpus;
pub use self::reserve::Created;

/// Longest path of a socket (`sun_path` in unix(7)), without the zero byte at its end.
const LONGEST_SOCKET: usize = 107;

/// Digits of a container's id that are its sandbox's: paths of sockets are short.
const SANDBOX_DIGITS: usize = 24;

/// The sandbox of a container's own, unless that is another one's for now.
fn sandbox_digits(id: &str) -> String {
    id.chars().take(SANDBOX_DIGITS).collect()
}

/// A container that runs.
#[derive(Debug)]
pub struct Started {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its sandbox.
    pub sandbox: SandboxPath,
    /// The connection that is attached to it.
    pub client: Client,
    /// The streams of its init, when they were asked for.
    pub streams: Vec<OwnedFd>,
}

/// How a start went.
#[derive(Debug)]
pub enum Outcome {
    /// The container runs.
    Started(Box<Started>),
    /// A signal came before that; nothing of the container is left.
    Interrupted(i32),
}

/// A container that is to be created, or started: what was asked for makes sense.
#[derive(Debug)]
pub struct Run<'a> {
    options: RunOptions,
    config: &'a Config,
    paths: Paths,
    id: String,
    /// Id of a sandbox of its own.
    sandbox: String,
    /// When the command began: monotonic clock, nanoseconds.
    began_ns: u64,
    timings: &'a Timings,
}

/// What the container is in.
struct Place {
    network: Plan,
    machine: MachineConfig,
    sandbox: SandboxPath,
    hostname: String,
    /// The container whose hosts, hostname and resolv.conf it has.
    files_of: String,
    /// The container whose machine this is, when it is another one's.
    host: Option<Container>,
}

impl<'a> Run<'a> {
    /// A new container; checks what can be found wrong before an image is pulled.
    ///
    /// # Errors
    /// Options that make no sense, or contradict each other or the host.
    pub fn prepare(
        mut options: RunOptions,
        config: &'a Config,
        began_ns: u64,
        timings: &'a Timings,
    ) -> Result<Self> {
        let paths = config.paths();
        options.check(&paths)?;
        if let Some(name) = &options.name {
            names::check_free(&paths, name)?;
        }
        options.network.network = Some(options.network.check_new(config)?);
        let id = names::new_id()?;
        let sandbox = sandbox_digits(&id);
        timings.step("arguments", began_ns);
        Ok(Self {
            options,
            config,
            paths,
            id,
            sandbox,
            began_ns,
            timings,
        })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }

    /// What was asked for.
    pub fn options(&self) -> &RunOptions {
        &self.options
    }

    /// The same, of a new container: ports that its image declares are published as well, if that
    /// is wanted.
    ///
    /// # Errors
    /// A port is taken, or none.
    pub fn plan_for(&mut self, image: &Image) -> Result<Plan> {
        self.options.publish_declared(&image.config)?;
        self.plan()
    }

    /// Plans the container's network; published ports are bound from here on.
    ///
    /// # Errors
    /// A port is taken.
    pub fn plan(&self) -> Result<Plan> {
        self.options.network.plan(&self.id, self.config)
    }

    /// The machine that the container is to have.
    ///
    /// # Errors
    /// No kind of machine works here, or not the one that was asked for.
    pub fn choose(&self) -> Result<Choice> {
        let guest = GuestFiles::locate(self.config)?;
        let kernel = self.options.kernel.as_deref();
        guest.choose(self.config, self.options.machine, kernel)
    }

    /// Creates the container and starts it. With an attachment, its streams come with it.
    ///
    /// # Errors
    /// Anything that keeps it from running; then nothing of it is left.
    pub fn start(
        mut self,
        network: Plan,
        image: &Image,
        attachment: Option<&Attachment>,
    ) -> Result<Outcome> {
        let begin = now_ns();
        let made_up = self.options.settle(&image.config)?;
        let place = self.place(network)?;
        let record = self.record(image, Some(&place))?;
        let (directory, lock) = self.reserve(record, &made_up)?;
        let networks = &place.network.networks;
        let is_there = networks
            .iter()
            .filter_map(|network| network.created.as_ref())
            .try_for_each(|network| networks::check_there(&self.paths, network));
        self.timings.step("request", begin);
        let started = is_there.and_then(|()| self.launch(image, &place, &directory, attachment));
        drop(lock);
        let erase = || container::remove(&self.paths, &self.id, container::Removing::everything());
        match started {
            Ok(Outcome::Interrupted(signal)) => {
                // Nothing of it is to stay.
                erase()?;
                Ok(Outcome::Interrupted(signal))
            }
            Ok(started) => {
                self.supervise()?;
                Ok(started)
            }
            Err(error) => {
                if let Err(error) = erase() {
                    tracing::warn!("{error}");
                }
                Err(error)
            }
        }
    }

    /// Has the container started again when it ends, if that is wanted.
    fn supervise(&self) -> Result<()> {
        if self.options.restart == Restart::No && self.options.health.is_none() {
            return Ok(());
        }
        let Some(container) = Container::load(&self.paths.container(&self.id))? else {
            return Ok(());
        };
        let _lock = container::lock(&container)?;
        supervise::ensure(self.config, &container)
    }

    /// Launches the sandbox and creates the container in it.
    fn launch(
        &self,
        image: &Image,
        place: &Place,
        directory: &Directory,
        attachment: Option<&Attachment>,
    ) -> Result<Outcome> {
        let client = match &place.host {
            Some(host) => container::connect(host)?,
            None => launch(&place.sandbox, &self.sandbox(place)?, &[])?,
        };
        let wait = |client: &Client| match attachment {
            Some(attachment) => attachment.receive(client),
            None => client.receive().map(Ok),
        };
        self.request_network(&client, place, directory)?;

        // Meanwhile the machine boots, and plugins are at work.
        let begin = now_ns();
        let fills = self.fills()?;
        let built = self.spec(image, place, &fills)?;
        rootless::enter_mounts()?;
        let shares = self.shares(image, directory, &fills)?;
        self.timings.step("mount the root file system", begin);

        let begin = now_ns();
        let mut addresses = None;
        if let Attach::Source(..) = &place.network.attach {
            match wait(&client)? {
                Ok(Received {
                    message: Reply::Network(network),
                    ..
                }) => addresses = Some(network),
                Ok(other) => return Err(unexpected(&other.message)),
                Err(signal) => return Ok(Outcome::Interrupted(signal)),
            }
            self.timings.step("wait for the network", begin);
        }
        let begin = now_ns();
        let (spec, config) = built;
        // Containers that share a network share these files.
        let files = match place.host {
            Some(_) => Vec::new(),
            None => {
                let network = (&place.network.name[..], addresses.as_ref());
                let asked = self.options.network.dns_in(&place.network.networks);
                dns::files(&place.hostname, &asked, network)?
            }
        };
        directory.write(CONFIG_FILE, spec.get().as_bytes())?;
        if !config.raw.env.is_empty() {
            self.keep_raw_environment(&config.raw.env)?;
        }
        let messages = send_shares(&client, shares)?;
        let request = Request::Create(Box::new(CreateRequest {
            container: ContainerConfig {
                spec,
                files,
                again: Status::read(directory)?.is_some(),
                ..config
            },
            attach: attachment.map(Attachment::request),
        }));
        client.tell(&request, &[directory.as_fd()])?;
        for _ in 0..messages {
            match wait(&client)? {
                Ok(Received {
                    message: Reply::Ok, ..
                }) => {}
                Ok(other) => return Err(place.ending(&other.message)),
                Err(signal) => return Ok(Outcome::Interrupted(signal)),
            }
        }
        let streams = match wait(&client)? {
            Ok(Received {
                message: Reply::Streams,
                fds,
            }) => fds,
            Ok(other) => return Err(place.ending(&other.message)),
            Err(signal) => return Ok(Outcome::Interrupted(signal)),
        };
        self.timings.step("create and start the container", begin);
        let name = Container::load(&self.paths.container(&self.id))?
            .map(|container| container.record.details.name)
            .unwrap_or_default();
        Ok(Outcome::Started(Box::new(Started {
            id: self.id.clone(),
            name,
            sandbox: place.sandbox.clone(),
            client,
            streams,
        })))
    }

    /// The most that a machine may take of the host.
    fn bounds(&self, machine: &MachineConfig) -> Bounds {
        let mut bounds = machine.bounds();
        bounds.host_cpus.clone_from(&self.options.host_cpus.0);
        bounds.swap = match (self.options.memory_swap, self.options.memory) {
            (Some(..=-1), _) => Some(u64::MAX),
            (Some(both @ 1..), Some(memory)) => Some(both.unsigned_abs().saturating_sub(memory)),
            _ => None,
        };
        bounds
    }

    fn sandbox(&self, place: &Place) -> Result<SandboxConfig> {
        let cgroup = match &self.config.cgroup_parent {
            Some(parent) => CgroupConfig::Own {
                parent: parent.clone(),
            },
            None => CgroupConfig::None,
        };
        Ok(SandboxConfig {
            machine: place.machine.clone(),
            hostname: self.short_id().to_owned(),
            cgroup,
            bounds: self.bounds(&place.machine),
            core_scheduling: self.config.core_sched,
            disks: Vec::new(),
            end: EndPolicy::LastContainer,
            began_ns: self.began_ns,
        })
    }

    fn request_network(&self, client: &Client, place: &Place, directory: &Directory) -> Result<()> {
        let Attach::Source(source, sockets) = &place.network.attach else {
            return Ok(());
        };
        let mut fds = Vec::new();
        let mut source = (**source).clone();
        if let NetworkSource::Cni(cni) = &mut source {
            fds.push(directory.as_fd());
            fds.extend(sockets.iter().map(AsFd::as_fd));
            let container = Container::load(&self.paths.container(&self.id))?;
            let record = container.map(|container| container.record);
            let own = record.map(|record| record.details.names(&self.id));
            let own = own.unwrap_or_default();
            let joined = &place.network.networks;
            let names = self.options.network.names(&self.paths, &own, joined);
            for (network, names) in cni.networks.iter_mut().zip(names) {
                network.names = names;
            }
        }
        let request = Request::Network(Box::new(NetworkConfig {
            source,
            limits: place.network.limits,
            owner: Some(self.id.clone()),
        }));
        client.tell(&request, &fds)
    }
}

impl Place {
    /// The machine of another container ends just now.
    fn ending(&self, reply: &Reply) -> Error {
        match (reply, &self.network.attach) {
            (Reply::Ending, Attach::Container(id)) => Error::wrong_state(format!(
                "container {} is not running: its machine is ending",
                id.get(..12).unwrap_or(id)
            )),
            _ => unexpected(reply),
        }
    }
}

/// Where the time went in the sandbox. Asked on a connection of its own: the next answer on the one
/// that is attached may be the container's end.
pub fn sandbox_timings(sandbox: &SandboxPath) -> Vec<Step> {
    match Client::connect(sandbox).and_then(|client| client.ask(&Request::Timings, &[])) {
        Ok(Received {
            message: Reply::Timings(steps),
            ..
        }) => steps,
        // It has ended: nobody knows.
        _ => Vec::new(),
    }
}

/// Whether the sockets of a sandbox can be in a directory of run-time state.
///
/// # Errors
/// Its path is too long.
pub fn check_length(run: &Path) -> Result<()> {
    let longest = SandboxPath::new(run, &"0".repeat(SANDBOX_DIGITS))
        .devices()
        .join("entropy.sock");
    match longest.as_os_str().len().saturating_sub(LONGEST_SOCKET) {
        0 => Ok(()),
        excess => Err(Error::invalid(format!(
            "run_dir {} is too long for the sockets in it, by {excess} characters",
            run.display()
        ))
        .hint("set a shorter run_dir in the configuration")),
    }
}
