//! A guest breaks down: each way in which its processes die, in each phase of a sandbox.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::fake::{Death, PANIC, Script, Who, World};
use super::{FOREVER, HOPS, process};
use crate::config::EndPolicy;
use crate::error::{Error, ErrorKind};
use crate::store::{Exit, State};

const SHOT: Death = Death::Signal(9);

/// How far a sandbox is, and which call is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The agent does not dial: a container waits for the guest.
    Booting,
    /// The agent has dialled and does not say its version.
    Greeting,
    /// It does not answer to its configuration.
    Configuring,
    /// It does not answer to the creation of a container.
    Creating,
    /// A container waits to be started, and somebody for its end.
    Created,
    /// The start of a container is not answered.
    Starting,
    /// A container runs, and somebody waits for its end.
    Running,
    /// The same, frozen.
    Paused,
    /// The call that executes a process is not answered.
    Executing,
    /// Somebody waits for a process that was executed.
    Executed,
    /// Limits are changed, without an answer.
    Updating,
    /// A container ignores its stop signal.
    Stopping,
    /// It is sent a signal, without an answer.
    Signalling,
    /// It is deleted, and does not react to the signal.
    Deleting,
    /// Its init has ended, its output is not read, and the guest waits for that.
    Draining,
    /// The guest was told to shut down.
    ShuttingDown,
}

impl Phase {
    fn script(self) -> Script {
        match self {
            Self::Booting => Script {
                dials: None,
                ..Script::default()
            },
            Self::Greeting => Script::silent("hello"),
            Self::Configuring => Script::silent("configure"),
            Self::Creating => Script::silent("create"),
            Self::Starting => Script::silent("start"),
            Self::Executing => Script::silent("exec"),
            Self::Updating => Script::silent("update"),
            Self::Stopping => Script {
                reactions: Vec::new(),
                ..Script::default()
            },
            Self::Signalling | Self::Deleting => Script::silent("signal"),
            Self::Draining => Script::silent("drain"),
            Self::ShuttingDown => Script::silent("shutdown"),
            Self::Created | Self::Running | Self::Paused | Self::Executed => Script::default(),
        }
    }

    /// Whether the guest has come up.
    fn is_up(self) -> bool {
        !matches!(self, Self::Booting | Self::Greeting | Self::Configuring)
    }

    /// Whether there is a container.
    fn has_container(self) -> bool {
        self.is_up() && self != Self::Creating
    }

    /// Whether its init has ended by itself before.
    fn has_ended(self) -> bool {
        matches!(self, Self::Draining | Self::ShuttingDown)
    }

    /// Brings a sandbox there; what is under way.
    async fn enter(self, world: &World) -> Call {
        let sandbox = world.sandbox.clone();
        if !self.has_container() {
            let directory = world.directory("c");
            let call = tokio::spawn(async move {
                let directory = crate::store::Directory::create(&directory).unwrap();
                let config = crate::config::ContainerConfig::new("c", super::empty());
                sandbox.create(config, directory, Vec::new()).await?;
                Ok(None)
            });
            sleep(Duration::from_millis(200)).await;
            world.release();
            return Box::pin(async move { call.await.unwrap() });
        }
        let started = !matches!(self, Self::Created | Self::Starting);
        let container = world.create("c", started).await.unwrap();
        world.release();
        if self == Self::Paused {
            container.set_frozen(true).await.unwrap();
        }
        let executed = match self {
            Self::Executed => Some(container.exec(process("c")).await.unwrap()),
            _ => None,
        };
        if self.has_ended() {
            world.guest.exits("c", "", 3);
        }
        let call = tokio::spawn(async move {
            let ended = match self {
                Self::Starting => return container.start().await.map(|()| None),
                Self::Executing => return container.exec(process("c")).await.map(|_| None),
                Self::Updating => return container.update(&super::empty()).await.map(|()| None),
                Self::Signalling => return container.signal(15, false).await.map(|()| None),
                Self::Deleting => return container.delete().await.map(|()| None),
                Self::Stopping => container.stop(15, FOREVER).await?,
                Self::Executed => executed.unwrap().wait().await,
                _ => container.ended().await,
            };
            Ok(Some(ended))
        });
        sleep(Duration::from_millis(200)).await;
        Box::pin(async move { call.await.unwrap() })
    }
}

type Call = Pin<Box<dyn Future<Output = Result<Option<Exit>, Error>>>>;

/// How a guest breaks.
struct Breakdown {
    first: (Who, Death),
    /// So much later.
    second: Option<(u64, Who, Death)>,
    /// What is said.
    reason: &'static str,
    /// When it is known, after the first death.
    known: u64,
}

const fn breakdown(
    first: (Who, Death),
    second: Option<(u64, Who, Death)>,
    reason: &'static str,
    known: u64,
) -> Breakdown {
    Breakdown {
        first,
        second,
        reason,
        known,
    }
}

const MACHINE_SHOT: &str = "the machine process was killed by SIGKILL";
const DEVICES_SHOT: &str = "the device process was killed by SIGKILL";
const DEVICES_FAILED: &str = "the device process ended with status 1";
const LEFT: &str = "the machine has left its devices";

/// Who dies, who follows when, what is said, and when.
const BREAKDOWNS: &[Breakdown] = &[
    breakdown((Who::Machine, SHOT), None, MACHINE_SHOT, 0),
    breakdown(
        (Who::Machine, SHOT),
        Some((1, Who::Devices, Death::Code(0))),
        MACHINE_SHOT,
        0,
    ),
    breakdown(
        (Who::Machine, SHOT),
        Some((5, Who::Devices, SHOT)),
        MACHINE_SHOT,
        0,
    ),
    // Without its devices a machine ends in other ways than by a signal, so these are waited for.
    breakdown(
        (Who::Machine, Death::Code(0)),
        None,
        "the guest shut down",
        40,
    ),
    breakdown(
        (Who::Machine, Death::Code(0)),
        Some((1, Who::Devices, Death::Code(0))),
        "the guest shut down",
        1,
    ),
    breakdown(
        (Who::Machine, Death::Code(0)),
        Some((10, Who::Devices, Death::Code(1))),
        DEVICES_FAILED,
        10,
    ),
    breakdown(
        (Who::Machine, Death::Code(0)),
        Some((10, Who::Devices, SHOT)),
        DEVICES_SHOT,
        10,
    ),
    breakdown(
        (Who::Machine, Death::Code(0)),
        Some((80, Who::Devices, Death::Code(1))),
        "the guest shut down",
        40,
    ),
    breakdown(
        (Who::Machine, Death::Code(PANIC)),
        None,
        "guest kernel panic",
        40,
    ),
    breakdown(
        (Who::Machine, Death::Code(PANIC)),
        Some((3, Who::Devices, Death::Code(0))),
        "guest kernel panic",
        3,
    ),
    breakdown(
        (Who::Machine, Death::Code(1)),
        Some((3, Who::Devices, Death::Code(0))),
        "the machine process failed (exit code 1)",
        3,
    ),
    breakdown(
        (Who::Machine, Death::Code(1)),
        Some((20, Who::Devices, SHOT)),
        DEVICES_SHOT,
        20,
    ),
    breakdown((Who::Devices, SHOT), None, DEVICES_SHOT, 0),
    breakdown(
        (Who::Devices, SHOT),
        Some((1, Who::Machine, Death::Code(1))),
        DEVICES_SHOT,
        0,
    ),
    breakdown((Who::Devices, Death::Code(1)), None, DEVICES_FAILED, 0),
    // The device process ends so when the machine has closed its connections.
    breakdown(
        (Who::Devices, Death::Code(0)),
        Some((100, Who::Machine, Death::Code(0))),
        "the guest shut down",
        100,
    ),
    breakdown(
        (Who::Devices, Death::Code(0)),
        Some((1500, Who::Machine, SHOT)),
        MACHINE_SHOT,
        1500,
    ),
    breakdown(
        (Who::Devices, Death::Code(0)),
        Some((500, Who::Machine, Death::Code(PANIC))),
        "guest kernel panic",
        500,
    ),
    breakdown((Who::Devices, Death::Code(0)), None, LEFT, 2000),
    breakdown(
        (Who::Devices, Death::Code(0)),
        Some((2500, Who::Machine, SHOT)),
        LEFT,
        2000,
    ),
];

/// Every breakdown in one phase: who waits is told why, the end is written down, and nothing is
/// left, as soon as that is known.
async fn break_down_in(phase: Phase) {
    let mut failures = Vec::new();
    for (number, breakdown) in BREAKDOWNS.iter().enumerate() {
        if let Err(what) = breaks_down(phase, breakdown).await {
            failures.push(format!("breakdown {number}: {what}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

macro_rules! breakdowns {
    ($($name:ident in $phase:ident,)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $name() {
                break_down_in(Phase::$phase).await;
            }
        )*
    };
}

breakdowns! {
    a_guest_breaks_down_before_its_agent_dials in Booting,
    a_guest_breaks_down_before_its_agent_says_its_version in Greeting,
    a_guest_breaks_down_before_it_is_configured in Configuring,
    a_guest_breaks_down_while_a_container_is_created in Creating,
    a_guest_breaks_down_with_a_created_container in Created,
    a_guest_breaks_down_while_a_container_is_started in Starting,
    a_guest_breaks_down_with_a_running_container in Running,
    a_guest_breaks_down_with_a_paused_container in Paused,
    a_guest_breaks_down_while_a_process_is_executed in Executing,
    a_guest_breaks_down_with_an_executed_process in Executed,
    a_guest_breaks_down_while_limits_are_changed in Updating,
    a_guest_breaks_down_with_a_container_that_does_not_stop in Stopping,
    a_guest_breaks_down_while_a_signal_is_sent in Signalling,
    a_guest_breaks_down_while_a_container_is_deleted in Deleting,
    a_guest_breaks_down_while_output_is_not_read in Draining,
    a_guest_breaks_down_while_it_shuts_down in ShuttingDown,
}

async fn breaks_down(phase: Phase, breakdown: &Breakdown) -> Result<(), String> {
    let mut world = World::boot(EndPolicy::LastContainer, phase.script()).await;
    let call = phase.enter(&world).await;
    let died = world.now();
    let (who, death) = breakdown.first;
    world.guest.dies(who, death);
    if let Some((delay, who, death)) = breakdown.second {
        let guest = world.guest.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(delay)).await;
            guest.dies(who, death);
        });
    }
    let gone = timeout(FOREVER, world.sandbox.ended()).await;
    let took = world.now() - died;
    let gone = gone.map_err(|_| "the sandbox does not end".to_owned())?;
    let result = timeout(FOREVER, call).await;
    let result = result.map_err(|_| "the caller waits for ever".to_owned())?;

    let mut wrong = Vec::new();
    let mut check = |right: bool, what: String| {
        if !right {
            wrong.push(what);
        }
    };
    // A guest that ends while it is told to has not failed.
    let expected = match phase {
        Phase::ShuttingDown | Phase::Draining => "the sandbox has ended".to_owned(),
        _ if phase.is_up() => breakdown.reason.to_owned(),
        _ => format!("the guest did not come up: {}", breakdown.reason),
    };
    check(
        gone.reason == expected,
        format!("ended because {:?}", gone.reason),
    );
    let known = match phase.has_ended() {
        // Nobody waits for a reason.
        true => 0..=breakdown.known + HOPS,
        false => breakdown.known..=breakdown.known + HOPS,
    };
    check(
        known.contains(&took),
        format!("known after {took} ms, not {known:?}"),
    );
    check(world.guest.is_gone(), "a process is left".to_owned());
    check(
        !world.path.directory().exists(),
        "its directory is left".to_owned(),
    );

    let status = world.status("c");
    if phase.has_container() {
        let exit = match phase.has_ended() {
            true => (3, None),
            false => (125, Some(breakdown.reason.to_owned())),
        };
        let written = status.as_ref().and_then(|status| status.exit.clone());
        let written = written.map(|exit| (exit.status, exit.reason));
        check(written == Some(exit), format!("written down: {written:?}"));
        let state = status.map(|status| status.state);
        check(
            state == Some(State::Stopped),
            format!("its state: {state:?}"),
        );
    } else {
        check(status.is_none(), format!("written down: {status:?}"));
    }
    // What helps to find out why is kept.
    let kept = world.directory("c").join("console").exists();
    let expected = phase.has_container() && !phase.has_ended();
    check(kept == expected, format!("the console is kept: {kept}"));
    match phase {
        // These wait for the end, and learn of it.
        Phase::Created | Phase::Running | Phase::Paused | Phase::Stopping | Phase::Executed => {
            let exit = result.as_ref().ok().and_then(Option::as_ref);
            let told = exit.map(|exit| (exit.status, exit.reason.as_deref()));
            check(
                told == Some((125, Some(breakdown.reason))),
                format!("told: {result:?}"),
            );
        }
        Phase::Draining | Phase::ShuttingDown => {
            let told = result
                .as_ref()
                .ok()
                .and_then(Option::as_ref)
                .map(|exit| exit.status);
            check(told == Some(3), format!("told: {result:?}"));
        }
        // It is gone, which is what was wanted.
        Phase::Deleting => check(result == Ok(None), format!("told: {result:?}")),
        Phase::Signalling => check(
            result == Err(Error::wrong_state("container not running")),
            format!("told: {result:?}"),
        ),
        // These fail, for that reason.
        _ => {
            let error = result.as_ref().err();
            let told = error.map(|error| (error.kind, error.message.contains(breakdown.reason)));
            check(
                told == Some((ErrorKind::GuestFailed, true)),
                format!("told: {result:?}"),
            );
        }
    }
    let events = world.events();
    let ends = events.iter().filter(|event| *event == "exited c").count();
    check(
        ends == usize::from(phase.has_container()),
        format!("events: {events:?}"),
    );
    let failed = events
        .iter()
        .filter(|event| *event == "guest_failed")
        .count();
    check(
        failed == usize::from(!phase.has_ended()),
        format!("events: {events:?}"),
    );
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(wrong.join("; ")),
    }
}
