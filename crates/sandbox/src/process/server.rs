//! Answers the clients of one sandbox process: see `wire`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, mpsc};

use hull_protocol::STREAM_PORT;

use super::container::Container;
use super::output::{self, Frame};
use super::single::joined;
use super::{host_memory, streams};
use crate::error::{Failure, Result};
use crate::record::{Exit, State};
use crate::wire::asynchronous::{read_frame, write_frame, write_json};
use crate::wire::{ExecRequest, Kind, Reply, Request, Size, from_json};

/// Where the input of clients goes: one stream, written by one client at a time; gone when it is closed.
pub type Input = Arc<Mutex<Option<OwnedWriteHalf>>>;

/// Takes connections until the sandbox process ends. Boxed, because a connection may bring a container that has connections.
pub fn serve(
    listener: UnixListener,
    container: Arc<Container>,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(connection(stream, container.clone()));
                }
                Err(error) => {
                    // Out of descriptors, most likely: others go away, so it passes.
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

/// Serves one connection.
pub async fn connection(stream: UnixStream, container: Arc<Container>) {
    let (mut from, mut to) = stream.into_split();
    let mut payload = Vec::new();
    let request = match read_frame(&mut from, &mut payload).await {
        Ok(Some(Kind::Request)) => from_json::<Request>(&payload),
        Ok(None) => return,
        Ok(Some(kind)) => {
            tracing::debug!("a client began with {kind:?}");
            return;
        }
        Err(error) => Err(error),
    };
    let result = match request {
        Ok(Request::Join { id }) => join(&id, from, &mut to, &container).await,
        Ok(request) => dispatch(request, from, &mut to, &container).await,
        Err(error) => Err(Failure::new(format!("cannot read the request: {error}"))),
    };
    if let Err(failure) = result {
        // The client may have gone; there is nobody else to tell.
        let _ = write_json(&mut to, Kind::Reply, &Reply::Failed(failure)).await;
    }
}

/// Starts a container in the machine of this one. What follows on the connection is for that.
async fn join(
    id: &str,
    mut from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    // Before it starts, so that whoever wants its output misses nothing.
    let mut payload = Vec::new();
    let first = match read_frame(&mut from, &mut payload).await {
        Ok(Some(Kind::Request)) => from_json::<Request>(&payload)
            .map_err(|error| Failure::new(format!("cannot read the request: {error}"))),
        _ => Err(Failure::new(
            "whoever wants a container does not say what for",
        )),
    };
    let joined = joined::join(container, id).await?;
    dispatch(first?, from, to, &joined).await
}

/// Carries out one request. An error is the reply; after a reply it must not return one.
async fn dispatch(
    request: Request,
    from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    let id = container.id();
    let reply = match request {
        Request::Started => Reply::Started(container.started().await?),
        Request::Attach { stdin, size } => return attach(stdin, size, from, to, container).await,
        Request::Exec(request) => return exec(request, from, to, container).await,
        Request::Signal { signal, all } => {
            container.agent()?.signal(id, "", signal, all).await?;
            Reply::Ok
        }
        Request::Stop { signal, timeout_ms } => {
            Reply::Ended(stop(container, signal, Duration::from_millis(timeout_ms)).await?)
        }
        Request::Wait => Reply::Ended(container.ended().await),
        Request::Pause => {
            set_frozen(container, true).await?;
            Reply::Ok
        }
        Request::Resume => {
            set_frozen(container, false).await?;
            Reply::Ok
        }
        Request::Stats => {
            let mut stats = container.agent()?.stats(id).await?;
            stats.host_memory = host_memory::measure(&container.record().processes);
            Reply::Stats(stats)
        }
        Request::Processes => Reply::Processes(container.agent()?.processes(id).await?),
        Request::Remove => {
            container.abort("it was removed");
            container.ended().await;
            Reply::Ok
        }
        Request::CopyOut { path, follow } => {
            return copy_out(&path, follow, to, container).await;
        }
        Request::CopyIn { path } => return copy_in(&path, from, to, container).await,
        Request::Join { .. } => return Err(Failure::new("a container joins another one once")),
    };
    // The client may have gone; the work is done all the same.
    let _ = write_json(to, Kind::Reply, &reply).await;
    Ok(())
}

async fn set_frozen(container: &Container, frozen: bool) -> Result<()> {
    let state = container.record().state;
    let (from, to) = if frozen {
        (State::Running, State::Paused)
    } else {
        (State::Paused, State::Running)
    };
    if state != from {
        return Err(Failure::new(format!(
            "container {} is {state}, not {from}",
            container.record().name
        ))
        .code(1));
    }
    container.agent()?.freeze(container.id(), frozen).await?;
    container.set_state(to)
}

/// Stop signal, time to end, then force.
async fn stop(container: &Container, signal: Option<u32>, time: Duration) -> Result<Exit> {
    let id = container.id();
    if container.record().state == State::Paused {
        set_frozen(container, false).await?;
    }
    let signal = match signal {
        Some(signal) => signal,
        None => container.stop_signal(),
    };
    // A container that ends just now cannot be signalled, and need not be.
    if let Err(error) = container.agent()?.signal(id, "", signal, false).await {
        tracing::debug!("stop signal: {error}");
    }
    if let Ok(exit) = tokio::time::timeout(time, container.ended()).await {
        return Ok(exit);
    }
    const SIGKILL: u32 = 9;
    let killed = container.agent()?.signal(id, "", SIGKILL, true).await;
    // A guest that does not react even to that loses its machine.
    let grace = Duration::from_secs(2);
    if killed.is_ok()
        && let Ok(exit) = tokio::time::timeout(grace, container.ended()).await
    {
        return Ok(exit);
    }
    container.abort("it did not react to SIGKILL, so its machine was ended");
    Ok(container.ended().await)
}

async fn attach(
    stdin: bool,
    size: Option<Size>,
    from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    // Before the reply, so that not a byte is missed.
    let frames = container.output().attach().await;
    let timings = container.started().await?;
    if write_json(to, Kind::Reply, &Reply::Started(timings))
        .await
        .is_err()
    {
        return Ok(());
    }
    let input = if stdin {
        container.input()
    } else {
        Input::default()
    };
    if let Some(size) = size {
        resize(container, "", size).await;
    }
    let reader = tokio::spawn(client_input(from, input, container.clone(), String::new()));
    client_output(frames, to).await;
    reader.abort();
    Ok(())
}

async fn resize(container: &Container, exec: &str, size: Size) {
    let result = match container.agent() {
        Ok(agent) => agent.resize(container.id(), exec, size).await,
        Err(failure) => Err(failure),
    };
    if let Err(error) = result {
        tracing::debug!("cannot resize the terminal: {error}");
    }
}

/// Carries frames to a client until the last one or until the client has gone.
async fn client_output(mut frames: mpsc::Receiver<Frame>, to: &mut OwnedWriteHalf) {
    while let Some((kind, payload)) = frames.recv().await {
        if write_frame(to, kind, &payload).await.is_err() {
            return;
        }
    }
}

/// Carries what a client sends to a process: input, size of the terminal, signals. When the client goes, the
/// input ends.
async fn client_input(
    mut from: OwnedReadHalf,
    input: Input,
    container: Arc<Container>,
    exec: String,
) {
    // A terminal of init outlives its client: another can attach. A pipe does not.
    let outlives = exec.is_empty() && container.record().terminal;
    let mut payload = Vec::new();
    while let Ok(Some(kind)) = read_frame(&mut from, &mut payload).await {
        match kind {
            Kind::Input => {
                let mut stream = input.lock().await;
                if let Some(open) = stream.as_mut()
                    && open.write_all(&payload).await.is_err()
                {
                    // The process does not read any more.
                    *stream = None;
                }
            }
            Kind::InputEnd if outlives => {}
            Kind::InputEnd => close(&input).await,
            Kind::Resize => {
                if let Ok(size) = from_json(&payload) {
                    resize(&container, &exec, size).await;
                }
            }
            Kind::Signal => {
                if let (Ok(signal), Ok(agent)) = (from_json(&payload), container.agent())
                    && let Err(error) = agent.signal(container.id(), &exec, signal, false).await
                {
                    tracing::debug!("cannot send signal {signal}: {error}");
                }
            }
            other => {
                tracing::debug!("a client sent {other:?}");
                break;
            }
        }
    }
    if !outlives {
        close(&input).await;
    }
}

/// Ends a process's input.
async fn close(input: &Input) {
    if let Some(mut open) = input.lock().await.take() {
        // The other end may be closed already.
        let _ = open.shutdown().await;
    }
}

async fn exec(
    request: ExecRequest,
    from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    let record = container.record();
    if record.state != State::Running {
        return Err(Failure::new(format!(
            "container {} is not running: it is {}",
            record.name, record.state
        ))
        .code(1));
    }
    let agent = container.agent()?;
    let exec = container.next_exec();
    let process = container.exec_process(&request)?;
    let wanted = streams::Wanted {
        terminal: request.terminal,
        stdin: request.stdin && !request.detach,
        output: !request.detach || request.terminal,
    };
    let (ports, connected) = streams::connect(container.devices()?, wanted).await?;
    agent
        .exec(
            container.id(),
            &exec,
            process.json,
            process.raw_args,
            process.raw_env,
            ports,
        )
        .await?;
    let (sender, frames) = output::channel();
    let (input, carriers) = streams::to_client(connected, &sender);
    if let Some(size) = request.size {
        resize(container, &exec, size).await;
    }
    let waiter = {
        let (agent, id, exec) = (agent.clone(), container.id().to_owned(), exec.clone());
        async move {
            let ended = agent.wait(&id, &exec).await;
            for carrier in carriers {
                // A carrier has no result.
                let _ = carrier.await;
            }
            let (kind, last) = match ended {
                Ok(ended) => (
                    Kind::Exit,
                    serde_json::to_vec(&Exit {
                        oom_killed: ended.oom_killed,
                        ..Exit::now(ended.status)
                    }),
                ),
                Err(failure) => (Kind::Failure, serde_json::to_vec(&failure)),
            };
            if let Ok(last) = last {
                // The client may have gone.
                let _ = sender.send((kind, last.into())).await;
            }
        }
    };
    let replied = write_json(to, Kind::Reply, &Reply::Ok).await;
    // The process goes on when its client has gone: its output must still be read.
    tokio::spawn(waiter);
    if request.detach || replied.is_err() {
        return Ok(());
    }
    let reader = tokio::spawn(client_input(from, input, container.clone(), exec));
    client_output(frames, to).await;
    reader.abort();
    Ok(())
}

fn utf8(path: &[u8]) -> Result<&str> {
    std::str::from_utf8(path).map_err(|_| {
        Failure::new(format!(
            "not supported: the path {:?} is not UTF-8",
            String::from_utf8_lossy(path)
        ))
    })
}

async fn copy_out(
    path: &[u8],
    follow: bool,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    let agent = container.agent()?;
    let path = utf8(path)?.to_owned();
    let (port, stream) = container.devices()?.connect(STREAM_PORT).await?;
    let id = container.id().to_owned();
    let copy = tokio::spawn(async move { agent.copy(&id, &path, port, follow, false).await });
    if write_json(to, Kind::Reply, &Reply::Ok).await.is_err() {
        return Ok(());
    }
    let (sender, frames) = output::channel();
    let (read, _write) = stream.into_split();
    let carrier = tokio::spawn(async move {
        output::carry_to(read, Kind::Output, sender.clone()).await;
        finish_copy(copy, &sender).await;
    });
    client_output(frames, to).await;
    // The client may have gone before the end: the stream's end then ends the copy.
    carrier.abort();
    Ok(())
}

async fn copy_in(
    path: &[u8],
    from: OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    container: &Arc<Container>,
) -> Result<()> {
    let agent = container.agent()?;
    let path = utf8(path)?.to_owned();
    let (port, stream) = container.devices()?.connect(STREAM_PORT).await?;
    let id = container.id().to_owned();
    let copy = tokio::spawn(async move { agent.copy(&id, &path, port, false, true).await });
    if write_json(to, Kind::Reply, &Reply::Ok).await.is_err() {
        return Ok(());
    }
    let (_read, write) = stream.into_split();
    let input: Input = Arc::new(Mutex::new(Some(write)));
    let reader = tokio::spawn(archive_input(from, input));
    let (sender, frames) = output::channel();
    let waiter = tokio::spawn(async move { finish_copy(copy, &sender).await });
    client_output(frames, to).await;
    reader.abort();
    waiter.abort();
    Ok(())
}

/// Carries an archive from a client to the guest.
async fn archive_input(mut from: OwnedReadHalf, input: Input) {
    let mut payload = Vec::new();
    let mut stream = input.lock().await;
    while let Ok(Some(Kind::Input)) = read_frame(&mut from, &mut payload).await {
        if let Some(open) = stream.as_mut()
            && open.write_all(&payload).await.is_err()
        {
            break;
        }
    }
    drop(stream);
    close(&input).await;
}

/// Sends a client the result of a copy.
async fn finish_copy(copy: tokio::task::JoinHandle<Result<()>>, client: &mpsc::Sender<Frame>) {
    let result = copy
        .await
        .unwrap_or_else(|error| Err(Failure::new(format!("the copy broke down: {error}"))));
    let (kind, last) = match result {
        Ok(()) => (Kind::Exit, serde_json::to_vec(&Exit::now(0))),
        Err(failure) => (Kind::Failure, serde_json::to_vec(&failure)),
    };
    if let Ok(last) = last {
        // The client may have gone.
        let _ = client.send((kind, last.into())).await;
    }
}
