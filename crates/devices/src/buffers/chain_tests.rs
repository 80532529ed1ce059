//! Chains of descriptors that a driver makes up: with loops, wrong lengths, tables within tables,
//! and buffers at the end of memory. What a device gets of them is compared with a slow walk.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::testing::{Descriptor, INDIRECT, NEXT, WRITE};

const QUEUE_SIZE: u16 = 16;
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x1400;
const USED: u64 = 0x1800;
/// Where a table that a descriptor refers to mostly is.
const INNER: u64 = 0x2000;
/// Guest memory: two regions that touch, a hole, and one at the end.
const REGIONS: [(u64, u64); 3] = [(0, 0x4000), (0x4000, 0x2000), (0x8000, 0x1000)];
const END: u64 = 0x9000;

fn in_memory(address: u64) -> bool {
    let within = |(start, length): &(u64, u64)| address >= *start && address - start < *length;
    REGIONS.iter().any(within)
}

/// The descriptor at `address`, if all of it is in memory.
fn read(memory: &Memory, address: u64) -> Option<Descriptor> {
    let mut bytes = [0; 16];
    for (index, byte) in bytes.iter_mut().enumerate() {
        let at = address.checked_add(index as u64)?;
        *byte = memory.read_obj(GuestAddress(at)).ok()?;
    }
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    Some((
        u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        half(12),
        half(14),
    ))
}

/// The buffers of the chain at descriptor 0, as the specification has it (virtio 1.2, 2.7), until
/// it breaks off.
fn walk(memory: &Memory) -> Vec<Descriptor> {
    let (mut table, mut size, mut index) = (TABLE, u32::from(QUEUE_SIZE), 0);
    let (mut found, mut total, mut is_inner) = (Vec::new(), 0, false);
    let mut left = size;
    while left > 0 && index < size {
        let entry = table.checked_add(u64::from(index) * 16);
        let Some(descriptor) = entry.and_then(|entry| read(memory, entry)) else {
            break;
        };
        let (address, length, flags, next) = descriptor;
        if flags & INDIRECT != 0 {
            if is_inner || length % 16 != 0 || length / 16 > u32::from(u16::MAX) {
                break;
            }
            (table, size, index, is_inner) = (address, length / 16, 0, true);
            left = size;
            continue;
        }
        total += u64::from(length);
        if total > u64::from(u32::MAX) {
            break;
        }
        found.push(descriptor);
        if flags & NEXT == 0 {
            break;
        }
        index = u32::from(next);
        left -= 1;
    }
    found
}

/// What [`Buffers::new`] makes of them: the addresses of both directions, byte by byte.
fn resolve(chain: &[Descriptor]) -> Result<[Vec<u64>; 2], BadChain> {
    let mut addresses = [Vec::new(), Vec::new()];
    for (address, length, flags, _) in chain {
        let direction = usize::from(flags & WRITE != 0);
        if direction == 0 && !addresses[1].is_empty() {
            return Err(BadChain::Order);
        }
        for offset in 0..u64::from(*length) {
            match address.checked_add(offset) {
                Some(at) if in_memory(at) => addresses[direction].push(at),
                _ => return Err(BadChain::OutOfRange),
            }
        }
    }
    Ok(addresses)
}

fn addresses() -> impl Strategy<Value = u64> {
    let edges = [0x4000, 0x6000, 0x8000, END].map(|edge: u64| edge - 0x10..edge + 0x10);
    let [touching, hole, behind_hole, end] = edges;
    prop_oneof![
        4 => 0x3000..0x6000u64,
        1 => touching,
        1 => hole,
        1 => behind_hole,
        2 => end,
        1 => Just(INNER),
        1 => u64::MAX - 0x20..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn descriptors() -> impl Strategy<Value = Descriptor> {
    let lengths = prop_oneof![
        6 => 0..0x40u32,
        2 => (0..20u32).prop_map(|count| count * 16),
        1 => 0..0x3000u32,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        6 => 0..4u16,
        2 => Just(NEXT),
        1 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0..QUEUE_SIZE + 2, 1 => any::<u16>()];
    (addresses(), lengths, flags, next)
}

fn memory_of(table: &[Descriptor], inner: &[Descriptor]) -> Memory {
    let ranges = REGIONS.map(|(start, length)| (GuestAddress(start), length as usize));
    let memory = Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    for (base, table) in [(TABLE, table), (INNER, inner)] {
        for (index, (address, length, flags, next)) in table.iter().enumerate() {
            let at = base + index as u64 * 16;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
    }
    // The chain at descriptor 0 is available.
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    memory
}

fn chain(memory: &Memory) -> Chain {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    queue.iter(memory.clone()).unwrap().next().unwrap()
}

fn contents(memory: &Memory) -> Vec<u8> {
    let mut all = vec![0; END as usize];
    for (start, length) in REGIONS {
        let range = start as usize..(start + length) as usize;
        memory
            .read_slice(&mut all[range], GuestAddress(start))
            .unwrap();
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..Default::default() })]

    #[test]
    fn a_chain_is_what_a_slow_walk_finds(
        table in prop::collection::vec(descriptors(), usize::from(QUEUE_SIZE)),
        inner in prop::collection::vec(descriptors(), 0..24),
        bytes in 0..0x4000usize,
    ) {
        let memory = memory_of(&table, &inner);
        let found = walk(&memory);
        prop_assert!(found.len() <= usize::from(u16::MAX));
        // What is longer than memory is not in it, and would take a slow walk long.
        let is_long = found.iter().any(|(_, length, ..)| u64::from(*length) > END);
        let resolved = Buffers::new(&memory, chain(&memory));
        if is_long {
            prop_assert!(resolved.is_err());
            return Ok(());
        }
        let (mut buffers, expected) = match (resolved, resolve(&found)) {
            (Ok(buffers), Ok(expected)) => (buffers, expected),
            (Err(BadChain::TooMany), _) => return Ok(()),
            (resolved, expected) => {
                prop_assert_eq!(resolved.map(drop), expected.map(drop));
                return Ok(());
            }
        };
        prop_assert_eq!(buffers.readable.remaining(), expected[0].len());
        prop_assert_eq!(buffers.writable.remaining(), expected[1].len());

        // What the device reads is what the driver wrote.
        let mut image = contents(&memory);
        let mut read = vec![0; bytes];
        let count = buffers.readable.copy_to(&mut read);
        prop_assert_eq!(count, expected[0].len().min(bytes));
        let wanted: Vec<u8> = expected[0].iter().map(|at| image[*at as usize]).collect();
        prop_assert_eq!(&read[..count], &wanted[..count]);

        // What the device writes is where it may, and nowhere else.
        let written: Vec<u8> = (0..bytes).map(|index| index as u8 | 0x80).collect();
        let count = buffers.writable.copy_from(&written);
        prop_assert_eq!(count, expected[1].len().min(bytes));
        for (at, byte) in expected[1].iter().zip(&written) {
            image[*at as usize] = *byte;
        }
        prop_assert!(contents(&memory) == image);
    }
}
