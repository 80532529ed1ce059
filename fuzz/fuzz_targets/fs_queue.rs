//! The fs device against a guest that writes anything: FUSE messages that nearly make sense,
//! nonsense, and broken descriptor chains, about a small tree with a link that leads out of it.
//!
//! Looks for panics, for requests that are never given back, and for a file outside the share that
//! was changed.
#![no_main]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use hull_device_control::Cache;
use hull_devices::device::{Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::fs::{Fs, Shares};
use hull_fuzz::{AVAILABLE, FuzzRing, Input, QUEUE, descriptor, memory};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, setrlimit};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x4_0000;
const MESSAGE: u64 = 0x2_0000;
const ANSWER: u64 = 0x3_0000;
const HEADER: u32 = 40;
const FALLOCATE: u32 = 43;
const SYNCFS: u32 = 50;
const INIT: u32 = 26;
/// Of hull's guest kernel: files that are watched, and the end of requests for events.
const WATCH: u32 = 1000;
const EVENTS: u32 = 1001;
const EVENTS_STOP: u64 = 1;
const STEPS: usize = 64;
const NAMES: &[&[u8]] = &[
    b"a\0",
    b"b\0",
    b"d\0",
    b"e\0",
    b"out\0",
    b"..\0",
    b"a/b\0",
    b"user.x\0",
    b"s\0",
];

struct Guest {
    device: Fs,
    events: EventRegistry,
    memory: Memory,
    rings: Vec<Arc<dyn Ring>>,
    counts: Vec<Arc<FuzzRing>>,
    available: [u16; 2],
}

impl Guest {
    fn new(mut device: Fs) -> Self {
        let ring = |index: u32| FuzzRing::new(0x1000 + index * 0x1000, false);
        let counts: Vec<Arc<FuzzRing>> = (0..2).map(ring).collect();
        let events = EventRegistry::new().expect("epoll");
        device.register(events.clone()).expect("epoll");
        Self {
            device,
            events,
            memory: memory(MEMORY as usize),
            rings: counts
                .iter()
                .map(|ring| ring.clone() as Arc<dyn Ring>)
                .collect(),
            counts,
            available: [0; 2],
        }
    }

    fn offer(&mut self, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
        let base = 0x1000 + queue as u64 * 0x1000;
        for (index, &(address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = base + index as u64 * 16;
            self.put(at, &descriptor(address, length, flags, next));
        }
        let ring = base + AVAILABLE;
        let slot = u64::from(self.available[queue] % QUEUE);
        self.put(ring + 4 + slot * 2, &[0, 0]);
        self.available[queue] = self.available[queue].wrapping_add(1);
        let index = self.available[queue];
        self.put(ring + 2, &index.to_le_bytes());
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let at = GuestAddress(at);
        self.memory.write_slice(bytes, at).expect("in memory");
    }

    /// Has the device serve the queue, until all is given back. False when it has stopped.
    fn run(&mut self, queue: usize) -> bool {
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        if self.device.queue_event(queue, &mut queues).is_err() {
            return false;
        }
        let end = Instant::now() + Duration::from_secs(5);
        let counts = &self.counts[queue];
        while !counts.all_given() {
            assert!(Instant::now() < end, "a request was never given back");
            std::thread::yield_now();
        }
        true
    }

    fn share(&mut self, shares: &Shares, directory: &Path) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(directory, flags, Mode::empty()).expect("the share");
        shares.add(
            "s",
            fd,
            Cache::Shared,
            Box::new(|result| result.expect("added")),
        );
        let mut ready = Vec::new();
        self.events.poll(&mut ready).expect("epoll");
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        for (token, flags) in ready {
            self.device
                .host_event(token, flags, &mut queues)
                .expect("added");
        }
    }
}

/// A directory in memory for this process, with the share and what is outside of it.
fn place() -> &'static PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        // What the guest makes stays small.
        let limit = Rlimit {
            current: Some(1 << 20),
            maximum: Some(1 << 20),
        };
        setrlimit(Resource::Fsize, limit).expect("a limit of file size");
        let place = PathBuf::from(format!("/dev/shm/hull-fuzz-fs-{}", std::process::id()));
        fs::create_dir_all(&place).expect("a directory in /dev/shm");
        place
    })
}

fn message(input: &mut Input<'_>) -> (u32, Vec<u8>, u32) {
    let opcode = match u32::from(input.u8()) % 58 {
        56 => WATCH,
        57 => EVENTS,
        other => other,
    };
    let choice = input.u8();
    // Nodes that are there mostly: the root is 1, the others count from 2.
    let node = match choice & 0x0f {
        0x0f => input.u64(),
        small => u64::from(small),
    };
    let mut body = Vec::new();
    if choice & 0x10 != 0 {
        body.extend(u64::from(input.u8() % 4).to_le_bytes());
    }
    for _ in 0..input.u8() % 48 {
        body.push(input.u8());
    }
    for _ in 0..(choice >> 5) % 3 {
        body.extend(NAMES[usize::from(input.u8()) % NAMES.len()]);
    }
    if opcode == EVENTS {
        // Others are not given back until there is one.
        body = EVENTS_STOP.to_le_bytes().to_vec();
    }
    if opcode == FALLOCATE {
        // Or it would take as much memory as it asks for.
        for range in [10..16, 18..24] {
            for index in range {
                if let Some(byte) = body.get_mut(index) {
                    *byte = 0;
                }
            }
        }
    }
    let length = match choice >> 7 {
        0 => HEADER + body.len() as u32,
        _ => input.u32(),
    };
    let bytes = encoded(length, opcode, node, &body);
    let room = u32::from(input.u8()) * 20;
    (opcode, bytes, room)
}

fn encoded(length: u32, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// A guest that takes all that is offered: version 7.46, all flags.
fn init() -> Vec<u8> {
    let words = [7, 46, 0x2_0000, u32::MAX, u32::MAX];
    let mut body: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    body.extend([0; 44]);
    encoded(HEADER + body.len() as u32, INIT, 0, &body)
}

fuzz_target!(|data: &[u8]| {
    let place = place();
    let share = place.join("share");
    let outside = place.join("outside");
    let _ = fs::remove_dir_all(&share);
    fs::create_dir(&share).expect("the share");
    fs::create_dir(share.join("d")).expect("a directory");
    fs::write(share.join("a"), b"something to read").expect("a file");
    fs::write(&outside, b"untouched").expect("a file outside");
    symlink(&outside, share.join("out")).expect("a link");

    let (device, shares) = Fs::new().expect("the device");
    let mut guest = Guest::new(device);
    guest.share(&shares, &share);
    let greeting = init();
    guest.put(MESSAGE, &greeting);
    guest.offer(
        1,
        &[(MESSAGE, greeting.len() as u32, 1, 1), (ANSWER, 256, 2, 0)],
    );
    assert!(guest.run(1));
    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let queue = usize::from(input.u8() % 8 != 0);
        if input.u8() % 8 == 0 {
            let count = usize::from(input.u8() % 4) + 1;
            let mut descriptors = Vec::new();
            for _ in 0..count {
                let address = u64::from(input.u32()) % (MEMORY + 0x100);
                let flags = u16::from(input.u8() % 8);
                descriptors.push((address, input.u32(), flags, u16::from(input.u8() % 6)));
            }
            guest.offer(queue, &descriptors);
        } else {
            let (opcode, bytes, room) = message(&mut input);
            if opcode == SYNCFS {
                continue;
            }
            guest.put(MESSAGE, &bytes);
            let length = bytes.len() as u32;
            guest.offer(queue, &[(MESSAGE, length, 1, 1), (ANSWER, room, 2, 0)]);
        }
        if !guest.run(queue) {
            break;
        }
    }
    assert_eq!(fs::read(&outside).expect("there"), b"untouched");
});
