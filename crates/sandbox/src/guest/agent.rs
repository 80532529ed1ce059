//! The agent as the sandbox calls it: ttrpc with timeouts, and its errors as [`Error`]s.
//!
//! The guest may be hostile: every call is bounded in time but for `wait` and copies, which end with
//! the machine at the latest, and what comes back is numbers and texts that are passed on, never
//! acted upon.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use hull_protocol::agent as proto;
use hull_protocol::agent_ttrpc::AgentClient;
use tokio::net::UnixStream;
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;

use crate::config::{RawArgs, TerminalSize};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::metrics::{Metrics, ProcessInfo};
use crate::store::Exit;

/// Bound of a call that the agent answers at once. An emulated guest on a busy host needs seconds at times.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Bound of a call that may run hooks, which have their own time.
const SLOW_TIMEOUT: Duration = Duration::from_secs(300);

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

fn within(time: Duration) -> ttrpc::context::Context {
    ttrpc::context::with_duration(time)
}

/// The agent's error. Its kind is that of the status code, which is a number: the text is only shown.
fn failure(error: ttrpc::Error) -> Error {
    let status = match error {
        ttrpc::Error::RpcStatus(status) => status,
        ttrpc::Error::Eof | ttrpc::Error::RemoteClosed | ttrpc::Error::LocalClosed => {
            return Error::guest("the agent in the guest has ended");
        }
        other => return Error::guest(format!("cannot reach the agent in the guest: {other}")),
    };
    let kind = match status.code() {
        ttrpc::Code::DEADLINE_EXCEEDED => {
            return Error::guest("the agent in the guest does not answer");
        }
        ttrpc::Code::NOT_FOUND => ErrorKind::CommandNotFound,
        ttrpc::Code::PERMISSION_DENIED => ErrorKind::NotExecutable,
        ttrpc::Code::ALREADY_EXISTS => ErrorKind::Exists,
        ttrpc::Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
        ttrpc::Code::FAILED_PRECONDITION => ErrorKind::WrongState,
        ttrpc::Code::UNIMPLEMENTED => ErrorKind::Unsupported,
        _ => ErrorKind::Host,
    };
    Error::with_kind(kind, printable(status.message()))
}

/// The same for a call about a container or process that exists for the host: `NOT_FOUND` then says
/// that it has ended.
fn failure_of_existing(error: ttrpc::Error) -> Error {
    let error = failure(error);
    match error.kind {
        ErrorKind::CommandNotFound => error.kind(ErrorKind::NotFound),
        _ => error,
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
            .context(|| "watch the agent's connection")?;
        Ok(Self {
            client: AgentClient::new(Client::new(Socket::new(stream))),
        })
    }

    /// Gives the guest what belongs to its pod.
    pub async fn configure(&self, request: &proto::ConfigureRequest) -> Result<()> {
        self.client
            .configure(within(CALL_TIMEOUT), request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }

    /// Sets the guest's wall clock, nanoseconds since 1970.
    ///
    /// # Errors
    /// The agent's.
    pub async fn set_clock(&self, clock_ns: u64) -> Result<()> {
        self.configure(&proto::ConfigureRequest {
            clock_ns,
            ..Default::default()
        })
        .await
    }

    /// Makes the guest's network what the request says.
    pub async fn set_network(&self, request: &proto::SetNetworkRequest) -> Result<()> {
        self.client
            .set_network(within(CALL_TIMEOUT), request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
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
        let forwarded = self.client.forward(within(CALL_TIMEOUT), &request).await;
        forwarded.map(drop).map_err(failure_of_existing)
    }

    /// Lets the agent stand for Docker's name server: questions come on a stream, by its host port.
    pub async fn resolve(&self, stream: u32) -> Result<()> {
        let request = proto::ResolveRequest {
            stream,
            ..Default::default()
        };
        let begun = self.client.resolve(within(CALL_TIMEOUT), &request).await;
        begun.map(drop).map_err(failure_of_existing)
    }

    /// Creates a container whose init waits to be started, or is started at once; the init's process
    /// id in the guest.
    ///
    /// # Errors
    /// `CommandNotFound` and `NotExecutable` for its command; `InvalidArgument` for a spec that the
    /// agent refuses.
    pub async fn create(
        &self,
        container: &str,
        spec_json: Vec<u8>,
        raw: RawArgs,
        streams: StreamPorts,
        start: bool,
    ) -> Result<u32> {
        let request = proto::CreateContainerRequest {
            container_id: container.into(),
            spec_json,
            streams: streams.message(),
            start,
            raw_args: raw.args,
            raw_env: raw.env,
            ..Default::default()
        };
        self.client
            .create_container(within(SLOW_TIMEOUT), &request)
            .await
            .map(|response| response.pid)
            .map_err(failure)
    }

    /// Lets the init of a created container run.
    pub async fn start(&self, container: &str) -> Result<()> {
        let request = proto::StartContainerRequest {
            container_id: container.into(),
            ..Default::default()
        };
        self.client
            .start_container(within(SLOW_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Forgets a container, which is killed if it has not ended.
    pub async fn delete(&self, container: &str) -> Result<()> {
        let request = proto::DeleteContainerRequest {
            container_id: container.into(),
            force: true,
            ..Default::default()
        };
        self.client
            .delete_container(within(CALL_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }

    /// Changes limits of a container: an OCI `linux.resources` object.
    pub async fn update(
        &self,
        container: &str,
        resources: &serde_json::value::RawValue,
    ) -> Result<()> {
        let request = proto::UpdateRequest {
            container_id: container.into(),
            resources_json: resources.get().as_bytes().to_vec(),
            ..Default::default()
        };
        self.client
            .update(within(CALL_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }

    /// Sets kernel parameters of the guest itself.
    pub async fn set_sysctls(&self, sysctl: BTreeMap<String, String>) -> Result<()> {
        let request = proto::ConfigureRequest {
            sysctl: sysctl.into_iter().collect(),
            ..Default::default()
        };
        self.configure(&request).await
    }

    /// Starts a further process.
    pub async fn exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        raw: RawArgs,
        streams: StreamPorts,
    ) -> Result<()> {
        let request = proto::ExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            process_json,
            streams: streams.message(),
            raw_args: raw.args,
            raw_env: raw.env,
            ..Default::default()
        };
        self.client
            .exec(within(CALL_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure)
    }

    /// Waits for the end of a process; the empty exec id is init. Without a timeout.
    ///
    /// # Errors
    /// `NotFound` when there is no such process any more; `GuestFailed` when the agent has ended.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let request = proto::ProcessRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let response = self
            .client
            .wait(ttrpc::context::Context::default(), &request)
            .await
            .map_err(failure_of_existing)?;
        let oom_killed = response.oom_killed;
        Ok(Exit {
            reason: oom_killed.then(|| "killed for lack of memory".into()),
            oom_killed,
            ..Exit::now(response.exit_status & 0xff)
        })
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = proto::SignalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .signal(within(CALL_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, container: &str, exec: &str, size: TerminalSize) -> Result<()> {
        let request = proto::ResizeTerminalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            rows: size.rows.into(),
            columns: size.columns.into(),
            ..Default::default()
        };
        self.client
            .resize_terminal(within(CALL_TIMEOUT), &request)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }

    /// Freezes or thaws a container.
    pub async fn freeze(&self, container: &str, frozen: bool) -> Result<()> {
        let request = container_request(container);
        let answer = if frozen {
            self.client.pause(within(CALL_TIMEOUT), &request).await
        } else {
            self.client.resume(within(CALL_TIMEOUT), &request).await
        };
        answer.map(drop).map_err(failure_of_existing)
    }

    /// Metrics of a container's control group.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn metrics(&self, container: &str) -> Result<Metrics> {
        self.client
            .stats(within(CALL_TIMEOUT), &container_request(container))
            .await
            .map(Metrics::from)
            .map_err(failure_of_existing)
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let response = self
            .client
            .processes(within(CALL_TIMEOUT), &container_request(container))
            .await
            .map_err(failure_of_existing)?;
        Ok(response
            .processes
            .into_iter()
            .map(ProcessInfo::from)
            .collect())
    }

    /// Copies out of (`into` false) or into a container through a stream. Ends when the copy does.
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
        answer.map(drop).map_err(failure_of_existing)
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
            .map_err(failure_of_existing)
    }
}

fn container_request(container: &str) -> proto::ContainerRequest {
    proto::ContainerRequest {
        container_id: container.into(),
        ..Default::default()
    }
}
