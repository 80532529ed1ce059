//! What travels on a connection to the sandbox process.
//!
//! A connection carries one [`Request`], one [`Reply`], and, for those requests that open streams (attach, exec,
//! copy), frames both ways until either side closes. A frame is one byte of kind, four bytes of length (big
//! endian), and that many bytes. One protocol for calls and streams keeps an exec at a single round trip.
//!
//! Both ends run as the same user, but the payload of stream frames is the container's: it is carried, never read.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::Failure;
use crate::record::Exit;
use crate::timings::Timings;

/// Longest payload of a frame: a reader allocates at most this.
pub const MAX_FRAME: usize = 256 * 1024;

/// Kinds of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Client: a [`Request`], JSON. Always first.
    Request = 1,
    /// Server: a [`Reply`], JSON. Always first.
    Reply = 2,
    /// Client: bytes for standard input, the terminal, or the archive to unpack.
    Input = 3,
    /// Client: no more input.
    InputEnd = 4,
    /// Client: [`Size`] of the terminal, JSON.
    Resize = 5,
    /// Client: a signal number for this process, JSON.
    Signal = 6,
    /// Server: bytes of standard output, the terminal, or the archive.
    Output = 7,
    /// Server: bytes of standard error.
    ErrorOutput = 8,
    /// Server: the process has ended; an [`Exit`], JSON. Always last.
    Exit = 9,
    /// Server: it went wrong after the reply; a [`Failure`], JSON. Always last.
    Failure = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> io::Result<Self> {
        Ok(match byte {
            1 => Self::Request,
            2 => Self::Reply,
            3 => Self::Input,
            4 => Self::InputEnd,
            5 => Self::Resize,
            6 => Self::Signal,
            7 => Self::Output,
            8 => Self::ErrorOutput,
            9 => Self::Exit,
            10 => Self::Failure,
            _ => return Err(invalid(format!("frame of unknown kind {byte}"))),
        })
    }
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What a client can ask.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Nothing but the answer: on the connection that [`crate::client::launch`] makes, when init has started.
    Started,
    /// Streams of init, from now on.
    Attach {
        /// Send input too.
        stdin: bool,
        /// Size of the client's terminal.
        size: Option<Size>,
    },
    /// A further process; its streams follow unless `detach`.
    Exec(ExecRequest),
    /// A signal for init, or for every process.
    Signal {
        /// Number.
        signal: u32,
        /// Every process.
        all: bool,
    },
    /// The stop signal, then SIGKILL after the time-out. Answered when the container has ended.
    Stop {
        /// Signal to send first; the container's own when absent.
        signal: Option<u32>,
        /// Time before SIGKILL, milliseconds.
        timeout_ms: u64,
    },
    /// Answered when the container has ended.
    Wait,
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Figures of the control group.
    Stats,
    /// Processes inside.
    Processes,
    /// Kill it and remove everything of it.
    Remove,
    /// Start the container of this id, whose request lies in its directory, in the machine of this one. What follows on the
    /// connection is said to that container.
    Join {
        /// Its id.
        id: String,
    },
    /// A tar archive of a path follows as output.
    CopyOut {
        /// Absolute path in the container, raw bytes.
        path: Vec<u8>,
        /// Follow a symbolic link at its end.
        follow: bool,
    },
    /// A tar archive follows as input, to be unpacked in a directory.
    CopyIn {
        /// Absolute path in the container, raw bytes.
        path: Vec<u8>,
    },
}

/// A further process in a running container.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Arguments, raw bytes.
    pub command: Vec<Vec<u8>>,
    /// Additional environment, `NAME=VALUE`, raw bytes.
    pub environment: Vec<Vec<u8>>,
    /// Working directory; the container's own when absent.
    pub directory: Option<String>,
    /// `user[:group]`; the container's own when absent.
    pub user: Option<String>,
    /// Send input.
    pub stdin: bool,
    /// With a terminal.
    pub terminal: bool,
    /// Answer when it has started and send no streams.
    pub detach: bool,
    /// Size of the client's terminal.
    pub size: Option<Size>,
}

/// The first answer to every request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, or the streams follow.
    Ok,
    /// Init has started; its streams follow when they were asked for.
    Started(Timings),
    /// How the container ended.
    Ended(Exit),
    /// Figures.
    Stats(Stats),
    /// Processes.
    Processes(Vec<Process>),
    /// It cannot be done.
    Failed(Failure),
}

/// Figures of one container: see `StatsResponse` in agent.proto for the meaning of each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_inactive_file: u64,
    pub memory_peak: u64,
    pub oom_kills: u64,
    pub pids_current: u64,
    pub pids_limit: u64,
    pub io_read_bytes: u64,
    pub io_write_bytes: u64,
    pub network_receive_bytes: u64,
    pub network_transmit_bytes: u64,
    pub guest_memory_total: u64,
    pub guest_memory_available: u64,
    /// Proportional memory of all host processes of the container, by process, bytes.
    pub host_memory: HostMemory,
}

/// Proportional set size (PSS) of the host processes of one container, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// The sandbox process.
    pub sandbox: u64,
    /// The device process.
    pub devices: u64,
    /// The machine: guest memory in use and what the machine itself needs.
    pub machine: u64,
}

impl HostMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.sandbox + self.devices + self.machine
    }
}

/// One process inside: see `ProcessInfo` in agent.proto.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Process {
    pub pid: u32,
    pub container_pid: u32,
    pub parent_pid: u32,
    pub uid: u32,
    pub gid: u32,
    pub state: String,
    pub cpu_time_us: u64,
    pub resident_bytes: u64,
    pub started_at: u64,
    pub terminal: String,
    pub command: String,
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// Head of a frame.
pub fn head(kind: Kind, length: usize) -> [u8; 5] {
    debug_assert!(length <= MAX_FRAME);
    let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind as u8, length[0], length[1], length[2], length[3]]
}

/// What a head announces.
///
/// # Errors
/// Unknown kind, or more than [`MAX_FRAME`] bytes.
pub fn parse_head(head: [u8; 5]) -> io::Result<(Kind, usize)> {
    let kind = Kind::from_byte(head[0])?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_FRAME {
        return Err(invalid(format!("frame of {length} bytes")));
    }
    Ok((kind, length))
}

/// Writes one frame.
///
/// # Errors
/// The connection's.
pub fn write_frame(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    to.write_all(&head(kind, payload.len()))?;
    to.write_all(payload)
}

/// Writes one frame of JSON.
///
/// # Errors
/// The connection's.
pub fn write_json(to: impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

/// Reads one frame into `payload`; `None` at the end of the stream.
///
/// # Errors
/// The connection's; `InvalidData` for what is not a frame; `UnexpectedEof` inside one.
pub fn read_frame(mut from: impl Read, payload: &mut Vec<u8>) -> io::Result<Option<Kind>> {
    let mut head = [0; 5];
    loop {
        match from.read(&mut head[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    from.read_exact(&mut head[1..])?;
    let (kind, length) = parse_head(head)?;
    payload.resize(length, 0);
    from.read_exact(payload)?;
    Ok(Some(kind))
}

/// Decodes the payload of a JSON frame.
///
/// # Errors
/// `InvalidData`.
pub fn from_json<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(|error| invalid(error.to_string()))
}

/// The same, for tokio.
pub(crate) mod asynchronous {
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

    use super::{Kind, Serialize, head, io, parse_head};

    /// See [`super::read_frame`].
    pub async fn read_frame(
        from: &mut (impl AsyncRead + Unpin),
        payload: &mut Vec<u8>,
    ) -> io::Result<Option<Kind>> {
        let mut head = [0; 5];
        if from.read(&mut head[..1]).await? == 0 {
            return Ok(None);
        }
        from.read_exact(&mut head[1..]).await?;
        let (kind, length) = parse_head(head)?;
        payload.resize(length, 0);
        from.read_exact(payload).await?;
        Ok(Some(kind))
    }

    /// See [`super::write_frame`]. Head and payload leave in one write where the kernel takes them.
    pub async fn write_frame(
        to: &mut (impl AsyncWrite + Unpin),
        kind: Kind,
        payload: &[u8],
    ) -> io::Result<()> {
        let head = head(kind, payload.len());
        let parts = [io::IoSlice::new(&head), io::IoSlice::new(payload)];
        let written = to.write_vectored(&parts).await?;
        if written < head.len() {
            to.write_all(&head[written..]).await?;
            to.write_all(payload).await
        } else {
            to.write_all(&payload[written - head.len()..]).await
        }
    }

    /// See [`super::write_json`].
    pub async fn write_json(
        to: &mut (impl AsyncWrite + Unpin),
        kind: Kind,
        value: &impl Serialize,
    ) -> io::Result<()> {
        write_frame(to, kind, &serde_json::to_vec(value)?).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Kind::Output, b"\xff\x00bytes").unwrap();
        let mut payload = Vec::new();
        let kind = read_frame(&wire[..], &mut payload).unwrap();
        assert_eq!(kind, Some(Kind::Output));
        assert_eq!(payload, b"\xff\x00bytes");
    }

    #[test]
    fn the_end_of_the_stream_is_no_error_but_half_a_frame_is() {
        let mut payload = Vec::new();
        assert_eq!(read_frame(&b""[..], &mut payload).unwrap(), None);
        let error = read_frame(&[7, 0, 0][..], &mut payload).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_frame_that_announces_too_much_is_refused_before_memory_is_taken() {
        let mut payload = Vec::new();
        let error = read_frame(&[7, 0xff, 0xff, 0xff, 0xff][..], &mut payload).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(payload.capacity() < MAX_FRAME);
    }

    #[test]
    fn an_unknown_kind_is_refused() {
        let error = read_frame(&[99, 0, 0, 0, 0][..], &mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
