//! One connection to a pod: its requests, and the process that it keeps.
//!
//! A keeper's connection carries requests and the end of its process at the same time, so what arrives is answered in
//! a loop that also waits for that end. A connection that goes away takes its process along.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::container::Container;
use super::{Pod, shares};
use crate::error::{Context, EXIT_HULL, Failure, Result};
use crate::pod::Status;
use crate::pod::wire::{
    CreateRequest, ExecRequest, Received, Reply, Request, Share, receive, send,
};
use crate::process::boot::BREAK_TIME;
use crate::process::{streams, watch};
use crate::record::Exit;

const SIGKILL: u32 = 9;

/// How long a container that is removed by force may take to pass on what it wrote.
const UNREAD_TIME: Duration = Duration::from_secs(1);

/// Serves a connection until it is closed.
///
/// # Errors
/// It cannot be registered with the event loop.
pub fn spawn(pod: &Arc<Pod>, socket: OwnedFd) -> Result<()> {
    rustix::io::ioctl_fionbio(&socket, true).context(|| "prepare a connection".into())?;
    let socket = watch::watch(socket, Interest::READABLE | Interest::WRITABLE)?;
    pod.connections.fetch_add(1, Ordering::Relaxed);
    pod.changed.notify_waiters();
    let mut connection = Connection {
        pod: pod.clone(),
        socket,
        shares: Vec::new(),
        kept: None,
    };
    tokio::spawn(async move {
        connection.serve().await;
        connection.leave().await;
        let pod = connection.pod.clone();
        drop(connection);
        pod.connections.fetch_sub(1, Ordering::Relaxed);
        pod.changed.notify_waiters();
    });
    Ok(())
}

struct Connection {
    pod: Arc<Pod>,
    socket: AsyncFd<OwnedFd>,
    /// Shares added for a container that is not there yet.
    shares: Vec<Share>,
    kept: Option<Kept>,
}

/// The process that this connection stands for.
struct Kept {
    container: Arc<Container>,
    /// Empty: the container's init.
    exec: String,
}

type Answer = (Reply, Vec<OwnedFd>);

fn ok() -> Answer {
    (Reply::Ok, Vec::new())
}

impl Connection {
    async fn serve(&mut self) {
        loop {
            let message = match &self.kept {
                None => self.receive().await,
                Some(kept) => {
                    tokio::select! {
                        biased;
                        exit = ended(&self.pod, kept) => {
                            // The keeper ends with its connection.
                            self.kept = None;
                            self.send(&Reply::Exited(exit), &[]).await;
                            return;
                        }
                        message = self.receive() => message,
                    }
                }
            };
            let Some(Received { message, fds }) = message else {
                return;
            };
            if let Some(told) = self.told(&message).await {
                if let Err(failure) = told {
                    tracing::debug!("{failure}");
                }
                continue;
            }
            let (reply, fds) = match self.answer(message, fds).await {
                Ok(answer) => answer,
                Err(failure) => (Reply::Failed(failure), Vec::new()),
            };
            if !self.send(&reply, &fds).await {
                return;
            }
        }
    }

    async fn receive(&self) -> Option<Received<Request>> {
        let received = self
            .socket
            .async_io(Interest::READABLE, |socket| receive(socket))
            .await;
        received.unwrap_or_else(|error| {
            tracing::warn!("a request cannot be read: {error}");
            None
        })
    }

    /// False when the other side has gone.
    async fn send(&self, reply: &Reply, fds: &[OwnedFd]) -> bool {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = self
            .socket
            .async_io(Interest::WRITABLE, |socket| send(socket, reply, &fds))
            .await;
        if let Err(error) = &sent {
            tracing::debug!("cannot answer: {error}");
        }
        sent.is_ok()
    }

    /// What a keeper says and does not expect an answer to.
    async fn told(&self, request: &Request) -> Option<Result<()>> {
        let kept = self.kept.as_ref();
        let kept = || kept.ok_or_else(|| Failure::new("this connection keeps no process"));
        let done = async |request: &Request| {
            let kept = kept()?;
            let agent = self.pod.ready().await?.agent;
            let (id, exec) = (&kept.container.id, &kept.exec);
            match request {
                Request::Forward(signal) => agent.signal(id, exec, *signal, false).await,
                Request::Resize(size) => agent.resize(id, exec, *size).await,
                _ => Ok(()),
            }
        };
        match request {
            Request::Forward(_) | Request::Resize(_) => Some(done(request).await),
            _ => None,
        }
    }

    async fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer> {
        let pod = self.pod.clone();
        match request {
            Request::AddShares {
                container: _,
                shares,
            } => self.add_shares(shares, fds).await,
            Request::Network(limits) => {
                let mut fds = fds;
                let namespace = fds
                    .pop()
                    .ok_or_else(|| Failure::new("the network namespace did not come"))?;
                pod.connect_network(namespace, limits).await?;
                Ok(ok())
            }
            Request::Create(request) => self.create(request, fds).await,
            Request::Exec(request) => self.exec(request).await,
            Request::Start { container } => {
                let container = pod.container(&container)?;
                container.require(&[Status::Created], "start")?;
                pod.look_for_resolver().await;
                pod.ready().await?.agent.start(&container.id).await?;
                // It may have ended meanwhile.
                if container.status() == Status::Created {
                    container.set_status(Status::Running, None)?;
                }
                Ok(ok())
            }
            Request::Signal {
                container,
                signal,
                all,
            } => {
                let container = pod.container(&container)?;
                let alive = [Status::Created, Status::Running, Status::Paused];
                container.require(&alive, "signal")?;
                let agent = pod.ready().await?.agent;
                agent.signal(&container.id, "", signal, all).await?;
                Ok(ok())
            }
            Request::Delete { container } => {
                let container = match pod.container(&container) {
                    Err(_) if self.ends_unused() => return Ok((Reply::Ending, Vec::new())),
                    found => found?,
                };
                if container.status() != Status::Stopped {
                    // Nobody wants to know any more what it has said.
                    pod.unread.send_replace(true);
                    let agent = pod.ready().await?.agent;
                    // It may be ending by itself.
                    if let Err(failure) = agent.signal(&container.id, "", SIGKILL, true).await {
                        tracing::debug!("{failure}");
                    }
                    let ended = tokio::time::timeout(UNREAD_TIME, container.ended()).await;
                    // Nobody takes what it wrote: the agent lets go of that with the container.
                    if ended.is_err() {
                        if let Err(failure) = agent.delete(&container.id).await {
                            tracing::debug!("{failure}");
                        }
                        container.ended().await;
                    }
                }
                let mut containers = pod.lock();
                containers.by_id.remove(&container.id);
                let reply = match containers.ending {
                    true => Reply::Ending,
                    false => Reply::Ok,
                };
                Ok((reply, Vec::new()))
            }
            Request::Freeze { container, frozen } => {
                let container = pod.container(&container)?;
                let (from, to, what) = if frozen {
                    (Status::Running, Status::Paused, "pause")
                } else {
                    (Status::Paused, Status::Running, "resume")
                };
                container.require(&[from], what)?;
                let agent = pod.ready().await?.agent;
                agent.freeze(&container.id, frozen).await?;
                container.set_status(to, None)?;
                Ok(ok())
            }
            Request::Update {
                container,
                resources,
            } => {
                let container = pod.container(&container)?;
                let alive = [Status::Created, Status::Running, Status::Paused];
                container.require(&alive, "update")?;
                let agent = pod.ready().await?.agent;
                agent.update(&container.id, &resources).await?;
                Ok(ok())
            }
            Request::Stats { container } => {
                let container = pod.container(&container)?;
                let alive = [Status::Created, Status::Running, Status::Paused];
                container.require(&alive, "measure")?;
                let stats = pod.ready().await?.agent.stats(&container.id).await?;
                Ok((Reply::Stats(Box::new(stats)), Vec::new()))
            }
            Request::Keepers { container } => {
                let pids = pod.container(&container)?.keeper_pids();
                Ok((Reply::Keepers(pids), Vec::new()))
            }
            // Answered by `told`.
            Request::Forward(_) | Request::Resize(_) => Ok(ok()),
        }
    }

    /// Lets a pod end that nobody but this connection has anything to do with: whoever started it was killed before there
    /// was a container.
    fn ends_unused(&self) -> bool {
        let mut containers = self.pod.lock();
        let others = self.pod.connections.load(Ordering::Relaxed) > 1;
        if containers.alive == 0 && (containers.used || !others) {
            containers.ending = true;
        }
        containers.ending
    }

    async fn add_shares(&mut self, shares: Vec<Share>, fds: Vec<OwnedFd>) -> Result<Answer> {
        if shares.len() != fds.len() {
            return Err(Failure::new("as many descriptors as shares must come"));
        }
        for (share, mount) in shares.into_iter().zip(fds) {
            let added = shares::add(&self.pod.devices, &self.pod.files, &share, mount).await;
            if let Err(failure) = added {
                return self.pod.took_no_share(failure).await;
            }
            self.shares.push(share);
        }
        Ok(ok())
    }

    async fn create(&mut self, request: CreateRequest, mut fds: Vec<OwnedFd>) -> Result<Answer> {
        let pod = self.pod.clone();
        let place = match pod.reserve(&request.container) {
            Ok(place) => place,
            Err(reason) => return Ok((reason.into(), Vec::new())),
        };
        let directory = fds
            .pop()
            .ok_or_else(|| Failure::new("the container's directory did not come"))?;
        let ready = pod.ready().await?;
        let names = self.shares.iter().map(|share| share.name.clone()).collect();
        let (container, streams) = pod.create(place, &ready, request, directory, names).await?;
        self.shares.clear();
        self.kept = Some(Kept {
            container,
            exec: String::new(),
        });
        Ok((Reply::Streams, streams))
    }

    async fn exec(&mut self, request: ExecRequest) -> Result<Answer> {
        let container = self.pod.container(&request.container)?;
        container.require(&[Status::Running], "exec in")?;
        let ready = self.pod.ready().await?;
        let (ports, streams) = streams::open(&ready.devices, request.terminal).await?;
        let process =
            serde_json::to_vec(&request.process).context(|| "encode the process".into())?;
        let exec = container.add_exec(request.keeper);
        let started = ready
            .agent
            .exec(&container.id, &exec, process, Vec::new(), Vec::new(), ports)
            .await;
        if let Err(failure) = started {
            container.remove_exec(&exec);
            return Err(failure);
        }
        self.kept = Some(Kept { container, exec });
        Ok((Reply::Streams, streams))
    }

    /// Takes down what has lost its keeper.
    async fn leave(&mut self) {
        let Some(ready) = (match self.pod.ready.borrow().clone() {
            Some(Ok(ready)) => Some(ready),
            _ => None,
        }) else {
            return;
        };
        if let Some(Kept { container, exec }) = self.kept.take() {
            let all = exec.is_empty();
            if let Err(failure) = ready.agent.signal(&container.id, &exec, SIGKILL, all).await {
                tracing::debug!("{failure}");
            }
            container.remove_exec(&exec);
        }
        let names: Vec<String> = self.shares.drain(..).map(|share| share.name).collect();
        shares::remove(&self.pod.devices, &self.pod.files, &names).await;
    }
}

impl Pod {
    /// What is answered when the devices take no share any more.
    async fn took_no_share(&self, failure: Failure) -> Result<Answer> {
        let ends_with_its_last_container = {
            let containers = self.lock();
            containers.used && containers.ending
        };
        if ends_with_its_last_container {
            return Ok((Reply::Ending, Vec::new()));
        }
        // A process that died is the cause.
        Err(
            match tokio::time::timeout(BREAK_TIME, self.broken()).await {
                Ok(reason) => Failure::new(format!("{}: {reason}", failure.message)),
                Err(_) => failure,
            },
        )
    }
}

/// Waits for the end of the process.
async fn ended(pod: &Pod, kept: &Kept) -> Exit {
    if kept.exec.is_empty() {
        return kept.container.ended().await;
    }
    let broken = |reason: String| Exit {
        reason: Some(reason),
        ..Exit::now(EXIT_HULL)
    };
    let agent = match pod.ready().await {
        Ok(ready) => ready.agent,
        Err(failure) => return broken(failure.message),
    };
    let exit = tokio::select! {
        biased;
        ended = agent.wait(&kept.container.id, &kept.exec) => match ended {
            Ok(ended) => Exit { oom_killed: ended.oom_killed, ..Exit::now(ended.status) },
            // The container has ended, and everything in it.
            Err(_) => Exit::now(137),
        },
        reason = pod.broken() => broken(reason),
    };
    kept.container.remove_exec(&kept.exec);
    exit
}
