//! The caller's side of a sandbox process: start one, find one, ask one. Blocking; used by `cli`.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use crate::attachment;
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::names;
use crate::paths::{ContainerPaths, Paths};
use crate::record::{self, Record, State};
use crate::request::{AttachRequest, RunRequest};
use crate::wire::{self, Kind, Reply, Request};

/// Starts a sandbox process for a container whose name is already claimed (see [`names::claim`]).
///
/// `first` is asked on the connection that is returned: [`Request::Started`] or [`Request::Attach`]. Its reply,
/// [`Reply::Started`] or [`Reply::Failed`], comes when the container's init runs or cannot.
///
/// # Errors
/// The state directory cannot be written, or the process cannot be started. Nothing is left behind, and the
/// name is free again.
pub fn launch(paths: &Paths, request: &RunRequest, first: &Request) -> Result<UnixStream> {
    let container = paths.container(&request.id);
    try_launch(paths, &container, request, first).inspect_err(|_| {
        // The error that is reported is the one that made the clean-up necessary.
        let _ = fs::remove_dir_all(&container.run);
        names::release(paths, &request.name, &request.id);
    })
}

fn try_launch(
    paths: &Paths,
    container: &ContainerPaths,
    request: &RunRequest,
    first: &Request,
) -> Result<UnixStream> {
    names::make_directory(&container.run)?;
    let text = serde_json::to_vec(request).context(|| "encode the request".into())?;
    record::write_by_rename(&container.request(), &text)?;
    if let Some(AttachRequest::Container { id }) = &request.network.attach {
        return join(paths, id, request, first);
    }
    let diagnostics = File::create(container.diagnostics())
        .context(|| format!("create {}", container.diagnostics().display()))?;

    let (ours, theirs) = UnixStream::pair().context(|| "make a socket pair".into())?;
    wire::write_json(&ours, Kind::Request, first).context(|| "write a request".into())?;
    // The process becomes a session leader of its own first thing; its input is the first connection.
    Command::new("/proc/self/exe")
        .arg0_hull()
        .arg("sandbox-process")
        .arg("--run-dir")
        .arg(paths.run())
        .arg("--data-dir")
        .arg(paths.data())
        .arg("--id")
        .arg(&request.id)
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(diagnostics))
        .spawn()
        .context(|| "start the sandbox process".into())?;
    Ok(ours)
}

/// Asks the sandbox process of another container to start this one in its machine.
fn join(paths: &Paths, host: &str, request: &RunRequest, first: &Request) -> Result<UnixStream> {
    let host = paths.container(host);
    let record = Record::load(&host)?;
    let gone = || not_running(&record).code(EXIT_HULL);
    let stream = UnixStream::connect(host.socket()).map_err(|_| gone())?;
    let join = Request::Join {
        id: request.id.clone(),
    };
    wire::write_json(&stream, Kind::Request, &join)
        .and_then(|()| wire::write_json(&stream, Kind::Request, first))
        .map_err(|_| gone())?;
    Ok(stream)
}

/// The container in whose machine a container is, by name, id or beginning of an id, and what was asked for it.
///
/// # Errors
/// There is no such container, or it does not run.
pub fn machine_of(paths: &Paths, text: &str) -> Result<(String, RunRequest)> {
    let (mut record, mut files) = find(paths, text).map_err(|failure| failure.code(EXIT_HULL))?;
    loop {
        if !matches!(record.state, State::Running | State::Paused) || !record::is_alive(&files) {
            return Err(not_running(&record).code(EXIT_HULL));
        }
        let doing = || format!("read the request of container {}", record.name);
        let text = fs::read(files.request()).context(doing)?;
        let request: RunRequest = serde_json::from_slice(&text).context(doing)?;
        match &request.network.attach {
            Some(AttachRequest::Container { id }) => {
                files = paths.container(id);
                record = Record::load(&files)?;
            }
            _ => return Ok((record.id, request)),
        }
    }
}

/// Gives the process a name that says what it is in `ps`.
trait Arg0 {
    fn arg0_hull(&mut self) -> &mut Self;
}

impl Arg0 for Command {
    fn arg0_hull(&mut self) -> &mut Self {
        use std::os::unix::process::CommandExt;
        self.arg0("hull")
    }
}

/// The record and the files of the container with this name, id, or beginning of an id.
///
/// # Errors
/// There is none, or its state file is damaged.
pub fn find(paths: &Paths, text: &str) -> Result<(Record, ContainerPaths)> {
    let container = paths.container(&names::find(paths, text)?);
    Ok((Record::load(&container)?, container))
}

/// Asks a running container; the reply is read. For attach, exec and copy the streams follow on the connection.
///
/// # Errors
/// The container does not run, or what the sandbox process answered.
pub fn ask(
    record: &Record,
    paths: &ContainerPaths,
    request: &Request,
) -> Result<(Reply, UnixStream)> {
    let stream = match UnixStream::connect(paths.socket()) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) =>
        {
            return Err(not_running(record));
        }
        Err(error) => {
            return Err(error).context(|| format!("reach container {}", record.name));
        }
    };
    let asked = wire::write_json(&stream, Kind::Request, request);
    match read_reply(&stream) {
        Ok(reply) => Ok((reply, stream)),
        Err(failure) if asked.is_err() => {
            Err(Record::load(paths).map_or(failure, |r| not_running(&r)))
        }
        Err(failure) => Err(failure),
    }
}

/// Reads the first answer on a connection.
///
/// # Errors
/// What the sandbox process answered, or that it went away.
pub fn read_reply(stream: &UnixStream) -> Result<Reply> {
    let mut payload = Vec::new();
    match wire::read_frame(stream, &mut payload) {
        Ok(Some(Kind::Reply)) => {
            match wire::from_json(&payload).context(|| "read the reply".into())? {
                Reply::Failed(failure) => Err(failure),
                reply => Ok(reply),
            }
        }
        Ok(Some(kind)) => Err(Failure::new(format!(
            "the sandbox process sent {kind:?} for a reply"
        ))),
        Ok(None) => Err(gone()),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Err(gone()),
        Err(error) => Err(error).context(|| "read the reply of the sandbox process".into()),
    }
}

/// The sandbox process closed the connection without a word.
pub fn gone() -> Failure {
    Failure::new("the sandbox process ended without an answer: it was killed, or it broke down")
        .hint("hull inspect shows its record; its own messages are in sandbox.log beside it")
}

fn not_running(record: &Record) -> Failure {
    Failure::new(format!(
        "container {} is not running: it is {}",
        record.name, record.state
    ))
    .code(1)
}

/// Removes a container and everything of it. A running one only when `force`d; it is killed first.
///
/// # Errors
/// It runs and `force` is not given, or its files cannot be removed.
pub fn remove(paths: &Paths, id: &str, force: bool) -> Result<()> {
    let container = paths.container(id);
    let record = Record::load(&container);
    let mut alive = record::is_alive(&container);
    if alive
        && record
            .as_ref()
            .is_ok_and(|record| record.state == State::Stopped)
    {
        // It is about to leave.
        wait_for_end(&container)?;
        alive = false;
    }
    if alive && !force {
        let (name, state) = record.map_or_else(
            |_| (id.to_owned(), State::Running),
            |record| (record.name, record.state),
        );
        return Err(Failure::new(format!("container {name} is {state}"))
            .hint("stop it first, or hull rm -f")
            .code(1));
    }
    if alive {
        kill(&container, record.as_ref().ok())?;
    }
    erase(paths, id, record.ok().map(|record| record.name).as_deref())
}

/// Ends a sandbox process: by asking, else by force. Returns when it is gone.
fn kill(container: &ContainerPaths, record: Option<&Record>) -> Result<()> {
    if let Ok(mut stream) = UnixStream::connect(container.socket()) {
        let asked = wire::write_json(&stream, Kind::Request, &Request::Remove);
        if asked.is_ok() && stream.flush().is_ok() {
            let timeout = std::time::Duration::from_secs(5);
            // A sandbox process that does not answer in time is killed below.
            let _ = stream.set_read_timeout(Some(timeout));
            let _ = read_reply(&stream);
        }
    }
    if record::is_alive(container)
        && let Some(record) = record
        && let Some(pid) = rustix::process::Pid::from_raw(record.processes.sandbox)
    {
        // Its children die with it. The lock tells that the process id still is the sandbox process's.
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .context(|| format!("kill the sandbox process {}", record.processes.sandbox))?;
    }
    wait_for_end(container)
}

/// Waits until the sandbox process has let go of the container.
fn wait_for_end(container: &ContainerPaths) -> Result<()> {
    // The lock goes with the process.
    if let Ok(file) = File::open(container.lock()) {
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared)
            .context(|| "wait for the end of the sandbox process".into())?;
    }
    Ok(())
}

/// Removes the files of a container that is not alive.
pub(crate) fn erase(paths: &Paths, id: &str, name: Option<&str>) -> Result<()> {
    let container = paths.container(id);
    attachment::undo(&container)?;
    let name = name.map(str::to_owned).or_else(|| {
        let text = fs::read(container.request()).ok()?;
        let request: RunRequest = serde_json::from_slice(&text).ok()?;
        Some(request.name)
    });
    let mut outcome = Ok(());
    for directory in [&container.data, &container.run] {
        let removed = match fs::remove_dir_all(directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.context(|| format!("remove {}", directory.display())),
        };
        outcome = outcome.and(removed);
    }
    // The name is free, whatever else is left.
    if let Some(name) = name {
        names::release(paths, &name, id);
    }
    outcome
}
