//! Guests for tests: guest memory, virtqueues in it, and handwritten requests, honest or not.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::device::{Chain, Device, DeviceError, EventRegistry, Memory, Queues, Ring};
use crate::state::QueueState;

pub const MEMORY: usize = 4 << 20;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
const QUEUE_SIZE: u16 = 64;
/// Where buffers of honest requests are.
const BUFFERS: u64 = 0x10_0000;

/// Address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// A queue without a transport.
pub struct TestRing(pub Mutex<Queue>);

impl Ring for TestRing {
    fn pop(&self, memory: &Memory) -> Result<Option<Chain>, Error> {
        let mut queue = self.0.lock().unwrap();
        if !queue.ready() {
            return Ok(None);
        }
        Ok(queue.iter(memory.clone())?.next())
    }

    fn undo_pop(&self) {
        self.0.lock().unwrap().go_to_previous_position();
    }

    fn add_used(&self, memory: &Memory, head: u16, len: u32) -> Result<(), Error> {
        self.0.lock().unwrap().add_used(memory.as_ref(), head, len)
    }

    fn notify(&self, _memory: &Memory) -> Result<(), Error> {
        Ok(())
    }

    fn rearm(&self, memory: &Memory) -> Result<bool, Error> {
        let mut queue = self.0.lock().unwrap();
        if !queue.ready() {
            return Ok(false);
        }
        queue.enable_notification(memory.as_ref())
    }

    fn silence(&self, memory: &Memory) -> Result<(), Error> {
        self.0.lock().unwrap().disable_notification(memory.as_ref())
    }

    fn state(&self) -> QueueState {
        QueueState::from(&*self.0.lock().unwrap())
    }
}

/// Guest memory with virtqueues in it, and the driver's side of them.
pub struct Guest {
    pub memory: Memory,
    rings: Vec<Arc<dyn Ring>>,
    available: Vec<u16>,
    used: Vec<u16>,
}

impl Guest {
    /// As many queues as there are sizes; all have `QUEUE_SIZE` entries.
    pub fn new(sizes: &[u16]) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let count = sizes.len();
        let rings = (0..count).map(|index| {
            let mut queue = Queue::new(QUEUE_SIZE).unwrap();
            let base = u32::try_from(Self::base(index)).unwrap();
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + 0x1000), None);
            queue.set_used_ring_address(Some(base + 0x2000), None);
            queue.set_ready(true);
            Arc::new(TestRing(Mutex::new(queue))) as Arc<dyn Ring>
        });
        Self {
            rings: rings.collect(),
            memory: Arc::new(memory),
            available: vec![0; count],
            used: vec![0; count],
        }
    }

    pub fn rings(&self) -> &[Arc<dyn Ring>] {
        &self.rings
    }

    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Replaces the device's side of the queues by one that continues from `states`.
    pub fn restore_rings(&mut self, states: &[QueueState]) {
        self.rings = states
            .iter()
            .map(|state| Arc::new(TestRing(Mutex::new((*state).try_into().unwrap()))) as _)
            .collect();
    }

    fn base(queue: usize) -> u64 {
        0x1000 + queue as u64 * 0x4000
    }

    /// Writes descriptors from number 0 on, and makes the chain at 0 available.
    pub fn offer(&mut self, queue: usize, descriptors: &[Descriptor]) {
        self.offer_at(queue, 0, descriptors);
    }

    /// Writes descriptors from number `head` on, which name each other by their distance from it,
    /// and makes the chain available.
    pub fn offer_at(&mut self, queue: usize, head: u16, descriptors: &[Descriptor]) {
        let base = Self::base(queue);
        let placed: Vec<Descriptor> = descriptors
            .iter()
            .map(|(address, length, flags, next)| (*address, *length, *flags, next + head))
            .collect();
        self.write_table(base + u64::from(head) * 16, &placed);
        let available = &mut self.available[queue];
        let slot = base + 0x1004 + u64::from(*available % QUEUE_SIZE) * 2;
        *available = available.wrapping_add(1);
        let index = *available;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        let address = GuestAddress(base + 0x1002);
        self.memory.write_obj(index, address).unwrap();
    }

    /// Writes a table of descriptors anywhere.
    pub fn write_table(&self, base: u64, descriptors: &[Descriptor]) {
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = base + index as u64 * 16;
            let put = |offset, value: &[u8]| {
                let at = GuestAddress(at + offset);
                self.memory.write_slice(value, at).unwrap();
            };
            put(0, &address.to_le_bytes());
            put(8, &length.to_le_bytes());
            put(12, &flags.to_le_bytes());
            put(14, &next.to_le_bytes());
        }
    }

    /// The next used chain, if there is one: head and length.
    pub fn next_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let base = Self::base(queue) + 0x2000;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).unwrap();
        let used = &mut self.used[queue];
        if *used == index {
            return None;
        }
        let slot = base + 4 + u64::from(*used % QUEUE_SIZE) * 8;
        *used = used.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let length = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }

    /// The length of the next used chain, if there is one.
    pub fn used(&mut self, queue: usize) -> Option<u32> {
        self.next_used(queue).map(|(_, length)| length)
    }

    /// The heads of all chains that were used since the last call.
    pub fn all_used(&mut self, queue: usize) -> Vec<u16> {
        std::iter::from_fn(|| self.next_used(queue))
            .map(|(head, _)| head)
            .collect()
    }
}

/// A device in a guest, called without a runner.
pub struct Driver<D> {
    pub device: D,
    guest: Guest,
    events: EventRegistry,
}

impl<D> std::ops::Deref for Driver<D> {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl<D> std::ops::DerefMut for Driver<D> {
    fn deref_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

impl<D: Device> Driver<D> {
    pub fn new(device: D) -> Self {
        let guest = Guest::new(device.queue_sizes());
        Self::in_guest(device, guest)
    }

    /// A device that takes over a guest from another one.
    pub fn in_guest(mut device: D, guest: Guest) -> Self {
        let events = EventRegistry::new().unwrap();
        device.register(events.clone()).unwrap();
        Self {
            device,
            guest,
            events,
        }
    }

    /// The guest, without the device.
    pub fn into_guest(self) -> Guest {
        self.guest
    }

    /// Has the device check a queue and its host descriptors.
    pub fn run(&mut self, queue: usize) -> Result<(), DeviceError> {
        let mut queues = Queues::new(&self.guest.rings, self.guest.memory.clone());
        self.device.queue_event(queue, &mut queues)?;
        self.host_events()
    }

    /// What the device waits for.
    pub fn events(&self) -> &EventRegistry {
        &self.events
    }

    /// Delivers the events of the device's host descriptors.
    pub fn host_events(&mut self) -> Result<(), DeviceError> {
        let mut queues = Queues::new(&self.guest.rings, self.guest.memory.clone());
        let mut ready = Vec::new();
        self.events.poll(&mut ready).unwrap();
        for (token, flags) in ready {
            self.device.host_event(token, flags, &mut queues)?;
        }
        Ok(())
    }

    /// Finishes what is in flight.
    pub fn quiesce(&mut self) -> Result<(), DeviceError> {
        let mut queues = Queues::new(&self.guest.rings, self.guest.memory.clone());
        self.device.quiesce(&mut queues)
    }

    /// One honest request with an answer of at most `room` bytes; waits for it.
    pub fn request(&mut self, queue: usize, input: &[u8], room: usize) -> Vec<u8> {
        let answer = BUFFERS + (input.len() as u64).next_multiple_of(8);
        self.memory
            .write_slice(input, GuestAddress(BUFFERS))
            .unwrap();
        let length = u32::try_from(input.len()).unwrap();
        let room = u32::try_from(room).unwrap();
        // Each in two parts, so that boundaries are crossed.
        let half = length / 2;
        let mut descriptors = vec![
            (BUFFERS, half, NEXT, 1),
            (BUFFERS + u64::from(half), length - half, 0, 0),
        ];
        if room > 0 {
            descriptors[1].2 = NEXT;
            descriptors[1].3 = 2;
            let first = room.min(7);
            descriptors.push((answer, first, WRITE | NEXT, 3));
            descriptors.push((answer + u64::from(first), room - first, WRITE, 0));
        }
        self.offer(queue, &descriptors);
        self.run(queue).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(written) = self.used(queue) {
                let mut bytes = vec![0; written as usize];
                let at = GuestAddress(answer);
                self.memory.read_slice(&mut bytes, at).unwrap();
                return bytes;
            }
            assert!(Instant::now() < end, "the request is not answered");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Chains that no honest driver creates.
pub fn hostile_chains() -> Vec<Vec<Descriptor>> {
    let memory = MEMORY as u64;
    vec![
        // Loops.
        vec![(BUFFERS, 16, NEXT, 0)],
        vec![(BUFFERS, 16, NEXT, 1), (BUFFERS, 16, WRITE | NEXT, 0)],
        // A missing next descriptor.
        vec![(BUFFERS, 16, NEXT, 999)],
        // An empty buffer.
        vec![(BUFFERS, 0, 0, 0)],
        vec![(BUFFERS, 0, WRITE, 0)],
        // Outside of memory, at its end, around the end of all addresses.
        vec![(memory, 16, 0, 0)],
        vec![(memory - 8, 16, NEXT, 1), (BUFFERS, 100, WRITE, 0)],
        vec![(u64::MAX - 8, 16, NEXT, 1), (BUFFERS, 100, WRITE, 0)],
        vec![(BUFFERS, 64, NEXT, 1), (u64::MAX - 8, 100, WRITE, 0)],
        // More than exists.
        vec![(BUFFERS, u32::MAX, 0, 0)],
        vec![(BUFFERS, 64, NEXT, 1), (BUFFERS, u32::MAX, WRITE, 0)],
        vec![(BUFFERS, u32::MAX, NEXT, 1), (BUFFERS, u32::MAX, WRITE, 0)],
        // Writable before readable.
        vec![(BUFFERS, 64, WRITE | NEXT, 1), (BUFFERS, 64, 0, 0)],
        // Tables: of an invalid length, of themselves, outside of memory.
        vec![(BUFFERS, 17, INDIRECT, 0)],
        vec![(0x1000, 32, INDIRECT, 0)],
        vec![(memory, 32, INDIRECT, 0)],
        vec![(BUFFERS, 0xffff_fff0, INDIRECT, 0)],
    ]
}
