//! The init of a container of hull's own, whichever machine it is in: started, its streams carried, its output waited for.
//! Called by `single` and `single::joined`.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::agent::Agent;
use super::container::Container;
use super::devices::Devices;
use super::output::Connected;
use super::streams;
use crate::error::Result;
use crate::log::Stream;
use crate::timings::{Timings, now_ns};

/// Has the agent create and start it. Its streams, open.
///
/// # Errors
/// The agent's, or the device process has ended.
pub async fn start(
    container: &Container,
    agent: &Agent,
    devices: &Devices,
    spec_json: Vec<u8>,
    timings: &mut Timings,
) -> Result<Connected> {
    let request = container.request();
    let begin = now_ns();
    let wanted = streams::Wanted {
        terminal: container.record().terminal,
        stdin: request.stdin,
        output: true,
    };
    let (ports, connected) = streams::connect(devices, wanted).await?;
    timings.step("open streams", begin);

    let begin = now_ns();
    let (arguments, environment) = (request.raw_args.clone(), request.raw_env.clone());
    agent
        .run(container.id(), spec_json, arguments, environment, ports)
        .await?;
    timings.step("create and start the container", begin);
    Ok(connected)
}

/// Carries init's streams.
pub async fn carry(container: &Arc<Container>, connected: Connected) -> Vec<JoinHandle<()>> {
    let mut carriers = Vec::new();
    let mut carry = |read, stream| {
        let container = container.clone();
        carriers.push(tokio::spawn(async move {
            container.output().carry(read, stream).await;
        }));
    };
    let input = container.input();
    if let Some(terminal) = connected.terminal {
        let (read, write) = terminal.into_split();
        *input.lock().await = Some(write);
        carry(read, Stream::Output);
    }
    if let Some(stdin) = connected.stdin {
        *input.lock().await = Some(stdin.into_split().1);
    }
    for (stream, name) in [
        (connected.stdout, Stream::Output),
        (connected.stderr, Stream::Error),
    ] {
        if let Some(stream) = stream {
            carry(stream.into_split().0, name);
        }
    }
    carriers
}

/// Waits until all that it wrote has been passed on, unless the container is removed: output that nobody reads must not keep
/// it for ever then.
pub async fn passed_on(container: &Container, carriers: &mut [JoinHandle<()>]) {
    for carrier in carriers {
        tokio::select! {
            _ = carrier => {}
            _ = container.aborted() => {}
        }
    }
}
