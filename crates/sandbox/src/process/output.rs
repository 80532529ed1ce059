//! Where the output of init goes: to the log, and to every client that is attached.
//!
//! A client that reads slowly slows the container down, as with Docker: nothing is lost and nothing piles up. A
//! client that has gone is forgotten at the next piece of output.

use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{Mutex, mpsc};

use crate::log::{self, Stream};
use crate::wire::Kind;

/// Most bytes read from the guest at once.
const PIECE: usize = 64 * 1024;

/// Pieces on their way to one client.
const AHEAD: usize = 4;

/// What a client's writer sends on: kind and payload of a frame.
pub type Frame = (Kind, Arc<[u8]>);

/// The log and the attached clients of one container.
#[derive(Debug)]
pub struct Output {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    log: log::Writer,
    log_failed: bool,
    clients: Vec<mpsc::Sender<Frame>>,
    /// What everybody was told in the end.
    last: Option<Frame>,
}

impl Output {
    /// Output with a log and no clients yet.
    pub fn new(log: log::Writer) -> Self {
        Self {
            inner: Mutex::new(Inner {
                log,
                log_failed: false,
                clients: Vec::new(),
                last: None,
            }),
        }
    }

    /// Adds a client. It receives all output from now on, then whatever [`Output::finish`] sends, or has sent.
    pub async fn attach(&self) -> mpsc::Receiver<Frame> {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let mut inner = self.inner.lock().await;
        match &inner.last {
            // There is room for it, and nothing else comes.
            Some(last) => drop(sender.try_send(last.clone())),
            None => inner.clients.push(sender),
        }
        receiver
    }

    async fn piece(&self, stream: Stream, bytes: &[u8]) {
        let mut inner = self.inner.lock().await;
        match inner.log.append(stream, bytes) {
            Ok(()) => {}
            // A full disk must not stop the container: said once, then the log has a gap.
            Err(error) if !inner.log_failed => {
                inner.log_failed = true;
                tracing::error!("cannot write the container's log: {error}");
            }
            Err(_) => {}
        }
        if inner.clients.is_empty() {
            return;
        }
        let kind = match stream {
            Stream::Output => Kind::Output,
            Stream::Error => Kind::ErrorOutput,
        };
        let bytes: Arc<[u8]> = bytes.into();
        // The lock is held while a slow client is waited for: that is the back-pressure.
        let mut index = 0;
        while let Some(client) = inner.clients.get(index) {
            if client.send((kind, bytes.clone())).await.is_ok() {
                index += 1;
            } else {
                inner.clients.swap_remove(index);
            }
        }
    }

    /// Carries one stream of the guest until its end.
    pub async fn carry(&self, mut from: OwnedReadHalf, stream: Stream) {
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

    /// Sends a last frame to every client and lets them go.
    pub async fn finish(&self, kind: Kind, payload: Vec<u8>) {
        let payload: Arc<[u8]> = payload.into();
        let clients = {
            let mut inner = self.inner.lock().await;
            inner.last = Some((kind, payload.clone()));
            std::mem::take(&mut inner.clients)
        };
        for client in clients {
            // One that has gone needs no farewell.
            let _ = client.send((kind, payload.clone())).await;
        }
    }
}

/// Reads one stream of a process and hands its pieces to one client. When the client has gone, the rest is read
/// and thrown away, so that the process does not block.
pub async fn carry_to(mut from: OwnedReadHalf, kind: Kind, client: mpsc::Sender<Frame>) {
    let mut buffer = vec![0; PIECE];
    let mut listening = true;
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 {
            return;
        }
        if listening {
            listening = client.send((kind, buffer[..n].into())).await.is_ok();
        }
    }
}

/// A new channel to one client.
pub fn channel() -> (mpsc::Sender<Frame>, mpsc::Receiver<Frame>) {
    mpsc::channel(AHEAD)
}

/// Streams of one process, connected, by name.
#[derive(Debug, Default)]
pub struct Connected {
    /// Standard input.
    pub stdin: Option<UnixStream>,
    /// Standard output.
    pub stdout: Option<UnixStream>,
    /// Standard error.
    pub stderr: Option<UnixStream>,
    /// Terminal.
    pub terminal: Option<UnixStream>,
}
