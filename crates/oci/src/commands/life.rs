//! `start`, `kill`, `pause`, `resume`, `update`, `delete`.

use std::path::Path;

use hull_sandbox::control;
use hull_sandbox::control::protocol::Request;
use hull_sandbox::error::{Context, Error, Result};
use hull_sandbox::store::{State, keepers};
use oci_spec::runtime::{Hooks, LinuxMemory, LinuxResources};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use serde_json::value::to_raw_value;

use super::{OVERHEAD, Settings, with_runc_wording};
use crate::cgroup::Place;
use crate::container::{Container, Record, connect, recovered_record, state};
use crate::{guest_spec, hooks, update};

/// How long a keeper may live on when its process has ended: it writes what is left of the output.
const KEEPER_EXIT_GRACE: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// How often a machine's processes are looked for that are born while others are moved.
const HAND_OVER_ROUNDS: usize = 10;

/// The container, its record and its status.
pub(super) fn load(settings: &Settings, id: &str) -> Result<(Container, Record, State)> {
    let container = settings.root.find(id)?;
    let record = container.record()?;
    let status = container.status(&record)?.state;
    Ok((container, record, status))
}

fn hooks_of(container: &Container) -> Result<Option<Hooks>> {
    match container.config()?.get("hooks") {
        None | Some(Value::Null) => Ok(None),
        Some(hooks) => serde_json::from_value(hooks.clone()).context(|| "read hooks"),
    }
}

/// Lets the init of a created container run.
///
/// # Errors
/// It was started before, or its command cannot be executed.
pub fn start(settings: &Settings, id: &str) -> Result<()> {
    let (container, record, status) = load(settings, id)?;
    // In runc's words.
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
    let request = Request::Start {
        container: id.to_owned(),
    };
    connect(&record)?.do_(&request).map_err(with_runc_wording)?;
    if let Some(hooks) = hooks_of(&container)? {
        let state = state(&record, State::Running, record.details.keeper.pid);
        // The specification: the failure of such a hook is logged, and life goes on. So below.
        hooks::run_all(
            "poststart",
            hooks.poststart().as_ref(),
            &state,
            settings.warn,
        );
    }
    Ok(())
}

/// Sends a signal to a container's init, or to all its processes.
///
/// # Errors
/// It does not run.
pub fn kill(settings: &Settings, id: &str, signal: u32, all: bool) -> Result<()> {
    let (_, record, status) = load(settings, id)?;
    if status == State::Stopped {
        return match all {
            // As runc: there is nothing that could be left of it.
            true => Ok(()),
            false => Err(Error::wrong_state("container not running")),
        };
    }
    let request = Request::Signal {
        container: id.to_owned(),
        signal,
        all,
    };
    connect(&record)?.do_(&request)
}

/// Freezes a container.
///
/// # Errors
/// It does not run.
pub fn pause(settings: &Settings, id: &str) -> Result<()> {
    freeze(settings, id, true)
}

/// Thaws a container.
///
/// # Errors
/// It is not frozen.
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
/// It does not run, or a limit cannot be set.
pub fn update(settings: &Settings, id: &str, resources: &LinuxResources) -> Result<()> {
    let (container, mut record, status) = load(settings, id)?;
    if status == State::Stopped {
        return Err(Error::wrong_state("container not running"));
    }
    let current = match &record.details.resources {
        Some(current) => current.clone(),
        None => resources_of(&container)?,
    };
    let mut resources = resources.clone();
    update::complete(&mut resources, &current);
    let mut guest = serde_json::to_value(&resources).context(|| "encode linux.resources")?;
    if let Some(guest) = guest.as_object_mut() {
        for note in guest_spec::not_applied(guest) {
            (settings.warn)(&note);
        }
        guest_spec::for_guest(guest);
    }
    let request = Request::Update {
        container: id.to_owned(),
        resources: to_raw_value(&guest).context(|| "encode linux.resources")?,
    };
    connect(&record)?.do_(&request)?;
    let wall = wall(&record, &resources);
    record.details.groups.apply(&resources, wall)?;
    record.details.resources = Some(update::merge(&current, &resources)?);
    container.store(&record)
}

fn resources_of(container: &Container) -> Result<LinuxResources> {
    match container.config()?["linux"].get("resources") {
        None | Some(Value::Null) => Ok(LinuxResources::default()),
        Some(resources) => serde_json::from_value(resources.clone()).context(|| "read resources"),
    }
}

/// What the host's processes may have beside a limit of memory: a machine keeps its size when the
/// limit of what runs in it becomes lower.
fn wall(record: &Record, resources: &LinuxResources) -> u64 {
    let limit = resources
        .memory()
        .as_ref()
        .and_then(LinuxMemory::limit)
        .and_then(|limit| u64::try_from(limit).ok())
        .unwrap_or(u64::MAX);
    let machine = record.details.memory.saturating_add(OVERHEAD);
    machine.saturating_sub(limit).max(OVERHEAD)
}

/// Removes a container and everything of it. One that runs only by `force`, which always succeeds
/// and may be repeated.
///
/// # Errors
/// There is no such container, or it runs, without `force`; something of it cannot be removed.
pub fn delete(settings: &Settings, id: &str, force: bool) -> Result<()> {
    let container = match settings.root.find(id) {
        Err(_) if force && crate::container::is_valid_id(id) => return Ok(()),
        found => found?,
    };
    let record = match container.record() {
        // Killed before there was more than the directory, or damaged.
        Err(_) if force => what_is_left(settings, &container),
        record => record?,
    };
    let status = match container.status(&record) {
        Ok(status) => status.state,
        // What cannot be read cannot keep it from being removed.
        Err(_) if force => State::Stopped,
        Err(error) => return Err(error),
    };
    if !force && !matches!(status, State::Stopped | State::Created) {
        return Err(Error::wrong_state(format!(
            "cannot delete container {id} that is not stopped: {status}"
        )));
    }
    if let Some(sandbox) = &record.sandbox {
        control::remove(sandbox, &record.id)?;
    }
    end_keeper(&record);
    keepers::forget(&settings.run_directory, record.details.keeper);
    // What cannot be read cannot have been run.
    if let Ok(Some(hooks)) = hooks_of(&container) {
        let state = state(&record, State::Stopped, 0);
        hooks::run_all("poststop", hooks.poststop().as_ref(), &state, settings.warn);
    }
    hand_over(settings, &record)?;
    record.details.groups.remove()?;
    container.remove()
}

/// A record of what can be found of a container without its own: its groups from its configuration,
/// its sandbox from the keepers among the processes in them.
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

/// The machine of a pod is in the groups of the container that it was started for. When that goes
/// before others, it moves to the groups of one that stays.
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
        (stays && lives()).then_some(other)
    });
    let Some(heir) = heir else { return Ok(()) };
    for _ in 0..HAND_OVER_ROUNDS {
        let pids = record.details.groups.processes()?;
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            // One that has just ended; any other is found again, and at last by the removal.
            let _ = heir.details.groups.join(pid);
        }
    }
    Ok(())
}

/// The keeper ends when it has carried everything; one that does not is stuck with a reader that
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
    // It may have ended, and its id be another's, between the question and the descriptor.
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
