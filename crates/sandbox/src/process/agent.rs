//! The agent, as the sandbox process calls it: ttrpc with time bounds, and errors turned into [`Failure`]s.
//!
//! The guest may be hostile: every call is bounded in time but for `wait`, whose end also the end of the machine
//! brings about, and what comes back is numbers and texts that are passed on, never acted upon.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use hull_protocol::agent as proto;
use hull_protocol::agent_ttrpc::AgentClient;
use tokio::net::UnixStream;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;

use crate::error::{Context, EXIT_HULL, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Failure, Result};
use crate::record::Exit;
use crate::wire::{Process, Size, Stats};

/// Bound of a call that the agent answers at once. An emulated guest on a busy host needs seconds at times.
const QUICK: Duration = Duration::from_secs(30);

/// Bound of a call that may run hooks, which have their own time.
const SLOW: Duration = Duration::from_secs(300);

/// Longest text of the agent that is passed on, bytes.
const MAX_TEXT: usize = 4096;

/// A connected agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

/// Streams of a process, by host port: see `Streams` in agent.proto.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamPorts {
    /// Standard input.
    pub stdin: u32,
    /// Standard output.
    pub stdout: u32,
    /// Standard error.
    pub stderr: u32,
    /// Terminal, instead of the other three.
    pub terminal: u32,
}

impl StreamPorts {
    fn message(self) -> protobuf::MessageField<proto::Streams> {
        protobuf::MessageField::some(proto::Streams {
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            terminal: self.terminal,
            ..Default::default()
        })
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0–255.
    pub status: i32,
    /// Killed by the guest's kernel for lack of memory.
    pub oom_killed: bool,
}

impl From<Ended> for Exit {
    fn from(ended: Ended) -> Self {
        Self {
            reason: ended.oom_killed.then(|| "killed for lack of memory".into()),
            oom_killed: ended.oom_killed,
            ..Self::now(ended.status)
        }
    }
}

fn within(time: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(time)
}

/// The agent's error, in the words of the command.
fn failure(error: ttrpc::Error) -> Failure {
    let status = match error {
        ttrpc::Error::RpcStatus(status) => status,
        ttrpc::Error::Eof | ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed => {
            return Failure::new("the agent in the guest has ended");
        }
        other => return Failure::new(format!("cannot reach the agent in the guest: {other}")),
    };
    let message = printable(status.message());
    let code = match status.code() {
        ttrpc::Code::DEADLINE_EXCEEDED => {
            return Failure::new("the agent in the guest does not answer");
        }
        ttrpc::Code::NOT_FOUND => EXIT_NOT_FOUND,
        ttrpc::Code::PERMISSION_DENIED => EXIT_NOT_EXECUTABLE,
        _ => EXIT_HULL,
    };
    Failure {
        refused: true,
        ..Failure::new(message).code(code)
    }
}

/// A text of the guest's, fit for a person's terminal: bounded, and without control characters.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_TEXT)
        .collect()
}

impl Agent {
    /// Takes over the connection with which the agent dialled home.
    ///
    /// # Errors
    /// The connection cannot be registered with the event loop.
    pub fn new(stream: OwnedFd) -> Result<Self> {
        let stream = StdStream::from(stream);
        let stream = stream
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(stream))
            .context(|| "watch the agent's connection".into())?;
        Ok(Self {
            client: AgentClient::new(Client::new(Socket::new(stream))),
        })
    }

    /// Gives the guest what belongs to its pod.
    ///
    /// # Errors
    /// The agent's.
    pub async fn configure(&self, request: &proto::ConfigureRequest) -> Result<()> {
        self.client
            .configure(within(QUICK), request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Makes the guest's network what the request says.
    ///
    /// # Errors
    /// The agent's.
    pub async fn set_network(&self, request: &proto::SetNetworkRequest) -> Result<()> {
        self.client
            .set_network(within(QUICK), request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Connects a stream, by its host port, with a port of the guest's loopback interface.
    ///
    /// # Errors
    /// Nobody listens there, or the agent's.
    pub async fn forward(&self, stream: u32, port: u16, ipv6: bool) -> Result<()> {
        let request = proto::ForwardRequest {
            stream,
            port: port.into(),
            ipv6,
            ..Default::default()
        };
        let forwarded = self.client.forward(within(QUICK), &request).await;
        forwarded.map(drop).map_err(failure)
    }

    /// Lets the agent stand for Docker's name server: questions come on a stream, by its host port.
    ///
    /// # Errors
    /// The agent's.
    pub async fn resolve(&self, stream: u32) -> Result<()> {
        let request = proto::ResolveRequest {
            stream,
            ..Default::default()
        };
        let begun = self.client.resolve(within(QUICK), &request).await;
        begun.map(drop).map_err(failure)
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    /// The agent's; with exit code 127 or 126 when the command does not exist or cannot be executed.
    pub async fn run(
        &self,
        container: &str,
        spec_json: Vec<u8>,
        raw_args: Vec<Vec<u8>>,
        raw_env: Vec<Vec<u8>>,
        streams: StreamPorts,
    ) -> Result<()> {
        let request = proto::CreateContainerRequest {
            container_id: container.into(),
            spec_json,
            streams: streams.message(),
            start: true,
            raw_args,
            raw_env,
            ..Default::default()
        };
        self.client
            .create_container(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Creates a container whose init waits to be started; the init's process id in the guest.
    ///
    /// # Errors
    /// As [`Agent::run`].
    pub async fn create(
        &self,
        container: &str,
        spec_json: Vec<u8>,
        streams: StreamPorts,
    ) -> Result<u32> {
        let request = proto::CreateContainerRequest {
            container_id: container.into(),
            spec_json,
            streams: streams.message(),
            ..Default::default()
        };
        self.client
            .create_container(within(SLOW), &request)
            .await
            .map(|response| response.pid)
            .map_err(failure)
    }

    /// Lets the init of a created container run.
    ///
    /// # Errors
    /// As [`Agent::run`].
    pub async fn start(&self, container: &str) -> Result<()> {
        let request = proto::StartContainerRequest {
            container_id: container.into(),
            ..Default::default()
        };
        self.client
            .start_container(within(SLOW), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Forgets a container, which is killed if it has not ended.
    ///
    /// # Errors
    /// The agent's.
    pub async fn delete(&self, container: &str) -> Result<()> {
        let request = proto::DeleteContainerRequest {
            container_id: container.into(),
            force: true,
            ..Default::default()
        };
        self.client
            .delete_container(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Changes limits of a container: an OCI `linux.resources` object.
    ///
    /// # Errors
    /// The agent's.
    pub async fn update(&self, container: &str, resources: &serde_json::Value) -> Result<()> {
        let request = proto::UpdateRequest {
            container_id: container.into(),
            resources_json: resources.to_string().into_bytes(),
            ..Default::default()
        };
        self.client
            .update(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Sets kernel parameters of the guest itself.
    ///
    /// # Errors
    /// The agent's.
    pub async fn set_sysctls(&self, sysctl: BTreeMap<String, String>) -> Result<()> {
        let request = proto::ConfigureRequest {
            sysctl: sysctl.into_iter().collect(),
            ..Default::default()
        };
        self.configure(&request).await
    }

    /// Starts a further process.
    ///
    /// # Errors
    /// As [`Agent::run`].
    pub async fn exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        raw_args: Vec<Vec<u8>>,
        raw_env: Vec<Vec<u8>>,
        streams: StreamPorts,
    ) -> Result<()> {
        let request = proto::ExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            process_json,
            streams: streams.message(),
            raw_args,
            raw_env,
            ..Default::default()
        };
        self.client
            .exec(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Waits for the end of a process; the empty exec id is init.
    ///
    /// # Errors
    /// The agent's, or that it has ended.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Ended> {
        let request = proto::ProcessRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let response = self
            .client
            .wait(ttrpc::context::Context::default(), &request)
            .await
            .map_err(failure)?;
        Ok(Ended {
            status: response.exit_status & 0xff,
            oom_killed: response.oom_killed,
        })
    }

    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// The agent's.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = proto::SignalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .signal(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// The agent's.
    pub async fn resize(&self, container: &str, exec: &str, size: Size) -> Result<()> {
        let request = proto::ResizeTerminalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            rows: size.rows.into(),
            columns: size.columns.into(),
            ..Default::default()
        };
        self.client
            .resize_terminal(within(QUICK), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// The agent's.
    pub async fn freeze(&self, container: &str, frozen: bool) -> Result<()> {
        let request = container_request(container);
        let answer = if frozen {
            self.client.pause(within(QUICK), &request).await
        } else {
            self.client.resume(within(QUICK), &request).await
        };
        answer.map(drop).map_err(failure)
    }

    /// Figures of a container's control group.
    ///
    /// # Errors
    /// The agent's.
    pub async fn stats(&self, container: &str) -> Result<Stats> {
        let stats = self
            .client
            .stats(within(QUICK), &container_request(container))
            .await
            .map_err(failure)?;
        Ok(Stats {
            cpu_usage_us: stats.cpu_usage_us,
            cpu_user_us: stats.cpu_user_us,
            cpu_system_us: stats.cpu_system_us,
            cpu_throttled_us: stats.cpu_throttled_us,
            memory_usage: stats.memory_usage,
            memory_limit: stats.memory_limit,
            memory_inactive_file: stats.memory_inactive_file,
            memory_peak: stats.memory_peak,
            oom_kills: stats.oom_kills,
            pids_current: stats.pids_current,
            pids_limit: stats.pids_limit,
            io_read_bytes: stats.io_read_bytes,
            io_write_bytes: stats.io_write_bytes,
            network_receive_bytes: stats.network_receive_bytes,
            network_transmit_bytes: stats.network_transmit_bytes,
            guest_memory_total: stats.guest_memory_total,
            guest_memory_available: stats.guest_memory_available,
            host_memory: Default::default(),
        })
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// The agent's.
    pub async fn processes(&self, container: &str) -> Result<Vec<Process>> {
        let response = self
            .client
            .processes(within(QUICK), &container_request(container))
            .await
            .map_err(failure)?;
        Ok(response
            .processes
            .into_iter()
            .map(|process| Process {
                pid: process.pid,
                container_pid: process.container_pid,
                parent_pid: process.parent_pid,
                uid: process.uid,
                gid: process.gid,
                state: printable(&process.state),
                cpu_time_us: process.cpu_time_us,
                resident_bytes: process.resident_bytes,
                started_at: process.started_at,
                terminal: printable(&process.terminal),
                command: printable(&process.command),
            })
            .collect())
    }

    /// Copies out of (`into` false) or into a container through a stream. Ends when the copy does.
    ///
    /// # Errors
    /// The agent's.
    pub async fn copy(
        &self,
        container: &str,
        path: &str,
        stream: u32,
        follow: bool,
        into: bool,
    ) -> Result<()> {
        let request = proto::CopyRequest {
            container_id: container.into(),
            path: path.into(),
            stream,
            follow,
            ..Default::default()
        };
        // As long as the data takes: the client's going away ends it.
        let context = ttrpc::context::Context::default();
        let answer = if into {
            self.client.copy_in(context, &request).await
        } else {
            self.client.copy_out(context, &request).await
        };
        answer.map(drop).map_err(failure)
    }

    /// Ends the guest: file systems are written back, then the power goes off.
    ///
    /// # Errors
    /// The agent's; a guest that is already gone is one.
    pub async fn shutdown(&self, time: Duration) -> Result<()> {
        self.client
            .shutdown(within(time), &proto::Empty::default())
            .await
            .map(drop)
            .map_err(failure)
    }
}

fn container_request(container: &str) -> proto::ContainerRequest {
    proto::ContainerRequest {
        container_id: container.into(),
        ..Default::default()
    }
}
