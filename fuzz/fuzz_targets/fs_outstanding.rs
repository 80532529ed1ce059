//! The fs device behind a vhost-user ring, against a driver that makes many requests available at
//! once, the same ones again before they are answered, and never forgets a node.
//!
//! Looks for panics and for growth: requests in flight are bounded by the queue's size, nodes by
//! the requests that named files, and the queue of the sweep by the nodes.
#![no_main]

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_device_control::Cache;
use hull_devices::device::{Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::fs::Fs;
use hull_devices::transport::ring::VhostRing;
use hull_devices::transport::vring::{AtomicMemory, Vring};
use hull_fuzz::tar::fresh;
use hull_fuzz::{AVAILABLE, Input, QUEUE, descriptor, finish_threads, memory};
use libfuzzer_sys::fuzz_target;
use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x4_0000;
const REQUESTS: usize = 1;
/// Where the queues are, one after the other; where request `n` and its answer are.
const RING: u64 = 0x1000;
const RING_SIZE: u64 = 0x1000;
const USED: u64 = 0x800;
const MESSAGE: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const SLOT: u64 = 0x400;
const STEPS: usize = 96;

const LOOKUP: u32 = 1;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FSYNC: u32 = 20;
/// Names of two files, a directory and nothing.
const NAMES: [&[u8]; 4] = [b"a\0", b"b\0", b"d\0", b"e\0"];

fn write(memory: &Memory, bytes: &[u8], at: u64) {
    memory
        .write_slice(bytes, GuestAddress(at))
        .expect("in memory");
}

/// A request at `slot`: mostly of those that take long, which stay in flight.
fn request(memory: &Memory, slot: u64, input: &mut Input<'_>) {
    let choice = input.u8();
    let node = u64::from(choice >> 4) % 6 + u64::from(choice & 8 == 0);
    let (opcode, node, body) = match choice % 8 {
        0..=2 => {
            let mut body = u64::from(input.u8() % 4).to_le_bytes().to_vec();
            body.extend(u64::from(input.u8()).to_le_bytes());
            body.extend(u32::from(input.u8()).to_le_bytes());
            body.extend([0; 20]);
            (READ, node, body)
        }
        3 => {
            let mut body = u64::from(input.u8() % 4).to_le_bytes().to_vec();
            body.extend([0; 8]);
            (FSYNC, node, body)
        }
        4 => (OPEN, node, vec![0; 8]),
        5 => {
            let opcode = u32::from(input.u8()) % 53;
            // SYNCFS would sync the host's file systems.
            (opcode.min(49), node, input.bytes::<48>().to_vec())
        }
        _ => (LOOKUP, node, NAMES[usize::from(input.u8() % 4)].to_vec()),
    };
    let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend((slot + 2).to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    write(memory, &bytes, MESSAGE + slot * SLOT);
}

fuzz_target!(|data: &[u8]| {
    finish_threads();
    let place = fresh("fs-outstanding");
    fs::create_dir(place.join("d")).expect("a directory");
    for name in ["a", "b", "d/a"] {
        fs::write(place.join(name), [7; 300]).expect("a file");
    }
    let memory = memory(MEMORY as usize);
    let (mut device, shares) = Fs::new().expect("the device");
    let events = EventRegistry::new().expect("epoll");
    device.register(events.clone()).expect("epoll");

    let (mut vrings, mut rings) = (Vec::new(), Vec::<Arc<dyn Ring>>::new());
    for index in 0..2 {
        let base = RING + index * RING_SIZE;
        let vring = Vring::new(AtomicMemory::new(memory.as_ref().clone()), QUEUE).expect("a ring");
        vring.set_queue_size(QUEUE);
        vring
            .set_queue_info(base, base + AVAILABLE, base + USED)
            .expect("its addresses");
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        let ring = VhostRing::default();
        ring.bind(&vring);
        vrings.push(vring);
        rings.push(Arc::new(ring));
    }
    let directory = OwnedFd::from(File::open(&place).expect("the share"));
    shares.add("s", directory, Cache::Shared, Box::new(|_| ()));
    let mut ready = Vec::new();
    events.poll(&mut ready).expect("epoll");
    let mut queues = Queues::new(&rings, memory.clone());
    for (token, flags) in ready {
        device.host_event(token, flags, &mut queues).expect("added");
    }
    let (first_nodes, _) = device.nodes();

    // Request n is descriptors 2n and 2n + 1.
    let base = RING + RING_SIZE * REQUESTS as u64;
    for slot in 0..u64::from(QUEUE) / 2 {
        let head = slot as u16 * 2;
        let at = base + u64::from(head) * 16;
        let message = descriptor(MESSAGE + slot * SLOT, SLOT as u32, 1, head + 1);
        write(&memory, &message, at);
        let answer = descriptor(ANSWER + slot * SLOT, SLOT as u32, 2, 0);
        write(&memory, &answer, at + 16);
    }
    let mut input = Input(data);
    let (mut available, mut requests) = (0u16, 0);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        for _ in 0..choice % 16 {
            let slot = u64::from(input.u8()) % (u64::from(QUEUE) / 2);
            if choice & 0x10 == 0 {
                request(&memory, slot, &mut input);
            }
            let entry = base + AVAILABLE + 4 + u64::from(available % QUEUE) * 2;
            write(&memory, &(slot as u16 * 2).to_le_bytes(), entry);
            available = available.wrapping_add(1);
        }
        if choice & 0xe0 == 0xe0 {
            available = available.wrapping_add(u16::from(input.u8()));
        }
        write(&memory, &available.to_le_bytes(), base + AVAILABLE + 2);
        requests += 256;
        let mut queues = Queues::new(&rings, memory.clone());
        let served = device.queue_event(REQUESTS, &mut queues);
        let in_flight = vrings[REQUESTS].in_flight().count();
        assert!(in_flight <= usize::from(QUEUE), "{in_flight} in flight");
        let (nodes, swept) = device.nodes();
        assert!(nodes <= first_nodes + requests, "{nodes} nodes");
        assert!(swept <= nodes, "{swept} in the queue of {nodes} nodes");
        if served.is_err() {
            break;
        }
    }
    // Stopping waits for the requests in flight.
    vrings[REQUESTS].set_queue_ready(false);
    assert_eq!(vrings[REQUESTS].in_flight().count(), 0);
    drop(device);
    finish_threads();
});
