//! The calls of `agent.proto`. Each is answered by a few lines here, on top of the modules that do
//! the work. Called by ttrpc, from `main`.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hull_protocol::agent::{
    ConfigureRequest, ContainerRequest, CopyRequest, CreateContainerRequest,
    CreateContainerResponse, DeleteContainerRequest, Empty, EventsRequest, EventsResponse,
    ExecRequest, ExecResponse, ForwardRequest, HelloRequest, HelloResponse, ProcessRequest,
    ProcessesResponse, ReattachStreamsRequest, ReattachStreamsResponse, ResizeTerminalRequest,
    ResolveRequest, SetNetworkRequest, SignalRequest, StartContainerRequest, StatsResponse,
    UpdateFilesRequest, UpdateRequest, WaitResponse,
};
use hull_protocol::agent_ttrpc::Agent;
use hull_protocol::{MIN_HOST_VERSION, PROTOCOL_VERSION};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec, Spec};
use rustix::net::RecvFlags;
use rustix::termios::Winsize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

use super::calls;
use super::registry::{Entry, HeldResources, Registry, Running, State};
use super::status::{Failure, Result};
use crate::container::{Child, Container, CreateError, PendingChild, RawArgs};
use crate::disks::Disks;
use crate::events::Events;
use crate::given_files::GivenFiles;
use crate::host_sockets::HostSockets;
use crate::io::pipes::Pipes;
use crate::io::reactor;
use crate::io::relay::EndedOutputs;
use crate::io::streams::Streams;
use crate::loopback::Loopback;
use crate::network::Network;
use crate::processes::oom::OomWatch;
use crate::processes::process::Process;
use crate::processes::reaper::{Identity, Reaper};
use crate::shared_memory::SharedMemory;
use crate::{configure, copy, init, metrics, processes};

/// How long a forced deletion waits for the killed init to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the reply to Shutdown may take to reach the host.
const SHUTDOWN_REPLY_GRACE: Duration = Duration::from_millis(100);

/// The service. One per guest.
pub struct Service {
    registry: Registry,
    streams: Arc<Streams>,
    reaper: Reaper,
    events: Arc<Events>,
    ended_outputs: Arc<EndedOutputs>,
    shared_memory: SharedMemory,
    given_files: GivenFiles,
    network: Mutex<Network>,
    loopback: Loopback,
    host_sockets: HostSockets,
    sequence: AtomicU64,
}

/// A container that is being created: destroyed unless it is entered in the registry.
struct Unfinished(Option<Container>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(container) = self.0.take() {
            destroy(container);
        }
    }
}

fn destroy(container: Container) {
    if let Err(error) = container.destroy() {
        crate::log::error!("cannot remove what a container leaves behind: {error}");
    }
}

impl Service {
    /// A service without containers.
    pub fn new(streams: Arc<Streams>, reaper: Reaper) -> Self {
        Self {
            registry: Registry::default(),
            streams,
            reaper,
            events: Arc::default(),
            ended_outputs: Arc::default(),
            shared_memory: SharedMemory::default(),
            given_files: GivenFiles::default(),
            network: Mutex::new(Network::hiding()),
            loopback: Loopback::default(),
            host_sockets: HostSockets::default(),
            sequence: AtomicU64::new(0),
        }
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let id = &request.container_id;
        let place = self.registry.reserve(id)?;
        let mut spec: Spec = parse("spec", &request.spec_json)?;
        let resources = HeldResources {
            disks: Disks::translate(&mut spec).await?,
            _memory: self.shared_memory.provide(&mut spec)?,
            _files: self.given_files.provide(id, &request.files, &mut spec)?,
        };
        if request.host_sockets {
            self.host_sockets.listen(&self.streams)?;
        }
        let terminal = spec
            .process()
            .as_ref()
            .and_then(ProcessSpec::terminal)
            .unwrap_or(false);
        let (pipes, io) = Pipes::connect(&self.streams, &request.streams, terminal).await?;

        let raw = RawArgs {
            arguments: request.raw_args,
            environment: request.raw_env,
        };
        let guard = self.reaper.spawn_guard();
        let (container, pending) = Container::begin_create(id, &spec, &raw, io)?;
        let oom = OomWatch::new(id, container.cgroup(), self.events.clone());
        let oom = Arc::new(oom);
        let mut unfinished = Unfinished(Some(container));
        let child = finish(pending).await?;
        let identity = Identity {
            oom: oom.clone(),
            exec_id: String::new(),
        };
        let (running, gate) = self.adopt(child, pipes, identity)?;
        drop(guard);

        let pid = running.process.pid();
        let gate = if request.start {
            open_gate(gate).await?;
            None
        } else {
            Some(gate)
        };
        if let Some(container) = unfinished.0.take() {
            place.fill(Entry::new(id, container, resources, running, oom, gate));
        }
        Ok(CreateContainerResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, id: &str) -> Result<()> {
        let gate = self.registry.get(id)?.take_gate()?;
        open_gate(gate).await
    }

    async fn execute(&self, request: ExecRequest) -> Result<ExecResponse> {
        let entry = self.registry.get(&request.container_id)?;
        entry.require(&[State::Created, State::Running], "execute a command in")?;
        let place = entry.reserve_exec(&request.exec_id)?;
        let spec: ProcessSpec = parse("process", &request.process_json)?;
        let (pipes, io) = Pipes::connect(
            &self.streams,
            &request.streams,
            spec.terminal().unwrap_or(false),
        )
        .await?;

        let raw = RawArgs {
            arguments: request.raw_args,
            environment: request.raw_env,
        };
        let guard = self.reaper.spawn_guard();
        let pending = entry.with_container(|container| container.begin_exec(&spec, &raw, io))?;
        let child = finish(pending).await?;
        let identity = Identity {
            oom: entry.oom.clone(),
            exec_id: request.exec_id,
        };
        let (running, gate) = self.adopt(child, pipes, identity)?;
        drop(guard);

        let pid = running.process.pid();
        open_gate(gate).await?;
        place.fill(running);
        Ok(ExecResponse {
            pid,
            ..Default::default()
        })
    }

    /// Registers a new child and starts its relays.
    fn adopt(&self, child: Child, pipes: Pipes, identity: Identity) -> Result<(Running, OwnedFd)> {
        let exit = self.reaper.register(child.pid, Some(identity));
        let relays = pipes.start(child.terminal.as_ref(), &exit, &self.ended_outputs)?;
        let process = Process::new(
            child.pid,
            child.pidfd,
            child.terminal,
            exit,
            relays.progress(),
        );
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        Ok((Running::new(process, relays, sequence), child.gate))
    }

    async fn delete(&self, id: &str, force: bool) -> Result<()> {
        let entry = self.registry.get(id)?;
        if !force {
            entry.require(&[State::Stopped], "delete")?;
        }
        if entry.state() != State::Stopped {
            entry.with_container(|container| container.kill_all(libc::SIGKILL))?;
            if tokio::time::timeout(KILL_TIMEOUT, entry.init.process.ended())
                .await
                .is_err()
            {
                return Err(Failure::new(
                    Code::INTERNAL,
                    format!(
                        "container {id:?} does not end: killed {} seconds ago",
                        KILL_TIMEOUT.as_secs()
                    ),
                ));
            }
        }
        // Of two concurrent calls one gets it.
        let container = entry
            .take_container()
            .ok_or_else(|| Failure::no_container(id))?;
        self.registry.remove(id);
        destroy(container);
        entry.close_streams().await;
        Ok(())
    }

    async fn wait_for(&self, request: &ProcessRequest) -> Result<WaitResponse> {
        let entry = self.registry.get(&request.container_id)?;
        let exit = if request.exec_id.is_empty() {
            entry.init.process.finished().await
        } else {
            entry.exec(&request.exec_id)?.process.finished().await
        };
        Ok(WaitResponse {
            exit_status: exit.status,
            oom_killed: exit.oom_killed || entry.oom.check() > 0,
            exited_at_ns: exit.at_ns,
            ..Default::default()
        })
    }

    async fn reattach(&self, request: ReattachStreamsRequest) -> Result<ReattachStreamsResponse> {
        let entry = self.registry.get(&request.container_id)?;
        let streams = self.streams.clone();
        // A task of its own: it must not end half way when the call is dropped.
        let reattached = tokio::spawn(async move {
            let received = match request.exec_id.as_str() {
                "" => entry.init.relays.reattach(&streams, &request).await?,
                id => entry.exec(id)?.relays.reattach(&streams, &request).await?,
            };
            Ok(ReattachStreamsResponse {
                input_received: received,
                ..Default::default()
            })
        });
        reattached
            .await
            .unwrap_or_else(|error| Err(Failure::internal("attach streams", &error.into())))
    }

    fn send_signal(&self, request: &SignalRequest) -> Result<()> {
        let entry = self.registry.get(&request.container_id)?;
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=64).contains(signal))
            .ok_or_else(|| Failure::invalid(format!("there is no signal {}", request.signal)))?;
        if request.all {
            return entry.with_container(|container| container.kill_all(signal));
        }
        entry.with_process(&request.exec_id, |running| {
            running
                .process
                .signal(signal)
                .map_err(|error| match error.kind() {
                    std::io::ErrorKind::NotFound => Failure::new(
                        Code::NOT_FOUND,
                        format!(
                            "process {:?} of container {:?} has ended",
                            request.exec_id, request.container_id
                        ),
                    ),
                    _ => Failure::internal(&format!("send signal {signal}"), &error),
                })
        })
    }

    fn resize(&self, request: &ResizeTerminalRequest) -> Result<()> {
        self.registry
            .get(&request.container_id)?
            .with_process(&request.exec_id, |running| {
                let terminal = running.process.terminal().ok_or_else(|| {
                    Failure::new(
                        Code::FAILED_PRECONDITION,
                        format!(
                            "process {:?} of container {:?} has no terminal",
                            request.exec_id, request.container_id
                        ),
                    )
                })?;
                let size = |n: u32| {
                    u16::try_from(n)
                        .map_err(|_| Failure::invalid(format!("invalid terminal size {n}")))
                };
                let size = Winsize {
                    ws_row: size(request.rows)?,
                    ws_col: size(request.columns)?,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                };
                rustix::termios::tcsetwinsize(terminal, size)
                    .map_err(|error| Failure::internal("resize a terminal", &error.into()))
            })
    }

    fn freeze(&self, id: &str, frozen: bool) -> Result<()> {
        let entry = self.registry.get(id)?;
        match frozen {
            true => entry.require(&[State::Running], "pause")?,
            false => entry.require(&[State::Paused], "resume")?,
        }
        entry.with_container(|container| container.freeze(frozen))?;
        entry.set_paused(frozen);
        Ok(())
    }

    fn update_limits(&self, request: &UpdateRequest) -> Result<()> {
        let entry = self.registry.get(&request.container_id)?;
        entry.require(&[State::Created, State::Running, State::Paused], "update")?;
        let mut resources: LinuxResources = parse("resources", &request.resources_json)?;
        entry.resources.disks.resources(&mut resources)?;
        entry.with_container(|container| container.update(&resources))
    }

    async fn stream(&self, name: u32) -> Result<OwnedFd> {
        let stream = self.streams.take(name).await;
        stream.map_err(|error| Failure::internal("take a stream", &error))
    }

    async fn forward_connection(&self, request: &ForwardRequest) -> Result<()> {
        let stream = self.stream(request.stream).await?;
        let loopback = &self.loopback;
        loopback
            .forward(stream, request.port, &request.address)
            .await
    }

    async fn resolve_names(&self, request: &ResolveRequest) -> Result<()> {
        let stream = self.stream(request.stream).await?;
        self.loopback.resolve(stream)
    }

    async fn copy_files(&self, request: &CopyRequest, direction: copy::Direction) -> Result<()> {
        let entry = self.registry.get(&request.container_id)?;
        entry.require(
            &[State::Created, State::Running, State::Paused],
            "copy files of",
        )?;
        let stream = self.stream(request.stream).await?;
        copy::run(
            &self.reaper,
            entry.init.process.pid(),
            direction,
            request,
            stream,
        )
        .await
    }
}

/// Waits, without blocking other calls, until a new process is ready to execute.
async fn finish(pending: PendingChild) -> Result<Child> {
    {
        let failed = |error: std::io::Error| Failure::internal("wait for a new process", &error);
        let ready = reactor::watch_borrowed(pending.as_fd(), Interest::READABLE).map_err(failed)?;
        let _ = ready.readable().await.map_err(failed)?;
    }
    Ok(pending.finish()?)
}

/// Lets a process execute its command; returns when it does.
async fn open_gate(gate: OwnedFd) -> Result<()> {
    let failed = |error: std::io::Error| Failure::internal("start a process", &error);
    match rustix::net::send(&gate, b"x", rustix::net::SendFlags::NOSIGNAL) {
        // The process has ended: the error that it has sent can still be read.
        Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let gate = reactor::watch(gate, Interest::READABLE).map_err(failed)?;
    let mut message = [0; 4096];
    loop {
        let mut guard = gate.readable().await.map_err(failed)?;
        match rustix::net::recv(gate.get_ref(), &mut message[..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Ok(()),
            Ok((n, _)) => return Err(CreateError::decode(&message[..n]).into()),
            Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
}

fn parse<T: DeserializeOwned>(what: &str, json: &[u8]) -> Result<T> {
    serde_json::from_slice(json)
        .map_err(|error| Failure::invalid(format!("invalid {what}: {error}")))
}

/// The answer of a call that only succeeds or fails.
fn done(result: Result<()>) -> ttrpc::Result<Empty> {
    Ok(result.map(|()| Empty::new())?)
}

/// Compares versions: see the head of `agent.proto`.
fn hello(request: &HelloRequest) -> Result<HelloResponse> {
    if request.protocol_version < MIN_HOST_VERSION {
        return Err(Failure::new(
            Code::FAILED_PRECONDITION,
            format!(
                "the host speaks version {} of the agent's protocol, older than \
                 {MIN_HOST_VERSION}, which this agent needs",
                request.protocol_version
            ),
        ));
    }
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(BOOT_ID)
        .map_err(|error| Failure::internal("read the guest's boot id", &error))?;
    Ok(HelloResponse {
        protocol_version: PROTOCOL_VERSION,
        build: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: boot_id.trim_ascii_end().to_owned(),
        ..Default::default()
    })
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        Ok(hello(&request)?)
    }

    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        done(configure::apply(&request))
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        done(network.apply(&request))
    }

    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        done(self.forward_connection(&request).await)
    }

    async fn resolve(&self, _: &TtrpcContext, request: ResolveRequest) -> ttrpc::Result<Empty> {
        done(self.resolve_names(&request).await)
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        Ok(self.create(request).await?)
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.start(&request.container_id).await)
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: DeleteContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.delete(&request.container_id, request.force).await)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ExecResponse> {
        Ok(self.execute(request).await?)
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        Ok(self.wait_for(&request).await?)
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: EventsRequest,
    ) -> ttrpc::Result<EventsResponse> {
        Ok(self.events.after(request.after).await?)
    }

    async fn reattach_streams(
        &self,
        _: &TtrpcContext,
        request: ReattachStreamsRequest,
    ) -> ttrpc::Result<ReattachStreamsResponse> {
        Ok(self.reattach(request).await?)
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        done(self.send_signal(&request))
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.resize(&request))
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        done(self.freeze(&request.container_id, true))
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        done(self.freeze(&request.container_id, false))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        done(self.update_limits(&request))
    }

    async fn update_files(
        &self,
        _: &TtrpcContext,
        request: UpdateFilesRequest,
    ) -> ttrpc::Result<Empty> {
        done(
            self.given_files
                .update(&request.container_id, &request.files),
        )
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        let entry = self.registry.get(&request.container_id)?;
        Ok(metrics::read(&entry.cgroup, entry.init.process.pid()))
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ProcessesResponse> {
        let entry = self.registry.get(&request.container_id)?;
        Ok(processes::list::list(&entry.cgroup)?)
    }

    async fn copy_out(&self, _: &TtrpcContext, request: CopyRequest) -> ttrpc::Result<Empty> {
        done(self.copy_files(&request, copy::Direction::Out).await)
    }

    async fn copy_in(&self, _: &TtrpcContext, request: CopyRequest) -> ttrpc::Result<Empty> {
        done(self.copy_files(&request, copy::Direction::In).await)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        init::quiesce();
        // The host has its reply, and may end the machine itself, which is quicker.
        tokio::spawn(async {
            tokio::time::sleep(SHUTDOWN_REPLY_GRACE).await;
            init::power_off()
        });
        Ok(Empty::new())
    }
}

/// The service as ttrpc wants it.
pub fn methods(service: Service) -> std::collections::HashMap<String, ttrpc::r#async::Service> {
    let mut services = hull_protocol::agent_ttrpc::create_agent(Arc::new(service));
    services.values_mut().for_each(calls::once);
    services
}
