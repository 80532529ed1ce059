//! The agent as the sandbox calls it: ttrpc with timeouts, and its errors as [`Error`]s.
//!
//! The guest may be hostile: every call is bounded in time but for `wait` and copies, which end
//! with the machine at the latest, and what comes back is numbers and texts that are passed on,
//! never acted upon.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hull_protocol::agent as proto;
use ttrpc::context::Context as CallContext;

use super::Incoming;
use super::answers::BoundedClient;
use super::connection::{self, Connection, Failure, Repeat};
use crate::config::{RawArgs, TerminalSize};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::{Metrics, ProcessInfo};
use crate::store::Exit;

/// Bound of a call that the agent answers at once. An emulated guest on a busy host needs seconds
/// at times.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Bound of a call that may run hooks, which have their own time.
const SLOW_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest text of the agent that is passed on, bytes.
const MAX_TEXT: usize = 4096;

/// An agent that has dialled home. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Agent {
    connection: Connection,
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

/// The agent's error. Its kind is that of the status code, which is a number: the text is only
/// shown.
fn failure(failure: Failure) -> Error {
    let status = match failure {
        Failure::Status(status) => status,
        Failure::Lost(error) => return error,
    };
    let kind = match status.code() {
        ttrpc::Code::DEADLINE_EXCEEDED => return connection::unanswered(),
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
fn failure_of_existing(lost: Failure) -> Error {
    let error = failure(lost);
    match error.kind {
        ErrorKind::CommandNotFound => error.kind(ErrorKind::NotFound),
        _ => error,
    }
}

/// Text of the guest for display on a terminal, at most [`MAX_TEXT`] characters.
pub fn printable(text: &str) -> String {
    let shown: String = text.chars().take(MAX_TEXT).collect();
    hull_machine::printable(&shown)
}

/// An address as the agent reads it: 4 or 16 bytes.
pub(crate) fn address_bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A container that the agent is to create: see `CreateContainerRequest` in `agent.proto`.
#[derive(Debug)]
pub struct NewContainer<'a> {
    pub id: &'a str,
    pub spec_json: Vec<u8>,
    pub raw: RawArgs,
    /// Name and content.
    pub files: Vec<(String, String)>,
    pub streams: StreamPorts,
    pub host_sockets: bool,
    pub start: bool,
}

impl Agent {
    /// Waits until the agent dials home.
    ///
    /// # Errors
    /// `GuestFailed` when the device process ends before.
    pub async fn dialled(incoming: Incoming) -> Result<Self> {
        Ok(Self {
            connection: Connection::establish(incoming).await?,
        })
    }

    /// Waits until it cannot come back: the device process has ended.
    pub async fn gone(&self) {
        self.connection.gone().await;
    }

    /// How many connections it has made.
    pub fn connections(&self) -> u64 {
        self.connection.count()
    }

    /// A call that changes something in the guest.
    async fn change<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        timeout: Option<Duration>,
        call: impl Fn(BoundedClient, CallContext) -> F,
    ) -> std::result::Result<T, Failure> {
        self.connection.call(Repeat::ById, timeout, call).await
    }

    /// A call that only looks.
    async fn look<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        timeout: Option<Duration>,
        call: impl Fn(BoundedClient, CallContext) -> F,
    ) -> std::result::Result<T, Failure> {
        self.connection.call(Repeat::Freely, timeout, call).await
    }

    /// Exchanges versions.
    ///
    /// # Errors
    /// `GuestFailed` when the agent cannot be used.
    pub async fn hello(&self) -> Result<()> {
        let request = &connection::greeting();
        let answer = self
            .look(Some(CALL_TIMEOUT), |client, context| async move {
                client.hello(context, request).await
            })
            .await
            .map_err(failure_of_existing)?;
        connection::check(&answer)
    }

    /// Gives the guest what belongs to its pod.
    pub async fn configure(&self, request: &proto::ConfigureRequest) -> Result<()> {
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.configure(context, request).await
        })
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
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.set_network(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure_of_existing)
    }

    /// Connects a stream, by its host port, with a TCP port at one of the guest's own addresses.
    ///
    /// # Errors
    /// Nobody listens there, or the agent's.
    pub async fn forward(&self, stream: u32, to: SocketAddr) -> Result<()> {
        let request = &proto::ForwardRequest {
            stream,
            port: to.port().into(),
            address: address_bytes(&to.ip()),
            ..Default::default()
        };
        let forwarded = self
            .change(Some(CALL_TIMEOUT), |client, context| async move {
                client.forward(context, request).await
            })
            .await;
        forwarded.map(drop).map_err(failure_of_existing)
    }

    /// Lets the agent stand for Docker's name server: questions come on a stream, by its host port.
    pub async fn resolve(&self, stream: u32) -> Result<()> {
        let request = &proto::ResolveRequest {
            stream,
            ..Default::default()
        };
        let begun = self
            .change(Some(CALL_TIMEOUT), |client, context| async move {
                client.resolve(context, request).await
            })
            .await;
        begun.map(drop).map_err(failure_of_existing)
    }

    /// Creates a container whose init waits to be started, or is started at once; the init's
    /// process id in the guest.
    ///
    /// # Errors
    /// `CommandNotFound` and `NotExecutable` for its command; `InvalidArgument` for a spec that the
    /// agent refuses.
    pub async fn create(&self, container: NewContainer<'_>) -> Result<u32> {
        let request = &proto::CreateContainerRequest {
            container_id: container.id.into(),
            spec_json: container.spec_json,
            streams: container.streams.message(),
            start: container.start,
            raw_args: container.raw.args,
            raw_env: container.raw.env,
            files: container.files.into_iter().map(given_file).collect(),
            host_sockets: container.host_sockets,
            ..Default::default()
        };
        self.change(Some(SLOW_TIMEOUT), |client, context| async move {
            client.create_container(context, request).await
        })
        .await
        .map(|response| response.pid)
        .map_err(failure)
    }

    /// Lets the init of a created container run.
    pub async fn start(&self, container: &str) -> Result<()> {
        let request = &proto::StartContainerRequest {
            container_id: container.into(),
            ..Default::default()
        };
        self.change(Some(SLOW_TIMEOUT), |client, context| async move {
            client.start_container(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure)
    }

    /// Forgets a container, which is killed if it has not ended.
    pub async fn delete(&self, container: &str) -> Result<()> {
        let request = &proto::DeleteContainerRequest {
            container_id: container.into(),
            force: true,
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.delete_container(context, request).await
        })
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
        let request = &proto::UpdateRequest {
            container_id: container.into(),
            resources_json: resources.get().as_bytes().to_vec(),
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.update(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure_of_existing)
    }

    /// Gives files that a container was created with other contents.
    ///
    /// # Errors
    /// `NotFound` when it was given none.
    pub async fn update_files(&self, container: &str, files: Vec<(String, String)>) -> Result<()> {
        let request = &proto::UpdateFilesRequest {
            container_id: container.into(),
            files: files.into_iter().map(given_file).collect(),
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.update_files(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure_of_existing)
    }

    /// Sets kernel parameters of the guest itself.
    pub async fn set_sysctls(&self, sysctl: BTreeMap<String, String>) -> Result<()> {
        let request = &proto::ConfigureRequest {
            sysctl: sysctl.into_iter().collect(),
            ..Default::default()
        };
        self.configure(request).await
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
        let request = &proto::ExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            process_json,
            streams: streams.message(),
            raw_args: raw.args,
            raw_env: raw.env,
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.exec(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure)
    }

    /// Waits for the end of a process; the empty exec id is init. Without a timeout.
    ///
    /// # Errors
    /// `NotFound` when there is no such process any more; `GuestFailed` when the agent has ended.
    pub async fn wait(&self, container: &str, exec: &str) -> Result<Exit> {
        let request = &proto::ProcessRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let response = self
            .look(None, |client, context| async move {
                client.wait(context, request).await
            })
            .await
            .map_err(failure_of_existing)?;
        let oom_killed = response.oom_killed;
        Ok(Exit {
            reason: oom_killed.then(|| "killed for lack of memory".into()),
            oom_killed,
            ..Exit::now(response.exit_status & 0xff)
        })
    }

    /// Events after the one of this number, as soon as there are any.
    ///
    /// # Errors
    /// `Unsupported` by an older agent; `GuestFailed` when it has ended.
    pub async fn events(&self, after: u64) -> Result<proto::EventsResponse> {
        let request = &proto::EventsRequest {
            after,
            ..Default::default()
        };
        self.look(None, |client, context| async move {
            client.events(context, request).await
        })
        .await
        .map_err(failure_of_existing)
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        let request = &proto::SignalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.signal(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure_of_existing)
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, container: &str, exec: &str, size: TerminalSize) -> Result<()> {
        let request = &proto::ResizeTerminalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            rows: size.rows.into(),
            columns: size.columns.into(),
            ..Default::default()
        };
        self.change(Some(CALL_TIMEOUT), |client, context| async move {
            client.resize_terminal(context, request).await
        })
        .await
        .map(drop)
        .map_err(failure_of_existing)
    }

    /// Freezes or thaws a container.
    pub async fn freeze(&self, container: &str, frozen: bool) -> Result<()> {
        let request = &container_request(container);
        let answer = if frozen {
            self.change(Some(CALL_TIMEOUT), |client, context| async move {
                client.pause(context, request).await
            })
            .await
        } else {
            self.change(Some(CALL_TIMEOUT), |client, context| async move {
                client.resume(context, request).await
            })
            .await
        };
        answer.map(drop).map_err(failure_of_existing)
    }

    /// Metrics of a container's control group.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn metrics(&self, container: &str) -> Result<Metrics> {
        let request = &container_request(container);
        self.look(Some(CALL_TIMEOUT), |client, context| async move {
            client.stats(context, request).await
        })
        .await
        .map(Metrics::from)
        .map_err(failure_of_existing)
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let request = &container_request(container);
        let response = self
            .look(Some(CALL_TIMEOUT), |client, context| async move {
                client.processes(context, request).await
            })
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
        let request = &proto::CopyRequest {
            container_id: container.into(),
            path: path.into(),
            stream,
            follow,
            ..Default::default()
        };
        // As long as the data takes. The end of the stream ends it.
        let answer = self.change(None, |client, context| async move {
            match into {
                true => client.copy_in(context, request).await,
                false => client.copy_out(context, request).await,
            }
        });
        let answer = answer.await;
        answer.map(drop).map_err(failure_of_existing)
    }

    /// Ends the guest: file systems are written back, then the power goes off.
    ///
    /// # Errors
    /// The agent's; a guest that is already gone is one.
    pub async fn shutdown(&self, time: Duration) -> Result<()> {
        let request = &proto::Empty::default();
        let call =
            |client: BoundedClient, context| async move { client.shutdown(context, request).await };
        self.connection
            .call(Repeat::Never, Some(time), call)
            .await
            .map(drop)
            .map_err(failure_of_existing)
    }
}

fn given_file((name, content): (String, String)) -> proto::GivenFile {
    proto::GivenFile {
        name,
        content: content.into_bytes(),
        ..Default::default()
    }
}

fn container_request(container: &str) -> proto::ContainerRequest {
    proto::ContainerRequest {
        container_id: container.into(),
        ..Default::default()
    }
}
