//! The vsock device against a guest that writes anything: its rings, its packets, its buffers, in
//! any order, while the host connects, writes, reads and closes.
//!
//! Looks for panics, for events that never come to rest, and (by libFuzzer's own limit) for memory
//! without bound.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::channel;

use hull_devices::device::{Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::vsock::packet::Header;
use hull_devices::vsock::{Socket, Vsock};
use hull_fuzz::{AVAILABLE, FuzzRing, Input, QUEUE, descriptor, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 0x2_0000;
const RX: usize = 0;
const TX: usize = 1;
/// Rounds of events after which a device that still has some is taken to be spinning.
const ROUNDS: usize = 2000;
/// Host ends that are kept open.
const STREAMS: usize = 32;

/// An address, mostly of guest memory.
fn address(input: &mut Input<'_>) -> u64 {
    u64::from(input.u32()) % (MEMORY as u64 + 0x100)
}

struct Guest {
    device: Vsock,
    events: EventRegistry,
    memory: Memory,
    rings: Vec<Arc<dyn Ring>>,
    available: [u16; 3],
}

impl Guest {
    fn new(device: Vsock, events: EventRegistry) -> Self {
        let ring = |index: u32| FuzzRing::new(index * 0x1000, index == 1) as Arc<dyn Ring>;
        Self {
            device,
            events,
            memory: memory(MEMORY),
            rings: (0..3).map(ring).collect(),
            available: [0; 3],
        }
    }

    /// Writes where there is memory.
    fn write(&self, bytes: &[u8], at: u64) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    fn describe(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = queue as u64 * 0x1000 + u64::from(index % QUEUE) * 16;
        self.write(&descriptor(addr, len, flags, next), at);
    }

    /// False when the device has given up.
    fn publish(&mut self, queue: usize, head: u16) -> bool {
        let ring = queue as u64 * 0x1000 + AVAILABLE;
        let slot = u64::from(self.available[queue] % QUEUE);
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.write(&head.to_le_bytes(), ring + 4 + slot * 2);
        self.write(&self.available[queue].to_le_bytes(), ring + 2);
        self.kick(queue)
    }

    fn kick(&mut self, queue: usize) -> bool {
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        self.device.queue_event(queue, &mut queues).is_ok()
    }

    fn run(&mut self) -> bool {
        for _ in 0..ROUNDS {
            let mut ready = Vec::new();
            self.events.poll(&mut ready).expect("epoll");
            if ready.is_empty() {
                return true;
            }
            for (token, flags) in ready {
                let mut queues = Queues::new(&self.rings, self.memory.clone());
                if self.device.host_event(token, flags, &mut queues).is_err() {
                    return false;
                }
            }
        }
        panic!("the device does not come to rest");
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (sender, incoming) = channel();
    let sink = Box::new(move |event| {
        let _ = sender.send(event);
    });
    let (mut device, handle) = Vsock::new(sink).expect("host resources");
    let events = EventRegistry::new().expect("epoll");
    device.register(events.clone()).expect("epoll");
    for port in 0..4 {
        handle.listen(port, Box::new(|done| done.expect("an empty channel")));
    }
    let mut guest = Guest::new(device, events);
    let mut streams: Vec<UnixStream> = Vec::new();
    while !input.is_empty() {
        let alive = match input.u8() % 12 {
            0..=2 => {
                // A packet that is likely to mean something.
                let header = Header {
                    src_cid: 3,
                    dst_cid: 2,
                    src_port: u32::from(input.u8() % 4),
                    dst_port: u32::from(input.u8() % 5),
                    len: u32::from(input.u16()),
                    kind: 1,
                    op: u16::from(input.u8() % 9),
                    flags: u32::from(input.u8() % 4),
                    buf_alloc: input.u32(),
                    fwd_cnt: u32::from(input.u16()),
                };
                guest.write(&header.to_bytes(), 0x8000);
                guest.describe(TX, 0, 0x8000, 44, 1, 1);
                guest.describe(TX, 1, 0x9000, header.len, 0, 0);
                guest.publish(TX, 0)
            }
            3 => {
                guest.write(&input.bytes::<44>(), 0x8000);
                guest.describe(TX, 0, 0x8000, u32::from(input.u16()), 0, 0);
                guest.publish(TX, 0)
            }
            4..=5 => {
                let (first, second) = (u32::from(input.u8()), u32::from(input.u16()));
                guest.describe(RX, 0, 0x1_0000, first, 3, 1);
                guest.describe(RX, 1, 0x1_1000, second, 2, 0);
                guest.publish(RX, 0)
            }
            6 => {
                let queue = usize::from(input.u8() % 3);
                guest.describe(
                    queue,
                    input.u16(),
                    address(&mut input),
                    input.u32(),
                    input.u16(),
                    input.u16(),
                );
                guest.publish(queue, input.u16())
            }
            7 => {
                guest.write(&input.bytes::<16>(), address(&mut input));
                true
            }
            8 => {
                let (ours, theirs) = UnixStream::pair().expect("a socketpair");
                let ports = input.u8();
                let user = (ports >= 128).then_some((0, 0));
                handle.connect(
                    u32::from(ports % 4),
                    u32::from(ports / 4 % 4),
                    Socket::of(theirs.into(), user),
                    Box::new(|_| ()),
                );
                ours.set_nonblocking(true).expect("a socket");
                streams.push(ours);
                true
            }
            9 => {
                let (choice, count) = (usize::from(input.u8()), usize::from(input.u16()));
                if let Some(stream) = streams.get_mut(choice % STREAMS) {
                    let _ = stream.write(&vec![1; count]);
                }
                true
            }
            10 => {
                let choice = usize::from(input.u8());
                match (choice % STREAMS, choice / STREAMS) {
                    (index, 0) if index < streams.len() => drop(streams.remove(index)),
                    (index, how) if index < streams.len() => {
                        let stream = &mut streams[index];
                        let _ = match how {
                            1 => stream.shutdown(Shutdown::Write),
                            2 => stream.shutdown(Shutdown::Read),
                            _ => stream.read(&mut vec![0; 100_000]).map(|_| ()),
                        };
                    }
                    _ => {}
                }
                true
            }
            _ => {
                if input.u8() == 0 {
                    guest.device.reset();
                }
                true
            }
        };
        if !alive || !guest.run() {
            break;
        }
        streams.extend(incoming.try_iter().map(|event| {
            let stream = UnixStream::from(event.stream);
            stream.set_nonblocking(true).expect("a socket");
            stream
        }));
        streams.truncate(STREAMS);
    }
});
