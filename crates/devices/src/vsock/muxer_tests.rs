//! Tests of the multiplexer and its connections: the effect of each packet and event, as tables and
//! sequences.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use rustix::event::epoll::EventFlags;

use super::connection::{BOOT_TIMEOUT, CONNECT_TIMEOUT, LINGER_TIMEOUT, Ports};
use super::muxer::{ConnectError, LARGE_BUFFER, MAX_CONNECTIONS, MAX_GRANTED, MAX_RESETS};
use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::testing::*;

const PORTS: Ports = Ports {
    host: 1000,
    guest: 2000,
};

fn shutdown(flags: u32) -> Header {
    Header {
        flags,
        ..guest_packet(PORTS, op::SHUTDOWN)
    }
}

/// A world with one open connection that the host asked for.
fn open(capacity: usize) -> (World, Shared) {
    let mut world = World::new(capacity);
    let stream = pipe(capacity);
    world
        .muxer
        .connect(7, PORTS, MockStream(stream.clone()), world.now);
    assert_eq!(world.ops(), [op::REQUEST]);
    world.send(guest_packet(PORTS, op::RESPONSE), Vec::new());
    world.settle();
    assert_eq!(world.notes.borrow().answers, [(7, Ok(()))]);
    (world, stream)
}

fn interest_of(world: &World, stream: &Shared) -> Option<EventFlags> {
    world
        .registered
        .values()
        .find(|(shared, _)| std::rc::Rc::ptr_eq(shared, stream))
        .map(|(_, flags)| *flags)
}

fn read_host(stream: &Shared) -> Vec<u8> {
    stream.borrow_mut().to_host.drain(..).collect()
}

#[test]
fn answers_to_a_request_of_the_host() {
    // (the guest's first packet, the device's answer, whether the host got its connection)
    let answers: [(u16, &[u16], bool); 6] = [
        (op::RESPONSE, &[], true),
        (op::RST, &[], false),
        (op::RW, &[op::RST], false),
        (op::REQUEST, &[op::RST], false),
        (op::SHUTDOWN, &[op::RST], false),
        (99, &[op::RST], false),
    ];
    for (packet, answer, accepted) in answers {
        let mut world = World::new(100);
        let stream = pipe(100);
        world
            .muxer
            .connect(1, PORTS, MockStream(stream.clone()), world.now);
        world.settle();
        assert_eq!(
            interest_of(&world, &stream),
            None,
            "nothing is read before the answer"
        );
        assert_eq!(world.ops(), [op::REQUEST]);
        world.send(guest_packet(PORTS, packet), Vec::new());
        assert_eq!(world.ops(), answer, "after {packet}");
        let notes = world.notes.borrow();
        assert_eq!(notes.answers.len(), 1);
        assert_eq!(notes.answers[0].1.is_ok(), accepted, "after {packet}");
        assert_eq!(stream.borrow().device_closed, !accepted);
    }
}

#[test]
fn answer_before_the_request_was_sent_is_refused() {
    let mut world = World::new(100);
    world
        .muxer
        .connect(1, PORTS, MockStream(pipe(100)), world.now);
    world.send(guest_packet(PORTS, op::RESPONSE), Vec::new());
    assert_eq!(world.ops(), [op::RST]);
    assert!(world.notes.borrow().answers[0].1.is_err());
}

#[test]
fn request_of_the_guest() {
    for (listens, refuses, answer) in [
        (true, false, op::RESPONSE),
        (false, false, op::RST),
        (true, true, op::RST),
    ] {
        let mut world = World::new(100);
        world.notes.borrow_mut().refuse_incoming = refuses;
        if listens {
            world.muxer.listen(PORTS.host);
        }
        world.send(guest_packet(PORTS, op::REQUEST), Vec::new());
        let packets = world.packets();
        assert_eq!(packets.len(), 1);
        let header = packets[0].0;
        assert_eq!(
            (header.op, header.src_port, header.dst_port),
            (answer, 1000, 2000)
        );
        assert_eq!(world.muxer.count(), usize::from(answer == op::RESPONSE));
    }
}

#[test]
fn strangers() {
    let strange = |change: fn(&mut Header)| {
        let mut header = guest_packet(PORTS, op::RW);
        change(&mut header);
        let mut world = World::new(100);
        world.muxer.listen(PORTS.host);
        world.send(header, vec![1; 10]);
        world
            .packets()
            .iter()
            .map(|(header, _)| (header.op, header.kind))
            .collect::<Vec<_>>()
    };
    assert_eq!(strange(|_| ()), [(op::RST, 1)], "data without a connection");
    assert_eq!(
        strange(|header| header.op = op::RST),
        [],
        "no reset answers a reset"
    );
    assert_eq!(strange(|header| header.op = 0), [(op::RST, 1)]);
    assert_eq!(strange(|header| header.op = 77), [(op::RST, 1)]);
    let sequenced = |header: &mut Header| (header.kind, header.op) = (2, op::REQUEST);
    assert_eq!(
        strange(sequenced),
        [(op::RST, 2)],
        "sequenced packets are refused in their own type"
    );
    assert_eq!(strange(|header| header.src_cid = 4), [], "another source");
    assert_eq!(strange(|header| header.src_cid = u64::MAX), []);
    assert_eq!(
        strange(|header| header.dst_cid = 3),
        [],
        "another destination"
    );
}

#[test]
fn packets_that_break_an_open_connection() {
    for (packet, len) in [
        (op::REQUEST, 0),
        (op::RESPONSE, 0),
        (0, 0),
        (8, 0),
        (u16::MAX, 0),
        (op::RW, LARGE_BUFFER as usize + 1),
    ] {
        let (mut world, stream) = open(100);
        world.send(guest_packet(PORTS, packet), vec![0; len]);
        assert_eq!(world.ops(), [op::RST], "after {packet}");
        assert_eq!(world.muxer.count(), 0);
        assert!(stream.borrow().device_closed);
    }
    let (mut world, stream) = open(100);
    world
        .muxer
        .receive(&guest_packet(PORTS, op::RW), None, world.now);
    assert_eq!(world.ops(), [op::RST], "after a truncated packet");
    assert!(stream.borrow().device_closed);
}

#[test]
fn data_after_shutdown_breaks_the_connection() {
    let (mut world, _stream) = open(100);
    world.send(shutdown(SHUTDOWN_SEND), Vec::new());
    world.send(guest_packet(PORTS, op::RW), Vec::new());
    assert!(world.ops().is_empty(), "an empty packet does no harm");
    world.send(guest_packet(PORTS, op::RW), vec![1]);
    assert_eq!(world.ops(), [op::RST]);
}

#[test]
fn host_to_guest_needs_credit_and_room() {
    let (mut world, stream) = open(1 << 20);
    stream.borrow_mut().from_host.extend([5; 100_000]);
    assert_eq!(interest_of(&world, &stream), Some(EventFlags::IN));
    assert!(world.poll());
    assert_eq!(
        interest_of(&world, &stream),
        None,
        "not polled while it waits for a buffer"
    );
    assert!(!world.poll());
    let (header, data) = world.offer(1000).unwrap();
    assert_eq!((header.op, header.len, data.len()), (op::RW, 1000, 1000));
    // The guest's buffer is 65536 bytes.
    let rest = world.packets();
    let sent: usize = rest.iter().map(|(_, data)| data.len()).sum();
    assert_eq!(sent, 65536 - 1000);
    assert_eq!(
        rest.last().unwrap().0.op,
        op::CREDIT_REQUEST,
        "tells the guest that it waits"
    );
    assert_eq!(
        interest_of(&world, &stream),
        None,
        "not polled without credit"
    );
    let update = Header {
        fwd_cnt: 65536,
        ..guest_packet(PORTS, op::CREDIT_UPDATE)
    };
    world.send(update, Vec::new());
    let rest = world.packets();
    assert_eq!(rest.len(), 1);
    assert_eq!(rest[0].1.len(), 100_000 - 65536);
    assert_eq!(interest_of(&world, &stream), Some(EventFlags::IN));
}

#[test]
fn guest_to_host_waits_in_the_backlog() {
    let (mut world, stream) = open(1000);
    world.send(guest_packet(PORTS, op::RW), vec![1; 1500]);
    world.settle();
    assert_eq!(
        stream.borrow().to_host.len(),
        1000,
        "written at once as far as possible"
    );
    let both = EventFlags::IN | EventFlags::OUT;
    assert_eq!(interest_of(&world, &stream), Some(both));
    assert!(!world.poll());
    world.send(guest_packet(PORTS, op::RW), vec![2; 500]);
    assert_eq!(read_host(&stream), [1; 1000]);
    assert!(world.poll());
    let mut expected = vec![1; 500];
    expected.extend([2; 500]);
    assert_eq!(read_host(&stream), expected);
    assert_eq!(interest_of(&world, &stream), Some(EventFlags::IN));
    assert!(world.ops().is_empty(), "too little to tell the guest about");
    world.send(guest_packet(PORTS, op::CREDIT_REQUEST), Vec::new());
    let packets = world.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.fwd_cnt),
        (op::CREDIT_UPDATE, 2000)
    );
    assert_eq!(packets[0].0.buf_alloc, LARGE_BUFFER);
}

#[test]
fn credit_comes_back_in_large_steps() {
    // (the guest's own buffer, bytes after which the guest should know that they have left ours)
    let large = LARGE_BUFFER as usize;
    for (buf_alloc, news) in [
        (u32::MAX, large / 2),
        (LARGE_BUFFER, large / 2),
        (1 << 16, 1 << 15),
        (4096, 1),
    ] {
        let (mut world, stream) = open(1 << 20);
        let step = 10_000;
        let mut updates = 0;
        for _ in 0..100 {
            let header = Header {
                buf_alloc,
                ..guest_packet(PORTS, op::RW)
            };
            world.send(header, vec![0; step]);
            read_host(&stream);
            updates += world.ops().len();
        }
        assert_eq!(updates, 100 / news.div_ceil(step), "{buf_alloc}");
    }
}

#[test]
fn ends_of_each_direction() {
    let (mut world, stream) = open(1000);
    stream.borrow_mut().from_host.extend([1; 10]);
    stream.borrow_mut().host_shut_write = true;
    world.poll();
    let packets = world.packets();
    let seen: Vec<_> = packets
        .iter()
        .map(|(header, _)| (header.op, header.flags))
        .collect();
    assert_eq!(seen, [(op::RW, 0)], "the end is found by the next look");
    world.poll();
    let packets = world.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
    assert_eq!(
        interest_of(&world, &stream),
        Some(EventFlags::empty()),
        "only its hang-up"
    );
    world.send(guest_packet(PORTS, op::RW), vec![3; 1500]);
    world.send(shutdown(SHUTDOWN_SEND), Vec::new());
    world.settle();
    assert!(
        !stream.borrow().device_shut_write,
        "not before the backlog is written"
    );
    assert_eq!(read_host(&stream).len(), 1000);
    world.poll();
    assert_eq!(read_host(&stream).len(), 500);
    assert!(stream.borrow().host_at_end());
    let packets = world.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags),
        (op::SHUTDOWN, SHUTDOWN_BOTH)
    );
    assert!(stream.borrow().device_closed);
    assert_eq!(world.muxer.count(), 1, "the guest has not confirmed");
    world.send(guest_packet(PORTS, op::RST), Vec::new());
    assert_eq!((world.muxer.count(), world.ops().len()), (0, 0));
}

#[test]
fn guest_that_receives_no_more() {
    let (mut world, stream) = open(1000);
    world.send(shutdown(SHUTDOWN_RECEIVE), Vec::new());
    world.settle();
    assert!(stream.borrow().device_shut_read);
    assert_eq!(interest_of(&world, &stream), Some(EventFlags::empty()));
    world.send(guest_packet(PORTS, op::RW), vec![3; 5]);
    assert_eq!(read_host(&stream), [3; 5]);
    stream.borrow_mut().host_closed = true;
    assert!(world.poll());
    let packets = world.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags),
        (op::SHUTDOWN, SHUTDOWN_BOTH)
    );
    assert!(!world.poll());
}

#[test]
fn host_that_is_gone() {
    let (mut world, stream) = open(1000);
    world.send(guest_packet(PORTS, op::RW), vec![3; 1500]);
    stream.borrow_mut().from_host.extend([1; 10]);
    stream.borrow_mut().host_closed = true;
    world.settle();
    assert!(world.poll());
    let packets = world.packets();
    let seen: Vec<_> = packets
        .iter()
        .map(|(header, _)| (header.op, header.flags))
        .collect();
    assert_eq!(seen[0], (op::SHUTDOWN, SHUTDOWN_RECEIVE));
    assert_eq!(seen[1].0, op::RW, "what it wrote before still arrives");
    world.poll();
    let packets = world.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags),
        (op::SHUTDOWN, SHUTDOWN_BOTH)
    );
    world.send(guest_packet(PORTS, op::RW), vec![3; 1500]);
    assert!(
        world.ops().is_empty(),
        "data that was on its way is dropped"
    );
    world.send(shutdown(SHUTDOWN_BOTH), Vec::new());
    assert_eq!(world.ops(), [op::RST], "both closed at once");
    assert_eq!(world.muxer.count(), 0);
}

#[test]
fn guest_that_is_gone_leaves_its_bytes() {
    for (last, answer) in [
        (shutdown(SHUTDOWN_BOTH), &[op::RST][..]),
        (guest_packet(PORTS, op::RST), &[]),
    ] {
        let (mut world, stream) = open(1000);
        world.muxer.listen(PORTS.host);
        world.send(guest_packet(PORTS, op::RW), vec![3; 2500]);
        world.send(last, Vec::new());
        assert_eq!(world.ops(), answer);
        assert_eq!(world.muxer.count(), 1);
        // The guest may use the same port again before the host has read everything.
        world.send(guest_packet(PORTS, op::REQUEST), Vec::new());
        assert_eq!(world.ops(), [op::RESPONSE]);
        let mut all = Vec::new();
        for _ in 0..3 {
            all.extend(read_host(&stream));
            world.poll();
        }
        assert_eq!(all, [3; 2500]);
        assert!(stream.borrow().host_at_end() && stream.borrow().device_closed);
        assert_eq!(world.muxer.count(), 1);
    }
}

#[test]
fn port_reused_while_closing() {
    let (mut world, stream) = open(1000);
    world.muxer.listen(PORTS.host);
    world.send(shutdown(SHUTDOWN_SEND), Vec::new());
    stream.borrow_mut().host_closed = true;
    world.poll();
    assert_eq!(world.ops(), [op::SHUTDOWN]);
    assert_eq!(world.muxer.count(), 1, "the guest has not confirmed");
    world.send(guest_packet(PORTS, op::REQUEST), Vec::new());
    assert_eq!(world.ops(), [op::RESPONSE]);
    assert_eq!(world.muxer.count(), 1);
}

#[test]
fn time_is_bounded() {
    let mut world = World::new(100);
    world
        .muxer
        .connect(1, PORTS, MockStream(pipe(100)), world.now);
    world.now += CONNECT_TIMEOUT + Duration::from_secs(1);
    world.muxer.expire(world.now);
    assert!(
        world.notes.borrow().answers.is_empty(),
        "the guest may still boot"
    );
    assert_eq!(world.ops(), [op::REQUEST]);
    world.now += CONNECT_TIMEOUT;
    world.muxer.expire(world.now);
    assert!(matches!(
        world.notes.borrow().answers[..],
        [(1, Err(ConnectError::Failed { .. }))]
    ));
    assert_eq!(world.ops(), [op::RST]);

    let mut world = World::new(100);
    world
        .muxer
        .connect(1, PORTS, MockStream(pipe(100)), world.now);
    world.now += BOOT_TIMEOUT;
    world.muxer.expire(world.now);
    assert_eq!(
        world.notes.borrow().answers.len(),
        1,
        "a guest that never boots"
    );

    let (mut world, stream) = open(100);
    stream.borrow_mut().host_closed = true;
    world.poll();
    world.packets();
    world.send(shutdown(SHUTDOWN_SEND), Vec::new());
    world.packets();
    assert_eq!(world.muxer.count(), 1);
    world.now += LINGER_TIMEOUT;
    world.muxer.expire(world.now);
    assert_eq!(world.ops(), [op::RST]);
    assert_eq!(world.muxer.count(), 0);
}

#[test]
fn reset_of_the_device() {
    let (mut world, stream) = open(100);
    world.muxer.listen(1);
    let waiting = pipe(100);
    world.send(
        guest_packet(Ports { host: 9, guest: 9 }, op::RW),
        Vec::new(),
    );
    let unsent = Ports { host: 5, guest: 5 };
    world
        .muxer
        .connect(8, unsent, MockStream(waiting.clone()), world.now);
    world.muxer.guest_gone();
    world.settle();
    assert!(stream.borrow().device_closed);
    assert_eq!(
        world.ops(),
        [op::REQUEST],
        "what the guest has not seen is kept"
    );
    world.muxer.guest_gone();
    world.settle();
    assert!(waiting.borrow().device_closed);
    assert!(world.notes.borrow().answers[1].1.is_err());
    world.send(
        guest_packet(Ports { host: 1, guest: 9 }, op::REQUEST),
        Vec::new(),
    );
    assert_eq!(world.ops(), [op::RESPONSE], "still listening");
}

#[test]
fn numbers_are_bounded() {
    let mut world = World::new(100);
    world.muxer.listen(1);
    for guest in 0..3 * MAX_CONNECTIONS as u32 {
        world.send(
            guest_packet(Ports { host: 1, guest }, op::REQUEST),
            Vec::new(),
        );
    }
    assert_eq!(world.muxer.count(), MAX_CONNECTIONS);
    assert!(world.muxer.granted() <= MAX_GRANTED);
    let packets = world.packets();
    let count = |op| packets.iter().filter(|(header, _)| header.op == op).count();
    assert_eq!(count(op::RESPONSE), MAX_CONNECTIONS);
    assert_eq!(count(op::RST), MAX_RESETS);
    world.muxer.connect(
        1,
        Ports { host: 2, guest: 2 },
        MockStream(pipe(1)),
        world.now,
    );
    assert!(matches!(
        world.notes.borrow().answers[..],
        [(1, Err(ConnectError::TooMany { .. }))]
    ));
    for guest in 0..MAX_CONNECTIONS as u32 {
        world.send(guest_packet(Ports { host: 1, guest }, op::RST), Vec::new());
    }
    assert_eq!((world.muxer.count(), world.muxer.granted()), (0, 0));
}

#[test]
fn connections_take_turns() {
    let mut world = World::new(1 << 20);
    let mut streams = Vec::new();
    for guest in 0..5 {
        let stream = pipe(1 << 20);
        let ports = Ports { host: 1, guest };
        world
            .muxer
            .connect(0, ports, MockStream(stream.clone()), world.now);
        world.packets();
        world.send(guest_packet(ports, op::RESPONSE), Vec::new());
        world.settle();
        stream.borrow_mut().from_host.extend([0; 30_000]);
        streams.push(stream);
    }
    world.poll();
    let turns: Vec<u32> = (0..30)
        .map(|_| world.offer(1000).unwrap().0.dst_port)
        .collect();
    for round in turns.chunks(5) {
        let mut round = round.to_vec();
        round.sort_unstable();
        assert_eq!(round, [0, 1, 2, 3, 4]);
    }
}

#[test]
fn failing_registration_ends_the_connection() {
    let (mut world, stream) = open(100);
    stream.borrow_mut().capacity = 0;
    world.send(guest_packet(PORTS, op::RW), vec![0; 10]);
    world
        .muxer
        .settle(|_, _, _| Err(std::io::ErrorKind::OutOfMemory.into()));
    world.registered.clear();
    assert_eq!(world.muxer.count(), 0);
    assert!(stream.borrow().device_closed);
    assert_eq!(world.ops(), [op::RST]);
}
