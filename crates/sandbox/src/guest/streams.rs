//! Opens the streams of one process in the guest.

use std::os::fd::OwnedFd;

use hull_protocol::STREAM_PORT;

use super::Devices;
use super::agent::StreamPorts;
use crate::config::Stdio;
use crate::error::Result;

/// Opens the streams that a process is to have: a terminal, or input (if it has one), output and
/// error.
///
/// # Errors
/// The guest refuses, or the device process has ended.
pub async fn open(devices: &Devices, stdio: Stdio) -> Result<(StreamPorts, Vec<OwnedFd>)> {
    let mut ports = StreamPorts::default();
    let stdin = match stdio {
        Stdio::Null => return Ok((ports, Vec::new())),
        Stdio::Handover { stdin, .. } | Stdio::Hub { stdin, .. } => stdin,
    };
    let open = || devices.open(STREAM_PORT);
    if stdio.terminal() {
        let (port, stream) = open().await?;
        ports.terminal = port;
        return Ok((ports, vec![stream]));
    }
    let input = async {
        match stdin {
            true => open().await.map(Some),
            false => Ok(None),
        }
    };
    let (input, output, error) = tokio::try_join!(input, open(), open())?;
    let mut streams = Vec::with_capacity(3);
    if let Some((port, stream)) = input {
        ports.stdin = port;
        streams.push(stream);
    }
    (ports.stdout, ports.stderr) = (output.0, error.0);
    streams.extend([output.1, error.1]);
    Ok((ports, streams))
}
