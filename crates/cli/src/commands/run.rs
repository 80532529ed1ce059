//! `hull run`, and the options that it shares with `hull create`: their grammar, and the caller's
//! side of the container until it exits.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use hull_engine::Paths;
use hull_engine::attach::{Attachment, Options, Outcome};
use hull_engine::config::Config;
use hull_engine::container::{self, Removing};
use hull_engine::endpoint::{self, Endpoint};
use hull_engine::error::of_image;
use hull_engine::health;
use hull_engine::images::own_platform;
use hull_engine::log_options::{self, LogOptions};
use hull_engine::network::NetworkOptions;
use hull_engine::options::RunOptions;
use hull_engine::publish::{self, HostAddress, Ports};
use hull_engine::run::{self, Run, Started, sandbox_timings};
use hull_engine::values::{
    self, CpuList, DetachKeys, Machine, Network, Pull, Restart, SecurityOption, StreamName, Ulimit,
};
use hull_engine::volumes::{self, Mount, Source, Tmpfs, Volume};
use hull_image::{HealthCheck, Hold, Image};
use hull_sandbox::timings::{Step, Timings, now_ns};

use super::config_for_root;
use crate::error::{self, Context, Error, ErrorKind, Result};
use crate::output::Table;
use crate::{images, output};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "hull run [OPTIONS] IMAGE [COMMAND] [ARG]...",
    disable_help_flag = true
)]
pub struct Args {
    /// Run in the background and print the container's id
    #[arg(short, long)]
    detach: bool,
    /// Print where the time of the start went
    #[arg(long)]
    timings: bool,
    /// Attach only this of input, output and error
    #[arg(
        short,
        long,
        value_name = "STREAM",
        ignore_case = true,
        conflicts_with = "detach"
    )]
    attach: Vec<StreamName>,
    /// Pass signals for this command on to the container
    #[arg(long, value_name = "YES", default_value_t = true, action = clap::ArgAction::Set,
          num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    sig_proxy: bool,
    /// Keys that detach and let the container run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    #[command(flatten)]
    container: ContainerArgs,
}

/// What a container is to be: arguments of `run` and `create`.
#[derive(Debug, clap::Args)]
pub struct ContainerArgs {
    /// Keep standard input open and pass it on
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    tty: bool,
    /// Write the container's id to a file that does not exist yet
    #[arg(long, value_name = "FILE")]
    cidfile: Option<PathBuf>,
    /// Remove the container when it ends
    #[arg(long)]
    rm: bool,
    /// Start it again when it ends: no, on-failure, on-failure:MOST, always, unless-stopped
    #[arg(long, value_name = "POLICY", value_parser = values::restart)]
    restart: Option<Restart>,
    /// Name of the container
    #[arg(long, value_parser = values::or_empty(values::container_name))]
    name: Option<String>,

    /// Set an environment variable; without a value, the caller's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Show a host directory or file, or a volume, in the container
    #[arg(short, long, value_name = "[HOST|NAME:]CONTAINER[:ro]", value_parser = super::raw(volumes::volume))]
    volume: Vec<Volume>,
    /// Show a volume, a host directory or a file system in memory:
    /// type=volume|bind|tmpfs,source=…,target=…
    #[arg(long, value_name = "KEY=VALUE,…", value_parser = super::raw(volumes::mount))]
    mount: Vec<Mount>,
    /// Show the volumes of another container
    #[arg(long, value_name = "CONTAINER[:ro]")]
    volumes_from: Vec<String>,
    /// Mount a file system in memory
    #[arg(long, value_name = "DIR[:OPTIONS]", value_parser = volumes::tmpfs)]
    tmpfs: Vec<Tmpfs>,
    /// Working directory inside the container
    #[arg(short, long, value_name = "DIR", value_parser = values::or_empty(values::directory))]
    workdir: Option<String>,
    /// User, and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = values::or_empty(values::user))]
    user: Option<String>,
    /// Replace the image's entry point; "" for none
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<OsString>,
    /// Another group of its processes, by name or number
    #[arg(long, value_name = "GROUP", value_parser = values::group)]
    group_add: Vec<String>,
    /// Allow everything in the guest, and nothing of the host: all capabilities, no system call
    /// filter, /sys and /proc writable
    #[arg(long)]
    privileged: bool,
    /// Remove the container that has the name, first
    #[arg(long)]
    replace: bool,
    /// Host name of the container
    #[arg(short = 'h', long, value_name = "NAME", value_parser = values::or_empty(values::hostname))]
    hostname: Option<String>,
    /// Run an init process that passes on signals and reaps processes
    #[arg(long)]
    init: bool,
    /// Signal that `hull stop` sends first
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal_name)]
    stop_signal: Option<String>,
    /// Seconds that `hull stop` waits; -1 for ever
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds, allow_negative_numbers = true)]
    stop_timeout: Option<i64>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<(String, String)>,
    /// Read labels from a file, one a line
    #[arg(long, value_name = "FILE")]
    label_file: Vec<PathBuf>,

    /// Platform of the image and the container: this host's
    #[arg(
        long,
        value_name = "OS/ARCH[/VARIANT]",
        default_value = "",
        hide_default_value = true
    )]
    platform: String,
    /// Set an annotation, for programs that read the specification
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    annotation: Vec<(String, String)>,
    /// Keep the output for hull logs (json-file or local), give it to the host's journal as well
    /// (journald), or do not keep it (none)
    #[arg(
        long,
        value_name = "DRIVER",
        default_value = "",
        hide_default_value = true
    )]
    log_driver: String,
    /// How output is kept: max-size=SIZE, and what is kept beside it: tag=TEXT, labels=NAME,…,
    /// env=NAME,…
    #[arg(long, value_name = "KEY=VALUE", value_parser = log_options::pair)]
    log_opt: Vec<(String, String)>,

    /// Memory limit, like 512m
    #[arg(short, long, value_name = "SIZE", value_parser = values::memory, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// Most of --memory together with swap of the host; -1 for all the swap there is
    #[arg(long, value_name = "SIZE", value_parser = values::memory_swap, allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// Processors of the host that the machine stays on, like 0-3
    #[arg(long, value_name = "CPUS", value_parser = values::cpu_list)]
    cpuset_cpus: Option<CpuList>,
    /// Number of CPUs, like 1.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus, allow_negative_numbers = true)]
    cpus: Option<u64>,
    /// Part of the CPUs when others want them, too: 1024 is what all have
    #[arg(
        short = 'c',
        long,
        value_name = "NUMBER",
        value_parser = values::cpu_shares
    )]
    cpu_shares: Option<u64>,
    /// How gladly its processes are killed for lack of memory
    #[arg(
        long,
        value_name = "NUMBER",
        value_parser = clap::value_parser!(i32).range(-1000..=1000),
        allow_negative_numbers = true
    )]
    oom_score_adj: Option<i32>,
    /// Most processes at a time; -1 for no limit
    #[arg(long, value_name = "NUMBER", value_parser = values::pids_limit, allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Set a resource limit of processes, like nofile=1024:4096
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = values::ulimit)]
    ulimit: Vec<Ulimit>,
    /// Size of /dev/shm
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    shm_size: Option<u64>,

    /// Most that can be written to the root file system, as size=SIZE
    #[arg(long, value_name = "size=SIZE", value_parser = values::storage_option)]
    storage_opt: Option<u64>,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Add a Linux capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_add: Vec<String>,
    /// Drop a Linux capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_drop: Vec<String>,
    /// seccomp=FILE for a system call filter in place of the usual one, seccomp=unconfined for
    /// none; no-new-privileges
    #[arg(long, value_name = "NAME[=VALUE]", value_parser = values::security_option)]
    security_opt: Vec<SecurityOption>,
    /// Set a kernel parameter in the container
    #[arg(long, value_name = "NAME=VALUE", value_parser = values::sysctl)]
    sysctl: Vec<(String, String)>,
    #[command(flatten)]
    health: HealthArgs,
    #[command(flatten)]
    network: NetworkArgs,

    /// What runs the guest kernel
    #[arg(long, value_name = "KIND", hide_possible_values = false)]
    machine: Option<Machine>,
    /// Guest kernel to boot instead of the installed one
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// When to ask the registry for the image
    #[arg(long, value_name = "WHEN")]
    pull: Option<Pull>,
    /// Print nothing while an image is pulled
    #[arg(short, long)]
    quiet: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,

    /// Image, command and its arguments
    #[arg(value_names = ["IMAGE", "COMMAND"], num_args = 1.., required = true, trailing_var_arg = true)]
    words: Vec<OsString>,
}

/// Options of a container's health check.
#[derive(Debug, clap::Args)]
struct HealthArgs {
    /// Command, for a shell in the container, that tells whether it is healthy
    #[arg(long, alias = "healthcheck-command", value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// Time between two checks, like 30s
    #[arg(long, alias = "healthcheck-interval", value_name = "DURATION", value_parser = health::duration)]
    health_interval: Option<u64>,
    /// After which a check has failed, like 30s
    #[arg(long, alias = "healthcheck-timeout", value_name = "DURATION", value_parser = health::duration)]
    health_timeout: Option<u64>,
    /// Failures in a row after which it is unhealthy
    #[arg(long, alias = "healthcheck-retries", value_name = "NUMBER")]
    health_retries: Option<u32>,
    /// Time at the start in which failures do not count
    #[arg(long, alias = "healthcheck-start-period", value_name = "DURATION", value_parser = health::duration)]
    health_start_period: Option<u64>,
    /// Time between two checks in that time
    #[arg(long, value_name = "DURATION", value_parser = health::duration)]
    health_start_interval: Option<u64>,
    /// Do not check, whatever the image says
    #[arg(
        long,
        conflicts_with_all = [
            "health_cmd",
            "health_interval",
            "health_timeout",
            "health_retries",
            "health_start_period",
            "health_start_interval",
        ]
    )]
    no_healthcheck: bool,
}

/// The ports of one `--expose`.
#[derive(Clone, Debug)]
struct Exposed(Vec<String>);

fn exposed(text: &str) -> std::result::Result<Exposed, String> {
    publish::expose_all(text).map(Exposed)
}

impl HealthArgs {
    fn check(self) -> Option<HealthCheck> {
        let test = match (self.no_healthcheck, self.health_cmd) {
            (true, _) => vec!["NONE".to_owned()],
            (false, Some(script)) => vec!["CMD-SHELL".to_owned(), script],
            (false, None) => Vec::new(),
        };
        let check = HealthCheck {
            test,
            interval: self.health_interval,
            timeout: self.health_timeout,
            start_period: self.health_start_period,
            start_interval: self.health_start_interval,
            retries: self.health_retries,
        };
        (check != HealthCheck::default()).then_some(check)
    }
}

/// Options of a container's network.
#[derive(Debug, clap::Args)]
struct NetworkArgs {
    /// Network: default, none, a name of hull network ls, or container:NAME to be in another
    /// container's machine; may be given several times, and with names and addresses:
    /// name=NETWORK,alias=NAME,ip=ADDRESS
    #[arg(long, alias = "net", value_name = "NETWORK", value_parser = endpoint::endpoint)]
    network: Vec<(Network, Endpoint)>,
    /// Another name of the container in its network
    #[arg(long, alias = "net-alias", value_name = "NAME", value_parser = values::hostname)]
    network_alias: Vec<String>,
    /// Find another container of its network by one more name
    #[arg(long, value_name = "CONTAINER[:NAME]", value_parser = endpoint::link)]
    link: Vec<(String, String)>,
    /// Let a port of the host lead to a port of the container
    #[arg(short, long, value_name = "[[ADDRESS:]HOST_PORT:]PORT[/udp]", value_parser = publish::publish)]
    publish: Vec<Ports>,
    /// Publish all ports that the image or --expose declares, at ports of the host that are free
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// Declare a port
    #[arg(long, value_name = "PORT[-PORT][/udp]", value_parser = exposed)]
    expose: Vec<Exposed>,
    /// Most bytes per second that the container sends, and receives, like 10m
    #[arg(long, value_name = "SIZE", value_parser = values::size)]
    network_rate: Option<u64>,
    /// Name server, in place of the host's
    #[arg(long, value_name = "ADDRESS", value_parser = publish::dns)]
    dns: Vec<IpAddr>,
    /// Domain in which short names are searched, or . for none
    #[arg(long, value_name = "DOMAIN", value_parser = publish::dns_search)]
    dns_search: Vec<String>,
    /// Option of the resolver, like ndots:2
    #[arg(long, value_name = "OPTION", alias = "dns-opt", value_parser = publish::dns_option)]
    dns_option: Vec<String>,
    /// Give an address a name; host-gateway is the host's own
    #[arg(long, value_name = "NAME:ADDRESS", value_parser = publish::add_host)]
    add_host: Vec<(String, HostAddress)>,
    /// Hardware address of the network interface
    #[arg(long, value_name = "ADDRESS", value_parser = publish::mac_address)]
    mac_address: Option<[u8; 6]>,
    /// Address in the network
    #[arg(long, value_name = "ADDRESS", value_parser = publish::ip)]
    ip: Option<Ipv4Addr>,
    /// IPv6 address in the network
    #[arg(long, value_name = "ADDRESS", value_parser = publish::ip6)]
    ip6: Option<Ipv6Addr>,
}

impl TryFrom<NetworkArgs> for NetworkOptions {
    type Error = Error;

    fn try_from(args: NetworkArgs) -> Result<Self> {
        let mut options = Self {
            network: None,
            further: Vec::new(),
            aliases: args.network_alias,
            links: args.link,
            publish: args.publish,
            rate: args.network_rate,
            dns: args.dns,
            dns_search: args.dns_search,
            dns_option: args.dns_option,
            add_host: args.add_host,
            mac_address: args.mac_address,
            ip: args.ip,
            ip6: args.ip6,
        };
        options.join(args.network)?;
        Ok(options)
    }
}

impl ContainerArgs {
    /// What is asked for.
    ///
    /// # Errors
    /// A file of environment variables cannot be read; there is no log driver of this name; there
    /// is no container whose volumes are wanted.
    fn options(self, config: &Config) -> Result<RunOptions> {
        own_platform(&self.platform)?;
        let environment = gather_environment(&self.env_file, &self.env)?;
        let options = self.log_opt.iter();
        let options = options.map(|(key, value)| (&key[..], &value[..]));
        let log = LogOptions::parse(&self.log_driver, options).map_err(Error::invalid)?;
        let mut words = self.words.into_iter();
        let image = words.next().unwrap_or_default();
        let image = image.into_string().map_err(|text| {
            Error::invalid(format!("invalid image reference {text:?}: not UTF-8"))
        })?;
        let (mut volumes, mut tmpfs) = (self.volume, self.tmpfs);
        for volume in &volumes {
            if let Source::Host(path) = &volume.source {
                volumes::create_missing(path)?;
            }
        }
        for mount in self.mount {
            match mount {
                Mount::Volume(volume) => volumes.push(volume),
                Mount::Tmpfs(memory) => tmpfs.push(memory),
            }
        }
        for other in &self.volumes_from {
            volumes::add_those_of(&mut volumes, &tmpfs, other, &config.paths())?;
        }
        let mut labels = Vec::new();
        for file in &self.label_file {
            labels.extend(read_labels(file)?);
        }
        labels.extend(self.label);
        let name = given(self.name);
        if let Some(name) = name.as_ref().filter(|_| self.replace) {
            replace(&config.paths(), name)?;
        }
        let publish_all = self.network.publish_all;
        let expose = self.network.expose.iter().flat_map(|ports| ports.0.clone());
        let expose = expose.collect();
        Ok(RunOptions {
            image,
            command: words.collect(),
            interactive: self.interactive,
            stdin_stays: false,
            terminal: self.tty,
            remove: self.rm,
            restart: self.restart.unwrap_or_default(),
            name,
            environment,
            volumes,
            tmpfs,
            directory: given(self.workdir),
            user: given(self.user),
            entrypoint: self.entrypoint,
            hostname: given(self.hostname),
            health: self.health.check(),
            init: self.init,
            stop_signal: self.stop_signal,
            labels,
            groups: self.group_add,
            privileged: self.privileged,
            oom_score_adj: self.oom_score_adj,
            cpu_shares: self.cpu_shares,
            memory_swap: self.memory_swap.filter(|both| *both != 0),
            host_cpus: self.cpuset_cpus.unwrap_or_default(),
            annotations: self.annotation,
            log,
            stop_timeout: self.stop_timeout,
            expose,
            publish_all,
            memory: self.memory,
            cpus_milli: self.cpus,
            pids_limit: self.pids_limit,
            ulimits: self.ulimit,
            shm_size: self.shm_size,
            storage_size: self.storage_opt,
            read_only: self.read_only,
            cap_add: self.cap_add,
            cap_drop: self.cap_drop,
            security: self.security_opt,
            sysctl: self.sysctl,
            network: self.network.try_into()?,
            machine: self.machine,
            kernel: self.kernel,
        })
    }
}

fn read_labels(file: &Path) -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(file)
        .context(|| format!("read the label file {}", file.display()))?;
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            values::label(line)
                .map_err(|why| Error::invalid(format!("--label-file {}: {why}", file.display())))
        })
        .collect()
}

/// Removes the container that has a name, if one has it.
fn replace(paths: &Paths, name: &str) -> Result<()> {
    match container::find(paths, name) {
        Ok(old) if old.record.details.name == name => {
            let removing = Removing {
                force: true,
                volumes: false,
            };
            container::remove(paths, &old.record.id, removing)
        }
        Ok(_) => Ok(()),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Who asks for a container, and how.
pub struct Caller {
    pull: Pull,
    quiet: bool,
    id_file: Option<IdFile>,
}

impl Caller {
    /// What is asked for, and how.
    ///
    /// # Errors
    /// As [`ContainerArgs::options`]; the file for the id is there already.
    pub fn split(args: ContainerArgs, config: &Config) -> Result<(RunOptions, Self)> {
        let caller = Self {
            pull: args.pull.unwrap_or(config.pull),
            quiet: args.quiet,
            id_file: args.cidfile.clone().map(IdFile::create).transpose()?,
        };
        Ok((args.options(config)?, caller))
    }

    /// Makes the image available and keeps it, until the container is registered.
    ///
    /// # Errors
    /// There is none, or it cannot be pulled.
    pub fn obtain(&self, run: &Run<'_>, config: &Config) -> Result<(Image, Option<Hold>)> {
        let reference = run.options().image.parse().map_err(of_image)?;
        let image = images::obtain(config, &reference, self.pull, self.quiet)?;
        let hold = images::store(config)?
            .hold(&image, run.id())
            .map_err(of_image)?;
        Ok((image, hold))
    }

    /// Tells the id to the file that was asked for.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn tell(self, id: &str) -> Result<()> {
        match self.id_file {
            Some(file) => file.write(id),
            None => Ok(()),
        }
    }
}

/// The file of `--cidfile`; removed again when there is no container.
struct IdFile {
    path: PathBuf,
    file: File,
    written: bool,
}

impl IdFile {
    fn create(path: PathBuf) -> Result<Self> {
        let file = File::create_new(&path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::with_kind(
                ErrorKind::Exists,
                format!("--cidfile: {} exists", path.display()),
            )
            .hint("another container may be running: remove the file, or give another one"),
            _ => Error::new(format!("--cidfile: create {}: {error}", path.display())),
        })?;
        Ok(Self {
            path,
            file,
            written: false,
        })
    }

    fn write(mut self, id: &str) -> Result<()> {
        self.written = true;
        self.file
            .write_all(id.as_bytes())
            .context(|| format!("write {}", self.path.display()))
    }
}

impl Drop for IdFile {
    fn drop(&mut self) {
        if !self.written {
            // It is empty and ours; the error that is reported is the one that made this necessary.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// An empty text is as none.
pub fn given(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// Runs a container.
pub fn execute(args: Args, began_ns: u64) -> Result<u8> {
    let config = config_for_root()?;
    let (mut options, caller) = Caller::split(args.container, &config)?;
    // As Docker's: nobody is attached whose end would be that of the input.
    options.stdin_stays = options.interactive && args.detach;
    let timings = Timings::default();
    if !args.detach && options.interactive && options.terminal {
        check_terminal()?;
    }
    let detach_keys = args.detach_keys.unwrap_or(config.detach_keys.clone());
    let is_attached = |stream| args.attach.is_empty() || args.attach.contains(&stream);
    let shown = [StreamName::Stdout, StreamName::Stderr].map(is_attached);
    let attach = (!args.detach).then_some(Options {
        input: options.interactive && is_attached(StreamName::Stdin),
        shown,
        terminal: options.terminal,
        forward_signals: args.sig_proxy,
        detach_keys,
    });
    let outcome = start(
        options.clone(),
        &caller,
        &config,
        attach,
        began_ns,
        &timings,
    );
    let (outcome, attachment) = outcome.map_err(|error| {
        if args.timings {
            print_timings(began_ns, timings.steps());
        }
        options.in_users_words(error)
    })?;
    let started = match outcome {
        run::Outcome::Started(started) => *started,
        run::Outcome::Interrupted(signal) => return Ok(status_of_signal(signal)),
    };
    if args.timings {
        let mut steps = timings.steps();
        steps.extend(sandbox_timings(&started.sandbox));
        print_timings(began_ns, steps);
    }
    caller.tell(&started.id)?;
    if !args.detach && shown == [false; 2] {
        output::print(format!("{}\n", started.id))?;
    }
    match attachment {
        Some(attachment) => follow(attachment, started),
        None => {
            output::print(format!("{}\n", started.id))?;
            Ok(0)
        }
    }
}

/// Carries the streams of a container that was started until it ends or the user goes; the exit
/// status.
///
/// # Errors
/// The sandbox has ended, or the caller's streams cannot be used.
pub fn follow(attachment: Attachment, started: Started) -> Result<u8> {
    let name = started.name;
    let outcome = attachment.carry(started.client, started.streams)?;
    if outcome == Outcome::OutputClosed {
        output::note(format!(
            "note: nobody reads the output; container {name} runs on; hull stop {name}"
        ));
    }
    finish(outcome, &name)
}

fn start(
    options: RunOptions,
    caller: &Caller,
    config: &Config,
    attach: Option<Options>,
    began_ns: u64,
    timings: &Timings,
) -> Result<(run::Outcome, Option<Attachment>)> {
    let mut run = Run::prepare(options, config, began_ns, timings)?;
    // A port that is taken is found before an image is pulled, unless the image says which.
    let network = match run.options().publish_all {
        true => None,
        false => Some(run.plan()?),
    };
    let begin = now_ns();
    let (image, _hold) = caller.obtain(&run, config)?;
    timings.step("image", begin);
    let network = match network {
        Some(network) => network,
        None => run.plan_for(&image)?,
    };
    let attachment = attach.map(Attachment::prepare).transpose()?;
    notice(config, &run);
    note_missing_cpus(config, &run);
    let outcome = run.start(network, &image, attachment.as_ref())?;
    Ok((outcome, attachment))
}

/// Tells the user once, before the first container, how it is isolated. Only on a terminal: scripts
/// would find it in their container's standard error.
fn notice(config: &Config, run: &Run<'_>) {
    let told = config.data_dir.join("isolation-notice");
    if !std::io::stderr().is_terminal() || told.exists() {
        return;
    }
    if let Ok(choice) = run.choose()
        && !choice.hardware
        && std::fs::File::create_new(told).is_ok()
    {
        output::note(format!(
            "note: machine {} isolates by a kernel of its own, not by hardware; \
             `hull check` says more (shown once)",
            choice.kind
        ));
    }
}

/// Says so when `--cpus` is more than the machine can have.
fn note_missing_cpus(config: &Config, run: &Run<'_>) {
    let options = run.options();
    let Some(milli @ 1001..) = options.cpus_milli else {
        return;
    };
    if matches!(options.network.network, Some(Network::Container(_))) {
        return; // its machine is there already
    }
    if let Ok(choice) = run.choose()
        && let most = run::cpus(&choice, Some(milli), config)
        && milli.div_ceil(1000) > most.into()
    {
        let what = if most == 1 { "processor" } else { "processors" };
        output::note(format!(
            "note: --cpus {}: a machine of kind {} has {most} {what}",
            milli as f64 / 1e3,
            choice.kind
        ));
    }
}

fn print_timings(began_ns: u64, mut steps: Vec<Step>) {
    steps.sort_by_key(|step| step.begin_ns);
    let milliseconds = |nanos: u64| format!("{:9.2}", nanos as f64 / 1e6);
    let mut table = Table::new(&["STEP", " BEGIN ms", "  TOOK ms"]);
    for step in steps {
        table.row([
            step.name.clone(),
            milliseconds(step.begin_ns.saturating_sub(began_ns)),
            milliseconds(step.took_ns),
        ]);
    }
    output::note(table.render().trim_end());
}

/// The environment from files and options; options come last.
pub fn gather_environment(files: &[PathBuf], given: &[OsString]) -> Result<Vec<OsString>> {
    let mut variables = Vec::new();
    for file in files {
        let text = std::fs::read(file)
            .context(|| format!("read the environment file {}", file.display()))?;
        variables.extend(values::environment_file(file, &text).map_err(Error::invalid)?);
    }
    for variable in given {
        variables.extend(values::environment(variable).map_err(Error::invalid)?);
    }
    Ok(variables)
}

/// Refuses a terminal for the container if standard input is not one, with Docker's message.
pub fn check_terminal() -> Result<()> {
    match rustix::termios::isatty(std::io::stdin()) {
        true => Ok(()),
        false => Err(Error::invalid("the input device is not a TTY").hint("leave out -t, or -i")),
    }
}

pub fn status_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// Reports the outcome of an attachment and returns the exit status.
pub fn finish(outcome: Outcome, name: &str) -> Result<u8> {
    Ok(match outcome {
        Outcome::Exited(exit) => {
            if let Some(reason) = exit.reason {
                error::print(&Error::new(format!("container {name}: {reason}")));
            }
            u8::try_from(exit.status).unwrap_or(u8::MAX)
        }
        Outcome::Detached => {
            output::note("read escape sequence");
            0
        }
        Outcome::Interrupted(signal) => status_of_signal(signal),
        Outcome::GaveUp(signal) => {
            output::note(format!(
                "note: container {name} does not end by this signal and runs on; hull stop {name}"
            ));
            status_of_signal(signal)
        }
        // As if SIGPIPE had ended this process.
        Outcome::OutputClosed => status_of_signal(nix::sys::signal::Signal::SIGPIPE as i32),
    })
}
