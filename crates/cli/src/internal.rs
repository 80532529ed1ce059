//! The internal roles of the executable, sandbox process and device process, and the names that
//! container engines call. Checked first, because starting a sandbox process is part of every
//! container's start.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use hull_engine::{supervise, unpacker};
use hull_sandbox::role;
use hull_sandbox::store::SandboxPath;

use crate::error::{self, Context, Error, HULL_FAILED, Result};
use hull_sandbox::BoundedLog;

/// The name by which container engines call the OCI runtime.
const OCI_NAME: &str = "hull-oci";

/// As many links as the kernel follows.
const MAX_LINKS: usize = 40;

/// Whether a name is a symbolic link to [`OCI_NAME`], perhaps over others: engines may be given any
/// name for their runtime.
fn links_to_oci(called_as: Option<&OsString>) -> bool {
    let Some(name) = called_as.map(Path::new) else {
        return false;
    };
    let mut path = match name.components().count() {
        1 => {
            let directories = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&directories).map(|directory| directory.join(name));
            match found.into_iter().find(|path| path.exists()) {
                Some(path) => path,
                None => return false,
            }
        }
        _ => name.to_owned(),
    };
    for _ in 0..MAX_LINKS {
        if path.file_name() == Some(OsStr::new(OCI_NAME)) {
            return true;
        }
        let Ok(target) = std::fs::read_link(&path) else {
            return false;
        };
        path = path.with_file_name(target);
    }
    false
}

/// Runs another role if the name or the arguments select one.
pub fn dispatch(arguments: &[OsString]) -> Option<ExitCode> {
    if let Some(session) = hull_oci::keeper::is_wanted() {
        hull_oci::keeper::run(session);
    }
    let called_as = arguments.first().map(Path::new).and_then(Path::file_name);
    if called_as == Some(OsStr::new(OCI_NAME)) || links_to_oci(arguments.first()) {
        return Some(crate::oci::main(arguments));
    }
    if called_as == Some(OsStr::new(hull_shim::NAME)) {
        return Some(status(hull_shim::main(arguments, crate::shim::settings), 1));
    }
    let outcome = match arguments.get(1)?.to_str()? {
        role::ROLE => sandbox_process(&arguments[2..]),
        "device-process" => device_process(),
        hull_machine::MACHINE_PROCESS => machine_process(&arguments[2..]),
        unpacker::ROLE => unpack_process(&arguments[2..]),
        supervise::ROLE => supervisor_process(&arguments[2..]),
        _ => return None,
    };
    Some(status(outcome, HULL_FAILED))
}

/// The exit status of a role, whose error is printed.
fn status(outcome: Result<()>, failed: u8) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error::print(&error);
            ExitCode::from(failed)
        }
    }
}

/// Parses `--name value` pairs.
struct Pairs<'a> {
    rest: std::slice::Iter<'a, OsString>,
}

impl<'a> Pairs<'a> {
    fn next(&mut self) -> Result<Option<(&'a str, &'a OsStr)>> {
        let Some(name) = self.rest.next() else {
            return Ok(None);
        };
        let value = self.rest.next();
        match (
            name.to_str().and_then(|name| name.strip_prefix("--")),
            value,
        ) {
            (Some(name), Some(value)) => Ok(Some((name, value))),
            _ => Err(Error::new(format!(
                "internal command: unexpected argument {name:?}"
            ))),
        }
    }
}

fn unknown(name: &str) -> Error {
    Error::new(format!("internal command: unknown option --{name}"))
}

fn missing(name: &str) -> Error {
    Error::new(format!("internal command: no --{name}"))
}

/// `sandbox-process --directory DIR --id ID`, with the starting command's connection as standard
/// input.
fn sandbox_process(arguments: &[OsString]) -> Result<()> {
    // The command that started this process blocked signals for its own purposes.
    hull_engine::attach::unblock_all();
    close_inherited();
    log_to_stderr();
    let (mut sandboxes, mut id) = (None, None);
    let mut pairs = Pairs {
        rest: arguments.iter(),
    };
    while let Some((name, value)) = pairs.next()? {
        match name {
            "directory" => sandboxes = Some(PathBuf::from(value)),
            "id" => id = value.to_str(),
            _ => return Err(unknown(name)),
        }
    }
    let path = SandboxPath {
        sandboxes: sandboxes.ok_or_else(|| missing("directory"))?,
        id: id.ok_or_else(|| missing("id"))?.to_owned(),
    };
    role::run(&path, connection_on_stdin()?.into())
}

/// Closes descriptors inherited from an engine or a shell: a reader may wait for end of file, and
/// this process outlives the command. Must be called before this process opens anything.
fn close_inherited() {
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else {
        return;
    };
    let inherited: Vec<i32> = open
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in inherited {
        // One of them belonged to the directory itself and is closed already.
        let _ = nix::unistd::close(fd);
    }
}

/// Moves the connection to another descriptor than standard input, so that dropping it closes it.
fn connection_on_stdin() -> Result<UnixStream> {
    let connection = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context(|| "take over the first connection")?;
    let nothing = File::open("/dev/null").context(|| "open /dev/null")?;
    rustix::stdio::dup2_stdin(&nothing).context(|| "close standard input")?;
    Ok(UnixStream::from(connection))
}

/// `device-process`; its control socket is descriptor 3.
fn device_process() -> Result<()> {
    hull_engine::attach::unblock_all();
    log_to_stderr();
    crate::device_process::run()
}

/// `machine-process MEMORY CPUS`; its descriptors are named in `hull_device_control::monitor`.
fn machine_process(arguments: &[OsString]) -> Result<()> {
    hull_engine::attach::unblock_all();
    log_to_stderr();
    crate::machine_process::run(arguments)
}

/// `unpack-process LOWER TASK`.
fn unpack_process(arguments: &[OsString]) -> Result<()> {
    hull_engine::attach::unblock_all();
    let arguments: Option<Vec<String>> = arguments
        .iter()
        .map(|argument| argument.to_str().map(str::to_owned))
        .collect();
    unpacker::main(&arguments.ok_or_else(|| missing("task"))?)
}

/// `supervisor-process --id ID [--person UID]`, with the file that it holds as standard input.
fn supervisor_process(arguments: &[OsString]) -> Result<()> {
    hull_engine::attach::unblock_all();
    close_inherited();
    let (mut id, mut person) = (None, None);
    let mut pairs = Pairs {
        rest: arguments.iter(),
    };
    while let Some((name, value)) = pairs.next()? {
        match name {
            "id" => id = value.to_str(),
            "person" => person = value.to_str().and_then(|uid| uid.parse().ok()),
            _ => return Err(unknown(name)),
        }
    }
    supervise::run(id.ok_or_else(|| missing("id"))?, person)
}

/// Log messages of the host processes go to standard error, which is the sandbox's `sandbox.log`.
fn log_to_stderr() {
    let level = std::env::var("HULL_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    tracing_subscriber::fmt()
        .with_max_level(level.unwrap_or(tracing::Level::WARN))
        .with_ansi(false)
        .with_writer(Arc::new(BoundedLog::new(level.is_some())))
        .init();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn commands_of_people_are_left_alone() {
        for arguments in [
            "hull",
            "hull run x",
            "hull --help",
            "hull run sandbox-process",
        ] {
            assert!(dispatch(&words(arguments)).is_none(), "{arguments}");
        }
    }

    #[test]
    fn names_of_engines_are_answered() {
        assert!(dispatch(&words("/usr/bin/hull-oci --version")).is_some());
        assert!(dispatch(&words("containerd-shim-hull-v2")).is_some());
    }
}
