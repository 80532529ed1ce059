//! `hull run`: from options to a container that runs.
//!
//! The machine boots while the root file system is mounted and plugins attach the network: the
//! sandbox is launched as soon as it is known what machine it is, and everything that belongs to
//! the container follows on the same connection. Until the container is there, this process holds
//! all of it: when it is killed, the sandbox ends by itself, and what remains is a directory and a
//! name that the next command sweeps.

mod contents;
mod place;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use hull_image::Image;
use hull_machine::Choice;
use hull_sandbox::config::{
    CgroupConfig, ContainerConfig, EndPolicy, MachineConfig, NetworkConfig, SandboxConfig,
};
use hull_sandbox::control::client::{Client, unexpected};
use hull_sandbox::control::launch::launch;
use hull_sandbox::control::protocol::{CreateRequest, Received, Reply, Request};
use hull_sandbox::rootless;
use hull_sandbox::store::{CONFIG_FILE, Directory, Record, SandboxPath, remove_all};
use hull_sandbox::timings::{Step, Timings, now_ns};

use self::contents::{seccomp, send_shares};
use crate::attach::Attachment;
use crate::config::Config;
use crate::container::{self, Container, Details, ENGINE};
use crate::dns;
use crate::error::{Context, Error, Result};
use crate::guest_files::GuestFiles;
use crate::names;
use crate::network::{Attach, NetworkOptions, Plan};
use crate::paths::Paths;
use crate::spec;
use crate::values::{Machine, SecurityOption, Ulimit};
use crate::volumes::{self, Tmpfs, Volume};

pub use self::place::cpus;

/// Longest path of a socket (`sun_path` in unix(7)), without the zero byte at its end.
const LONGEST_SOCKET: usize = 107;

/// Digits of a container's id that are its sandbox's: paths of sockets are short.
const SANDBOX_DIGITS: usize = 24;

/// Random names that are tried.
const NAME_ATTEMPTS: u32 = 10;

/// What a user asks for.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Image reference as given.
    pub image: String,
    /// Arguments after the image.
    pub command: Vec<OsString>,
    /// Keep standard input open.
    pub interactive: bool,
    /// With a terminal.
    pub terminal: bool,
    /// Remove the container when it ends.
    pub remove: bool,
    /// Name; a random one when absent.
    pub name: Option<String>,
    /// `NAME=VALUE`, in order.
    pub environment: Vec<OsString>,
    /// Host directories and files.
    pub volumes: Vec<Volume>,
    /// File systems in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// Working directory.
    pub directory: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
    /// Replaces the image's entry point.
    pub entrypoint: Option<OsString>,
    /// Host name.
    pub hostname: Option<String>,
    /// Run an init process.
    pub init: bool,
    /// Signal that `stop` sends first.
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Memory limit, bytes; 0 for none.
    pub memory: Option<u64>,
    /// Processors, in thousandths; 0 for no limit.
    pub cpus_milli: Option<u64>,
    /// Most processes.
    pub pids_limit: Option<i64>,
    /// Resource limits of processes.
    pub ulimits: Vec<Ulimit>,
    /// Size of /dev/shm, bytes.
    pub shm_size: Option<u64>,
    /// Size of the writable layer, bytes; 0 for no limit.
    pub storage_size: Option<u64>,
    /// The root file system is read-only.
    pub read_only: bool,
    /// Capabilities to add.
    pub cap_add: Vec<String>,
    /// Capabilities to drop.
    pub cap_drop: Vec<String>,
    /// Security options.
    pub security: Vec<SecurityOption>,
    /// Kernel parameters.
    pub sysctl: Vec<(String, String)>,
    /// The network.
    pub network: NetworkOptions,
    /// Machine kind.
    pub machine: Option<Machine>,
    /// Guest kernel.
    pub kernel: Option<PathBuf>,
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

/// A `hull run` before its image is there.
#[derive(Debug)]
pub struct Run<'a> {
    options: &'a RunOptions,
    config: &'a Config,
    paths: Paths,
    id: String,
    network: Plan,
    /// When the command began: monotonic clock, nanoseconds.
    began_ns: u64,
    timings: &'a Timings,
}

/// What the container is in.
struct Place {
    machine: MachineConfig,
    sandbox: SandboxPath,
    hostname: String,
    /// The container whose hosts, hostname and resolv.conf it has.
    files_of: String,
    /// The container whose machine this is, when it is another one's.
    host: Option<Container>,
}

impl<'a> Run<'a> {
    /// Checks what can be found wrong before an image is pulled, and binds published ports.
    ///
    /// # Errors
    /// Options that make no sense, or contradict each other or the host.
    pub fn prepare(
        options: &'a RunOptions,
        config: &'a Config,
        began_ns: u64,
        timings: &'a Timings,
    ) -> Result<Self> {
        let paths = config.paths();
        check(options, &paths)?;
        let id = names::new_id()?;
        let network = options.network.plan(&id, config)?;
        timings.step("arguments", began_ns);
        Ok(Self {
            options,
            config,
            paths,
            id,
            network,
            began_ns,
            timings,
        })
    }

    /// The new container's id.
    pub fn id(&self) -> &str {
        &self.id
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

    /// Starts the container. With an attachment, its streams come with it.
    ///
    /// # Errors
    /// Anything that keeps it from running; then nothing of it is left.
    pub fn start(self, image: &Image, attachment: Option<&Attachment>) -> Result<Outcome> {
        let begin = now_ns();
        let place = self.place()?;
        let record = self.record(image, &place)?;
        let directory = self.reserve(record)?;
        self.timings.step("request", begin);
        let started = self.create(image, &place, &directory, attachment);
        let erase = || container::remove(&self.paths, &self.id, true);
        match started {
            Ok(Outcome::Interrupted(signal)) => {
                // Nothing of it is to stay.
                erase()?;
                Ok(Outcome::Interrupted(signal))
            }
            Ok(started) => Ok(started),
            Err(error) => {
                if let Err(error) = erase() {
                    tracing::warn!("{error}");
                }
                Err(error)
            }
        }
    }

    fn record(&self, image: &Image, place: &Place) -> Result<Record<Details>> {
        let options = self.options;
        let command = spec::command(options.entrypoint.as_ref(), &options.command, &image.config)?;
        let mut labels = image.config.labels.clone();
        labels.extend(options.labels.iter().cloned());
        let mut record = Record::new(
            &self.id,
            ENGINE,
            Details {
                name: options.name.clone().unwrap_or_default(),
                image: options.image.clone(),
                image_id: image.id.clone(),
                hostname: place.hostname.clone(),
                files_of: place.files_of.clone(),
                machine: place.machine.choice.kind.to_string(),
                hardware: place.machine.choice.hardware,
                kernel: place.machine.choice.kernel.display().to_string(),
                memory: place.machine.memory,
                cpus: place.machine.cpus,
                terminal: options.terminal,
                stdin: options.interactive,
                auto_remove: options.remove,
                stop_signal: options
                    .stop_signal
                    .clone()
                    .or_else(|| image.config.stop_signal.clone())
                    .unwrap_or_else(|| "TERM".to_owned()),
                network: self.network.name.clone(),
                ports: self.network.ports().to_vec(),
                labels,
                volumes: options.volumes.iter().map(Volume::to_string).collect(),
                layers: image.layers.clone(),
                raw_env: Vec::new(),
            },
        );
        record.sandbox = Some(place.sandbox.clone());
        record.command = command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        Ok(record)
    }

    /// Creates the container's directory and takes its name. What a killed command left of either
    /// is in nobody's way.
    fn reserve(&self, mut record: Record<Details>) -> Result<Directory> {
        // A directory of this name always has a record: whose it is can be told at any moment.
        let staging = self.paths.staging(record.creator);
        let path = self.paths.container(&self.id);
        let doing = || format!("create {}", path.display());
        let directory = Directory::create_new(&staging).context(doing)?;
        let directory = record
            .write(&directory)
            .and_then(|()| directory.rename_to(&path).context(doing))
            .inspect_err(|_| drop(remove_all(&staging)))?;
        let claimed = self.claim(&mut record, &directory);
        if let Err(error) = claimed {
            if let Err(error) = container::erase(&self.paths, &self.id, None) {
                tracing::warn!("{error}");
            }
            return Err(error);
        }
        Ok(directory)
    }

    fn claim(&self, record: &mut Record<Details>, directory: &Directory) -> Result<()> {
        let given = self.options.name.as_deref();
        let mut attempt = 0;
        loop {
            let name = match given {
                Some(name) => name.to_owned(),
                None => names::random(attempt)?,
            };
            record.details.name.clone_from(&name);
            record.write(directory)?;
            match names::claim(&self.paths, &name, &self.id) {
                Ok(()) => return Ok(()),
                Err(_) if attempt == 0 => container::sweep(&self.paths),
                Err(_) if given.is_none() && attempt < NAME_ATTEMPTS => {}
                Err(error) => return Err(error),
            }
            attempt += 1;
        }
    }

    /// Launches the sandbox and creates the container in it.
    fn create(
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
        self.request_network(&client, directory)?;

        // Meanwhile the machine boots, and plugins are at work.
        let begin = now_ns();
        let built = self.spec(image, place)?;
        rootless::enter_mounts()?;
        let shares = self.shares(image, directory)?;
        self.timings.step("mount the root file system", begin);

        let begin = now_ns();
        let mut addresses = None;
        if let Attach::Source(..) = &self.network.attach {
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
                let network = (&self.network.name[..], addresses.as_ref());
                dns::files(&place.hostname, &self.options.network.dns(), network)?
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
                Ok(other) => return Err(self.ending(&other.message)),
                Err(signal) => return Ok(Outcome::Interrupted(signal)),
            }
        }
        let streams = match wait(&client)? {
            Ok(Received {
                message: Reply::Streams,
                fds,
            }) => fds,
            Ok(other) => return Err(self.ending(&other.message)),
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

    fn sandbox(&self, place: &Place) -> Result<SandboxConfig> {
        let cgroup = match &self.config.cgroup_parent {
            Some(parent) => CgroupConfig::Own {
                parent: parent.clone(),
            },
            None => CgroupConfig::None,
        };
        Ok(SandboxConfig {
            machine: place.machine.clone(),
            hostname: self.id.get(..12).unwrap_or_default().to_owned(),
            cgroup,
            bounds: place.machine.bounds(),
            core_scheduling: self.config.core_sched,
            disks: Vec::new(),
            end: EndPolicy::LastContainer,
            began_ns: self.began_ns,
        })
    }

    fn request_network(&self, client: &Client, directory: &Directory) -> Result<()> {
        let Attach::Source(source, sockets) = &self.network.attach else {
            return Ok(());
        };
        let mut fds = Vec::new();
        if let hull_sandbox::config::NetworkSource::Cni(_) = **source {
            fds.push(directory.as_fd());
            fds.extend(sockets.iter().map(AsFd::as_fd));
        }
        let request = Request::Network(NetworkConfig {
            source: (**source).clone(),
            limits: self.network.limits,
            owner: Some(self.id.clone()),
        });
        client.tell(&request, &fds)
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

/// What can be found wrong before an image is pulled.
fn check(options: &RunOptions, paths: &Paths) -> Result<()> {
    volumes::check_distinct(&options.volumes, &options.tmpfs).map_err(Error::invalid)?;
    spec::capabilities(&options.cap_add, &options.cap_drop)?;
    seccomp(&options.security)?;
    check_length(paths.run())?;
    for volume in &options.volumes {
        let source = volume.source.display();
        match std::fs::metadata(&volume.source) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::invalid(format!(
                    "host path {source} of a volume does not exist"
                ))
                .hint(format!("mkdir -p {source}")));
            }
            Err(error) => {
                return Err(error).context(|| format!("read the host path {source} of a volume"));
            }
        }
    }
    if let Some(milli) = options.cpus_milli {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        if milli > available as u64 * 1000 {
            return Err(Error::invalid(format!(
                "--cpus: {} CPUs are asked for, and there are {available}",
                milli as f64 / 1000.0
            )));
        }
    }
    match &options.name {
        Some(name) => names::check_free(paths, name),
        None => Ok(()),
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
