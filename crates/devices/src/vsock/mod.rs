//! The vsock device (virtio ID 19): byte streams between host and guest, without a network.
//!
//! The host's end of every stream is one end of a `SOCK_STREAM` unix socketpair. Streams come about in two ways:
//! the host asks for one ([`Handle::connect`]), giving the socket; or the guest connects to a port that the host
//! listens on ([`Handle::listen`]), and a fresh socket is handed out as [`Event::Incoming`]. Any other port is
//! refused.
//!
//! # Protocol
//!
//! Packets are a header of 44 bytes and data. The driver puts its packets into the tx queue and empty buffers for
//! ours into the rx queue; the third queue would tell the driver that its context ID has changed, which never
//! happens here. The host is context ID 2, the guest 3. What a connection is and which packets move it from state to
//! state is on top of [`connection`]; credit is explained in [`credit`]; [`muxer`] holds all connections and their
//! bounds. Only stream sockets are offered, not sequenced packets.
//!
//! The tx queue is never left waiting for a host stream: what a stream does not take at once goes to the
//! connection's backlog, and the guest's credit bounds that. The rx queue is filled straight from the host streams.
//!
//! # Who calls
//!
//! A transport drives [`Vsock`] through [`Device`] in one thread, which owns all state. The control thread holds a
//! [`Handle`], whose wishes go through a bounded channel, and learns results from the `events` callback it gave to
//! [`Vsock::new`]. Wishes from before the driver is up are kept and carried out then.
//!
//! What the guest does wrong costs it the packet or the connection, at worst its device, and shows up in the log at
//! debug level only: it could fill any other.

pub mod connection;
pub mod credit;
pub mod muxer;
pub mod packet;
pub mod stream;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::device::{Chain, Device, DeviceError, EventFlags, EventRegistry, Memory, Queues};
use connection::Ports;
pub use muxer::ConnectError;
use muxer::{Change, Host, Muxer, Token};
use packet::{GUEST_CID, HEADER_SIZE, Header, Slices};
use stream::Socket;

const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// Wishes of the control thread that the device has not taken yet.
const MAX_COMMANDS: usize = 256;
/// Packets per direction after which other events get their turn.
const BUDGET: usize = 512;

// Connections' tokens have their slot, a small number, in the lower half: these cannot be one.
const WAKE: u64 = u32::MAX as u64;
const TIMER: u64 = u32::MAX as u64 - 1;

/// What the device tells the control thread.
#[derive(Debug)]
pub enum Event {
    /// The answer to the wish that was made with this `id`.
    Reply {
        /// As given to [`Handle::connect`] or [`Handle::listen`].
        id: u64,
        /// Whether it was granted.
        result: Result<(), ConnectError>,
    },
    /// The guest has connected to a port that is listened on.
    Incoming {
        /// Port of the host.
        port: u32,
        /// Port of the guest.
        guest_port: u32,
        /// The host's end.
        stream: OwnedFd,
    },
}

/// Takes events, on the device's thread: must not block. False means that it could not be taken; a guest's
/// connection is refused then.
pub type EventSink = Box<dyn FnMut(Event) -> bool + Send>;

/// Why a wish cannot be passed to the device.
#[derive(Debug, thiserror::Error)]
pub enum HandleError {
    /// It has not taken the earlier ones yet.
    #[error("the vsock device is busy: {MAX_COMMANDS} commands are waiting")]
    Busy,
    /// It no longer runs.
    #[error("the vsock device has stopped")]
    Stopped,
}

#[derive(Debug)]
enum Command {
    Connect {
        id: u64,
        ports: Ports,
        stream: OwnedFd,
    },
    Listen {
        id: u64,
        port: u32,
    },
}

/// The control thread's side of the device.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    /// Connects `stream`, one end of a stream socket, to `guest_port` of the guest, with `host_port` as source. The
    /// answer is an [`Event::Reply`] with `id`, within a minute at most.
    pub fn connect(
        &self,
        id: u64,
        guest_port: u32,
        host_port: u32,
        stream: OwnedFd,
    ) -> Result<(), HandleError> {
        let ports = Ports {
            host: host_port,
            guest: guest_port,
        };
        self.command(Command::Connect { id, ports, stream })
    }

    /// Lets the guest connect to `port` of the host. The answer is an [`Event::Reply`] with `id`.
    pub fn listen(&self, id: u64, port: u32) -> Result<(), HandleError> {
        self.command(Command::Listen { id, port })
    }

    fn command(&self, command: Command) -> Result<(), HandleError> {
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(_) => HandleError::Busy,
                TrySendError::Disconnected(_) => HandleError::Stopped,
            })?;
        signal(&self.wake);
        Ok(())
    }
}

/// Makes the event descriptor readable. It can only fail when it is readable already.
fn signal(wake: &OwnedFd) {
    if let Err(error) = rustix::io::write(wake, &1u64.to_ne_bytes()) {
        tracing::debug!(%error, "vsock event descriptor");
    }
}

/// What the connections see of the rest of the process.
struct ControlSide {
    events: EventSink,
}

impl Host for ControlSide {
    type Stream = Socket;

    fn connected(&mut self, request: u64, result: Result<(), ConnectError>) {
        let id = request;
        if !(self.events)(Event::Reply { id, result }) {
            tracing::warn!(id, "the answer to a vsock command could not be delivered");
        }
    }

    fn incoming(&mut self, port: u32, guest_port: u32) -> Option<Socket> {
        let (ours, stream) = Socket::pair()
            .inspect_err(
                |error| tracing::warn!(%error, "cannot make a socket for a vsock connection"),
            )
            .ok()?;
        let event = Event::Incoming {
            port,
            guest_port,
            stream,
        };
        (self.events)(event).then_some(ours)
    }
}

/// The device. See the module's documentation.
pub struct Vsock {
    muxer: Muxer<ControlSide>,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
    timer: OwnedFd,
    timer_set: Option<Instant>,
    registry: Option<EventRegistry>,
    /// Whether the driver was asked to kick, per queue, and has not done so since.
    armed: [bool; 2],
}

impl Vsock {
    /// A device, and the handle to make wishes with. `events` is called on the thread that runs the device.
    pub fn new(events: EventSink) -> io::Result<(Self, Handle)> {
        let (sender, commands) = sync_channel(MAX_COMMANDS);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let device = Self {
            muxer: Muxer::new(ControlSide { events }),
            commands,
            wake: wake.clone(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            timer_set: None,
            registry: None,
            armed: [false; 2],
        };
        let handle = Handle {
            commands: sender,
            wake,
        };
        Ok((device, handle))
    }

    /// Carries out what the control thread wishes.
    fn take_commands(&mut self, now: Instant) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Connect { id, ports, stream } => {
                    self.muxer.connect(id, ports, Socket::new(stream), now)
                }
                Command::Listen { id, port } => {
                    self.muxer.listen(port);
                    self.muxer.host().connected(id, Ok(()));
                }
            }
        }
    }

    /// Moves packets in both directions until nothing is left to do, or until it is others' turn.
    fn work(&mut self, queues: &mut Queues<'_>, now: Instant) -> Result<(), DeviceError> {
        let memory = queues.memory().clone();
        let (mut received, mut sent) = (0, 0);
        loop {
            let before = (received, sent);
            self.take_packets(queues, &memory, &mut received, now)?;
            self.fill_buffers(queues, &memory, &mut sent, now)?;
            if received >= BUDGET || sent >= BUDGET {
                signal(&self.wake);
                break;
            }
            if (received, sent) == before {
                break;
            }
        }
        if sent > 0 {
            queues.notify(RX)?;
        }
        if received > 0 {
            queues.notify(TX)?;
        }
        self.settle(now)
    }

    /// The next chain of `queue`. When there is none, the driver is asked to kick.
    fn pop(&mut self, queues: &mut Queues<'_>, queue: usize) -> Result<Option<Chain>, DeviceError> {
        loop {
            if let Some(chain) = queues.pop(queue)? {
                if std::mem::take(&mut self.armed[queue]) {
                    queues.silence(queue)?;
                }
                return Ok(Some(chain));
            }
            if self.armed[queue] {
                return Ok(None);
            }
            self.armed[queue] = true;
            if !queues.rearm(queue)? {
                return Ok(None);
            }
        }
    }

    /// Takes the driver's packets.
    fn take_packets(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
        count: &mut usize,
        now: Instant,
    ) -> Result<(), DeviceError> {
        while *count < BUDGET
            && let Some(chain) = self.pop(queues, TX)?
        {
            let head = chain.head_index();
            match read_packet(memory, chain) {
                Some((header, data)) => self.muxer.receive(&header, data, now),
                None => tracing::debug!(head, "vsock packet without a header dropped"),
            }
            queues.add_used(TX, head, 0)?;
            *count += 1;
        }
        Ok(())
    }

    /// Fills the driver's buffers as long as there is something for them.
    fn fill_buffers(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
        count: &mut usize,
        now: Instant,
    ) -> Result<(), DeviceError> {
        while *count < BUDGET
            && self.muxer.wants_transmit()
            && let Some(chain) = self.pop(queues, RX)?
        {
            let head = chain.head_index();
            // A byte of data must fit as well, or a stream could never get on.
            let buffer =
                Slices::of_chain(memory, chain, true).filter(|buffer| buffer.len() > HEADER_SIZE);
            let len = match buffer {
                Some(buffer) => match self.fill(buffer, now) {
                    Some(len) => len,
                    None => {
                        queues.undo_pop(RX)?;
                        continue;
                    }
                },
                None => {
                    tracing::debug!(head, "useless vsock buffer given back");
                    0
                }
            };
            queues.add_used(RX, head, len)?;
            *count += 1;
        }
        Ok(())
    }

    /// Puts the next packet into `buffer`. `None` when there was none after all.
    fn fill(&mut self, buffer: Slices<'_>, now: Instant) -> Option<u32> {
        let mut room = buffer.clone();
        room.skip(HEADER_SIZE);
        let header = self.muxer.transmit(&room, now)?;
        buffer.put(&header.to_bytes());
        // A header and at most 4 GiB less one byte of credit; a chain is not longer than that either.
        Some((HEADER_SIZE as u32).saturating_add(header.len))
    }

    /// Waits for what can lead to progress from here on.
    fn settle(&mut self, now: Instant) -> Result<(), DeviceError> {
        let Some(registry) = &self.registry else {
            return Ok(());
        };
        self.muxer
            .settle(|stream, Token(token), change| match change {
                Change::Add(flags) => registry.add(stream, token, flags),
                Change::Modify(flags) => registry.modify(stream, token, flags),
                Change::Remove => registry.remove(stream),
            });
        let deadline = self.muxer.deadline();
        if let Some(first) = deadline
            && self.timer_set.is_none_or(|set| first < set)
        {
            self.set_timer(first.saturating_duration_since(now))
                .map_err(|source| DeviceError::Host {
                    action: "set the vsock timer",
                    source,
                })?;
            self.timer_set = Some(first);
        }
        Ok(())
    }

    fn set_timer(&self, after: std::time::Duration) -> io::Result<()> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: after.as_secs() as _,
                // Zero would switch the timer off.
                tv_nsec: after.subsec_nanos().max(1).into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

/// A packet of the driver: its header, and its data unless the chain is too short for what the header says. `None`
/// when there is not even a header.
fn read_packet(memory: &Memory, chain: Chain) -> Option<(Header, Option<Slices<'_>>)> {
    let mut data = Slices::of_chain(memory, chain, false)?;
    let mut bytes = [0; HEADER_SIZE];
    if !data.take(&mut bytes) {
        return None;
    }
    let header = Header::parse(&bytes);
    let len = header.len as usize;
    let complete = data.len() >= len;
    data.truncate(len);
    Some((header, complete.then_some(data)))
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        GUEST_CID.to_le_bytes().to_vec()
    }

    fn register(&mut self, events: EventRegistry) -> io::Result<()> {
        events.add(&self.wake, WAKE, EventFlags::IN)?;
        events.add(&self.timer, TIMER, EventFlags::IN)?;
        self.registry = Some(events);
        Ok(())
    }

    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        if let Some(armed) = self.armed.get_mut(queue) {
            // It has kicked, or the queue is new: either way the next wait needs another request for kicks.
            *armed = false;
        }
        self.work(queues, Instant::now())
    }

    fn host_event(
        &mut self,
        token: u64,
        ready: EventFlags,
        queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        let now = Instant::now();
        let mut scratch = [0; 8];
        match token {
            WAKE => {
                // Fails only when it was not readable: the event was spurious.
                let _ = rustix::io::read(&self.wake, &mut scratch);
                self.take_commands(now);
            }
            TIMER => {
                let _ = rustix::io::read(&self.timer, &mut scratch);
                self.timer_set = None;
                self.muxer.expire(now);
            }
            token => self.muxer.host_ready(Token(token), ready, now),
        }
        self.work(queues, now)
    }

    fn reset(&mut self) {
        self.armed = [false; 2];
        self.muxer.guest_gone();
        if let Err(error) = self.settle(Instant::now()) {
            tracing::warn!(%error, "reset of the vsock device");
        }
    }
}
