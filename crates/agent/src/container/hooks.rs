//! Hooks that belong in the guest: `createContainer`, before the container's root is entered, and
//! `startContainer`, in the container, right before its command. The other hooks of a spec belong
//! to the host and are not run here.
//!
//! Runs in the child, which is the parent of the hook's process. A hook that fails or takes too
//! long fails the container.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{WaitId, WaitIdOptions};

use super::error::{Context, CreateError, Result};
use super::sys::{self, Cloned};

/// One hook.
#[derive(Debug)]
struct HookPlan {
    field: &'static str,
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    timeout: Option<Duration>,
}

/// Longest state passed to hooks: with status and pid it fits the pipe buffer, 64 KiB.
const MAX_STATE: usize = (64 << 10) - 128;

/// All hooks of a container that run in the guest.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    create_container: Vec<HookPlan>,
    start_container: Vec<HookPlan>,
    /// JSON state for hooks, to which status and pid are added in front.
    state: String,
}

fn read(field: &'static str, hooks: &Option<Vec<Hook>>) -> Result<Vec<HookPlan>> {
    let strings = |strings: &Option<Vec<String>>| {
        strings
            .iter()
            .flatten()
            .map(|string| sys::c_string(field, string))
            .collect::<Result<Vec<_>>>()
    };
    let read = |hook: &Hook| {
        if !hook.path().is_absolute() {
            return Err(CreateError::invalid(
                field,
                format_args!("{} is not absolute", hook.path().display()),
            ));
        }
        let path = sys::c_path(field, hook.path())?;
        let mut arguments = strings(hook.args())?;
        if arguments.is_empty() {
            arguments.push(path.clone());
        }
        let timeout = match hook.timeout() {
            None => None,
            Some(seconds) => Some(
                u64::try_from(seconds)
                    .ok()
                    .filter(|seconds| *seconds > 0)
                    .map(Duration::from_secs)
                    .ok_or_else(|| {
                        CreateError::invalid(
                            field,
                            format_args!("timeout {seconds} is not positive"),
                        )
                    })?,
            ),
        };
        Ok(HookPlan {
            field,
            path,
            arguments,
            environment: strings(hook.env())?,
            timeout,
        })
    };
    hooks.iter().flatten().map(read).collect()
}

impl Hooks {
    pub(super) fn new(id: &str, spec: &Spec) -> Result<Hooks> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Hooks::default());
        };
        let create_container = read("hooks.createContainer", hooks.create_container())?;
        let start_container = read("hooks.startContainer", hooks.start_container())?;
        if create_container.is_empty() && start_container.is_empty() {
            return Ok(Hooks::default());
        }
        let state = serde_json::json!({
            "ociVersion": spec.version(),
            "id": id,
            "bundle": spec.root().as_ref().map(|root| root.path()),
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        let state = state.to_string();
        if state.len() > MAX_STATE {
            return Err(CreateError::invalid(
                "annotations",
                format_args!(
                    "hooks can read {MAX_STATE} bytes of state, not {}",
                    state.len()
                ),
            ));
        }
        Ok(Hooks {
            create_container,
            start_container,
            state,
        })
    }

    /// Runs in the new namespaces, as the agent's root. Returns this process's id as the agent sees
    /// it, for later hooks.
    pub(super) fn run_create_container(&self) -> Result<Option<String>> {
        if self.create_container.is_empty() && self.start_container.is_empty() {
            return Ok(None);
        }
        let link =
            rustix::fs::readlink(c"/proc/self", Vec::new()).context(|| "cannot read /proc/self")?;
        let pid = link.to_string_lossy().into_owned();
        self.run(&self.create_container, "creating", &pid)?;
        Ok(Some(pid))
    }

    /// Runs as the container's process, right before its command.
    pub(super) fn run_start_container(&self, pid: &str) -> Result<()> {
        self.run(&self.start_container, "created", pid)
    }

    fn run(&self, hooks: &[HookPlan], status: &str, pid: &str) -> Result<()> {
        if hooks.is_empty() {
            return Ok(());
        }
        let rest = self.state.strip_prefix('{').unwrap_or_default();
        let state = format!("{{\"status\":\"{status}\",\"pid\":{pid},{rest}");
        hooks
            .iter()
            .enumerate()
            .try_for_each(|(index, hook)| hook.run(index, &state))
    }
}

impl HookPlan {
    fn run(&self, index: usize, state: &str) -> Result<()> {
        // Begins as runc's message, by which people and their scripts look for it.
        let what = || {
            let kind = self.field.strip_prefix("hooks.").unwrap_or(self.field);
            let path = self.path.to_string_lossy();
            format!("error running hook #{index}: {kind} {path}")
        };
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context(what)?;
        let arguments = sys::pointers(self.arguments.iter());
        let environment = sys::pointers(self.environment.iter());
        // SAFETY: this process has one thread, and the clone executes or ends.
        let pidfd = match unsafe { sys::clone3(0, None) }.context(what)? {
            Cloned::Parent { pidfd, .. } => pidfd,
            Cloned::Child => self.execute(reader.as_fd(), &arguments, &environment),
        };
        drop(reader);
        // Fits the pipe buffer; a hook need not read it (the agent ignores SIGPIPE).
        let _ = rustix::io::write(&writer, state.as_bytes());
        drop(writer);
        let ended = self.wait(pidfd.as_fd()).context(what)?;
        if !ended {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
        }
        let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
            .context(what)?;
        if !ended {
            return Err(CreateError::other(what(), "timed out"));
        }
        match status.map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((Some(0), _)) => Ok(()),
            Some((Some(status), _)) => Err(CreateError::other(
                what(),
                format_args!("exited with status {status}"),
            )),
            // What a system call filter does.
            Some((None, Some(libc::SIGSYS))) => Err(CreateError::other(
                what(),
                format_args!("killed by signal {}: bad system call", libc::SIGSYS),
            )),
            Some((None, Some(signal))) => Err(CreateError::other(
                what(),
                format_args!("killed by signal {signal}"),
            )),
            _ => Err(CreateError::other(what(), "ended in an unknown way")),
        }
    }

    /// In the hook's process.
    fn execute(
        &self,
        stdin: BorrowedFd<'_>,
        arguments: &[*const c_char],
        environment: &[*const c_char],
    ) -> ! {
        if sys::duplicate(stdin, 0, 0).is_ok() && super::process_plan::reset_signals().is_ok() {
            sys::execve(&self.path, arguments, environment);
        }
        sys::exit(127)
    }

    /// False on timeout.
    fn wait(&self, pidfd: BorrowedFd<'_>) -> rustix::io::Result<bool> {
        let end = self.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|left| rustix::time::Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            });
            match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hooks(json: &str) -> Result<Hooks> {
        let spec: Spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"/r"}},"hooks":{json}}}"#
        ))
        .unwrap();
        Hooks::new("c1", &spec)
    }

    #[test]
    fn only_those_of_the_guest_are_read() {
        let hooks = hooks(
            r#"{"prestart":[{"path":"/a"}],"poststop":[{"path":"b"}],"startContainer":[{"path":"/c","timeout":2}]}"#,
        )
        .unwrap();
        assert!(hooks.create_container.is_empty());
        assert_eq!(hooks.start_container[0].arguments, [c"/c".to_owned()]);
        assert_eq!(
            hooks.start_container[0].timeout,
            Some(Duration::from_secs(2))
        );
    }

    #[test]
    fn wrong_ones_are_named() {
        assert!(
            hooks(r#"{"createContainer":[{"path":"x"}]}"#)
                .unwrap_err()
                .to_string()
                .contains("not absolute")
        );
        assert!(
            hooks(r#"{"startContainer":[{"path":"/x","timeout":0}]}"#)
                .unwrap_err()
                .to_string()
                .contains("timeout")
        );
    }

    #[test]
    fn a_hook_reads_the_state_and_its_status_counts() {
        let run = |script: &str, timeout: &str| {
            let json = format!(
                r#"{{"createContainer":[{{"path":"/bin/sh","args":["sh","-c",{}]{timeout}}}]}}"#,
                serde_json::to_string(script).unwrap()
            );
            let hooks = hooks(&json).unwrap();
            hooks.run(&hooks.create_container, "creating", "42")
        };
        run(r#"read line; case $line in '{"status":"creating","pid":42,'*'"id":"c1"'*) ;; *) exit 9;; esac"#, "")
            .unwrap();
        assert!(
            run("exit 3", "")
                .unwrap_err()
                .to_string()
                .contains("exited with status 3")
        );
        assert!(
            run("kill -9 $$", "")
                .unwrap_err()
                .to_string()
                .contains("signal 9")
        );
        assert!(
            run("exec sleep 10", r#","timeout":1"#)
                .unwrap_err()
                .to_string()
                .contains("timed out")
        );
    }
}
