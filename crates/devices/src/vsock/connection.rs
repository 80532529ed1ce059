//! One stream between a guest socket and a host stream: a state machine over packets and host
//! events.
//!
//! # The protocol, as far as a connection is concerned
//!
//! A connection is named by its host port and its guest port. Packets of the guest come to
//! [`Connection::handle`], readiness of the host stream to [`Connection::host_ready`], and whenever
//! the guest has a receive buffer to fill, [`Connection::transmit`] creates the next packet. The
//! phases:
//!
//! ```text
//!   host connects                        guest connects (REQUEST)
//!        │ sends REQUEST                       │ sends RESPONSE
//!        ▼         RESPONSE arrives            ▼
//!    Connecting ────────────────────────────► Open ── RST or SHUTDOWN(both) arrives ──┐
//!        │                                     │                                      │
//!        │ RST arrives, or timeout             │ both directions are over:            │
//!        ▼                                     │ sends SHUTDOWN(both)                 ▼
//!      gone                                    ▼                            Draining, until
//!                   gone ◄── RST arrives ── Closing                         the guest's data
//!                   or SHUTDOWN(both), or timeout                           is written to the
//!                                                                           host; then gone
//! ```
//!
//! In `Open` each direction ends on its own:
//!
//! | direction | ends by | then |
//! | --- | --- | --- |
//! | to guest | end of file of the host stream | SHUTDOWN(send) is sent: `Ended` |
//! | to guest | SHUTDOWN(receive) of the guest | host stream shut down for reading: `Refused` |
//! | to host | SHUTDOWN(send) of the guest | `Flushing` the backlog, then as below: `Ended` |
//! | to host | the backlog is written | host stream shut down for writing: `Ended` |
//! | to host | the host stream takes no more | SHUTDOWN(receive) is sent: `Refused` |
//!
//! A SHUTDOWN(both) of the guest is answered with RST at once; the guest's ports are free again
//! then, so a Draining connection has no ports. Any packet that does not fit the phase, and data
//! beyond the credit, is answered with RST and ends the connection; bytes received before that are
//! still written to the host.
//!
//! # Back-pressure
//!
//! Guest to host, data that the host stream does not take at once waits in the backlog, which the
//! [`Grant`] bounds; the guest's credit comes back as the backlog drains. Host to guest, nothing is
//! read from the host stream before there is both credit ([`Allowance`]) and a receive buffer, and
//! it is read into that buffer. [`Connection::interest`] says which events of the host stream can
//! lead to progress now; no other is waited for.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use vm_memory::VolatileSlice;

use super::credit::{Allowance, Grant};
use super::packet::{
    GUEST_CID, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Slices,
    TYPE_STREAM, op,
};
use super::stream::HostStream;

/// How long the guest may take to answer a REQUEST.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a REQUEST may wait for the guest to offer a buffer for it, which it does once it has
/// booted.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the guest may take to confirm the end of a connection.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a server of the host may leave unread what a guest has sent before it went.
pub const FOREIGN_TIMEOUT: Duration = Duration::from_secs(30);

/// A backlog keeps at most this much capacity when it is empty.
const IDLE_BACKLOG: usize = 16 << 10;

/// Name of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// Port of the host's end.
    pub host: u32,
    /// Port of the guest's end.
    pub guest: u32,
}

impl Ports {
    /// Header of a packet to the guest, without credit.
    pub fn header(self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host,
            dst_port: self.guest,
            kind: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }
}

/// What happens to a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It continues.
    Keep,
    /// The guest has accepted it.
    Accepted,
    /// It is over, and RST must be sent to the guest.
    Reset(&'static str),
    /// It is over, and the guest knows.
    Over(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Open,
    Closing,
    Draining,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToGuest {
    Flowing,
    Ended,
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ToHost {
    Flowing,
    Flushing,
    Ended,
    Refused,
}

/// Control packets that wait for a receive buffer of the guest. One bit each: none can pile up.
#[derive(Clone, Copy, Debug, Default)]
struct Pending {
    /// The packet that opens the connection, REQUEST or RESPONSE.
    opening: Option<u16>,
    shutdown: bool,
    credit_request: bool,
    credit_update: bool,
}

/// A connection, see the module's documentation.
#[derive(Debug)]
pub struct Connection<S> {
    ports: Ports,
    phase: Phase,
    to_guest: ToGuest,
    to_host: ToHost,
    /// SHUTDOWN flags that the guest has sent so far.
    guest_shutdown: u32,
    /// `None` only in Closing.
    stream: Option<S>,
    /// The host stream may have bytes, or its end, to read.
    readable: bool,
    allowance: Allowance,
    grant: Grant,
    backlog: VecDeque<u8>,
    pending: Pending,
    deadline: Option<Instant>,
}

impl<S: HostStream> Connection<S> {
    /// A connection that the host asks for.
    pub fn outgoing(ports: Ports, stream: S, buffer: u32, now: Instant) -> Self {
        let mut connection = Self::new(ports, stream, buffer, Phase::Connecting, op::REQUEST);
        connection.deadline = Some(now + BOOT_TIMEOUT);
        connection
    }

    /// A connection that the guest asked for with `request`.
    pub fn incoming(ports: Ports, stream: S, buffer: u32, request: &Header) -> Self {
        let mut connection = Self::new(ports, stream, buffer, Phase::Open, op::RESPONSE);
        connection.take_credit(request);
        connection
    }

    fn new(ports: Ports, stream: S, buffer: u32, phase: Phase, opening: u16) -> Self {
        Self {
            ports,
            phase,
            to_guest: ToGuest::Flowing,
            to_host: ToHost::Flowing,
            guest_shutdown: 0,
            stream: Some(stream),
            readable: false,
            allowance: Allowance::default(),
            grant: Grant::new(buffer),
            backlog: VecDeque::new(),
            pending: Pending {
                opening: Some(opening),
                ..Pending::default()
            },
            deadline: None,
        }
    }

    /// Ports of the connection.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// The host's end, while there is one.
    pub fn stream(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// Bound of the backlog.
    pub fn buffer_size(&self) -> u32 {
        self.grant.size()
    }

    /// Bytes of the guest that wait for the host stream.
    pub fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    /// Whether its host stream leads to a server of the host.
    pub fn is_foreign(&self) -> bool {
        self.stream.as_ref().is_some_and(HostStream::is_foreign)
    }

    /// Whether the guest has not answered the REQUEST yet.
    pub fn is_connecting(&self) -> bool {
        self.phase == Phase::Connecting
    }

    /// Whether the REQUEST has not even been sent.
    pub fn is_unsent(&self) -> bool {
        self.is_connecting() && self.pending.opening.is_some()
    }

    /// Whether only the guest's confirmation of the end is missing.
    pub fn is_closing(&self) -> bool {
        self.phase == Phase::Closing
    }

    /// When [`Connection::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// A packet of the guest for this connection; `data` is what the header's `len` covers.
    pub fn handle(&mut self, header: &Header, data: Slices<'_>, now: Instant) -> Verdict {
        self.take_credit(header);
        match (self.phase, header.op) {
            (Phase::Draining, _) => Verdict::Keep,
            (Phase::Connecting, op::RST) => Verdict::Over("the guest refused it"),
            (_, op::RST) => Verdict::Over("the guest reset it"),
            (Phase::Connecting, op::RESPONSE) if self.pending.opening.is_none() => {
                self.phase = Phase::Open;
                self.deadline = None;
                Verdict::Accepted
            }
            (Phase::Connecting, _) => {
                Verdict::Reset("the guest answered it with a packet that is no answer")
            }
            (Phase::Open, op::RW) => self.take_data(data, now),
            (Phase::Open, op::SHUTDOWN) => self.guest_shut_down(header.flags, now),
            (Phase::Open, op::CREDIT_UPDATE) => Verdict::Keep,
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.pending.credit_update = true;
                Verdict::Keep
            }
            (Phase::Closing, op::SHUTDOWN) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                match self.guest_shutdown {
                    SHUTDOWN_BOTH => Verdict::Reset("closed by both sides"),
                    _ => Verdict::Keep,
                }
            }
            // Sent before our SHUTDOWN arrived: there is no receiver any more.
            (Phase::Closing, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST) => Verdict::Keep,
            (Phase::Open | Phase::Closing, _) => {
                Verdict::Reset("the guest sent a packet that has no place here")
            }
        }
    }

    /// The host stream is ready. Returns quickly: reading is left to [`Connection::transmit`].
    pub fn host_ready(&mut self, ready: EventFlags, now: Instant) -> Verdict {
        let hung_up = ready.intersects(EventFlags::HUP | EventFlags::ERR);
        if ready.contains(EventFlags::OUT) || (hung_up && !self.backlog.is_empty()) {
            self.flush();
        }
        match self.phase {
            Phase::Open if self.to_guest == ToGuest::Flowing => {
                // A stream that has hung up still holds its last bytes, and its end.
                self.readable |= hung_up || ready.contains(EventFlags::IN);
            }
            Phase::Open if hung_up => self.refuse_host(),
            Phase::Draining if self.backlog.is_empty() || hung_up => {
                return Verdict::Over("drained");
            }
            _ => {}
        }
        self.close_when_over(now);
        Verdict::Keep
    }

    /// Whether [`Connection::transmit`] may have a packet for the guest.
    pub fn wants_transmit(&self) -> bool {
        let pending = &self.pending;
        match self.phase {
            Phase::Draining => false,
            Phase::Connecting => pending.opening.is_some(),
            Phase::Closing => pending.shutdown || pending.opening.is_some(),
            Phase::Open => {
                pending.opening.is_some()
                    || pending.shutdown
                    || pending.credit_request
                    || pending.credit_update
                    || (self.readable && self.may_read())
            }
        }
    }

    /// Creates the next packet for the guest: writes its data, if any, to `room` and returns its
    /// header.
    pub fn transmit(&mut self, room: &Slices<'_>, now: Instant) -> Option<Header> {
        if !self.wants_transmit() {
            return None;
        }
        if let Some(op) = self.pending.opening.take() {
            if op == op::REQUEST {
                self.deadline = Some(now + CONNECT_TIMEOUT);
            }
            return Some(self.header(op));
        }
        // Set only when there is nothing left to send, or nothing will be taken: it need not wait
        // for data.
        if let Some(header) = self.shutdown_packet() {
            return Some(header);
        }
        if self.readable
            && self.may_read()
            && let Some(len) = self.read(room, now)
        {
            let mut header = self.header(op::RW);
            header.len = len;
            self.pending.credit_request = self.allowance.available() == 0;
            return Some(header);
        }
        // Reading may have found the end.
        if let Some(header) = self.shutdown_packet() {
            return Some(header);
        }
        if std::mem::take(&mut self.pending.credit_request) && self.allowance.available() == 0 {
            return Some(self.header(op::CREDIT_REQUEST));
        }
        if self.pending.credit_update {
            return Some(self.header(op::CREDIT_UPDATE));
        }
        None
    }

    /// The events of the host stream that can lead to progress; `None` when none can, not even its
    /// hang-up.
    ///
    /// Hang-up is reported whether asked for or not, so a stream that could hang up without
    /// consequence now must not be waited for at all.
    pub fn interest(&self) -> Option<EventFlags> {
        let mut interest = EventFlags::empty();
        if !self.backlog.is_empty() {
            interest |= EventFlags::OUT;
        }
        match self.phase {
            Phase::Connecting | Phase::Closing => return None,
            Phase::Draining => {}
            Phase::Open if self.to_guest == ToGuest::Flowing => {
                if self.may_read() && !self.readable {
                    interest |= EventFlags::IN;
                } else if interest.is_empty() {
                    return None;
                }
            }
            // Waits for the hang-up only, which tells the guest that its bytes have no reader any
            // more.
            Phase::Open => {}
        }
        Some(interest)
    }

    /// Ends the connection if its deadline has passed.
    pub fn expire(&mut self, now: Instant) -> Verdict {
        match self.deadline {
            Some(deadline) if deadline <= now => match self.phase {
                Phase::Connecting => Verdict::Reset("the guest did not answer in time"),
                Phase::Draining => Verdict::Over("the server of the host did not read in time"),
                _ => Verdict::Reset("the guest did not confirm the end in time"),
            },
            _ => Verdict::Keep,
        }
    }

    /// The guest has no part in this connection any more. True when bytes of it still have to go to
    /// the host, for which the connection must be kept, nameless; false when it can be dropped.
    pub fn leave_guest(&mut self) -> bool {
        let was_open = self.phase == Phase::Open;
        self.pending = Pending::default();
        self.deadline = None;
        self.phase = Phase::Draining;
        let drains = was_open && !self.backlog.is_empty();
        if drains && self.is_foreign() {
            self.deadline = Some(Instant::now() + FOREIGN_TIMEOUT);
        }
        if drains && self.to_guest == ToGuest::Flowing {
            self.to_guest = ToGuest::Refused;
            if let Some(stream) = self.stream.as_mut() {
                stream.shutdown(Shutdown::Read);
            }
        }
        drains
    }

    /// Discards what the guest has sent and the host has not taken.
    pub fn discard(&mut self) {
        self.refuse_host();
    }

    /// Takes the host's end out, to be dropped. An orderly end follows what was written to it.
    pub fn release(&mut self) -> Option<S> {
        let mut stream = self.stream.take()?;
        if self.to_guest != ToGuest::Ended {
            stream.finish();
        }
        Some(stream)
    }

    fn take_credit(&mut self, header: &Header) {
        self.allowance.update(header.buf_alloc, header.fwd_cnt);
        self.grant.limit(header.buf_alloc);
        // With a smaller buffer of the guest, an update may be worth sending that was not before.
        self.pending.credit_update |= self.grant.worth_announcing();
    }

    fn may_read(&self) -> bool {
        self.to_guest == ToGuest::Flowing && self.allowance.available() > 0
    }

    /// Header of a packet that goes out now, with our credit.
    fn header(&mut self, op: u16) -> Header {
        let (buf_alloc, fwd_cnt) = self.grant.announce();
        self.pending.credit_update = false;
        Header {
            buf_alloc,
            fwd_cnt,
            ..self.ports.header(op)
        }
    }

    fn shutdown_packet(&mut self) -> Option<Header> {
        if !std::mem::take(&mut self.pending.shutdown) {
            return None;
        }
        let mut flags = 0;
        if self.phase == Phase::Closing || self.to_guest == ToGuest::Ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.phase == Phase::Closing || self.to_host == ToHost::Refused {
            flags |= SHUTDOWN_RECEIVE;
        }
        let mut header = self.header(op::SHUTDOWN);
        header.flags = flags;
        Some(header)
    }

    /// Reads from the host into the guest's buffer. `None` when there was nothing to read, or only
    /// the end.
    fn read(&mut self, room: &Slices<'_>, now: Instant) -> Option<u32> {
        let limit = room.len().min(self.allowance.available() as usize);
        let mut into = room.clone();
        into.truncate(limit);
        if limit == 0 {
            return None;
        }
        match self.stream.as_mut()?.receive(into.pieces()) {
            Ok(0) => self.host_ended(now),
            Ok(count) => {
                // The socket's queue is empty if it gave less than requested. If not, its readiness
                // is level-triggered.
                self.readable = count >= limit;
                // `count` is at most the allowance, a `u32`.
                let count = count.min(limit) as u32;
                self.allowance.spend(count);
                return Some(count);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) => {
                tracing::debug!(ports = ?self.ports, %error, "host stream");
                self.refuse_host();
                self.host_ended(now);
            }
        }
        None
    }

    /// The host will send no more.
    fn host_ended(&mut self, now: Instant) {
        self.readable = false;
        self.to_guest = ToGuest::Ended;
        self.pending.shutdown = true;
        self.close_when_over(now);
    }

    /// The host takes no more bytes. What it has not taken is lost, as with any pipe whose reader
    /// is gone.
    fn refuse_host(&mut self) {
        self.forwarded(self.backlog.len());
        self.backlog = VecDeque::new();
        if matches!(self.to_host, ToHost::Flowing | ToHost::Flushing) {
            self.to_host = ToHost::Refused;
            self.pending.shutdown = true;
        }
    }

    fn take_data(&mut self, mut data: Slices<'_>, now: Instant) -> Verdict {
        let accepted = u32::try_from(data.len()).is_ok_and(|len| self.grant.accept(len));
        if !accepted {
            return Verdict::Reset("the guest sent more than its credit");
        }
        match self.to_host {
            ToHost::Flowing => {}
            ToHost::Refused => {
                self.forwarded(data.len());
                return Verdict::Keep;
            }
            ToHost::Flushing | ToHost::Ended if data.is_empty() => return Verdict::Keep,
            ToHost::Flushing | ToHost::Ended => {
                return Verdict::Reset("the guest sent data after it had shut down");
            }
        }
        if self.backlog.is_empty() && !data.is_empty() {
            let sent = match self.stream.as_mut() {
                Some(stream) => stream.send(data.pieces()),
                None => Ok(data.len()),
            };
            match sent {
                Ok(count) => {
                    self.forwarded(count.min(data.len()));
                    data.skip(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.forwarded(data.len());
                    self.refuse_host();
                    self.close_when_over(now);
                    return Verdict::Keep;
                }
            }
        }
        self.keep(&data);
        Verdict::Keep
    }

    /// Appends to the backlog.
    fn keep(&mut self, data: &Slices<'_>) {
        let mut chunk = [0; 4096];
        for piece in data.pieces() {
            let mut at = 0;
            // `at` stays below the piece's length, so `offset` does not fail.
            while let Ok(rest) = piece.offset(at)
                && !rest.is_empty()
            {
                let count = rest.copy_to(&mut chunk[..]);
                self.backlog.extend(&chunk[..count]);
                at += count;
            }
        }
    }

    /// Writes as much of the backlog as the host stream takes.
    fn flush(&mut self) {
        let Some(mut stream) = self.stream.take() else {
            return;
        };
        let mut failed = false;
        while !self.backlog.is_empty() {
            let (front, back) = self.backlog.as_mut_slices();
            match stream.send(&[VolatileSlice::from(front), VolatileSlice::from(back)]) {
                Ok(count) => {
                    let count = count.min(self.backlog.len());
                    self.backlog.drain(..count);
                    self.forwarded(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    failed = true;
                    break;
                }
            }
        }
        self.stream = Some(stream);
        if failed {
            self.refuse_host();
        } else if self.backlog.is_empty() {
            self.backlog.shrink_to(IDLE_BACKLOG);
            if self.to_host == ToHost::Flushing {
                self.end_to_host();
            }
        }
    }

    fn forwarded(&mut self, count: usize) {
        // Never more than the grant's size, a `u32`.
        self.grant.forward(count as u32);
        self.pending.credit_update |= self.grant.worth_announcing();
    }

    fn end_to_host(&mut self) {
        self.to_host = ToHost::Ended;
        if let Some(stream) = self.stream.as_mut() {
            stream.shutdown(Shutdown::Write);
        }
    }

    fn guest_shut_down(&mut self, flags: u32, now: Instant) -> Verdict {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown == SHUTDOWN_BOTH {
            return Verdict::Reset("closed by the guest");
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.to_host == ToHost::Flowing {
            if self.backlog.is_empty() {
                self.end_to_host();
            } else {
                self.to_host = ToHost::Flushing;
            }
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && self.to_guest == ToGuest::Flowing {
            self.to_guest = ToGuest::Refused;
            self.readable = false;
            if let Some(stream) = self.stream.as_mut() {
                stream.shutdown(Shutdown::Read);
            }
        }
        self.close_when_over(now);
        Verdict::Keep
    }

    /// Starts closing once no byte can flow in either direction any more.
    fn close_when_over(&mut self, now: Instant) {
        if self.phase == Phase::Open
            && self.to_guest != ToGuest::Flowing
            && matches!(self.to_host, ToHost::Ended | ToHost::Refused)
        {
            self.phase = Phase::Closing;
            self.pending.shutdown = true;
            self.deadline = Some(now + LINGER_TIMEOUT);
        }
    }
}
