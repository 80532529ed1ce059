//! `hull exec`: a further process, made of the container's own with what the options change.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use hull_sandbox::config::{ProcessConfig, RawArgs, Stdio, TerminalSize};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

use crate::container::Any;
use crate::error::{Context, Error, Result};
use crate::spec;

/// What a user asks for.
#[derive(Debug, Clone, Default)]
pub struct ExecOptions {
    /// Arguments.
    pub command: Vec<OsString>,
    /// Additional environment, `NAME=VALUE`.
    pub environment: Vec<OsString>,
    /// Working directory; the container's own when absent.
    pub directory: Option<String>,
    /// `user[:group]`; the container's own when absent.
    pub user: Option<String>,
    /// With all capabilities of the guest.
    pub privileged: bool,
    /// Send input.
    pub stdin: bool,
    /// With a terminal.
    pub terminal: bool,
    /// Nobody wants its streams.
    pub detach: bool,
    /// Size of the caller's terminal.
    pub size: Option<TerminalSize>,
}

/// What the sandbox is asked for.
///
/// # Errors
/// There is no command; the container's configuration cannot be read.
pub fn process(container: &Any, options: &ExecOptions) -> Result<ProcessConfig> {
    let raw_env = match container {
        Any::Own(own) => own.record.details.raw_env.clone(),
        Any::Engine(_) => Vec::new(),
    };
    let mut config = container.config()?;
    let (process, raw) = change(config["process"].take(), raw_env, options)?;
    Ok(ProcessConfig {
        container: container.id().to_owned(),
        process: to_raw_value(&process).context(|| "encode the process")?,
        raw,
        stdio: match options.detach && !options.terminal {
            true => Stdio::Null,
            false => Stdio::Handover {
                terminal: options.terminal,
                stdin: options.stdin && !options.detach,
            },
        },
        keeper: None,
        size: options.size,
    })
}

fn change(
    mut process: Value,
    raw_env: Vec<Vec<u8>>,
    options: &ExecOptions,
) -> Result<(Value, RawArgs)> {
    if options.command.is_empty() {
        return Err(Error::invalid("no command to execute"));
    }
    if !process.is_object() {
        return Err(Error::new("the container's configuration has no process"));
    }
    let raw = |list: &[Vec<u8>]| list.iter().any(|text| std::str::from_utf8(text).is_err());
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let command: Vec<Vec<u8>> = options
        .command
        .iter()
        .map(|argument| argument.as_bytes().to_vec())
        .collect();

    let mut environment: Vec<Vec<u8>> = match raw_env.is_empty() {
        true => process["env"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|variable| Some(variable.as_str()?.as_bytes().to_vec()))
            .collect(),
        false => raw_env,
    };
    if options.terminal {
        environment.push(b"TERM=xterm".to_vec());
    }
    environment.extend(options.environment.iter().cloned().map(OsString::into_vec));
    spec::keep_last_of_each(&mut environment);

    process["args"] = command.iter().map(text).collect();
    process["env"] = environment.iter().map(text).collect();
    process["terminal"] = json!(options.terminal);
    if let Some(directory) = &options.directory {
        process["cwd"] = json!(directory);
    }
    if options.privileged {
        let all = spec::capabilities(&["ALL".to_owned()], &[])?;
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = json!(all);
        }
    }
    if let Some(user) = &options.user {
        process["user"] = spec::user_object(user);
    }
    if let Some(object) = process.as_object_mut() {
        object.remove("consoleSize");
        // Policies of the host's kernel, in configurations of engines.
        object.remove("apparmorProfile");
        object.remove("selinuxLabel");
    }
    let exact = |list: Vec<Vec<u8>>| if raw(&list) { list } else { Vec::new() };
    let raw = RawArgs {
        args: exact(command),
        env: exact(environment),
    };
    Ok((process, raw))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn options_change_the_containers_own_process() {
        let init = json!({
            "args": ["init"], "env": ["A=1", "B=1"], "cwd": "/", "terminal": true,
            "user": {"uid": 5, "gid": 6}, "capabilities": {"bounding": ["CAP_KILL"]},
        });
        let options = ExecOptions {
            command: vec!["id".into(), OsString::from_vec(vec![0xff])],
            environment: vec!["B=2".into()],
            user: Some("me".into()),
            ..ExecOptions::default()
        };
        let (process, raw) = change(init.clone(), Vec::new(), &options).unwrap();
        assert_eq!(process["args"][0], "id");
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["terminal"], json!(false));
        assert_eq!(process["user"]["username"], "me");
        assert_eq!(process["capabilities"], init["capabilities"]);
        assert_eq!(raw.args, [b"id".to_vec(), vec![0xff]]);
        assert!(raw.env.is_empty());
        let none = ExecOptions::default();
        assert!(change(init, Vec::new(), &none).is_err());
    }
}
