//! Tests of the multiplexer in random scenarios: honest ones in which no byte may get lost, hostile
//! ones in which nothing may break.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use proptest::prelude::*;

use super::connection::Ports;
use super::muxer::{LARGE_BUFFER, MAX_GRANTED};
use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, Slices, op};
use super::testing::*;

/// An event of one of a few connections.
#[derive(Clone, Debug)]
enum Step {
    HostWrites(usize),
    HostReads(usize),
    HostShutsWrite,
    HostCloses,
    GuestWrites(usize),
    GuestReads(usize),
    GuestResizes(usize),
    GuestShutsDown(u32),
    GuestCloses,
    Buffers { count: usize, room: usize },
    Poll,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..200_000usize).prop_map(Step::HostWrites),
        6 => (1..200_000usize).prop_map(Step::HostReads),
        1 => Just(Step::HostShutsWrite),
        1 => Just(Step::HostCloses),
        6 => (1..40_000usize).prop_map(Step::GuestWrites),
        1 => (300..300_000usize).prop_map(Step::GuestResizes),
        6 => (1..100_000usize).prop_map(Step::GuestReads),
        1 => (1..3u32).prop_map(Step::GuestShutsDown),
        1 => Just(Step::GuestCloses),
        8 => (1..40usize, 1..9000usize).prop_map(|(count, room)| Step::Buffers { count, room }),
        8 => Just(Step::Poll),
    ]
}

/// Both ends of a connection, and what has gone in and come out.
struct Both {
    guest: GuestSocket,
    /// Bytes that the guest's application wants to send, and has not been able to.
    wanted: usize,
    pipe: Shared,
    written: usize,
    read: usize,
}

impl Both {
    fn host_write(&mut self, count: usize) {
        let mut pipe = self.pipe.borrow_mut();
        if pipe.host_closed || pipe.host_shut_write || pipe.device_shut_read || pipe.device_closed {
            return;
        }
        let count = count.min(pipe.capacity.saturating_sub(pipe.from_host.len()));
        let seed = self.guest.seed + 1;
        pipe.from_host
            .extend((self.written..self.written + count).map(|at| pattern(seed, at)));
        self.written += count;
    }

    /// Writes as much as the credit allows.
    fn guest_write(&mut self, world: &mut World) {
        let before = self.guest.sent;
        self.guest.write(world, self.wanted);
        self.wanted -= self.guest.sent - before;
    }

    fn host_read(&mut self, count: usize) {
        let mut pipe = self.pipe.borrow_mut();
        if pipe.host_closed {
            return;
        }
        let count = count.min(pipe.to_host.len());
        for byte in pipe.to_host.drain(..count) {
            assert_eq!(
                byte,
                pattern(self.guest.seed, self.read),
                "wrong byte at {}",
                self.read
            );
            self.read += 1;
        }
    }
}

fn deliver(world: &mut World, all: &mut [Both], count: usize, room: usize) -> usize {
    for done in 0..count {
        let Some((header, data)) = world.offer(room) else {
            return done;
        };
        if let Some(both) = all
            .iter_mut()
            .find(|both| both.guest.ports.guest == header.dst_port)
        {
            both.guest.take(world, &header, &data);
        }
    }
    count
}

/// Lets everything flow until nothing moves.
fn quiesce(world: &mut World, all: &mut [Both]) {
    let mut idle_polls = 0;
    for _ in 0..100_000 {
        let moved = |all: &[Both], world: &World| {
            let counts = all
                .iter()
                .map(|both| both.read + both.guest.consumed + both.guest.sent)
                .sum::<usize>();
            (counts, world.muxer.count(), world.registered.len())
        };
        let before = moved(all, world);
        for both in all.iter_mut() {
            both.host_read(usize::MAX);
            both.guest.read(world, usize::MAX);
            both.guest_write(world);
        }
        let packets = deliver(world, all, 1000, 3700);
        world.settle();
        let ready = world.poll();
        let progress = packets > 0 || moved(all, world) != before;
        if !ready && !progress {
            return;
        }
        // Level-triggered events without effect would repeat for ever.
        idle_polls = if progress { 0 } else { idle_polls + 1 };
        assert!(idle_polls < 3, "busy polling: {:?}", world.registered);
    }
    panic!("no end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Nothing is lost, repeated or reordered, all buffers stay within bounds, and everything ends.
    #[test]
    fn streams_are_streams(
        steps in proptest::collection::vec((0..3usize, step()), 1..120),
        capacity in prop_oneof![100..5000usize, Just(200_000)],
        buffer in prop_oneof![300..2000usize, Just(65536), Just(262_144)],
    ) {
        let mut world = World::new(capacity);
        world.muxer.listen(50);
        let mut all = Vec::new();
        for guest in 0..3u32 {
            let ports = Ports { host: 50, guest };
            let seed = guest as usize * 2;
            let socket = GuestSocket::new(ports, seed, buffer);
            let stream = if guest == 0 {
                // One from the guest's side, the others from the host's.
                world.send(socket.header(op::REQUEST), Vec::new());
                world.notes.borrow().incoming[0].2.clone()
            } else {
                let stream = pipe(capacity);
                world.muxer.connect(guest as usize, ports, MockStream(stream.clone()), world.now);
                stream
            };
            all.push(Both { guest: socket, wanted: 0, pipe: stream, written: 0, read: 0 });
        }
        let mut guest_ended = [false; 3];
        for (index, step) in steps {
            let both = &mut all[index];
            match step {
                Step::HostWrites(count) => both.host_write(count),
                Step::HostReads(count) => both.host_read(count),
                Step::HostShutsWrite => both.pipe.borrow_mut().host_shut_write = true,
                Step::HostCloses => both.pipe.borrow_mut().host_closed = true,
                Step::GuestWrites(count) => {
                    both.wanted += count;
                    both.guest_write(&mut world);
                }
                Step::GuestReads(count) => both.guest.read(&mut world, count),
                Step::GuestResizes(buffer) => both.guest.resize(&mut world, buffer),
                Step::GuestShutsDown(flags) => {
                    both.guest.shutdown(&mut world, flags);
                    guest_ended[index] |= both.guest.my_shutdown & SHUTDOWN_RECEIVE != 0;
                }
                Step::GuestCloses => {
                    both.guest.close(&mut world);
                    guest_ended[index] |= both.guest.my_shutdown & SHUTDOWN_RECEIVE != 0;
                }
                Step::Buffers { count, room } => {
                    deliver(&mut world, &mut all, count, room);
                }
                Step::Poll => {
                    world.poll();
                }
            }
            world.settle();
            prop_assert!(world.muxer.largest_backlog() <= LARGE_BUFFER as usize);
        }
        let quiet = (0..10).any(|_| !world.poll());
        prop_assert!(quiet, "events without consequence: {:?}", world.registered);
        quiesce(&mut world, &mut all);
        for (index, both) in all.iter().enumerate() {
            let host_closed = both.pipe.borrow().host_closed;
            if !host_closed {
                prop_assert_eq!(both.read, both.guest.sent, "guest to host, connection {}", index);
            }
            let may_send = both.guest.may_send();
            prop_assert!(both.wanted == 0 || !may_send, "connection {}: the guest waits for ever", index);
            if !guest_ended[index] {
                prop_assert_eq!(both.guest.consumed, both.written, "host to guest, connection {}", index);
            }
        }
        // Now both sides close.
        for both in &mut all {
            both.pipe.borrow_mut().host_shut_write = true;
        }
        quiesce(&mut world, &mut all);
        for both in &mut all {
            let guest = &both.guest;
            let knows = guest.peer_shutdown & SHUTDOWN_SEND != 0
                || guest.my_shutdown & SHUTDOWN_RECEIVE != 0;
            prop_assert!(guest.dead || knows, "the guest must see the host's end");
            both.guest.close(&mut world);
        }
        quiesce(&mut world, &mut all);
        prop_assert_eq!(world.muxer.count(), 0);
        prop_assert_eq!(world.muxer.granted(), 0);
        prop_assert!(world.registered.is_empty());
        for both in &all {
            prop_assert!(both.guest.dead);
            let pipe = both.pipe.borrow();
            prop_assert!(pipe.device_closed);
            prop_assert!(pipe.host_closed || pipe.host_at_end());
        }
    }

    /// Whatever a guest sends, nothing panics, and memory stays within the bounds.
    #[test]
    fn hostile_guest(
        steps in proptest::collection::vec(
            (0..12u16, 0..3u32, 0..4u32, any::<u32>(), any::<u32>(), 0..70_000usize, 0..8u8),
            1..200,
        ),
    ) {
        let mut world = World::new(3000);
        world.muxer.listen(1);
        let steps = steps.into_iter().enumerate();
        for (number, (op, host, guest, buf_alloc, fwd_cnt, len, what)) in steps {
            let ports = Ports { host, guest };
            let mut header = guest_packet(ports, op);
            (header.buf_alloc, header.fwd_cnt, header.flags) = (buf_alloc, fwd_cnt, buf_alloc);
            match what {
                0 => world.muxer.connect(number, ports, MockStream(pipe(3000)), world.now),
                1 => { world.offer(fwd_cnt as usize % 5000); }
                2 => { world.poll(); }
                3 => world.muxer.receive(&header, None, world.now),
                4 => {
                    header.len = fwd_cnt;
                    world.muxer.receive(&header, Some(Slices::default()), world.now);
                }
                5 => {
                    world.now += Duration::from_secs(u64::from(fwd_cnt % 8));
                    world.muxer.expire(world.now);
                }
                _ => world.send(header, vec![0; len]),
            }
            world.settle();
            for (_, _, stream) in &world.notes.borrow().incoming {
                let mut stream = stream.borrow_mut();
                if !stream.device_closed && stream.from_host.is_empty() {
                    stream.from_host.extend([0; 5000]);
                }
            }
            prop_assert!(world.muxer.largest_backlog() <= LARGE_BUFFER as usize);
            prop_assert!(world.muxer.count() <= 16 + 200);
            prop_assert!(world.muxer.granted() <= MAX_GRANTED);
        }
    }
}
