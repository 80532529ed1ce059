//! What an answer of the agent may cost the host. A field without content takes two bytes in a
//! message and a hundred times as many once it is decoded, and a message has up to 4 MiB: so its
//! elements are counted before it is decoded.
//!
//! [`Envelopes`] examines ttrpc's own message around an answer, [`BoundedClient`] the answer.

use std::io;
use std::pin::Pin;
use std::task::{Context as Task, Poll, ready};

use hull_protocol::agent as proto;
use protobuf::reflect::{MessageDescriptor, RuntimeFieldType, RuntimeType};
use protobuf::{Message, MessageFull};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::r#async::Client;
use ttrpc::context::Context as CallContext;
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_RESPONSE, MessageHeader,
};

/// Most elements of an answer: messages within it, and fields that this version does not know. As
/// many processes as a container can reasonably have; the other lists are short.
pub const MAX_ELEMENTS: usize = 65_536;

/// Most fields of the message around an answer, which has four.
const MAX_ENVELOPE_FIELDS: usize = 8;

const SERVICE: &str = "hull.agent.v1.Agent";

/// Why an answer is not decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It could take too much memory.
    #[error("the guest's answer has more than {MAX_ELEMENTS} elements")]
    TooMany,
    /// It is not a message.
    #[error("the guest's answer is malformed")]
    Malformed,
}

/// Fields of an encoded message: their numbers, and the content of those that have a length.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next field. Groups, which no message of ours has, are not known here.
    fn field(&mut self) -> Option<(u32, Option<&'a [u8]>)> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| *number > 0)?;
        let content = match tag & 7 {
            0 => self.varint().map(|_| None)?,
            1 => self.take(8).map(|_| None)?,
            2 => {
                let length = self.varint()?;
                Some(self.take(usize::try_from(length).ok()?)?)
            }
            5 => self.take(4).map(|_| None)?,
            _ => return None,
        };
        Some((number, content))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Option<&'a [u8]>), Refused>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.0.is_empty() {
            true => None,
            false => Some(self.field().ok_or(Refused::Malformed)),
        }
    }
}

/// Counts elements of a message of this type off `left`.
fn count(message: &[u8], kind: &MessageDescriptor, left: &mut usize) -> Result<(), Refused> {
    for field in Fields(message) {
        let (number, content) = field?;
        let known = kind.field_by_number(number);
        let (elements, inner) = match known.map(|field| field.runtime_field_type()) {
            Some(RuntimeFieldType::Singular(RuntimeType::Message(inner))) => (1, Some(inner)),
            Some(RuntimeFieldType::Singular(_)) => (0, None),
            Some(RuntimeFieldType::Repeated(RuntimeType::Message(inner))) => (1, Some(inner)),
            // Numbers may be packed.
            Some(RuntimeFieldType::Repeated(_)) => (content.map_or(1, <[u8]>::len).max(1), None),
            Some(RuntimeFieldType::Map(..)) | None => (1, None),
        };
        *left = left.checked_sub(elements).ok_or(Refused::TooMany)?;
        if let (Some(inner), Some(content)) = (inner, content) {
            count(content, &inner, left)?;
        }
    }
    Ok(())
}

/// Decodes an answer that is not too much.
fn decode<T: MessageFull>(answer: &[u8]) -> Result<T, Refused> {
    count(answer, &T::descriptor(), &mut MAX_ELEMENTS.clone())?;
    T::parse_from_bytes(answer).map_err(|_| Refused::Malformed)
}

/// Whether a message around an answer has only what the agent sends: a status, which has a code and
/// a text, and the answer.
fn check_envelope(message: &[u8]) -> Result<(), Refused> {
    let mut fields = 0;
    let mut is_known = |most: u32, number: u32| {
        fields += 1;
        match number <= most && fields <= MAX_ENVELOPE_FIELDS {
            true => Ok(()),
            false => Err(Refused::Malformed),
        }
    };
    for field in Fields(message) {
        let (number, content) = field?;
        is_known(2, number)?;
        if number == 1 {
            for field in Fields(content.ok_or(Refused::Malformed)?) {
                is_known(2, field?.0)?;
            }
        }
    }
    Ok(())
}

/// A connection with an agent from which ttrpc reads whole messages that were examined. One that
/// nothing but a hostile guest sends is an error of the connection.
pub struct Envelopes<S> {
    stream: S,
    /// Header and message, as far as they are here.
    frame: Vec<u8>,
    /// Bytes of an examined frame that were passed on.
    given: Option<usize>,
}

impl<S> Envelopes<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            frame: Vec::new(),
            given: None,
        }
    }

    /// How many bytes of the frame are missing. At 0 it was examined.
    fn missing(&self) -> io::Result<usize> {
        let refused = |reason| io::Error::new(io::ErrorKind::InvalidData, reason);
        let Some((header, message)) = self.frame.split_at_checked(MESSAGE_HEADER_LENGTH) else {
            return Ok(MESSAGE_HEADER_LENGTH - self.frame.len());
        };
        let header = MessageHeader::from(header);
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > MESSAGE_LENGTH_MAX || header.type_ != MESSAGE_TYPE_RESPONSE {
            return Err(refused("the guest sent something else than an answer"));
        }
        match length.saturating_sub(message.len()) {
            0 => check_envelope(message)
                .map(|()| 0)
                .map_err(|_| refused("the guest sent an answer with more than an answer has")),
            missing => Ok(missing),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Envelopes<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        task: &mut Task<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut given = loop {
            if let Some(given) = this.given {
                break given;
            }
            match this.missing()? {
                0 => this.given = Some(0),
                missing => {
                    let mut bytes = [0; 4096];
                    let wanted = missing.min(bytes.len());
                    let mut read = ReadBuf::new(&mut bytes[..wanted]);
                    ready!(Pin::new(&mut this.stream).poll_read(task, &mut read))?;
                    if read.filled().is_empty() {
                        return Poll::Ready(Ok(()));
                    }
                    this.frame.extend_from_slice(read.filled());
                }
            }
        };
        let rest = this.frame.get(given..).unwrap_or_default();
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        given += count;
        this.given = Some(given);
        if given == this.frame.len() {
            this.given = None;
            // A large one is not kept.
            this.frame = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Envelopes<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        task: &mut Task<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(task, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(task)
    }

    fn poll_shutdown(self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(task)
    }
}

/// The agent's service, as the generated client, with bounded answers.
#[derive(Clone)]
pub struct BoundedClient(Client);

impl BoundedClient {
    /// On a connection of the agent.
    pub fn new(client: Client) -> Self {
        Self(client)
    }

    async fn call<Q: Message, A: MessageFull>(
        &self,
        method: &str,
        context: CallContext,
        request: &Q,
    ) -> ttrpc::Result<A> {
        let payload = request
            .write_to_bytes()
            .map_err(|error| ttrpc::Error::Others(format!("cannot encode a request: {error}")))?;
        let request = ttrpc::proto::Request {
            service: SERVICE.to_owned(),
            method: method.to_owned(),
            timeout_nano: context.timeout_nano,
            metadata: ttrpc::context::to_pb(context.metadata),
            payload,
            ..Default::default()
        };
        let answer = self.0.request(request).await?;
        decode(&answer.payload).map_err(|refused| {
            let code = ttrpc::Code::RESOURCE_EXHAUSTED;
            ttrpc::Error::RpcStatus(ttrpc::get_status(code, refused.to_string()))
        })
    }
}

macro_rules! methods {
    ($($name:ident: $method:literal, $request:ident => $answer:ident;)*) => {
        impl BoundedClient {
            $(pub async fn $name(
                &self,
                context: CallContext,
                request: &proto::$request,
            ) -> ttrpc::Result<proto::$answer> {
                self.call($method, context, request).await
            })*
        }
    };
}

methods! {
    hello: "Hello", HelloRequest => HelloResponse;
    configure: "Configure", ConfigureRequest => Empty;
    set_network: "SetNetwork", SetNetworkRequest => Empty;
    forward: "Forward", ForwardRequest => Empty;
    resolve: "Resolve", ResolveRequest => Empty;
    create_container: "CreateContainer", CreateContainerRequest => CreateContainerResponse;
    start_container: "StartContainer", StartContainerRequest => Empty;
    delete_container: "DeleteContainer", DeleteContainerRequest => Empty;
    exec: "Exec", ExecRequest => ExecResponse;
    wait: "Wait", ProcessRequest => WaitResponse;
    events: "Events", EventsRequest => EventsResponse;
    signal: "Signal", SignalRequest => Empty;
    resize_terminal: "ResizeTerminal", ResizeTerminalRequest => Empty;
    pause: "Pause", ContainerRequest => Empty;
    resume: "Resume", ContainerRequest => Empty;
    update: "Update", UpdateRequest => Empty;
    update_files: "UpdateFiles", UpdateFilesRequest => Empty;
    stats: "Stats", ContainerRequest => StatsResponse;
    processes: "Processes", ContainerRequest => ProcessesResponse;
    copy_out: "CopyOut", CopyRequest => Empty;
    copy_in: "CopyIn", CopyRequest => Empty;
    shutdown: "Shutdown", Empty => Empty;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// An element without content of a list that is field `number`, `count` times.
    fn empty(number: usize, count: usize) -> Vec<u8> {
        within(number, &[]).repeat(count)
    }

    fn within(number: usize, inner: &[u8]) -> Vec<u8> {
        [varint(number << 3 | 2), varint(inner.len()), inner.to_vec()].concat()
    }

    fn varint(mut value: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while value >= 0x80 {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    }

    #[test]
    fn lists_end_before_the_memory_does() {
        let processes = decode::<proto::ProcessesResponse>(&empty(1, MAX_ELEMENTS)).unwrap();
        assert_eq!(processes.processes.len(), MAX_ELEMENTS);
        let many = MAX_ELEMENTS + 1;
        let refused = [
            decode::<proto::ProcessesResponse>(&empty(1, many)).map(drop),
            decode::<proto::EventsResponse>(&empty(1, many)).map(drop),
            // An exit of an event, again and again.
            decode::<proto::EventsResponse>(&within(1, &empty(3, many))).map(drop),
            // Devices within the metrics.
            decode::<proto::StatsResponse>(&empty(24, many)).map(drop),
            decode::<proto::StatsResponse>(&within(22, &empty(1, many))).map(drop),
            // Fields that this version does not know.
            decode::<proto::Empty>(&empty(1, many)).map(drop),
            decode::<proto::HelloResponse>(&[0x78, 0].repeat(many)).map(drop),
            decode::<proto::ProcessesResponse>(&within(1, &[0x7d, 0, 0, 0, 0].repeat(many)))
                .map(drop),
        ];
        for (index, refused) in refused.into_iter().enumerate() {
            assert_eq!(refused, Err(Refused::TooMany), "{index}");
        }
        assert_eq!(
            Refused::TooMany.to_string(),
            "the guest's answer has more than 65536 elements"
        );
    }

    #[test]
    fn every_answer_is_what_the_agent_sent() {
        let answer = proto::ProcessesResponse {
            processes: (0..300)
                .map(|pid| proto::ProcessInfo {
                    pid,
                    command: "x".repeat(pid as usize),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        };
        assert_eq!(decode(&answer.write_to_bytes().unwrap()), Ok(answer));
        for malformed in [
            &[0x08][..],
            &[0x0b],
            &[0x00, 0x00],
            &[0x0a, 5, 0],
            &[0xff; 11],
        ] {
            let refused = decode::<proto::ProcessesResponse>(malformed);
            assert_eq!(refused, Err(Refused::Malformed), "{malformed:02x?}");
        }
    }

    /// What ttrpc reads when the guest sends this message.
    async fn passed(kind: u8, message: &[u8]) -> io::Result<Vec<u8>> {
        let (guest, host) = tokio::io::duplex(64);
        let mut frame = u32::try_from(message.len()).unwrap().to_be_bytes().to_vec();
        frame.extend([0, 0, 0, 1, kind, 0]);
        frame.extend(message);
        let sending = async {
            let (_, mut guest) = tokio::io::split(guest);
            // Twice; an error ends the connection.
            let _ = guest.write_all(&frame.repeat(2)).await;
        };
        let reading = async {
            let mut host = Envelopes::new(host);
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).await.map(|_| bytes)
        };
        let (read, ()) = tokio::join!(reading, sending);
        read.inspect(|bytes| assert_eq!(*bytes, frame.repeat(2)))
    }

    #[tokio::test]
    async fn only_answers_pass() {
        let mut status = ttrpc::get_status(ttrpc::Code::NOT_FOUND, "no such container");
        let mut answer = ttrpc::proto::Response {
            payload: vec![7; 10_000],
            ..Default::default()
        };
        answer.set_status(status.clone());
        for good in [answer.write_to_bytes().unwrap(), Vec::new()] {
            passed(MESSAGE_TYPE_RESPONSE, &good).await.unwrap();
            passed(3, &good).await.unwrap_err();
        }
        status.details = vec![Default::default(); 3];
        answer.set_status(status);
        let detailed = answer.write_to_bytes().unwrap();
        for bad in [detailed, empty(3, 1), empty(1, 9), within(1, &empty(2, 9))] {
            passed(MESSAGE_TYPE_RESPONSE, &bad).await.unwrap_err();
        }
    }
}
