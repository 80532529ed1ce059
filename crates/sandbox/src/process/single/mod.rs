//! The life of a sandbox process that runs one container of hull's own: boot, run, end.
//!
//! [`run`] is called by the hidden subcommand `sandbox-process`. It reads the request that the client left, starts
//! the guest, runs the container in it, answers clients meanwhile, and cleans up. Whatever fails, and whoever dies,
//! leads to the end of `life`, where everything is taken down in one place. Other containers may join this one: `joined`.

mod attaching;
pub mod joined;
mod spec;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use hull_devices::control::Cache;
use hull_network::Namespace;
use hull_protocol::agent as proto;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use attaching::{Attaching, attach, finished, keep, settle, undo_network, undone};
use spec::{guest_spec, root_share};

use super::agent::Agent;
use super::boot::{self, BOOT_TIME, BREAK_TIME, DEATH_TIME, SHUTDOWN_TIME, told_to_end};
use super::container::Container;
use super::devices::Incoming;
use super::guest::Guest;
use super::loopback::Forwarder;
use super::mounts::{self, RootFs};
use super::network::Network;
use super::output::Output;
use super::{etc, init, server};
use crate::client::erase;
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::log;
use crate::paths::Paths;
use crate::record::{self, Exit, Processes, Record, State, unix_time};
use crate::request::RunRequest;
use crate::timings::{Timings, now_ns};
use crate::wire::Kind;

/// Share of hosts, hostname and resolv.conf.
const ETC_SHARE: &str = "etc";

/// Runs a sandbox process to its end. `first` is the connection of the client that asked for it.
///
/// Called in a process of its own, with one thread.
///
/// # Errors
/// What went wrong before there was anybody to tell on `first`.
pub fn run(paths: &Paths, id: &str, first: StdStream) -> Result<()> {
    // A process group leader cannot become a session leader: it is one already then.
    let _ = rustix::process::setsid();
    let files = paths.container(id);
    let lock = record::lock(&files)?;
    let text = fs::read(files.request()).context(|| "read the request".into())?;
    let request: RunRequest =
        serde_json::from_slice(&text).context(|| "understand the request".into())?;
    mounts::enter_namespace()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop".into())?;
    runtime.block_on(async {
        let container = Arc::new(prepare(paths, request)?);
        let listener =
            UnixListener::bind(files.socket()).context(|| "create the control socket".into())?;
        first
            .set_nonblocking(true)
            .context(|| "prepare the first connection".into())?;
        let first = UnixStream::from_std(first).context(|| "watch the first connection".into())?;
        let first = tokio::spawn(server::connection(first, container.clone()));
        tokio::spawn(server::serve(listener, container.clone()));
        life(&container, lock).await;
        // The client that waits for the end is told by its own task.
        let _ = tokio::time::timeout(Duration::from_secs(5), first).await;
        // Others, too, have their answers by now, or are about to write them.
        tokio::task::yield_now().await;
        Ok(())
    })
}

/// Makes the files of a container, so that commands can find it.
fn prepare(paths: &Paths, request: RunRequest) -> Result<Container> {
    let files = paths.container(&request.id);
    fs::create_dir_all(&files.data).context(|| format!("create {}", files.data.display()))?;
    let log = log::Writer::create(&files.log(), request.log_size)
        .context(|| format!("create {}", files.log().display()))?;
    let process = request.spec.process().as_ref();
    let record = Record {
        version: record::VERSION,
        id: request.id.clone(),
        name: request.name.clone(),
        image: request.image.clone(),
        image_id: request.image_id.clone(),
        command: process
            .and_then(|process| process.args().clone())
            .unwrap_or_default(),
        created: unix_time(),
        started: None,
        state: State::Creating,
        exit: None,
        machine: request.machine.choice.kind,
        kernel: request.machine.choice.kernel.display().to_string(),
        memory: request.machine.memory,
        cpus: request.machine.cpus,
        terminal: process
            .and_then(|process| process.terminal())
            .unwrap_or_default(),
        stdin: request.stdin,
        auto_remove: request.auto_remove,
        stop_signal: request.stop_signal.clone(),
        network: request.network.name.clone(),
        addresses: Vec::new(),
        ports: request.network.ports().to_vec(),
        labels: request.labels.clone(),
        volumes: request
            .volumes
            .iter()
            .map(|volume| {
                let access = if volume.read_only { "ro" } else { "rw" };
                format!(
                    "{}:{}:{access}",
                    volume.source.display(),
                    volume.target.display()
                )
            })
            .collect(),
        processes: Processes {
            sandbox: i32::try_from(std::process::id()).unwrap_or_default(),
            ..Processes::default()
        },
        layers: request.layers.clone(),
    };
    record.store(&files)?;
    Ok(Container::new(
        paths.clone(),
        request,
        record,
        Output::new(log),
    ))
}

/// What a started container consists of.
struct Live {
    agent: Agent,
    carriers: Vec<JoinHandle<()>>,
    /// Published ports, kept from others.
    held: Vec<OwnedFd>,
    /// Dropped when the network is followed no more.
    following: Option<oneshot::Sender<()>>,
    /// What plugins know by this process's descriptor.
    namespace: Option<Namespace>,
    /// Holds pasta until it is aborted.
    pasta: Option<JoinHandle<()>>,
}

/// Boot, run, end.
async fn life(container: &Arc<Container>, lock: File) {
    let mut timings = Timings::since(container.request().began_ns);
    timings.step("start the sandbox process", container.request().began_ns);
    let mut rootfs = None;
    // Plugins take as long as a guest's boot.
    let mut attaching = match attach(container) {
        Ok(attaching) => attaching,
        Err(failure) => {
            return fail_to_start(container, failure, (None, None), timings, lock).await;
        }
    };
    let begin = now_ns();
    let guest = Guest::start(&container.paths(), &container.request().machine, Vec::new());
    timings.step("start device process and machine", begin);
    let (guest, incoming) = match guest {
        Ok(guest) => guest,
        Err(failure) => {
            settle(attaching).await;
            return fail_to_start(container, failure, (None, None), timings, lock).await;
        }
    };

    let started = {
        let boot = boot(
            container,
            &guest,
            incoming,
            &mut rootfs,
            &mut attaching,
            &mut timings,
        );
        let broken = |reason| Failure::new(format!("the guest did not come up: {reason}"));
        tokio::select! {
            biased;
            started = boot => match started {
                // A process that died is the cause of whatever else failed.
                Err(failure) if !failure.refused => {
                    match tokio::time::timeout(BREAK_TIME, guest.broke_down()).await {
                        Ok(reason) => Err(broken(format!("{reason} ({failure})"))),
                        Err(_) => Err(failure),
                    }
                }
                started => started,
            },
            reason = guest.broke_down() => Err(broken(reason)),
            reason = container.aborted() => Err(Failure::new(format!("the start was given up: {reason}"))),
            () = told_to_end() => Err(Failure::new("the start was given up: the sandbox process was told to end")),
            () = tokio::time::sleep(BOOT_TIME) => Err(Failure::new(format!(
                "the guest did not come up within {} s", BOOT_TIME.as_secs()
            ))),
        }
    };
    let live = match started {
        Ok(live) => live,
        Err(failure) => {
            settle(attaching).await;
            return fail_to_start(container, failure, (Some(guest), rootfs), timings, lock).await;
        }
    };
    container.set_started(Ok(timings));

    let mut live = live;
    let exit = run_to_end(container, &guest, &mut live).await;
    for carrier in live.carriers {
        // Finished, or stuck with a client that does not read from a container that is no more.
        carrier.abort();
    }
    joined::end_all(container).await;
    // Plugins take the interface away. It is not one that the guest has to learn of.
    drop(live.following);
    // Who learns of the end finds its ports free.
    drop(live.held);
    if let Some(pasta) = live.pasta {
        pasta.abort();
        let _ = pasta.await;
    }
    end(container, exit, guest, rootfs, lock).await;
    drop(live.namespace);
}

/// From a machine that has just been started to a container that runs.
async fn boot(
    container: &Arc<Container>,
    guest: &Guest,
    incoming: Incoming,
    rootfs: &mut Option<RootFs>,
    attaching: &mut Option<Attaching>,
    timings: &mut Timings,
) -> Result<Live> {
    let request = container.request();
    let files = container.paths();
    let devices = &guest.control;
    let booting = now_ns();

    let begin = now_ns();
    let root = RootFs::mount(&files, &request.layers, request.auto_remove)?;
    let root = rootfs.insert(root);
    let (spec_json, volumes) = guest_spec(container, "")?;
    timings.step("mount the root file system", begin);

    let begin = now_ns();
    use std::os::fd::AsFd;
    devices
        .add_share(&root_share(""), root.directory.as_fd(), Cache::Private)
        .await?;
    fs::create_dir_all(files.etc()).context(|| format!("create {}", files.etc().display()))?;
    let etc = mounts::own_directory(&files.etc())?;
    devices
        .add_share(ETC_SHARE, etc.as_fd(), Cache::Shared)
        .await?;
    for (name, directory) in &volumes {
        devices
            .add_share(name, directory.as_fd(), Cache::Shared)
            .await?;
    }
    timings.step("share directories", begin);

    let begin = now_ns();
    let attached = match attaching {
        Some(attaching) => Some(finished(attaching).await?),
        None => None,
    };
    etc::write(&files.etc(), request, attached.as_ref()).map_err(Failure::of_no_guest)?;
    let mut held = Vec::new();
    let mut forwarder = None;
    let mut following = None;
    let mut namespace = None;
    let mut pasta = None;
    let addresses = attached
        .as_ref()
        .map(|attached| attached.addresses.clone())
        .unwrap_or_default();
    let network = match attached {
        Some(attached) => {
            timings.step("wait for network plugins", begin);
            let begin = now_ns();
            let limits = request.network.limits;
            held = attached.ports;
            namespace = Some(attached.namespace.clone());
            // What the host sends to itself comes by the namespace's loopback interface.
            let published = !request.network.ports().is_empty();
            if attached.pasta.is_some() && published {
                forwarder = Forwarder::open(&attached.namespace);
            }
            pasta = attached.pasta.map(|pasta| tokio::spawn(keep(pasta)));
            let network = Network::open(attached.namespace, guest.nets.clone(), limits).await?;
            timings.step("connect the network", begin);
            Some(network)
        }
        None => None,
    };

    let agent = boot::agent_dials(incoming).await?;
    timings.step("boot the guest until the agent dials", booting);

    let begin = now_ns();
    agent.configure(&configuration(guest, request)?).await?;
    if let Some(mut network) = network {
        network.configure(&agent).await?;
        if let Some(forwarder) = &forwarder {
            forwarder.start(devices, &agent);
        }
        let (end, ended) = oneshot::channel();
        following = Some(end);
        let ended = async {
            let _dropped: Result<(), _> = ended.await;
        };
        tokio::spawn(Box::new(network).follow(agent.clone(), ended));
    }
    timings.step("configure the guest", begin);

    let connected = init::start(container, &agent, devices, spec_json, timings).await?;
    let (device_process, machine_process) = guest.pids();
    container.set_guest(agent.clone(), devices.clone());
    container.update(|record| {
        record.state = State::Running;
        record.addresses = addresses;
        record.started = Some(unix_time());
        record.processes.devices = device_process;
        record.processes.machine = machine_process;
    })?;
    let carriers = init::carry(container, connected).await;
    Ok(Live {
        agent,
        carriers,
        held,
        following,
        namespace,
        pasta,
    })
}

fn configuration(guest: &Guest, request: &RunRequest) -> Result<proto::ConfigureRequest> {
    let linux = request.spec.linux().as_ref();
    boot::configuration(
        &guest.features,
        request.id.get(..12).unwrap_or_default(),
        boot::network_sysctls(linux.and_then(|linux| linux.sysctl().as_ref())),
    )
}

/// Waits for the end of init, or of the guest.
async fn run_to_end(container: &Container, guest: &Guest, live: &mut Live) -> Exit {
    let broken = |reason: String| Exit {
        reason: Some(reason),
        ..Exit::now(EXIT_HULL)
    };
    let ended = tokio::select! {
        biased;
        ended = live.agent.wait(container.id(), "") => ended,
        reason = guest.broke_down() => return broken(reason),
        reason = container.aborted() => return Exit { status: 137, ..broken(reason) },
        () = told_to_end() => {
            return Exit { status: 143, ..broken("the sandbox process was told to end".into()) };
        }
    };
    match ended {
        Ok(ended) => {
            tokio::select! {
                () = init::passed_on(container, &mut live.carriers) => {}
                _ = guest.broke_down() => {}
            }
            ended.into()
        }
        // The agent went first; the kernel follows, and knows more.
        Err(failure) => match tokio::time::timeout(DEATH_TIME, guest.broke_down()).await {
            Ok(reason) => broken(reason),
            Err(_) => broken(failure.message),
        },
    }
}

/// Ends a start that failed: everything of the container goes, and whoever waits learns why.
async fn fail_to_start(
    container: &Arc<Container>,
    mut failure: Failure,
    (guest, rootfs): (Option<Guest>, Option<RootFs>),
    timings: Timings,
    lock: File,
) {
    if !failure.refused {
        failure.console = guest.as_ref().map(Guest::console_tail).unwrap_or_default();
        failure.timings = Some(timings);
    }
    drop(guest);
    if let Some(rootfs) = rootfs {
        rootfs.unmount();
    }
    let exit = Exit {
        reason: Some(failure.message.clone()),
        ..Exit::now(failure.code)
    };
    undone(undo_network(container)).await;
    erase_all(container).await;
    drop(lock);
    container.set_started(Err(failure));
    container.set_ended(exit);
}

/// Ends a container that ran.
async fn end(
    container: &Arc<Container>,
    exit: Exit,
    guest: Guest,
    rootfs: Option<RootFs>,
    lock: File,
) {
    // Beside the end of the guest, which takes as long.
    let undoing = undo_network(container);
    // What the guest has not written back yet is lost with it: only a container that goes away without a trace,
    // and wrote to nothing else, can do without.
    let traces = !container.request().auto_remove
        || container
            .request()
            .volumes
            .iter()
            .any(|volume| !volume.read_only);
    if traces
        && exit.status != EXIT_HULL
        && let Ok(agent) = container.agent()
    {
        tokio::select! {
            result = agent.shutdown(SHUTDOWN_TIME) => {
                if let Err(failure) = result {
                    tracing::debug!("shutdown: {failure}");
                }
            }
            _ = guest.broke_down() => {}
        }
    }
    drop(guest);
    if let Some(rootfs) = rootfs {
        rootfs.unmount();
    }
    undone(undoing).await;
    conclude(container, exit, lock).await;
}

/// Leaves of a container that has ended what is to be left, and tells everybody. From then on it can be removed, whoever still
/// reads its last output from this process.
async fn conclude(container: &Arc<Container>, exit: Exit, lock: File) {
    if container.request().auto_remove {
        erase_all(container).await;
    } else {
        let stored = container.update(|record| {
            record.state = State::Stopped;
            record.exit = Some(exit.clone());
            record.processes = Processes::default();
        });
        if let Err(failure) = stored {
            tracing::error!("{failure}");
        }
        // Nobody answers there any more.
        let _ = fs::remove_file(container.paths().socket());
    }
    drop(lock);
    let last = serde_json::to_vec(&exit).unwrap_or_default();
    container.set_ended(exit);
    container.output().finish(Kind::Exit, last).await;
}

/// Removes everything of a container, beside whatever else there is to do.
async fn erase_all(container: &Arc<Container>) {
    let container = container.clone();
    let erasing = tokio::task::spawn_blocking(move || {
        let name = &container.request().name;
        erase(container.all_paths(), container.id(), Some(name))
    });
    if let Ok(Err(failure)) = erasing.await {
        tracing::error!("{failure}");
    }
}
