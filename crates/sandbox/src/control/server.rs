//! The sandbox's side of the control protocol.
//!
//! A connection that keeps a process carries requests and the end of that process at the same time,
//! so what arrives is answered in a loop that also waits for that end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use hull_ipc::{Limits, Socket};
use hull_protocol::STREAM_PORT;
use rustix::net::{SocketFlags, accept_with};
use serde_json::value::RawValue;
use tokio::io::Interest;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;

use super::protocol::{
    AttachOptions, CopyRequest, CreateRequest, Hello, Listed, OLDEST, Received, Reply, Request,
    parse,
};
use crate::config::{ProcessConfig, Share};
use crate::container::{Container, has_ended};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::process::Process;
use crate::sandbox::{Hold, Ready, Sandbox};
use crate::store::{Directory, Exit};

/// How long a connection may take to take its last answer when the sandbox has ended.
const REPLY_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves a sandbox until it has ended and everybody has the last answer. `first` is the connection
/// of who started it, if that is another process.
///
/// # Errors
/// A socket cannot be registered with the event loop.
pub async fn serve(sandbox: &Sandbox, first: Option<OwnedFd>, listener: OwnedFd) -> Result<()> {
    let connections = Connections::default();
    if let Some(first) = first {
        connections.spawn(sandbox, first)?;
    }
    let accepting = tokio::spawn(accept(listener, sandbox.clone(), connections.clone()));
    sandbox.ended().await;
    accepting.abort();
    connections.finished().await;
    Ok(())
}

/// The connections that are served.
#[derive(Debug, Clone, Default)]
struct Connections(Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>);

impl Connections {
    fn spawn(&self, sandbox: &Sandbox, socket: OwnedFd) -> Result<()> {
        let socket = Socket::new(socket).context(|| "watch a connection")?;
        let connection = Connection {
            sandbox: sandbox.clone(),
            socket,
            hold: Some(sandbox.hold()),
            greeted: false,
            shares: Vec::new(),
            kept: None,
        };
        let mut all = self.lock();
        all.retain(|one| !one.is_finished());
        all.push(tokio::spawn(connection.run()));
        Ok(())
    }

    /// Waits for all, for a bounded time. Clients of hubs may take as long as they want to read.
    async fn finished(&self) {
        let all = std::mem::take(&mut *self.lock());
        let finished = async {
            for one in all {
                // A connection has no result.
                let _ = one.await;
            }
        };
        // Who does not take its answer goes without.
        let _ = tokio::time::timeout(REPLY_FLUSH_TIMEOUT, finished).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        // A list is valid at any time.
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

async fn accept(listener: OwnedFd, sandbox: Sandbox, connections: Connections) {
    let listener = match hull_ipc::watch(listener, Interest::READABLE) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!("{error}"),
    };
    loop {
        let accepted = listener
            .async_io(Interest::READABLE, |listener| {
                Ok(accept_with(listener, SocketFlags::CLOEXEC)?)
            })
            .await;
        let spawned = accepted
            .context(|| "accept a connection")
            .and_then(|socket| connections.spawn(&sandbox, socket));
        if let Err(error) = spawned {
            // Out of descriptors, most likely: others go away, so it passes.
            tracing::warn!("{error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

struct Connection {
    sandbox: Sandbox,
    socket: Socket,
    /// Until nobody is at the other end any more.
    hold: Option<Hold>,
    greeted: bool,
    /// Shares added for a container that is not there yet.
    shares: Vec<Share>,
    kept: Option<Kept>,
}

/// The process that this connection keeps.
struct Kept {
    process: Process,
    loss: Loss,
}

/// What happens to a kept process when its connection is closed before it has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    /// It is killed: the connection is its keeper's.
    Kill,
    /// It goes on, and what it writes is discarded.
    Abandon,
    /// Nothing: the sandbox has its streams.
    Nothing,
}

type Answer = (Reply, Vec<OwnedFd>);

fn ok() -> Result<Answer> {
    Ok((Reply::Ok, Vec::new()))
}

fn reply(reply: Reply) -> Result<Answer> {
    Ok((reply, Vec::new()))
}

impl Connection {
    async fn run(mut self) {
        self.serve().await;
        self.leave().await;
        drop(self.hold);
    }

    async fn serve(&mut self) {
        loop {
            let message = match &self.kept {
                None => self.receive().await,
                Some(kept) => {
                    tokio::select! {
                        biased;
                        exit = kept.process.wait() => {
                            self.exited(exit).await;
                            return;
                        }
                        message = self.receive() => message,
                    }
                }
            };
            let Some(Received { message, fds }) = message else {
                return;
            };
            let request = match parse(&message) {
                Ok(request) => request,
                Err(error) => match self.send(&Reply::Failed(error), &[]).await {
                    true => continue,
                    false => return,
                },
            };
            let answered = match request {
                Request::Forward(_) | Request::Resize(_) => {
                    self.told(request).await;
                    continue;
                }
                Request::Copy(request) => return self.copy(request).await,
                Request::Events => return self.events().await,
                request => self.answer(request, fds).await,
            };
            let (reply, fds) = answered.unwrap_or_else(|error| (Reply::Failed(error), Vec::new()));
            let refused = !self.greeted;
            if !self.send(&reply, &fds).await || refused {
                return;
            }
        }
    }

    /// The kept process has ended: its keeper ends with its connection.
    async fn exited(&mut self, exit: Exit) {
        let Some(kept) = self.kept.take() else { return };
        self.send(&Reply::Exited(exit), &[]).await;
        // The sandbox process goes on until clients have read what it still has for them.
        if kept.loss == Loss::Nothing {
            kept.process.container().drained().await;
        }
    }

    async fn receive(&self) -> Option<Received<Box<RawValue>>> {
        let received = self.socket.receive(Limits::default()).await;
        received.unwrap_or_else(|error| {
            tracing::warn!("a request cannot be read: {error}");
            None
        })
    }

    /// False when the other side has gone.
    async fn send(&self, reply: &Reply, fds: &[OwnedFd]) -> bool {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = self.socket.send(reply, &fds).await;
        if let Err(error) = &sent {
            tracing::debug!("cannot answer: {error}");
        }
        sent.is_ok()
    }

    /// Waits until the other side has gone.
    async fn closed(&self) {
        while self.receive().await.is_some() {}
    }

    /// What is not answered.
    async fn told(&self, request: Request) {
        let Some(Kept { process, .. }) = &self.kept else {
            return tracing::debug!("{request:?} on a connection that keeps no process");
        };
        let done = match request {
            Request::Forward(signal) => process.signal(signal).await,
            Request::Resize(size) => process.resize(size).await,
            _ => Ok(()),
        };
        if let Err(error) = done {
            tracing::debug!("{error}");
        }
    }

    async fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer> {
        if !self.greeted && !matches!(request, Request::Hello(_)) {
            return Err(Error::unsupported(
                "a control connection without a greeting",
            ));
        }
        let sandbox = self.sandbox.clone();
        let find = |container: &str| sandbox.container(container);
        match request {
            Request::Hello(hello) => self.greet(&hello),
            Request::AddShares { shares } => self.add_shares(shares, fds).await,
            Request::Network(config) => {
                let mut connecting = std::pin::pin!(sandbox.connect_network(*config, fds));
                let addresses = tokio::select! {
                    addresses = &mut connecting => addresses?,
                    _ = self.socket.closed() => {
                        // Nobody waits for the network any more: if nobody else wants the sandbox,
                        // it ends, and its plugins with it.
                        self.hold = None;
                        connecting.await?
                    }
                };
                reply(Reply::Network(addresses))
            }
            Request::Create(request) => self.create(*request, fds).await,
            Request::Exec(config) => self.exec(*config).await,
            Request::Attach(request) => {
                let container = find(&request.container)?;
                let streams = self.attach(&container, request.options).await?;
                let process = Process::init(container, Vec::new());
                self.kept = Some(Kept {
                    process,
                    loss: Loss::Nothing,
                });
                Ok((Reply::Streams, streams))
            }
            Request::Start { container } => {
                find(&container)?.start().await?;
                ok()
            }
            Request::Signal {
                container,
                signal,
                all,
            } => {
                find(&container)?.signal(signal, all).await?;
                ok()
            }
            Request::Stop {
                container,
                signal,
                timeout_ms,
            } => {
                let timeout = Duration::from_millis(timeout_ms);
                let exit = find(&container)?.stop(signal, timeout).await?;
                reply(Reply::Ended(exit))
            }
            Request::Wait { container } => {
                let container = find(&container)?;
                tokio::select! {
                    exit = container.ended() => reply(Reply::Ended(exit)),
                    () = self.closed() => reply(Reply::Ending),
                }
            }
            Request::Delete { container } => self.delete(&container).await,
            Request::Freeze { container, frozen } => {
                find(&container)?.set_frozen(frozen).await?;
                ok()
            }
            Request::Update {
                container,
                resources,
            } => {
                find(&container)?.update(&resources).await?;
                ok()
            }
            Request::ChangeNetworks(config) => {
                reply(Reply::Network(sandbox.change_networks(&config).await?))
            }
            Request::UpdateFiles { container, files } => {
                find(&container)?.update_files(files).await?;
                ok()
            }
            Request::Metrics { container } => {
                let mut metrics = find(&container)?.metrics().await?;
                (metrics.host_memory, metrics.host_cpu_ns) = sandbox.cost();
                reply(Reply::Metrics(Box::new(metrics)))
            }
            Request::Processes { container } => {
                reply(Reply::Processes(find(&container)?.process_list().await?))
            }
            Request::Keepers { container } => {
                reply(Reply::Keepers(find(&container)?.keeper_pids()))
            }
            Request::Containers => reply(Reply::Containers(
                sandbox
                    .containers()
                    .iter()
                    .map(|container| Listed {
                        id: container.id().to_owned(),
                        directory: container.directory().path().to_owned(),
                        status: container.status(),
                    })
                    .collect(),
            )),
            Request::Timings => reply(Reply::Timings(sandbox.timings())),
            Request::Cost => {
                let (memory, cpu_ns) = sandbox.cost();
                reply(Reply::Cost(memory, cpu_ns))
            }
            Request::Reach => reply(Reply::Reach(sandbox.reach().await?)),
            Request::Ready => {
                sandbox.ready().await?;
                ok()
            }
            // Handled before.
            Request::Forward(_) | Request::Resize(_) | Request::Copy(_) | Request::Events => ok(),
        }
    }

    fn greet(&mut self, hello: &Hello) -> Result<Answer> {
        let own = Hello::own();
        if hello.version < OLDEST {
            return Err(Error::unsupported(format_args!(
                "{} speaks version {} of the control protocol, {} answers {OLDEST} and later",
                hello.build, hello.version, own.build
            )));
        }
        self.greeted = true;
        reply(Reply::Hello(own))
    }

    async fn delete(&mut self, id: &str) -> Result<Answer> {
        let container = match self.sandbox.container(id) {
            // Who started it was killed before there was a container: only this connection is left.
            Err(_)
                if self.sandbox.ends_with_last_container()
                    && self.sandbox.end_if_unused(1).await =>
            {
                return reply(Reply::Ending);
            }
            found => found?,
        };
        container.delete().await?;
        match self.sandbox.is_ending() {
            true => reply(Reply::Ending),
            false => ok(),
        }
    }

    async fn add_shares(&mut self, shares: Vec<Share>, fds: Vec<OwnedFd>) -> Result<Answer> {
        if let Err(error) = self.sandbox.add_shares(&shares, fds).await {
            return self.ending_or(error);
        }
        self.shares.extend(shares);
        ok()
    }

    /// A sandbox that ends because all its containers have is no error: it can be started anew.
    fn ending_or(&self, error: Error) -> Result<Answer> {
        let used = {
            let containers = self.sandbox.lock();
            containers.used && containers.ending
        };
        match used && error.kind != ErrorKind::Exists {
            true => reply(Reply::Ending),
            false => Err(error),
        }
    }

    async fn create(&mut self, request: CreateRequest, fds: Vec<OwnedFd>) -> Result<Answer> {
        let CreateRequest {
            container: config,
            attach,
        } = request;
        let directory = fds
            .into_iter()
            .next()
            .ok_or_else(|| Error::invalid("the container's directory did not come"))?;
        let path = std::fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&directory)
        ))
        .context(|| "find the container's directory")?;
        let directory = Directory::from_fd(directory, path);
        let names = self.shares.iter().map(|share| share.name.clone()).collect();
        let keeper = config.keeper.is_some();
        let hub = matches!(config.stdio, crate::config::Stdio::Hub { .. });
        let created = self
            .sandbox
            .create_attached(config, directory, names, attach)
            .await;
        let (mut process, attached) = match created {
            Ok(created) => created,
            Err(error) => return self.ending_or(error),
        };
        self.shares.clear();
        let streams = match hub {
            true => attached,
            false => process.take_streams(),
        };
        let loss = match (keeper, hub) {
            (_, true) => Loss::Nothing,
            (true, false) => Loss::Kill,
            (false, false) => Loss::Abandon,
        };
        if attach.is_some() || !hub {
            if loss == Loss::Abandon {
                process.keep_streams();
            }
            self.kept = Some(Kept { process, loss });
        }
        Ok((Reply::Streams, streams))
    }

    async fn attach(
        &self,
        container: &Arc<Container>,
        options: AttachOptions,
    ) -> Result<Vec<OwnedFd>> {
        let streams = container.attach(options.stdin).await?;
        if let Some(size) = options.size
            && let Err(error) = Process::init(container.clone(), Vec::new())
                .resize(size)
                .await
        {
            tracing::debug!("cannot set the size of a terminal: {error}");
        }
        Ok(streams)
    }

    async fn exec(&mut self, config: ProcessConfig) -> Result<Answer> {
        let loss = match config.keeper {
            Some(_) => Loss::Kill,
            None => Loss::Abandon,
        };
        let container = self.sandbox.container(&config.container)?;
        let mut process = container.exec(config).await?;
        if loss == Loss::Abandon {
            process.keep_streams();
        }
        let streams = process.take_streams();
        self.kept = Some(Kept { process, loss });
        Ok((Reply::Streams, streams))
    }

    /// Copies between a stream and a container; the connection is for that alone.
    async fn copy(&mut self, request: CopyRequest) {
        let copying = async {
            if !self.greeted {
                return Err(Error::unsupported(
                    "a control connection without a greeting",
                ));
            }
            let container = self.sandbox.container(&request.container)?;
            let opening = async |guest: Ready| Ok(guest.devices.open(STREAM_PORT).await?);
            let (port, stream) = self.sandbox.in_guest(opening).await?;
            Ok((container, port, stream))
        };
        let (container, port, stream) = match copying.await {
            Ok(copying) => copying,
            Err(error) => {
                self.send(&Reply::Failed(error), &[]).await;
                return;
            }
        };
        if !self.send(&Reply::Streams, &[stream]).await {
            return;
        }
        let (id, path) = (container.id(), &request.path);
        let copy = self.sandbox.in_guest(async |guest| {
            let copying = guest
                .agent
                .copy(id, path, port, request.follow, request.into);
            copying.await
        });
        // When the client goes, the end of its stream ends the copy.
        let outcome = tokio::select! {
            outcome = copy => outcome,
            down = self.sandbox.down() => Err(down.error),
        };
        let reply = match outcome {
            Ok(()) => Reply::Ok,
            Err(error) => Reply::Failed(error),
        };
        self.send(&reply, &[]).await;
    }

    /// Sends events until the client goes or the sandbox has ended.
    async fn events(&mut self) {
        let mut events = self.sandbox.events();
        if !self.greeted || !self.send(&Reply::Ok, &[]).await {
            return;
        }
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = self.closed() => return,
                _ = self.sandbox.gone() => match events.try_recv() {
                    Ok(event) => Ok(event),
                    Err(_) => return,
                },
            };
            match event {
                Ok(event) => {
                    if !self.send(&Reply::Event(event), &[]).await {
                        return;
                    }
                }
                Err(RecvError::Lagged(missed)) => {
                    tracing::warn!("a client has missed {missed} events");
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// What becomes of a process whose connection was closed.
    async fn leave(&mut self) {
        if let Some(Kept { mut process, loss }) = self.kept.take() {
            match loss {
                Loss::Kill => {
                    if self.sandbox.ready_now().is_some()
                        && let Err(error) = process.kill().await
                        && !has_ended(&error)
                    {
                        tracing::debug!("{error}");
                    }
                    process.container().forget_exec(process.name());
                }
                Loss::Abandon => {
                    process.abandon();
                    // Its end is an event all the same.
                    tokio::spawn(async move { process.wait().await });
                }
                Loss::Nothing => {}
            }
        }
        let names: Vec<String> = self.shares.drain(..).map(|share| share.name).collect();
        if !names.is_empty() {
            self.sandbox.remove_shares(&names).await;
        }
    }
}
