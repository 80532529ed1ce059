//! The vsock device (virtio ID 19): byte streams between host and guest, without a network.
//!
//! The host's end of every stream is one end of a `SOCK_STREAM` unix socketpair. Streams are
//! created in two ways: the host asks for one ([`Handle::connect`]) and provides the socket; or the
//! guest connects to a port that the host listens on ([`Handle::listen`]), and a new socket is
//! handed out as [`Incoming`]. Any other port is refused.
//!
//! # Protocol
//!
//! Packets are a header of 44 bytes and data. The driver puts its packets into the tx queue and
//! empty buffers for ours into the rx queue. The event queue has one use: when the transport is
//! reset (the host ends all connections, or the device is restored from a saved state, which has
//! none), an event tells the driver to close its sockets. The host is context ID 2, the guest 3.
//! Connections and the packets that change their state are explained in [`connection`], credit in
//! [`credit`]; [`muxer`] holds all connections and their bounds. Only stream sockets are offered,
//! not sequenced packets.
//!
//! The tx queue is never left waiting for a host stream: what a stream does not take at once goes
//! to the connection's backlog, and the guest's credit bounds that. The rx queue is filled straight
//! from the host streams.
//!
//! # Threads
//!
//! A transport drives [`Vsock`] through [`Device`] in one thread, which owns all state. The control
//! thread holds a [`Handle`], whose commands go through a bounded channel, and gets results through
//! callbacks. Commands from before the driver is up are kept and executed then.
//!
//! An error of the guest costs it the packet or the connection, at worst its device. It is logged
//! at debug level only, because the guest could flood the log.

pub mod connection;
pub mod credit;
pub mod muxer;
pub mod packet;
mod state;
pub mod stream;

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod muxer_tests;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod testing;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use hull_device_control::DeviceType;
use rustix::event::{EventfdFlags, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::device::{
    Chain, Device, DeviceError, EventFlags, EventRegistry, Memory, NotificationState, Queues,
};
use crate::state::{RestoreError, SaveError, SavedState};
use connection::Ports;
pub use muxer::ConnectError;
use muxer::{Change, Host, Muxer, Token};
use packet::{GUEST_CID, HEADER_SIZE, Header, Slices};
pub use stream::Socket;

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// Commands of the control thread that the device has not taken yet.
const MAX_COMMANDS: usize = 256;
/// Packets per direction after which other events are served.
const BUDGET: usize = 512;

// A notification per packet would interrupt the guest only to free the packet's memory. Instead a
// few small packets share one. Large packets do not wait: the Linux driver counts them against the
// sending socket, which would block.
const UNNOTIFIED_PACKETS: usize = 8;
const UNNOTIFIED_BYTES: usize = 16 << 10;
const NOTIFY_DELAY: Duration = Duration::from_millis(5);

// Connections' tokens have their slot, a small number, in the lower half: these cannot be one.
const WAKE: u64 = u32::MAX as u64;
const TIMER: u64 = u32::MAX as u64 - 1;

/// The guest has connected to a port that is listened on.
#[derive(Debug)]
pub struct Incoming {
    /// Port of the host.
    pub port: u32,
    /// Port of the guest.
    pub guest_port: u32,
    /// The host's end.
    pub stream: OwnedFd,
}

/// Receives new connections, on the device's thread: while it blocks, so does the device.
pub type IncomingSink = Box<dyn FnMut(Incoming) + Send>;

/// Called with the result of [`Handle::connect`], on the device's thread or the caller's own,
/// exactly once unless the device ends before.
pub type Connected = Box<dyn FnOnce(Result<(), ConnectError>) + Send>;

/// Called when a command has been carried out, on the device's thread, or on the caller's if the
/// device takes no commands.
pub type Done = Box<dyn FnOnce(Result<(), Busy>) + Send>;

enum Command {
    Connect {
        ports: Ports,
        stream: Socket,
        done: Connected,
    },
    Listen {
        port: u32,
        done: Done,
    },
    Drain {
        done: Done,
    },
    Cut {
        port: u32,
        done: Done,
    },
    Reset {
        done: Done,
    },
}

/// The device takes no commands: it has not taken [`MAX_COMMANDS`] earlier ones yet, or has
/// stopped.
#[derive(Debug, thiserror::Error)]
#[error("the vsock device does not take commands")]
pub struct Busy;

/// The control thread's side of the device.
#[derive(Clone)]
pub struct Handle {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
}

impl Handle {
    /// Connects `stream`, one end of a stream socket, to `guest_port` of the guest, with
    /// `host_port` as source. `done` is called with the result, within a minute at most.
    pub fn connect(&self, guest_port: u32, host_port: u32, stream: Socket, done: Connected) {
        let ports = Ports {
            host: host_port,
            guest: guest_port,
        };
        if let Err(Command::Connect { done, .. }) = self.command(Command::Connect {
            ports,
            stream,
            done,
        }) {
            done(Err(ConnectError::Busy { guest_port }));
        }
    }

    /// Lets the guest connect to `port` of the host from the call of `done` on.
    pub fn listen(&self, port: u32, done: Done) {
        self.simple_command(Command::Listen { port, done });
    }

    /// Waits until everything that the guest has sent so far is in the host's ends, however slowly
    /// they are read.
    pub fn drain(&self, done: Done) {
        self.simple_command(Command::Drain { done });
    }

    /// Resets the connections of host port `port`, as if the network between had failed.
    pub fn cut(&self, port: u32, done: Done) {
        self.simple_command(Command::Cut { port, done });
    }

    /// Ends all connections and has the driver close its sockets. Ports stay listened on.
    pub fn reset_transport(&self, done: Done) {
        self.simple_command(Command::Reset { done });
    }

    fn simple_command(&self, command: Command) {
        if let Err(
            Command::Listen { done, .. }
            | Command::Drain { done }
            | Command::Cut { done, .. }
            | Command::Reset { done },
        ) = self.command(command)
        {
            done(Err(Busy));
        }
    }

    /// Queues a command, or returns it.
    fn command(&self, command: Command) -> Result<(), Command> {
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(command) | TrySendError::Disconnected(command) => command,
            })?;
        signal(&self.wake);
        Ok(())
    }
}

/// Makes the event descriptor readable. Fails only if it is readable already.
fn signal(wake: &OwnedFd) {
    if let Err(error) = rustix::io::write(wake, &1u64.to_ne_bytes()) {
        tracing::debug!(%error, "vsock event descriptor");
    }
}

/// The host's side of the multiplexer.
struct ControlSide {
    incoming: IncomingSink,
}

impl Host for ControlSide {
    type Stream = Socket;
    type Request = Connected;

    fn connected(&mut self, done: Connected, result: Result<(), ConnectError>) {
        done(result);
    }

    fn incoming(&mut self, port: u32, guest_port: u32) -> Option<Socket> {
        let (ours, stream) = Socket::pair()
            .inspect_err(
                |error| tracing::warn!(%error, "cannot make a socket for a vsock connection"),
            )
            .ok()?;
        (self.incoming)(Incoming {
            port,
            guest_port,
            stream,
        });
        Some(ours)
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
    notifications: NotificationState<3>,
    unnotified: Unnotified,
    /// Called when the host has taken everything.
    draining: Vec<Done>,
    /// The driver is to be notified that its connections are gone.
    reset_event_pending: bool,
}

/// Packets taken from the driver for which it has not been notified yet.
#[derive(Debug, Default)]
struct Unnotified {
    packets: usize,
    bytes: usize,
    /// When it must be notified.
    deadline: Option<Instant>,
}

impl Unnotified {
    fn add(&mut self, bytes: usize, now: Instant) {
        self.packets += 1;
        self.bytes += bytes;
        self.deadline.get_or_insert(now + NOTIFY_DELAY);
    }

    fn is_due(&self, now: Instant) -> bool {
        self.packets >= UNNOTIFIED_PACKETS
            || self.bytes >= UNNOTIFIED_BYTES
            || self.deadline.is_some_and(|deadline| deadline <= now)
    }
}

impl Vsock {
    /// A device, and the handle to control it. `incoming` is called on the thread that runs the
    /// device.
    pub fn new(incoming: IncomingSink) -> io::Result<(Self, Handle)> {
        let (sender, commands) = sync_channel(MAX_COMMANDS);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let device = Self {
            muxer: Muxer::new(ControlSide { incoming }),
            commands,
            wake: wake.clone(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            timer_set: None,
            registry: None,
            notifications: NotificationState::default(),
            unnotified: Unnotified::default(),
            draining: Vec::new(),
            reset_event_pending: false,
        };
        let handle = Handle {
            commands: sender,
            wake,
        };
        Ok((device, handle))
    }

    /// Executes the commands of the control thread.
    fn take_commands(&mut self, now: Instant) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Connect {
                    ports,
                    stream,
                    done,
                } => self.muxer.connect(done, ports, stream, now),
                Command::Listen { port, done } => {
                    self.muxer.listen(port);
                    done(Ok(()));
                }
                Command::Drain { done } => self.draining.push(done),
                Command::Cut { port, done } => {
                    self.muxer.cut(port);
                    done(Ok(()));
                }
                Command::Reset { done } => {
                    self.muxer.guest_gone();
                    self.reset_event_pending = true;
                    done(Ok(()));
                }
            }
        }
    }

    /// Moves packets in both directions until nothing is left to do or the budget is exhausted.
    fn work(&mut self, queues: &mut Queues<'_>, now: Instant) -> Result<(), DeviceError> {
        let memory = queues.memory().clone();
        if self.reset_event_pending {
            self.send_reset_event(queues, &memory)?;
        }
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
        if self.unnotified.is_due(now) {
            self.unnotified = Unnotified::default();
            queues.notify(TX)?;
        }
        if !self.draining.is_empty() && !self.muxer.has_backlog() {
            self.draining.drain(..).for_each(|done| done(Ok(())));
        }
        self.settle(now)
    }

    /// Sends VIRTIO_VSOCK_EVENT_TRANSPORT_RESET as soon as the driver has a buffer for it.
    fn send_reset_event(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
    ) -> Result<(), DeviceError> {
        while let Some(chain) = self.notifications.pop(queues, EVENTS)? {
            let head = chain.head_index();
            let event = TRANSPORT_RESET.to_le_bytes();
            let sent = Slices::of_chain(memory, chain, true).is_some_and(|to| to.put(&event));
            if !sent {
                tracing::debug!(head, "vsock event buffer is too small");
            }
            let length = if sent { event.len() as u32 } else { 0 };
            queues.add_used(EVENTS, head, length)?;
            queues.notify(EVENTS)?;
            if sent {
                self.reset_event_pending = false;
                break;
            }
        }
        Ok(())
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
            && let Some(chain) = self.notifications.pop(queues, TX)?
        {
            let head = chain.head_index();
            let mut bytes = HEADER_SIZE;
            match read_packet(memory, chain) {
                Some((header, data)) => {
                    bytes += data.as_ref().map_or(0, Slices::len);
                    self.muxer.receive(&header, data, now);
                }
                None => tracing::debug!(head, "vsock packet without a header dropped"),
            }
            self.unnotified.add(bytes, now);
            queues.add_used(TX, head, 0)?;
            *count += 1;
        }
        Ok(())
    }

    /// Fills the driver's buffers while there is something for them.
    fn fill_buffers(
        &mut self,
        queues: &mut Queues<'_>,
        memory: &Memory,
        count: &mut usize,
        now: Instant,
    ) -> Result<(), DeviceError> {
        while *count < BUDGET
            && self.muxer.wants_transmit()
            && let Some(chain) = self.notifications.pop(queues, RX)?
        {
            let head = chain.head_index();
            // A byte of data must fit as well, or a stream could not make progress.
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

    /// Puts the next packet into `buffer`. `None` if there was none after all.
    fn fill(&mut self, buffer: Slices<'_>, now: Instant) -> Option<u32> {
        let mut room = buffer.clone();
        room.skip(HEADER_SIZE);
        let header = self.muxer.transmit(&room, now)?;
        buffer.put(&header.to_bytes());
        // A header and at most 4 GiB less one byte of credit; a chain is not longer than that
        // either.
        Some((HEADER_SIZE as u32).saturating_add(header.len))
    }

    /// Registers for the events that can lead to progress now.
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
        let deadlines = [self.muxer.deadline(), self.unnotified.deadline];
        if let Some(first) = deadlines.into_iter().flatten().min()
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

    fn set_timer(&self, after: Duration) -> io::Result<()> {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: after.as_secs() as _,
                // Zero would disarm the timer.
                tv_nsec: after.subsec_nanos().max(1).into(),
            },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

/// A packet of the driver: its header, and its data unless the chain is too short for what the
/// header says. `None` when there is not even a header.
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
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
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
        // The queue may also be new. In both cases notifications must be enabled again.
        self.notifications.on_kick(queue);
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

    /// A packet is processed in the event in which it arrived; only the notification may be due.
    fn quiesce(&mut self, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        if self.unnotified.packets > 0 {
            self.unnotified = Unnotified::default();
            queues.notify(TX)?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<SavedState, SaveError> {
        state::save(self)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state::restore(self, state)
    }

    fn reset(&mut self) {
        self.reset_event_pending = false;
        self.notifications = NotificationState::default();
        self.unnotified = Unnotified::default();
        self.muxer.guest_gone();
        if let Err(error) = self.settle(Instant::now()) {
            tracing::warn!(%error, "reset of the vsock device");
        }
    }
}
