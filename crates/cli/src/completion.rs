//! Completion of command lines. The script that `hull completions` prints calls the executable with
//! the words typed so far, and [`answer`] says what may follow: the grammar, and the containers,
//! images, volumes and networks that there are.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Arg, Command, CommandFactory};
use clap_complete::CompleteEnv;
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::Shells;
use hull_engine::config::Config;
use hull_engine::listing::{KEYS, STATES};
use hull_engine::volumes::store;
use hull_engine::{container, networks};
use hull_image::{Reference, Store};
use hull_sandbox::store::State;

use crate::cli::Hull;
use crate::oci;

/// With the name of a shell: asks for a completion. Set by the shell's script only.
const VARIABLE: &str = "HULL_COMPLETE";

/// The signals that people send.
const SIGNALS: [&str; 10] = [
    "HUP", "INT", "QUIT", "KILL", "USR1", "USR2", "TERM", "CONT", "STOP", "WINCH",
];

/// Whether a completion was asked for; then it has been printed.
pub fn answer(arguments: &[OsString]) -> clap::error::Result<bool> {
    if std::env::var_os(VARIABLE).is_none() {
        return Ok(false);
    }
    let called_as = arguments.first().map(Path::new).and_then(Path::file_name);
    let of_engines = called_as == Some(OsStr::new("hull-oci"));
    let grammar = || {
        let grammar = match of_engines {
            true => oci::grammar(),
            false => hull(),
        };
        match begins_option(arguments) {
            true => grammar,
            false => without_options(grammar),
        }
    };
    CompleteEnv::with_factory(grammar)
        .var(VARIABLE)
        .try_complete(arguments, std::env::current_dir().ok().as_deref())
}

/// Whether the word that is completed is an option. bash and zsh say which word that is; with the
/// others it is the last one.
fn begins_option(arguments: &[OsString]) -> bool {
    let mut words = arguments.split(|word| word == "--").skip(1);
    let index = std::env::var("_CLAP_COMPLETE_INDEX");
    let index = index.ok().and_then(|index| index.parse::<usize>().ok());
    let word = words.next().and_then(|words| match index {
        Some(index) => words.get(index),
        None => words.last(),
    });
    word.is_some_and(|word| word.as_encoded_bytes().starts_with(b"-"))
}

/// Offers options only when the word begins with `-`, or where nothing else can follow.
fn without_options(command: Command) -> Command {
    let hide = |argument: Arg| {
        let is_option = !argument.is_positional();
        argument.hide(is_option)
    };
    command
        .disable_help_flag(true)
        .disable_version_flag(true)
        .mut_args(hide)
        .mut_subcommands(without_options)
}

/// The script of a shell for a command; `None` for a shell without completion.
pub fn script(shell: &str, command: &str) -> Option<std::io::Result<Vec<u8>>> {
    let shells = Shells::builtins();
    let shell = shells.completer(shell)?;
    let mut script = Vec::new();
    let written = shell.write_registration(VARIABLE, command, command, command, &mut script);
    if shell.name() == "zsh" {
        // zsh loads the file as the function _COMMAND when it completes for the first time, and
        // then expects an answer.
        let function = format!("_clap_dynamic_completer_{}", command.replace('-', "_"));
        script.extend(
            format!("[ \"$funcstack[1]\" = \"_{command}\" ] && {function} \"$@\"\n").into_bytes(),
        );
    }
    Some(written.map(|()| script))
}

/// The grammar with candidates, which are chosen by the names of values.
fn hull() -> Command {
    Hull::command().mut_subcommands(with_candidates)
}

fn with_candidates(command: Command) -> Command {
    let up_only = matches!(
        command.get_name(),
        "attach" | "exec" | "kill" | "pause" | "stats" | "stop" | "top" | "unpause" | "wait"
    );
    let lists_containers = command.get_name() == "ps";
    let command = command.mut_args(|argument| {
        let names = argument.get_value_names().unwrap_or_default();
        match (
            names.first().map(|name| name.as_str()),
            argument.get_id().as_str(),
        ) {
            (Some("CONTAINER"), _) => {
                argument.add(ArgValueCompleter::new(First(move || containers(up_only))))
            }
            (Some("IMAGE"), _) => argument.add(ArgValueCompleter::new(First(images))),
            (Some("VOLUME"), _) => argument.add(ArgValueCandidates::new(volumes)),
            (Some("NETWORK"), _) => argument.add(ArgValueCandidates::new(network_names)),
            (Some("NAME"), "names") => argument.add(ArgValueCandidates::new(|| {
                containers(false).into_iter().chain(images()).collect()
            })),
            (Some("SIGNAL"), _) => {
                argument.add(ArgValueCandidates::new(|| SIGNALS.map(Into::into).into()))
            }
            (_, "source" | "destination") => {
                argument.add(ArgValueCompleter::new(container_or_file))
            }
            (_, "filters") if lists_containers => argument.add(ArgValueCandidates::new(|| {
                let states = STATES.map(|state| format!("status={state}").into());
                let keys = KEYS.into_iter().filter(|key| *key != "status");
                let keys = keys.map(|key| format!("{key}=").into());
                states.into_iter().chain(keys).collect()
            })),
            _ => argument,
        }
    });
    command.mut_subcommands(with_candidates)
}

/// Completes the first of an argument's values; the others are a command's.
struct First<F>(F);

impl<F: Fn() -> Vec<CompletionCandidate> + Send + Sync> ValueCompleter for First<F> {
    fn complete(&self, current: &OsStr) -> Vec<CompletionCandidate> {
        let current = current.to_string_lossy();
        let mut candidates = (self.0)();
        candidates.retain(|one| one.get_value().to_string_lossy().starts_with(&*current));
        candidates
    }

    fn complete_at(&self, index: usize, current: &OsStr) -> Vec<CompletionCandidate> {
        match index {
            0 => self.complete(current),
            _ => Vec::new(),
        }
    }
}

/// What there is, as the configuration in force says where. What cannot be read has no candidates:
/// a shell that waits for a completion has no place for messages.
fn configured() -> Option<Config> {
    Config::load_for_existing().ok().map(|(config, _)| config)
}

/// Containers of hull's own.
fn containers(up_only: bool) -> Vec<CompletionCandidate> {
    let is_up = |container: &container::Container| {
        matches!(container.status.state, State::Running | State::Paused)
    };
    let listed = configured().and_then(|config| container::list(&config.paths()).ok());
    listed
        .into_iter()
        .flatten()
        .flatten()
        .filter(|container| !up_only || is_up(container))
        .map(|container| container.record.details.name.into())
        .collect()
}

fn volumes() -> Vec<CompletionCandidate> {
    let listed = configured().and_then(|config| store::list(&config.paths()).ok());
    let listed = listed.into_iter().flatten().flatten();
    listed.map(|volume| volume.name.into()).collect()
}

/// Those that people created, and those that are always there.
fn network_names() -> Vec<CompletionCandidate> {
    let Some(config) = configured() else {
        return Vec::new();
    };
    let listed = networks::list(&config.paths()).unwrap_or_default();
    let listed = listed.into_iter().map(|network| network.name);
    let always = ["default", "none"].map(str::to_owned);
    listed.chain(always).map(Into::into).collect()
}

fn images() -> Vec<CompletionCandidate> {
    let listed = configured().and_then(|config| {
        let store = Store::open(config.data_dir.join("images"));
        store.and_then(|store| store.list()).ok()
    });
    listed
        .into_iter()
        .flatten()
        .filter_map(|image| image.reference)
        .filter_map(|name| name.parse::<Reference>().ok())
        .map(|reference| {
            let name = reference.familiar();
            CompletionCandidate::new(name.strip_suffix(":latest").unwrap_or(&name))
        })
        .collect()
}

/// `CONTAINER:` or a file of the host.
fn container_or_file(current: &OsStr) -> Vec<CompletionCandidate> {
    let containers = containers(false).into_iter();
    let mut candidates: Vec<_> = containers
        .map(|name| name.get_value().to_string_lossy().into_owned() + ":")
        .filter(|name| name.starts_with(&*current.to_string_lossy()))
        .map(CompletionCandidate::new)
        .collect();
    candidates.extend(PathCompleter::any().complete(current));
    candidates
}
