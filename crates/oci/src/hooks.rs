//! The hooks that run on the host: `prestart` and `createRuntime` while a container is created,
//! `poststart` after its start, `poststop` after its deletion. They read the container's state from
//! standard input; the process id in it, the keeper's, leads to the network namespace. The other
//! two kinds run in the guest.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_sandbox::error::{Context, Error, Result};
use nix::sys::signal::SigSet;
use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

/// How much of a failed hook's output is repeated in the error, bytes.
const MAX_MESSAGE: usize = 1024;

/// Runs hooks in order and stops at the first failure.
///
/// # Errors
/// A hook cannot be executed, exits with another status than 0, or takes longer than its timeout.
pub fn run(kind: &str, hooks: Option<&Vec<Hook>>, state: &Value) -> Result<()> {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        run_one(hook, state).map_err(|why| Error::new(failure(index, kind, hook, &why)))?;
    }
    Ok(())
}

/// Runs hooks in order, also after a failure; reports failures with `warn`.
pub fn run_all(kind: &str, hooks: Option<&Vec<Hook>>, state: &Value, warn: fn(&str)) {
    for (index, hook) in hooks.into_iter().flatten().enumerate() {
        if let Err(why) = run_one(hook, state) {
            warn(&failure(index, kind, hook, &why));
        }
    }
}

/// Begins as runc's message, by which people and their scripts look for it.
fn failure(index: usize, kind: &str, hook: &Hook, why: &str) -> String {
    let path = hook.path().display();
    format!("error running hook #{index}: {kind} {path}: {why}")
}

/// Signals reach a hook also while this process holds its own.
#[allow(unsafe_code)]
fn unblock_signals(command: &mut Command) {
    // SAFETY: one async-signal-safe system call between fork and exec.
    unsafe {
        command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?));
    }
}

fn run_one(hook: &Hook, state: &Value) -> Result<(), String> {
    if !hook.path().is_absolute() {
        return Err("its path is not absolute".into());
    }
    let timeout = match hook.timeout() {
        None => None,
        Some(seconds) if seconds > 0 => Some(Duration::from_secs(seconds.unsigned_abs())),
        Some(seconds) => return Err(format!("its timeout {seconds} is not positive")),
    };
    let mut command = Command::new(hook.path());
    if let Some(args) = hook.args()
        && let Some((name, rest)) = args.split_first()
    {
        command.arg0(name).args(rest);
    }
    // Without `env` it has that of this process, which leads it to programs, as with runc and crun.
    if let Some(env) = hook.env() {
        command.env_clear();
        let variables = env.iter().filter_map(|variable| variable.split_once('='));
        command.envs(variables);
    }
    // Its output is only used if it fails. An unlinked file, because a full pipe would block the
    // hook.
    let mut said = tempfile().map_err(|failure| failure.message)?;
    unblock_signals(&mut command);
    let shared = |file: &std::fs::File| file.try_clone().map_err(|error| error.to_string());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(shared(&said)?)
        .stderr(shared(&said)?)
        .spawn()
        .map_err(|error| error.to_string())?;
    if let Some(mut stdin) = child.stdin.take() {
        // Normally fits the pipe buffer (64 KiB); the hook need not read it.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    if !ends_within(child.id(), timeout) {
        let _ = child.kill();
        let _ = child.wait();
        return Err("timed out".into());
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(());
    }
    Err(match tail(&mut said) {
        text if text.is_empty() => status.to_string(),
        text => format!("{status}: {text}"),
    })
}

fn tempfile() -> Result<std::fs::File> {
    rustix::fs::memfd_create("hull-hook", rustix::fs::MemfdFlags::CLOEXEC)
        .map(std::fs::File::from)
        .context(|| "keep what a hook writes")
}

fn tail(said: &mut std::fs::File) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let length = said.metadata().map_or(0, |metadata| metadata.len());
    let start = length.saturating_sub(MAX_MESSAGE as u64);
    let mut text = Vec::new();
    if said.seek(SeekFrom::Start(start)).is_ok() {
        // Without the output if it cannot be read.
        let _ = said.take(MAX_MESSAGE as u64).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).trim().replace('\n', " ")
}

/// False if the timeout expired first.
fn ends_within(pid: u32, timeout: Option<Duration>) -> bool {
    let Some(timeout) = timeout else { return true };
    let pidfd =
        Pid::from_raw(pid.cast_signed()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let Some(pidfd) = pidfd else { return true };
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hooks(json: &str) -> Vec<Hook> {
        serde_json::from_str(json).unwrap()
    }

    fn sh(script: &str, more: &str) -> Result<()> {
        let script = serde_json::to_string(script).unwrap();
        let hooks = hooks(&format!(
            r#"[{{"path":"/bin/sh","args":["sh","-c",{script}],"env":["A=b"]{more}}}]"#
        ));
        run(
            "prestart",
            Some(&hooks),
            &serde_json::json!({"id": "c1", "pid": 42}),
        )
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_environment_only() {
        // `read` fails on a last line without newline, but sets the variable.
        sh(
            r#"read -r line || :; [ "$line" = '{"id":"c1","pid":42}' ] && [ "$A" = b ] && [ -z "$HOME" ]"#,
            "",
        )
        .unwrap();
    }

    #[test]
    fn a_hook_without_an_environment_of_its_own_has_that_of_the_runtime() {
        let run_with = |env: &str, script: &str| {
            let script = serde_json::to_string(script).unwrap();
            let hooks = hooks(&format!(
                r#"[{{"path":"/bin/sh","args":["sh","-c",{script}]{env}}}]"#
            ));
            run("prestart", Some(&hooks), &Value::Null)
        };
        // Cargo and nextest set it for tests.
        run_with("", r#"[ -n "$CARGO_MANIFEST_DIR" ]"#).unwrap();
        run_with(r#","env":[]"#, r#"[ -z "$CARGO_MANIFEST_DIR" ]"#).unwrap();
    }

    #[test]
    fn a_failing_hook_is_named_with_what_it_said() {
        let error = sh("echo this went wrong >&2; exit 3", "").unwrap_err();
        for words in ["#0", "prestart", "/bin/sh", "3", "this went wrong"] {
            assert!(error.message.contains(words), "{error}");
        }
    }

    #[test]
    fn a_hook_that_takes_too_long_is_ended() {
        let error = sh("exec sleep 100", r#","timeout":1"#).unwrap_err();
        assert!(error.message.contains("timed out"), "{error}");
    }

    #[test]
    fn a_hook_that_is_not_there_is_an_error() {
        let error = run(
            "poststop",
            Some(&hooks(r#"[{"path":"/no/such"}]"#)),
            &Value::Null,
        );
        assert!(error.unwrap_err().message.contains("/no/such"));
        let error = run("poststop", Some(&hooks(r#"[{"path":"sh"}]"#)), &Value::Null);
        assert!(error.unwrap_err().message.contains("not absolute"));
    }
}
