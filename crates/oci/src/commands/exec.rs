//! `exec`.

use std::fs;
use std::path::PathBuf;

use hull_sandbox::config::{ProcessConfig, RawArgs, Stdio, TerminalSize};
use hull_sandbox::control::protocol::Request;
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::store::State;
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

use super::life::load;
use super::{Settings, refuse_descriptors, with_runc_wording, write_pid_file};
use crate::bundle::process_for_guest;
use crate::console;
use crate::container::connect;
use crate::keeper::{self, HeldSignals, Mode};

/// Options of `exec`.
#[derive(Debug, Default)]
pub struct ExecOptions {
    /// The container.
    pub id: String,
    /// File with an OCI process object; the options from `args` on apply only without it.
    pub process: Option<PathBuf>,
    /// Arguments.
    pub args: Vec<String>,
    /// `NAME=VALUE`, added to the container's environment.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// User and group.
    pub user: Option<(u32, Option<u32>)>,
    /// Additional groups.
    pub additional_gids: Vec<u32>,
    /// Capabilities to add, with the prefix `CAP_`.
    pub capabilities: Vec<String>,
    /// Set no_new_privs.
    pub no_new_privileges: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// Return once the process has started.
    pub detach: bool,
    /// Socket that receives the terminal's master.
    pub console_socket: Option<PathBuf>,
    /// File that receives the keeper's process id.
    pub pid_file: Option<PathBuf>,
    /// Number of descriptors to pass on; refused unless 0.
    pub preserve_fds: u32,
    /// Execute in a paused container, too; refused if it is.
    pub ignore_paused: bool,
    /// Control group below the container's; refused.
    pub cgroup: Option<String>,
}

/// Executes another process in a container. Returns its exit status, or 0 if detached.
///
/// # Errors
/// `NotFound` if the container does not exist; `WrongState` if it is not running; `CommandNotFound`
/// or `NotExecutable` if the command cannot be executed.
pub fn exec(settings: &Settings, options: &ExecOptions) -> Result<i32> {
    refuse_descriptors(options.preserve_fds)?;
    if let Some(group) = options.cgroup.as_ref().filter(|group| *group != "/") {
        return Err(Error::unsupported(format_args!(
            "--cgroup {group}: a process is executed in the container's own control group"
        )));
    }
    let (container, record, status) = load(settings, &options.id)?;
    // runc's messages.
    match status {
        State::Stopped => {
            return Err(Error::wrong_state("cannot exec in a stopped container"));
        }
        State::Paused if options.ignore_paused => {
            return Err(Error::unsupported(
                "--ignore-paused: a process in a paused container",
            ));
        }
        State::Paused => return Err(Error::wrong_state("cannot exec in a paused container")),
        State::Creating => {
            return Err(Error::wrong_state(
                "cannot exec in a container that is being created",
            ));
        }
        State::Created | State::Running => {}
    }
    let mut process: Value = match &options.process {
        Some(path) => {
            let text = fs::read(path).context(|| format!("read {}", path.display()))?;
            serde_json::from_slice(&text).context(|| format!("read {}", path.display()))?
        }
        None => from_options(&container.config()?["process"], options)?,
    };
    for note in process_for_guest(&mut process) {
        (settings.warn)(&note);
    }
    if let Some(object) = process.as_object_mut()
        && options.process.is_some()
        && options.tty
    {
        object.insert("terminal".into(), json!(true));
    }
    let terminal = process["terminal"].as_bool().unwrap_or_default();
    if terminal && options.detach && options.console_socket.is_none() {
        return Err(Error::new(
            "cannot allocate tty if hull-oci will detach without setting console socket",
        ));
    }
    if !terminal && options.console_socket.is_some() {
        return Err(Error::new(
            "cannot use console socket if hull-oci will not detach or allocate tty",
        ));
    }
    let args: Vec<String> = process["args"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|arg| arg.as_str().map(str::to_owned))
        .collect();
    if args.is_empty() {
        return Err(Error::new("process args cannot be empty"));
    }
    let client = connect(&record)?;
    let text = to_raw_value(&process).context(|| "encode the process")?;
    let ask = |keeper: i32, size: Option<(u16, u16)>| {
        let request = Request::Exec(Box::new(ProcessConfig {
            container: options.id.clone(),
            process: text.clone(),
            raw: RawArgs::default(),
            stdio: Stdio::Handover {
                terminal,
                stdin: true,
            },
            keeper: Some(keeper),
            size: size.map(|(rows, columns)| TerminalSize { rows, columns }),
        }));
        client.streams(&request).map_err(with_runc_wording)
    };
    let named = size(&process);
    if !options.detach && options.console_socket.is_none() {
        let own = std::process::id().cast_signed();
        let size = match terminal {
            true => named.or_else(keeper::own_terminal_size),
            false => None,
        };
        let held = HeldSignals::hold()?;
        let streams = ask(own, size)?;
        write_pid_file(options.pid_file.as_deref(), own)?;
        return keeper::keep_here(terminal, &client, streams, &held);
    }
    let slave = match &options.console_socket {
        Some(socket) => Some(console::send_master(socket, named)?),
        None => None,
    };
    let keeper = keeper::spawn(&args, None, &record.details.groups.directories, true)?;
    // Engines set the size when they have the master: the process is to see it from the beginning.
    let size = slave.as_ref().and_then(keeper::size_of).or(named);
    let held = match options.detach {
        true => None,
        false => Some(HeldSignals::hold()?),
    };
    let streams = ask(keeper.pid(), size)?;
    let mode = match slave {
        Some(_) => Mode::Terminal,
        None => Mode::Pipes,
    };
    let mut kept = keeper.keep(mode, client, streams, slave)?;
    write_pid_file(options.pid_file.as_deref(), kept.pid())?;
    match held {
        Some(held) => kept.wait(&held),
        None => Ok(0),
    }
}

fn size(process: &Value) -> Option<(u16, u16)> {
    let number = |name: &str| {
        process["consoleSize"][name]
            .as_u64()
            .and_then(|number| u16::try_from(number).ok())
            .filter(|number| *number > 0)
    };
    Some((number("height")?, number("width")?))
}

/// The container's init process, modified by the options.
fn from_options(init: &Value, options: &ExecOptions) -> Result<Value> {
    let mut process = init.clone();
    let Some(object) = process.as_object_mut() else {
        return Err(Error::new("the container's config.json has no process"));
    };
    object.insert("args".into(), json!(options.args));
    object.insert("terminal".into(), json!(options.tty));
    object.remove("consoleSize");
    let mut env = object
        .get("env")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    env.extend(options.env.iter().map(|variable| json!(variable)));
    object.insert("env".into(), json!(env));
    if let Some(cwd) = &options.cwd {
        object.insert("cwd".into(), json!(cwd));
    }
    if let Some((uid, gid)) = options.user {
        process["user"] = json!({"uid": uid, "gid": gid.unwrap_or(0)});
    }
    if !options.additional_gids.is_empty() {
        process["user"]["additionalGids"] = json!(options.additional_gids);
    }
    if options.no_new_privileges {
        process["noNewPrivileges"] = json!(true);
    }
    for capability in &options.capabilities {
        for set in [
            "bounding",
            "effective",
            "permitted",
            "ambient",
            "inheritable",
        ] {
            let list = &mut process["capabilities"][set];
            let mut names = list.as_array().cloned().unwrap_or_default();
            if !names.iter().any(|name| name == capability) {
                names.push(json!(capability));
            }
            *list = json!(names);
        }
    }
    Ok(process)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn options_change_the_containers_own_process() {
        let init = json!({
            "args": ["init"], "env": ["A=1"], "cwd": "/", "terminal": true,
            "user": {"uid": 5, "gid": 6}, "capabilities": {"bounding": ["CAP_KILL"]},
        });
        let options = ExecOptions {
            args: vec!["id".into()],
            env: vec!["B=2".into()],
            user: Some((7, None)),
            capabilities: vec!["CAP_CHOWN".into()],
            ..ExecOptions::default()
        };
        let process = from_options(&init, &options).unwrap();
        assert_eq!(process["args"], json!(["id"]));
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["terminal"], json!(false));
        assert_eq!(process["user"], json!({"uid": 7, "gid": 0}));
        assert_eq!(
            process["capabilities"]["bounding"],
            json!(["CAP_KILL", "CAP_CHOWN"])
        );
        assert_eq!(process["cwd"], json!("/"));
    }
}
