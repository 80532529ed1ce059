//! The streams of an init that nobody but the sandbox has: output goes to a log, to the host's
//! journal if that is wanted, and to every client that is attached; input comes from clients.
//!
//! A client has one end of a socket for each stream. One that reads slowly slows the container
//! down, as with Docker: nothing is lost and nothing piles up. One that has gone is forgotten at
//! the next piece of output.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;

use crate::error::{Context, Result};
use crate::journal::Journal;
use crate::log::{self, Stream};

/// Most bytes read from the guest at once.
const PIECE: usize = 64 * 1024;

/// Pieces on their way to one stream of one client.
const AHEAD: usize = 4;

type Piece = Arc<[u8]>;

/// The log and the attached clients of one init.
#[derive(Debug)]
pub struct Hub {
    terminal: bool,
    /// Input outlives its client: another can attach. That of a terminal does.
    input_stays: bool,
    /// The init's input; gone when it is closed.
    input: Mutex<Option<OwnedWriteHalf>>,
    output: Mutex<Output>,
}

#[derive(Debug)]
struct Output {
    /// None is kept if absent.
    log: Option<log::Writer>,
    log_failed: bool,
    /// Lines go there as well.
    journal: Option<Journal>,
    clients: Vec<Client>,
    /// What writes to clients.
    writers: Vec<JoinHandle<()>>,
    finished: bool,
}

#[derive(Debug)]
struct Client {
    output: mpsc::Sender<Piece>,
    /// Absent with a terminal.
    error: Option<mpsc::Sender<Piece>>,
}

impl Client {
    fn of(&self, stream: Stream) -> &mpsc::Sender<Piece> {
        match (stream, &self.error) {
            (Stream::Error, Some(error)) => error,
            _ => &self.output,
        }
    }
}

/// Carries the init's output until its end.
#[derive(Debug)]
pub struct Carriers(Vec<JoinHandle<()>>);

impl Carriers {
    /// Waits until all that the init wrote has been passed on.
    pub async fn done(&mut self) {
        while let Some(carrier) = self.0.last_mut() {
            // A carrier has no result.
            let _ = carrier.await;
            self.0.pop();
        }
    }

    /// Stops carrying: the container is gone, or nobody is to get more of its output.
    pub fn abort(&self) {
        for carrier in &self.0 {
            carrier.abort();
        }
    }
}

impl Hub {
    /// A hub that writes a log and to a journal, with no clients yet.
    pub fn new(
        log: Option<log::Writer>,
        journal: Option<Journal>,
        terminal: bool,
        input_stays: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            terminal,
            input_stays: terminal || input_stays,
            input: Mutex::new(None),
            output: Mutex::new(Output {
                log,
                log_failed: false,
                journal,
                clients: Vec::new(),
                writers: Vec::new(),
                finished: false,
            }),
        })
    }

    /// Takes over the init's streams: a terminal, or input (when it has one), output and error.
    ///
    /// # Errors
    /// A stream cannot be registered with the event loop.
    pub async fn carry(self: &Arc<Self>, streams: Vec<OwnedFd>) -> Result<Carriers> {
        let mut streams = streams.into_iter().rev().map(watched);
        let mut carriers = Vec::new();
        let mut spawn = |from: OwnedReadHalf, stream| {
            let hub = self.clone();
            carriers.push(tokio::spawn(
                async move { hub.carry_one(from, stream).await },
            ));
        };
        if self.terminal {
            if let Some(terminal) = streams.next() {
                let (read, write) = terminal?.into_split();
                *self.input.lock().await = Some(write);
                spawn(read, Stream::Output);
            }
            return Ok(Carriers(carriers));
        }
        for stream in [Stream::Error, Stream::Output] {
            if let Some(from) = streams.next() {
                spawn(from?.into_split().0, stream);
            }
        }
        if let Some(input) = streams.next() {
            *self.input.lock().await = Some(input?.into_split().1);
        }
        Ok(Carriers(carriers))
    }

    async fn carry_one(&self, mut from: OwnedReadHalf, stream: Stream) {
        let mut buffer = vec![0; PIECE];
        loop {
            match from.read(&mut buffer).await {
                Ok(0) => return,
                Ok(n) => self.piece(stream, &buffer[..n]).await,
                Err(error) => {
                    tracing::debug!("the guest's {stream:?} ended: {error}");
                    return;
                }
            }
        }
    }

    async fn piece(&self, stream: Stream, bytes: &[u8]) {
        let mut output = self.output.lock().await;
        let kept = output.log.as_mut().map(|log| log.append(stream, bytes));
        match kept.unwrap_or(Ok(())) {
            Ok(()) => {}
            // A full disk must not stop the container: reported once, then the log has a gap.
            Err(error) if !output.log_failed => {
                output.log_failed = true;
                tracing::error!("cannot write the container's log: {error}");
            }
            Err(_) => {}
        }
        if let Some(journal) = &mut output.journal {
            journal.append(stream, bytes).await;
        }
        if output.clients.is_empty() {
            return;
        }
        let bytes: Piece = bytes.into();
        // The lock is held while a slow client is waited for: that is the back-pressure.
        let mut index = 0;
        while let Some(client) = output.clients.get(index) {
            match client.of(stream).send(bytes.clone()).await {
                Ok(()) => index += 1,
                Err(_) => drop(output.clients.swap_remove(index)),
            }
        }
    }

    /// Attaches a client, which gets all output from now on; its ends of the streams: a terminal,
    /// or input, output and error. With `input`, what it writes is the init's input.
    ///
    /// # Errors
    /// No descriptors are left.
    pub async fn attach(self: &Arc<Self>, input: bool) -> Result<Vec<OwnedFd>> {
        let mut ends = Vec::with_capacity(3);
        let mut pair = || -> Result<UnixStream> {
            let (ours, theirs) = StdStream::pair().context(|| "create a stream")?;
            ends.push(theirs.into());
            watched(ours.into())
        };
        let mut output = self.output.lock().await;
        let client = if self.terminal {
            let (read, write) = pair()?.into_split();
            if input {
                tokio::spawn(self.clone().take_input(read));
            }
            Client {
                output: output.writer(write),
                error: None,
            }
        } else {
            let from = pair()?.into_split().0;
            if input {
                tokio::spawn(self.clone().take_input(from));
            }
            Client {
                output: output.writer(pair()?.into_split().1),
                error: Some(output.writer(pair()?.into_split().1)),
            }
        };
        if !output.finished {
            output.clients.push(client);
        }
        Ok(ends)
    }

    /// Carries what a client writes to the init, until either ends.
    async fn take_input(self: Arc<Self>, mut from: OwnedReadHalf) {
        let mut buffer = vec![0; PIECE];
        loop {
            let length = match from.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(length) => length,
            };
            let mut input = self.input.lock().await;
            let Some(open) = input.as_mut() else { return };
            if open.write_all(&buffer[..length]).await.is_err() {
                // The process does not read any more.
                *input = None;
                return;
            }
        }
        if !self.input_stays
            && let Some(mut open) = self.input.lock().await.take()
        {
            // The other end may be closed already.
            let _ = open.shutdown().await;
        }
    }

    /// Ends the streams of all clients when they have read what there is.
    pub async fn finish(&self) {
        let mut output = self.output.lock().await;
        if let Some(mut journal) = output.journal.take() {
            journal.finish().await;
        }
        output.finished = true;
        output.clients.clear();
    }

    /// Waits until every client has read what there was for it, or has gone.
    pub async fn drained(&self) {
        let writers = std::mem::take(&mut self.output.lock().await.writers);
        for writer in writers {
            // A writer has no result.
            let _ = writer.await;
        }
    }
}

impl Output {
    /// A new stream to a client.
    fn writer(&mut self, mut to: OwnedWriteHalf) -> mpsc::Sender<Piece> {
        let (sender, mut pieces) = mpsc::channel::<Piece>(AHEAD);
        self.writers.retain(|writer| !writer.is_finished());
        self.writers.push(tokio::spawn(async move {
            while let Some(piece) = pieces.recv().await {
                if to.write_all(&piece).await.is_err() {
                    return;
                }
            }
        }));
        sender
    }
}

fn watched(stream: OwnedFd) -> Result<UnixStream> {
    let stream = StdStream::from(stream);
    stream
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(stream))
        .context(|| "watch a stream")
}

/// Reads a stream whose client has gone to its end, so that its process does not block.
pub async fn discard(stream: OwnedFd) {
    let read = async {
        let mut stream = watched(stream).map_err(io::Error::other)?;
        let mut buffer = vec![0; PIECE];
        while stream.read(&mut buffer).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    if let Err(error) = read.await {
        tracing::debug!("a stream without a reader ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};

    use super::*;
    use crate::store::Directory;

    struct Init {
        _directory: tempfile::TempDir,
        hub: Arc<Hub>,
        carriers: Carriers,
        /// The guest's ends: input, output, error.
        guest: Vec<StdStream>,
    }

    async fn init() -> Init {
        let directory = tempfile::tempdir().unwrap();
        let log = log::Writer::open(Directory::open(directory.path()).unwrap(), 1 << 20);
        let hub = Hub::new(Some(log.unwrap()), None, false, false);
        let (ours, guest): (Vec<_>, Vec<_>) = (0..3).map(|_| StdStream::pair().unwrap()).unzip();
        let streams = ours.into_iter().map(OwnedFd::from).collect();
        let carriers = hub.carry(streams).await.unwrap();
        Init {
            _directory: directory,
            hub,
            carriers,
            guest,
        }
    }

    fn read(fd: &OwnedFd) -> String {
        let mut stream = StdStream::from(fd.try_clone().unwrap());
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn every_client_gets_each_stream_and_its_end() {
        let mut init = init().await;
        let clients = [
            init.hub.attach(false).await.unwrap(),
            init.hub.attach(false).await.unwrap(),
        ];
        init.guest[1].write_all(b"out").unwrap();
        init.guest[2].write_all(b"err").unwrap();
        drop(init.guest);
        init.carriers.done().await;
        init.hub.finish().await;
        init.hub.drained().await;
        for client in &clients {
            assert_eq!(
                (read(&client[1]), read(&client[2])),
                ("out".into(), "err".into())
            );
        }
        let late = init.hub.attach(false).await.unwrap();
        init.hub.drained().await;
        assert_eq!(read(&late[1]), "");
    }

    #[tokio::test]
    async fn the_input_of_a_pipe_ends_with_its_client() {
        let init = init().await;
        let client = init.hub.attach(true).await.unwrap();
        StdStream::from(client[0].try_clone().unwrap())
            .write_all(b"in")
            .unwrap();
        drop(client);
        let input = OwnedFd::from(init.guest[0].try_clone().unwrap());
        let text = tokio::task::spawn_blocking(move || read(&input)).await;
        assert_eq!(text.unwrap(), "in");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_holds_the_output_back_until_it_goes() {
        let mut init = init().await;
        let client = init.hub.attach(false).await.unwrap();
        let mut output = init.guest.swap_remove(1);
        drop(init.guest);
        let written = tokio::task::spawn_blocking(move || {
            output.write_all(&vec![b'x'; 8 << 20]).unwrap();
        });
        let wait = std::time::Duration::from_millis(200);
        assert!(
            tokio::time::timeout(wait, init.carriers.done())
                .await
                .is_err()
        );
        drop(client);
        init.carriers.done().await;
        written.await.unwrap();
    }
}
