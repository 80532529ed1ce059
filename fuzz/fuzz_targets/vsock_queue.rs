//! The vsock device against a guest that writes anything: its rings, its packets, its buffers, in any order, while
//! the host connects, writes, reads and closes.
//!
//! Looks for panics, for events that never come to rest, and (by libFuzzer's own limit) for memory without bound.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_devices::device::{Chain, Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::vsock::Vsock;
use hull_devices::vsock::packet::Header;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 0x2_0000;
const QUEUE: u16 = 16;
const RX: usize = 0;
const TX: usize = 1;
/// Rounds of events after which a device that still has some is taken to be spinning.
const ROUNDS: usize = 2000;
/// Host ends that are kept open.
const STREAMS: usize = 32;

struct FuzzRing(Mutex<Queue>);

impl FuzzRing {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring for FuzzRing {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, Error> {
        Ok(self.queue().iter(memory.clone())?.next())
    }

    fn undo_pop(&self) {
        self.queue().go_to_previous_position();
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.queue().add_used(memory.as_ref(), head, len)
    }

    fn notify(&self, memory: &Memory) -> Result<(), Error> {
        self.queue().needs_notification(memory.as_ref()).map(|_| ())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, Error> {
        self.queue().enable_notification(memory.as_ref())
    }

    fn silence(&self, memory: &Memory) -> Result<(), Error> {
        self.queue().disable_notification(memory.as_ref())
    }
}

/// Numbers out of the fuzzer's bytes; zero when they are used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn address(&mut self) -> u64 {
        u64::from(self.u32()) % (MEMORY as u64 + 0x100)
    }
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
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory");
        let ring = |index: u32| {
            let mut queue = Queue::new(QUEUE).expect("a valid size");
            let base = index * 0x1000;
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + 0x400), None);
            queue.set_used_ring_address(Some(base + 0x800), None);
            queue.set_event_idx(index == 1);
            queue.set_ready(true);
            Arc::new(FuzzRing(Mutex::new(queue))) as Arc<dyn Ring>
        };
        Self {
            device,
            events,
            memory: Arc::new(memory),
            rings: (0..3).map(ring).collect(),
            available: [0; 3],
        }
    }

    /// Writes where there is memory.
    fn write(&self, bytes: &[u8], at: u64) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    fn describe(&self, queue: usize, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(
            &bytes,
            queue as u64 * 0x1000 + u64::from(index % QUEUE) * 16,
        );
    }

    /// False when the device has given up.
    fn publish(&mut self, queue: usize, head: u16) -> bool {
        let ring = queue as u64 * 0x1000 + 0x400;
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
        handle
            .listen(port, Box::new(|| ()))
            .expect("an empty channel");
    }
    let mut guest = Guest::new(device, events);
    let mut streams: Vec<UnixStream> = Vec::new();
    while !input.0.is_empty() {
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
                    input.address(),
                    input.u32(),
                    input.u16(),
                    input.u16(),
                );
                guest.publish(queue, input.u16())
            }
            7 => {
                guest.write(&input.bytes::<16>(), input.address());
                true
            }
            8 => {
                let (ours, theirs) = UnixStream::pair().expect("a socketpair");
                let ports = input.u8();
                handle.connect(
                    u32::from(ports % 4),
                    u32::from(ports / 4 % 4),
                    theirs.into(),
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
