//! An agent that comes late, that breaks its connection, or that does not answer.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::fake::{Script, World};
use super::{FOREVER, each, process, same, took};
use crate::config::EndPolicy;
use crate::error::ErrorKind;
use crate::store::State;

/// Time goes on in larger steps here: much of it passes.
const TICK: u64 = 20;

/// An agent that dials so late, or does not answer to the first calls.
#[derive(Debug)]
struct Boot {
    dials: Option<u64>,
    silent: &'static [&'static str],
    /// Why it does not come up.
    reason: Option<&'static str>,
    took: u64,
}

#[tokio::test(start_paused = true)]
async fn a_guest_has_ninety_seconds_to_come_up() {
    let case = |dials, silent, reason, took| Boot {
        dials,
        silent,
        reason,
        took,
    };
    let cases = [
        case(Some(0), &[][..], None, 0),
        case(Some(1000), &[], None, 1000),
        case(Some(89_900), &[], None, 89_900),
        case(Some(90_100), &[], Some("not within 90 s"), 90_000),
        case(None, &[], Some("not within 90 s"), 90_000),
        case(Some(0), &["hello"], Some("does not answer"), 30_000),
        case(Some(1000), &["configure"], Some("does not answer"), 31_000),
        case(Some(80_000), &["hello"], Some("not within 90 s"), 90_000),
    ];
    each(&cases, async |case| {
        let script = Script {
            dials: case.dials,
            silent: case.silent.to_vec(),
            tick: TICK,
            ..Script::default()
        };
        let world = World::boot(EndPolicy::LastContainer, script).await;
        let created = timeout(FOREVER, world.create("c", true)).await;
        let created = created.map_err(|_| "never")?;
        took(world.now(), case.took, TICK)?;
        match case.reason {
            None => same("state", created.unwrap().state(), State::Running),
            Some(reason) => {
                let error = created.map(drop).unwrap_err();
                same("kind", error.kind, ErrorKind::GuestFailed)?;
                let text = format!("the guest did not come up: {reason}");
                let right = error.message.contains("the guest did not come up")
                    && error.message.contains(reason);
                same(&error.message, right, true).map_err(|error| format!("{error}, {text}"))?;
                world.sandbox.ended().await;
                same(
                    "its directory is left",
                    world.path.directory().exists(),
                    false,
                )
            }
        }
    })
    .await;
}

/// A connection that breaks, and is made anew.
#[derive(Debug)]
struct Break {
    /// When the agent dials again.
    again: Option<u64>,
    /// How often.
    times: u32,
    /// Whether that is in time.
    lives: bool,
}

#[tokio::test(start_paused = true)]
async fn an_agent_has_ten_seconds_to_dial_again_and_nothing_is_lost_meanwhile() {
    let case = |again, times, lives| Break {
        again,
        times,
        lives,
    };
    let cases = [
        case(Some(0), 1, true),
        case(Some(0), 50, true),
        case(Some(20), 10, true),
        case(Some(1000), 3, true),
        case(Some(9900), 2, true),
        case(Some(11_000), 1, false),
        case(None, 1, false),
    ];
    each(&cases, async |case| {
        let world = World::boot(EndPolicy::LastContainer, Script::default()).await;
        let container = world.create("c", true).await.unwrap();
        world.release();
        let executed = container.exec(process("c")).await.unwrap();
        let waiting = tokio::spawn(async move { executed.wait().await });
        for _ in 0..case.times {
            world.guest.hang_up();
            // Calls wait for the next connection.
            let call = tokio::spawn({
                let container = container.clone();
                async move { container.update(&super::empty()).await }
            });
            if let Some(delay) = case.again {
                sleep(Duration::from_millis(delay)).await;
                world.guest.dial();
            }
            let called = timeout(FOREVER, call).await.map_err(|_| "a call hangs")?;
            let called = called.unwrap().map_err(|error| error.kind);
            let expected = if case.lives {
                Ok(())
            } else {
                Err(ErrorKind::GuestFailed)
            };
            same("a call", called, expected)?;
            sleep(Duration::from_millis(100)).await;
        }
        if case.lives {
            same("state", container.state(), State::Running)?;
            world.guest.exits("c", "exec1", 7);
            let exit = timeout(FOREVER, waiting).await.map_err(|_| "exec hangs")?;
            same("the process", exit.unwrap().status, 7)?;
            world.guest.exits("c", "", 3);
            let exit = timeout(FOREVER, container.ended())
                .await
                .map_err(|_| "hangs")?;
            return same("told", (exit.status, exit.reason), (3, None));
        }
        let exit = timeout(FOREVER, container.ended())
            .await
            .map_err(|_| "hangs")?;
        same("told", exit.status, 125)?;
        let reason = exit.reason.unwrap_or_default();
        same(&reason, reason.contains("closed its connection"), true)?;
        timeout(FOREVER, waiting)
            .await
            .map_err(|_| "exec hangs")?
            .unwrap();
        same(
            "its directory is left",
            world.path.directory().exists(),
            false,
        )
    })
    .await;
}

/// A call that is not answered.
#[derive(Debug)]
struct Unanswered {
    call: &'static str,
    took: u64,
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_not_answered_fails_in_a_bounded_time_and_the_container_runs_on() {
    let case = |call, took| Unanswered { call, took };
    let cases = [
        case("exec", 30_000),
        case("update", 30_000),
        case("pause", 30_000),
        case("signal", 30_000),
        case("start", 300_000),
    ];
    each(&cases, async |case| {
        let script = Script {
            tick: TICK,
            ..Script::silent(case.call)
        };
        let world = World::boot(EndPolicy::Explicit, script).await;
        let container = world.create("c", case.call != "start").await.unwrap();
        let state = container.state();
        let began = world.now();
        let call = async {
            match case.call {
                "exec" => container.exec(process("c")).await.map(drop),
                "update" => container.update(&super::empty()).await,
                "pause" => container.set_frozen(true).await,
                "signal" => container.signal(1, false).await,
                _ => container.start().await,
            }
        };
        let done = timeout(FOREVER, call).await.map_err(|_| "never")?;
        let error = done.unwrap_err();
        took(world.now() - began, case.took, TICK)?;
        same("kind", error.kind, ErrorKind::GuestFailed)?;
        same("state", container.state(), state)?;
        same("sandbox", world.path.is_alive(), true)
    })
    .await;
}
