//! Executions: created, then started with a connection, then asked about.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hull_engine::attach::{Attachment, Options, Outcome, Remote, Window};
use hull_engine::container::{self, Any};
use hull_engine::error::{Context, Error, ErrorKind};
use hull_engine::exec::{ExecOptions, process};
use hull_engine::names;
use hull_engine::values;
use hull_sandbox::config::TerminalSize;
use hull_sandbox::control::client::Client;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::store::State as ContainerState;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Shared;
use crate::attach::{asked_size, detach_keys, kind, remote};
use crate::call::{Call, Hijacked, Reply};
use crate::containers::description::Words;
use crate::containers::find;
use crate::failure::{Failure, Result};

/// Executions that are remembered. Of more, those that have ended are forgotten first.
const MOST: usize = 10_000;

/// How far an execution is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Created,
    Running,
    Ended(i32),
}

/// One execution.
#[derive(Debug, Clone)]
struct Exec {
    container: String,
    options: ExecOptions,
    /// What the caller wants to see: output and error.
    shown: [bool; 2],
    detach_keys: values::DetachKeys,
    progress: Progress,
    /// While it runs.
    window: Weak<Window>,
    /// In the order of their creation.
    number: u64,
}

/// The executions that were asked for here.
#[derive(Debug, Default)]
pub struct Execs(Mutex<HashMap<String, Exec>>);

impl Execs {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Exec>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: String, mut exec: Exec) -> Result<()> {
        let mut all = self.lock();
        if all.len() >= MOST {
            let ended = all
                .iter()
                .filter(|(_, exec)| matches!(exec.progress, Progress::Ended(_)));
            let oldest = ended.min_by_key(|(_, exec)| exec.number);
            let Some(oldest) = oldest.map(|(id, _)| id.clone()) else {
                return Err(Failure::from(Error::new(format!(
                    "there are {MOST} executions that have not ended"
                ))));
            };
            all.remove(&oldest);
        }
        exec.number = all.values().map(|exec| exec.number + 1).max().unwrap_or(0);
        all.insert(id, exec);
        Ok(())
    }

    fn get(&self, id: &str) -> Result<Exec> {
        let found = self.lock().get(id).cloned();
        found.ok_or_else(|| Failure::missing(format!("No such exec instance: {id}")))
    }

    fn progress(&self, id: &str, progress: Progress) {
        if let Some(exec) = self.lock().get_mut(id) {
            exec.progress = progress;
        }
    }

    /// Takes an execution that is to be started: once. With the terminal that its caller has.
    fn begin(&self, id: &str) -> Result<(Exec, Arc<Window>)> {
        let window = Window::new(None)?;
        let mut all = self.lock();
        let missing = || Failure::missing(format!("No such exec instance: {id}"));
        let exec = all.get_mut(id).ok_or_else(missing)?;
        if exec.progress != Progress::Created {
            return Err(Failure {
                status: StatusCode::CONFLICT,
                message: format!("exec {id} has been started already"),
            });
        }
        exec.progress = Progress::Running;
        exec.window = Arc::downgrade(&window);
        Ok((exec.clone(), window))
    }

    /// Those of a container that run; `null` when there are none.
    pub fn of(&self, container: &str) -> Value {
        let all = self.lock();
        let of_container = all
            .iter()
            .filter(|(_, exec)| exec.container == container && exec.progress == Progress::Running);
        let ids: Vec<&String> = of_container.map(|(id, _)| id).collect();
        match ids.is_empty() {
            true => Value::Null,
            false => json!(ids),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Asked {
    attach_stdin: bool,
    attach_stdout: bool,
    attach_stderr: bool,
    tty: bool,
    cmd: Words,
    env: Vec<String>,
    user: String,
    working_dir: String,
    // Go takes keys in any case, and clients write this one so.
    #[serde(alias = "detachKeys")]
    detach_keys: String,
    console_size: Vec<u16>,
    privileged: bool,
}

/// Creates an execution.
pub fn create(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let container = find(state, id)?;
    let asked: Asked = call.json()?;
    let name = &container.record.details.name;
    match container.status.state {
        ContainerState::Running => {}
        ContainerState::Paused => {
            return Err(Error::wrong_state(format!("Container {name} is paused")).into());
        }
        other => return Err(container::not_running(name, other).into()),
    }
    let given = |text: String| Some(text).filter(|text| !text.is_empty());
    let parse_user = |user: String| values::user(&user).map_err(Failure::bad);
    let parse_directory = |path: String| values::directory(&path).map_err(Failure::bad);
    let exec = Exec {
        container: container.record.id.clone(),
        options: ExecOptions {
            command: asked.cmd.list().into_iter().map(OsString::from).collect(),
            environment: asked.env.into_iter().map(OsString::from).collect(),
            directory: given(asked.working_dir).map(parse_directory).transpose()?,
            privileged: asked.privileged,
            user: given(asked.user).map(parse_user).transpose()?,
            stdin: asked.attach_stdin,
            terminal: asked.tty,
            detach: false,
            size: size_of(&asked.console_size),
        },
        shown: [asked.attach_stdout, asked.attach_stderr],
        detach_keys: detach_keys(state, given(asked.detach_keys).as_deref())?,
        progress: Progress::Created,
        window: Weak::new(),
        number: 0,
    };
    if exec.options.command.is_empty() {
        return Err(Failure::bad("No exec command specified"));
    }
    let id = names::new_id()?;
    state.execs.add(id.clone(), exec)?;
    Ok(Reply::Json(StatusCode::CREATED, json!({"Id": id})))
}

/// `[height, width]`.
fn size_of(pair: &[u16]) -> Option<TerminalSize> {
    match pair {
        &[rows, columns] if rows > 0 && columns > 0 => Some(TerminalSize { rows, columns }),
        _ => None,
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct How {
    detach: bool,
    tty: bool,
    console_size: Vec<u16>,
}

/// Starts an execution, with the connection as its streams.
pub fn start(state: &Shared, call: &mut Call, id: &str) -> Result<Reply> {
    let how: How = call.json()?;
    let container = state.execs.get(id)?.container;
    let container = Any::Own(Box::new(find(state, &container)?));
    let (mut exec, window) = state.execs.begin(id)?;
    let size = size_of(&how.console_size).or(exec.options.size);
    if let Some(size) = size {
        exec.options.size = Some(size);
        window.resize(size);
    }
    if how.detach {
        let (ours, nobody) = UnixStream::pair().context(|| "create a stream")?;
        exec.shown = [false; 2];
        exec.options.stdin = false;
        let begun = begin(&container, &exec)
            .inspect_err(|error| state.execs.progress(id, Progress::Ended(status_of(error))))?;
        let hijacked = Hijacked {
            stream: ours,
            early: Vec::new(),
        };
        let remote = following(hijacked, true, window);
        let (state, id, counted) = (state.clone(), id.to_owned(), state.busy.count());
        std::thread::Builder::new()
            .name("attached".to_owned())
            .spawn(move || {
                finish(&state, &id, &exec, remote, begun);
                drop((nobody, counted));
            })
            .context(|| "start a thread")?;
        return Ok(Reply::Empty(StatusCode::OK));
    }
    if !call.headers.contains_key(hyper::header::UPGRADE) {
        exec.options.stdin = false;
    }
    // How the caller reads, whatever the process has.
    let Some(hijacked) = call.take_over(kind(how.tty))? else {
        state.execs.progress(id, Progress::Ended(EXIT_UNKNOWN));
        return Ok(Reply::Taken);
    };
    let remote = following(hijacked, how.tty, window);
    match begin(&container, &exec) {
        Ok(begun) => finish(state, id, &exec, remote, begun),
        Err(error) => {
            state.execs.progress(id, Progress::Ended(status_of(&error)));
            // As Docker tells it: where the output would be.
            remote.say(&format!("{}\r\n", error.message));
        }
    }
    Ok(Reply::Taken)
}

/// The caller of an execution, whose end is of interest also when the caller has gone.
fn following(hijacked: Hijacked, raw: bool, window: Arc<Window>) -> Remote {
    Remote {
        follows_end: true,
        ..remote(hijacked, raw, window)
    }
}

/// How a process ended of which nobody could learn that.
const EXIT_UNKNOWN: i32 = 125;

/// Docker's exit codes of what could not be executed.
fn status_of(error: &Error) -> i32 {
    match error.kind {
        ErrorKind::CommandNotFound => 127,
        ErrorKind::NotExecutable => 126,
        _ => EXIT_UNKNOWN,
    }
}

fn begin(container: &Any, exec: &Exec) -> hull_engine::error::Result<(Client, Vec<OwnedFd>)> {
    let client = container.connect()?;
    let process = process(container, &exec.options)?;
    let streams = client.streams(&Request::Exec(Box::new(process)))?;
    Ok((client, streams))
}

/// Carries the streams until the process ends, or the caller goes.
fn finish(
    state: &Shared,
    id: &str,
    exec: &Exec,
    remote: Remote,
    (client, streams): (Client, Vec<OwnedFd>),
) {
    let options = Options {
        input: exec.options.stdin,
        shown: exec.shown,
        terminal: exec.options.terminal,
        forward_signals: false,
        detach_keys: exec.detach_keys.clone(),
    };
    let mut status = EXIT_UNKNOWN;
    let told = |outcome: &Outcome| {
        if let Outcome::Exited(exit) = outcome {
            status = exit.status;
        }
        // Before the caller sees the end of its streams, and asks.
        state.execs.progress(id, Progress::Ended(status));
    };
    let carried = Attachment::remote(options, remote).carry_and_tell(client, streams, told);
    if let Err(error) = carried {
        tracing::debug!("exec {id}: {error}");
        state.execs.progress(id, Progress::Ended(EXIT_UNKNOWN));
    }
}

/// What is known of an execution.
pub fn inspect(state: &Shared, id: &str) -> Result<Reply> {
    let exec = state.execs.get(id)?;
    let options = &exec.options;
    let words: Vec<String> = options
        .command
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let (entrypoint, arguments) = match words.split_first() {
        Some((first, rest)) => (first.clone(), rest.to_vec()),
        None => (String::new(), Vec::new()),
    };
    Ok(Reply::ok(json!({
        "ID": id,
        "Running": exec.progress == Progress::Running,
        "ExitCode": match exec.progress {
            Progress::Ended(status) => json!(status),
            _ => Value::Null,
        },
        "ProcessConfig": {
            "tty": options.terminal,
            "entrypoint": entrypoint,
            "arguments": arguments,
            "privileged": exec.options.privileged,
            "user": options.user,
        },
        "OpenStdin": options.stdin,
        "OpenStdout": exec.shown[0],
        "OpenStderr": exec.shown[1],
        "CanRemove": matches!(exec.progress, Progress::Ended(_)),
        "ContainerID": exec.container,
        "DetachKeys": "",
        "Pid": 0,
    })))
}

/// Gives the terminal of an execution another size.
pub fn resize(state: &Shared, call: &Call, id: &str) -> Result<Reply> {
    let exec = state.execs.get(id)?;
    let size = asked_size(&call.query)?;
    let size = size.ok_or_else(|| Failure::bad("h and w: two numbers are needed"))?;
    let Some(window) = exec.window.upgrade() else {
        return Err(Error::wrong_state(format!("exec {id} is not running")).into());
    };
    window.resize(size);
    Ok(Reply::Empty(StatusCode::OK))
}
