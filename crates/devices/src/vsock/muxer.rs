//! All connections of the device: finds the connection of a packet, and picks the one that fills
//! the guest's next receive buffer.
//!
//! Pure: it knows packets and streams, no queues and no descriptors. The device feeds it packets
//! ([`Muxer::receive`]), stream events ([`Muxer::host_ready`]), the host's commands
//! ([`Muxer::connect`], [`Muxer::listen`]) and receive buffers ([`Muxer::transmit`]), and after
//! each round asks which stream events to wait for ([`Muxer::settle`]).
//!
//! Bounds, whatever the guest does: [`MAX_CONNECTIONS`] connections, each with one place in the
//! ready queue and a backlog within its grant, all grants together within [`MAX_GRANTED`];
//! [`MAX_RESETS`] waiting RST packets, beyond which they are dropped (a guest that waits for one
//! then times out).

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::time::Instant;

use rustix::event::epoll::EventFlags;

use super::connection::{Connection, Ports, Verdict};
use super::packet::{GUEST_CID, HOST_CID, Header, Slices, TYPE_STREAM, op};
use super::stream::HostStream;

/// Connections at a time, including those that only drain.
pub const MAX_CONNECTIONS: usize = 1024;
/// How many of them may lead to servers of the host, which may keep them for long.
pub const MAX_FOREIGN: usize = 512;
/// RST packets that wait for a receive buffer.
pub const MAX_RESETS: usize = 1024;
/// Receive buffer of a connection, as long as there are not very many of them.
pub const LARGE_BUFFER: u32 = 256 << 10;
/// Receive buffer of a connection when there are very many of them.
pub const SMALL_BUFFER: u32 = 32 << 10;
/// All receive buffers together.
pub const MAX_GRANTED: u64 = LARGE_GRANTED + MAX_CONNECTIONS as u64 * SMALL_BUFFER as u64;
/// What is granted in large buffers.
const LARGE_GRANTED: u64 = 32 << 20;

/// Why a connection that the host asked for failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The device has not taken earlier commands yet, or has stopped.
    #[error("cannot connect to vsock port {guest_port}: the device does not take commands")]
    Busy {
        /// Port of the guest.
        guest_port: u32,
    },
    /// See [`MAX_CONNECTIONS`].
    #[error(
        "cannot connect to vsock port {guest_port}: the device has {MAX_CONNECTIONS} connections \
         already"
    )]
    TooMany {
        /// Port of the guest.
        guest_port: u32,
    },
    /// Such a connection exists already.
    #[error(
        "cannot connect to vsock port {guest_port}: host port {host_port} is connected to it \
         already"
    )]
    InUse {
        /// Port of the guest.
        guest_port: u32,
        /// Port of the host.
        host_port: u32,
    },
    /// The guest refused, did not answer, or went away.
    #[error("cannot connect to vsock port {guest_port}: {reason}")]
    Failed {
        /// Port of the guest.
        guest_port: u32,
        /// What happened.
        reason: &'static str,
    },
}

/// What the multiplexer needs from the host.
pub trait Host {
    /// The host's end of a connection.
    type Stream: HostStream;

    /// Names a call of [`Muxer::connect`].
    type Request;

    /// Answers [`Muxer::connect`], exactly once per request.
    fn connected(&mut self, request: Self::Request, result: Result<(), ConnectError>);

    /// The guest connects to a port that is listened on: creates a stream and hands its other end
    /// on. `None` if that is not possible; the guest is refused then.
    fn incoming(&mut self, host_port: u32, guest_port: u32) -> Option<Self::Stream>;
}

/// Names a connection towards the device: never used again, unlike slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(pub u64);

impl Token {
    fn new(slot: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(slot))
    }

    fn slot(self) -> u32 {
        self.0 as u32
    }
}

/// A change of the events waited for on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Not waited for until now.
    Add(EventFlags),
    /// Other events were waited for until now.
    Modify(EventFlags),
    /// No longer waited for.
    Remove,
}

struct Entry<H: Host> {
    connection: Connection<H::Stream>,
    /// The request for it, until it is answered.
    request: Option<H::Request>,
    generation: u32,
    /// Whether it is in `by_ports`.
    named: bool,
    queued: bool,
    touched: bool,
    registered: Option<EventFlags>,
}

/// See the module's documentation.
pub struct Muxer<H: Host> {
    host: H,
    entries: Vec<Option<Entry<H>>>,
    free: Vec<u32>,
    generation: u32,
    by_ports: HashMap<Ports, u32>,
    listening: HashSet<u32>,
    /// Connections that may have a packet for the guest, in turn.
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    /// Connections whose interest may have changed.
    touched: Vec<u32>,
    /// Streams that are no longer needed but may still be registered.
    retired: Vec<(H::Stream, bool)>,
    granted: u64,
    /// Not later than the earliest deadline of a connection.
    deadline: Option<Instant>,
}

impl<H: Host> Muxer<H> {
    /// A multiplexer without connections, listening nowhere.
    pub fn new(host: H) -> Self {
        Self {
            host,
            entries: Vec::new(),
            free: Vec::new(),
            generation: 0,
            by_ports: HashMap::new(),
            listening: HashSet::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            retired: Vec::new(),
            granted: 0,
            deadline: None,
        }
    }

    /// Whether bytes of the guest wait for the host's ends, but for those that lead to servers of
    /// the host.
    pub fn has_backlog(&self) -> bool {
        let mut connections = self.entries.iter().flatten().map(|entry| &entry.connection);
        connections.any(|connection| connection.backlog_len() > 0 && !connection.is_foreign())
    }

    /// Connections to servers of the host.
    fn foreign(&self) -> usize {
        let connections = self.entries.iter().flatten();
        connections
            .filter(|entry| entry.connection.is_foreign())
            .count()
    }

    /// The ports that the guest can connect to, in order.
    pub fn listening(&self) -> Vec<u32> {
        let mut ports: Vec<_> = self.listening.iter().copied().collect();
        ports.sort_unstable();
        ports
    }

    /// Resets every connection of host port `port`.
    pub fn cut(&mut self, port: u32) {
        for slot in 0..self.entries.len() as u32 {
            let is_meant =
                |entry: &mut Entry<H>| entry.named && entry.connection.ports().host == port;
            if self.entry(slot).is_some_and(is_meant) {
                self.conclude(slot, Verdict::Reset("cut by the host"));
            }
        }
    }

    /// Lets the guest connect to `port` of the host.
    pub fn listen(&mut self, port: u32) {
        self.listening.insert(port);
    }

    /// Connects `stream` to `ports.guest` of the guest; [`Host::connected`] gets the result.
    pub fn connect(
        &mut self,
        request: H::Request,
        ports: Ports,
        mut stream: H::Stream,
        now: Instant,
    ) {
        let refusal = if self.by_ports.contains_key(&ports) {
            ConnectError::InUse {
                guest_port: ports.guest,
                host_port: ports.host,
            }
        } else if self.count() >= MAX_CONNECTIONS
            || (stream.is_foreign() && self.foreign() >= MAX_FOREIGN)
        {
            ConnectError::TooMany {
                guest_port: ports.guest,
            }
        } else {
            let connection = Connection::outgoing(ports, stream, self.buffer_size(), now);
            self.insert(connection, Some(request));
            return;
        };
        stream.finish();
        self.host.connected(request, Err(refusal));
    }

    /// A packet of the guest. `data` is what the header's `len` covers, or `None` when the packet
    /// was shorter than that.
    pub fn receive(&mut self, header: &Header, data: Option<Slices<'_>>, now: Instant) {
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            tracing::debug!(?header, "vsock packet between others dropped");
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        if header.kind != TYPE_STREAM {
            // Connections of another type cannot exist here, so this refers to none of ours.
            self.reset(header, ports);
            return;
        }
        let known = self.by_ports.get(&ports).copied();
        match known {
            Some(slot) if header.op == op::REQUEST && self.is_closing(slot) => {
                // The guest has forgotten the old connection and uses its port again.
                self.finish(slot, "replaced by a new one");
                self.accept(header, ports);
            }
            Some(slot) => {
                let verdict = match (data, self.connection(slot)) {
                    (Some(data), Some(connection)) => connection.handle(header, data, now),
                    _ => Verdict::Reset("the guest sent a truncated packet"),
                };
                self.conclude(slot, verdict);
            }
            None if header.op == op::REQUEST => self.accept(header, ports),
            None => self.reset(header, ports),
        }
    }

    /// A registered stream is ready.
    pub fn host_ready(&mut self, token: Token, ready: EventFlags, now: Instant) {
        let slot = token.slot();
        if let Some(entry) = self.entry(slot)
            && Token::new(slot, entry.generation) == token
        {
            let verdict = entry.connection.host_ready(ready, now);
            self.conclude(slot, verdict);
        }
    }

    /// Whether [`Muxer::transmit`] may have a packet. It may have none after all.
    pub fn wants_transmit(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest: its data, if any, has been put into `room`.
    pub fn transmit(&mut self, room: &Slices<'_>, now: Instant) -> Option<Header> {
        if let Some(header) = self.resets.pop_front() {
            return Some(header);
        }
        while let Some(slot) = self.ready.pop_front() {
            let Some(entry) = self.entry(slot) else {
                continue;
            };
            entry.queued = false;
            let packet = entry.connection.transmit(room, now);
            self.conclude(slot, Verdict::Keep);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// When [`Muxer::expire`] should be called at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends connections that have waited too long.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| deadline > now) {
            return;
        }
        self.deadline = None;
        for slot in 0..self.entries.len() as u32 {
            if let Some(connection) = self.connection(slot) {
                let verdict = connection.expire(now);
                self.conclude(slot, verdict);
            }
        }
    }

    /// The driver has reset the device: all its sockets are gone. Requests that it has not seen
    /// yet, and listening ports, stay.
    pub fn guest_gone(&mut self) {
        self.resets.clear();
        for slot in 0..self.entries.len() as u32 {
            let was_known = |entry: &mut Entry<H>| entry.named && !entry.connection.is_unsent();
            if self.entry(slot).is_some_and(was_known) {
                self.finish(slot, "the guest went away");
            }
        }
    }

    /// Passes changes of what to wait for to `apply`. If that fails, the connection is reset.
    pub fn settle(&mut self, mut apply: impl FnMut(&H::Stream, Token, Change) -> io::Result<()>) {
        while let Some(slot) = self.touched.pop() {
            let Some(Some(entry)) = self.entries.get_mut(slot as usize) else {
                continue;
            };
            entry.touched = false;
            let token = Token::new(slot, entry.generation);
            if entry.connection.is_closing()
                && let Some(stream) = entry.connection.release()
            {
                self.retired
                    .push((stream, entry.registered.take().is_some()));
            }
            let wanted = entry.connection.interest();
            let change = match (entry.registered, wanted) {
                (before, after) if before == after => continue,
                (_, None) => Change::Remove,
                (None, Some(flags)) => Change::Add(flags),
                (Some(_), Some(flags)) => Change::Modify(flags),
            };
            let Some(stream) = entry.connection.stream() else {
                continue;
            };
            match apply(stream, token, change) {
                Ok(()) => entry.registered = wanted,
                Err(error) => {
                    tracing::warn!(%error, "cannot wait for a host stream");
                    entry.connection.discard();
                    self.conclude(slot, Verdict::Reset("its host stream failed"));
                }
            }
        }
        for (stream, registered) in self.retired.drain(..) {
            if registered && let Err(error) = apply(&stream, Token(u64::MAX), Change::Remove) {
                tracing::warn!(%error, "cannot stop waiting for a host stream");
            }
        }
    }

    /// Connections, including those that only drain.
    pub fn count(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// All receive buffers of connections together.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// The largest backlog of a connection.
    #[cfg(test)]
    pub fn largest_backlog(&self) -> usize {
        let entries = self.entries.iter().flatten();
        entries
            .map(|entry| entry.connection.backlog_len())
            .max()
            .unwrap_or(0)
    }

    fn buffer_size(&self) -> u32 {
        if self.granted + u64::from(LARGE_BUFFER) <= LARGE_GRANTED {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    fn entry(&mut self, slot: u32) -> Option<&mut Entry<H>> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    fn connection(&mut self, slot: u32) -> Option<&mut Connection<H::Stream>> {
        self.entry(slot).map(|entry| &mut entry.connection)
    }

    fn is_closing(&mut self, slot: u32) -> bool {
        self.connection(slot)
            .is_some_and(|connection| connection.is_closing())
    }

    /// The guest asks for a connection.
    fn accept(&mut self, header: &Header, ports: Ports) {
        if !self.listening.contains(&ports.host) || self.count() >= MAX_CONNECTIONS {
            self.reset(header, ports);
            return;
        }
        let Some(stream) = self.host.incoming(ports.host, ports.guest) else {
            self.reset(header, ports);
            return;
        };
        let connection = Connection::incoming(ports, stream, self.buffer_size(), header);
        self.insert(connection, None);
    }

    fn insert(&mut self, connection: Connection<H::Stream>, request: Option<H::Request>) {
        self.generation = self.generation.wrapping_add(1);
        self.granted += u64::from(connection.buffer_size());
        let ports = connection.ports();
        let entry = Entry {
            connection,
            request,
            generation: self.generation,
            named: true,
            queued: false,
            touched: false,
            registered: None,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = Some(entry);
                slot
            }
            None => {
                self.entries.push(Some(entry));
                (self.entries.len() - 1) as u32
            }
        };
        self.by_ports.insert(ports, slot);
        self.conclude(slot, Verdict::Keep);
    }

    /// Answers a packet that belongs to no connection.
    fn reset(&mut self, header: &Header, ports: Ports) {
        if header.op == op::RST {
            return;
        }
        let mut answer = ports.header(op::RST);
        answer.kind = header.kind;
        self.push_reset(answer);
    }

    fn push_reset(&mut self, header: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(header);
        } else {
            tracing::debug!(?header, "too many vsock resets are waiting, one dropped");
        }
    }

    /// Applies the verdict on a connection, and records what the connection needs next.
    fn conclude(&mut self, slot: u32, verdict: Verdict) {
        let Some(entry) = self.entries.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        match verdict {
            Verdict::Keep => {}
            Verdict::Accepted => {
                if let Some(request) = entry.request.take() {
                    self.host.connected(request, Ok(()));
                }
            }
            Verdict::Reset(reason) => {
                if entry.named {
                    let answer = entry.connection.ports().header(op::RST);
                    self.push_reset(answer);
                }
                return self.finish(slot, reason);
            }
            Verdict::Over(reason) => return self.finish(slot, reason),
        }
        if !entry.queued && entry.connection.wants_transmit() {
            entry.queued = true;
            self.ready.push_back(slot);
        }
        if !entry.touched {
            entry.touched = true;
            self.touched.push(slot);
        }
        if let Some(deadline) = entry.connection.deadline() {
            self.deadline = Some(self.deadline.map_or(deadline, |first| first.min(deadline)));
        }
    }

    /// Ends the guest's part of a connection, and the connection itself unless bytes of it still go
    /// to the host.
    fn finish(&mut self, slot: u32, reason: &'static str) {
        let Some(entry) = self.entries.get_mut(slot as usize).and_then(Option::as_mut) else {
            return;
        };
        let ports = entry.connection.ports();
        tracing::debug!(?ports, reason, "vsock connection over");
        if entry.named {
            entry.named = false;
            self.by_ports.remove(&ports);
        }
        if let Some(request) = entry.request.take() {
            let guest_port = ports.guest;
            self.host
                .connected(request, Err(ConnectError::Failed { guest_port, reason }));
        }
        if entry.queued {
            entry.queued = false;
            self.ready.retain(|other| *other != slot);
        }
        if entry.connection.leave_guest() {
            return self.conclude(slot, Verdict::Keep);
        }
        if entry.touched {
            self.touched.retain(|other| *other != slot);
        }
        self.granted -= u64::from(entry.connection.buffer_size());
        let registered = entry.registered.is_some();
        if let Some(stream) = entry.connection.release() {
            self.retired.push((stream, registered));
        }
        self.entries[slot as usize] = None;
        self.free.push(slot);
    }
}
