//! Connects the streams of one process in the guest.

use std::os::fd::OwnedFd;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use hull_protocol::STREAM_PORT;

use super::agent::StreamPorts;
use super::devices::Devices;
use super::output::{Connected, Frame, carry_to};
use super::server::Input;
use crate::error::{Failure, Result};
use crate::wire::Kind;

/// Which streams a process is to have.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// One terminal instead of three pipes.
    pub terminal: bool,
    /// Standard input.
    pub stdin: bool,
    /// Standard output and standard error.
    pub output: bool,
}

/// Opens the streams.
///
/// # Errors
/// The guest refuses, or the device process has ended.
pub async fn connect(devices: &Devices, wanted: Wanted) -> Result<(StreamPorts, Connected)> {
    let mut ports = StreamPorts::default();
    let mut connected = Connected::default();
    let open = async |wanted: bool| {
        if wanted {
            let (port, stream) = devices.connect(STREAM_PORT).await?;
            Ok::<_, Failure>((port, Some(stream)))
        } else {
            Ok((0, None))
        }
    };
    if wanted.terminal {
        (ports.terminal, connected.terminal) = open(true).await?;
    } else {
        let (stdin, stdout, stderr) =
            tokio::try_join!(open(wanted.stdin), open(wanted.output), open(wanted.output))?;
        (ports.stdin, connected.stdin) = stdin;
        (ports.stdout, connected.stdout) = stdout;
        (ports.stderr, connected.stderr) = stderr;
    }
    Ok((ports, connected))
}

/// Opens the streams of a process whose keeper carries them: a terminal, or standard input, output and error.
///
/// # Errors
/// As [`connect`].
pub async fn open(devices: &Devices, terminal: bool) -> Result<(StreamPorts, Vec<OwnedFd>)> {
    let mut ports = StreamPorts::default();
    if terminal {
        let (port, stream) = devices.open(STREAM_PORT).await?;
        ports.terminal = port;
        return Ok((ports, vec![stream]));
    }
    let open = || devices.open(STREAM_PORT);
    let (stdin, stdout, stderr) = tokio::try_join!(open(), open(), open())?;
    (ports.stdin, ports.stdout, ports.stderr) = (stdin.0, stdout.0, stderr.0);
    Ok((ports, vec![stdin.1, stdout.1, stderr.1]))
}

/// Carries the output of a process to one client, and makes its input ready to be written.
pub fn to_client(
    connected: Connected,
    client: &mpsc::Sender<Frame>,
) -> (Input, Vec<JoinHandle<()>>) {
    let mut carriers = Vec::new();
    let input = Input::default();
    let put_input = |half| {
        // Nobody else has this lock yet.
        if let Ok(mut slot) = input.try_lock() {
            *slot = Some(half);
        }
    };
    if let Some(stream) = connected.terminal {
        let (read, write) = stream.into_split();
        put_input(write);
        carriers.push(tokio::spawn(carry_to(read, Kind::Output, client.clone())));
    }
    if let Some(stream) = connected.stdin {
        put_input(stream.into_split().1);
    }
    for (stream, kind) in [
        (connected.stdout, Kind::Output),
        (connected.stderr, Kind::ErrorOutput),
    ] {
        if let Some(stream) = stream {
            let (read, _) = stream.into_split();
            carriers.push(tokio::spawn(carry_to(read, kind, client.clone())));
        }
    }
    (input, carriers)
}
