//! The net device (virtio ID 1): Ethernet frames between a guest and a tap of the host.
//!
//! A machine boots with net devices that are not connected; when the sandbox's network is known, a
//! tap is attached to one ([`Handle::attach`]), and detached when the interface behind it
//! disappears. Frames that the guest sends without a tap are dropped.
//!
//! # Protocol
//!
//! Two queues, the driver's empty buffers and its frames. Before each frame is the header that taps
//! and virtio have in common (`struct virtio_net_hdr_v1`, linux/virtio_net.h, 12 bytes): which
//! checksum is still to be computed, and how a frame above the link's size is to be segmented. Both
//! are left to the receiver that needs them: a frame of 64 KiB from one guest to another on the
//! same host is never segmented. The tap is configured with what the guest supports
//! ([`Device::activate`]). There is no control queue and no link status: the agent sets addresses
//! and MTU by itself.
//!
//! # What the guest can do
//!
//! Nothing in a frame is trusted. The tap's kernel side checks headers; [`filter`] passes only
//! frames from the guest's own addresses, if the host asks for it; [`rate`] bounds bytes per
//! second. A frame is at most 64 KiB, one is buffered at a time, and a full queue leaves frames in
//! the tap, not in this process.
//!
//! # Threads
//!
//! A transport drives [`Net`] through [`Device`] in one thread, which owns all state. The control
//! thread holds a [`Handle`], whose commands go through a bounded channel.

pub mod filter;
pub mod rate;
mod state;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use hull_device_control::{DeviceType, NetOptions};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};

use crate::buffers::{Buffers, Span};
use crate::device::{
    Device, DeviceError, EventFlags, EventRegistry, Memory, NotificationState, Queues,
};
use crate::state::{RestoreError, SaveError, SavedState};
use filter::{Filter, LOOK};
use rate::Bucket;
use tap::Tap;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Length of `struct virtio_net_hdr_v1`, and where its field `num_buffers` is.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// Destination, source, type.
const ETHERNET: usize = 14;
/// The largest frame: an IP packet of 64 KiB behind an Ethernet header with a VLAN's tag.
const MAX_FRAME: usize = 65535 + ETHERNET + 4;
/// Most buffers for one frame: twice what the largest frame needs of the Linux driver's 1.5 KiB
/// buffers.
const MAX_CHAINS: usize = 96;

/// Commands of the control thread that the device has not taken yet.
const MAX_COMMANDS: usize = 64;
/// Frames per direction after which other events are served.
const BUDGET: usize = 256;

const TAP: u64 = 0;
const WAKE: u64 = 1;
const TIMER: u64 = 2;

/// Called with the result of a command, on the device's thread or the caller's own, exactly once
/// unless the device ends before.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

enum Command {
    Attach(OwnedFd, NetOptions, Done),
    Change(NetOptions, Done),
    Detach(Done),
}

/// The control thread's side of the device.
#[derive(Clone)]
pub struct Handle {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    /// Attaches a tap: a non-blocking descriptor with headers of 12 bytes (`IFF_VNET_HDR`,
    /// `TUNSETVNETHDRSZ`). It replaces one that was attached before.
    pub fn attach(&self, tap: OwnedFd, options: NetOptions, done: Done) {
        self.command(Command::Attach(tap, options, done));
    }

    /// Changes the options for frames.
    pub fn change(&self, options: NetOptions, done: Done) {
        self.command(Command::Change(options, done));
    }

    /// Detaches the tap.
    pub fn detach(&self, done: Done) {
        self.command(Command::Detach(done));
    }

    fn command(&self, command: Command) {
        match self.commands.try_send(command) {
            Ok(()) => signal(&self.wake),
            Err(TrySendError::Full(command) | TrySendError::Disconnected(command)) => {
                let (Command::Attach(_, _, done)
                | Command::Change(_, done)
                | Command::Detach(done)) = command;
                done(Err(io::Error::other(
                    "the net device does not take commands",
                )));
            }
        }
    }
}

/// Makes the event descriptor readable. Fails only if it is readable already.
fn signal(wake: &OwnedFd) {
    if let Err(error) = rustix::io::write(wake, &1u64.to_ne_bytes()) {
        tracing::debug!(%error, "net event descriptor");
    }
}

/// The device. See the module's documentation.
pub struct Net {
    mac: [u8; 6],
    features: u64,
    link: Option<Link>,
    /// A frame for the guest, with its header; the one that waits for buffers, if `waiting` is not
    /// 0.
    frame: Vec<u8>,
    waiting: usize,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    timer: OwnedFd,
    registry: Option<EventRegistry>,
    notifications: NotificationState<2>,
}

/// The connection to the host.
struct Link {
    tap: Tap,
    /// The tap is registered for readiness events.
    watched: bool,
    filter: Option<Filter>,
    buckets: Option<[Bucket; 2]>,
}

/// Why a direction pauses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// No frames or no buffers: an event will follow.
    Event,
    /// The budget is exhausted.
    Turn,
    /// Rate limited until then.
    Until(Instant),
}

impl Net {
    /// A device without a tap, and the handle to attach one with. `mac` is the hardware address
    /// that the driver finds.
    pub fn new(mac: [u8; 6]) -> io::Result<(Self, Handle)> {
        let (sender, commands) = sync_channel(MAX_COMMANDS);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let device = Self {
            mac,
            features: 0,
            link: None,
            frame: Vec::new(),
            waiting: 0,
            commands,
            wake: wake.clone(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            registry: None,
            notifications: NotificationState::default(),
        };
        let handle = Handle {
            commands: sender,
            wake,
        };
        Ok((device, handle))
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach(tap, options, done) => done(self.attach(tap, options)),
                Command::Change(options, done) => {
                    done(match &mut self.link {
                        Some(link) => {
                            link.apply(options);
                            Ok(())
                        }
                        None => Err(io::Error::other("no tap is attached")),
                    });
                }
                Command::Detach(done) => {
                    self.detach();
                    done(Ok(()));
                }
            }
        }
    }

    fn attach(&mut self, tap: OwnedFd, options: NetOptions) -> io::Result<()> {
        self.detach();
        let tap = Tap::new(tap)?;
        tap.set_offload(self.features)?;
        if let Some(registry) = &self.registry {
            registry.add(&tap, TAP, EventFlags::IN)?;
        }
        self.frame.resize(HEADER + MAX_FRAME, 0);
        let link = self.link.insert(Link {
            tap,
            watched: true,
            filter: None,
            buckets: None,
        });
        link.apply(options);
        Ok(())
    }

    fn detach(&mut self) {
        if let (Some(link), Some(registry)) = (self.link.take(), &self.registry)
            && link.watched
            && let Err(error) = registry.remove(&link.tap)
        {
            tracing::debug!(%error, "tap was not watched");
        }
        self.waiting = 0;
        self.frame = Vec::new();
    }

    /// Moves frames in both directions until nothing is left to do or the budget is exhausted.
    fn work(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        let memory = queues.memory().clone();
        let now = Instant::now();
        let sent = self.send(queues, &memory, now)?;
        let received = self.receive(queues, &memory, now)?;
        if sent == Pause::Turn || received == Pause::Turn {
            signal(&self.wake);
        }
        let until = |pause| match pause {
            Pause::Until(when) => Some(when),
            _ => None,
        };
        if let Some(first) = [sent, received].into_iter().filter_map(until).min() {
            self.set_timer(first.saturating_duration_since(now))?;
        }
        Ok(())
    }

    /// Sends the guest's frames.
    fn send(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
        now: Instant,
    ) -> Result<Pause, DeviceError> {
        let mut count = 0;
        let pause = loop {
            if count == BUDGET {
                break Pause::Turn;
            }
            if let Some(when) = self.link.as_mut().and_then(|link| link.wait(TX, now)) {
                break Pause::Until(when);
            }
            let Some(chain) = self.notifications.pop(queues, TX)? else {
                break Pause::Event;
            };
            let head = chain.head_index();
            match (&mut self.link, Buffers::new(memory, chain)) {
                (Some(link), Ok(buffers)) => link.send(buffers.readable),
                (None, _) => {}
                (_, Err(error)) => tracing::debug!(head, %error, "frame dropped"),
            }
            queues.add_used(TX, head, 0)?;
            count += 1;
        };
        if count > 0 {
            queues.notify(TX)?;
        }
        queues.add_processed(count);
        Ok(pause)
    }

    /// Delivers frames to the guest.
    fn receive(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
        now: Instant,
    ) -> Result<Pause, DeviceError> {
        let mut count = 0;
        let pause = loop {
            let Some(link) = &mut self.link else {
                break Pause::Event;
            };
            if count == BUDGET {
                break Pause::Turn;
            }
            if self.waiting == 0 {
                if let Some(when) = link.wait(RX, now) {
                    break Pause::Until(when);
                }
                match link.tap.read(&mut self.frame) {
                    Ok(length) if length > HEADER => self.waiting = length,
                    Ok(length) if length > 0 => {
                        count += 1;
                        continue;
                    }
                    Err(Errno::AGAIN) => break Pause::Event,
                    Err(Errno::INTR) => continue,
                    gone => {
                        // The interface was removed, usually with its namespace.
                        tracing::debug!(?gone, "the tap is gone");
                        self.detach();
                        break Pause::Event;
                    }
                }
            }
            if !self.deliver(queues, memory)? {
                break Pause::Event;
            }
            if let Some(link) = &mut self.link {
                link.spend(RX, self.waiting);
            }
            self.waiting = 0;
            count += 1;
        };
        if count > 0 {
            queues.notify(RX)?;
        }
        queues.add_processed(count);
        // A readable tap that is not read would keep waking this thread.
        let stalled = self.waiting > 0 || matches!(pause, Pause::Until(_));
        self.watch(!stalled)?;
        Ok(pause)
    }

    /// Puts the waiting frame into the driver's buffers. False if there are not enough; the
    /// driver's notifications are enabled then.
    fn deliver(&mut self, queues: &mut Queues<'_>, memory: &Memory) -> Result<bool, DeviceError> {
        let mergeable = self.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut heads: Vec<(u16, Span<'_>)> = Vec::with_capacity(1);
        let mut room = 0;
        while room < self.waiting && heads.len() < MAX_CHAINS && (mergeable || heads.is_empty()) {
            let Some(chain) = self.notifications.pop(queues, RX)? else {
                for _ in &heads {
                    queues.undo_pop(RX)?;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            match Buffers::new(memory, chain) {
                Ok(buffers) => {
                    // The driver must provide the header's room in one piece of the first.
                    room += buffers.writable.remaining();
                    heads.push((head, buffers.writable));
                }
                Err(error) => {
                    tracing::debug!(head, %error, "useless net buffer given back");
                    queues.add_used(RX, head, 0)?;
                    // The chains before it cannot be put back past it.
                    for (head, _) in heads.drain(..) {
                        queues.add_used(RX, head, 0)?;
                    }
                    return Ok(true);
                }
            }
        }
        let fits = room >= self.waiting
            && heads
                .first()
                .is_some_and(|(_, first)| first.remaining() >= HEADER);
        // At most MAX_CHAINS.
        let buffers = heads.len() as u16;
        self.frame[NUM_BUFFERS..HEADER].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.frame[..self.waiting];
        for (head, mut span) in heads {
            let copied = match fits {
                true => span.copy_from(rest),
                // A frame that does not fit its buffers is lost.
                false => 0,
            };
            rest = &rest[copied..];
            queues.add_used(RX, head, u32::try_from(copied).unwrap_or(0))?;
        }
        Ok(true)
    }

    fn watch(&mut self, wanted: bool) -> Result<(), DeviceError> {
        let (Some(link), Some(registry)) = (&mut self.link, &self.registry) else {
            return Ok(());
        };
        if link.watched == wanted {
            return Ok(());
        }
        // Not by an empty interest: a hang-up is reported regardless, and would keep waking this
        // thread.
        let changed = match wanted {
            true => registry.add(&link.tap, TAP, EventFlags::IN),
            false => registry.remove(&link.tap),
        };
        changed.map_err(|source| DeviceError::Host {
            action: "watch a tap",
            source,
        })?;
        link.watched = wanted;
        Ok(())
    }

    fn set_timer(&self, after: Duration) -> Result<(), DeviceError> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                // Zero would disarm the timer.
                tv_nsec: after.subsec_nanos().max(1).into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)
            .map(drop)
            .map_err(|error| DeviceError::Host {
                action: "set the net timer",
                source: error.into(),
            })
    }
}

impl Link {
    fn apply(&mut self, options: NetOptions) {
        self.filter = options.policy.map(Filter::new);
        self.buckets = (options.rate > 0).then(|| [(); 2].map(|()| Bucket::new(options.rate)));
    }

    /// When the next frame may pass, if not now.
    fn wait(&mut self, direction: usize, now: Instant) -> Option<Instant> {
        self.buckets.as_mut()?.get_mut(direction)?.wait(now)
    }

    fn spend(&mut self, direction: usize, bytes: usize) {
        if let Some(buckets) = &mut self.buckets
            && let Some(bucket) = buckets.get_mut(direction)
        {
            bucket.spend(bytes);
        }
    }

    /// Sends one frame of the guest, or drops it.
    fn send(&mut self, mut frame: Span<'_>) {
        let length = frame.remaining();
        if !(HEADER + ETHERNET..=HEADER + MAX_FRAME).contains(&length) {
            tracing::debug!(length, "frame of an impossible length dropped");
            return;
        }
        // The bytes that were checked are the bytes that are sent: the guest may change its memory.
        let mut start = [0; HEADER + LOOK];
        let looked = frame.copy_to(&mut start);
        let start = &start[..looked];
        let (header, frame_start) = start.split_at(HEADER);
        let verdict = filter::check_destination(frame_start).and_then(|()| match &self.filter {
            Some(filter) => filter.check(header, frame_start),
            None => Ok(()),
        });
        if let Err(reason) = verdict {
            tracing::debug!(reason, "frame dropped");
            return;
        }
        self.spend(TX, length);
        if let Err(error) = frame.write_behind(self.tap.as_fd(), start) {
            // The kernel refused the header, or has no memory for the frame. Frames may be lost.
            tracing::debug!(%error, "frame dropped");
        }
    }
}

impl Device for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .into_iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    /// `struct virtio_net_config`: the hardware address; the other fields belong to features that
    /// are not offered.
    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        if let Some(link) = &self.link
            && let Err(error) = link.tap.set_offload(features)
        {
            tracing::warn!(%error, "cannot tell the tap what the guest can do");
        }
    }

    fn register(&mut self, events: EventRegistry) -> io::Result<()> {
        events.add(&self.wake, WAKE, EventFlags::IN)?;
        events.add(&self.timer, TIMER, EventFlags::IN)?;
        self.registry = Some(events);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.notifications.on_kick(queue);
        self.work(queues)
    }

    fn host_event(
        &mut self,
        token: u64,
        _ready: EventFlags,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        let counter = match token {
            WAKE => Some(&*self.wake),
            TIMER => Some(&self.timer),
            _ => None,
        };
        if let Some(counter) = counter {
            match rustix::io::read(counter, &mut [0; 8]) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => {
                    return Err(DeviceError::Host {
                        action: "read an event of the net device",
                        source: error.into(),
                    });
                }
            }
        }
        self.take_commands();
        self.work(queues)
    }

    /// A guest's frame is sent in the event in which it arrived. One for the guest that waits for
    /// buffers stays here.
    fn quiesce(&mut self, _queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self) -> Result<SavedState, SaveError> {
        state::save(self)
    }

    /// The tap is attached afterwards ([`Handle::attach`]).
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state::restore(self, state)
    }

    fn reset(&mut self) {
        self.waiting = 0;
        self.features = 0;
        self.notifications = NotificationState::default();
    }
}
