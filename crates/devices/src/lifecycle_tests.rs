//! Every device is run, quiesced with requests in flight, saved, restored into a fresh one, and run
//! on: each request completes exactly once. It is also reset with requests in flight: none
//! completes afterwards.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_device_control::{Cache, DeviceType, NetOptions};
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use crate::balloon::Balloon;
use crate::block::Block;
use crate::device::Device;
use crate::entropy::Entropy;
use crate::fs::{Fs, Shares};
use crate::net::{Handle as NetHandle, Net};
use crate::runner::DeviceRunner;
use crate::state::{RestoreError, SaveError, SavedDevice};
use crate::testing::{Guest, NEXT, WRITE};
use crate::vsock::Vsock;
use crate::vsock::packet::{GUEST_CID, HOST_CID, Header, TYPE_STREAM, op};

/// Requests that fit into a queue at a time: each has three descriptors.
const REQUESTS: u16 = 20;
const DESCRIPTORS: u16 = 3;
/// Buffers of request 0; the others follow.
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u64 = 0x4000;
/// Where the answer is within a request's buffer.
const ANSWER: u64 = 0x2000;
/// How long to wait for a completion that must not come.
const SILENCE: Duration = Duration::from_millis(20);

/// One device to be tested.
trait Subject {
    /// A fresh device of the same kind, on the same host side.
    fn device(&mut self) -> Box<dyn Device>;

    /// The queue that its requests are in.
    fn queue(&self) -> usize;

    /// Called once, when the first device runs.
    fn begin(&mut self, _bench: &mut Bench) {}

    /// Request number `index`: what the driver writes, and how much room for an answer there is.
    fn request(&mut self, index: u16) -> (Vec<u8>, u32);

    /// Request number `index` completed with `answer`.
    fn completed(&mut self, index: u16, answer: &[u8]);

    /// All requests have completed, the last of them with number `count` - 1.
    fn end(&mut self, _count: u16) {}
}

/// A device at work in a guest.
struct Bench {
    guest: Guest,
    runner: DeviceRunner,
}

impl Bench {
    fn new(device: Box<dyn Device>) -> Self {
        let guest = Guest::new(device.queue_sizes());
        let mut runner = DeviceRunner::new(device).unwrap();
        runner.set_memory(Some(guest.memory().clone()));
        // The host's side was attached by commands.
        runner.host_events().unwrap();
        let features = runner.device().features();
        runner.activate(features, guest.rings().to_vec());
        Self { guest, runner }
    }

    /// Offers a request in place `slot`.
    fn offer(&mut self, queue: usize, slot: u16, (input, room): (Vec<u8>, u32)) {
        let at = BUFFERS + u64::from(slot) * BUFFER;
        let memory = self.guest.memory().clone();
        memory.write_slice(&input, GuestAddress(at)).unwrap();
        let input = u32::try_from(input.len()).unwrap();
        let mut descriptors = vec![(at, input, 0, 0)];
        if room > 0 {
            descriptors[0].2 = NEXT;
            descriptors[0].3 = 1;
            descriptors.push((at + ANSWER, room, WRITE, 0));
        }
        if input == 0 {
            descriptors = vec![(at + ANSWER, room, WRITE, 0)];
        }
        self.guest.offer_at(queue, slot * DESCRIPTORS, &descriptors);
    }

    /// The slots of requests that have completed, and their answers.
    fn completed(&mut self, queue: usize) -> Vec<(u16, Vec<u8>)> {
        let memory = self.guest.memory().clone();
        std::iter::from_fn(|| self.guest.next_used(queue))
            .map(|(head, length)| {
                let slot = head / DESCRIPTORS;
                let at = BUFFERS + u64::from(slot) * BUFFER + ANSWER;
                let mut answer = vec![0; length as usize];
                memory.read_slice(&mut answer, GuestAddress(at)).unwrap();
                (slot, answer)
            })
            .collect()
    }

    /// One request, waited for.
    fn call(&mut self, queue: usize, request: (Vec<u8>, u32)) -> Vec<u8> {
        self.offer(queue, 0, request);
        self.runner.queue_event(queue).unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some((_, answer)) = self.completed(queue).pop() {
                return answer;
            }
            assert!(Instant::now() < end, "the request does not complete");
            self.runner.host_events().unwrap();
        }
    }
}

/// Contents of the queue's slots.
#[derive(Default)]
struct Track {
    slots: [Option<u16>; REQUESTS as usize],
    next: u16,
    completed: HashSet<u16>,
}

impl Track {
    /// Offers a request in each free slot.
    fn offer(&mut self, bench: &mut Bench, subject: &mut dyn Subject) {
        for (slot, content) in (0..).zip(&mut self.slots) {
            if content.is_none() {
                *content = Some(self.next);
                bench.offer(subject.queue(), slot, subject.request(self.next));
                self.next += 1;
            }
        }
    }

    /// Takes completed requests.
    fn take(&mut self, bench: &mut Bench, subject: &mut dyn Subject) -> usize {
        let completed = bench.completed(subject.queue());
        let count = completed.len();
        for (slot, answer) in completed {
            let index = self.slots[usize::from(slot)].take();
            let index = index.expect("a request completed twice, or was never made");
            assert!(self.completed.insert(index));
            subject.completed(index, &answer);
        }
        count
    }

    /// Runs until every request has completed.
    fn finish(&mut self, bench: &mut Bench, subject: &mut dyn Subject) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.slots.iter().any(Option::is_some) {
            bench.runner.host_events().unwrap();
            self.take(bench, subject);
            assert!(Instant::now() < end, "requests are lost: {:?}", self.slots);
        }
    }
}

fn run(subject: &mut dyn Subject) {
    let queue = subject.queue();
    let mut bench = Bench::new(subject.device());
    subject.begin(&mut bench);
    let mut track = Track::default();

    for round in 0..5 {
        // At work.
        track.offer(&mut bench, subject);
        bench.runner.queue_event(queue).unwrap();
        track.finish(&mut bench, subject);
        // Some requests are in flight, some not seen yet.
        track.offer(&mut bench, subject);
        bench.runner.queue_event(queue).unwrap();
        let states = bench.runner.quiesce().unwrap();
        track.take(&mut bench, subject);
        track.offer(&mut bench, subject);
        bench.runner.queue_event(queue).unwrap();
        bench.runner.host_events().unwrap();
        std::thread::sleep(SILENCE);
        assert_eq!(track.take(&mut bench, subject), 0, "after the quiesce");
        assert_eq!(
            states[queue].next_available, states[queue].next_used,
            "requests are in flight"
        );
        // Every other round it resumes itself.
        if round % 2 == 0 {
            let saved = bench.runner.save().unwrap();
            let text = serde_json::to_string(&saved).unwrap();
            let saved: SavedDevice = serde_json::from_str(&text).unwrap();
            bench = restored(bench, subject.device(), &saved).unwrap();
        }
        bench.runner.resume().unwrap();
        track.finish(&mut bench, subject);
    }
    subject.end(track.next);

    // A reset with requests in flight.
    track.offer(&mut bench, subject);
    bench.runner.queue_event(queue).unwrap();
    bench.runner.reset();
    let before = bench.completed(queue).len();
    bench.runner.queue_event(queue).unwrap();
    bench.runner.host_events().unwrap();
    std::thread::sleep(SILENCE);
    assert_eq!(bench.completed(queue).len(), 0, "after the reset");
    assert!(before <= usize::from(REQUESTS));

    // Then it works again.
    let mut guest = Guest::new(bench.runner.device().queue_sizes());
    std::mem::swap(&mut guest, &mut bench.guest);
    let features = bench.runner.device().features();
    bench.runner.set_memory(Some(bench.guest.memory().clone()));
    bench
        .runner
        .activate(features, bench.guest.rings().to_vec());
    subject.begin(&mut bench);
    let mut track = Track {
        next: track.next,
        ..Track::default()
    };
    track.offer(&mut bench, subject);
    bench.runner.queue_event(queue).unwrap();
    track.finish(&mut bench, subject);
}

/// The saved device as a fresh one, quiesced, in the same guest.
fn restored(
    bench: Bench,
    device: Box<dyn Device>,
    saved: &SavedDevice,
) -> Result<Bench, RestoreError> {
    let Bench { mut guest, runner } = bench;
    drop(runner);
    let mut runner = DeviceRunner::new(device).unwrap();
    runner.set_memory(Some(guest.memory().clone()));
    runner.host_events().unwrap();
    guest.restore_rings(&saved.driver.as_ref().unwrap().queues);
    runner.restore(saved, guest.rings().to_vec())?;
    Ok(Bench { guest, runner })
}

struct EntropySubject;

impl Subject for EntropySubject {
    fn device(&mut self) -> Box<dyn Device> {
        Box::new(Entropy::new().unwrap())
    }

    fn queue(&self) -> usize {
        0
    }

    fn request(&mut self, _index: u16) -> (Vec<u8>, u32) {
        (Vec::new(), 2000)
    }

    fn completed(&mut self, _index: u16, answer: &[u8]) {
        assert_eq!(answer.len(), 2000);
    }
}

#[test]
fn entropy() {
    run(&mut EntropySubject);
}

struct BalloonSubject;

impl Subject for BalloonSubject {
    fn device(&mut self) -> Box<dyn Device> {
        Box::new(Balloon::default())
    }

    fn queue(&self) -> usize {
        2
    }

    fn request(&mut self, _index: u16) -> (Vec<u8>, u32) {
        (Vec::new(), 4096)
    }

    fn completed(&mut self, _index: u16, answer: &[u8]) {
        assert!(answer.is_empty() || answer.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn balloon() {
    run(&mut BalloonSubject);
}

struct BlockSubject(File);

impl Subject for BlockSubject {
    fn device(&mut self) -> Box<dyn Device> {
        Box::new(Block::new(self.0.try_clone().unwrap(), false, "disk").unwrap())
    }

    fn queue(&self) -> usize {
        0
    }

    /// Writes a sector.
    fn request(&mut self, index: u16) -> (Vec<u8>, u32) {
        let mut request = vec![1, 0, 0, 0, 0, 0, 0, 0];
        request.extend(u64::from(index).to_le_bytes());
        request.extend([index as u8; 512]);
        (request, 1)
    }

    fn completed(&mut self, _index: u16, answer: &[u8]) {
        assert_eq!(answer, [0]);
    }

    fn end(&mut self, count: u16) {
        use std::os::unix::fs::FileExt;
        for index in 0..count {
            let mut sector = [0; 512];
            let at = u64::from(index) * 512;
            self.0.read_exact_at(&mut sector, at).unwrap();
            assert_eq!(sector, [index as u8; 512], "sector {index}");
        }
    }
}

#[test]
fn block() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    run(&mut BlockSubject(file));
}

struct NetSubject {
    handle: Option<NetHandle>,
    /// The host's side, one socket for each device.
    hosts: Vec<OwnedFd>,
}

const HEADER: usize = 12;

impl Subject for NetSubject {
    fn device(&mut self) -> Box<dyn Device> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (device, handle) = Net::new([2, 0, 0, 0, 0, 1]).unwrap();
        let flags = SocketFlags::NONBLOCK;
        let (host, tap) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        handle.attach(
            tap,
            NetOptions::default(),
            Box::new(|result| result.unwrap()),
        );
        self.handle = Some(handle);
        self.hosts.push(host);
        Box::new(device)
    }

    fn queue(&self) -> usize {
        1
    }

    fn request(&mut self, index: u16) -> (Vec<u8>, u32) {
        let mut frame = vec![0; HEADER + 60];
        frame[HEADER..HEADER + 2].copy_from_slice(&index.to_le_bytes());
        (frame, 0)
    }

    fn completed(&mut self, _index: u16, answer: &[u8]) {
        assert!(answer.is_empty());
    }

    fn end(&mut self, count: u16) {
        let mut seen = HashSet::new();
        for host in &self.hosts {
            let mut frame = [0; 100];
            while let Ok(length) = rustix::io::read(host, &mut frame) {
                if length == 0 {
                    break;
                }
                let index = u16::from_le_bytes([frame[HEADER], frame[HEADER + 1]]);
                assert!(seen.insert(index), "frame {index} was sent twice");
            }
        }
        assert_eq!(seen.len(), usize::from(count));
    }
}

#[test]
fn net() {
    run(&mut NetSubject {
        handle: None,
        hosts: Vec::new(),
    });
}

struct VsockSubject;

impl Subject for VsockSubject {
    fn device(&mut self) -> Box<dyn Device> {
        Box::new(Vsock::new(Box::new(|_| ())).unwrap().0)
    }

    fn queue(&self) -> usize {
        1
    }

    /// A packet for no connection.
    fn request(&mut self, index: u16) -> (Vec<u8>, u32) {
        let header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: index.into(),
            dst_port: 1,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        };
        (header.to_bytes().to_vec(), 0)
    }

    fn completed(&mut self, _index: u16, answer: &[u8]) {
        assert!(answer.is_empty());
    }
}

#[test]
fn vsock() {
    run(&mut VsockSubject);
}

/// The driver of a restored vsock device learns that its connections are gone.
#[test]
fn a_restored_vsock_device_reports_a_transport_reset() {
    const EVENTS: usize = 2;
    let mut bench = Bench::new(VsockSubject.device());
    bench.runner.quiesce().unwrap();
    let saved = bench.runner.save().unwrap();
    let mut bench = restored(bench, VsockSubject.device(), &saved).unwrap();
    bench.runner.resume().unwrap();
    // A buffer that is too small first.
    for room in [3, 4] {
        assert_eq!(bench.completed(EVENTS), []);
        bench.offer(EVENTS, 0, (Vec::new(), room));
        bench.runner.queue_event(EVENTS).unwrap();
        let expected = match room {
            4 => vec![0; 4],
            _ => vec![],
        };
        assert_eq!(bench.completed(EVENTS), [(0, expected)]);
    }
    // The event comes once.
    bench.offer(EVENTS, 1, (Vec::new(), 4));
    bench.runner.queue_event(EVENTS).unwrap();
    assert_eq!(bench.completed(EVENTS), []);
}

struct FsSubject {
    directory: TempDir,
    shares: Option<Shares>,
    handle: u64,
}

// FUSE operations and the lengths of their headers (linux/fuse.h).
const FUSE_LOOKUP: u32 = 1;
const FUSE_WRITE: u32 = 16;
const FUSE_FSYNC: u32 = 20;
const FUSE_CREATE: u32 = 35;
const FUSE_FALLOCATE: u32 = 43;
const FUSE_ROOT: u64 = 1;
const FUSE_OUT: usize = 16;
const FUSE_ENTRY: usize = 128;

fn fuse(opcode: u32, node: u64, body: &[u8]) -> (Vec<u8>, u32) {
    let length = u32::try_from(40 + body.len()).unwrap();
    let mut request = length.to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(body);
    (request, 1000)
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Subject for FsSubject {
    fn device(&mut self) -> Box<dyn Device> {
        let (device, shares) = Fs::new().unwrap();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let directory = rustix::fs::open(self.directory.path(), flags, Mode::empty()).unwrap();
        let done = Box::new(|result: Result<_, _>| result.unwrap());
        shares.add("s", directory, Cache::Private, done);
        self.shares = Some(shares);
        Box::new(device)
    }

    fn queue(&self) -> usize {
        1
    }

    fn begin(&mut self, bench: &mut Bench) {
        let root = bench.call(self.queue(), fuse(FUSE_LOOKUP, FUSE_ROOT, b"s\0"));
        let root = number(&root, FUSE_OUT);
        let mut create: Vec<u8> = [libc::O_RDWR as u32, 0o100644, 0, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        create.extend(b"file\0");
        let answer = bench.call(self.queue(), fuse(FUSE_CREATE, root, &create));
        self.handle = number(&answer, FUSE_OUT + FUSE_ENTRY);
    }

    /// Writes at once, and slower requests by workers.
    fn request(&mut self, index: u16) -> (Vec<u8>, u32) {
        let mut body = self.handle.to_le_bytes().to_vec();
        let offset = u64::from(index) * 16;
        match index % 3 {
            0 => {
                body.extend(offset.to_le_bytes());
                body.extend(16u32.to_le_bytes());
                body.extend([0; 20]);
                body.extend([index as u8; 16]);
                fuse(FUSE_WRITE, 0, &body)
            }
            1 => {
                body.extend([0; 8]);
                fuse(FUSE_FSYNC, 0, &body)
            }
            _ => {
                body.extend(0u64.to_le_bytes());
                body.extend((offset + 16).to_le_bytes());
                body.extend([0; 8]);
                fuse(FUSE_FALLOCATE, 0, &body)
            }
        }
    }

    fn completed(&mut self, index: u16, answer: &[u8]) {
        let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
        assert_eq!(error, 0, "request {index}");
    }

    fn end(&mut self, count: u16) {
        let file = std::fs::read(self.directory.path().join("file")).unwrap();
        for index in (0..count).step_by(3) {
            let at = usize::from(index) * 16;
            assert_eq!(file[at..at + 16], [index as u8; 16], "write {index}");
        }
    }
}

#[test]
fn fs() {
    run(&mut FsSubject {
        directory: TempDir::new().unwrap(),
        shares: None,
        handle: 0,
    });
}

/// A device that does not implement saving.
struct Unsaved(Entropy);

impl Device for Unsaved {
    fn device_type(&self) -> DeviceType {
        self.0.device_type()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn config_changed(&mut self) -> bool {
        true
    }

    fn register(&mut self, events: crate::device::EventRegistry) -> std::io::Result<()> {
        self.0.register(events)
    }

    fn queue_event(
        &mut self,
        _queue: usize,
        queues: &mut crate::device::Queues<'_>,
    ) -> Result<(), crate::device::DeviceError> {
        queues.add_processed(3);
        queues.pop(9).map(drop)
    }

    fn host_event(
        &mut self,
        _token: u64,
        _ready: crate::device::EventFlags,
        _queues: &mut crate::device::Queues<'_>,
    ) -> Result<(), crate::device::DeviceError> {
        Ok(())
    }

    fn quiesce(
        &mut self,
        _queues: &mut crate::device::Queues<'_>,
    ) -> Result<(), crate::device::DeviceError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

#[test]
fn stages_are_kept() {
    let mut bench = Bench::new(EntropySubject.device());
    assert_eq!(bench.runner.save(), Err(SaveError::NotQuiesced));
    bench.runner.quiesce().unwrap();
    let saved = bench.runner.save().unwrap();
    // A device that has run is not restored.
    let rings = bench.guest.rings().to_vec();
    let again = bench.runner.restore(&saved, rings.clone());
    assert_eq!(again, Err(RestoreError::NotFresh));
    // Nor from a state of another type, of another number of queues, or of a newer version.
    let other = BlockSubject(tempfile::tempfile().unwrap()).device();
    let mut other = DeviceRunner::new(other).unwrap();
    let refused = other.restore(&saved, rings.clone()).unwrap_err();
    assert!(matches!(refused, RestoreError::Type { .. }), "{refused}");
    let mut fresh = DeviceRunner::new(EntropySubject.device()).unwrap();
    let refused = fresh.restore(&saved, Vec::new()).unwrap_err();
    assert!(
        matches!(refused, RestoreError::Mismatch { .. }),
        "{refused}"
    );
    let mut newer = saved;
    newer.version += 1;
    let mut fresh = DeviceRunner::new(EntropySubject.device()).unwrap();
    let refused = fresh.restore(&newer, rings).unwrap_err();
    assert!(matches!(refused, RestoreError::Version { .. }), "{refused}");
}

#[test]
fn a_device_cannot_be_saved_unless_it_says_so_and_its_failure_is_final_until_a_reset() {
    let mut bench = Bench::new(Box::new(Unsaved(Entropy::new().unwrap())));
    let changed = bench.runner.host_events().unwrap();
    assert!(changed.config_changed);
    bench.runner.quiesce().unwrap();
    let refused = bench.runner.save().unwrap_err();
    assert_eq!(refused, SaveError::NotSupported(DeviceType::Entropy));
    // It asks for a queue that it does not have.
    assert!(bench.runner.resume().is_err());
    assert_eq!(bench.runner.queue_event(0).unwrap().processed, 0);
    bench.runner.reset();
    assert_eq!(bench.runner.queue_event(0).unwrap().processed, 0);
    bench.runner.activate(0, bench.guest.rings().to_vec());
    assert!(bench.runner.queue_event(0).is_err());
}

#[test]
fn the_runner_is_readable_when_its_device_has_events() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut subject = NetSubject {
        handle: None,
        hosts: Vec::new(),
    };
    let mut runner = DeviceRunner::new(subject.device()).unwrap();
    let is_ready = |runner: &DeviceRunner| {
        let events = runner.events();
        let mut ready = [PollFd::new(&events, PollFlags::IN)];
        poll(&mut ready, Some(&Timespec::default())).unwrap() == 1
    };
    assert!(is_ready(&runner));
    runner.host_events().unwrap();
    assert!(!is_ready(&runner));
    rustix::io::write(subject.hosts[0].as_fd(), &[0; 100]).unwrap();
    assert!(is_ready(&runner));
}
