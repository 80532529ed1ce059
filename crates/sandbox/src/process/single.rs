//! The life of a sandbox process that runs one container of hull's own: boot, run, end.
//!
//! [`run`] is called by the hidden subcommand `sandbox-process`. It reads the request that the client left, starts
//! the guest, runs the container in it, answers clients meanwhile, and cleans up. Whatever fails, and whoever dies,
//! leads to the end of `life`, where everything is taken down in one place.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use hull_devices::control::Cache;
use hull_network::Namespace;
use hull_network::pasta::Pasta;
use hull_protocol::SHARES_DIR;
use hull_protocol::agent as proto;
use rustix::event::{EventfdFlags, eventfd};
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::agent::{Agent, Ended};
use super::boot::{
    self, BOOT_TIME, BREAK_TIME, DEATH_TIME, SHUTDOWN_TIME, is_network_sysctl, told_to_end,
};
use super::container::Container;
use super::devices::Incoming;
use super::guest::Guest;
use super::loopback::Forwarder;
use super::mounts::{self, RootFs};
use super::network::Network;
use super::output::{Connected, Output};
use super::{etc, server, streams};
use crate::attachment::{self, Attached};
use crate::client::erase;
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::log::{self, Stream};
use crate::paths::Paths;
use crate::record::{self, Exit, Processes, Record, State, unix_time};
use crate::request::{AttachRequest, RunRequest};
use crate::timings::{Timings, now_ns};
use crate::wire::Kind;

/// Share of the container's root file system.
const ROOT_SHARE: &str = "rootfs";
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
    let _lock = record::lock(&files)?;
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
        life(&container).await;
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
    carriers: Vec<tokio::task::JoinHandle<()>>,
    /// Published ports, kept from others.
    _ports: Vec<OwnedFd>,
    /// Dropped when the network is followed no more.
    following: Option<oneshot::Sender<()>>,
    /// What plugins know by this process's descriptor.
    namespace: Option<Namespace>,
}

/// Boot, run, end.
async fn life(container: &Arc<Container>) {
    let mut timings = Timings::since(container.request().began_ns);
    timings.step("start the sandbox process", container.request().began_ns);
    let mut rootfs = None;
    // Plugins take as long as a guest's boot.
    let mut attaching = match attach(container) {
        Ok(attaching) => attaching,
        Err(failure) => return fail_to_start(container, failure, None, None, timings).await,
    };
    let begin = now_ns();
    let guest = Guest::start(&container.paths(), &container.request().machine, Vec::new());
    timings.step("start device process and machine", begin);
    let (guest, incoming) = match guest {
        Ok(guest) => guest,
        Err(failure) => {
            settle(attaching).await;
            return fail_to_start(container, failure, None, None, timings).await;
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
            return fail_to_start(container, failure, Some(guest), rootfs, timings).await;
        }
    };
    container.set_started(Ok(timings));

    let mut live = live;
    let exit = run_to_end(container, &guest, &mut live).await;
    for carrier in live.carriers {
        // Finished, or stuck with a client that does not read from a container that is no more.
        carrier.abort();
    }
    // Plugins take the interface away. It is not one that the guest has to learn of.
    drop(live.following);
    end(container, exit, guest, rootfs).await;
    drop(live.namespace);
}

/// Whoever is at work on the container's network: plugins, on a thread of their own, or pasta.
struct Attaching {
    task: JoinHandle<Result<Attached>>,
    /// Ends plugins. Pasta ends with the task.
    cancel: Option<Arc<OwnedFd>>,
}

/// Has the container's network attached, if it has one.
fn attach(container: &Arc<Container>) -> Result<Option<Attaching>> {
    let cni = match container.request().network.attach.clone() {
        None => return Ok(None),
        Some(AttachRequest::Pasta(request)) => {
            return Ok(Some(Attaching {
                task: tokio::spawn(attachment::attach_by_pasta(&request)?),
                cancel: None,
            }));
        }
        Some(AttachRequest::Cni(cni)) => cni,
    };
    let cancel = eventfd(0, EventfdFlags::CLOEXEC).context(|| "make an event".into())?;
    let cancel = Arc::new(cancel);
    let (container, cancelled) = (container.clone(), cancel.clone());
    let task = tokio::task::spawn_blocking(move || {
        attachment::attach(&container.paths(), container.id(), &cni, cancelled)
    });
    Ok(Some(Attaching {
        task,
        cancel: Some(cancel),
    }))
}

async fn finished(attaching: &mut Attaching) -> Result<Attached> {
    let attached = (&mut attaching.task)
        .await
        .map_err(|error| Failure::new(format!("cannot attach the network: {error}")));
    attached.flatten().map_err(Failure::of_no_guest)
}

/// Ends whoever is at work on a network that nobody needs any more, so that what plugins made can be undone.
async fn settle(attaching: Option<Attaching>) {
    if let Some(Attaching { task, cancel }) = attaching
        && !task.is_finished()
    {
        match cancel {
            Some(cancel) => {
                if let Err(error) = rustix::io::write(&*cancel, &1u64.to_ne_bytes()) {
                    tracing::error!("cannot end network plugins: {error}");
                }
            }
            None => task.abort(),
        }
        // Its failure is not the one to be told.
        let _ = task.await;
    }
}

/// Keeps the carrier of a container's connections until this process ends, and says so if it ends before.
async fn keep(pasta: Pasta) {
    let said = pasta.ended().await;
    tracing::error!("the container has no network any more: pasta has ended: {said}");
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
    let (spec_json, volumes) = guest_spec(container)?;
    timings.step("mount the root file system", begin);

    let begin = now_ns();
    use std::os::fd::AsFd;
    devices
        .add_share(ROOT_SHARE, root.directory.as_fd(), Cache::Private)
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
            if let Some(pasta) = attached.pasta {
                tokio::spawn(keep(pasta));
            }
            let network = Network::open(attached.namespace, guest.nets.clone(), limits).await?;
            timings.step("connect the network", begin);
            Some(network)
        }
        None => None,
    };

    let agent = boot::agent_dials(incoming).await?;
    timings.step("boot the guest until the agent dials", booting);

    let begin = now_ns();
    agent.configure(&configuration(request)?).await?;
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

    let begin = now_ns();
    let wanted = streams::Wanted {
        terminal: container.record().terminal,
        stdin: request.stdin,
        output: true,
    };
    let (ports, connected) = streams::connect(devices, wanted).await?;
    timings.step("open streams", begin);

    let begin = now_ns();
    agent
        .run(
            container.id(),
            spec_json,
            request.raw_args.clone(),
            request.raw_env.clone(),
            ports,
        )
        .await?;
    timings.step("create and start the container", begin);

    let (device_process, machine_process) = guest.pids();
    container.set_guest(agent.clone(), devices.clone());
    container.update(|record| {
        record.state = State::Running;
        record.addresses = addresses;
        record.started = Some(unix_time());
        record.processes.devices = device_process;
        record.processes.machine = machine_process;
    })?;
    let carriers = carry(container, connected).await;
    Ok(Live {
        agent,
        carriers,
        _ports: held,
        following,
        namespace,
    })
}

/// Carries init's streams.
async fn carry(
    container: &Arc<Container>,
    connected: Connected,
) -> Vec<tokio::task::JoinHandle<()>> {
    let mut carriers = Vec::new();
    let mut carry = |read, stream| {
        let container = container.clone();
        carriers.push(tokio::spawn(async move {
            container.output().carry(read, stream).await;
        }));
    };
    let input = container.input();
    if let Some(terminal) = connected.terminal {
        let (read, write) = terminal.into_split();
        *input.lock().await = Some(write);
        carry(read, Stream::Output);
    }
    if let Some(stdin) = connected.stdin {
        *input.lock().await = Some(stdin.into_split().1);
    }
    for (stream, name) in [
        (connected.stdout, Stream::Output),
        (connected.stderr, Stream::Error),
    ] {
        if let Some(stream) = stream {
            carry(stream.into_split().0, name);
        }
    }
    carriers
}

/// A directory to be shared, by name.
type Share = (String, OwnedFd);

/// The request's spec, with what only the host knows, and the volumes to share with it.
fn guest_spec(container: &Container) -> Result<(Vec<u8>, Vec<Share>)> {
    let request = container.request();
    let files = container.paths();
    let mut spec =
        serde_json::to_value(&request.spec).context(|| "read the container's spec".into())?;
    spec["root"]["path"] = json!(format!("{SHARES_DIR}/{ROOT_SHARE}"));
    let mut shares = Vec::new();
    let mut sources = Vec::new();
    for (index, volume) in request.volumes.iter().enumerate() {
        let share = mounts::volume(&files, index, volume)?;
        let name = format!("volume{index}");
        sources.push(format!("{SHARES_DIR}/{name}/{}", share.inside));
        shares.push((name, share.directory));
    }
    let mut sources = sources.into_iter();
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        let is_volume =
            |mount: &serde_json::Value| mount["type"] == "bind" && mount["source"] == "";
        for mount in mounts.iter_mut().filter(|mount| is_volume(mount)) {
            let source = sources
                .next()
                .ok_or_else(|| Failure::new("the spec has more volumes than the request"))?;
            mount["source"] = json!(source);
        }
        let etc = ["hosts", "hostname", "resolv.conf"].map(|name| {
            json!({
                "destination": format!("/etc/{name}"),
                "type": "bind",
                "source": format!("{SHARES_DIR}/{ETC_SHARE}/{name}"),
                "options": ["bind", "rprivate"],
            })
        });
        // Before the volumes: a person may want to replace them.
        let at = mounts
            .iter()
            .position(|mount| {
                request
                    .volumes
                    .iter()
                    .any(|v| mount["destination"] == json!(v.target))
            })
            .unwrap_or(mounts.len());
        mounts.splice(at..at, etc);
    }
    // These belong to the guest's network, which is the container's: see `configuration`.
    if let Some(sysctl) = spec["linux"]["sysctl"].as_object_mut() {
        sysctl.retain(|name, _| !is_network_sysctl(name));
    }
    let text = serde_json::to_vec(&spec).context(|| "encode the spec".into())?;
    record::write_by_rename(&files.spec(), &text)?;
    Ok((text, shares))
}

fn configuration(request: &RunRequest) -> Result<proto::ConfigureRequest> {
    let linux = request.spec.linux().as_ref();
    boot::configuration(
        request.machine.choice.kind,
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
        Ok(Ended { status, oom_killed }) => {
            for carrier in &mut live.carriers {
                // Output that nobody reads must not keep the container for ever when it is removed.
                tokio::select! {
                    _ = carrier => {}
                    _ = container.aborted() => {}
                    _ = guest.broke_down() => {}
                }
            }
            Exit {
                reason: oom_killed.then(|| "killed for lack of memory".into()),
                oom_killed,
                ..Exit::now(status)
            }
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
    container: &Container,
    mut failure: Failure,
    guest: Option<Guest>,
    rootfs: Option<RootFs>,
    timings: Timings,
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
    erase_all(container);
    container.set_started(Err(failure));
    container.set_ended(exit);
}

/// Ends a container that ran.
async fn end(container: &Container, exit: Exit, guest: Guest, rootfs: Option<RootFs>) {
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
    if container.request().auto_remove {
        erase_all(container);
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
    let last = serde_json::to_vec(&exit).unwrap_or_default();
    container.set_ended(exit);
    container.output().finish(Kind::Exit, last).await;
}

/// Lets plugins undo what they made of the container's network.
fn undo_network(container: &Container) -> JoinHandle<Result<()>> {
    let files = container.paths();
    tokio::task::spawn_blocking(move || attachment::undo(&files))
}

/// Waits until that is done. What plugins cannot is tried again by the container's removal.
async fn undone(undoing: JoinHandle<Result<()>>) {
    if let Ok(Err(failure)) = undoing.await {
        tracing::error!("{failure}");
    }
}

fn erase_all(container: &Container) {
    let name = &container.request().name;
    if let Err(failure) = erase(container.all_paths(), container.id(), Some(name)) {
        tracing::error!("{failure}");
    }
}
