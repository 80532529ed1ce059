//! The grammar of `hull-oci`: names, meanings and short forms as in runc.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use hull_oci::update::Limits;

/// What `--version` prints below the name: engines read the line with the specification.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

/// OCI runtime whose containers run in small virtual machines, each with a Linux kernel of its own.
#[derive(Debug, Parser)]
#[command(
    name = "hull-oci",
    bin_name = "hull-oci",
    version = VERSION,
    disable_version_flag = true,
    args_override_self = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct HullOci {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
    /// Print version
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
}

/// Options of all commands, before the command's name.
#[derive(Debug, Args)]
pub struct Global {
    /// Enable debug output in the log
    #[arg(long)]
    pub debug: bool,
    /// File that errors are logged to; standard error when absent
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of the log
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Directory for the state of containers [default: /run/hull-oci]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// `cgroupsPath` is SLICE:PREFIX:NAME
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Without root: hull-oci finds out by itself; only `true` without root's rights is an error
    #[arg(long, value_name = "BOOL", default_value = "auto")]
    rootless: String,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// key=value.
    Text,
    /// One object per line.
    Json,
}

/// Format of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a container, whose process then waits for `start`
    Create(Create),
    /// Let the process of a created container run
    Start(Id),
    /// Print the state of a container as JSON
    State(Id),
    /// Send a signal to a container's process
    Kill(Kill),
    /// Remove a container
    Delete(Delete),
    /// Create and start a container, and wait for its end
    Run(Run),
    /// Execute another process in a running container
    Exec(Box<Exec>),
    /// List the processes that stand for a container's on the host
    Ps(Ps),
    /// List containers
    #[command(alias = "ls")]
    List(List),
    /// Freeze a container
    Pause(Id),
    /// Let a frozen container go on
    Resume(Id),
    /// Change limits of a container
    Update(Box<Update>),
    /// Print figures and events of a container
    Events(Events),
    /// Write a config.json to start from
    Spec(Spec),
    /// Print what this runtime can do, as JSON
    Features,
    /// Not supported
    Checkpoint(Ignored),
    /// Not supported
    Restore(Ignored),
}

/// A container.
#[derive(Debug, Args)]
pub struct Id {
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// How a bundle becomes a container.
#[derive(Debug, Args)]
pub struct Bundle {
    /// Directory with config.json and the root file system
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Socket to which the master of the terminal is sent
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the process id that stands for the container on the host
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Accepted: the root of a guest can always be pivoted
    #[arg(long)]
    no_pivot: bool,
    /// Accepted: the guest's kernel keeps the container's keys apart from the host's
    #[arg(long)]
    no_new_keyring: bool,
    /// Not supported but for 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
}

/// `create`.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    pub bundle: Bundle,
    /// Name of the new container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub bundle: Bundle,
    /// Return when the process runs
    #[arg(short, long)]
    pub detach: bool,
    /// Do not remove the container at its end
    #[arg(long)]
    pub keep: bool,
    /// Accepted: processes that outlive their parents are the guest's affair
    #[arg(long)]
    no_subreaper: bool,
    /// Name of the new container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// To all processes of the container
    #[arg(short, long)]
    pub all: bool,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Number, or name with or without SIG [default: SIGTERM]
    #[arg(value_name = "SIGNAL", allow_hyphen_values = true)]
    pub signal: Option<String>,
}

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// Kill it first when it runs; succeed when it is not there
    #[arg(short, long)]
    pub force: bool,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// Socket to which the master of the terminal is sent
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Environment variable, NAME=VALUE
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// With a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// User and group
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, Option<u32>)>,
    /// Additional group
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// File with the process as JSON
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Return when the process runs
    #[arg(short, long)]
    pub detach: bool,
    /// File for the process id that stands for the process on the host
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Accepted: a label of the host's kernel means nothing to the guest's
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Accepted: a profile of the host's kernel means nothing to the guest's
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// No new privileges for the process
    #[arg(long)]
    pub no_new_privs: bool,
    /// Capability to add
    #[arg(short, long, value_name = "CAPABILITY")]
    pub cap: Vec<String>,
    /// Not supported but for 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Also in a paused container: not supported, refused when it is paused
    #[arg(long)]
    pub ignore_paused: bool,
    /// Control group below the container's: not supported
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Command and arguments, when there is no --process
    #[arg(
        value_name = "COMMAND",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub command: Vec<String>,
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| {
        text.parse()
            .map_err(|_| format!("{text:?} is not a number"))
    };
    match text.split_once(':') {
        None => Ok((number(text)?, None)),
        Some((user, group)) => Ok((number(user)?, Some(number(group)?))),
    }
}

/// `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Table or JSON
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
    /// Options for ps [default: -ef]
    #[arg(
        value_name = "PS-OPTION",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub ps: Vec<String>,
}

/// `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Table or JSON
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Only ids
    #[arg(short, long)]
    pub quiet: bool,
}

/// `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Time between figures
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub interval: Duration,
    /// Figures once
    #[arg(long)]
    pub stats: bool,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

/// A duration in Go's format: `5s`, `100ms`, `1m30s`.
fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("{text:?} is not a time such as 5s, 100ms or 1m30s");
    let mut rest = text;
    let mut total = 0.0;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let letters = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "" if number == "0" && after.is_empty() => 0.0,
            _ => return Err(invalid()),
        };
        total += number.parse::<f64>().map_err(|_| invalid())? * seconds;
        rest = after;
    }
    Duration::try_from_secs_f64(total).map_err(|_| invalid())
}

/// `spec`.
#[derive(Debug, Args)]
pub struct Spec {
    /// Directory to write it to
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// For a container without root
    #[arg(long)]
    pub rootless: bool,
}

/// Whatever stands behind a command that is not supported.
#[derive(Debug, Args)]
pub struct Ignored {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<String>,
}

/// `update`.
#[derive(Debug, Args)]
pub struct Update {
    /// File with limits as JSON, - for standard input; the other options are ignored then
    #[arg(short, long, value_name = "FILE")]
    pub resources: Option<String>,
    #[command(flatten)]
    flags: LimitFlags,
    /// The container
    #[arg(value_name = "CONTAINER")]
    pub id: String,
}

macro_rules! limit_flags {
    ($($field:ident $help:literal)*) => {
        /// Single limits.
        #[derive(Debug, Args)]
        struct LimitFlags {
            $(
                #[arg(long, value_name = "VALUE", help = $help, allow_hyphen_values = true)]
                $field: Option<String>,
            )*
        }

        impl Update {
            /// The single limits.
            pub fn limits(&self) -> Limits {
                Limits { $($field: self.flags.$field.clone(),)* }
            }
        }
    };
}

limit_flags! {
    blkio_weight "Weight of input and output, 10 to 1000"
    cpu_period "Period of the quota, microseconds"
    cpu_quota "Processor time in a period, microseconds; -1 lifts it"
    cpu_burst "Processor time that may be saved up, microseconds"
    cpu_share "Weight of processor time"
    cpuset_cpus "Processors of the host"
    cpuset_mems "Memory nodes of the host"
    cpu_rt_period "Period of real-time processor time, microseconds"
    cpu_rt_runtime "Real-time processor time in a period, microseconds"
    cpu_idle "Runs only when nothing else does, 0 or 1"
    memory "Memory, with a unit (k, m, g); -1 lifts it"
    memory_reservation "Memory that it is shrunk to when memory is short"
    memory_swap "Memory and swap together; -1 lifts it"
    pids_limit "Number of processes; -1 lifts it"
    kernel_memory "Ignored, as by runc"
    kernel_memory_tcp "Ignored, as by runc"
    l3_cache_schema "Not supported"
    mem_bw_schema "Not supported"
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> HullOci {
        HullOci::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn the_grammar_is_consistent() {
        HullOci::command().debug_assert();
    }

    #[test]
    fn what_engines_call_is_understood() {
        for line in [
            "hull-oci create --bundle /b --pid-file /p --console-socket /s c1",
            "hull-oci --root /r --log /l --log-format json create --bundle /b --pid-file /p --no-pivot --no-new-keyring c1",
            "hull-oci --systemd-cgroup --debug start c1",
            "hull-oci exec --pid-file /p --process /f --detach --tty --console-socket /s c1",
            "hull-oci exec --process /f c1",
            "hull-oci kill c1 9",
            "hull-oci kill --all c1 SIGKILL",
            "hull-oci delete --force c1",
            "hull-oci update --resources - c1",
            "hull-oci update --memory-swap -1 --memory 64m c1",
            "hull-oci ps --format json c1",
            "hull-oci ps c1 -o pid,args",
            "hull-oci events --stats c1",
            "hull-oci events --interval 100ms c1",
            "hull-oci exec -e A=1 -u 5:6 c1 ls -l",
            "hull-oci run -d --bundle /b c1",
            "hull-oci --rootless true list -q",
            "hull-oci checkpoint --image-path /x c1",
            "hull-oci features",
        ] {
            parse(line);
        }
    }

    #[test]
    fn times_are_gos() {
        assert_eq!(duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("1.5s100ms").unwrap(), Duration::from_millis(1600));
        for wrong in ["", "5", "s", "5x", "-1s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
