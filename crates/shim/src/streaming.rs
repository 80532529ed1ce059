//! Streams of processes over containerd's streaming service (containerd 2, `io_type =
//! "streaming"`): instead of a fifo containerd names a stream at the shim's own socket, which it
//! has opened before.
//!
//! A stream has one direction. Data flows as far as its receiver has granted (`Data` and
//! `WindowUpdate` of `containerd.types.transfer`).
//!
//! A client whose connection is lost may come back with another stream of the same id, and gets
//! what could not be sent. One that has closed its stream wants no more: output is discarded then,
//! as nobody would ever read it.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, oneshot};
use ttrpc::asynchronous::{ServerStream, Service, StreamHandler, StreamInner, TtrpcContext};

use crate::process::lock;
use crate::wire::{self, Value};

/// The service's name, and its only method.
pub const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";

/// Bytes that are granted to a client at once, and most of one message: as containerd's own.
const WINDOW: usize = 64 << 10;
const PIECE: usize = 32 << 10;

/// Most streams that wait for their process: those of one pod's containers and processes.
const MAX_WAITING: usize = 256;

/// How long a client may take to say which stream it opens.
const INIT_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may take to close a stream whose end it has been sent.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// How long input that is closed may be silent. Its end comes on another connection than the call
/// that closes it.
const LAST_INPUT: Duration = Duration::from_secs(5);

/// A stream with containerd at its other end; it is closed when this is dropped.
#[derive(Debug)]
struct Client {
    /// Of all streams of the shim: an id can come again.
    number: u64,
    stream: ServerStream<Any, Any>,
    /// Bytes that may be sent.
    window: usize,
    close: oneshot::Sender<()>,
}

/// Why nothing more can be sent.
#[derive(Debug)]
enum Gone {
    /// The other side has closed the stream.
    Closed,
    /// Its connection is lost.
    Lost(io::Error),
}

/// The streams that wait for their process, by id.
#[derive(Debug, Default)]
pub struct Streams {
    waiting: Mutex<HashMap<String, Client>>,
    opened: AtomicU64,
    /// There is another one.
    came: Notify,
}

/// The id in the URI of a stream; `None` for what is none.
pub fn stream_id(uri: &str) -> Option<&str> {
    let (address, query) = uri.split_once('?')?;
    let is_stream = address.starts_with("ttrpc+") || address.starts_with("grpc+");
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find_map(|(name, value)| (is_stream && name == "streaming_id").then_some(value))
}

impl Streams {
    /// The service that containerd opens streams with.
    pub fn service(self: &Arc<Self>) -> Service {
        let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Handler(self.clone()));
        Service {
            methods: HashMap::new(),
            streams: HashMap::from([(METHOD.to_owned(), handler)]),
        }
    }

    /// The streams of an id are a process's from now on, until this is dropped.
    pub fn claim(self: &Arc<Self>, id: &str) -> Claim {
        Claim {
            streams: self.clone(),
            id: id.to_owned(),
        }
    }

    /// Closes those that wait.
    pub fn close(&self) {
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        drop(waiting);
    }

    fn offer(&self, id: &str, client: Client) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MAX_WAITING
            && let Some(oldest) = (waiting.iter())
                .min_by_key(|(_, client)| client.number)
                .map(|(id, _)| id.clone())
        {
            tracing::warn!("stream {oldest:?} was closed: {MAX_WAITING} newer ones wait");
            waiting.remove(&oldest);
        }
        // One of a client that has opened it again takes the place of its first.
        waiting.insert(id.to_owned(), client);
        drop(waiting);
        self.came.notify_waiters();
    }
}

struct Handler(Arc<Streams>);

#[async_trait]
impl StreamHandler for Handler {
    async fn handler(
        &self,
        _: TtrpcContext,
        inner: StreamInner,
    ) -> ttrpc::Result<Option<ttrpc::Response>> {
        let mut stream = ServerStream::<Any, Any>::new(inner);
        let first = async {
            loop {
                match stream.recv().await? {
                    // What opens a stream may have an empty message with it.
                    Some(first) if first == Any::default() => {}
                    first => return ttrpc::Result::Ok(first),
                }
            }
        };
        let first = tokio::time::timeout(INIT_TIMEOUT, first).await;
        let first = first.map_err(|_| ttrpc::Error::Others("a stream has no id".to_owned()))?;
        let Some(first) = first? else {
            return Ok(None);
        };
        let mut id = String::new();
        let read = wire::fields(&first.value, |number, value| {
            if let (1, Value::Bytes(bytes)) = (number, value) {
                id = wire::text(bytes);
            }
            Ok(())
        });
        if read.is_err() || id.is_empty() || !first.type_url.ends_with(".StreamInit") {
            return Err(ttrpc::Error::Others(format!(
                "a stream begins with its id, not with {:?}",
                first.type_url
            )));
        }
        // It is known from here on.
        stream
            .send(&message("google.protobuf.Empty", Vec::new()))
            .await?;
        let (close, closed) = oneshot::channel();
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            number,
            stream,
            window: 0,
            close,
        };
        self.0.offer(&id, client);
        // Its sender is dropped, which is the end.
        let _ = closed.await;
        Ok(None)
    }
}

fn message(name: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: name.to_owned(),
        value,
        ..Any::default()
    }
}

/// A message with one field, the first.
fn encoded(
    write: impl FnOnce(&mut CodedOutputStream<'_>) -> protobuf::Result<()>,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut bytes);
    write(&mut stream).and_then(|()| stream.flush())?;
    drop(stream);
    Ok(bytes)
}

impl Client {
    /// Waits for a message of the other side: its data, or nothing when it has granted more.
    async fn receive(&mut self) -> Result<Vec<u8>, Gone> {
        let lost = |error: protobuf::Error| Gone::Lost(error.into());
        let received = self.stream.recv().await;
        let received = received.map_err(|error| Gone::Lost(io::Error::other(error)))?;
        let message = received.ok_or(Gone::Closed)?;
        let mut data = Vec::new();
        let is_window = message.type_url.ends_with(".WindowUpdate");
        wire::fields(&message.value, |number, value| {
            match (number, value) {
                (1, Value::Number(granted)) if is_window => {
                    let granted = usize::try_from(granted).unwrap_or(0).min(1 << 30);
                    self.window = self.window.saturating_add(granted);
                }
                (1, Value::Bytes(bytes)) if !is_window => data = bytes.to_vec(),
                _ => {}
            }
            Ok(())
        })
        .map_err(lost)?;
        Ok(data)
    }

    /// Sends as much of some bytes as fits; how much that was.
    async fn send(&mut self, bytes: &[u8]) -> Result<usize, Gone> {
        while self.window == 0 {
            self.receive().await?;
        }
        let length = bytes.len().min(self.window).min(PIECE);
        let data = encoded(|stream| stream.write_bytes(1, &bytes[..length]));
        let data = message("containerd.types.transfer.Data", data.map_err(Gone::Lost)?);
        match self.stream.send(&data).await {
            Ok(()) => {
                self.window -= length;
                Ok(length)
            }
            Err(error) => loop {
                // Perhaps it was closed before.
                tokio::select! {
                    biased;
                    received = self.receive() => drop(received?),
                    () = std::future::ready(()) => {
                        return Err(Gone::Lost(io::Error::other(error)));
                    }
                }
            },
        }
    }

    /// Sends the end, and waits until the other side has taken all and closes its side.
    async fn end(self) {
        let Self {
            mut stream, close, ..
        } = self;
        drop(close);
        let ended = async { while let Ok(Some(_)) = stream.recv().await {} };
        // Then it is not there any more.
        let _ = tokio::time::timeout(END_TIMEOUT, ended).await;
    }

    /// Lets the other side send so many bytes more.
    async fn grant(&mut self, bytes: usize) -> io::Result<()> {
        let granted = i32::try_from(bytes).unwrap_or(i32::MAX);
        let update = encoded(|stream| stream.write_int32(1, granted))?;
        let update = message("containerd.types.transfer.WindowUpdate", update);
        self.stream.send(&update).await.map_err(io::Error::other)
    }
}

/// The streams of an id: the latest one is the one that counts. That a connection is lost is known
/// only by the next stream, or when something is sent.
#[derive(Debug)]
pub struct Claim {
    streams: Arc<Streams>,
    id: String,
}

impl Claim {
    /// Waits for the next stream.
    async fn next(&self) -> Client {
        loop {
            let came = self.streams.came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if let Some(client) = self.next_now() {
                return client;
            }
            came.await;
        }
    }

    fn next_now(&self) -> Option<Client> {
        lock(&self.streams.waiting).remove(&self.id)
    }
}

impl Drop for Claim {
    /// A stream that was not used ends, too.
    fn drop(&mut self) {
        let unused = self.next_now();
        drop(unused);
    }
}

/// A stream that takes the output of a process.
#[derive(Debug)]
pub struct Output {
    claim: Claim,
    client: Option<Client>,
    /// The client has closed its stream.
    unwanted: bool,
}

impl Output {
    /// The one of an id, be it there already or not.
    pub fn new(claim: Claim) -> Self {
        Self {
            claim,
            client: None,
            unwanted: false,
        }
    }

    fn take(&mut self, client: Client) {
        self.client = Some(client);
        self.unwanted = false;
    }

    /// Sends bytes, to as many clients, one after the other, as it takes.
    pub async fn write_all(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if let Some(next) = self.claim.next_now() {
                self.take(next);
            }
            if self.unwanted {
                return;
            }
            let sending = async {
                match &mut self.client {
                    Some(client) => client.send(bytes).await,
                    None => std::future::pending().await,
                }
            };
            let sent = tokio::select! {
                biased;
                next = self.claim.next() => Err(next),
                sent = sending => Ok(sent),
            };
            match sent {
                Ok(Ok(sent)) => bytes = &bytes[sent..],
                Ok(Err(gone)) => {
                    self.unwanted = matches!(gone, Gone::Closed);
                    match gone {
                        Gone::Closed => tracing::info!("stream {} was closed", self.claim.id),
                        Gone::Lost(error) => {
                            tracing::info!("stream {} is lost: {error}", self.claim.id);
                        }
                    }
                    self.client = None;
                }
                Err(next) => self.take(next),
            }
        }
    }

    /// The process writes no more: waits, for a while, until the client has read all.
    pub async fn end(mut self) {
        if let Some(client) = self.claim.next_now().or(self.client.take()) {
            client.end().await;
        }
    }
}

/// Copies what comes by a stream to a pipe, until the input is closed, and then what is on its way.
pub async fn feed(claim: Claim, mut pipe: pipe::Sender, closed: Arc<Notify>) {
    let mut client: Option<Client> = None;
    let (mut is_closed, mut has_ended) = (false, false);
    // What has come, and how much more may: together at most a window.
    let (mut buffer, mut granted) = (Vec::new(), 0);
    loop {
        if let Some(open) = &mut client
            && granted + buffer.len() < WINDOW / 2
        {
            let more = WINDOW - granted - buffer.len();
            if open.grant(more).await.is_err() {
                client = None;
                continue;
            }
            granted += more;
        }
        let last = is_closed && buffer.is_empty();
        if last && has_ended {
            return;
        }
        let receiving = async {
            match &mut client {
                Some(client) => client.receive().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            received = receiving => match received {
                Ok(data) => {
                    granted = granted.saturating_sub(data.len());
                    buffer.extend(data);
                }
                Err(_) => {
                    client = None;
                    has_ended = true;
                }
            },
            next = claim.next() => {
                client = Some(next);
                has_ended = false;
                granted = 0;
            }
            written = pipe.write(&buffer), if !buffer.is_empty() => match written {
                Ok(written) => drop(buffer.drain(..written)),
                // The process reads no more.
                Err(_) => return,
            },
            () = closed.notified(), if !is_closed => is_closed = true,
            () = tokio::time::sleep(LAST_INPUT), if last => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;
    use ttrpc::asynchronous::transport::Listener;
    use ttrpc::asynchronous::{CSReceiver, CSSender, Client as Connection, ClientStream, Server};

    use super::*;

    /// containerd's end of a stream, and its connection.
    struct Theirs(
        CSSender<Any>,
        CSReceiver<Any>,
        #[expect(dead_code)] Connection,
    );

    async fn connected(address: &str) -> (ClientStream<Any, Any>, Connection) {
        let connection = Connection::connect(address).await.unwrap();
        let request = ttrpc::Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            ..ttrpc::Request::default()
        };
        let inner = connection.new_stream(request, true, true).await.unwrap();
        (ClientStream::new(inner), connection)
    }

    impl Theirs {
        async fn open(address: &str, id: &str) -> Self {
            let (stream, connection) = connected(address).await;
            let (sender, receiver) = stream.split();
            let mut theirs = Self(sender, receiver, connection);
            let init = encoded(|stream| stream.write_string(1, id)).unwrap();
            let name = "containerd.services.streaming.v1.StreamInit";
            theirs.0.send(&message(name, init)).await.unwrap();
            theirs.1.recv().await.unwrap();
            theirs
        }

        async fn grant(&self, bytes: i32) {
            let update = encoded(|stream| stream.write_int32(1, bytes)).unwrap();
            let name = "containerd.types.transfer.WindowUpdate";
            self.0.send(&message(name, update)).await.unwrap();
        }

        async fn write(&self, bytes: &[u8]) {
            let data = encoded(|stream| stream.write_bytes(1, bytes)).unwrap();
            let name = "containerd.types.transfer.Data";
            self.0.send(&message(name, data)).await.unwrap();
        }

        /// The first field of the next message.
        async fn read(&mut self) -> Option<Vec<u8>> {
            let message = self.1.recv().await.ok()?;
            let mut read = Vec::new();
            wire::fields(&message.value, |_, value| {
                read = match value {
                    Value::Bytes(bytes) => bytes.to_vec(),
                    Value::Number(number) => number.to_string().into_bytes(),
                };
                Ok(())
            })
            .unwrap();
            Some(read)
        }
    }

    async fn serving() -> (Arc<Streams>, Server, String, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::from(UnixListener::bind(&path).unwrap());
        let streams = Arc::<Streams>::default();
        let services = HashMap::from([(SERVICE.to_owned(), streams.service())]);
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(services);
        server.start().await.unwrap();
        (
            streams,
            server,
            format!("unix://{}", path.display()),
            directory,
        )
    }

    #[tokio::test]
    async fn output_flows_as_far_as_is_granted_and_the_rest_to_the_next_client() {
        let (streams, _server, address, _directory) = serving().await;
        let mut first = Theirs::open(&address, "c-stdout").await;
        let mut output = Output::new(streams.claim("c-stdout"));
        let writing = tokio::spawn(async move {
            output.write_all(b"0123456789").await;
            output.write_all(b"abc").await;
            output.end().await;
        });
        first.grant(4).await;
        assert_eq!(first.read().await.unwrap(), b"0123");
        drop(first);
        // containerd is there again.
        let mut second = Theirs::open(&address, "c-stdout").await;
        second.grant(1000).await;
        assert_eq!(second.read().await.unwrap(), b"456789");
        assert_eq!(second.read().await.unwrap(), b"abc");
        assert_eq!(second.read().await, None);
        second.0.close_send().await.unwrap();
        writing.await.unwrap();
        // A process that writes nothing ends its stream, too.
        let mut silent = Theirs::open(&address, "d-stdout").await;
        drop(Output::new(streams.claim("d-stdout")));
        assert_eq!(silent.read().await, None);
    }

    #[tokio::test]
    async fn output_that_the_client_does_not_want_any_more_holds_up_nobody() {
        let (streams, _server, address, _directory) = serving().await;
        let theirs = Theirs::open(&address, "c-stdout").await;
        theirs.0.close_send().await.unwrap();
        let mut output = Output::new(streams.claim("c-stdout"));
        output.write_all(&[b'x'; 100_000]).await;
        output.write_all(b"more").await;
        // One that comes again gets what follows.
        let mut again = Theirs::open(&address, "c-stdout").await;
        again.grant(1000).await;
        output.write_all(b"then").await;
        assert_eq!(again.read().await.unwrap(), b"then");
    }

    #[tokio::test]
    async fn input_is_granted_and_ends_when_it_is_closed_with_what_was_on_its_way() {
        let (streams, _server, address, _directory) = serving().await;
        let (sender, mut receiver) = pipe::pipe().unwrap();
        let closed = Arc::new(Notify::new());
        let feeding = tokio::spawn(feed(streams.claim("c-stdin"), sender, closed.clone()));
        let mut theirs = Theirs::open(&address, "c-stdin").await;
        assert_eq!(theirs.read().await.unwrap(), WINDOW.to_string().as_bytes());
        theirs.write(b"one ").await;
        let mut text = [0; 4];
        receiver.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one ");
        closed.notify_one();
        // More small pieces than ttrpc keeps, while nobody reads.
        for _ in 0..20_000 {
            theirs.write(b"two").await;
        }
        theirs.0.close_send().await.unwrap();
        drop(theirs);
        let mut rest = Vec::new();
        receiver.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"two".repeat(20_000));
        feeding.await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_begin_with_an_id_is_no_stream() {
        let (streams, _server, address, _directory) = serving().await;
        let (mut stream, _connection) = connected(&address).await;
        stream.send(&message("x", vec![0xff; 9])).await.unwrap();
        assert!(stream.recv().await.is_err());
        assert!(lock(&streams.waiting).is_empty());
    }

    #[test]
    fn a_stream_is_told_from_other_places() {
        let uri = "ttrpc+unix:///run/containerd/s/abc?streaming_id=c-stdout";
        assert_eq!(stream_id(uri), Some("c-stdout"));
        for other in [
            "/run/fifo",
            "binary:///logger?streaming_id=x",
            "ttrpc+unix:///x?a=b",
            "",
        ] {
            assert_eq!(stream_id(other), None, "{other}");
        }
    }
}
