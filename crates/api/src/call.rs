//! One request and its answer, as handlers see them: everything blocks, and the answer is sent when
//! it is known. Handlers run on threads of their own.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use hull_engine::error::Error;
use hyper::{HeaderMap, Method, StatusCode};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::failure::{Failure, Result};
use crate::router::Version;

/// How long the rest of a request is read that nobody wants.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest JSON that a request may have, bytes.
const LONGEST_JSON: u64 = 4 << 20;

/// A request.
#[derive(Debug)]
pub struct Call {
    pub method: Method,
    /// The version of the API that the caller speaks; the newest without one.
    pub version: Option<Version>,
    /// Parts of the path after the version, decoded.
    pub path: Vec<String>,
    pub query: Query,
    pub headers: HeaderMap,
    pub body: BodyReader,
    /// Gone when a handler has answered by itself.
    pub answer: Option<Answer>,
}

/// What a handler answers.
#[derive(Debug)]
pub enum Reply {
    /// An object.
    Json(StatusCode, Value),
    /// Nothing but a status.
    Empty(StatusCode),
    /// It has answered by itself.
    Taken,
}

impl Reply {
    /// An object.
    pub fn ok(value: Value) -> Self {
        Self::Json(StatusCode::OK, value)
    }

    /// Done, and there is nothing to say.
    pub fn done() -> Self {
        Self::Empty(StatusCode::NO_CONTENT)
    }
}

impl Call {
    /// An answer that comes bit by bit. Its head is sent at once, so nothing else can be answered.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn stream(&mut self, kind: &'static str) -> Result<StreamWriter> {
        self.stream_with(kind, Vec::new())
    }

    /// The same with further headers.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn stream_with(
        &mut self,
        kind: &'static str,
        headers: Vec<(&'static str, String)>,
    ) -> Result<StreamWriter> {
        let answer = self.answer.take().ok_or_else(answered)?;
        answer
            .stream(kind, headers)
            .map_err(|error| Failure::from(Error::new(format!("answer: {error}"))))
    }

    /// Takes over the connection; `None` when the caller has gone. A caller that expects no upgrade
    /// gets output as the body of the answer, and has no input.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn take_over(&mut self, kind: &'static str) -> Result<Option<Hijacked>> {
        if self.headers.contains_key(hyper::header::UPGRADE) {
            let answer = self.answer.take().ok_or_else(answered)?;
            return Ok(answer.upgrade(kind));
        }
        let doing = |error: io::Error| Failure::from(Error::new(format!("answer: {error}")));
        let (ours, theirs) = UnixStream::pair().map_err(doing)?;
        let mut stream = self.stream(kind)?;
        std::thread::Builder::new()
            .name("answer".to_owned())
            .spawn(move || {
                // When the caller has gone, the end of `theirs` tells the other side.
                if io::copy(&mut &theirs, &mut stream).is_ok() {
                    stream.finish();
                }
            })
            .map_err(doing)?;
        // Its input has ended.
        let _ = ours.shutdown(std::net::Shutdown::Read);
        Ok(Some(Hijacked {
            stream: ours,
            early: Vec::new(),
        }))
    }

    /// The object in the body; nothing when there is none.
    ///
    /// # Errors
    /// It is no JSON, too long, or not what is expected.
    pub fn json<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut text = Vec::new();
        let mut limited = (&mut self.body).take(LONGEST_JSON);
        limited
            .read_to_end(&mut text)
            .map_err(|error| Failure::bad(format!("read the request: {error}")))?;
        if text.len() as u64 == LONGEST_JSON {
            return Err(Failure::bad("the request is too long"));
        }
        let value = match text.iter().all(u8::is_ascii_whitespace) {
            true => json!({}),
            false => serde_json::from_slice(&text)
                .map_err(|error| Failure::bad(format!("invalid JSON: {error}")))?,
        };
        serde_json::from_value(without_nulls(value))
            .map_err(|error| Failure::bad(format!("invalid request: {error}")))
    }
}

fn answered() -> Failure {
    Failure::from(Error::new("the request was answered already"))
}

/// Go writes `null` for what is not there.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(object) => object
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

/// What follows `?` in an address.
#[derive(Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes `a=b&c=d`.
    pub fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name, true), decode(value, true))
        };
        Self(pairs.map(pair).collect())
    }

    /// A value that is not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut named = self.0.iter().filter(|(key, _)| key == name);
        named
            .find(|(_, value)| !value.is_empty())
            .map(|(_, value)| value.as_str())
    }

    /// All values of a name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.0.iter().filter(move |(key, _)| key == name);
        named.map(|(_, value)| value.as_str())
    }

    /// Docker's booleans: everything but some words for no.
    pub fn flag(&self, name: &str) -> bool {
        self.flag_or(name, false)
    }

    /// The same, with a default.
    pub fn flag_or(&self, name: &str, default: bool) -> bool {
        match self.get(name) {
            None => default,
            Some(text) => !matches!(
                text.trim().to_ascii_lowercase().as_str(),
                "0" | "no" | "false" | "none"
            ),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// It is none.
    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let Some(text) = self.get(name) else {
            return Ok(None);
        };
        let number = text.parse();
        number
            .map(Some)
            .map_err(|_| Failure::bad(format!("{name}: {text:?} is no number")))
    }

    /// `filters`, as `KEY=VALUE` each: lists of values, or their older form, sets.
    ///
    /// # Errors
    /// It is neither.
    pub fn filters(&self) -> Result<Vec<String>> {
        let Some(text) = self.get("filters") else {
            return Ok(Vec::new());
        };
        let wrong = || Failure::bad(format!("invalid filters {text:?}"));
        let Ok(Value::Object(object)) = serde_json::from_str(text) else {
            return Err(wrong());
        };
        let mut filters = Vec::new();
        for (key, values) in object {
            let values: Vec<String> = match values {
                Value::Array(list) => {
                    let text = |value: Value| value.as_str().map(str::to_owned).ok_or_else(wrong);
                    list.into_iter().map(text).collect::<Result<_>>()?
                }
                Value::Object(set) => {
                    let chosen = set.into_iter().filter(|(_, chosen)| *chosen == json!(true));
                    chosen.map(|(value, _)| value).collect()
                }
                _ => return Err(wrong()),
            };
            filters.extend(values.iter().map(|value| format!("{key}={value}")));
        }
        Ok(filters)
    }

    /// `filters`, as what `parse` reads from each.
    ///
    /// # Errors
    /// As [`Self::filters`], or one is unknown.
    pub fn filters_as<T>(&self, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>> {
        let filters = self.filters()?;
        let parsed = filters.iter().map(|text| parse(text).map_err(Failure::bad));
        parsed.collect()
    }
}

/// Decodes `%20`, and `+` where that is a space. What is no UTF-8 is replaced.
pub fn decode(text: &str, plus: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = after;
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            (b'+', _) if plus => bytes.push(b' '),
            _ => bytes.push(first),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The body of a request.
#[derive(Debug)]
pub struct BodyReader {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl BodyReader {
    /// One that is fed by the connection.
    pub fn new(pieces: mpsc::Receiver<io::Result<Bytes>>) -> Self {
        Self {
            pieces,
            piece: Bytes::new(),
        }
    }

    /// Reads what is left, for a while: a client that is still sending when the answer comes finds
    /// a broken connection in place of it.
    pub fn drain(&mut self) {
        let runtime = tokio::runtime::Handle::current();
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let next = runtime.block_on(tokio::time::timeout(left, self.pieces.recv()));
            match next {
                Ok(Some(Ok(_))) if !left.is_zero() => {}
                _ => return,
            }
        }
    }
}

impl Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// What the connection is to send.
#[derive(Debug)]
pub enum Head {
    /// All of the answer.
    Whole {
        status: StatusCode,
        kind: &'static str,
        headers: Vec<(&'static str, String)>,
        body: Bytes,
    },
    /// The rest comes bit by bit.
    Stream {
        kind: &'static str,
        headers: Vec<(&'static str, String)>,
        pieces: mpsc::Receiver<Bytes>,
        /// Set when nothing is missing at the end.
        whole: Arc<AtomicBool>,
    },
    /// The connection is the handler's from now on.
    Upgrade {
        kind: &'static str,
        connection: oneshot::Sender<(UnixStream, Bytes)>,
    },
}

/// Where the answer goes. Dropped without one, it says that something went wrong.
#[derive(Debug)]
pub struct Answer(oneshot::Sender<Head>);

/// Content type of JSON.
pub const JSON: &str = "application/json";

/// Bits of an answer that wait to be sent.
const QUEUE: usize = 16;

impl Answer {
    pub fn new(head: oneshot::Sender<Head>) -> Self {
        Self(head)
    }

    fn send(self, head: Head) {
        // Fails if the caller has gone.
        let _ = self.0.send(head);
    }

    /// An object.
    pub fn json(self, status: StatusCode, value: &Value) {
        self.whole(status, JSON, Vec::new(), format!("{value}\n").into());
    }

    /// Nothing but a status.
    pub fn empty(self, status: StatusCode) {
        self.whole(status, JSON, Vec::new(), Bytes::new());
    }

    /// Anything.
    pub fn whole(
        self,
        status: StatusCode,
        kind: &'static str,
        headers: Vec<(&'static str, String)>,
        body: Bytes,
    ) {
        self.send(Head::Whole {
            status,
            kind,
            headers,
            body,
        });
    }

    /// What went wrong.
    pub fn failure(self, failure: &Failure) {
        self.json(failure.status, &json!({"message": failure.message}));
    }

    /// An answer that comes bit by bit. Its head is sent at once.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn stream(
        self,
        kind: &'static str,
        headers: Vec<(&'static str, String)>,
    ) -> io::Result<StreamWriter> {
        let (sender, pieces) = mpsc::channel(QUEUE);
        let (closed, watched) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let watch = sender.clone();
        let whole = Arc::new(AtomicBool::new(false));
        self.send(Head::Stream {
            kind,
            headers,
            pieces,
            whole: whole.clone(),
        });
        Ok(StreamWriter {
            sender,
            whole,
            closed,
            _watch: Watch::start(watch, watched),
        })
    }

    /// Takes over the connection: the bytes that came already are first. `kind` is what travels on
    /// it. `None` when the caller has gone.
    pub fn upgrade(self, kind: &'static str) -> Option<Hijacked> {
        let (sender, connection) = oneshot::channel();
        self.send(Head::Upgrade {
            kind,
            connection: sender,
        });
        let (stream, early) = connection.blocking_recv().ok()?;
        Some(Hijacked {
            stream,
            early: early.to_vec(),
        })
    }
}

/// Closes a pipe when nobody reads a stream any more.
#[derive(Debug)]
struct Watch(tokio::task::JoinHandle<()>);

impl Watch {
    fn start(sender: mpsc::Sender<Bytes>, pipe: OwnedFd) -> Self {
        Self(tokio::runtime::Handle::current().spawn(async move {
            sender.closed().await;
            drop(pipe);
        }))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The sender in it would keep the stream open.
        self.0.abort();
    }
}

/// The rest of an answer. It ends with [`StreamWriter::finish`]; dropped before, it breaks off, and
/// the caller sees that something is missing.
#[derive(Debug)]
pub struct StreamWriter {
    sender: mpsc::Sender<Bytes>,
    whole: Arc<AtomicBool>,
    closed: OwnedFd,
    _watch: Watch,
}

impl StreamWriter {
    /// A line of JSON.
    ///
    /// # Errors
    /// The caller has gone.
    pub fn line(&mut self, value: &Value) -> io::Result<()> {
        self.write_all(format!("{value}\n").as_bytes())
    }

    /// The same, unless the caller is slow: false then. Never waits, and may be called where
    /// nothing may block.
    pub fn offer(&self, value: &Value) -> bool {
        self.sender
            .try_send(format!("{value}\n").into_bytes().into())
            .is_ok()
    }

    /// Ends the answer: nothing is missing.
    pub fn finish(self) {
        self.whole.store(true, Ordering::Release);
    }
}

impl Write for StreamWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !bytes.is_empty() {
            let sent = self.sender.blocking_send(Bytes::copy_from_slice(bytes));
            sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hangs up when the caller goes.
impl AsFd for StreamWriter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.closed.as_fd()
    }
}

/// A connection that is ours.
#[derive(Debug)]
pub struct Hijacked {
    pub stream: UnixStream,
    /// What came with the request.
    pub early: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let query = Query::parse(
            "a=1&b=x%20y+z&c=false&d=&e&filters=%7B%22label%22%3A%5B%22a%3Db%22%5D%2C%22status%22%3A%7B%22running%22%3Atrue%2C%22x%22%3Afalse%7D%7D",
        );
        assert_eq!(query.get("b"), Some("x y z"));
        assert!(
            query.flag("a") && !query.flag("c") && !query.flag("d") && query.flag_or("e", true)
        );
        assert_eq!(query.number::<u32>("a").ok(), Some(Some(1)));
        assert!(query.number::<u32>("b").is_err());
        assert_eq!(
            query.filters().ok(),
            Some(vec!["label=a=b".to_owned(), "status=running".to_owned()])
        );
        assert!(Query::parse("filters=x").filters().is_err());
    }

    #[test]
    fn escapes_that_are_none_stay() {
        assert_eq!(decode("100%&%zz%4", false), "100%&%zz%4");
        assert_eq!(decode("a%2Fb+c", false), "a/b+c");
    }

    #[test]
    fn nulls_of_go_are_as_nothing() {
        let value = without_nulls(json!({"a": null, "b": {"c": null, "d": [1]}}));
        assert_eq!(value, json!({"b": {"d": [1]}}));
    }
}
