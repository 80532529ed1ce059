//! The net device against a guest that writes anything: its rings, its frames, its buffers, in any
//! order, while the host sends frames, changes what holds for the guest's, and lets the tap go.
//!
//! Looks for panics, for events that never come to rest, for buffers that are never given back, for
//! frames that reach the host though its policy forbids them, and (by libFuzzer's own limit) for
//! memory without bound. What the policy forbids is asked of its filter, and of a reader of IPv6
//! packets of this file's own, which believes what a credulous neighbour would.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hull_device_control::{LinkLocal, NetOptions, Policy};
use hull_devices::device::{Device, EventRegistry, Memory, Queues, Ring};
use hull_devices::net::filter::Filter;
use hull_devices::net::{Handle, Net};
use hull_fuzz::{AVAILABLE, FuzzRing, Input, QUEUE, descriptor, memory};
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 0x4_0000;
/// Where frames of the guest are, and buffers for those of the host.
const FRAME: u64 = 0x8000;
const BUFFERS: u64 = 0x2_0000;
const RX: usize = 0;
const TX: usize = 1;
/// virtio's header, an Ethernet header, and the largest frame.
const HEADER: usize = 12;
const ETHERNET: usize = 14;
const MAX_FRAME: usize = 65535 + ETHERNET + 4;
/// Rounds of events after which a device that still has some is taken to be spinning.
const ROUNDS: usize = 500;
const STEPS: usize = 128;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const IPV4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

fn link_local(choice: u8) -> LinkLocal {
    match choice % 3 {
        0 => LinkLocal::None,
        1 => LinkLocal::Ipv6,
        _ => LinkLocal::All,
    }
}

fn policy(link_local: LinkLocal) -> Policy {
    Policy {
        mac: MAC,
        addresses: vec![IPV4.into(), IPV6.into()],
        link_local,
    }
}

/// What the host sees of a guest that a policy is for. A second opinion: written apart from the
/// filter.
fn must_not_pass(policy: &Policy, frame: &[u8]) -> Option<&'static str> {
    if frame.len() < ETHERNET || frame[6..12] != policy.mac {
        return Some("another's hardware address");
    }
    let packet = &frame[ETHERNET..];
    match [frame[12], frame[13]] {
        [0x08, 0x00] if packet.len() >= 20 => {
            let address = |at: usize| Ipv4Addr::from([0, 1, 2, 3].map(|byte| packet[at + byte]));
            if !policy.addresses.contains(&IpAddr::from(address(12))) {
                return Some("another's IPv4 address");
            }
            (policy.link_local != LinkLocal::All && address(16).is_link_local())
                .then_some("a link-local service")
        }
        [0x08, 0x06] if packet.len() >= 18 => {
            let sender = Ipv4Addr::from([14, 15, 16, 17].map(|byte| packet[byte]));
            let own = sender.is_unspecified() || policy.addresses.contains(&sender.into());
            (!own || packet[8..14] != policy.mac).then_some("another's ARP")
        }
        [0x86, 0xdd] if packet.len() >= 40 => ipv6(policy, packet),
        // Whoever gets one that is too short does nothing with it.
        [0x08, 0x00] | [0x08, 0x06] | [0x86, 0xdd] => None,
        _ => Some("another protocol"),
    }
}

fn ipv6(policy: &Policy, packet: &[u8]) -> Option<&'static str> {
    let address = |at: usize| {
        let bytes: [u8; 16] = packet[at..at + 16].try_into().expect("16 bytes");
        Ipv6Addr::from(bytes)
    };
    let source = address(8);
    if !source.is_unspecified() && !policy.addresses.contains(&source.into()) {
        return Some("another's IPv6 address");
    }
    let (mut next, mut at) = (packet[6], 40);
    loop {
        match (next, packet.get(at..at + 8)) {
            (0 | 43 | 60, Some(header)) => {
                next = header[0];
                at += 8 + 8 * usize::from(header[1]);
            }
            // A fragment that is the whole packet (RFC 6946).
            (44, Some(header)) if header[2] == 0 && header[3] & 0xf9 == 0 => {
                next = header[0];
                at += 8;
            }
            (58, Some(message)) => {
                return match message[0] {
                    134 => Some("router advertisement"),
                    137 => Some("redirect"),
                    136 if packet.len() >= at + 24 => {
                        let own = policy.addresses.contains(&address(at + 8).into());
                        (!own).then_some("another's neighbour advertisement")
                    }
                    _ => None,
                };
            }
            (0 | 43 | 44 | 58 | 60, _) => return None,
            _ => {
                let forbidden =
                    policy.link_local == LinkLocal::None && address(24).is_unicast_link_local();
                return forbidden.then_some("a link-local service");
            }
        }
    }
}

/// A frame that is likely to mean something, or not.
fn frame(input: &mut Input<'_>) -> Vec<u8> {
    let choice = input.u8();
    let mut frame = vec![0xff; 6];
    frame.extend(match choice & 0x10 {
        0 => MAC,
        _ => input.bytes(),
    });
    match choice % 6 {
        0 => {
            frame.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
            frame.extend(MAC);
            frame.extend(IPV4.octets());
        }
        1 => {
            frame.extend([0x08, 0x00, 0x45]);
            frame.extend(input.bytes::<11>());
            frame.extend(IPV4.octets());
        }
        2 => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, input.u8()]);
            let mut next = input.u8();
            let header = |next: u8| [0, 43, 44, 58, 60, 60, 6, next][usize::from(next) % 8];
            frame.extend([header(next), 255]);
            frame.extend(match choice & 0x20 {
                0 => IPV6.octets(),
                _ => [0; 16],
            });
            frame.extend(match choice & 0x40 {
                0 => [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                _ => input.bytes(),
            });
            for _ in 0..input.u8() % 12 {
                if header(next) == 58 {
                    break;
                }
                next = input.u8();
                frame.extend([header(next), 0, 0, input.u8() & 6, 0, 0, 0, 0]);
            }
            if header(next) == 58 {
                let kinds = [133, 134, 135, 136, 137, 143, 128, input.u8()];
                frame.extend([kinds[usize::from(input.u8()) % 8], 0, 0, 0, 0, 0, 0, 0]);
                frame.extend(IPV6.octets());
                frame.extend([2, 1]);
                frame.extend(MAC);
            }
        }
        _ => {}
    }
    for _ in 0..input.u8() % 64 {
        frame.push(input.u8());
    }
    // Something is changed at last.
    for _ in 0..choice >> 7 {
        let at = usize::from(input.u8()) % frame.len();
        frame[at] = input.u8();
    }
    frame
}

struct Guest {
    device: Net,
    handle: Handle,
    events: EventRegistry,
    memory: Memory,
    rings: Vec<Arc<dyn Ring>>,
    counts: Vec<Arc<FuzzRing>>,
    available: [u16; 2],
    host: Option<OwnedFd>,
    policy: Option<Policy>,
}

impl Guest {
    fn new(input: &mut Input<'_>) -> Self {
        let (mut device, handle) = Net::new(MAC).expect("host resources");
        let events = EventRegistry::new().expect("epoll");
        device.register(events.clone()).expect("epoll");
        device.activate(input.u64());
        let event_index = input.u8();
        let ring =
            |index: u8| FuzzRing::new(u32::from(index) * 0x1000, event_index >> index & 1 != 0);
        let counts: Vec<Arc<FuzzRing>> = (0..2).map(ring).collect();
        Self {
            device,
            handle,
            events,
            memory: memory(MEMORY as usize),
            rings: counts
                .iter()
                .map(|ring| ring.clone() as Arc<dyn Ring>)
                .collect(),
            counts,
            available: [0; 2],
            host: None,
            policy: None,
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

    /// Makes a chain available without a word to the device.
    fn publish(&mut self, queue: usize, head: u16) {
        let ring = queue as u64 * 0x1000 + AVAILABLE;
        let slot = u64::from(self.available[queue] % QUEUE);
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.write(&head.to_le_bytes(), ring + 4 + slot * 2);
        self.write(&self.available[queue].to_le_bytes(), ring + 2);
    }

    /// False when the device has given up.
    fn kick(&mut self, queue: usize) -> bool {
        let mut queues = Queues::new(&self.rings, self.memory.clone());
        self.device.queue_event(queue, &mut queues).is_ok()
    }

    fn run(&mut self) -> bool {
        for _ in 0..ROUNDS {
            let mut ready = Vec::new();
            self.events.poll(&mut ready).expect("epoll");
            if ready.is_empty() {
                for ring in &self.counts {
                    assert!(ring.all_given(), "a buffer was never given back");
                }
                return true;
            }
            for (token, flags) in ready {
                let mut queues = Queues::new(&self.rings, self.memory.clone());
                if self.device.host_event(token, flags, &mut queues).is_err() {
                    return false;
                }
            }
            self.host_receives();
        }
        panic!("the device does not come to rest");
    }

    /// Takes what reached the host, and looks whether it may have.
    fn host_receives(&self) {
        let Some(host) = &self.host else { return };
        let mut bytes = vec![0; HEADER + MAX_FRAME + 1];
        while let Ok(length) = rustix::io::read(host, &mut bytes) {
            if length == 0 {
                return;
            }
            assert!((HEADER + ETHERNET..=HEADER + MAX_FRAME).contains(&length));
            if let Some(policy) = &self.policy {
                let (header, frame) = bytes[..length].split_at(HEADER);
                assert_eq!(
                    Filter::new(policy.clone()).check(header, frame),
                    Ok(()),
                    "{frame:02x?}"
                );
                assert_eq!(must_not_pass(policy, frame), None, "{frame:02x?}");
            }
        }
    }

    fn options(&mut self, input: &mut Input<'_>) -> NetOptions {
        let choice = input.u8();
        self.policy = (choice & 1 != 0).then(|| policy(link_local(choice >> 1)));
        let rate = match choice >> 2 & 3 {
            0 | 1 => 0,
            2 => 1 << 30,
            _ => input.u64(),
        };
        NetOptions {
            policy: self.policy.clone(),
            rate,
        }
    }

    /// One tap for another. The other end of a socket is the host.
    fn attach(&mut self, input: &mut Input<'_>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (host, tap) = pair.expect("a socketpair");
        let options = self.options(input);
        self.handle.attach(tap, options, Box::new(|_| ()));
        // What the old one holds was sent under another policy, and has been looked at.
        self.host = Some(host);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let raw = policy(link_local(input.u8()));
    if Filter::new(raw.clone()).check(&[0; HEADER], data).is_ok() {
        assert_eq!(must_not_pass(&raw, data), None);
    }
    let mut guest = Guest::new(&mut input);
    guest.attach(&mut input);
    if !guest.run() {
        return;
    }
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        let alive = match choice % 16 {
            0..=3 => {
                // A frame of the guest, in two pieces.
                let mut bytes = input.bytes::<HEADER>().to_vec();
                bytes.extend(frame(&mut input));
                let length = bytes.len() as u32;
                let first = u32::from(input.u8()).min(length);
                guest.write(&bytes, FRAME);
                guest.describe(TX, 0, FRAME, first, 1, 1);
                guest.describe(TX, 1, FRAME + u64::from(first), length - first, 0, 0);
                guest.publish(TX, 0);
                choice & 0x80 != 0 || guest.kick(TX)
            }
            4 => {
                // One of any length.
                let length = u32::from(input.u16()) * 2;
                guest.describe(TX, 0, FRAME, length, 0, 0);
                guest.publish(TX, 0);
                guest.kick(TX)
            }
            5..=6 => {
                // Some buffers, each of its own length.
                for _ in 0..=choice >> 5 {
                    let head = input.u16() % QUEUE;
                    let length = u32::from(input.u16() % 4096);
                    guest.describe(RX, head, BUFFERS + 0x1000 * u64::from(head), length, 2, 0);
                    guest.publish(RX, head);
                }
                choice & 0x10 != 0 || guest.kick(RX)
            }
            7..=8 => {
                let queue = usize::from(choice >> 7);
                let address = u64::from(input.u32()) % (MEMORY + 0x100);
                let (length, flags) = (input.u32(), input.u16());
                guest.describe(queue, input.u16(), address, length, flags, input.u16());
                guest.publish(queue, input.u16());
                guest.kick(queue)
            }
            9 => {
                let address = u64::from(input.u32()) % (MEMORY + 0x100);
                guest.write(&input.bytes::<16>(), address);
                true
            }
            10..=11 => {
                let length = match choice & 0x80 {
                    0 => usize::from(input.u8()),
                    _ => usize::from(input.u16()) * 2,
                };
                if let Some(host) = &guest.host {
                    for _ in 0..=choice >> 5 & 3 {
                        let _ = send(host, &vec![1; length], SendFlags::NOSIGNAL);
                    }
                }
                true
            }
            12 => {
                let options = guest.options(&mut input);
                guest.handle.change(options, Box::new(|_| ()));
                true
            }
            13 => match choice >> 5 {
                0..=3 => {
                    guest.attach(&mut input);
                    true
                }
                4 | 5 => {
                    guest.handle.detach(Box::new(|_| ()));
                    guest.host = None;
                    true
                }
                // The interface goes, and nobody has said so.
                _ => {
                    guest.host = None;
                    true
                }
            },
            14 => {
                guest.device.activate(input.u64());
                true
            }
            _ => {
                let queue = usize::from(choice >> 4);
                if queue == 0 {
                    guest.device.reset();
                    true
                } else {
                    guest.kick(queue % 3)
                }
            }
        };
        if !alive || !guest.run() {
            break;
        }
        guest.host_receives();
    }
});
