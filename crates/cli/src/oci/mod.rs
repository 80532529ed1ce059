//! The executable as `hull-oci`: runc's command line, for engines. Passes arguments to crate `oci`,
//! prints results to standard output, and logs errors in the format that engines parse.

mod arguments;
mod log;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use hull_oci::commands::{self, CreateOptions, ExecOptions, Settings};
use hull_oci::container::Root;
use hull_oci::{default_spec, features, signal, stats, update};
use hull_sandbox::config::MachineConfig;
use hull_sandbox::{Error, Result};
use serde_json::{Value, json};

use crate::error::codes;
use crate::output::Table;
use arguments::{Command, Format, HullOci};
use hull_engine::config::Config;
use hull_engine::guest_files::GuestFiles;

/// Default of `--root`.
const DEFAULT_ROOT: &str = "/run/hull-oci";

/// The grammar, for manual pages and completion.
pub fn grammar() -> clap::Command {
    HullOci::command()
}

/// Executes the command line.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let words = arguments;
    let arguments = match HullOci::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to standard output; if it is closed, there is nowhere to report
            // to.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            };
        }
    };
    if let Err(failure) = log::open(&arguments.global) {
        log::fatal(&failure);
        return ExitCode::FAILURE;
    }
    log::debug(|| format!("hull {}, called as {words:?}", env!("CARGO_PKG_VERSION")));
    let is_exec = matches!(arguments.command, Command::Exec(_));
    match execute(arguments) {
        Ok(status) => {
            log::debug(|| format!("done, status {status}"));
            ExitCode::from(status)
        }
        Err(failure) => {
            log::debug(|| format!("failed: {failure:?}"));
            log::fatal(&failure);
            let codes = codes(failure.kind);
            ExitCode::from(if is_exec { codes.oci_exec } else { 1 })
        }
    }
}

/// Settings of a command. The configuration matters only for new containers: existing ones can be
/// stopped even if it is invalid.
fn settings(global: &arguments::Global) -> Result<Settings> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            Error::new("permission denied: hull-oci must be run as root")
                .hint("containers without root are not supported yet"),
        );
    }
    let loaded = Config::load();
    let config = match &loaded {
        Ok(config) => config.clone(),
        Err(_) => Config::defaults()?,
    };
    Ok(Settings {
        root: Root {
            path: global
                .root
                .clone()
                .unwrap_or_else(|| PathBuf::from(DEFAULT_ROOT)),
        },
        run_directory: config.run_dir.clone(),
        systemd_cgroup: global.systemd_cgroup,
        network: config.network_limits(false),
        core_scheduling: config.core_sched,
        machine: Box::new(move |memory, cpus_milli| machine(&loaded, memory, cpus_milli)),
        warn: log::warn,
    })
}

/// Settings of a command that creates a container.
fn settings_to_create(global: &arguments::Global) -> Result<Settings> {
    Config::load()?;
    settings(global)
}

/// Configures the machine for a container with these limits.
pub fn machine(
    config: &Result<Config>,
    memory: Option<u64>,
    cpus_milli: Option<u64>,
) -> Result<MachineConfig> {
    let config = config.as_ref().map_err(Error::clone)?;
    let guest = GuestFiles::locate(config)?;
    let choice = guest.choose(config, None, None)?;
    Ok(MachineConfig {
        initramfs: guest.initramfs()?,
        memory: memory.map_or(config.memory, MachineConfig::memory_for),
        cpus: hull_engine::run::cpus(&choice, cpus_milli, config),
        choice,
        // Set by `create`.
        nets: 0,
        spare_disks: 0,
        hull: None,
    })
}

fn execute(arguments: HullOci) -> Result<u8> {
    let settings = || settings(&arguments.global);
    let to_create = || settings_to_create(&arguments.global);
    let done = |result: Result<()>| result.map(|()| 0);
    match arguments.command {
        Command::Create(args) => done(commands::create(
            &to_create()?,
            &create_options(args.bundle, &args.id),
        )),
        Command::Run(args) => {
            let options = create_options(args.bundle, &args.id);
            commands::run(&to_create()?, &options, args.detach, args.keep).map(status)
        }
        Command::Start(args) => done(commands::start(&settings()?, &args.id)),
        Command::State(args) => print_json(&commands::state(&settings()?, &args.id)?),
        Command::Kill(args) => {
            let signal = signal::parse(args.signal.as_deref().unwrap_or("SIGTERM"))?;
            done(commands::kill(&settings()?, &args.id, signal, args.all))
        }
        Command::Delete(args) => done(commands::delete(&settings()?, &args.id, args.force)),
        Command::Exec(args) => {
            let settings = settings()?;
            commands::exec(&settings, &exec_options(*args)).map(status)
        }
        Command::Ps(args) => {
            let pids = commands::processes(&settings()?, &args.id)?;
            match args.format {
                Format::Json => print(format!("{}\n", json!(pids))),
                Format::Table => print_processes(&pids, &args.ps),
            }
        }
        Command::List(args) => {
            let listed = commands::list(&settings()?)?;
            match (args.quiet, args.format) {
                (true, _) => print(
                    listed
                        .iter()
                        .filter_map(|state| Some(format!("{}\n", state["id"].as_str()?)))
                        .collect(),
                ),
                (false, Format::Json) => print(format!("{}\n", json!(listed))),
                (false, Format::Table) => print(table(&listed)),
            }
        }
        Command::Pause(args) => done(commands::pause(&settings()?, &args.id)),
        Command::Resume(args) => done(commands::resume(&settings()?, &args.id)),
        Command::Update(args) => {
            let limits = args.limits();
            limits.refused()?;
            limits
                .warnings()
                .iter()
                .for_each(|warning| log::warn(warning));
            let resources = match &args.resources {
                Some(source) => update::read(source)?,
                None => limits.resources()?,
            };
            done(commands::update(&settings()?, &args.id, &resources))
        }
        Command::Events(args) => events(&settings()?, &args),
        Command::Spec(args) => write_spec(&args),
        Command::Features => print_json(&features::features()),
        Command::Checkpoint(_) | Command::Restore(_) => Err(Error::unsupported(
            "checkpoint and restore of a container in a machine",
        )),
    }
}

/// An exit status; the parent process receives only its low 8 bits.
fn status(status: i32) -> u8 {
    u8::try_from(status & 0xff).unwrap_or(u8::MAX)
}

fn create_options(args: arguments::Bundle, id: &str) -> CreateOptions {
    CreateOptions {
        id: id.to_owned(),
        bundle: args.bundle,
        console_socket: args.console_socket,
        pid_file: args.pid_file,
        preserve_fds: args.preserve_fds,
    }
}

fn exec_options(args: arguments::Exec) -> ExecOptions {
    ExecOptions {
        id: args.id,
        process: args.process,
        args: args.command,
        env: args.env,
        cwd: args.cwd,
        user: args.user,
        additional_gids: args.additional_gids,
        capabilities: args.cap,
        no_new_privileges: args.no_new_privs,
        tty: args.tty,
        detach: args.detach,
        console_socket: args.console_socket,
        pid_file: args.pid_file,
        preserve_fds: args.preserve_fds,
        ignore_paused: args.ignore_paused,
        cgroup: args.cgroup,
    }
}

fn print(text: String) -> Result<u8> {
    crate::output::print(text).map(|()| 0)
}

fn print_json(value: &Value) -> Result<u8> {
    print(format!("{value:#}\n"))
}

fn table(listed: &[Value]) -> String {
    let mut table = Table::new(&["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    for state in listed {
        let text = |name: &str| match &state[name] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        table.row(["id", "pid", "status", "bundle", "created", "owner"].map(text));
    }
    table.render()
}

/// Prints the lines of the host's `ps` for these processes, as runc does.
fn print_processes(pids: &[i32], arguments: &[String]) -> Result<u8> {
    let arguments: Vec<&str> = match arguments {
        [] => vec!["-ef"],
        given => given.iter().map(String::as_str).collect(),
    };
    let output = std::process::Command::new("ps")
        .args(&arguments)
        .output()
        .map_err(|error| Error::new(format!("cannot execute ps: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Error::new(format!("ps failed: {}", said.trim())));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let column = head
        .split_whitespace()
        .position(|name| name == "PID")
        .ok_or_else(|| Error::new("cannot find the PID column in what ps printed"))?;
    let is_ours = |line: &&str| {
        line.split_whitespace()
            .nth(column)
            .and_then(|pid| pid.parse().ok())
            .is_some_and(|pid| pids.contains(&pid))
    };
    let shown: Vec<&str> = std::iter::once(head).chain(lines.filter(is_ours)).collect();
    print(format!("{}\n", shown.join("\n")))
}

/// Prints metrics, once or repeatedly until the container exits.
fn events(settings: &Settings, args: &arguments::Events) -> Result<u8> {
    if args.interval.is_zero() {
        return Err(Error::new("duration interval must be greater than 0"));
    }
    let mut kills = None;
    loop {
        let figures = match commands::metrics(settings, &args.id) {
            Ok(figures) => figures,
            // The container exited meanwhile.
            Err(_) if kills.is_some() => return Ok(0),
            Err(failure) => return Err(failure),
        };
        if kills.is_some_and(|kills| figures.memory.oom_kills > kills) {
            print_line(&stats::oom(&args.id))?;
        }
        kills = Some(figures.memory.oom_kills);
        print_line(&stats::event(&args.id, &figures))?;
        if args.stats {
            return Ok(0);
        }
        std::thread::sleep(args.interval.min(Duration::from_secs(86_400)));
    }
}

fn print_line(value: &Value) -> Result<()> {
    print(format!("{value}\n")).map(drop)
}

fn write_spec(args: &arguments::Spec) -> Result<u8> {
    let path = args.bundle.join("config.json");
    let mut file = std::fs::File::create_new(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(format!("file {} exists. Remove it first", path.display()))
        }
        _ => Error::new(format!("cannot create {}: {error}", path.display())),
    })?;
    writeln!(file, "{:#}", default_spec::spec(args.rootless))
        .map_err(|error| Error::new(format!("cannot write {}: {error}", path.display())))?;
    Ok(0)
}
