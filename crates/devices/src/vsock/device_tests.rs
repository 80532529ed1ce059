//! Tests of the device through its queues, with a handwritten driver and real sockets.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::connection::Ports;
use super::muxer::ConnectError;
use super::packet::{HEADER_SIZE, Header, op};
use super::stream::Socket;
use super::testing::guest_packet;
use super::{EVENTS, Handle, Incoming, RX, TX, Vsock};
use crate::device::{Device, DeviceError, EventRegistry, Memory, Queues, Ring};
use crate::testing::TestRing;

const MEMORY: usize = 1 << 20;
const SIZE: u16 = 16;
/// Where buffers start; the rings are below.
const BUFFERS: u64 = 0x2_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The device with a driver that writes the rings itself.
struct Guest {
    device: Vsock,
    handle: Handle,
    incoming: Receiver<Incoming>,
    events: EventRegistry,
    memory: Memory,
    queues: Vec<Arc<TestRing>>,
    rings: Vec<Arc<dyn Ring>>,
    available: [u16; 3],
    seen: [u16; 3],
}

impl Guest {
    fn new() -> Self {
        let (sender, incoming) = channel();
        let (mut device, handle) =
            Vsock::new(Box::new(move |event| sender.send(event).unwrap())).unwrap();
        let events = EventRegistry::new().unwrap();
        device.register(events.clone()).unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let queues: Vec<_> = (0..3)
            .map(|index| {
                let mut queue = Queue::new(SIZE).unwrap();
                queue.set_size(SIZE);
                let base = index * 0x1000;
                queue.set_desc_table_address(Some(base), None);
                queue.set_avail_ring_address(Some(base + 0x400), None);
                queue.set_used_ring_address(Some(base + 0x800), None);
                Arc::new(TestRing(Mutex::new(queue)))
            })
            .collect();
        Self {
            device,
            handle,
            incoming,
            events,
            memory,
            rings: queues
                .iter()
                .map(|queue| queue.clone() as Arc<dyn Ring>)
                .collect(),
            queues,
            available: [0; 3],
            seen: [0; 3],
        }
    }

    fn ready(mut self) -> Self {
        for queue in &self.queues {
            queue.0.lock().unwrap().set_ready(true);
        }
        self.kick(RX);
        self.kick(TX);
        self
    }

    /// Writes a descriptor of a queue's table.
    fn describe(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(queue as u64 * 0x1000 + u64::from(index) * 16);
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    fn publish(&mut self, queue: usize, head: u16) {
        let ring = queue as u64 * 0x1000 + 0x400;
        let slot = u64::from(self.available[queue] % SIZE);
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory
            .write_obj(head, GuestAddress(ring + 4 + slot * 2))
            .unwrap();
        self.memory
            .write_obj(self.available[queue], GuestAddress(ring + 2))
            .unwrap();
    }

    /// Makes a chain of pieces available, from the first descriptor on.
    fn offer(&mut self, queue: usize, pieces: &[(u64, u32)]) {
        let write = if queue == TX { 0 } else { WRITE };
        for (index, (addr, len)) in pieces.iter().enumerate() {
            let next = if index + 1 < pieces.len() { NEXT } else { 0 };
            self.describe(
                queue,
                index as u16,
                *addr,
                *len,
                write | next,
                index as u16 + 1,
            );
        }
        self.publish(queue, 0);
    }

    /// Used chains since the last call: head and length.
    fn used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = queue as u64 * 0x1000 + 0x800;
        let end: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut used = Vec::new();
        while self.seen[queue] != end {
            let at = ring + 4 + u64::from(self.seen[queue] % SIZE) * 8;
            let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
            used.push((read(at), read(at + 4)));
            self.seen[queue] = self.seen[queue].wrapping_add(1);
        }
        used
    }

    fn kick(&mut self, queue: usize) {
        self.try_kick(queue).unwrap();
    }

    fn try_kick(&mut self, queue: usize) -> Result<(), DeviceError> {
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        self.device.queue_event(queue, &mut queues)
    }

    fn run(&mut self) {
        self.try_run().unwrap();
    }

    /// Lets the device handle its ready descriptors, until none is ready.
    fn try_run(&mut self) -> Result<(), DeviceError> {
        for _ in 0..1000 {
            let mut ready = Vec::new();
            self.events.poll(&mut ready).unwrap();
            if ready.is_empty() {
                return Ok(());
            }
            for (token, flags) in ready {
                let mut queues = Queues::new(&self.rings, self.memory.clone());
                self.device.host_event(token, flags, &mut queues)?;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Sends a packet, cut into pieces of these lengths; the last one takes the rest.
    fn send(&mut self, mut header: Header, data: &[u8], cuts: &[usize]) {
        header.len = data.len() as u32;
        let mut bytes = header.to_bytes().to_vec();
        bytes.extend(data);
        let (mut at, mut addr, mut pieces) = (0, BUFFERS, Vec::new());
        for cut in cuts.iter().copied().chain([bytes.len()]) {
            let end = bytes.len().min(at + cut);
            self.memory
                .write_slice(&bytes[at..end], GuestAddress(addr))
                .unwrap();
            pieces.push((addr, (end - at) as u32));
            // The pieces are apart in memory.
            addr += (end - at) as u64 + 100;
            at = end;
        }
        self.offer(TX, &pieces);
        self.kick(TX);
        assert_eq!(self.used(TX), [(0, 0)]);
    }

    /// Offers a receive buffer of these pieces and returns the packet that comes in it.
    fn receive(&mut self, lens: &[u32]) -> Option<(Header, Vec<u8>)> {
        let mut addr = BUFFERS + 0x8_0000;
        let mut pieces = Vec::new();
        for len in lens {
            pieces.push((addr, *len));
            addr += u64::from(*len) + 64;
        }
        self.offer(RX, &pieces);
        self.kick(RX);
        self.run();
        let used = self.used(RX);
        let (_, len) = used.first()?;
        let mut bytes = Vec::new();
        for (addr, len) in pieces {
            let mut piece = vec![0; len as usize];
            self.memory
                .read_slice(&mut piece, GuestAddress(addr))
                .unwrap();
            bytes.extend(piece);
        }
        bytes.truncate(*len as usize);
        let data = bytes.split_off(HEADER_SIZE);
        Some((Header::parse(bytes.as_slice().try_into().unwrap()), data))
    }
}

const PORTS: Ports = Ports {
    host: 40,
    guest: 50,
};

/// A guest with a connection that it asked for itself.
fn connected() -> (Guest, UnixStream) {
    let mut guest = Guest::new().ready();
    guest
        .handle
        .listen(PORTS.host, Box::new(|done| done.unwrap()));
    guest.run();
    guest.send(guest_packet(PORTS, op::REQUEST), &[], &[]);
    let incoming = guest.incoming.try_recv().unwrap();
    assert_eq!((incoming.port, incoming.guest_port), (40, 50));
    let (answer, _) = guest.receive(&[4096]).unwrap();
    assert_eq!(
        (answer.op, answer.src_port, answer.dst_port),
        (op::RESPONSE, 40, 50)
    );
    (guest, UnixStream::from(incoming.stream))
}

/// The guest connects again, to the same port.
fn connect_again(guest: &mut Guest) -> UnixStream {
    let ports = Ports {
        guest: PORTS.guest + 1,
        ..PORTS
    };
    guest.send(guest_packet(ports, op::REQUEST), &[], &[]);
    let stream = guest.incoming.try_recv().unwrap().stream;
    assert_eq!(guest.receive(&[4096]).unwrap().0.op, op::RESPONSE);
    UnixStream::from(stream)
}

#[test]
fn a_cut_connection_ends_on_both_sides_and_no_other_does() {
    let (mut guest, mut stream) = connected();
    guest.send(guest_packet(PORTS, op::RW), b"sent before", &[]);
    guest.handle.cut(99, Box::new(|done| done.unwrap()));
    guest.run();
    guest.send(guest_packet(PORTS, op::RW), b", and after", &[]);
    guest.handle.cut(PORTS.host, Box::new(|done| done.unwrap()));
    guest.run();
    let (answer, _) = guest.receive(&[4096]).unwrap();
    assert_eq!((answer.op, answer.dst_port), (op::RST, PORTS.guest));
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(all, "sent before, and after");
    connect_again(&mut guest).write_all(b"x").unwrap();
    assert_eq!(guest.receive(&[4096]).unwrap().1, b"x");
}

#[test]
fn a_transport_reset_ends_all_connections_and_tells_the_driver() {
    let (mut guest, mut stream) = connected();
    guest.send(guest_packet(PORTS, op::RW), b"sent before", &[]);
    guest.handle.reset_transport(Box::new(|done| done.unwrap()));
    guest.run();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(all, "sent before");
    // The event waits for a buffer.
    guest.memory.write_obj(7u64, GuestAddress(BUFFERS)).unwrap();
    guest.offer(EVENTS, &[(BUFFERS, 4)]);
    guest.kick(EVENTS);
    assert_eq!(guest.used(EVENTS), [(0, 4)]);
    let event: u64 = guest.memory.read_obj(GuestAddress(BUFFERS)).unwrap();
    assert_eq!(event, 0);
    // The old connection is unknown, and the port is listened on still.
    guest.send(guest_packet(PORTS, op::RW), b"late", &[]);
    assert_eq!(guest.receive(&[4096]).unwrap().0.op, op::RST);
    connect_again(&mut guest);
    guest.offer(EVENTS, &[(BUFFERS, 4)]);
    guest.kick(EVENTS);
    assert_eq!(guest.used(EVENTS), []);
}

#[test]
fn packets_of_any_layout() {
    let (mut guest, mut stream) = connected();
    let message = b"forty-two bytes of data, or close to that.";
    for cuts in [
        &[][..],
        &[HEADER_SIZE],
        &[HEADER_SIZE, 20],
        &[20, 24],
        &[20],
        &[1, 1, 1, 41, 10, 10, 0, 10],
        &[HEADER_SIZE, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1],
    ] {
        guest.send(guest_packet(PORTS, op::RW), message, cuts);
        let mut bytes = [0; 42];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, message, "cut at {cuts:?}");
    }
}

#[test]
fn buffers_of_any_layout() {
    let (mut guest, mut stream) = connected();
    let message: Vec<u8> = (0..200).collect();
    for lens in [
        &[300][..],
        &[44, 300],
        &[44, 100, 100],
        &[20, 24, 200],
        &[20, 224],
        &[1, 2, 3, 4, 5, 6, 300],
    ] {
        stream.write_all(&message).unwrap();
        let (header, data) = guest.receive(lens).unwrap();
        assert_eq!((header.op, header.len), (op::RW, 200), "{lens:?}");
        assert_eq!(data, message, "{lens:?}");
    }
    stream.write_all(&message).unwrap();
    let parts: Vec<_> = [45, 50, 400]
        .iter()
        .map(|len| guest.receive(&[*len]).unwrap().1)
        .collect();
    assert_eq!(
        parts.concat(),
        message,
        "a buffer that is too small takes a part"
    );
}

#[test]
fn useless_buffers_are_given_back() {
    let (mut guest, mut stream) = connected();
    stream.write_all(b"data").unwrap();
    guest.offer(RX, &[(BUFFERS, HEADER_SIZE as u32)]);
    guest.kick(RX);
    guest.run();
    assert_eq!(guest.used(RX), [(0, 0)], "no room for data");
    guest.offer(RX, &[(MEMORY as u64 - 10, 4096)]);
    guest.kick(RX);
    assert_eq!(guest.used(RX), [(0, 0)], "outside of memory");
    guest.describe(RX, 0, BUFFERS, 4096, 0, 0);
    guest.publish(RX, 0);
    guest.kick(RX);
    assert_eq!(guest.used(RX), [(0, 0)], "not writable");
    assert_eq!(guest.receive(&[4096]).unwrap().1, b"data");
}

#[test]
fn broken_packets_are_dropped() {
    let (mut guest, mut stream) = connected();
    for (addr, len, flags, next) in [
        (BUFFERS, 43, 0, 0),
        (BUFFERS, 0, 0, 0),
        (BUFFERS, 44, WRITE, 0),
        (BUFFERS, 10, NEXT, 0),
        (BUFFERS, 10, NEXT, 500),
        (MEMORY as u64 - 43, 44, 0, 0),
        (u64::MAX - 10, 44, 0, 0),
        (BUFFERS, 7, 4, 0),
        (0, 160, 4, 0),
    ] {
        guest.describe(TX, 0, addr, len, flags, next);
        guest.publish(TX, 0);
        guest.kick(TX);
        assert_eq!(guest.used(TX).len(), 1);
    }
    guest.send(guest_packet(PORTS, op::RW), b"still alive", &[]);
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still alive");
    // A packet whose data is missing breaks its stream.
    let mut header = guest_packet(PORTS, op::RW);
    header.len = 100;
    guest
        .memory
        .write_slice(&header.to_bytes(), GuestAddress(BUFFERS))
        .unwrap();
    guest.offer(TX, &[(BUFFERS, 60)]);
    guest.kick(TX);
    assert_eq!(stream.read(&mut bytes).unwrap(), 0);
    assert_eq!(guest.receive(&[4096]).unwrap().0.op, op::RST);
}

#[test]
fn a_broken_ring_stops_the_device() {
    let (mut guest, _stream) = connected();
    // More chains available than the queue has.
    guest
        .memory
        .write_obj(
            guest.available[TX].wrapping_add(1000),
            GuestAddress(0x1000 + 0x402),
        )
        .unwrap();
    let mut queues = Queues::new(&guest.rings, guest.memory.clone());
    assert!(guest.device.queue_event(TX, &mut queues).is_err());
}

#[test]
fn commands_from_before_the_driver_are_kept() {
    let mut guest = Guest::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, answer) = channel();
    let done = Box::new(move |result: Result<(), ConnectError>| sender.send(result).unwrap());
    guest
        .handle
        .connect(PORTS.guest, PORTS.host, Socket::new(theirs.into()), done);
    guest.run();
    (&ours).write_all(b"early").unwrap();
    guest.run();
    guest.device.reset();
    let mut guest = guest.ready();
    let (header, _) = guest.receive(&[4096]).unwrap();
    assert_eq!(
        (header.op, header.src_port, header.dst_port),
        (op::REQUEST, 40, 50)
    );
    assert!(answer.try_recv().is_err());
    guest.send(guest_packet(PORTS, op::RESPONSE), &[], &[]);
    assert_eq!(answer.try_recv().unwrap(), Ok(()));
    assert_eq!(guest.receive(&[4096]).unwrap().1, b"early");
}

#[test]
fn commands_are_bounded() {
    let guest = Guest::new();
    let (sender, answers) = channel();
    for _ in 0..super::MAX_COMMANDS + 1 {
        let sender = sender.clone();
        let (_, theirs) = UnixStream::pair().unwrap();
        let done = Box::new(move |result: Result<(), ConnectError>| sender.send(result).unwrap());
        guest.handle.connect(1, 1, Socket::new(theirs.into()), done);
    }
    let answers: Vec<_> = answers.try_iter().collect();
    assert_eq!(answers, [Err(ConnectError::Busy { guest_port: 1 })]);
}

#[test]
fn a_sleeping_reader_holds_the_guest_back() {
    let (mut guest, mut stream) = connected();
    let mut sent = 0;
    let mut credit = 0;
    let block = vec![7; 16 << 10];
    // The socket's own buffer, and then exactly what was granted.
    let mut granted = None;
    for _ in 0..1000 {
        let mut request = guest_packet(PORTS, op::CREDIT_REQUEST);
        request.fwd_cnt = 0;
        guest.send(request, &[], &[]);
        let (header, _) = guest.receive(&[4096]).unwrap();
        credit = (header.buf_alloc + header.fwd_cnt) as usize;
        granted = Some(header.buf_alloc as usize);
        if sent + block.len() > credit {
            break;
        }
        guest.send(guest_packet(PORTS, op::RW), &block, &[]);
        sent += block.len();
    }
    assert!(sent + block.len() > credit, "the credit never ends");
    assert_eq!(granted, Some(super::muxer::LARGE_BUFFER as usize));
    // The reader wakes up: everything is there, and the credit comes back.
    let mut total = 0;
    let mut buffer = vec![0; 64 << 10];
    while total < sent {
        total += stream.read(&mut buffer).unwrap();
        guest.run();
    }
    assert_eq!(total, sent);
    let (header, _) = guest.receive(&[4096]).unwrap();
    assert_eq!(header.op, op::CREDIT_UPDATE);
    assert!((header.fwd_cnt as usize) > sent - block.len() - (128 << 10));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Rings with random contents: no panic, and the device comes to rest.
    #[test]
    fn hostile_rings(
        descriptors in proptest::collection::vec(
            (0..3usize, 0..SIZE, 0..(MEMORY as u64 + 100), 0..70_000u32, 0..8u16, 0..SIZE + 2),
            1..60),
        memory in proptest::collection::vec((0..MEMORY as u64 - 64, any::<[u8; 16]>()), 0..60),
    ) {
        let (mut guest, mut stream) = connected();
        stream.write_all(&[1; 1000]).unwrap();
        for (at, bytes) in memory {
            guest.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
        for (queue, index, addr, len, flags, next) in descriptors {
            guest.describe(queue, index, addr, len, flags, next);
            guest.publish(queue, next % SIZE);
            if guest.try_kick(queue).and_then(|()| guest.try_run()).is_err() {
                // A ring that breaks the rules stops the device.
                break;
            }
        }
    }
}
