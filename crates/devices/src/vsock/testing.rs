//! A small world for tests: streams backed by queues, a guest that keeps the protocol, and a
//! level-triggered poll.
//!
//! Each byte depends on its position, so a lost, repeated or reordered byte is seen where it
//! arrives. Only tests use this.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use vm_memory::VolatileSlice;

use super::connection::Ports;
use super::muxer::{Change, ConnectError, Host, Muxer, Token};
use super::packet::{
    GUEST_CID, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Slices,
    TYPE_STREAM, op,
};
use super::stream::HostStream;

/// A socketpair: the device has one end ([`MockStream`]), the test the other.
#[derive(Debug, Default)]
pub struct Pipe {
    pub to_host: VecDeque<u8>,
    pub from_host: VecDeque<u8>,
    /// Bytes that fit in each direction.
    pub capacity: usize,
    pub host_closed: bool,
    pub host_shut_write: bool,
    pub device_shut_write: bool,
    pub device_shut_read: bool,
    pub device_closed: bool,
}

impl Pipe {
    fn device_readable(&self) -> bool {
        !self.from_host.is_empty()
            || self.host_closed
            || self.host_shut_write
            || self.device_shut_read
    }

    fn device_writable(&self) -> bool {
        self.to_host.len() < self.capacity || self.host_closed || self.device_shut_write
    }

    fn hung_up(&self) -> bool {
        self.host_closed
            || ((self.host_shut_write || self.device_shut_read) && self.device_shut_write)
    }

    /// Result of poll for the device; a hang-up is always reported.
    pub fn ready(&self, interest: EventFlags) -> EventFlags {
        let mut ready = EventFlags::empty();
        ready.set(EventFlags::IN, self.device_readable());
        ready.set(EventFlags::OUT, self.device_writable());
        ready &= interest;
        ready.set(EventFlags::HUP, self.hung_up());
        ready
    }

    /// Whether the host sees the end of what comes from the device.
    pub fn host_at_end(&self) -> bool {
        self.to_host.is_empty() && (self.device_shut_write || self.device_closed)
    }
}

pub type Shared = Rc<RefCell<Pipe>>;

#[derive(Debug)]
pub struct MockStream(pub Shared);

impl HostStream for MockStream {
    fn receive(&mut self, into: &[VolatileSlice<'_, ()>]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.from_host.is_empty() {
            return if pipe.device_readable() {
                Ok(0)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            };
        }
        let mut count = 0;
        for slice in into {
            let take = slice.len().min(pipe.from_host.len());
            let bytes: Vec<u8> = pipe.from_host.drain(..take).collect();
            slice.copy_from(&bytes);
            count += take;
        }
        Ok(count)
    }

    fn send(&mut self, from: &[VolatileSlice<'_, ()>]) -> io::Result<usize> {
        let mut pipe = self.0.borrow_mut();
        if pipe.host_closed || pipe.device_shut_write {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut count = 0;
        for slice in from {
            let take = slice.len().min(pipe.capacity - pipe.to_host.len());
            let mut bytes = vec![0; take];
            slice.copy_to(&mut bytes);
            pipe.to_host.extend(bytes);
            count += take;
        }
        if count == 0 && from.iter().any(|slice| !slice.is_empty()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }

    fn shutdown(&mut self, how: Shutdown) {
        let mut pipe = self.0.borrow_mut();
        pipe.device_shut_read |= how != Shutdown::Write;
        pipe.device_shut_write |= how != Shutdown::Read;
    }

    fn finish(&mut self) {
        self.shutdown(Shutdown::Both);
        self.0.borrow_mut().from_host.clear();
    }
}

impl Drop for MockStream {
    fn drop(&mut self) {
        self.0.borrow_mut().device_closed = true;
    }
}

/// Calls of the device to its host, and settings of the host.
#[derive(Debug, Default)]
pub struct Notes {
    pub answers: Vec<(usize, Result<(), ConnectError>)>,
    pub incoming: Vec<(u32, u32, Shared)>,
    pub capacity: usize,
    pub refuse_incoming: bool,
}

#[derive(Clone, Debug, Default)]
pub struct MockHost(pub Rc<RefCell<Notes>>);

impl Host for MockHost {
    type Stream = MockStream;
    type Request = usize;

    fn connected(&mut self, request: usize, result: Result<(), ConnectError>) {
        self.0.borrow_mut().answers.push((request, result));
    }

    fn incoming(&mut self, host_port: u32, guest_port: u32) -> Option<MockStream> {
        let mut notes = self.0.borrow_mut();
        if notes.refuse_incoming {
            return None;
        }
        let pipe = pipe(notes.capacity);
        notes.incoming.push((host_port, guest_port, pipe.clone()));
        Some(MockStream(pipe))
    }
}

pub fn pipe(capacity: usize) -> Shared {
    Rc::new(RefCell::new(Pipe {
        capacity,
        ..Pipe::default()
    }))
}

/// The byte at a position of a stream; the streams of one connection differ, too.
pub fn pattern(seed: usize, position: usize) -> u8 {
    (position.wrapping_mul(31) ^ (position >> 8) ^ seed.wrapping_mul(101)) as u8
}

/// A packet from the guest.
pub fn guest_packet(ports: Ports, op: u16) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: ports.guest,
        dst_port: ports.host,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 1 << 16,
        ..Header::default()
    }
}

/// The multiplexer with a poll around it.
pub struct World {
    pub muxer: Muxer<MockHost>,
    pub notes: Rc<RefCell<Notes>>,
    pub registered: HashMap<u64, (Shared, EventFlags)>,
    pub now: Instant,
}

impl World {
    pub fn new(capacity: usize) -> Self {
        let host = MockHost::default();
        host.0.borrow_mut().capacity = capacity;
        Self {
            notes: host.0.clone(),
            muxer: Muxer::new(host),
            registered: HashMap::new(),
            now: Instant::now(),
        }
    }

    /// The guest sends a packet.
    pub fn send(&mut self, mut header: Header, mut data: Vec<u8>) {
        header.len = data.len() as u32;
        let mut slices = Slices::default();
        let middle = data.len() / 3;
        let (front, back) = data.split_at_mut(middle);
        slices.push(VolatileSlice::from(front));
        slices.push(VolatileSlice::from(back));
        self.muxer.receive(&header, Some(slices), self.now);
    }

    /// The guest offers a buffer for `room` bytes of data.
    pub fn offer(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut data = vec![0; room];
        let mut slices = Slices::default();
        slices.push(VolatileSlice::from(data.as_mut_slice()));
        let header = self.muxer.transmit(&slices, self.now)?;
        data.truncate(header.len as usize);
        Some((header, data))
    }

    /// Every packet that the device has, with large buffers.
    pub fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let packets = std::iter::from_fn(|| self.offer(1 << 16)).collect();
        self.settle();
        packets
    }

    pub fn ops(&mut self) -> Vec<u16> {
        self.packets().iter().map(|(header, _)| header.op).collect()
    }

    pub fn settle(&mut self) {
        let registered = &mut self.registered;
        self.muxer.settle(|stream, token, change| {
            let same = |shared: &Shared| Rc::ptr_eq(shared, &stream.0);
            match change {
                Change::Add(flags) => {
                    assert!(
                        !registered.values().any(|(shared, _)| same(shared)),
                        "added twice"
                    );
                    registered.insert(token.0, (stream.0.clone(), flags));
                }
                Change::Modify(flags) => {
                    let entry = registered.get_mut(&token.0).unwrap();
                    assert!(same(&entry.0) && entry.1 != flags);
                    entry.1 = flags;
                }
                Change::Remove => {
                    let before = registered.len();
                    registered.retain(|_, (shared, _)| !same(shared));
                    assert_eq!(registered.len(), before - 1, "removed but not registered");
                }
            }
            Ok(())
        });
    }

    /// Reports what is ready, as a level-triggered poll would. False when nothing is.
    pub fn poll(&mut self) -> bool {
        let mut ready: Vec<(u64, EventFlags)> = self
            .registered
            .iter()
            .map(|(token, (pipe, interest))| (*token, pipe.borrow().ready(*interest)))
            .filter(|(_, flags)| !flags.is_empty())
            .collect();
        ready.sort_by_key(|(token, _)| *token);
        for (token, flags) in &ready {
            self.muxer.host_ready(Token(*token), *flags, self.now);
        }
        self.settle();
        !ready.is_empty()
    }
}

/// One socket of a guest that keeps the protocol, as the Linux driver does.
#[derive(Debug)]
pub struct GuestSocket {
    pub ports: Ports,
    pub seed: usize,
    pub connected: bool,
    /// No packet is sent or expected any more.
    pub dead: bool,
    pub sent: usize,
    peer_alloc: u32,
    peer_fwd: u32,
    buffer: usize,
    queue: VecDeque<u8>,
    pub received: usize,
    pub consumed: usize,
    pub my_shutdown: u32,
    pub peer_shutdown: u32,
    closed: bool,
}

impl GuestSocket {
    pub fn new(ports: Ports, seed: usize, buffer: usize) -> Self {
        Self {
            ports,
            seed,
            connected: false,
            dead: false,
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            buffer,
            queue: VecDeque::new(),
            received: 0,
            consumed: 0,
            my_shutdown: 0,
            peer_shutdown: 0,
            closed: false,
        }
    }

    pub fn header(&self, op: u16) -> Header {
        Header {
            buf_alloc: self.buffer as u32,
            fwd_cnt: self.consumed as u32,
            ..guest_packet(self.ports, op)
        }
    }

    pub fn may_send(&self) -> bool {
        self.connected
            && !self.dead
            && self.my_shutdown & SHUTDOWN_SEND == 0
            && self.peer_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Sends up to `count` bytes, as many as the credit allows.
    pub fn write(&mut self, world: &mut World, count: usize) {
        // Linux sends no more ahead than its own receive buffer holds.
        let window = self.peer_alloc.min(self.buffer as u32);
        let in_flight = (self.sent as u32).wrapping_sub(self.peer_fwd);
        let count = count.min(window.saturating_sub(in_flight) as usize);
        if count == 0 || !self.may_send() {
            return;
        }
        let data = (self.sent..self.sent + count)
            .map(|at| pattern(self.seed, at))
            .collect();
        self.sent += count;
        world.send(self.header(op::RW), data);
    }

    /// The application sets the size of its buffer, which Linux announces to the peer.
    pub fn resize(&mut self, world: &mut World, buffer: usize) {
        if self.connected && !self.dead {
            // What it holds must still fit.
            self.buffer = buffer.max(self.queue.len());
            world.send(self.header(op::CREDIT_UPDATE), Vec::new());
        }
    }

    /// The application reads; sends a credit update when that emptied the queue, as Linux does.
    pub fn read(&mut self, world: &mut World, count: usize) {
        let count = count.min(self.queue.len());
        for byte in self.queue.drain(..count) {
            assert_eq!(
                byte,
                pattern(self.seed + 1, self.consumed),
                "wrong byte at {}",
                self.consumed
            );
            self.consumed += 1;
        }
        if count > 0 && self.queue.is_empty() && !self.dead {
            world.send(self.header(op::CREDIT_UPDATE), Vec::new());
        }
    }

    pub fn shutdown(&mut self, world: &mut World, flags: u32) {
        if !self.connected || self.dead || flags & !self.my_shutdown == 0 {
            return;
        }
        self.my_shutdown |= flags;
        let mut header = self.header(op::SHUTDOWN);
        header.flags = self.my_shutdown;
        world.send(header, Vec::new());
    }

    /// The application closes its socket.
    pub fn close(&mut self, world: &mut World) {
        if !self.connected || self.dead || self.closed {
            return;
        }
        self.closed = true;
        if self.peer_shutdown == SHUTDOWN_BOTH {
            world.send(self.header(op::RST), Vec::new());
            self.dead = true;
        } else {
            self.shutdown(world, SHUTDOWN_BOTH);
        }
    }

    /// Takes a packet of the device.
    pub fn take(&mut self, world: &mut World, header: &Header, data: &[u8]) {
        assert_eq!(
            (header.src_cid, header.dst_cid, header.kind),
            (HOST_CID, GUEST_CID, TYPE_STREAM)
        );
        assert!(
            !self.dead || header.op == op::RST,
            "{header:?} after the end"
        );
        if header.op != op::RST {
            self.peer_alloc = header.buf_alloc;
            self.peer_fwd = header.fwd_cnt;
        }
        match header.op {
            op::REQUEST => {
                assert!(!self.connected);
                self.connected = true;
                world.send(self.header(op::RESPONSE), Vec::new());
            }
            op::RESPONSE => {
                assert!(!self.connected);
                self.connected = true;
            }
            op::RST => self.dead = true,
            op::RW => {
                assert!(!data.is_empty());
                assert_eq!(self.peer_shutdown & SHUTDOWN_SEND, 0, "data after its end");
                self.received += data.len();
                self.queue.extend(data);
                assert!(
                    self.queue.len() <= self.buffer,
                    "more than the guest's buffer"
                );
                if self.my_shutdown & SHUTDOWN_RECEIVE != 0 {
                    self.queue.clear();
                }
            }
            op::SHUTDOWN => {
                self.peer_shutdown |= header.flags;
                if self.peer_shutdown == SHUTDOWN_BOTH && (self.queue.is_empty() || self.closed) {
                    world.send(self.header(op::RST), Vec::new());
                    self.dead = true;
                }
            }
            op::CREDIT_REQUEST => world.send(self.header(op::CREDIT_UPDATE), Vec::new()),
            op::CREDIT_UPDATE => {}
            other => panic!("operation {other}"),
        }
    }
}
