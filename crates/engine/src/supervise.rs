//! Starts a container again when it ends (`--restart`), and has its health checked. Each container
//! that wants that has one small process, which waits for its end and is gone when the container is
//! removed, or stopped by a person. There is no daemon.
//!
//! The process holds `supervisor` in the container's directory (flock) from its birth. It decides
//! to go, and lets go of that, only while it holds the container's lock: who starts the container
//! holds that, too, so a container that runs and wants a supervisor has one.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hull_sandbox::control::launch::reap;
use hull_sandbox::store::{Exit, State, unix_time_ns};
use hull_sandbox::timings::{Timings, now_ns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::process::WaitOptions;

use crate::config::Config;
use crate::container::{self, Container, Details, Down};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::health::{self, Checking};
use crate::paths::Paths;
use crate::run::{Attempt, start_again};
use crate::values::{Network, Restart};

/// First argument of the process.
pub const ROLE: &str = "supervisor-process";

/// Name of the file that it holds.
const LOCK: &str = "supervisor";

/// Name of the file with the reason why the container could not be started last, or why it has no
/// supervisor any more.
pub const MESSAGE_FILE: &str = "supervisor.log";

/// Docker's: how long it waits before the first start; twice as long before each further one.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// How often a container's record is read where there is no watch.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// A container that ran as long as this did not fail at once (Docker's).
const LONG_ENOUGH: Duration = Duration::from_secs(10);

/// Environment of the process: where the configuration, programs and a person's files are.
const ENVIRONMENT: [&str; 6] = [
    "PATH",
    "HULL_LOG",
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "XDG_RUNTIME_DIR",
];

/// How a container that ended is to be treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attempts {
    /// Ends one after the other that came too early.
    failures: u32,
    delay: Duration,
}

impl Attempts {
    const NONE: Self = Self {
        failures: 0,
        delay: FIRST_DELAY,
    };

    /// After an end: how long to wait until it is started again, if it is at all.
    fn after(&mut self, policy: Restart, exit: &Exit, ran: Duration) -> Option<Duration> {
        if ran >= LONG_ENOUGH {
            *self = Self::NONE;
        }
        let again = match policy {
            Restart::No => false,
            Restart::Always | Restart::UnlessStopped => true,
            Restart::OnFailure(most) => {
                exit.status != 0 && most.is_none_or(|most| self.failures < most)
            }
        };
        self.failures += 1;
        let delay = self.delay;
        self.delay = (delay * 2).min(LONGEST_DELAY);
        again.then_some(delay)
    }
}

/// What a container's record says about being started again.
fn policy(details: &Details) -> Restart {
    let asked = details.options.as_ref().map(|options| options.restart);
    match details.down {
        Down::UntilBoot | Down::ForGood => Restart::No,
        Down::No => asked.unwrap_or_default(),
    }
}

/// The names of the containers that are to be started at boot, those that are in the machines of
/// others after these.
///
/// # Errors
/// The directory of containers cannot be read.
pub fn to_boot(paths: &Paths) -> Result<Vec<String>> {
    let listed = container::list(paths)?.into_iter().flatten();
    let mut wanted: Vec<Container> = listed.filter(wants_boot).collect();
    let joins = |container: &Container| {
        let options = container.record.details.options.as_ref();
        let network = options.and_then(|options| options.network.network.as_ref());
        matches!(network, Some(Network::Container(_)))
    };
    wanted.sort_by_key(joins);
    let names = wanted.into_iter().map(|one| one.record.details.name);
    Ok(names.collect())
}

/// Whether a container that ended is to be started at boot.
fn wants_boot(container: &Container) -> bool {
    let details = &container.record.details;
    let asked = details.options.as_ref().map(|options| options.restart);
    // One that the shutdown ended would have gone on.
    let failed = details.down == Down::UntilBoot
        || container::ended(container).is_some_and(|exit| exit.status != 0);
    container.status.state == State::Stopped
        && match asked.unwrap_or_default() {
            Restart::No => false,
            Restart::Always => true,
            Restart::UnlessStopped => details.down != Down::ForGood,
            Restart::OnFailure(_) => details.down != Down::ForGood && failed,
        }
}

/// Whether a container waits to be started again, or is watched while it runs.
pub fn has_supervisor(container: &Container) -> bool {
    let wants = policy(&container.record.details) != Restart::No;
    wants && matches!(hold(container), Ok(None))
}

/// Whether a container has ended and waits to be started again.
pub fn is_restarting(container: &Container) -> bool {
    container.status.state == State::Stopped && has_supervisor(container)
}

/// Takes the lock of the supervisor; `None` when there is one.
fn hold(container: &Container) -> Result<Option<File>> {
    let doing = || format!("lock the supervisor of container {}", container.record.id);
    let flags = OFlags::RDWR | OFlags::CREATE;
    let file = container.directory.open_file(LOCK, flags).context(doing)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error).context(doing),
    }
}

/// A person wants a container to run that runs already: it is started again when it ends, as its
/// policy says, also when it was just to be stopped, or its supervisor was killed.
///
/// # Errors
/// Its record cannot be written; the supervisor cannot be started.
pub fn keep_up(config: &Config, container: &Container) -> Result<()> {
    let _lock = container::lock(container)?;
    let Some(mut now) = container::load(&config.paths(), &container.record.id)? else {
        return Ok(());
    };
    if container::is_idle(&now) {
        return Ok(());
    }
    if now.record.details.down != Down::No {
        now.record.details.down = Down::No;
        now.record.write(&now.directory)?;
    }
    ensure(config, &now)
}

/// Gives a container that was just started its supervisor, if it wants one and has none. The caller
/// holds the container's lock.
///
/// # Errors
/// The process cannot be started.
pub(crate) fn ensure(config: &Config, container: &Container) -> Result<()> {
    let restarts = policy(&container.record.details) != Restart::No;
    if !restarts && health::check_of(container).is_none() {
        return Ok(());
    }
    let Some(lock) = hold(container)? else {
        return Ok(());
    };
    let doing = || format!("start the supervisor of container {}", container.record.id);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let messages = container
        .directory
        .open_file(MESSAGE_FILE, flags)
        .context(doing)?;
    command(config, &container.record.id)
        .stdin(Stdio::from(lock))
        .stdout(Stdio::null())
        .stderr(Stdio::from(messages))
        .spawn()
        .and_then(reap)
        .context(doing)
}

fn command(config: &Config, id: &str) -> Command {
    // Not by /proc/self/exe, from which its path would not be known.
    let mut command = Command::new(&config.executable);
    command.arg0("hull").args([ROLE, "--id", id]);
    if let Some(uid) = config.person {
        command.args(["--person", &uid.to_string()]);
    }
    command.current_dir("/").env_clear().envs(environment());
    command
}

fn environment() -> Vec<(OsString, OsString)> {
    let own = std::env::vars_os().filter(|(name, _)| ENVIRONMENT.iter().any(|kept| name == kept));
    let mut environment: Vec<_> = own.collect();
    // The process is in another directory.
    if let Some(file) = std::env::var_os("HULL_CONFIG").filter(|file| !file.is_empty()) {
        let absolute = std::path::absolute(Path::new(&file));
        let file = absolute.map_or(file, |path| path.into_os_string());
        environment.push(("HULL_CONFIG".into(), file));
    }
    environment
}

/// The process: starts the container `id` again as long as that is wanted. Its standard input is
/// the file that it holds.
///
/// # Errors
/// The configuration or the container cannot be read.
pub fn run(id: &str, person: Option<u32>) -> Result<()> {
    let lock = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .context(|| "take over the lock")?;
    let nothing = File::open("/dev/null").context(|| "open /dev/null")?;
    rustix::stdio::dup2_stdin(&nothing).context(|| "close standard input")?;
    // Of the executable before this one, which knew its children.
    while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
    // Not to end with the terminal or the session of who started it. After `renew` it has its own.
    let _ = rustix::process::setsid();
    let config = match person {
        Some(uid) => Config::load_as(uid)?,
        None => Config::load()?,
    };
    Supervisor {
        config: &config,
        id,
        lock: Some(lock),
    }
    .work()
}

struct Supervisor<'a> {
    config: &'a Config,
    id: &'a str,
    lock: Option<OwnedFd>,
}

impl Supervisor<'_> {
    fn work(&mut self) -> Result<()> {
        let paths = self.config.paths();
        let mut attempts = Attempts::NONE;
        let mut counted = None;
        loop {
            let begin = Instant::now();
            let running = container::load(&paths, self.id)?;
            let checking = running.and_then(|running| Checking::begin(&paths, &running));
            let ended = container::wait(&paths, self.id);
            drop(checking);
            let exit = match ended {
                Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
                ended => ended?,
            };
            let Some(ended) = container::load(&paths, self.id)? else {
                return Ok(());
            };
            let lock = container::lock(&ended)?;
            // Others had the lock, and did who knows what.
            let Some(ended) = container::load(&paths, self.id)? else {
                return Ok(());
            };
            if !container::is_idle(&ended) {
                continue;
            }
            let began = ended.status.started_ns.unwrap_or(exit.at_ns);
            // When the sandbox was killed nobody wrote down when that was.
            let ran = Duration::from_nanos(exit.at_ns.saturating_sub(began)).max(begin.elapsed());
            // The same end again: a start failed since.
            let ran = match counted.replace(exit.at_ns) == Some(exit.at_ns) {
                true => Duration::ZERO,
                false => ran,
            };
            let next = attempts.after(policy(&ended.record.details), &exit, ran);
            let Some(delay) = next else {
                self.lock = None;
                return Ok(());
            };
            drop(lock);
            self.rest(&ended, delay)?;
            match self.start() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
                Err(error) => report(&ended, &error),
            }
        }
    }

    /// Waits, unless the container is removed or stopped meanwhile, or somebody else starts it.
    fn rest(&self, ended: &Container, delay: Duration) -> Result<()> {
        let doing = || "watch the container's directory";
        let wanted = WatchFlags::MOVED_TO | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let watch = watch.and_then(|watch| {
            inotify::add_watch(&watch, ended.directory.path(), wanted)?;
            Ok(watch)
        });
        let watch = match watch {
            Ok(watch) => Some(watch),
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            // The kernel has a limit of them: it looks now and then instead.
            Err(_) => None,
        };
        let end = Instant::now() + delay;
        loop {
            let now = container::load(&self.config.paths(), self.id)?;
            let waits = now.as_ref().is_some_and(|now| {
                container::is_idle(now) && policy(&now.record.details) != Restart::No
            });
            let left = end.saturating_duration_since(Instant::now());
            if !waits || left.is_zero() {
                return Ok(());
            }
            let left = match watch {
                Some(_) => left,
                None => left.min(LOOK_AGAIN),
            };
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut descriptors: Vec<_> = watch
                .iter()
                .map(|watch| PollFd::new(watch, PollFlags::IN))
                .collect();
            match poll(&mut descriptors, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context(doing),
            }
            // What has happened is in the record.
            let mut events = [0; 4096];
            if let Some(watch) = &watch {
                while rustix::io::read(watch, &mut events).is_ok_and(|length| length > 0) {}
            }
        }
    }

    /// Executes hull's executable anew when there is another one in its place: after an update of
    /// the package, the container is started by the new one.
    fn renew(&self) -> Result<()> {
        let doing = || format!("execute {}", self.config.executable.display());
        let file = |path: &Path| Ok((path.metadata()?.dev(), path.metadata()?.ino()));
        let own: std::io::Result<_> = file(Path::new("/proc/self/exe"));
        let own = own.context(doing)?;
        // While it is being replaced there is none: another attempt follows.
        let there: std::io::Result<_> = file(&self.config.executable);
        let (true, Some(lock)) = (there.context(doing)? != own, &self.lock) else {
            return Ok(());
        };
        let lock = lock.try_clone().context(doing)?;
        let error = command(self.config, self.id)
            .stdin(Stdio::from(lock))
            .exec();
        Err(error).context(doing)
    }

    /// Starts the container; false when that is not wanted any more.
    fn start(&mut self) -> Result<bool> {
        self.renew()?;
        let timings = Timings::default();
        match Attempt::prepare(self.id, self.config, now_ns(), &timings)? {
            Attempt::Running(_) => Ok(true),
            Attempt::Again(again) if policy(again.details()) == Restart::No => {
                self.lock = None;
                Ok(false)
            }
            Attempt::Again(again) => {
                start_again(again.by_itself(), self.config, None).map(|_| true)
            }
        }
    }
}

/// Writes down why a container could not be started.
fn report(container: &Container, error: &Error) {
    let path = container.directory.path().join(MESSAGE_FILE);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let seconds = unix_time_ns() / 1_000_000_000;
    let line = format!("{seconds} {}\n", error.message);
    let written = options
        .open(&path)
        .and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        tracing::warn!("cannot write {}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(1);

    #[test]
    fn delays_double_up_to_a_minute_and_begin_anew_after_a_long_life() {
        let mut attempts = Attempts::NONE;
        let exit = Exit::now(0);
        let mut after = |ran| attempts.after(Restart::Always, &exit, ran);
        let delays: Vec<_> = (0..12).filter_map(|_| after(SHORT)).collect();
        assert_eq!(delays[..3], [100, 200, 400].map(Duration::from_millis));
        assert_eq!(delays[11], LONGEST_DELAY);
        assert_eq!(after(LONG_ENOUGH), Some(FIRST_DELAY));
    }

    #[test]
    fn policies() {
        for (policy, status, again) in [
            (Restart::No, 1, 0),
            (Restart::Always, 0, 9),
            (Restart::UnlessStopped, 0, 9),
            (Restart::OnFailure(None), 0, 0),
            (Restart::OnFailure(None), 1, 9),
            (Restart::OnFailure(Some(3)), 1, 3),
        ] {
            let mut attempts = Attempts::NONE;
            let exit = Exit::now(status);
            let starts = (0..9)
                .take_while(|_| attempts.after(policy, &exit, SHORT).is_some())
                .count();
            assert_eq!(starts, again, "{policy:?} {status}");
        }
    }
}
