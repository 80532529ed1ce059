//! `hull run`: arguments to a request, the request to a sandbox process, and then the caller's side of the
//! container until it ends. What the other attached commands share with it is here too.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use hull_sandbox::spec::seccomp::{Profile, Seccomp};
use hull_sandbox::spec::{self, ContainerOptions};
use hull_sandbox::timings::{Timings, now_ns};
use hull_sandbox::wire::{Reply, Request};
use hull_sandbox::{
    AttachRequest, MachineRequest, NetworkRequest, Paths, RunRequest, client, names,
};

use super::config_for_root;
use crate::attach::{Attachment, Options, Outcome};
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::guest::GuestFiles;
use crate::mounts::{self, Tmpfs, Volume};
use crate::network::NetworkArgs;
use crate::output::Table;
use crate::reservation::Reservation;
use crate::values::{self, DetachKeys, Machine, Pull, SecurityOption, Ulimit};
use crate::{images, output};

static BEGAN: OnceLock<u64> = OnceLock::new();

/// Remembers when this process began, for `--timings`.
pub fn set_beginning(began_ns: u64) {
    BEGAN.get_or_init(|| began_ns);
}

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
    #[arg(long, value_parser = values::container_name)]
    name: Option<String>,

    /// Set an environment variable; without a value, the caller's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Show a host directory or file in the container
    #[arg(short, long, value_name = "HOST:CONTAINER[:ro]", value_parser = super::raw(mounts::volume))]
    volume: Vec<Volume>,
    /// Mount a file system in memory
    #[arg(long, value_name = "DIR[:OPTIONS]", value_parser = mounts::tmpfs)]
    tmpfs: Vec<Tmpfs>,
    /// Working directory inside the container
    #[arg(short, long, value_name = "DIR", value_parser = values::directory)]
    workdir: Option<String>,
    /// User, and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]", value_parser = values::user)]
    user: Option<String>,
    /// Replace the image's entry point; "" for none
    #[arg(long, value_name = "COMMAND")]
    entrypoint: Option<OsString>,
    /// Host name of the container
    #[arg(short = 'h', long, value_name = "NAME", value_parser = values::hostname)]
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
    #[arg(short, long, value_name = "SIZE", value_parser = values::memory)]
    memory: Option<u64>,
    /// Number of CPUs, like 1.5
    #[arg(long, value_name = "NUMBER", value_parser = values::cpus)]
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

    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Add a Linux capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_add: Vec<String>,
    /// Drop a Linux capability, or ALL
    #[arg(long, value_name = "NAME")]
    cap_drop: Vec<String>,
    /// seccomp=FILE for a system call filter in place of the usual one, seccomp=unconfined for none;
    /// no-new-privileges
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

/// Runs a container.
pub fn execute(args: Args) -> Result<u8> {
    let began_ns = *BEGAN.get_or_init(now_ns);
    let mut timings = Timings::since(began_ns);
    let show = args.timings;
    let outcome = start(args, began_ns, &mut timings);
    match outcome {
        Ok(started) => {
            if show {
                print_timings(&timings);
            }
            started.finish()
        }
        Err(error) => {
            // A guest that did not come up: where the time went is part of the answer.
            if show || error.has_console() {
                print_timings(&timings);
            }
            Err(error)
        }
    }
}

/// A container that runs, and who stands for it.
enum Started {
    Detached(String),
    Attached {
        name: String,
        attachment: Attachment,
        stream: UnixStream,
    },
    Interrupted(i32),
}

impl Started {
    fn finish(self) -> Result<u8> {
        match self {
            Started::Detached(id) => {
                output::print(format!("{id}\n"))?;
                Ok(0)
            }
            Started::Attached {
                name,
                attachment,
                stream,
            } => finish(attachment.carry(stream)?, &name),
            Started::Interrupted(signal) => Ok(status_of_signal(signal)),
        }
    }
}

fn start(args: Args, began_ns: u64, timings: &mut Timings) -> Result<Started> {
    let config = config_for_root()?;
    let paths = config.paths();
    let environment = gather_environment(&args.env_file, &args.env)?;
    if !args.detach && args.interactive && args.tty {
        check_terminal()?;
    }
    check(&args, &paths)?;
    let network = args.network.request(&config)?;
    timings.step("arguments", began_ns);

    let begin = now_ns();
    let image = args.words.first().cloned().unwrap_or_default();
    let image = image
        .into_string()
        .map_err(|text| Error::new(format!("invalid image reference {text:?}: not UTF-8")))?;
    let image = images::obtain(
        &config,
        &image.parse()?,
        args.pull.unwrap_or(config.pull),
        false,
    )?;
    timings.step("image", begin);

    let begin = now_ns();
    let host = machine_of(&args, &config, &network, &paths)?;
    let (choice, initramfs) = match &host {
        Some(host) => (host.machine.choice.clone(), host.machine.initramfs.clone()),
        None => {
            let guest = GuestFiles::locate(&config)?;
            let choice = guest.choose(&config, args.machine, args.kernel.as_deref())?;
            (choice, guest.initramfs()?)
        }
    };
    let mut request = request(
        &args,
        &config,
        network,
        environment,
        &image,
        &choice,
        &initramfs,
    )?;
    if let Some(host) = host {
        request.spec.set_hostname(host.spec.hostname().clone());
        request.machine = host.machine;
    }
    let attachment = match args.detach {
        true => None,
        false => Some(Attachment::prepare(Options {
            input: args.interactive,
            terminal: args.tty,
            forward_signals: Some(paths.container(&request.id).socket()),
            detach_keys: args
                .detach_keys
                .clone()
                .unwrap_or(config.detach_keys.clone()),
        })?),
    };
    let first = match &attachment {
        None => Request::Started,
        Some(attachment) => Request::Attach {
            stdin: args.interactive,
            size: attachment.size(),
        },
    };
    notices(&config, &choice);
    let reservation = Reservation::make(&paths, &request.id, args.name.as_deref())?;
    request.name = reservation.name().to_owned();
    // Until the container is there to be seen, this process keeps its image from being removed.
    let _hold = images::store(&config)?.hold(&image, &request.id)?;
    timings.step("request", begin);

    let stream = client::launch(&paths, &request, &first)?;
    let reply = match &attachment {
        None => client::read_reply(&stream).map(Ok).map_err(Error::from),
        Some(attachment) => attachment.wait_for_reply(&stream),
    };
    let reply = match reply {
        Ok(Ok(reply)) => reply,
        Ok(Err(signal)) => {
            // Interrupted before the container ran: nothing of it is to stay.
            drop(stream);
            client::remove(&paths, &request.id, true)?;
            return Ok(Started::Interrupted(signal));
        }
        Err(error) => {
            if args.rm {
                // A sandbox process that was killed could not do it. The error that is reported says why.
                let _ = client::remove(&paths, &request.id, true);
            }
            return Err(error);
        }
    };
    if let Reply::Started(steps) = reply {
        timings.steps.extend(steps.steps);
    }
    Ok(match attachment {
        None => Started::Detached(request.id),
        Some(attachment) => Started::Attached {
            name: request.name,
            attachment,
            stream,
        },
    })
}

/// What was asked for the container whose machine this one joins, if it joins one.
fn machine_of(
    args: &Args,
    config: &Config,
    network: &NetworkRequest,
    paths: &Paths,
) -> Result<Option<RunRequest>> {
    let Some(AttachRequest::Container { id }) = &network.attach else {
        return Ok(None);
    };
    let given = [
        (args.hostname.is_some(), "--hostname"),
        (args.machine.is_some(), "--machine"),
        (args.kernel.is_some(), "--kernel"),
        (
            args.sysctl.iter().any(|(name, _)| name.starts_with("net.")),
            "--sysctl net.…",
        ),
    ];
    if let Some((_, option)) = given.into_iter().find(|(given, _)| *given) {
        return Err(Error::new(format!(
            "{option}: the container is in the machine of another one (--network container:…)"
        )));
    }
    let (_, host) = client::machine_of(paths, id)?;
    if config.hardware_isolation && !host.machine.choice.hardware {
        let kind = host.machine.choice.kind;
        return Err(hull_machine::Error::NotHardware { kind }.into());
    }
    if args
        .memory
        .is_some_and(|memory| memory > host.machine.memory)
    {
        return Err(Error::new(format!(
            "--memory: the machine of container {} has {} MiB",
            host.name,
            host.machine.memory >> 20
        )));
    }
    Ok(Some(host))
}

/// Longest path of a socket (`sun_path` in unix(7)), without the zero byte at its end.
const LONGEST_SOCKET: usize = 107;

/// What can be found wrong before an image is pulled.
fn check(args: &Args, paths: &Paths) -> Result<()> {
    mounts::check_distinct(&args.volume, &args.tmpfs).map_err(Error::new)?;
    spec::capabilities(&args.cap_add, &args.cap_drop)?;
    seccomp(&args.security_opt)?;
    let longest = paths
        .container(&"0".repeat(64))
        .devices()
        .join("entropy.sock");
    let excess = longest.as_os_str().len().saturating_sub(LONGEST_SOCKET);
    if excess > 0 {
        return Err(Error::new(format!(
            "run_dir {} is too long for the sockets in it, by {excess} characters",
            paths.run().display()
        ))
        .hint("set a shorter run_dir in the configuration"));
    }
    for volume in &args.volume {
        let source = volume.source.display();
        match std::fs::metadata(&volume.source) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    Error::new(format!("host path {source} of a volume does not exist"))
                        .hint(format!("mkdir -p {source}")),
                );
            }
            Err(error) => {
                return Err(error)
                    .context(|| format!("cannot read the host path {source} of a volume"));
            }
        }
    }
    if let Some(milli) = args.cpus {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        if milli > available as u64 * 1000 {
            return Err(Error::new(format!(
                "--cpus: {} CPUs are asked for, and there are {available}",
                milli as f64 / 1000.0
            )));
        }
    }
    if let Some(name) = &args.name
        && let Ok(id) = names::find(paths, name)
        && id != *name
        && paths.names().join(name).symlink_metadata().is_ok()
    {
        return Err(Error::new(format!(
            "the container name {name:?} is in use by container {}",
            id.get(..12).unwrap_or(&id)
        ))
        .hint(format!("hull rm {name}, or choose another --name")));
    }
    Ok(())
}

/// Everything but the name of the request.
fn request(
    args: &Args,
    config: &Config,
    network: NetworkRequest,
    environment: Vec<OsString>,
    image: &hull_image::Image,
    choice: &hull_machine::Choice,
    initramfs: &Path,
) -> Result<RunRequest> {
    let id = names::new_id()?;
    let features = choice.features()?;
    let no_zero = |limit: u64| (limit > 0).then_some(limit);
    let memory = args.memory.and_then(no_zero);
    let cpus_milli = args.cpus.and_then(no_zero);
    let pids_limit = args.pids_limit.unwrap_or(config.pids_limit);
    let volumes: Vec<hull_sandbox::Volume> = args
        .volume
        .iter()
        .map(|volume| hull_sandbox::Volume {
            source: volume.source.clone(),
            target: volume.destination.clone(),
            read_only: volume.read_only,
        })
        .collect();
    let options = ContainerOptions {
        command: args.words.iter().skip(1).cloned().collect(),
        entrypoint: args.entrypoint.clone(),
        environment,
        directory: args.workdir.clone(),
        user: args.user.clone(),
        hostname: args
            .hostname
            .clone()
            .unwrap_or_else(|| id.get(..12).unwrap_or(&id).to_owned()),
        terminal: args.tty,
        read_only: args.read_only,
        tmpfs: args
            .tmpfs
            .iter()
            .map(|tmpfs| (tmpfs.destination.clone(), tmpfs.options.clone()))
            .collect(),
        volumes: volumes.clone(),
        capabilities_add: args.cap_add.clone(),
        capabilities_drop: args.cap_drop.clone(),
        sysctl: args.sysctl.iter().cloned().collect(),
        ulimits: args
            .ulimit
            .iter()
            .map(|limit| (limit.name.clone(), limit.soft, limit.hard))
            .collect(),
        shm_size: args.shm_size.and_then(no_zero).unwrap_or(config.shm_size),
        init: args.init,
        memory,
        cpus_milli,
        pids_limit: (pids_limit > 0).then_some(pids_limit),
        seccomp: seccomp(&args.security_opt)?,
        has_32_bits: features.compat32,
        no_new_privileges: no_new_privileges(&args.security_opt),
    };
    let built = spec::build(&options, &image.config)?;
    let mut labels = image.config.labels.clone();
    labels.extend(args.label.iter().cloned());
    // A limit above what the kind of machine has is kept all the same.
    let cpus = features.vcpus(cpus_milli.map_or(config.cpus, |milli| {
        u32::try_from(milli.div_ceil(1000)).unwrap_or(1)
    }));
    Ok(RunRequest {
        id,
        name: String::new(),
        image: args
            .words
            .first()
            .map(|word| word.to_string_lossy().into_owned())
            .unwrap_or_default(),
        image_id: image.id.clone(),
        layers: image.layers.clone(),
        spec: built.spec,
        raw_args: built.raw_args,
        raw_env: built.raw_env,
        volumes,
        machine: MachineRequest {
            choice: choice.clone(),
            initramfs: initramfs.to_owned(),
            memory: memory.map_or(config.memory, MachineRequest::memory_for),
            cpus,
            nets: network.attach.is_some().into(),
        },
        auto_remove: args.rm,
        stdin: args.interactive,
        stop_signal: args
            .stop_signal
            .clone()
            .or_else(|| image.config.stop_signal.clone())
            .unwrap_or_else(|| "TERM".to_owned()),
        network,
        names: args.network.names(),
        labels,
        log_size: config.log_size,
        began_ns: *BEGAN.get_or_init(now_ns),
    })
}

/// The filter that the options ask for; the last one counts.
fn seccomp(options: &[SecurityOption]) -> Result<Seccomp> {
    let mut seccomp = Seccomp::Default;
    for option in options {
        match option {
            SecurityOption::Unconfined => seccomp = Seccomp::Unconfined,
            SecurityOption::Seccomp(file) => {
                seccomp = Seccomp::Profile(Box::new(Profile::read(file)?));
            }
            SecurityOption::NoNewPrivileges(_) => {}
        }
    }
    Ok(seccomp)
}

fn no_new_privileges(options: &[SecurityOption]) -> bool {
    let said = options.iter().rev().find_map(|option| match option {
        SecurityOption::NoNewPrivileges(yes) => Some(*yes),
        _ => None,
    });
    said.unwrap_or(false)
}

/// What the user has to know before the first container.
fn notices(config: &Config, choice: &hull_machine::Choice) {
    // Said to people, once: in the standard error of a script's container it would only be in the way.
    let told = config.data_dir.join("isolation-notice");
    if !choice.hardware
        && std::io::stderr().is_terminal()
        && std::fs::File::create_new(told).is_ok()
    {
        output::note(format!(
            "note: machine {} isolates by a kernel of its own, not by hardware; `hull check` says more (shown once)",
            choice.kind
        ));
    }
}

fn print_timings(timings: &Timings) {
    let mut steps: Vec<_> = timings.steps.iter().collect();
    steps.sort_by_key(|step| step.begin_us);
    let milliseconds = |micros: u64| format!("{:9.2}", micros as f64 / 1000.0);
    let mut table = Table::new(&["STEP", " BEGIN ms", "  TOOK ms"]);
    for step in steps {
        table.row([
            step.name.clone(),
            milliseconds(step.begin_us),
            milliseconds(step.took_us),
        ]);
    }
    output::note(table.render().trim_end());
}

/// The environment of files and options, options last.
pub fn gather_environment(files: &[PathBuf], given: &[OsString]) -> Result<Vec<OsString>> {
    let mut variables = Vec::new();
    for file in files {
        let text = std::fs::read(file)
            .context(|| format!("cannot read the environment file {}", file.display()))?;
        variables.extend(values::environment_file(file, &text).map_err(Error::new)?);
    }
    for variable in given {
        variables.extend(values::environment(variable).map_err(Error::new)?);
    }
    Ok(variables)
}

/// Refuses a container's terminal whose input would come from somewhere else, in Docker's words.
pub fn check_terminal() -> Result<()> {
    if rustix::termios::isatty(std::io::stdin()) {
        Ok(())
    } else {
        Err(Error::new("the input device is not a TTY").hint("leave out -t, or -i"))
    }
}

fn status_of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// What the command does when its attachment has ended. The number is the exit status.
pub fn finish(outcome: Outcome, name: &str) -> Result<u8> {
    Ok(match outcome {
        Outcome::Exited(exit) => {
            if let Some(reason) = exit.reason {
                Error::new(format!("container {name}: {reason}")).print();
            }
            u8::try_from(exit.status).unwrap_or(u8::MAX)
        }
        Outcome::Detached => {
            output::note("read escape sequence");
            0
        }
        Outcome::Interrupted(signal) => status_of_signal(signal),
        // As a program that SIGPIPE ends.
        Outcome::OutputClosed => status_of_signal(nix::sys::signal::Signal::SIGPIPE as i32),
    })
}
