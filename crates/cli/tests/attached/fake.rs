//! A fake sandbox process: a container's files, the control socket, and the sandbox's ends of
//! connections and streams.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use hull_engine::container::{Details, ENGINE};
use hull_engine::{Paths, names};
use hull_sandbox::config::ProcessConfig;
use hull_sandbox::control::protocol::{Hello, Reply, Request, receive, send};
use hull_sandbox::store::{
    CONFIG_FILE, Directory, Exit, Record, SandboxDir, SandboxPath, State, Status,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, socket_with,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// Timeout for anything that must happen.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A container of one test, and its sandbox.
pub struct Fake {
    pub directory: tempfile::TempDir,
    pub id: String,
    paths: Paths,
    listener: OwnedFd,
    _sandbox: SandboxDir,
}

impl Fake {
    /// A running container called `web`. `None` without root.
    pub fn new(terminal: bool) -> Option<Fake> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (run, data) = (directory.path().join("run"), directory.path().join("data"));
        let paths = Paths::new(&run, &data);
        let id = "ab".repeat(32);
        let path = SandboxPath::new(&run, &id[..24]);
        let sandbox = SandboxDir::create(&path).unwrap();
        let listener = listen(&path);
        let details = Details {
            name: "web".into(),
            image: "busybox".into(),
            terminal,
            stdin: true,
            ..Details::default()
        };
        let container = Directory::create(&paths.container(&id)).unwrap();
        let mut record = Record::new(&id, ENGINE, details);
        record.sandbox = Some(path);
        record.write(&container).unwrap();
        Status::new(State::Running).write(&container).unwrap();
        names::claim(&paths, "web", &id).unwrap();
        let config = format!("run_dir = {run:?}\ndata_dir = {data:?}\n");
        std::fs::write(directory.path().join("config.toml"), config).unwrap();
        let fake = Fake {
            directory,
            id,
            paths,
            listener,
            _sandbox: sandbox,
        };
        std::fs::write(fake.config(), CONFIG).unwrap();
        Some(fake)
    }

    /// The container's directory.
    pub fn container(&self) -> Directory {
        Directory::open(&self.paths.container(&self.id)).unwrap()
    }

    /// The container's OCI configuration.
    pub fn config(&self) -> PathBuf {
        self.paths.container(&self.id).join(CONFIG_FILE)
    }

    /// A hull command, with arguments separated by spaces.
    pub fn hull(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
        command
            .args(line.split_whitespace())
            .env("HULL_CONFIG", self.directory.path().join("config.toml"))
            .env_remove("HULL_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Releases the lock and the socket, as if the sandbox process was killed; returns the
    /// directory.
    pub fn die(self) -> tempfile::TempDir {
        self.directory
    }

    /// Accepts the next connection, before any greeting.
    pub fn accept(&self) -> Connection {
        wait_for(&self.listener);
        let socket = accept_with(&self.listener, SocketFlags::CLOEXEC).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT)).unwrap();
        Connection { socket }
    }

    /// Accepts the next connection, answers the greeting and reads the first request.
    pub fn request(&self) -> (Request, Connection) {
        let connection = self.accept();
        connection.greet(Hello::own());
        (connection.request(), connection)
    }

    /// The next connection and its `Exec` request.
    pub fn exec(&self) -> (ProcessConfig, Connection) {
        let (request, connection) = self.request();
        let Request::Exec(process) = request else {
            panic!("{request:?}")
        };
        assert_eq!(process.container, self.id);
        (*process, connection)
    }
}

/// The part of a container's configuration that commands read.
const CONFIG: &str = r#"{"ociVersion": "1.2.0", "process": {
    "args": ["sh"], "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}}}"#;

fn listen(path: &SandboxPath) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path.socket()).unwrap()).unwrap();
    rustix::net::listen(&listener, 16).unwrap();
    listener
}

/// Waits until the socket is readable.
fn wait_for(socket: impl AsFd) {
    let timeout = Timespec::try_from(TIMEOUT).unwrap();
    let mut sockets = [PollFd::new(&socket, PollFlags::IN)];
    assert_eq!(poll(&mut sockets, Some(&timeout)).unwrap(), 1, "timeout");
}

/// The sandbox's end of a control connection.
pub struct Connection {
    pub socket: OwnedFd,
}

impl Connection {
    /// Reads the greeting and answers it.
    pub fn greet(&self, hello: Hello) {
        self.take_greeting();
        self.answer(&Reply::Hello(hello));
    }

    /// Reads the greeting.
    pub fn take_greeting(&self) {
        let request = self.request();
        let Request::Hello(hello) = request else {
            panic!("{request:?}")
        };
        assert_eq!(hello, Hello::own());
    }

    /// Reads the next request; `None` if the client has closed the connection.
    pub fn next(&self) -> Option<Request> {
        let received = receive::<Request>(&self.socket).unwrap()?;
        assert!(received.fds.is_empty());
        Some(received.message)
    }

    /// Reads the next request.
    pub fn request(&self) -> Request {
        self.next().unwrap()
    }

    /// Waits for the next request without reading it.
    pub fn wait_for_request(&self) {
        wait_for(&self.socket);
    }

    pub fn answer(&self, reply: &Reply) {
        send(&self.socket, reply, &[]).unwrap();
    }

    /// Answers with streams; returns the sandbox's ends.
    pub fn hand_over<const N: usize>(&self) -> [UnixStream; N] {
        let pairs = [(); N].map(|()| UnixStream::pair().unwrap());
        let theirs: Vec<_> = pairs.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        send(&self.socket, &Reply::Streams, &theirs).unwrap();
        pairs.map(|(ours, _)| {
            ours.set_read_timeout(Some(TIMEOUT)).unwrap();
            ours
        })
    }

    /// Reports that the process has exited by itself.
    pub fn exit(&self, status: i32) {
        self.answer(&Reply::Exited(Exit::now(status)));
    }
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn kill(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Performs actions that the command then observes all at once.
pub fn while_stopped(child: &Child, act: impl FnOnce()) {
    kill(child, Signal::STOP);
    let (_, status) = waitpid(Some(Pid::from_child(child)), WaitOptions::UNTRACED)
        .unwrap()
        .unwrap();
    assert!(status.stopped(), "{status:?}");
    act();
    kill(child, Signal::CONT);
}

/// Anonymous memory of a process, kilobytes.
pub fn resident(child: &Child) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .unwrap()
        .parse()
        .unwrap()
}

/// Endless input.
pub fn zeros() -> File {
    File::open("/dev/zero").unwrap()
}
