//! The streams of a process: what containerd names is opened, and copied from and to the guest's.
//!
//! containerd makes fifos and opens the other ends. They are held open in both directions, so that
//! a containerd that is restarted finds them as they were, and what is written meanwhile waits.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use hull_sandbox::{Context, Error, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::streaming::{self, Streams};

/// Bytes that are copied at once: a pipe takes 64 KiB, and each stream of each container has such a
/// buffer while it flows.
const PIECE: usize = 16 << 10;

/// How long a program that takes output may take to become ready; as containerd's own shim.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it is waited whether such a program has ended instead.
const ENDED_GRACE: Duration = Duration::from_millis(20);

/// How long what a process wrote may wait for a reader that takes nothing, when it is deleted.
const UNREAD_GRACE: Duration = Duration::from_secs(2);

/// Where the streams of a process lead, as containerd names it.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// Empty: no standard input.
    pub stdin: String,
    /// Empty: what is written is discarded.
    pub stdout: String,
    /// The same.
    pub stderr: String,
    /// One stream for all, with a terminal behind it.
    pub terminal: bool,
}

/// What a stream is copied to.
enum Sink {
    /// A fifo that somebody reads.
    Fifo(pipe::Sender),
    /// A stream of containerd.
    Stream(streaming::Output),
    /// A file of the host.
    File(File),
    /// Nobody.
    Nowhere,
}

/// What standard input is copied from.
enum Source {
    /// A fifo.
    Fifo(PathBuf),
    /// A stream of containerd.
    Stream(streaming::Claim),
}

/// The host's side of the streams, opened.
pub struct Opened {
    /// Opened last: `ctr run` can say that its input has ended only when there is a task, and it
    /// reads its input as soon as this is open.
    stdin: Option<Source>,
    stdout: Sink,
    stderr: Sink,
    terminal: bool,
}

impl Paths {
    /// Opens all. A program that takes the output is started; it is told whose it is.
    ///
    /// # Errors
    /// One cannot be opened; `Unsupported` for a kind that hull does not write to.
    pub async fn open(&self, id: &str, namespace: &str, streams: &Arc<Streams>) -> Result<Opened> {
        let stdin = Some(&self.stdin).filter(|path| !path.is_empty());
        let (stdout, stderr) = match self.stdout.strip_prefix("binary://") {
            Some(program) => logger(program, id, namespace).await?,
            None => (
                sink(&self.stdout, streams)?,
                match self.terminal {
                    true => Sink::Nowhere,
                    false => sink(&self.stderr, streams)?,
                },
            ),
        };
        Ok(Opened {
            stdin: stdin.map(|uri| match streaming::stream_id(uri) {
                Some(id) => Source::Stream(streams.claim(id)),
                None => Source::Fifo(PathBuf::from(uri)),
            }),
            stdout,
            stderr,
            terminal: self.terminal,
        })
    }
}

/// Starts a program that takes the output of a process, as containerd's own shim does: its path and
/// its arguments are a URI, standard output is its descriptor 3, standard error 4, and it closes 5
/// when it is ready.
async fn logger(uri: &str, id: &str, namespace: &str) -> Result<(Sink, Sink)> {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let doing = || format!("start {path} for the output of {id}");
    let (stdout, stdout_writer) = std::io::pipe().context(doing)?;
    let (stderr, stderr_writer) = std::io::pipe().context(doing)?;
    let (ready, ready_writer) = std::io::pipe().context(doing)?;
    let mut command = tokio::process::Command::new(path);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.arg(decoded(name));
        if !value.is_empty() {
            command.arg(decoded(value));
        }
    }
    command
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let descriptors: [OwnedFd; 3] = [stdout.into(), stderr.into(), ready_writer.into()];
    let mappings = descriptors
        .into_iter()
        .zip(3..)
        .map(|(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        });
    command
        .fd_mappings(mappings.collect())
        .context(|| "pass descriptors to a program")?;
    let mut child = command.spawn().context(doing)?;
    // The command has this process's ends of the pipes.
    drop(command);
    let mut ready = pipe::Receiver::from_owned_fd(ready.into()).context(doing)?;
    let waited = tokio::time::timeout(READY_TIMEOUT, ready.read(&mut [0])).await;
    // One that ends at once closes its descriptors first.
    let ended = tokio::time::timeout(ENDED_GRACE, child.wait()).await;
    let ended = ended.ok().transpose().context(doing)?;
    if waited.is_err() || ended.is_some() {
        // It may have ended meanwhile.
        let _ = child.start_kill();
        return Err(Error::new(match ended {
            Some(status) => format!("cannot {}: it has ended with {status}", doing()),
            None => format!("cannot {}: it does not become ready", doing()),
        })
        .hint("it closes descriptor 5 when it is ready"));
    }
    tokio::spawn(async move {
        // It ends when the pipes do.
        if let Ok(status) = child.wait().await
            && !status.success()
        {
            tracing::warn!("the program that took the output of a process ended with {status}");
        }
    });
    let sender = |writer: std::io::PipeWriter| {
        let sender = pipe::Sender::from_owned_fd(writer.into());
        sender.map(Sink::Fifo).context(doing)
    };
    Ok((sender(stdout_writer)?, sender(stderr_writer)?))
}

/// A part of a URI's query without its escapes (RFC 3986, 2.1; a plus is a space).
fn decoded(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match rest {
            [b'%', high, low, ..] => std::str::from_utf8(&[*high, *low])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        (rest, bytes) = match (escaped, first) {
            (Some(byte), _) => (&rest[3..], pushed(bytes, byte)),
            (None, b'+') => (tail, pushed(bytes, b' ')),
            (None, byte) => (tail, pushed(bytes, *byte)),
        };
    }
    OsString::from_vec(bytes)
}

fn pushed(mut bytes: Vec<u8>, byte: u8) -> Vec<u8> {
    bytes.push(byte);
    bytes
}

/// A fifo to read from, with an end to write that keeps it open until the caller closes it.
fn source(path: &Path) -> Result<(pipe::Receiver, pipe::Sender)> {
    let doing = || format!("open standard input {}", path.display());
    let receiver = pipe::OpenOptions::new().open_receiver(path);
    let receiver = receiver.context(doing)?;
    let sender = pipe::OpenOptions::new().open_sender(path).context(doing)?;
    Ok((receiver, sender))
}

fn sink(uri: &str, streams: &Arc<Streams>) -> Result<Sink> {
    if uri.is_empty() {
        return Ok(Sink::Nowhere);
    }
    if let Some(id) = streaming::stream_id(uri) {
        return Ok(Sink::Stream(streaming::Output::new(streams.claim(id))));
    }
    let (scheme, path) = match uri.split_once("://") {
        None => ("fifo", PathBuf::from(uri)),
        Some((scheme, rest)) => (
            scheme,
            PathBuf::from(rest.split('?').next().unwrap_or(rest)),
        ),
    };
    let doing = || format!("open the output {uri}");
    match scheme {
        "fifo" => {
            let found = fs::metadata(&path).context(doing)?;
            match found.file_type().is_fifo() {
                true => {
                    let mut options = pipe::OpenOptions::new();
                    let sender = options.read_write(true).open_sender(&path);
                    Ok(Sink::Fifo(sender.context(doing)?))
                }
                false => Ok(Sink::File(append(&path).context(doing)?)),
            }
        }
        "file" => {
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory).context(doing)?;
            }
            Ok(Sink::File(append(&path).context(doing)?))
        }
        _ => Err(Error::unsupported(format_args!(
            "output to {uri}: fifos, files, programs and containerd's streams are written to"
        ))),
    }
}

fn append(path: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).open(path)
}

/// The streams of a process, being copied.
#[derive(Debug, Default)]
pub struct Io {
    /// Keeps standard input open.
    input: Mutex<Option<pipe::Sender>>,
    outputs: Mutex<Vec<JoinHandle<()>>>,
    progress: Arc<AtomicU64>,
    /// Output goes to containerd's streams.
    by_streams: AtomicBool,
    /// Tells who copies from a stream of containerd to standard input that it is closed.
    closed: Arc<Notify>,
}

impl Opened {
    /// Whether the process has a standard input.
    pub fn has_stdin(&self) -> bool {
        self.stdin.is_some()
    }

    /// Copies to and from the streams of a process: a terminal, or standard input (if it has one),
    /// output and error.
    ///
    /// # Errors
    /// They cannot be registered with the event loop, or standard input cannot be opened.
    pub fn connect(self, streams: Vec<OwnedFd>) -> Result<Io> {
        let io = Io::default();
        let stdin = self.stdin.map(|stdin| match stdin {
            Source::Stream(claim) => io.feed(claim),
            Source::Fifo(path) => source(&path),
        });
        let stdin = stdin.transpose()?;
        let mut streams = streams.into_iter().map(stream);
        let mut next = || {
            streams
                .next()
                .ok_or_else(|| Error::new("a stream of the process did not come"))?
        };
        if self.terminal {
            let (read, write) = next()?.into_split();
            io.output(read, self.stdout);
            if let Some((source, keep)) = stdin {
                io.input(source, keep, write);
            } else {
                // Dropping it would close the direction to the terminal.
                write.forget();
            }
            return Ok(io);
        }
        if let Some((source, keep)) = stdin {
            io.input(source, keep, next()?);
        }
        io.output(next()?, self.stdout);
        io.output(next()?, self.stderr);
        Ok(io)
    }
}

fn stream(fd: OwnedFd) -> Result<UnixStream> {
    let stream = StdStream::from(fd);
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .context(|| "watch a stream of a process")
}

impl Io {
    /// A pipe that a stream of containerd is copied to, with a further end to write.
    fn feed(&self, claim: streaming::Claim) -> Result<(pipe::Receiver, pipe::Sender)> {
        let doing = || "create a pipe for standard input";
        let (receiver, sender) = std::io::pipe().context(doing)?;
        let further = sender.try_clone().context(doing)?;
        let receiver = pipe::Receiver::from_owned_fd(receiver.into()).context(doing)?;
        let sender = pipe::Sender::from_owned_fd(sender.into()).context(doing)?;
        let further = pipe::Sender::from_owned_fd(further.into()).context(doing)?;
        let closed = self.closed.clone();
        tokio::spawn(streaming::feed(claim, further, closed));
        Ok((receiver, sender))
    }

    fn output(&self, from: impl AsyncRead + Unpin + Send + 'static, to: Sink) {
        if matches!(to, Sink::Stream(_)) {
            self.by_streams.store(true, Ordering::Relaxed);
        }
        let progress = self.progress.clone();
        let copying = tokio::spawn(async move {
            if let Err(error) = copy_out(from, to, &progress).await {
                tracing::warn!("cannot copy the output of a process: {error}");
            }
        });
        self.outputs().push(copying);
    }

    fn input(
        &self,
        from: pipe::Receiver,
        keep: pipe::Sender,
        to: impl AsyncWrite + Unpin + Send + 'static,
    ) {
        *self.keeper() = Some(keep);
        // Ends with the fifo, or with the process.
        tokio::spawn(copy_in(from, to));
    }

    /// Standard input ends when its writer closes it.
    pub fn close_input(&self) {
        drop(self.keeper().take());
        self.closed.notify_one();
    }

    /// Before the end of a process is told: who takes its output by containerd's streams gives them
    /// up then. Fifos are read to their end.
    pub async fn ends(&self) {
        if self.by_streams.load(Ordering::Relaxed) {
            self.drained().await;
        }
    }

    /// Waits until all output is copied, or nobody takes it.
    pub async fn drained(&self) {
        let mut outputs = std::mem::take(&mut *self.outputs());
        let mut before = self.progress.load(Ordering::Relaxed);
        while let Some(copying) = outputs.last_mut() {
            match tokio::time::timeout(UNREAD_GRACE, copying).await {
                Ok(_) => {
                    outputs.pop();
                }
                Err(_) => {
                    let now = self.progress.load(Ordering::Relaxed);
                    if now == before {
                        break;
                    }
                    before = now;
                }
            }
        }
        for copying in outputs {
            copying.abort();
        }
        self.close_input();
    }

    fn keeper(&self) -> std::sync::MutexGuard<'_, Option<pipe::Sender>> {
        // A descriptor is valid at any time.
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outputs(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        // A list is valid at any time.
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Io {
    /// Nobody waits for what is not copied yet.
    fn drop(&mut self) {
        for copying in self.outputs().drain(..) {
            copying.abort();
        }
        self.close_input();
    }
}

async fn copy_out(
    mut from: impl AsyncRead + Unpin,
    mut to: Sink,
    progress: &AtomicU64,
) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        let read = match from.read(&mut piece).await {
            // The machine has ended.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            read => read?,
        };
        if read == 0 {
            if let Sink::Stream(stream) = to {
                stream.end().await;
            }
            return Ok(());
        }
        match &mut to {
            Sink::Fifo(fifo) => fifo.write_all(&piece[..read]).await?,
            Sink::Stream(stream) => stream.write_all(&piece[..read]).await,
            Sink::File(file) => {
                if let Err(error) = file.write_all(&piece[..read]) {
                    // The process goes on.
                    tracing::warn!("the output of a process is lost: {error}");
                    to = Sink::Nowhere;
                }
            }
            Sink::Nowhere => {}
        }
        progress.fetch_add(read as u64, Ordering::Relaxed);
    }
}

async fn copy_in(mut from: pipe::Receiver, mut to: impl AsyncWrite + Unpin) {
    let mut piece = vec![0; PIECE];
    // A process that reads no more, or has ended, is none of the writer's errors.
    while let Ok(read) = from.read(&mut piece).await {
        if read == 0 {
            let _ = to.shutdown().await;
            return;
        }
        if to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_reader_that_comes_late_misses_nothing_and_input_ends_when_it_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(directory.path(), "in"),
            stdout: fifo(directory.path(), "out"),
            stderr: format!("file://{}/logs/err", directory.path().display()),
            terminal: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let pairs: Vec<_> = (0..3).map(|_| StdStream::pair().unwrap()).collect();
            let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let io = paths.open("c", "ns", &Arc::default()).await.unwrap();
            assert!(io.has_stdin());
            let io = io
                .connect(theirs.into_iter().map(OwnedFd::from).collect())
                .unwrap();
            let mut ours = ours.into_iter().map(|stream| {
                stream.set_nonblocking(true).unwrap();
                UnixStream::from_std(stream).unwrap()
            });
            let (mut stdin, mut stdout, mut stderr) = (
                ours.next().unwrap(),
                ours.next().unwrap(),
                ours.next().unwrap(),
            );
            stdout.write_all(b"out").await.unwrap();
            stderr.write_all(b"err").await.unwrap();
            let mut writer = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
            writer.write_all(b"in").await.unwrap();
            drop(writer);
            let mut text = [0; 2];
            stdin.read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"in");
            // A second writer is as good as the first until the input is closed.
            let mut writer = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
            writer.write_all(b"!!").await.unwrap();
            stdin.read_exact(&mut text).await.unwrap();
            drop(writer);
            io.close_input();
            assert_eq!(stdin.read(&mut text).await.unwrap(), 0);
            let mut reader = pipe::OpenOptions::new()
                .open_receiver(&paths.stdout)
                .unwrap();
            let mut text = [0; 3];
            reader.read_exact(&mut text).await.unwrap();
            assert_eq!(&text, b"out");
            drop((stdout, stderr));
            io.drained().await;
            let file = directory.path().join("logs/err");
            assert_eq!(fs::read_to_string(file).unwrap(), "err");
        });
    }

    #[test]
    fn a_program_takes_the_output_and_is_told_whose_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let script = directory.path().join("logger");
        let text = format!(
            "#!/bin/sh\nexec 5>&-\n{{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2\"; cat <&3; \
             cat <&4; }} >{}\n",
            log.display()
        );
        fs::write(&script, text).unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let paths = Paths {
            stdout: format!("binary://{}?--name=a%2Fb+c", script.display()),
            ..Paths::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let pairs: Vec<_> = (0..2).map(|_| StdStream::pair().unwrap()).collect();
            let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
            let opened = paths.open("c", "ns", &Arc::default()).await.unwrap();
            let io = opened.connect(theirs.into_iter().map(OwnedFd::from).collect());
            for (mut stream, text) in ours.into_iter().zip(["out\n", "err\n"]) {
                stream.write_all(text.as_bytes()).unwrap();
            }
            io.unwrap().drained().await;
            for _ in 0..500 {
                if fs::read_to_string(&log).is_ok_and(|text| text.contains("err")) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let text = fs::read_to_string(&log).unwrap();
            assert_eq!(text, "ns/c --name a/b c\nout\nerr\n");
            let failing = Paths {
                stdout: "binary:///nonexistent/logger".to_owned(),
                ..Paths::default()
            };
            let error = failing
                .open("c", "ns", &Arc::default())
                .await
                .map(drop)
                .unwrap_err();
            assert!(error.message.contains("/nonexistent/logger"), "{error}");
        });
    }

    #[test]
    fn what_is_not_written_to_is_refused_by_name() {
        let error = sink("gopher://x", &Arc::default()).map(drop).unwrap_err();
        assert!(error.message.contains("gopher://x"), "{error}");
        assert!(sink("/nonexistent/fifo", &Arc::default()).is_err());
    }
}
