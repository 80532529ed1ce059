//! Streams of processes over containerd's streaming service (containerd 2, `io_type =
//! "streaming"`): instead of a fifo containerd names a stream at the shim's own socket, which it
//! has opened before or opens again when it was restarted.
//!
//! A stream has one direction. Data flows as far as its receiver has granted (`Data` and
//! `WindowUpdate` of `containerd.types.transfer`). What could not be sent to a client that has gone
//! is kept for the next one.

use std::collections::{HashMap, HashSet};
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

/// How long a stream waits without a process that has its id.
const UNCLAIMED: Duration = Duration::from_secs(60);

/// Most streams that wait.
const MAX_WAITING: usize = 256;

/// How long input that is closed may be silent before it has ended: what was written before is on
/// its way, on another connection.
const LAST_INPUT: Duration = Duration::from_millis(200);

/// A stream with containerd at its other end; it is closed when this is dropped.
#[derive(Debug)]
struct Client {
    /// Of all streams of the shim: an id can come again.
    number: u64,
    stream: ServerStream<Any, Any>,
    /// Bytes that may be sent.
    window: usize,
    _close: oneshot::Sender<()>,
}

/// The streams that wait for their process, by id.
#[derive(Debug, Default)]
pub struct Streams {
    waiting: Mutex<HashMap<String, Client>>,
    /// Ids that processes have.
    claimed: Mutex<HashSet<String>>,
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
    fn claim(self: &Arc<Self>, id: &str) -> Claim {
        lock(&self.claimed).insert(id.to_owned());
        Claim {
            streams: self.clone(),
            id: id.to_owned(),
        }
    }

    /// Drops a stream that nobody has claimed.
    fn withdraw(&self, id: &str, number: u64) {
        let mut waiting = lock(&self.waiting);
        let is_it = |client: &Client| client.number == number;
        if waiting.get(id).is_some_and(is_it) && !lock(&self.claimed).contains(id) {
            waiting.remove(id);
        }
    }

    /// False when there are too many.
    fn offer(&self, id: &str, client: Client) -> bool {
        let mut waiting = lock(&self.waiting);
        if waiting.len() >= MAX_WAITING && !waiting.contains_key(id) {
            return false;
        }
        // One of a client that has opened it again takes the place of its first.
        waiting.insert(id.to_owned(), client);
        drop(waiting);
        self.came.notify_waiters();
        true
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
        let first = loop {
            match stream.recv().await? {
                // What opens a stream may have an empty message with it.
                Some(first) if first == Any::default() => {}
                Some(first) => break first,
                None => return Ok(None),
            }
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
        let (close, mut closed) = oneshot::channel();
        let number = self.0.opened.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            number,
            stream,
            window: 0,
            _close: close,
        };
        if !self.0.offer(&id, client) {
            tracing::warn!("stream {id:?} is one too many");
            return Ok(None);
        }
        if tokio::time::timeout(UNCLAIMED, &mut closed).await.is_err() {
            self.0.withdraw(&id, number);
            // Its sender is dropped, which is the end.
            let _ = closed.await;
        }
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
    async fn receive(&mut self) -> io::Result<Vec<u8>> {
        let received = self.stream.recv().await.map_err(io::Error::other)?;
        let message = received.ok_or(io::ErrorKind::UnexpectedEof)?;
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
        })?;
        Ok(data)
    }

    /// Sends as much of some bytes as fits; how much that was.
    async fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while self.window == 0 {
            self.receive().await?;
        }
        let length = bytes.len().min(self.window).min(PIECE);
        let data = encoded(|stream| stream.write_bytes(1, &bytes[..length]))?;
        let data = message("containerd.types.transfer.Data", data);
        self.stream.send(&data).await.map_err(io::Error::other)?;
        self.window -= length;
        Ok(length)
    }

    /// Lets the other side send so many bytes more.
    async fn grant(&mut self, bytes: usize) -> io::Result<()> {
        let granted = i32::try_from(bytes).unwrap_or(i32::MAX);
        let update = encoded(|stream| stream.write_int32(1, granted))?;
        let update = message("containerd.types.transfer.WindowUpdate", update);
        self.stream.send(&update).await.map_err(io::Error::other)
    }
}

/// The streams of an id: the latest one is the one that counts. That the other side of a stream has
/// gone is known only by its next one, or when something is sent.
#[derive(Debug)]
struct Claim {
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
            if let Some(client) = lock(&self.streams.waiting).remove(&self.id) {
                return client;
            }
            came.await;
        }
    }
}

impl Drop for Claim {
    /// A stream that was not used ends, too.
    fn drop(&mut self) {
        lock(&self.streams.claimed).remove(&self.id);
        let unused = lock(&self.streams.waiting).remove(&self.id);
        drop(unused);
    }
}

/// A stream that takes the output of a process.
#[derive(Debug)]
pub struct Output {
    claim: Claim,
    client: Option<Client>,
}

impl Output {
    /// The one of an id, be it there already or not.
    pub fn new(streams: &Arc<Streams>, id: &str) -> Self {
        Self {
            claim: streams.claim(id),
            client: None,
        }
    }

    /// Sends bytes, to as many clients, one after the other, as it takes.
    pub async fn write_all(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
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
                Ok(Err(error)) => {
                    tracing::info!("stream {} was closed: {error}", self.claim.id);
                    self.client = None;
                }
                Err(next) => self.client = Some(next),
            }
        }
    }
}

/// Copies what comes by a stream to a pipe, until the input is closed, and then what is on its way.
pub async fn feed(streams: Arc<Streams>, id: String, mut pipe: pipe::Sender, closed: Arc<Notify>) {
    let claim = streams.claim(&id);
    let mut is_closed = false;
    let mut client: Option<Client> = None;
    let mut granted = 0;
    loop {
        if let Some(open) = &mut client
            && granted < WINDOW / 2
        {
            if open.grant(WINDOW - granted).await.is_err() {
                client = None;
                continue;
            }
            granted = WINDOW;
        }
        let receiving = async {
            match &mut client {
                Some(client) => client.receive().await,
                None => std::future::pending().await,
            }
        };
        let received = tokio::select! {
            next = claim.next() => {
                client = Some(next);
                granted = 0;
                continue;
            }
            received = receiving => received,
            () = closed.notified(), if !is_closed => {
                is_closed = true;
                continue;
            }
            () = tokio::time::sleep(LAST_INPUT), if is_closed => return,
        };
        match received {
            Ok(data) => {
                granted = granted.saturating_sub(data.len());
                if pipe.write_all(&data).await.is_err() {
                    // The process reads no more.
                    return;
                }
            }
            Err(_) => client = None,
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

    impl Theirs {
        async fn open(address: &str, id: &str) -> Self {
            let connection = Connection::connect(address).await.unwrap();
            let request = ttrpc::Request {
                service: SERVICE.to_owned(),
                method: METHOD.to_owned(),
                ..ttrpc::Request::default()
            };
            let inner = connection.new_stream(request, true, true).await.unwrap();
            let (sender, receiver) = ClientStream::new(inner).split();
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
        let mut output = Output::new(&streams, "c-stdout");
        let writing = tokio::spawn(async move {
            output.write_all(b"0123456789").await;
            output.write_all(b"abc").await;
        });
        first.grant(4).await;
        assert_eq!(first.read().await.unwrap(), b"0123");
        drop(first);
        // containerd is there again.
        let mut second = Theirs::open(&address, "c-stdout").await;
        second.grant(1000).await;
        assert_eq!(second.read().await.unwrap(), b"456789");
        assert_eq!(second.read().await.unwrap(), b"abc");
        writing.await.unwrap();
        assert_eq!(second.read().await, None);
        // A process that writes nothing ends its stream, too.
        let mut silent = Theirs::open(&address, "d-stdout").await;
        drop(Output::new(&streams, "d-stdout"));
        assert_eq!(silent.read().await, None);
    }

    #[tokio::test]
    async fn input_is_granted_and_ends_when_it_is_closed_with_what_was_on_its_way() {
        let (streams, _server, address, _directory) = serving().await;
        let (sender, mut receiver) = pipe::pipe().unwrap();
        let closed = Arc::new(Notify::new());
        let feeding = tokio::spawn(feed(streams, "c-stdin".to_owned(), sender, closed.clone()));
        let mut theirs = Theirs::open(&address, "c-stdin").await;
        assert_eq!(theirs.read().await.unwrap(), WINDOW.to_string().as_bytes());
        theirs.write(b"one ").await;
        let mut text = [0; 4];
        receiver.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"one ");
        closed.notify_one();
        theirs.write(b"two").await;
        let mut rest = Vec::new();
        receiver.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"two");
        feeding.await.unwrap();
    }

    #[tokio::test]
    async fn what_does_not_begin_with_an_id_is_no_stream() {
        let (streams, _server, address, _directory) = serving().await;
        let connection = Connection::connect(&address).await.unwrap();
        let request = ttrpc::Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            ..ttrpc::Request::default()
        };
        let inner = connection.new_stream(request, true, true).await.unwrap();
        let mut stream = ClientStream::<Any, Any>::new(inner);
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
