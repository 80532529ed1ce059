//! `start`, `kill`, `pause`, `resume`, `update`, `delete`.

use std::path::Path;

use hull_sandbox::cgroup::Place;
use hull_sandbox::config::MachineConfig;
use hull_sandbox::control;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::error::{Error, Result};
use hull_sandbox::store::{State, keepers};
use oci_spec::runtime::{LinuxMemory, LinuxResources};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Settings, with_runc_wording};
use crate::container::{Container, Record, connect, recovered_record, state};
use crate::{guest_spec, hooks, update};

/// How long a keeper may outlive its process to write the remaining output.
const KEEPER_EXIT_GRACE: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// Most passes over a machine's processes while moving them, as new ones may be forked meanwhile.
const HAND_OVER_ROUNDS: usize = 10;

/// The container, its record and its status.
pub(super) fn load(settings: &Settings, id: &str) -> Result<(Container, Record, State)> {
    let container = settings.root.find(id)?;
    let record = container.record()?;
    let status = container.status(&record)?.state;
    Ok((container, record, status))
}

/// Lets the init of a created container run.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if its state is not `created`;
/// `CommandNotFound` or `NotExecutable` if its command cannot be executed.
pub fn start(settings: &Settings, id: &str) -> Result<()> {
    let (container, record, status) = load(settings, id)?;
    // runc's messages.
    match status {
        State::Created => {}
        State::Stopped => {
            return Err(Error::wrong_state(
                "cannot start a container that has stopped",
            ));
        }
        State::Running | State::Paused => {
            return Err(Error::wrong_state(
                "cannot start an already running container",
            ));
        }
        State::Creating => {
            return Err(Error::wrong_state(
                "cannot start a container that is being created",
            ));
        }
    }
    if record.details.apart && has_routes(record.details.keeper.pid) {
        // Engines expect that one whose start fails has stopped, as with runc.
        // If this fails, it has ended by itself.
        let _ = kill(settings, id, Signal::KILL.as_raw() as u32, true);
        end_keeper(&record);
        return Err(Error::unsupported(
            "a network of its own for a container in the machine of another one, whose ipc, pid or \
             uts namespace it joins",
        )
        .hint("--network none, or the network of that container (--network container:…)"));
    }
    let request = Request::Start {
        container: id.to_owned(),
    };
    connect(&record)?.do_(&request).map_err(with_runc_wording)?;
    if let Some(hooks) = container.hooks()? {
        let state = state(&record, State::Running, record.details.keeper.pid);
        // The specification: failures of such hooks are logged and otherwise ignored. The same for
        // poststop.
        hooks::run_all(
            "poststart",
            hooks.poststart().as_ref(),
            &state,
            settings.warn,
        );
    }
    Ok(())
}

/// Whether an engine has connected the network namespace of a process.
fn has_routes(pid: i32) -> bool {
    let read = |file| std::fs::read_to_string(format!("/proc/{pid}/net/{file}"));
    // A table with a heading, and one without, which has loopback's.
    read("route").is_ok_and(|table| table.lines().count() > 1)
        || read("ipv6_route").is_ok_and(|table| {
            let mut interfaces = table
                .lines()
                .filter_map(|line| line.split_whitespace().last());
            interfaces.any(|interface| interface != "lo")
        })
}

/// Sends a signal to a container's init, or to all its processes.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if it has stopped, unless `all` is set.
pub fn kill(settings: &Settings, id: &str, signal: u32, all: bool) -> Result<()> {
    let (_, record, status) = load(settings, id)?;
    if status == State::Stopped {
        return match all {
            // As in runc: no process can be left.
            true => Ok(()),
            false => Err(Error::wrong_state("container not running")),
        };
    }
    if signal == Signal::KILL.as_raw() as u32 {
        // As in runc: whoever is killed may be frozen from outside.
        record.details.groups.thaw();
    }
    let request = Request::Signal {
        container: id.to_owned(),
        signal,
        all,
    };
    connect(&record)?.do_(&request)
}

/// Pauses a container.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if it is not running.
pub fn pause(settings: &Settings, id: &str) -> Result<()> {
    freeze(settings, id, true)
}

/// Resumes a container.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if it is not paused.
pub fn resume(settings: &Settings, id: &str) -> Result<()> {
    freeze(settings, id, false)
}

fn freeze(settings: &Settings, id: &str, frozen: bool) -> Result<()> {
    let (_, record, status) = load(settings, id)?;
    if status == State::Stopped {
        return Err(Error::wrong_state("container not running"));
    }
    let request = Request::Freeze {
        container: id.to_owned(),
        frozen,
    };
    connect(&record)?.do_(&request)
}

/// Changes limits, in the guest and on the host.
///
/// # Errors
/// `NotFound` if there is no such container; `WrongState` if it has stopped; otherwise a limit
/// cannot be set.
pub fn update(settings: &Settings, id: &str, resources: &LinuxResources) -> Result<()> {
    let (container, mut record, status) = load(settings, id)?;
    if status == State::Stopped {
        return Err(Error::wrong_state("container not running"));
    }
    let current = container.resources(&record)?;
    let mut resources = resources.clone();
    update::complete(&mut resources, &current);
    let (guest, notes) = guest_spec::limits(&resources)?;
    for note in notes {
        (settings.warn)(&note);
    }
    let request = Request::Update {
        container: id.to_owned(),
        resources: guest,
    };
    connect(&record)?.do_(&request)?;
    let wall = wall(&record, &resources);
    record.details.groups.apply(&resources, wall)?;
    record.details.resources = Some(update::merge(&current, &resources)?);
    container.store(&record)
}

/// What the host's processes may use in addition to the memory limit: a machine keeps its size when
/// its container's limit is lowered.
pub fn wall(record: &Record, resources: &LinuxResources) -> u64 {
    let limit = resources
        .memory()
        .as_ref()
        .and_then(LinuxMemory::limit)
        .and_then(|limit| u64::try_from(limit).ok())
        .unwrap_or(u64::MAX);
    let machine = record
        .details
        .memory
        .saturating_add(MachineConfig::OVERHEAD);
    machine.saturating_sub(limit).max(MachineConfig::OVERHEAD)
}

/// Removes a container and all its resources. With `force`, also one that is running, damaged or
/// missing.
///
/// # Errors
/// Without `force`: `NotFound` if there is no such container, `WrongState` if it is running. A
/// resource of the container cannot be removed.
pub fn delete(settings: &Settings, id: &str, force: bool) -> Result<()> {
    let container = match settings.root.find(id) {
        Err(_) if force && crate::container::is_valid_id(id) => return Ok(()),
        found => found?,
    };
    let record = match container.record() {
        // Killed right after the directory was created, or damaged.
        Err(_) if force => what_is_left(settings, &container),
        record => record?,
    };
    let status = match container.status(&record) {
        Ok(status) => status.state,
        // An unreadable status must not prevent removal.
        Err(_) if force => State::Stopped,
        Err(error) => return Err(error),
    };
    if !force && !matches!(status, State::Stopped | State::Created) {
        return Err(Error::wrong_state(format!(
            "cannot delete container {id} that is not stopped: {status}"
        )));
    }
    // Frozen processes cannot end.
    record.details.groups.thaw();
    if let Some(sandbox) = &record.sandbox {
        control::remove(sandbox, &record.id)?;
    }
    end_keeper(&record);
    keepers::forget(&settings.run_directory, record.details.keeper);
    // A container whose configuration is unreadable has never run.
    if let Ok(Some(hooks)) = container.hooks() {
        let state = state(&record, State::Stopped, 0);
        hooks::run_all("poststop", hooks.poststop().as_ref(), &state, settings.warn);
    }
    hand_over(settings, &record)?;
    if !shares_groups(settings, &record)? {
        record.details.groups.remove()?;
    }
    container.remove()
}

/// Whether a container that lives has the same control groups: it removes them later.
fn shares_groups(settings: &Settings, record: &Record) -> Result<bool> {
    let groups = &record.details.groups;
    if groups.directories.is_empty() {
        return Ok(false);
    }
    let shares = |container: &Container| {
        let other = container.record().ok()?;
        (container.id != record.id && other.details.groups == *groups).then_some(other)
    };
    Ok(settings.root.list()?.into_iter().any(|container| {
        shares(&container).is_some_and(|other| {
            let status = container.status(&other);
            status.is_ok_and(|status| status.state != State::Stopped)
        })
    }))
}

/// Recovers a record: control groups from the configuration, the sandbox from keepers among the
/// processes in them.
fn what_is_left(settings: &Settings, container: &Container) -> Record {
    let place = container.config().ok().and_then(|config| {
        let path = config["linux"]["cgroupsPath"].as_str().map(Path::new);
        Place::find(path, &container.id, settings.systemd_cgroup).ok()
    });
    let groups = place.map(|place| place.groups()).unwrap_or_default();
    let pids = groups.processes().unwrap_or_default();
    let kept = pids
        .into_iter()
        .find_map(|pid| keepers::find(&settings.run_directory, pid))
        .map(|keeper| (keeper.process, keeper.sandbox));
    recovered_record(container, groups, kept)
}

/// A pod's machine is in the groups of the container that it was started for. If that container is
/// deleted before others, the machine moves to the groups of a remaining one.
fn hand_over(settings: &Settings, record: &Record) -> Result<()> {
    if !record.sandbox_lives() {
        return Ok(());
    }
    let heir = settings.root.list()?.into_iter().find_map(|container| {
        let other = container.record().ok()?;
        let stays = other.sandbox == record.sandbox && container.id != record.id;
        let lives = || {
            container
                .status(&other)
                .is_ok_and(|status| status.state.is_alive())
        };
        (stays && lives()).then_some((container, other))
    });
    let Some((container, mut heir)) = heir else {
        return Ok(());
    };
    if let Some(mut bounds) = record.details.bounds.clone() {
        // A limit of the heir's own stays.
        bounds.memory = bounds.memory.filter(|_| heir.details.memory == 0);
        heir.details.groups.bound(&bounds);
        heir.details.bounds = Some(bounds);
        if let Err(error) = container.store(&heir) {
            (settings.warn)(&error.message);
        }
    }
    for _ in 0..HAND_OVER_ROUNDS {
        let pids = record.details.groups.processes()?;
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            // The process may just have ended; otherwise it is found in the next pass, or by the
            // removal.
            let _ = heir.details.groups.join(pid);
        }
    }
    Ok(())
}

/// A keeper exits when it has written all output; one that does not is blocked by a reader that
/// does not read.
fn end_keeper(record: &Record) {
    let keeper = record.details.keeper;
    if !keeper.lives() {
        return;
    }
    let Some(pidfd) =
        Pid::from_raw(keeper.pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
    else {
        return;
    };
    // The process id may have been reused before the pidfd was opened.
    if !keeper.lives() {
        return;
    }
    let ended = poll(
        &mut [PollFd::new(&pidfd, PollFlags::IN)],
        Some(&KEEPER_EXIT_GRACE),
    );
    if !matches!(ended, Ok(1)) {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
}
