//! The entropy device against a guest that writes anything into its queue.
//!
//! Looks for panics, for requests that never complete, and for more bytes than the device may give.
#![no_main]

use std::sync::Arc;

use hull_devices::device::{Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::entropy::Entropy;
use hull_fuzz::{AVAILABLE, FuzzRing, Input, QUEUE, descriptor, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x2_0000;
const RING: u64 = 0x1000;
const STEPS: usize = 64;

fn write(memory: &Memory, bytes: &[u8], at: u64) {
    // What is outside of memory is not written: it is the fuzzer's loss.
    let _ = memory.write_slice(bytes, GuestAddress(at));
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let memory = memory(MEMORY as usize);
    let ring = FuzzRing::new(RING as u32, input.u8() & 1 != 0);
    let rings: Vec<Arc<dyn Ring>> = vec![ring.clone()];
    let mut device = Entropy::new().expect("a device");
    let events = EventRegistry::new().expect("epoll");
    device.register(events.clone()).expect("epoll");
    let mut available: u16 = 0;
    for _ in 0..STEPS {
        if input.is_empty() {
            return;
        }
        let choice = input.u8();
        for index in 0..u64::from(choice % 6) {
            let at = u64::from(input.u32()) % (MEMORY + 0x100);
            let bytes = descriptor(at, input.u32(), input.u16() & 7, input.u16() % 20);
            write(&memory, &bytes, RING + index * 16);
        }
        let slot = u64::from(available % QUEUE) * 2;
        write(
            &memory,
            &(input.u16() % 20).to_le_bytes(),
            RING + AVAILABLE + 4 + slot,
        );
        available = match choice & 0x80 {
            0 => available.wrapping_add(1),
            _ => input.u16(),
        };
        write(&memory, &available.to_le_bytes(), RING + AVAILABLE + 2);
        let mut queues = Queues::new(&rings, memory.clone());
        if device.queue_event(0, &mut queues).is_err() {
            return;
        }
        assert!(ring.all_given(), "a request did not complete");
        let mut ready = Vec::new();
        events.poll(&mut ready).expect("epoll");
        for (token, flags) in ready {
            if device.host_event(token, flags, &mut queues).is_err() {
                return;
            }
        }
    }
});
