//! A guest without a machine: two processes that end when they are told to, a device process played
//! over its control socket, and an agent that serves the real protocol on a socket pair.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::{Command, Stdio as ChildStdio};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_core::Stream;
use hull_device_control::{
    Call, DeviceConfig, DeviceControl, Event as DeviceEvent, REQUEST_LIMITS, Request, SETUP_LIMITS,
    Setup,
};
use hull_ipc::Socket;
use hull_jail::{Started, Status};
use hull_machine::{
    Choice, ConsoleRing, Disks, Error as MachineError, Exit as MachineExit, Features, Kind,
    Machine, NetDevices, Process as MachineProcess, ProcessRole,
};
use hull_protocol::agent as proto;
use hull_protocol::agent_ttrpc::{Agent, create_agent};
use hull_protocol::{AGENT_PORT, PROTOCOL_VERSION};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde_json::value::RawValue;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::{Instant, sleep};
use ttrpc::r#async::transport::{Listener, Socket as TtrpcSocket};
use ttrpc::r#async::{Server, TtrpcContext};

use crate::config::{ContainerConfig, EndPolicy, MachineConfig, SandboxConfig};
use crate::container::Container;
use crate::events::{Event, EventKind};
use crate::guest::Dials;
use crate::guest::processes::{Guest, Parts};
use crate::sandbox::{Hold, Sandbox};
use crate::store::{Directory, SandboxDir, SandboxPath, Status as ContainerStatus};
use crate::timings::Timings;

/// What a panicked kernel's machine exits with.
pub const PANIC: i32 = 2;

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    Code(i32),
    Signal(i32),
}

/// A process of the host that waits for the exit code that it is to end with.
struct Puppet {
    pid: i32,
    pidfd: OwnedFd,
    stdin: Mutex<File>,
}

impl Puppet {
    // The sandbox under test waits for it.
    #[allow(clippy::zombie_processes)]
    fn start(stdout: ChildStdio) -> Self {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read code && exit $code"])
            .stdin(ChildStdio::piped())
            .stdout(stdout)
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        let stdin = OwnedFd::from(child.stdin.take().unwrap());
        Self {
            pid,
            pidfd,
            stdin: Mutex::new(stdin.into()),
        }
    }

    /// Ends it, if it lives. It has ended when this returns.
    fn end(&self, death: Death) {
        match death {
            // It may have ended before.
            Death::Code(code) => drop(writeln!(self.stdin.lock().unwrap(), "{code}")),
            Death::Signal(signal) => {
                let signal = Signal::from_named_raw(signal).unwrap();
                let _ = pidfd_send_signal(&self.pidfd, signal);
            }
        }
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut ended, None).unwrap();
    }

    fn has_ended(&self) -> bool {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = rustix::time::Timespec::default();
        poll(&mut ended, Some(&now)).unwrap() > 0
    }
}

#[derive(Debug)]
struct FakeMachine {
    process: [MachineProcess; 1],
    ended: Option<MachineExit>,
}

impl Machine for FakeMachine {
    fn kind(&self) -> Kind {
        Kind::Uml
    }

    fn processes(&self) -> &[MachineProcess] {
        &self.process
    }

    fn pause(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    fn exit(&mut self) -> Option<MachineExit> {
        if self.ended.is_none() {
            let status = Status::reap(self.process[0].pidfd.as_fd()).transpose()?;
            self.ended = Some(match status {
                Ok(Status::Code(0)) => MachineExit::PoweredOff,
                Ok(Status::Code(PANIC)) => MachineExit::Panicked,
                Ok(Status::Code(code)) => MachineExit::Failed { code },
                Ok(Status::Signal(signal)) => MachineExit::Killed { signal },
                Err(errno) => MachineExit::Unknown { errno },
            });
        }
        self.ended.clone()
    }
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        if self.exit().is_none() {
            let pidfd = &self.process[0].pidfd;
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        }
    }
}

/// What the guest does. Times in milliseconds; `None` for never.
#[derive(Debug, Clone)]
pub struct Script {
    /// When the agent dials.
    pub dials: Option<u64>,
    /// Calls that are never answered, by name; `drain` is the device process's.
    pub silent: Vec<&'static str>,
    /// How long an init lives after a signal. One that is not here is ignored.
    pub reactions: Vec<(u32, u64)>,
    /// By how much time goes on when nothing is to be done.
    pub tick: u64,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            dials: Some(5),
            silent: Vec::new(),
            reactions: vec![(15, 3), (9, 1)],
            tick: 1,
        }
    }
}

impl Script {
    pub fn silent(call: &'static str) -> Self {
        Self {
            silent: vec![call],
            ..Self::default()
        }
    }
}

/// How processes in the guest have ended, by container and exec.
type Processes = BTreeMap<(String, String), watch::Sender<Option<i32>>>;

/// The guest's side of everything.
pub struct FakeGuest {
    pub script: Script,
    machine: Puppet,
    devices: Puppet,
    processes: Mutex<Processes>,
    /// What the agent reports.
    events: watch::Sender<Vec<proto::Event>>,
    links: Mutex<Vec<StdStream>>,
    dialled: mpsc::UnboundedSender<StdStream>,
    accepted: mpsc::UnboundedSender<UnixStream>,
}

/// Which process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    Machine,
    Devices,
}

impl FakeGuest {
    /// Ends a process of the guest.
    pub fn dies(&self, who: Who, death: Death) {
        match who {
            Who::Machine => self.machine.end(death),
            Who::Devices => self.devices.end(death),
        }
    }

    /// Whether nothing is left of it.
    pub fn is_gone(&self) -> bool {
        self.machine.has_ended() && self.devices.has_ended()
    }

    /// The agent makes a connection.
    pub fn dial(&self) {
        let (host, guest) = StdStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        self.links.lock().unwrap().push(guest.try_clone().unwrap());
        let _ = self.accepted.send(UnixStream::from_std(guest).unwrap());
        let _ = self.dialled.send(host);
    }

    /// All connections of the agent break.
    pub fn hang_up(&self) {
        for link in self.links.lock().unwrap().drain(..) {
            let _ = link.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Ends a process in the guest.
    pub fn exits(&self, container: &str, exec: &str, status: i32) {
        let key = (container.to_owned(), exec.to_owned());
        let first = self
            .processes
            .lock()
            .unwrap()
            .get(&key)
            .is_some_and(|process| {
                process.send_if_modified(|exit| {
                    let first = exit.is_none();
                    exit.get_or_insert(status);
                    first
                })
            });
        if first {
            self.events.send_modify(|events| {
                let exit = proto::ProcessExit {
                    container_id: container.to_owned(),
                    exec_id: exec.to_owned(),
                    exit_status: status,
                    ..Default::default()
                };
                events.push(proto::Event {
                    sequence: events.len() as u64 + 1,
                    what: Some(proto::event::What::Exit(exit)),
                    ..Default::default()
                });
            });
        }
    }

    /// How a process in the guest has ended.
    pub fn exit_of(&self, container: &str, exec: &str) -> Option<i32> {
        let key = (container.to_owned(), exec.to_owned());
        let processes = self.processes.lock().unwrap();
        processes.get(&key).and_then(|process| *process.borrow())
    }

    fn begins(&self, container: &str, exec: &str) {
        let key = (container.to_owned(), exec.to_owned());
        let processes = &mut self.processes.lock().unwrap();
        processes.insert(key, watch::Sender::new(None));
    }

    async fn called(&self, call: &'static str) {
        if self.script.silent.contains(&call) {
            std::future::pending::<()>().await;
        }
    }
}

struct Service(Arc<FakeGuest>);

type Answer<T> = ttrpc::Result<T>;

fn status(code: ttrpc::Code, text: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

#[async_trait]
impl Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: proto::HelloRequest,
    ) -> Answer<proto::HelloResponse> {
        self.0.called("hello").await;
        Ok(proto::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        })
    }

    async fn configure(
        &self,
        _: &TtrpcContext,
        _: proto::ConfigureRequest,
    ) -> Answer<proto::Empty> {
        self.0.called("configure").await;
        Ok(proto::Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> Answer<proto::CreateContainerResponse> {
        self.0.called("create").await;
        self.0.begins(&request.container_id, "");
        Ok(proto::CreateContainerResponse {
            pid: 7,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        _: proto::StartContainerRequest,
    ) -> Answer<proto::Empty> {
        self.0.called("start").await;
        Ok(proto::Empty::default())
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: proto::DeleteContainerRequest,
    ) -> Answer<proto::Empty> {
        self.0.called("delete").await;
        self.0.exits(&request.container_id, "", 137);
        Ok(proto::Empty::default())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: proto::ExecRequest,
    ) -> Answer<proto::ExecResponse> {
        self.0.called("exec").await;
        self.0.begins(&request.container_id, &request.exec_id);
        Ok(proto::ExecResponse::default())
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> Answer<proto::WaitResponse> {
        self.0.called("wait").await;
        let key = (request.container_id, request.exec_id);
        let process = self
            .0
            .processes
            .lock()
            .unwrap()
            .get(&key)
            .map(|p| p.subscribe());
        let Some(mut process) = process else {
            return Err(status(ttrpc::Code::NOT_FOUND, "no such process"));
        };
        let exit = process.wait_for(Option::is_some).await.map(|exit| *exit);
        Ok(proto::WaitResponse {
            exit_status: exit.ok().flatten().unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        request: proto::EventsRequest,
    ) -> Answer<proto::EventsResponse> {
        let mut events = self.0.events.subscribe();
        let after = usize::try_from(request.after).unwrap();
        let events = events.wait_for(|events| events.len() > after).await;
        Ok(proto::EventsResponse {
            events: events.unwrap()[after..].to_vec(),
            ..Default::default()
        })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: proto::SignalRequest,
    ) -> Answer<proto::Empty> {
        self.0.called("signal").await;
        let mut reactions = self.0.script.reactions.iter();
        if let Some((signal, delay)) = reactions.find(|(signal, _)| *signal == request.signal) {
            let (guest, delay) = (self.0.clone(), Duration::from_millis(*delay));
            let status = 128 + signal.cast_signed();
            tokio::spawn(async move {
                sleep(delay).await;
                guest.exits(&request.container_id, &request.exec_id, status);
            });
        }
        Ok(proto::Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, _: proto::ContainerRequest) -> Answer<proto::Empty> {
        self.0.called("pause").await;
        Ok(proto::Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, _: proto::ContainerRequest) -> Answer<proto::Empty> {
        self.0.called("resume").await;
        Ok(proto::Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, _: proto::UpdateRequest) -> Answer<proto::Empty> {
        self.0.called("update").await;
        Ok(proto::Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: proto::Empty) -> Answer<proto::Empty> {
        self.0.called("shutdown").await;
        Ok(proto::Empty::default())
    }
}

/// The connections that a fake agent has made, for ttrpc, which expects to accept them.
struct Accepted(mpsc::UnboundedReceiver<UnixStream>);

impl Stream for Accepted {
    type Item = io::Result<TtrpcSocket>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0
            .poll_recv(cx)
            .map(|stream| stream.map(|stream| Ok(TtrpcSocket::new(stream))))
    }
}

/// A sandbox around a fake guest.
pub struct World {
    pub sandbox: Sandbox,
    pub guest: Arc<FakeGuest>,
    pub events: broadcast::Receiver<Event>,
    pub path: SandboxPath,
    run: tempfile::TempDir,
    began: Instant,
    /// Until it has a container.
    hold: Mutex<Option<Hold>>,
}

impl World {
    /// Boots. Time is paused, and goes on by a tick at most whenever nothing is to be done: what is
    /// on its way through a socket arrives a few ticks later.
    pub async fn boot(end: EndPolicy, script: Script) -> Self {
        let tick = Duration::from_millis(script.tick);
        tokio::spawn(async move {
            loop {
                sleep(tick).await;
            }
        });
        let run = tempfile::tempdir().unwrap();
        let path = SandboxPath::new(run.path(), "one");
        let dir = SandboxDir::create(&path).unwrap();
        let (console, console_end) = ConsoleRing::create(&path.console()).unwrap();
        let machine = Puppet::start(console_end.into());
        let devices = Puppet::start(ChildStdio::null());

        let (dialled, dials) = mpsc::unbounded_channel();
        let (accepted, connections) = mpsc::unbounded_channel();
        let guest = Arc::new(FakeGuest {
            processes: Mutex::default(),
            events: watch::Sender::default(),
            links: Mutex::default(),
            script,
            machine,
            devices,
            dialled,
            accepted,
        });

        let (ours, theirs) = hull_ipc::pair().unwrap();
        let setup = Setup {
            devices: vec![DeviceConfig::Vsock],
            ..Setup::default()
        };
        let (listening, _) = StdStream::pair().unwrap();
        let (control, incoming) =
            DeviceControl::start(ours, &setup, &[listening.as_fd()], Dials::PORTS).unwrap();
        tokio::spawn(serve_devices(
            guest.clone(),
            Socket::new(theirs).unwrap(),
            dials,
        ));
        let server = Server::new()
            .add_listener(Listener::new(Accepted(connections)))
            .register_service(create_agent(Arc::new(Service(guest.clone()))));
        tokio::spawn(serve_agent(server));

        let parts = Parts {
            devices: Some(Started {
                pid: guest.devices.pid,
                pidfd: guest.devices.pidfd.try_clone().unwrap(),
            }),
            control,
            machine: Box::new(FakeMachine {
                process: [MachineProcess {
                    role: ProcessRole::Machine,
                    pid: guest.machine.pid,
                    pidfd: guest.machine.pidfd.try_clone().unwrap(),
                }],
                ended: None,
            }),
            console,
            features: features(),
            nets: 0,
            spare_disks: 0,
            uid: 0,
        };
        let watched = Guest::watch(&path, parts).unwrap();
        let config = SandboxConfig::new(machine_config(), end);
        let began = Instant::now();
        let sandbox = Sandbox::around(
            config,
            dir,
            watched,
            Dials::new(incoming),
            tokio::spawn(async { Ok(()) }),
            Timings::default(),
        );
        if let Some(delay) = guest.script.dials {
            let guest = guest.clone();
            tokio::spawn(async move {
                sleep(Duration::from_millis(delay)).await;
                guest.dial();
            });
        }
        Self {
            hold: Mutex::new(Some(sandbox.hold())),
            events: sandbox.events(),
            sandbox,
            guest,
            path,
            run,
            began,
        }
    }

    /// The sandbox ends with its last container from now on.
    pub fn release(&self) {
        self.hold.lock().unwrap().take();
    }

    /// Milliseconds since the boot.
    pub fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap()
    }

    /// The directory of a container.
    pub fn directory(&self, container: &str) -> PathBuf {
        self.run.path().join("containers").join(container)
    }

    /// What is written down of a container.
    pub fn status(&self, container: &str) -> Option<ContainerStatus> {
        let directory = Directory::open(&self.directory(container)).ok()?;
        ContainerStatus::read(&directory).unwrap()
    }

    /// Creates a container.
    pub async fn create(&self, id: &str, start: bool) -> crate::error::Result<Arc<Container>> {
        let config = ContainerConfig {
            start,
            ..ContainerConfig::new(id, RawValue::from_string("{}".to_owned()).unwrap())
        };
        self.create_with(config).await
    }

    /// The same with a configuration.
    pub async fn create_with(
        &self,
        config: ContainerConfig,
    ) -> crate::error::Result<Arc<Container>> {
        let id = config.id.clone();
        let directory = Directory::create(&self.directory(&id)).unwrap();
        self.sandbox.create(config, directory, Vec::new()).await?;
        self.sandbox.container(&id)
    }

    /// Names of the events so far.
    pub fn events(&mut self) -> Vec<String> {
        let mut names = Vec::new();
        while let Ok(event) = self.events.try_recv() {
            let name = event.kind.name();
            names.push(match (&event.kind, event.kind.container()) {
                (EventKind::Exited { exec, .. }, container) if !exec.is_empty() => {
                    format!("{name} {container}/{exec}")
                }
                (_, "") => name.to_owned(),
                (_, container) => format!("{name} {container}"),
            });
        }
        names
    }
}

async fn serve_agent(mut server: Server) {
    server.start().await.unwrap();
    // It serves as long as it is there.
    std::future::pending::<()>().await;
}

async fn serve_devices(
    guest: Arc<FakeGuest>,
    socket: Socket,
    mut dials: mpsc::UnboundedReceiver<StdStream>,
) {
    let end = guest.devices.pidfd.try_clone().unwrap();
    let end = hull_ipc::watch(end, Interest::READABLE).unwrap();
    let serve = async {
        socket.receive::<Setup>(SETUP_LIMITS).await.unwrap();
        loop {
            tokio::select! {
                dialled = dials.recv() => {
                    let Some(stream) = dialled else { return };
                    let incoming = DeviceEvent::Incoming { port: AGENT_PORT, guest_port: 1 };
                    let _ = socket.send(&incoming, &[stream.as_fd()]).await;
                }
                request = socket.receive::<Request>(REQUEST_LIMITS) => {
                    let Ok(Some(request)) = request else { return };
                    let silent = request.message.call == Call::Drain
                        && guest.script.silent.contains(&"drain");
                    if request.message.id != 0 && !silent {
                        let reply = DeviceEvent::Reply { id: request.message.id, error: None };
                        let _ = socket.send(&reply, &[]).await;
                    }
                }
            }
        }
    };
    tokio::select! {
        () = serve => {}
        _ = end.readable() => {}
    }
    // Its sockets close with it.
    guest.hang_up();
}

fn features() -> Features {
    Features {
        max_vcpus: None,
        max_devices: None,
        net: NetDevices::AtBoot {
            enables_rings_early: false,
        },
        disks: Disks::AtBoot,
        pause: true,
        snapshot: false,
        host_clock: true,
        compat32: true,
        own_devices: false,
        place: |_, _| None,
        fixed: &[],
    }
}

fn machine_config() -> MachineConfig {
    MachineConfig {
        choice: Choice {
            kind: Kind::Uml,
            kernel: PathBuf::new(),
            hardware: false,
            why: String::new(),
        },
        initramfs: PathBuf::new(),
        memory: 0,
        cpus: 1,
        nets: 0,
        spare_disks: 0,
        hull: None,
    }
}
