//! Containers that join another one (`hull run --network container:NAME`): they have its network because they are in its
//! machine. Each has a record, a socket, a lock and a log of its own, all kept by the sandbox process of the container
//! that it joined, and ends with that at the latest.
//!
//! [`join`] is called by `server`, for the command that wants it; [`end_all`] at the end of the container that was joined.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use hull_device_control::Cache;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::spec::{guest_spec, root_share};
use super::{conclude, erase_all, prepare};
use crate::client::erase;
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::process::container::Container;
use crate::process::mounts::RootFs;
use crate::process::{init, server};
use crate::record::{self, Exit, State, unix_time};
use crate::request::RunRequest;
use crate::timings::{Timings, now_ns};

/// How long a container has after its stop signal when its machine is about to end, and how long its end may take then.
const STOP_TIME: Duration = Duration::from_secs(1);
const END_TIME: Duration = Duration::from_secs(5);

/// How long the machine may take to let go of a container.
const LEAVE_TIME: Duration = Duration::from_secs(15);

/// Starts the container `id`, whose request lies in its directory, in the machine of `host`.
///
/// # Errors
/// `host` does not run, or is about to end; the files of the container cannot be made. Then nothing of it is left.
pub async fn join(host: &Arc<Container>, id: &str) -> Result<Arc<Container>> {
    let paths = host.all_paths();
    let made = async {
        host.agent()?;
        let files = paths.container(id);
        let lock = record::lock(&files)?;
        let text = fs::read(files.request()).context(|| "read the request".into())?;
        let request: RunRequest =
            serde_json::from_slice(&text).context(|| "understand the request".into())?;
        let container = Arc::new(prepare(paths, request)?);
        // Whoever removes it by force must not kill the process of another one.
        container.update(|record| record.processes = record::Processes::default())?;
        let listener =
            UnixListener::bind(files.socket()).context(|| "create the control socket".into())?;
        host.adopt(&container)?;
        Ok::<_, Failure>((container, listener, lock))
    };
    match made.await {
        Ok((container, listener, lock)) => {
            let serving = tokio::spawn(server::serve(listener, container.clone()));
            tokio::spawn(life(host.clone(), container.clone(), lock, serving));
            Ok(container)
        }
        Err(failure) => {
            if let Err(failure) = erase(paths, id, None) {
                tracing::error!("{failure}");
            }
            Err(failure.code(EXIT_HULL))
        }
    }
}

/// Ends all containers that have joined, with a moment for those that listen to their stop signal; from now on nobody can
/// join.
pub async fn end_all(host: &Container) {
    let joined = host.close();
    if joined.is_empty() {
        return;
    }
    for container in &joined {
        if let Ok(agent) = container.agent()
            && let Err(failure) = agent
                .signal(container.id(), "", container.stop_signal(), false)
                .await
        {
            // A machine that is no more ends them without.
            tracing::debug!("{failure}");
        }
    }
    let ended = async || {
        for container in &joined {
            container.ended().await;
        }
    };
    if tokio::time::timeout(STOP_TIME, ended()).await.is_ok() {
        return;
    }
    let name = host.record().name;
    for container in &joined {
        container.abort(&format!(
            "container {name}, in whose machine it was, has ended"
        ));
    }
    let _ = tokio::time::timeout(END_TIME, ended()).await;
}

async fn life(
    host: Arc<Container>,
    container: Arc<Container>,
    lock: File,
    serving: JoinHandle<()>,
) {
    let mut timings = Timings::since(container.request().began_ns);
    let (mut rootfs, mut shares) = (None, Vec::new());
    // Never given up half-way: what the agent is about to make could not be found and removed. It takes as long as it takes
    // the agent and the devices at most, and whoever wants the end gets it right afterwards.
    let started = start(&host, &container, &mut rootfs, &mut shares, &mut timings).await;
    let outcome = match started {
        Ok(mut carriers) => {
            container.set_started(Ok(timings));
            let exit = run_to_end(&container, &mut carriers).await;
            for carrier in carriers {
                carrier.abort();
            }
            Ok(exit)
        }
        Err(failure) => Err(failure),
    };

    // What it wrote and closed has been written back; nothing of it is open any more when the agent has let it go.
    if let (Ok(agent), Ok(devices)) = (host.agent(), host.devices()) {
        let leaving = async {
            if let Err(failure) = agent.delete(container.id()).await {
                tracing::debug!("{failure}");
            }
            for share in &shares {
                if let Err(failure) = devices.remove_share(share).await {
                    tracing::debug!("{failure}");
                }
            }
        };
        // A guest or a device process that does not react ends with the container that was joined.
        if tokio::time::timeout(LEAVE_TIME, leaving).await.is_err() {
            tracing::warn!(
                "the machine does not let go of container {}",
                container.id()
            );
        }
    }
    if let Some(rootfs) = rootfs {
        rootfs.unmount();
    }
    host.leave(&container);
    match outcome {
        Ok(exit) => conclude(&container, exit, lock).await,
        Err(mut failure) => {
            failure.refused = true;
            let exit = Exit {
                reason: Some(failure.message.clone()),
                ..Exit::now(failure.code)
            };
            erase_all(&container).await;
            drop(lock);
            container.set_started(Err(failure));
            container.set_ended(exit);
        }
    }
    // Whoever waits has been told by now, or is about to be.
    serving.abort();
}

/// From a request to a container that runs: what carries its streams.
async fn start(
    host: &Container,
    container: &Arc<Container>,
    rootfs: &mut Option<RootFs>,
    shares: &mut Vec<String>,
    timings: &mut Timings,
) -> Result<Vec<JoinHandle<()>>> {
    let request = container.request();
    let files = container.paths();
    let (agent, devices) = (host.agent()?, host.shared_devices()?);
    let prefix = format!("{}-", container.id());

    let begin = now_ns();
    let root = RootFs::mount(&files, &request.layers, request.auto_remove)?;
    let root = rootfs.insert(root);
    let (spec_json, volumes) = guest_spec(container, &prefix)?;
    timings.step("mount the root file system", begin);

    let begin = now_ns();
    let name = root_share(&prefix);
    devices
        .add_share(&name, root.directory.as_fd(), Cache::Private)
        .await?;
    shares.push(name);
    for (name, directory) in &volumes {
        devices
            .add_share(name, directory.as_fd(), Cache::Shared)
            .await?;
        shares.push(name.clone());
    }
    timings.step("share directories", begin);

    let connected = init::start(container, &agent, &devices, spec_json, timings).await?;
    container.set_guest(agent, devices);
    let addresses = host.record().addresses;
    container.update(|record| {
        record.state = State::Running;
        record.addresses = addresses;
        record.started = Some(unix_time());
    })?;
    Ok(init::carry(container, connected).await)
}

/// Waits for the end of init, or of the machine.
async fn run_to_end(container: &Container, carriers: &mut [JoinHandle<()>]) -> Exit {
    let broken = |status, reason: String| Exit {
        reason: Some(reason),
        ..Exit::now(status)
    };
    let agent = match container.agent() {
        Ok(agent) => agent,
        Err(failure) => return broken(EXIT_HULL, failure.message),
    };
    let ended = tokio::select! {
        biased;
        ended = agent.wait(container.id(), "") => ended,
        reason = container.aborted() => return broken(137, reason),
    };
    match ended {
        Ok(ended) => {
            init::passed_on(container, carriers).await;
            ended.into()
        }
        Err(failure) => broken(EXIT_HULL, failure.message),
    }
}
