//! The containerd shim, `containerd-shim-hull-v2`: what containerd, Kubernetes (CRI), CRI-O and
//! Docker call instead of a command line.
//!
//! [`bootstrap`] is what containerd executes for a moment: `start`, `delete` and `-info`. `start`
//! leaves a server behind, one for each pod, which *is* the pod's sandbox process: the library
//! `hull_sandbox` boots the machine in it, [`task`] answers containerd's calls, [`events`] tells
//! containerd what happens. No keepers, no control protocol between them.
//!
//! | module | what it has |
//! | --- | --- |
//! | [`flags`] | the command line, in Go's notation |
//! | [`bootstrap`] | `start`, `delete`, `-info`: answers for each version of containerd |
//! | [`server`] | the process that stays, from its first to its last moment |
//! | [`pod`] | the sandbox and its containers |
//! | [`boot`] | its machine |
//! | [`create`] | a container of a bundle |
//! | [`process`] | an init or a further process, with its streams and its end |
//! | [`stand_in`] | what stands for a container on the host: a process id, a network namespace |
//! | [`task`] | the task service |
//! | [`sandbox`] | the sandbox service of containerd 2 |
//! | [`stdio`] | fifos and files |
//! | [`streaming`] | streams of containerd 2 |
//! | [`options`] | what containerd's configuration says of the runtime |
//! | [`wire`] | protobuf messages by the numbers of their fields |
//! | [`events`] | what containerd is told |
//! | [`metrics`] | `io.containerd.cgroups.v2.Metrics` |
//!
//! Called by `cli` under the shim's name. What it reads of a guest are the typed answers of
//! `hull_sandbox`.

mod boot;
pub mod bootstrap;
mod create;
mod events;
mod flags;
mod metrics;
mod options;
mod pod;
mod process;
mod sandbox;
mod server;
mod stand_in;
mod stdio;
mod streaming;
mod task;
mod wire;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use hull_sandbox::config::{MachineConfig, NetworkLimits};
use hull_sandbox::{Error, ErrorKind, Result};

/// The name by which containerd calls the shim: its runtime is `io.containerd.hull.v2`.
pub const NAME: &str = "containerd-shim-hull-v2";

/// What a machine is made for.
#[derive(Debug, Default)]
pub struct Size {
    /// Memory limit of its containers, bytes.
    pub memory: Option<u64>,
    /// Limit of processors, thousandths of one.
    pub cpus: Option<u64>,
    /// Annotations of the pod that are allowed: they decide instead.
    pub annotations: BTreeMap<String, String>,
}

/// Configures a machine.
pub type MachineMaker = Box<dyn Fn(&Size) -> Result<MachineConfig> + Send + Sync>;

/// What the shim takes from hull's configuration.
pub struct Settings {
    /// hull's directory of run-time state.
    pub run_directory: PathBuf,
    /// Called only when a machine is needed: its error is that of the container.
    pub machine: MachineMaker,
    /// Limits for networks that engines set up.
    pub network: NetworkLimits,
    /// Processors of one core run one machine at a time.
    pub core_scheduling: bool,
    /// Annotations that pods may have.
    pub annotations: Vec<String>,
    /// gRPC status of a kind of error.
    pub grpc: fn(ErrorKind) -> i32,
}

/// Executes the shim's command line; `settings` is called when something of the configuration is
/// needed.
///
/// # Errors
/// What containerd shows as the reason of its own error, when it is printed to standard error.
pub fn main(
    arguments: &[OsString],
    settings: impl FnOnce(Option<&Path>) -> Result<Settings>,
) -> Result<()> {
    let flags = flags::Flags::parse(arguments)?;
    match flags.action.as_str() {
        _ if flags.version => {
            println_version();
            Ok(())
        }
        _ if flags.info => bootstrap::info(),
        "start" => bootstrap::start(&flags),
        "delete" => bootstrap::delete(&flags, settings),
        // Its environment names the configuration.
        "" => server::run(flags, || settings(None)),
        other => Err(Error::invalid(format!("unknown action {other:?}"))
            .hint("containerd calls it with start or delete")),
    }
}

#[allow(clippy::print_stdout)]
fn println_version() {
    println!("{NAME} {}", env!("CARGO_PKG_VERSION"));
}

/// An error in one text, for containerd: `kubectl describe` shows it to people.
fn text(error: &Error) -> String {
    let mut text = error.message.clone();
    if let Some(hint) = &error.hint {
        text.push_str(" (hint: ");
        text.push_str(hint);
        text.push(')');
    }
    if !error.console.is_empty() {
        text.push_str("; last lines of the guest's console: ");
        text.push_str(&error.console.join(" | "));
    }
    text
}
