//! An agent in a process of its own, and a host that goes on when its connection breaks.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hull_protocol::CALL_ID_KEY;
use hull_protocol::agent::*;
use hull_protocol::agent_ttrpc::AgentClient;
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::watch;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;

use crate::io::reactor;
use crate::io::streams::Streams;
use crate::processes::reaper::Reaper;
use crate::rpc::connection;
use crate::rpc::service::Service;

/// How long a test may take.
const TEST_TIMEOUT: Duration = Duration::from_secs(50);

/// A stream buffers at most as much as a vsock device does.
const SOCKET_BUFFER: usize = 32 << 10;

/// A name that no other test has.
fn unique_name() -> String {
    static TESTS: AtomicU64 = AtomicU64::new(0);
    let number = TESTS.fetch_add(1, Ordering::Relaxed);
    format!("hull-agent-test-{}-{number}", std::process::id())
}

/// Why no agent can run here.
fn obstacle() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    if !Path::new("/bin/busybox").exists() {
        return Some("no /bin/busybox to make a root from");
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.split_whitespace().any(|name| name == "cgroup2") {
        return Some("no cgroup v2");
    }
    None
}

/// Runs a test with an agent.
pub fn test<T: Future<Output = ()>>(test: impl FnOnce(Agent) -> T) {
    if let Some(why) = obstacle() {
        eprintln!("skipped: {why}");
        return;
    }
    let agent = Agent::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(TEST_TIMEOUT, test(agent))
            .await
            .unwrap()
    });
}

/// An agent; it ends when this is dropped.
pub struct Agent {
    /// Where the agent dials.
    home: TcpListener,
    /// Where it takes streams.
    streams: SocketAddr,
    pub root: PathBuf,
    /// Control group of its containers.
    group: String,
    process: i32,
    life: Option<std::io::PipeWriter>,
}

impl Agent {
    fn start() -> Self {
        let home = TcpListener::bind("127.0.0.1:0").unwrap();
        let streams = TcpListener::bind("127.0.0.1:0").unwrap();
        let (dead, life) = std::io::pipe().unwrap();
        let group = unique_name();
        let mut agent = Self {
            home,
            streams: streams.local_addr().unwrap(),
            root: root(&group),
            group,
            process: 0,
            life: Some(life),
        };
        // SAFETY: the child is alone in its memory, works there, and ends. That another thread may
        // have held a lock of the allocator is what fork's handlers of the C library are for.
        match unsafe { libc::fork() } {
            0 => {
                agent.life = None;
                let home = agent.home.local_addr().unwrap();
                let run = || supervise(&agent.group, home, streams.into(), dead.into());
                let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
                exit(if ended.is_ok() { 0 } else { 1 })
            }
            child => agent.process = child,
        }
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.life = None;
        // SAFETY: waits for the child that was created above.
        unsafe { libc::waitpid(self.process, std::ptr::null_mut(), 0) };
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn exit(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

/// A directory with busybox in it.
fn root(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(name);
    let bin = path.join("bin");
    for directory in ["bin", "dev", "proc"] {
        std::fs::create_dir_all(path.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", bin.join("busybox")).unwrap();
    for applet in ["sh", "cat", "head", "yes", "tr", "sleep", "stty", "true"] {
        std::fs::hard_link(bin.join("busybox"), bin.join(applet)).unwrap();
    }
    path
}

/// Creates the agent's surroundings, starts it, and cleans up after it.
fn supervise(group: &str, home: SocketAddr, streams: OwnedFd, dead: OwnedFd) {
    // SAFETY: takes flags only; this process has one thread.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID) };
    assert_eq!(unshared, 0);
    let private =
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    let mount = |kind, target| rustix::mount::mount(kind, target, kind, MountFlags::empty(), None);
    mount("cgroup2", "/sys/fs/cgroup").unwrap();
    // What the agent logs.
    rustix::mount::mount_bind("/dev/null", "/dev/kmsg").unwrap();
    // SAFETY: as in the caller.
    match unsafe { libc::fork() } {
        0 => {
            mount("proc", "/proc").unwrap();
            agent(home, streams, dead);
            exit(0)
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for the child that was just created. With it ends its whole namespace.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            remove_groups(&Path::new("/sys/fs/cgroup").join(group));
            assert_eq!(status, 0, "the agent has failed");
        }
    }
}

fn remove_groups(group: &Path) {
    for entry in std::fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_groups(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(group);
}

/// What the agent's `main` does, until `dead` says that the test has ended.
fn agent(home: SocketAddr, streams: OwnedFd, dead: OwnedFd) {
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let reaper = Reaper::default();
        let reaping = reaper.start().unwrap();
        rustix::io::ioctl_fionbio(&streams, true).unwrap();
        let streams = Arc::new(Streams::new(streams, accept).unwrap());
        let service = Service::new(streams.clone(), reaper);
        let dial = || dial(home);
        let dead = reactor::watch(dead, Interest::READABLE).unwrap();
        tokio::select! {
            () = reaping => {}
            ended = connection::serve(service, &streams, dial().unwrap(), dial) => {
                panic!("{}", ended.unwrap_err());
            }
            _ = dead.readable() => {}
        }
    });
}

fn dial(home: SocketAddr) -> std::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &home) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// A stream is named by the port that it comes from.
fn accept(listener: BorrowedFd<'_>) -> std::io::Result<(OwnedFd, u32)> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (stream, peer) = rustix::net::acceptfrom_with(listener, flags)?;
    sockopt::set_socket_send_buffer_size(&stream, SOCKET_BUFFER)?;
    sockopt::set_tcp_nodelay(&stream, true)?;
    let peer = SocketAddr::try_from(peer.unwrap())?;
    Ok((stream, peer.port().into()))
}

/// Resets a connection: what is on its way, in either direction, is lost.
fn reset(socket: BorrowedFd<'_>) {
    // SAFETY: sockaddr is integers, for which zero is a valid value; AF_UNSPEC disconnects.
    unsafe {
        let mut address: libc::sockaddr = std::mem::zeroed();
        address.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
        let length = size_of::<libc::sockaddr>() as libc::socklen_t;
        libc::connect(socket.as_raw_fd(), &raw const address, length);
    }
}

/// A connection with which the agent has dialled.
#[derive(Clone)]
struct Connected {
    client: AgentClient,
    socket: Arc<TcpStream>,
}

/// The host.
pub struct Host {
    pub agent: Agent,
    /// The newest connection, and how many there have been.
    connected: watch::Receiver<(u64, Option<Connected>)>,
    calls: AtomicU64,
}

type Called<T> = Result<T, ttrpc::Status>;

impl Host {
    /// A host that takes the agent's connections.
    pub async fn new(agent: Agent) -> Arc<Self> {
        let (sender, connected) = watch::channel((0, None));
        agent.home.set_nonblocking(true).unwrap();
        let home = agent.home.try_clone().unwrap();
        tokio::spawn(async move {
            let home = tokio::net::TcpListener::from_std(home).unwrap();
            while let Ok((stream, _)) = home.accept().await {
                let stream = stream.into_std().unwrap();
                let socket = Arc::new(stream.try_clone().unwrap());
                let stream = tokio::net::TcpStream::from_std(stream).unwrap();
                let client = AgentClient::new(Client::new(Socket::new(stream)));
                sender.send_modify(|(count, connected)| {
                    *count += 1;
                    *connected = Some(Connected { client, socket });
                });
            }
        });
        Arc::new(Self {
            agent,
            connected,
            calls: AtomicU64::new(0),
        })
    }

    /// Ends the agent's connection, every other time by a reset.
    pub async fn cut(&self) {
        let (count, connected) = self.newest(0).await;
        match count % 2 {
            0 => reset(connected.socket.as_fd()),
            _ => drop(connected.socket.shutdown(std::net::Shutdown::Both)),
        }
    }

    /// How many connections there have been.
    pub fn connections(&self) -> u64 {
        self.connected.borrow().0
    }

    /// A connection that came after the one of this number.
    async fn newest(&self, after: u64) -> (u64, Connected) {
        let mut connected = self.connected.clone();
        let newest = connected
            .wait_for(|(count, connected)| *count > after && connected.is_some())
            .await
            .unwrap();
        (newest.0, newest.1.clone().unwrap())
    }

    /// Calls until there is an answer; with the same id each time, if it has one.
    async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        has_id: bool,
        call: impl Fn(AgentClient, ttrpc::context::Context) -> F,
    ) -> Called<T> {
        let mut context = ttrpc::context::Context::default();
        if has_id {
            let id = self.calls.fetch_add(1, Ordering::Relaxed);
            context.add(CALL_ID_KEY.into(), format!("test/{id}"));
        }
        let mut count = 0;
        loop {
            let connected;
            (count, connected) = self.newest(count).await;
            match call(connected.client, context.clone()).await {
                Ok(answer) => return Ok(answer),
                Err(ttrpc::Error::RpcStatus(status)) => return Err(status),
                Err(_broken) => {}
            }
        }
    }

    pub async fn hello(&self, request: &HelloRequest) -> Called<HelloResponse> {
        self.call(false, |client, context| async move {
            client.hello(context, request).await
        })
        .await
    }

    pub async fn wait(&self, container: &str, exec: &str) -> Called<WaitResponse> {
        let mut request = ProcessRequest::new();
        request.container_id = container.into();
        request.exec_id = exec.into();
        let request = &request;
        self.call(false, |client, context| async move {
            client.wait(context, request).await
        })
        .await
    }

    pub async fn events(&self, after: u64) -> Called<EventsResponse> {
        let mut request = EventsRequest::new();
        request.after = after;
        let request = &request;
        self.call(false, |client, context| async move {
            client.events(context, request).await
        })
        .await
    }

    pub async fn exec(&self, request: &ExecRequest) -> Called<ExecResponse> {
        self.call(true, |client, context| async move {
            client.exec(context, request).await
        })
        .await
    }

    pub async fn freeze(&self, container: &str, frozen: bool) -> Called<Empty> {
        let mut request = ContainerRequest::new();
        request.container_id = container.into();
        let request = &request;
        self.call(true, |client, context| async move {
            match frozen {
                true => client.pause(context, request).await,
                false => client.resume(context, request).await,
            }
        })
        .await
    }

    pub async fn reattach(
        &self,
        request: &ReattachStreamsRequest,
    ) -> Called<ReattachStreamsResponse> {
        self.call(true, |client, context| async move {
            client.reattach_streams(context, request).await
        })
        .await
    }

    /// Creates and starts a container with a shell script as its init.
    pub async fn create(&self, id: &str, script: &str, streams: StreamPorts) -> Called<u32> {
        let spec = serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": self.agent.root},
            "process": process(script, false),
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.agent.group),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            },
        });
        let mut request = CreateContainerRequest::new();
        request.container_id = id.into();
        request.spec_json = spec.to_string().into_bytes();
        request.streams = streams.message();
        request.start = true;
        let request = &request;
        let created = self
            .call(true, |client, context| async move {
                client.create_container(context, request).await
            })
            .await?;
        Ok(created.pid)
    }

    pub async fn delete(&self, id: &str) -> Called<Empty> {
        let mut request = DeleteContainerRequest::new();
        request.container_id = id.into();
        request.force = true;
        let request = &request;
        self.call(true, |client, context| async move {
            client.delete_container(context, request).await
        })
        .await
    }

    /// Opens a stream to the agent.
    pub fn stream(&self) -> Stream {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER).unwrap();
        sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER).unwrap();
        rustix::net::connect(&socket, &self.agent.streams).unwrap();
        sockopt::set_tcp_nodelay(&socket, true).unwrap();
        let socket = TcpStream::from(socket);
        socket.set_nonblocking(true).unwrap();
        Stream {
            port: socket.local_addr().unwrap().port().into(),
            socket: tokio::net::TcpStream::from_std(socket).unwrap(),
        }
    }

    /// Executes a script, and returns its exit status and what it has written.
    pub async fn run(&self, container: &str, exec: &str, script: &str) -> (i32, Vec<u8>) {
        let mut stdout = self.stream();
        let ports = StreamPorts {
            stdout: stdout.port,
            ..StreamPorts::default()
        };
        self.exec(&exec_request(container, exec, script, ports))
            .await
            .unwrap();
        let output = stdout.read_to_end().await;
        let exit = self.wait(container, exec).await.unwrap();
        (exit.exit_status, output)
    }
}

/// The host's end of a stream.
pub struct Stream {
    pub port: u32,
    socket: tokio::net::TcpStream,
}

impl Stream {
    /// What comes until the agent ends it.
    pub async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.socket.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    /// Reads once, at most `most` bytes.
    pub async fn read(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        let length = self.socket.read(&mut bytes).await.unwrap();
        bytes.truncate(length);
        bytes
    }

    /// Writes all.
    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.socket.write_all(bytes).await
    }

    /// Ends what is sent.
    pub async fn half_close(&mut self) {
        self.socket.shutdown().await.unwrap();
    }

    /// Loses what is on its way.
    pub fn reset(&self) {
        reset(self.socket.as_fd());
    }

    /// Sends as long as there is a connection.
    pub async fn send(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            self.socket.writable().await.unwrap();
            match self.socket.try_write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("cannot send: {error}"),
            }
        }
    }

    /// Receives once, at most `most` bytes.
    pub async fn receive(&self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        loop {
            self.socket.readable().await.unwrap();
            match self.socket.try_read(&mut bytes) {
                Ok(length) => {
                    bytes.truncate(length);
                    return bytes;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => panic!("cannot receive: {error}"),
            }
        }
    }
}

/// Streams by their ports.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamPorts {
    pub stdin: u32,
    pub stdout: u32,
    pub terminal: u32,
}

impl StreamPorts {
    pub fn message(self) -> protobuf::MessageField<hull_protocol::agent::Streams> {
        let mut message = hull_protocol::agent::Streams::new();
        message.stdin = self.stdin;
        message.stdout = self.stdout;
        message.terminal = self.terminal;
        protobuf::MessageField::some(message)
    }
}

fn process(script: &str, terminal: bool) -> serde_json::Value {
    serde_json::json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "args": ["sh", "-c", script],
        "env": ["PATH=/bin"],
    })
}

/// A call that executes a script.
pub fn exec_request(container: &str, exec: &str, script: &str, ports: StreamPorts) -> ExecRequest {
    let mut request = ExecRequest::new();
    request.container_id = container.into();
    request.exec_id = exec.into();
    request.process_json = process(script, ports.terminal != 0)
        .to_string()
        .into_bytes();
    request.streams = ports.message();
    request
}

/// Bytes in which each place differs from its neighbours.
pub fn pattern(range: std::ops::Range<usize>) -> Vec<u8> {
    range.map(|place| b'a' + (place / 7 % 23) as u8).collect()
}
