//! `hull run`: the grammar of its options, and the caller's side of the container until it exits.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use hull_engine::attach::{Attachment, Options, Outcome};
use hull_engine::config::Config;
use hull_engine::network::NetworkOptions;
use hull_engine::publish::{self, HostAddress, Ports};
use hull_engine::run::{self, Run, RunOptions, Started, sandbox_timings};
use hull_engine::values::{self, DetachKeys, Machine, Network, Pull, SecurityOption, Ulimit};
use hull_engine::volumes::{self, Tmpfs, Volume};
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
    /// Keep standard input open and pass it on
    #[arg(short, long)]
    interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run in the background and print the container's id
    #[arg(short, long)]
    detach: bool,
    /// Remove the container when it ends
    #[arg(long)]
    rm: bool,
    /// Name of the container
    #[arg(long, value_parser = values::or_empty(values::container_name))]
    name: Option<String>,

    /// Set an environment variable; without a value, the caller's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Show a host directory or file in the container
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]", value_parser = super::raw(volumes::volume))]
    volume: Vec<Volume>,
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
    /// Host name of the container
    #[arg(short = 'h', long, value_name = "NAME", value_parser = values::or_empty(values::hostname))]
    hostname: Option<String>,
    /// Run an init process that passes on signals and reaps processes
    #[arg(long)]
    init: bool,
    /// Signal that `hull stop` sends first
    #[arg(long, value_name = "SIGNAL", value_parser = values::signal_name)]
    stop_signal: Option<String>,
    /// Set a label
    #[arg(short, long, value_name = "KEY[=VALUE]", value_parser = values::label)]
    label: Vec<(String, String)>,

    /// Memory limit, like 512m
    #[arg(short, long, value_name = "SIZE", value_parser = values::memory, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// Number of CPUs, like 1.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus, allow_negative_numbers = true)]
    cpus: Option<u64>,
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
    network: NetworkArgs,

    /// What runs the guest kernel
    #[arg(long, value_name = "KIND", hide_possible_values = false)]
    machine: Option<Machine>,
    /// Guest kernel to boot instead of the installed one
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Print where the time of the start went
    #[arg(long)]
    timings: bool,
    /// When to ask the registry for the image
    #[arg(long, value_name = "WHEN")]
    pull: Option<Pull>,
    /// Keys that detach and let the container run on
    #[arg(long, value_name = "KEYS", value_parser = values::detach_keys)]
    detach_keys: Option<DetachKeys>,
    /// Print help
    #[arg(long, action = clap::ArgAction::HelpShort)]
    help: Option<bool>,

    /// Image, command and its arguments
    #[arg(value_names = ["IMAGE", "COMMAND"], num_args = 1.., required = true, trailing_var_arg = true)]
    words: Vec<OsString>,
}

/// Options of a container's network.
#[derive(Debug, clap::Args)]
struct NetworkArgs {
    /// Network: default, none, the name of one in /etc/cni/net.d, or container:NAME to be in
    /// another container's machine
    #[arg(long, alias = "net", value_name = "NETWORK", value_parser = values::network)]
    network: Option<Network>,
    /// Let a port of the host lead to a port of the container
    #[arg(short, long, value_name = "[[ADDRESS:]HOST_PORT:]PORT[/udp]", value_parser = publish::publish)]
    publish: Vec<Ports>,
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

impl From<NetworkArgs> for NetworkOptions {
    fn from(args: NetworkArgs) -> Self {
        Self {
            network: args.network,
            publish: args.publish,
            rate: args.network_rate,
            dns: args.dns,
            dns_search: args.dns_search,
            dns_option: args.dns_option,
            add_host: args.add_host,
            mac_address: args.mac_address,
            ip: args.ip,
            ip6: args.ip6,
        }
    }
}

/// Options of this command that are not the container's.
struct Caller {
    detach: bool,
    timings: bool,
    pull: Option<Pull>,
    detach_keys: Option<DetachKeys>,
}

impl Args {
    fn split(self) -> Result<(RunOptions, Caller)> {
        let caller = Caller {
            detach: self.detach,
            timings: self.timings,
            pull: self.pull,
            detach_keys: self.detach_keys,
        };
        let environment = gather_environment(&self.env_file, &self.env)?;
        let mut words = self.words.into_iter();
        let image = words.next().unwrap_or_default();
        let image = image.into_string().map_err(|text| {
            Error::invalid(format!("invalid image reference {text:?}: not UTF-8"))
        })?;
        let options = RunOptions {
            image,
            command: words.collect(),
            interactive: self.interactive,
            terminal: self.tty,
            remove: self.rm,
            name: given(self.name),
            environment,
            volumes: self.volume,
            tmpfs: self.tmpfs,
            directory: given(self.workdir),
            user: given(self.user),
            entrypoint: self.entrypoint,
            hostname: given(self.hostname),
            init: self.init,
            stop_signal: self.stop_signal,
            labels: self.label,
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
            network: self.network.into(),
            machine: self.machine,
            kernel: self.kernel,
        };
        Ok((options, caller))
    }
}

/// An empty text is as none.
pub fn given(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// Runs a container.
pub fn execute(args: Args, began_ns: u64) -> Result<u8> {
    let config = config_for_root()?;
    let (options, caller) = args.split()?;
    let timings = Timings::default();
    let started = start(&options, &caller, &config, began_ns, &timings);
    let (started, attachment) = match started {
        Ok(Some(started)) => started,
        Ok(None) => return Ok(0),
        Err(Failed::Interrupted(signal)) => return Ok(status_of_signal(signal)),
        Err(Failed::Error(error)) => {
            if caller.timings {
                print_timings(began_ns, timings.steps());
            }
            return Err(in_users_words(error, &options));
        }
    };
    let Started {
        id,
        name,
        sandbox,
        client,
        streams,
    } = started;
    if caller.timings {
        let mut steps = timings.steps();
        steps.extend(sandbox_timings(&sandbox));
        print_timings(began_ns, steps);
    }
    match attachment {
        Some(attachment) => {
            let outcome = attachment.carry(client, streams)?;
            if outcome == Outcome::OutputClosed {
                output::note(format!(
                    "note: nobody reads the output; container {name} runs on; hull stop {name}"
                ));
            }
            finish(outcome, &name)
        }
        None => {
            output::print(format!("{id}\n"))?;
            Ok(0)
        }
    }
}

/// The guest speaks of the specification; a person has given options.
fn in_users_words(mut error: Error, options: &RunOptions) -> Error {
    let words = [
        ("invalid spec: process.user", "--user"),
        ("cannot enter process.cwd", "--workdir: cannot enter"),
        ("cannot set process.rlimits RLIMIT_", "--ulimit "),
        ("cannot set linux.resources.pids.limit", "--pids-limit"),
        ("cannot set linux.resources.memory.limit", "--memory"),
        ("cannot set linux.resources.cpu.quota", "--cpus"),
        ("invalid spec: linux.sysctl", "--sysctl"),
    ];
    for (of_spec, of_option) in words {
        if let Some(rest) = error.message.strip_prefix(of_spec) {
            // Names of limits are written in small letters.
            let rest = match (of_option.starts_with("--ulimit"), rest.split_once(':')) {
                (true, Some((name, why))) => format!("{}:{why}", name.to_lowercase()),
                _ => rest.to_owned(),
            };
            error.message = format!("{of_option}{rest}");
            return error;
        }
    }
    if let Some(rest) = error.message.strip_prefix("cannot bind /run/hull/shares/")
        && let Some((share, rest)) = rest.split_once(" to ")
        && let Some(index) = share.rsplit_once("-volume")
        && let Ok(index) = index.1.trim_end_matches("/file").parse::<usize>()
        && let Some(volume) = options.volumes.get(index)
    {
        error.message = format!("cannot mount {} at {rest}", volume.source.display());
        return error;
    }
    let first = options.command.first().map(|word| word.to_string_lossy());
    let never_ran = matches!(
        error.kind,
        ErrorKind::CommandNotFound | ErrorKind::NotExecutable
    );
    if never_ran && first.is_some_and(|word| word.starts_with('-')) {
        return error.hint("options of hull run go before the image");
    }
    error
}

enum Failed {
    Interrupted(i32),
    Error(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

fn start(
    options: &RunOptions,
    caller: &Caller,
    config: &Config,
    began_ns: u64,
    timings: &Timings,
) -> Result<Option<(Started, Option<Attachment>)>, Failed> {
    if !caller.detach && options.interactive && options.terminal {
        check_terminal()?;
    }
    let run = Run::prepare(options, config, began_ns, timings)?;
    let begin = now_ns();
    let reference = options
        .image
        .parse()
        .map_err(hull_engine::error::of_image)?;
    let pull = caller.pull.unwrap_or(config.pull);
    let image = images::obtain(config, &reference, pull, false)?;
    timings.step("image", begin);
    let attachment = match caller.detach {
        true => None,
        false => Some(Attachment::prepare(Options {
            input: options.interactive,
            terminal: options.terminal,
            forward_signals: true,
            detach_keys: caller
                .detach_keys
                .clone()
                .unwrap_or(config.detach_keys.clone()),
        })?),
    };
    notice(config, &run);
    note_missing_cpus(options, config, &run);
    // Keeps the image from being removed until the container is registered.
    let hold = images::store(config)?
        .hold(&image, run.id())
        .map_err(hull_engine::error::of_image)?;
    let outcome = run.start(&image, attachment.as_ref());
    drop(hold);
    match outcome? {
        run::Outcome::Started(started) => Ok(Some((*started, attachment))),
        run::Outcome::Interrupted(signal) => Err(Failed::Interrupted(signal)),
    }
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
fn note_missing_cpus(options: &RunOptions, config: &Config, run: &Run<'_>) {
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

fn status_of_signal(signal: i32) -> u8 {
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
