//! Containers and sandboxes that are ended: stop, delete, shutdown, the end of the last container.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::fake::{Script, World};
use super::{FOREVER, each, same, took};
use crate::config::{ContainerConfig, EndPolicy, Removal};
use crate::error::ErrorKind;
use crate::sandbox::Reason;
use crate::store::{Exit, State};

const UNRESPONSIVE: &str = "it did not react to SIGKILL, so its machine was ended";
const REMOVED: &str = "it was removed";

type Told = (i32, Option<String>);

fn told(exit: Exit) -> Told {
    (exit.status, exit.reason)
}

fn expected(status: i32, reason: Option<&str>) -> Told {
    (status, reason.map(str::to_owned))
}

/// A container that is stopped.
#[derive(Debug)]
struct Stop {
    /// What the guest does not answer.
    silent: &'static [&'static str],
    /// How long the init lives after a signal.
    reactions: &'static [(u32, u64)],
    frozen: bool,
    timeout: u64,
    status: i32,
    reason: Option<&'static str>,
    took: u64,
}

const STOP: Stop = Stop {
    silent: &[],
    reactions: &[],
    frozen: false,
    timeout: 1000,
    status: 137,
    reason: None,
    took: 0,
};

#[tokio::test(start_paused = true)]
async fn stop_ends_a_container_within_its_timeout_and_two_seconds_whatever_the_guest_does() {
    let cases = [
        Stop {
            reactions: &[(15, 3), (9, 1)],
            status: 143,
            took: 3,
            ..STOP
        },
        Stop {
            reactions: &[(15, 900), (9, 1)],
            status: 143,
            took: 900,
            ..STOP
        },
        Stop {
            reactions: &[(15, 3), (9, 1)],
            timeout: 10_000,
            status: 143,
            took: 3,
            ..STOP
        },
        Stop {
            reactions: &[(15, 3), (9, 1)],
            frozen: true,
            status: 143,
            took: 3,
            ..STOP
        },
        // Too late, or never.
        Stop {
            reactions: &[(15, 1500), (9, 1)],
            took: 1001,
            ..STOP
        },
        Stop {
            reactions: &[(9, 1)],
            took: 1001,
            ..STOP
        },
        Stop {
            reactions: &[(9, 1)],
            timeout: 0,
            took: 1,
            ..STOP
        },
        Stop {
            reactions: &[(9, 1900)],
            took: 2900,
            ..STOP
        },
        // Nothing helps but the end of the machine.
        Stop {
            reactions: &[(9, 2500)],
            reason: Some(UNRESPONSIVE),
            took: 3000,
            ..STOP
        },
        Stop {
            reason: Some(UNRESPONSIVE),
            took: 3000,
            ..STOP
        },
        Stop {
            timeout: 0,
            reason: Some(UNRESPONSIVE),
            took: 2000,
            ..STOP
        },
        // An agent that hangs.
        Stop {
            silent: &["signal"],
            reason: Some(UNRESPONSIVE),
            took: 3000,
            ..STOP
        },
        Stop {
            silent: &["resume"],
            frozen: true,
            reason: Some(UNRESPONSIVE),
            took: 3000,
            ..STOP
        },
    ];
    each(&cases, async |case| {
        let script = Script {
            silent: case.silent.to_vec(),
            reactions: case.reactions.to_vec(),
            ..Script::default()
        };
        let world = World::boot(EndPolicy::LastContainer, script).await;
        let container = world.create("c", true).await.unwrap();
        world.release();
        if case.frozen {
            container.set_frozen(true).await.unwrap();
        }
        let began = world.now();
        let stopped = container.stop(15, Duration::from_millis(case.timeout));
        let exit = timeout(FOREVER, stopped).await.map_err(|_| "never")?;
        took(world.now() - began, case.took, 1)?;
        same(
            "told",
            told(exit.unwrap()),
            expected(case.status, case.reason),
        )?;
        let written = world.status("c").unwrap();
        same("written down", written.state, State::Stopped)?;
        let exit = expected(case.status, case.reason);
        same("written down", written.exit.map(told), Some(exit))?;
        same(
            "its directory is left",
            world.path.directory().exists(),
            false,
        )?;
        same("its processes are gone", world.guest.is_gone(), true)
    })
    .await;
}

/// A container that is sent SIGKILL.
#[derive(Debug)]
struct Kill {
    silent: &'static [&'static str],
    reactions: &'static [(u32, u64)],
    reason: Option<&'static str>,
    took: u64,
}

#[tokio::test(start_paused = true)]
async fn a_killed_container_is_dead_whatever_its_guest_says() {
    let case = |silent, reactions, reason, took| Kill {
        silent,
        reactions,
        reason,
        took,
    };
    let cases = [
        case(&[][..], &[(9, 1)][..], None, 1),
        case(&[], &[(9, 9000)], None, 9000),
        // It does not react, or the agent does not.
        case(&[], &[], Some(UNRESPONSIVE), 10_000),
        case(&["signal"], &[], Some(UNRESPONSIVE), 10_000),
        case(&["signal", "wait"], &[(9, 1)], Some(UNRESPONSIVE), 10_000),
        // It says that the init has exited, and not that this was all.
        case(&["wait"], &[(9, 1)], Some(UNRESPONSIVE), 61_000),
        case(&["wait", "delete"], &[(9, 1)], Some(UNRESPONSIVE), 65_000),
    ];
    each(&cases, async |case| {
        let script = Script {
            silent: case.silent.to_vec(),
            reactions: case.reactions.to_vec(),
            tick: 20,
            ..Script::default()
        };
        let world = World::boot(EndPolicy::LastContainer, script).await;
        let container = world.create("c", true).await.unwrap();
        world.release();
        let began = world.now();
        let killing = container.clone();
        tokio::spawn(async move { killing.signal(9, false).await });
        let ended = timeout(FOREVER, container.ended()).await;
        let exit = ended.map_err(|_| "never")?;
        took(world.now() - began, case.took, 20)?;
        same("told", told(exit), expected(137, case.reason))?;
        same("its processes are gone", world.guest.is_gone(), true)
    })
    .await;
}

/// A container that is deleted.
#[derive(Debug)]
struct Delete {
    silent: &'static [&'static str],
    reactions: &'static [(u32, u64)],
    /// There is a second container.
    beside: bool,
    /// Its sandbox is ended with it.
    ends: bool,
    took: u64,
}

const DELETE: Delete = Delete {
    silent: &[],
    reactions: &[(9, 1)],
    beside: false,
    ends: true,
    took: 0,
};

#[tokio::test(start_paused = true)]
async fn delete_leaves_nothing_of_a_container_within_five_seconds_whatever_the_guest_does() {
    let cases = [
        Delete { took: 1, ..DELETE },
        Delete {
            reactions: &[(9, 800)],
            took: 800,
            ..DELETE
        },
        // The agent lets go of it after a second.
        Delete {
            reactions: &[],
            took: 1000,
            ..DELETE
        },
        Delete {
            silent: &["signal"],
            took: 5000,
            ..DELETE
        },
        Delete {
            silent: &["delete"],
            reactions: &[],
            took: 5000,
            ..DELETE
        },
        Delete {
            silent: &["signal", "delete"],
            took: 5000,
            ..DELETE
        },
        // Others go on.
        Delete {
            beside: true,
            ends: false,
            took: 1,
            ..DELETE
        },
        Delete {
            beside: true,
            ends: false,
            reactions: &[],
            took: 1000,
            ..DELETE
        },
        Delete {
            beside: true,
            silent: &["signal"],
            took: 5000,
            ..DELETE
        },
        Delete {
            beside: true,
            silent: &["delete"],
            took: 5000,
            ..DELETE
        },
    ];
    each(&cases, async |case| {
        let script = Script {
            silent: case.silent.to_vec(),
            reactions: case.reactions.to_vec(),
            ..Script::default()
        };
        let mut world = World::boot(EndPolicy::LastContainer, script).await;
        let container = world.create("c", true).await.unwrap();
        let beside = match case.beside {
            true => Some(world.create("other", true).await.unwrap()),
            false => None,
        };
        world.release();
        let began = world.now();
        let deleted = timeout(FOREVER, container.delete());
        deleted.await.map_err(|_| "never")?.unwrap();
        took(world.now() - began, case.took, 1)?;
        let known = world.sandbox.container("c").map(drop);
        let known = known.map_err(|error| error.kind);
        same("it is known", known, Err(ErrorKind::NotFound))?;
        let events = world.events();
        let deletions = events.iter().filter(|event| *event == "deleted c");
        same("deletions", deletions.count(), 1)?;
        same(
            "the sandbox is left",
            world.path.directory().exists(),
            !case.ends,
        )?;
        let other = beside.map(|other| other.state());
        let state = if case.ends {
            State::Stopped
        } else {
            State::Running
        };
        same("the other one", other, case.beside.then_some(state))
    })
    .await;
}

/// A sandbox that is shut down by force.
#[derive(Debug)]
struct Shutdown {
    script: Script,
    /// Whether its container runs; else it is being created.
    runs: bool,
    reason: Reason,
    status: i32,
    text: &'static str,
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_is_shut_down_at_once_whatever_the_guest_does() {
    let mut cases = Vec::new();
    for (reason, status, text) in [
        (
            Reason::Terminated,
            143,
            "the sandbox process was told to end",
        ),
        (Reason::Removed, 137, REMOVED),
        (Reason::Unresponsive, 137, UNRESPONSIVE),
    ] {
        let mut case = |script, runs| {
            cases.push(Shutdown {
                script,
                runs,
                reason,
                status,
                text,
            })
        };
        case(
            Script {
                dials: None,
                ..Script::default()
            },
            false,
        );
        for silent in ["hello", "configure", "create"] {
            case(Script::silent(silent), false);
        }
        case(Script::default(), true);
        for silent in ["wait", "shutdown", "drain", "delete"] {
            case(Script::silent(silent), true);
        }
    }
    each(&cases, async |case| {
        let world = World::boot(EndPolicy::Explicit, case.script.clone()).await;
        let creating = tokio::spawn({
            let sandbox = world.sandbox.clone();
            let path = world.directory("c");
            async move {
                let directory = crate::store::Directory::create(&path).unwrap();
                let config = ContainerConfig::new("c", super::empty());
                sandbox.create(config, directory, Vec::new()).await
            }
        });
        sleep(Duration::from_millis(200)).await;
        let began = world.now();
        world.sandbox.shutdown(case.reason);
        // The first reason is the one that counts.
        world.sandbox.shutdown(Reason::Removed);
        let gone = timeout(FOREVER, world.sandbox.ended())
            .await
            .map_err(|_| "never")?;
        took(world.now() - began, 0, 1)?;
        same("reason", gone.reason.contains(case.text), true)?;
        let created = timeout(FOREVER, creating)
            .await
            .map_err(|_| "the caller waits")?;
        let created = created.unwrap();
        match case.runs {
            true => {
                let written = world.status("c").unwrap();
                let exit = expected(case.status, Some(case.text));
                same("written down", written.exit.map(told), Some(exit))?;
                same("told", created.is_ok(), true)?;
            }
            false => {
                let error = created.err().unwrap();
                same("told", error.kind, ErrorKind::WrongState)?;
                same("told", error.message.contains(case.text), true)?;
                same("written down", world.status("c"), None)?;
            }
        }
        same(
            "its directory is left",
            world.path.directory().exists(),
            false,
        )?;
        same("its processes are gone", world.guest.is_gone(), true)
    })
    .await;
}

/// Inits that exit in an order, and when the sandbox ends.
#[derive(Debug)]
struct Order {
    end: EndPolicy,
    /// How many containers.
    containers: usize,
    /// When which one exits.
    exits: &'static [(u64, usize)],
    /// When the sandbox begins to end.
    ends: Option<u64>,
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_ends_with_its_last_container_or_only_when_it_is_told_to() {
    use EndPolicy::{Explicit, LastContainer};
    let case = |end, containers, exits, ends| Order {
        end,
        containers,
        exits,
        ends,
    };
    let cases = [
        case(LastContainer, 1, &[(100, 0)], Some(100)),
        case(LastContainer, 2, &[(100, 0), (300, 1)], Some(300)),
        case(LastContainer, 2, &[(100, 1), (300, 0)], Some(300)),
        case(LastContainer, 2, &[(100, 0)], None),
        case(LastContainer, 3, &[(100, 2), (100, 1), (100, 0)], Some(100)),
        case(
            LastContainer,
            3,
            &[(100, 2), (200, 0), (9000, 1)],
            Some(9000),
        ),
        case(Explicit, 1, &[(100, 0)], None),
        case(Explicit, 3, &[(100, 2), (200, 0), (300, 1)], None),
        case(Explicit, 0, &[], None),
        case(LastContainer, 0, &[], Some(0)),
    ];
    each(&cases, async |case| {
        let mut world = World::boot(case.end, Script::default()).await;
        let mut all = Vec::new();
        for number in 0..case.containers {
            all.push(world.create(&format!("c{number}"), true).await.unwrap());
        }
        sleep(Duration::from_millis(200)).await;
        let began = world.now();
        world.release();
        let mut at = 0;
        for (time, number) in case.exits {
            sleep(Duration::from_millis(time - at)).await;
            at = *time;
            world.guest.exits(
                &format!("c{number}"),
                "",
                40 + i32::try_from(*number).unwrap(),
            );
        }
        let ended = timeout(Duration::from_secs(20), world.sandbox.ended()).await;
        match case.ends {
            Some(time) => took(world.now() - began, time, 1)?,
            None => same("it has ended", ended.is_ok(), false)?,
        }
        for (number, container) in all.iter().enumerate() {
            let exits = case.exits.iter().any(|(_, one)| *one == number);
            let state = if exits {
                State::Stopped
            } else {
                State::Running
            };
            same("state", container.state(), state)?;
            let written = world.status(container.id()).unwrap();
            same("written down", written.state, state)?;
            let status = exits.then_some(40 + i32::try_from(number).unwrap());
            same("written down", written.exit.map(|exit| exit.status), status)?;
        }
        let events = world.events();
        let exits = events.iter().filter(|event| event.starts_with("exited"));
        same("exits", exits.count(), case.exits.len())?;
        if case.ends.is_some() {
            let late = world.create("late", true).await.map(drop);
            same(
                "a late one",
                late.map_err(|error| error.kind),
                Err(ErrorKind::WrongState),
            )?;
        }
        Ok(())
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_id_is_used_once_and_again_after_its_deletion() {
    let world = World::boot(EndPolicy::Explicit, Script::default()).await;
    let first = world.create("c", true).await.unwrap();
    let again = world.create("c", true).await.map(drop).unwrap_err();
    assert_eq!(again.kind, ErrorKind::Exists);
    world.guest.exits("c", "", 0);
    first.ended().await;
    // A container that has ended has its id until it is deleted.
    let again = world.create("c", true).await.map(drop).unwrap_err();
    assert_eq!(again.kind, ErrorKind::Exists);
    first.delete().await.unwrap();
    world.create("c", true).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_container_that_removes_itself_leaves_neither_directory_nor_name() {
    let world = World::boot(EndPolicy::LastContainer, Script::default()).await;
    let link = world.directory("link");
    let container = world
        .create_with(ContainerConfig {
            removal: Some(Removal {
                directory: world.directory("c"),
                links: vec![link.clone()],
            }),
            ..ContainerConfig::new("c", super::empty())
        })
        .await
        .unwrap();
    world.release();
    std::os::unix::fs::symlink("c", &link).unwrap();
    world.guest.exits("c", "", 5);
    assert_eq!(container.ended().await.status, 5);
    assert!(!world.directory("c").exists());
    assert!(std::fs::symlink_metadata(&link).is_err());
    assert!(world.sandbox.container("c").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_container_whose_status_cannot_be_written_is_not_left_in_the_guest() {
    let mut world = World::boot(EndPolicy::Explicit, Script::default()).await;
    let path = world.directory("c");
    let directory = crate::store::Directory::create(&path).unwrap();
    std::fs::remove_dir(&path).unwrap();
    let config = ContainerConfig::new("c", super::empty());
    let created = world.sandbox.create(config, directory, Vec::new()).await;
    assert!(created.err().unwrap().message.contains("status.json"));
    assert_eq!(world.guest.exit_of("c", ""), Some(137));
    assert_eq!(world.sandbox.containers().len(), 0);
    assert!(!world.events().contains(&"started c".to_owned()));
    // Its id is free.
    world.create("c", true).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_whose_starter_goes_before_there_is_a_container_ends_when_asked_to_delete_it() {
    // Whether the starter's end is noticed by then, after a moment, or never.
    for (leaves, ends) in [(Some(0), true), (Some(300), true), (None, false)] {
        let world = World::boot(EndPolicy::LastContainer, Script::default()).await;
        sleep(Duration::from_millis(200)).await;
        let own = world.sandbox.hold();
        if leaves == Some(0) {
            world.release();
        }
        let began = world.now();
        let asked = world.sandbox.end_if_unused(1);
        let leaving = async {
            if let Some(delay) = leaves {
                sleep(Duration::from_millis(delay)).await;
                world.release();
            }
        };
        let (ending, ()) = tokio::join!(asked, leaving);
        assert_eq!(ending, ends);
        took(world.now() - began, leaves.unwrap_or(1000), 1).unwrap();
        assert_eq!(world.sandbox.is_ending(), ends);
        drop(own);
    }
}

#[tokio::test(start_paused = true)]
async fn a_sandbox_with_containers_goes_on_when_asked_to_delete_another_one() {
    let world = World::boot(EndPolicy::LastContainer, Script::default()).await;
    world.create("c", true).await.unwrap();
    let began = world.now();
    assert!(!world.sandbox.end_if_unused(1).await);
    took(world.now() - began, 0, 1).unwrap();
}
