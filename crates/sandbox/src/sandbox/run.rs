//! A sandbox from its started machine to the moment when nothing of it is left: the one task that
//! watches the machine and takes everything down.

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{Down, Ready, Sandbox, Stage};
use crate::config::SandboxConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventKind;
use crate::guest::boot::{self, BOOT_TIMEOUT, EXIT_GRACE, SHUTDOWN_TIMEOUT};
use crate::guest::processes::Guest;
use crate::guest::{Agent, Dials, Incoming, events};
use crate::shares::sockets;
use crate::store::{CONSOLE_FILE, EXIT_SANDBOX_FAILED, MESSAGES_FILE};

/// How long an engine may take to read what its last container wrote.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of console and messages that are kept of a guest that broke down.
const MAX_DIAGNOSTICS: u64 = 1 << 20;

/// How long leaving a network may take: plugins have timeouts of their own, well below.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long containers may take to write down how they have ended.
const CONCLUDE_TIMEOUT: Duration = Duration::from_secs(5);

/// From a started machine to the moment when nothing is left.
pub(super) async fn run(
    sandbox: Sandbox,
    guest: Guest,
    dials: Dials,
    confining: JoinHandle<Result<()>>,
    config: SandboxConfig,
) {
    let mut confining = Confining(Some(confining));
    tokio::spawn(sockets::serve(sandbox.clone(), dials.sockets));
    let booted = booted(&sandbox, &guest, dials.agent, &mut confining, &config).await;
    let down = match booted {
        Ok(ready) => {
            let agent = ready.agent.clone();
            sandbox.0.stage.send_replace(Stage::Ready(ready));
            tokio::spawn(events::follow(sandbox.clone(), agent.clone()));
            tokio::select! {
                biased;
                reason = guest.broke_down() => Down::broken(reason),
                down = sandbox.aborted() => down,
                () = sandbox.done() => {
                    // Beside the end of the guest, which does not need the network for that.
                    tokio::join!(write_back(&sandbox, &guest, &agent), disconnected(&sandbox));
                    Down::ended()
                }
            }
        }
        Err(down) => down,
    };
    sandbox.change(|containers| containers.ending = true);
    if down.status == EXIT_SANDBOX_FAILED && down.error.kind == ErrorKind::GuestFailed {
        tracing::error!("{}", down.reason);
        sandbox.emit(EventKind::GuestFailed {
            reason: down.reason.clone(),
        });
    }
    drop(guest);
    disconnected(&sandbox).await;
    // Before containers are seen as stopped.
    if down.error.kind == ErrorKind::GuestFailed {
        keep_diagnostics(&sandbox);
    }
    sandbox.0.stage.send_replace(Stage::Down(down.clone()));
    if tokio::time::timeout(CONCLUDE_TIMEOUT, sandbox.concluded())
        .await
        .is_err()
    {
        tracing::error!("a container does not write down how it has ended");
    }
    // What is still being made would stay.
    if let Err(error) = confining.done().await {
        tracing::error!("{error}");
    }
    sandbox.0.dir.release();
    sandbox.0.stage.send_replace(Stage::Gone(down));
}

/// The sandbox's processes are being put into control groups.
struct Confining(Option<JoinHandle<Result<()>>>);

impl Confining {
    /// Waits until it is done. Says only once what went wrong.
    async fn done(&mut self) -> Result<()> {
        let Some(task) = &mut self.0 else {
            return Ok(());
        };
        let result = task.await;
        self.0 = None;
        result
            .unwrap_or_else(|error| Err(Error::new(format!("cannot join control groups: {error}"))))
    }
}

/// Copies the guest's console and the messages of the host's processes to the directories of
/// containers that stay: the sandbox's own goes with it.
fn keep_diagnostics(sandbox: &Sandbox) {
    let path = sandbox.path();
    for (name, file) in [
        (CONSOLE_FILE, path.console()),
        (MESSAGES_FILE, path.diagnostics()),
    ] {
        let mut text = Vec::new();
        let read = File::open(&file).and_then(|file| {
            let mut file = file.take(MAX_DIAGNOSTICS);
            file.read_to_end(&mut text)
        });
        if let Err(error) = read {
            tracing::debug!("cannot read {}: {error}", file.display());
            continue;
        }
        for container in sandbox.containers() {
            let directory = container.directory();
            // One that removes itself may have gone.
            if directory.is_there()
                && let Err(error) = directory.write(name, &text)
            {
                tracing::debug!("{error}");
            }
        }
    }
}

/// Waits until the guest has come up and is configured.
async fn booted(
    sandbox: &Sandbox,
    guest: &Guest,
    incoming: Incoming,
    confining: &mut Confining,
    config: &SandboxConfig,
) -> Result<Ready, Down> {
    let failed = |reason: &str| {
        let message = format!("the guest did not come up: {reason}");
        Error::guest(message).console(guest.console_tail())
    };
    let boot = async {
        let timings = &sandbox.0.timings;
        let agent = timings
            .measure(
                "boot the guest until the agent dials",
                Agent::dialled(incoming),
            )
            .await?;
        let configuration = boot::configuration(&guest.features, &config.hostname)?;
        let configured = async {
            // One after the other on the connection, without waiting in between.
            tokio::try_join!(agent.hello(), agent.configure(&configuration))
        };
        timings.measure("configure the guest", configured).await?;
        Ok::<_, Error>(agent)
    };
    let error = tokio::select! {
        biased;
        booted = boot => match booted {
            // No container runs outside of the groups.
            Ok(agent) => match confining.done().await {
                Ok(()) => return Ok(Ready { agent, devices: guest.control.clone() }),
                Err(error) => error,
            },
            // A process that died is the cause of whatever else failed.
            Err(error) => match guest.broke_down_within(EXIT_GRACE).await {
                Some(reason) if error.kind == ErrorKind::GuestFailed => failed(&reason),
                Some(reason) => failed(&format!("{reason} ({error})")),
                None => failed(&error.message),
            },
        },
        reason = guest.broke_down() => failed(&reason),
        down = sandbox.aborted() => {
            return Err(Down {
                error: Error::wrong_state(format!("the start was given up: {}", down.reason)),
                ..down
            });
        }
        () = sandbox.done() => return Err(Down::ended()),
        () = tokio::time::sleep(BOOT_TIMEOUT) => {
            failed(&format!("not within {} s", BOOT_TIMEOUT.as_secs()))
        }
    };
    Err(Down {
        reason: error.message.clone(),
        status: EXIT_SANDBOX_FAILED,
        error,
    })
}

/// What containers wrote to streams goes to those who read it, and what they wrote to files to the
/// host.
async fn write_back(sandbox: &Sandbox, guest: &Guest, agent: &Agent) {
    // What the guest has not written back yet is lost with it: only containers that go away without
    // a trace, and wrote to nothing else, can do without.
    if !sandbox.lock().kept {
        return;
    }
    tokio::select! {
        drained = tokio::time::timeout(DRAIN_TIMEOUT, guest.control.drain()) => {
            if !matches!(drained, Ok(Ok(()))) {
                tracing::warn!("output of a container is lost: nobody has read it");
            }
        }
        () = sandbox.is_unread() => {}
        _ = guest.broke_down() => return,
        _ = sandbox.aborted() => return,
    }
    tokio::select! {
        result = agent.shutdown(SHUTDOWN_TIMEOUT) => {
            if let Err(error) = result {
                tracing::debug!("shutdown: {error}");
            }
        }
        _ = guest.broke_down() => {}
        _ = sandbox.aborted() => {}
    }
}

/// Leaves the network, if that was not done.
async fn disconnected(sandbox: &Sandbox) {
    let leaving = sandbox.disconnect_network();
    if tokio::time::timeout(DISCONNECT_TIMEOUT, leaving)
        .await
        .is_err()
    {
        tracing::error!("the network is not left in time");
    }
}
