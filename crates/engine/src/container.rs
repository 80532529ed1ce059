//! Containers of hull's own, and those of engines on the same host: found, listed, asked, removed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_network::cni::PortMapping;
use hull_sandbox::control;
use hull_sandbox::control::client::{self, Client};
use hull_sandbox::control::protocol::{Reply, Request};
use hull_sandbox::store::{
    CONFIG_FILE, Directory, Exit, SandboxPath, State, Stored, remove_all, roots,
};
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::endpoint;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::names;
use crate::options::RunOptions;
use crate::paths::Paths;
use crate::supervise;
use crate::values::Restart;
use crate::volumes::store;

/// The engine of hull's own containers, as records name it.
pub const ENGINE: &str = "hull";

/// What hull knows of a container of its own, beside what every record has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// Unique name.
    pub name: String,
    /// Image reference as given.
    pub image: String,
    /// Digest of the image's configuration.
    pub image_id: String,
    /// Host name.
    pub hostname: String,
    /// The container whose hosts, hostname and resolv.conf it has: itself, or the one whose network
    /// it shares.
    pub files_of: String,
    /// Machine kind.
    pub machine: String,
    /// Its isolation is the hardware's.
    pub hardware: bool,
    /// Kernel file.
    pub kernel: String,
    /// Memory of the guest, bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// Its init has a terminal.
    pub terminal: bool,
    /// Its init's standard input is open.
    pub stdin: bool,
    /// Removed when it ends.
    pub auto_remove: bool,
    /// Signal that `stop` sends first.
    pub stop_signal: String,
    /// Name of the network; `none` for loopback only, `container:ID` for another one's.
    pub network: String,
    /// Ports of the host that lead to ports of the container.
    pub ports: Vec<PortMapping>,
    /// Labels of image and command line.
    pub labels: BTreeMap<String, String>,
    /// Volumes, as given.
    pub volumes: Vec<String>,
    /// Layers that make up the root file system, topmost first.
    pub layers: Vec<PathBuf>,
    /// Whether it is to stay down.
    pub down: Down,
    /// How often it was started again by itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub restarts: u32,
    /// What was asked for. `None`: an older hull created it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<Box<RunOptions>>,
    /// Exact environment of its init, when that of its configuration is not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub raw_env: Vec<Vec<u8>>,
}

/// Whether a container that has a restart policy is to stay down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Down {
    /// It is started again as its policy says.
    #[default]
    No,
    /// The host shuts down: it is started again at boot.
    UntilBoot,
    /// A person stopped it.
    ForGood,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A container with what is known of it.
pub type Container = Stored<Details>;

impl Details {
    /// The names by which a container is found in its networks, without those of one of them.
    pub fn names(&self, id: &str) -> Vec<String> {
        let short = id.get(..12).unwrap_or(id).to_owned();
        let options = self.options.as_ref();
        let hostname = options.and_then(|options| options.hostname.clone());
        [self.name.clone(), short]
            .into_iter()
            .chain(hostname)
            .collect()
    }
}

/// A container of any engine on this host.
#[derive(Debug)]
pub enum Any {
    /// hull's own.
    Own(Box<Container>),
    /// An engine's.
    Engine(Box<EngineContainer>),
}

/// A container of an engine.
#[derive(Debug)]
pub struct EngineContainer {
    /// What hull knows of it.
    pub stored: Stored<Value>,
    /// The engine's directory of containers.
    pub root: PathBuf,
}

impl Any {
    /// Its id, for its engine.
    pub fn id(&self) -> &str {
        match self {
            Any::Own(own) => &own.record.id,
            Any::Engine(other) => &other.stored.record.id,
        }
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        match self {
            Any::Own(own) => &own.record.details.name,
            Any::Engine(other) => &other.stored.record.id,
        }
    }

    /// How far it is.
    pub fn state(&self) -> State {
        match self {
            Any::Own(own) => own.status.state,
            Any::Engine(other) => other.stored.status.state,
        }
    }

    /// The engine's name.
    pub fn engine(&self) -> &str {
        match self {
            Any::Own(own) => &own.record.engine,
            Any::Engine(other) => &other.stored.record.engine,
        }
    }

    /// Its directory.
    pub fn directory(&self) -> &Directory {
        match self {
            Any::Own(own) => &own.directory,
            Any::Engine(other) => &other.stored.directory,
        }
    }

    /// Connects to its sandbox.
    ///
    /// # Errors
    /// `WrongState` when it does not run.
    pub fn connect(&self) -> Result<Client> {
        match self {
            Any::Own(own) => connect(own),
            Any::Engine(other) => connect_to(&other.stored, &other.stored.record.id),
        }
    }

    /// Its OCI configuration, as its front end wrote it.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn config(&self) -> Result<Value> {
        config(self.directory())
    }
}

/// The OCI configuration of a container.
///
/// # Errors
/// There is none, or it is damaged.
pub fn config(directory: &Directory) -> Result<Value> {
    let path = directory.path().join(CONFIG_FILE);
    let text = directory
        .read(CONFIG_FILE)?
        .ok_or_else(|| Error::not_found(format!("there is no {}", path.display())))?;
    serde_json::from_slice(&text).context(|| format!("read {}", path.display()))
}

/// The container of hull's own with this name, id, or beginning of an id.
///
/// # Errors
/// `NotFound`; its files are damaged, or a newer hull's.
pub fn find(paths: &Paths, text: &str) -> Result<Container> {
    load_named(paths, &find_id(paths, text)?, text)
}

fn load_named(paths: &Paths, id: &str, text: &str) -> Result<Container> {
    load(paths, id)?.ok_or_else(|| names::no_such(text))
}

/// Its id, also when its files are damaged.
///
/// # Errors
/// `NotFound`, with whose container it is if an engine has one.
pub fn find_id(paths: &Paths, text: &str) -> Result<String> {
    names::find(paths, text).map_err(|error| match &of_engines(paths, text)[..] {
        [other, ..] if error.kind == ErrorKind::NotFound => {
            let program = match &other.stored.record.engine[..] {
                "oci" => "hull-oci",
                engine => engine,
            };
            error.hint(format!(
                "it is a container of {program}, which decides about it"
            ))
        }
        _ => error,
    })
}

/// The containers of engines that have this id, or whose ids begin so.
fn of_engines(paths: &Paths, text: &str) -> Vec<EngineContainer> {
    let mut found: Vec<EngineContainer> = engines(paths)
        .into_iter()
        .filter_map(Result::ok)
        .filter(|other| {
            let id = &other.stored.record.id;
            id == text || (text.len() >= 3 && id.starts_with(text))
        })
        .collect();
    if let Some(exact) = found
        .iter()
        .position(|other| other.stored.record.id == text)
    {
        found.swap(0, exact);
        found.truncate(1);
    }
    found
}

/// The container of this id, unless it is just being created or removed.
///
/// # Errors
/// Its files are damaged, or a newer hull's.
pub fn load(paths: &Paths, id: &str) -> Result<Option<Container>> {
    let loaded = Container::load(&paths.container(id))?;
    // A directory that a killed command left.
    Ok(loaded.filter(|container| !is_reservation(container)))
}

/// The same, also among the containers of engines.
///
/// # Errors
/// `NotFound`, or several engines have one.
pub fn find_any(paths: &Paths, text: &str) -> Result<Any> {
    // Without the hint of `find`, for which all containers of engines are read.
    let own = names::find(paths, text).and_then(|id| load_named(paths, &id, text));
    let missing = match own {
        Ok(own) => return Ok(Any::Own(Box::new(own))),
        Err(error) if error.kind == ErrorKind::NotFound => error,
        Err(error) => return Err(error),
    };
    let mut found = of_engines(paths, text);
    match found.len() {
        0 => Err(missing),
        1 => Ok(Any::Engine(Box::new(found.remove(0)))),
        several => Err(Error::invalid(format!(
            "{text:?} is the beginning of {several} container ids of engines"
        ))
        .hint("hull ps --all-engines --no-trunc")),
    }
}

/// All containers of hull's own, newest first. One that cannot be read comes as its id and the
/// reason; it does not hide the others.
///
/// # Errors
/// The directory of containers cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<Result<Container, (String, Error)>>> {
    let mut all = Vec::new();
    for id in names::ids(paths)? {
        match load(paths, &id) {
            Ok(Some(container)) => all.push(Ok(container)),
            // One that is just being created, or just being removed, has nothing to show.
            Ok(None) => {}
            Err(_) if !paths.container(&id).exists() => {}
            Err(error) => all.push(Err((id, error))),
        }
    }
    all.sort_by_key(|one| {
        std::cmp::Reverse(
            one.as_ref()
                .map_or(0, |container| container.record.created_ns),
        )
    });
    Ok(all)
}

/// All containers of engines that run with hull.
pub fn engines(paths: &Paths) -> Vec<Result<EngineContainer>> {
    let mut all = Vec::new();
    for root in roots::list(paths.run()) {
        for entry in fs::read_dir(&root).into_iter().flatten().flatten() {
            match Stored::load(&entry.path()) {
                Ok(Some(stored)) => all.push(Ok(EngineContainer {
                    stored,
                    root: root.clone(),
                })),
                Ok(None) => {}
                Err(_) if !entry.path().exists() => {}
                Err(error) => all.push(Err(error)),
            }
        }
    }
    all
}

/// Connects to the sandbox of a container.
///
/// # Errors
/// `WrongState` when it does not run.
pub fn connect(container: &Container) -> Result<Client> {
    connect_to(container, &container.record.details.name)
}

fn connect_to<D: Serialize + serde::de::DeserializeOwned>(
    stored: &Stored<D>,
    name: &str,
) -> Result<Client> {
    let client = match (stored.status.state, &stored.record.sandbox) {
        (State::Stopped, _) | (_, None) => None,
        (_, Some(sandbox)) => Client::open(sandbox)?,
    };
    client.ok_or_else(|| not_running(name, stored.status.state))
}

/// A container that would have to run.
pub fn not_running(name: &str, state: State) -> Error {
    Error::wrong_state(format!("container {name} is not running: it is {state}"))
}

/// How a container has ended, if it has.
pub fn ended(container: &Container) -> Option<Exit> {
    match container.status.state {
        State::Stopped => container.status.exit.clone(),
        _ => None,
    }
}

/// Waits until a container has ended; one that has ended already is no error, and one that was not
/// started yet needs no waiting for.
///
/// # Errors
/// There is none, or its end cannot be learned.
pub fn wait(paths: &Paths, name: &str) -> Result<Exit> {
    let container = find(paths, name)?;
    if let Some(exit) = ended(&container) {
        return Ok(exit);
    }
    if is_idle(&container) {
        return Ok(Exit::now(0));
    }
    let asked = connect(&container).and_then(|client| {
        let request = Request::Wait {
            container: container.record.id.clone(),
        };
        match client.ask(&request, &[])?.message {
            Reply::Ended(exit) => Ok(exit),
            other => Err(client::unexpected(&other)),
        }
    });
    asked.or_else(|error| {
        // It may have ended, or been killed, between the look and the question.
        let now = load_settled(paths, &container.record.id, &error)?;
        now.as_ref().and_then(ended).ok_or(error)
    })
}

/// What is known of a container whose sandbox has answered with this error. Of a process that was
/// killed the connections end first, and a moment later the lock by which all others know.
pub(crate) fn load_settled(paths: &Paths, id: &str, error: &Error) -> Result<Option<Container>> {
    const MOMENT: Duration = Duration::from_secs(5);
    let begin = Instant::now();
    loop {
        let loaded = load(paths, id)?;
        let lives = loaded
            .as_ref()
            .is_some_and(|container| container.status.state != State::Stopped);
        if !lives || error.kind != ErrorKind::Gone || begin.elapsed() > MOMENT {
            return Ok(loaded);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for the end of a container that has been killed, on a connection to its sandbox.
///
/// # Errors
/// The sandbox does not tell, and the container lives.
pub fn wait_for_end(paths: &Paths, client: &Client, id: &str) -> Result<()> {
    let container = id.to_owned();
    match client.ask(&Request::Wait { container }, &[]) {
        Ok(_) => Ok(()),
        Err(error) => match load_settled(paths, id, &error)? {
            Some(container) if container.status.state != State::Stopped => Err(error),
            _ => Ok(()),
        },
    }
}

/// Whether a container has no machine and needs none: it has ended, or was not started yet.
pub fn is_idle(container: &Container) -> bool {
    match container.status.state {
        State::Stopped => true,
        // One whose first start was interrupted has had a sandbox.
        State::Created => !container.record.sandbox_lives(),
        State::Creating | State::Running | State::Paused => false,
    }
}

/// Held by who starts a container or looks into one that is idle: its root file system can be
/// mounted once. Waits for others.
///
/// # Errors
/// The file cannot be opened.
pub fn lock(container: &Container) -> Result<File> {
    lock_in(&container.directory, &container.record.id)
}

/// The same of the container `id`, by its directory.
///
/// # Errors
/// The file cannot be opened.
pub fn lock_in(directory: &Directory, id: &str) -> Result<File> {
    let doing = || format!("lock container {id}");
    let flags = OFlags::RDWR | OFlags::CREATE;
    let file = directory.open_file("lock", flags).context(doing)?;
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive)).context(doing)?;
    Ok(file)
}

/// Whether a container is what a command left that was killed before its sandbox knew of it.
pub fn is_reservation(container: &Container) -> bool {
    container.status.state == State::Stopped
        && container.status.exit.is_none()
        && container.status.started_ns.is_none()
}

/// Removes what killed commands left: names and directories of containers that were never created,
/// and of sandboxes that were never started for them.
pub fn sweep(paths: &Paths) {
    for id in names::ids(paths).unwrap_or_default() {
        let path = paths.container(&id);
        let loaded = Container::load(&path);
        let left = match &loaded {
            Ok(Some(container)) => is_reservation(container),
            // Its removal was interrupted, or is under way.
            Ok(None) => is_old(&path),
            Err(_) => false,
        };
        if !left {
            continue;
        }
        let sandbox = loaded
            .ok()
            .flatten()
            .and_then(|container| container.record.sandbox);
        // One that lives notices by itself that its command has gone, unless that asked for the
        // container before: then there will be one.
        if sandbox.as_ref().is_some_and(SandboxPath::is_alive) {
            continue;
        }
        let swept = sandbox.map_or(Ok(()), |sandbox| sandbox.sweep());
        if let Err(error) = swept.and_then(|()| erase(paths, &id, None)) {
            tracing::debug!("{error}");
        }
    }
    for path in paths.abandoned() {
        if let Err(error) = remove_all(&path) {
            tracing::debug!("{error}");
        }
    }
}

/// Whether a directory without a record is older than a removal takes. One with a writable layer is
/// another hull's, and is left alone.
fn is_old(path: &Path) -> bool {
    if path.join("upper").exists() || path.join("layer.img").exists() {
        return false;
    }
    const OLD: Duration = Duration::from_secs(60);
    fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|time| time.elapsed().ok())
        .is_some_and(|age| age > OLD)
}

/// Writes down that a container which is to be stopped now stays down. Returns what it is then: it
/// may have been started meanwhile.
///
/// # Errors
/// `NotFound` when it was removed meanwhile; the record cannot be written.
pub fn keep_down(paths: &Paths, container: Container, down: Down) -> Result<Container> {
    let options = container.record.details.options.as_ref();
    if options.is_none_or(|options| options.restart == Restart::No) {
        return Ok(container);
    }
    let _lock = lock(&container)?;
    let mut now = load_named(paths, &container.record.id, &container.record.details.name)?;
    now.record.details.down = down;
    now.record.write(&now.directory)?;
    Ok(now)
}

/// Gives a container another name.
///
/// # Errors
/// `NotFound`; `Exists` when another container has the name.
pub fn rename(paths: &Paths, text: &str, name: &str) -> Result<()> {
    let found = find(paths, text)?;
    let _lock = lock(&found)?;
    let mut container = load_named(paths, &found.record.id, text)?;
    let id = container.record.id.clone();
    let old = std::mem::replace(&mut container.record.details.name, name.to_owned());
    if old == name {
        return Err(Error::invalid(format!(
            "container {old} has this name already"
        )));
    }
    names::claim(paths, name, &id)?;
    if let Err(error) = container.record.write(&container.directory) {
        names::release(paths, name, &id);
        return Err(error);
    }
    names::release(paths, &old, &id);
    // Others find it by its new name from now on.
    if let Err(error) = endpoint::renamed(&container, paths) {
        tracing::warn!(
            "container {name} has its old name in its networks until it is restarted: {error}"
        );
    }
    Ok(())
}

/// What a removal removes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Removing {
    /// Also a container that runs; it is killed first.
    pub force: bool,
    /// Also volumes that were created for it and have no names of their own.
    pub volumes: bool,
}

impl Removing {
    /// Whatever there is.
    pub fn everything() -> Self {
        Self {
            force: true,
            volumes: true,
        }
    }
}

/// Removes a container.
///
/// # Errors
/// `WrongState` when it runs and `force` is not given; its files cannot be removed.
pub fn remove(paths: &Paths, id: &str, removing: Removing) -> Result<()> {
    let Removing { force, volumes } = removing;
    let mut loaded = Container::load(&paths.container(id));
    // Not while it is being started, after which there would be a machine without a container.
    let mut held = None;
    if let Ok(Some(container)) = &loaded
        && let Ok(lock) = lock(container)
    {
        held = Some(lock);
        loaded = Container::load(&paths.container(id));
    }
    if let Ok(Some(container)) = &loaded {
        let state = container.status.state;
        let name = &container.record.details.name;
        if !is_idle(container) && !force {
            return Err(Error::wrong_state(format!("container {name} is {state}"))
                .hint("stop it first, or hull rm -f"));
        }
        if !force && supervise::has_supervisor(container) {
            return Err(
                Error::wrong_state(format!("container {name} is restarting"))
                    .hint("stop it first, or hull rm -f"),
            );
        }
        if let Some(sandbox) = &container.record.sandbox {
            control::remove(sandbox, id)?;
        }
    } else if let Err(error) = &loaded
        && !force
    {
        return Err(error.clone());
    }
    let details = loaded
        .ok()
        .flatten()
        .map(|container| container.record.details);
    let name = details.as_ref().map(|details| details.name.as_str());
    erase(paths, id, name)?;
    drop(held);
    match details.and_then(|details| details.options) {
        Some(options) if volumes => store::remove_anonymous(paths, &options.volumes),
        _ => Ok(()),
    }
}

/// Removes the files of a container that does not live.
pub(crate) fn erase(paths: &Paths, id: &str, name: Option<&str>) -> Result<()> {
    let path = paths.container(id);
    match Directory::open(&path) {
        Ok(directory) => hull_sandbox::undo_network(&directory)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context(|| format!("open {}", path.display())),
    }
    let removed = remove_all(&path);
    // The name is free, whatever else is left.
    match name {
        Some(name) => names::release(paths, name, id),
        None => names::release_all_of(paths, id),
    }
    removed
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use hull_sandbox::store::{Record, SandboxDir};

    use super::*;

    #[test]
    fn a_command_that_was_killed_leaves_nothing_wherever_it_was() {
        let (_directory, paths) = Paths::temporary();
        let id = "ab".repeat(32);
        let sandbox = SandboxPath::new(paths.run(), "ab");
        let mut record = Record::new(&id, ENGINE, Details::default());
        record.sandbox = Some(sandbox.clone());
        let left = Directory::create(&paths.container(&id)).unwrap();
        record.write(&left).unwrap();
        names::claim(&paths, "web", &id).unwrap();
        drop(SandboxDir::create(&sandbox).unwrap());

        // Its command lives: everything is in its hands.
        sweep(&paths);
        assert!(sandbox.directory().exists() && paths.container(&id).exists());

        let staging = paths.staging(record.creator);
        Directory::create(&staging).unwrap();
        sweep(&paths);
        assert!(staging.exists());

        record.creator.started += 1;
        record.write(&left).unwrap();
        // Its last request may just be served.
        let serving = SandboxDir::create(&sandbox).unwrap();
        sweep(&paths);
        assert!(sandbox.directory().exists() && paths.container(&id).exists());
        names::check_free(&paths, "web").unwrap_err();
        drop(serving);
        let abandoned = paths.staging(record.creator);
        fs::rename(&staging, &abandoned).unwrap();
        sweep(&paths);
        assert_eq!(fs::read_dir(paths.containers()).unwrap().count(), 0);
        assert!(!sandbox.directory().exists() && !paths.container(&id).exists());
        names::check_free(&paths, "web").unwrap();
        assert_eq!(fs::read_dir(paths.names()).unwrap().count(), 0);
    }
}
