//! virtio-fs (virtio ID 26): directories of the host in the guest, by FUSE messages.
//!
//! The device's root holds the *shares*, one directory each; they are added and removed while the
//! guest runs. In the guest all of them are one file system, of tag [`TAG`]; the highest bits of an
//! inode number are the share's number. hull's guest kernel gives each share a device number of its
//! own, for stat(2) and mountinfo. (FUSE could make each share a mount of its own (submounts).
//! But on these Linux 7.3 forgets HANDLE_KILLPRIV, asks for capabilities at each write, and crashes
//! when one is unmounted with a request in flight.)
//!
//! # Rules
//!
//! - Nothing outside a share is ever reached: every step takes one name, links are not followed,
//!   `..` is refused. Whether a share is read-only is a property of the host mount.
//! - Only regular files and directories are opened: no device, pipe or socket. Which file a socket
//!   is can be asked for by the sandbox, which decides whether the guest is connected with it.
//! - The guest's kernel checks permissions; the host does not check them again: see
//!   [`credentials`].
//! - What the guest can make this process hold is bounded: files it knows ([`nodes`]), files it has
//!   open, locked ([`locks`]) or watched ([`watches`]), the length of each message.
//! - An invalid message is answered with an error; one without room for an answer is ignored.
//!
//! # Threads
//!
//! A transport drives [`Fs`] through [`Device`] on one thread, which owns all state. Other threads
//! add and remove shares through [`Shares`]. Slow operations go to [`work`].

mod attributes;
mod credentials;
mod directories;
mod files;
mod handles;
mod locks;
mod names;
mod nodes;
mod server;
mod slab;
mod state;
#[cfg(test)]
mod tests;
mod watches;
mod wire;
mod work;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use hull_device_control::{Cache, DeviceType};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vm_memory::{GuestMemory, GuestMemoryRegion};

use crate::buffers::Buffers;
use crate::device::{Chain, Device, DeviceError, EventFlags, EventRegistry, Memory, Queues};
use crate::state::{RestoreError, SaveError, SavedState};
use locks::waiting::Waiting;
use server::{Outcome, Server};
use wire::{HEADER_OUT, header_out};
use work::{Job, Pending, Workers};

/// The tag under which the guest mounts the device.
pub const TAG: &str = "hull";

/// The hiprio queue (FUSE_FORGET) and the request queue.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
const WAKE: u64 = 0;
const TIMER: u64 = 1;
const EVENTS: u64 = 2;
/// Commands that the device has not taken yet.
const MAX_COMMANDS: usize = 256;

/// Why a share was not added or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// A share of this name exists.
    #[error("there is a share of this name already")]
    Exists,
    /// No share has this name.
    #[error("there is no share of this name")]
    Missing,
    /// Not a name that a directory can have, or one that begins with a dot.
    #[error("not a usable name")]
    Name,
    /// The descriptor is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// The device has not taken earlier commands yet, or has stopped.
    #[error("the fs device does not take commands")]
    Busy,
    /// The node is not a socket.
    #[error("not a socket")]
    NotSocket,
    /// The host refused.
    #[error("{0}")]
    Host(Errno),
}

impl From<Errno> for ShareError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::EXIST => Self::Exists,
            Errno::NOENT => Self::Missing,
            Errno::INVAL => Self::Name,
            Errno::NOTDIR => Self::NotDirectory,
            Errno::NOTSOCK => Self::NotSocket,
            other => Self::Host(other),
        }
    }
}

/// Called with the result of a command, on the device's thread or the caller's own.
pub type Done<T = ()> = Box<dyn FnOnce(Result<T, ShareError>) + Send>;

enum Command {
    Add(String, OwnedFd, Cache, Done),
    Remove(String, Done),
    FindSocket(u64, Done<Arc<OwnedFd>>),
}

/// Adds and removes shares of an fs device that runs on another thread.
#[derive(Clone)]
pub struct Shares {
    commands: SyncSender<Command>,
    wake: Arc<OwnedFd>,
}

impl Shares {
    /// Adds `directory` (`O_PATH` is enough) to the device's root.
    pub fn add(&self, name: &str, directory: OwnedFd, cache: Cache, done: Done) {
        self.command(Command::Add(name.to_owned(), directory, cache, done));
    }

    /// Removes a share, and closes every descriptor on it before `done` is called.
    pub fn remove(&self, name: &str, done: Done) {
        self.command(Command::Remove(name.to_owned(), done));
    }

    /// Finds the socket that a node is: its file (`O_PATH`).
    pub fn find_socket(&self, node: u64, done: Done<Arc<OwnedFd>>) {
        self.command(Command::FindSocket(node, done));
    }

    fn command(&self, command: Command) {
        match self.commands.try_send(command) {
            Ok(()) => {
                if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
                    // It fails only when it is readable already.
                    tracing::debug!(%error, "fs event descriptor");
                }
            }
            Err(TrySendError::Full(command) | TrySendError::Disconnected(command)) => match command
            {
                Command::Add(_, _, _, done) | Command::Remove(_, done) => {
                    done(Err(ShareError::Busy));
                }
                Command::FindSocket(_, done) => done(Err(ShareError::Busy)),
            },
        }
    }
}

/// The device.
pub struct Fs {
    server: Server,
    workers: Workers,
    waiting: Waiting,
    /// The guest's request for events.
    events: Option<Pending>,
    commands: Receiver<Command>,
    wake: Arc<OwnedFd>,
}

impl Fs {
    /// A device without shares, and the handle that adds them. The process's limit of open files,
    /// at this time, decides how many files it keeps open.
    pub fn new() -> io::Result<(Self, Shares)> {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let server = Server::new(usize::try_from(limit).unwrap_or(usize::MAX).min(1 << 20))?;
        let (sender, receiver) = sync_channel(MAX_COMMANDS);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shares = Shares {
            commands: sender,
            wake: wake.clone(),
        };
        let device = Self {
            server,
            workers: Workers::new(),
            waiting: Waiting::new()?,
            events: None,
            commands: receiver,
            wake,
        };
        Ok((device, shares))
    }

    /// Nodes, and how many of them wait for the sweep of descriptors.
    #[cfg(fuzzing)]
    pub fn nodes(&self) -> (usize, usize) {
        let nodes = &self.server.nodes;
        (nodes.count(), nodes.queue_length())
    }

    /// There is one request for events at a time.
    fn wait_for_events(&mut self, request: Pending, last: bool) {
        let before = match last {
            false => self.events.replace(request),
            true => {
                request.finish(Ok(()));
                self.events.take()
            }
        };
        if let Some(before) = before {
            before.finish(Err(Errno::NODEV));
        }
    }

    /// Answers the request for events, if there are any.
    fn tell_events(&mut self) {
        let watches = &mut self.server.watches;
        if watches.has_events()
            && let Some(request) = self.events.take()
        {
            request.complete(|buffers, unique| {
                let room = buffers.writable.remaining().saturating_sub(HEADER_OUT);
                let events = watches.take(room);
                let header = header_out(HEADER_OUT + events.len(), 0, unique);
                buffers.writable.copy_from(&header) + buffers.writable.copy_from(&events)
            });
        }
    }

    fn obey(&mut self, command: Command) {
        let server = &mut self.server;
        match command {
            Command::Add(name, directory, cache, done) => {
                done(
                    server
                        .add_share(&name, directory, cache)
                        .map_err(Into::into),
                );
            }
            Command::Remove(name, done) => done(server.remove_share(&name).map_err(Into::into)),
            Command::FindSocket(node, done) => done(server.find_socket(node).map_err(Into::into)),
        }
    }
}

impl Device for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    /// The tag, padded, and the number of request queues.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 36];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        config.extend_from_slice(&1u32.to_le_bytes());
        config
    }

    fn register(&mut self, events: EventRegistry) -> io::Result<()> {
        self.server.watches.register(events.clone(), EVENTS);
        events.add(&self.waiting.timer, TIMER, EventFlags::IN)?;
        events.add(&self.wake, WAKE, EventFlags::IN)
    }

    fn queue_event(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        let memory = queues.memory().iter().map(|region| region.len()).sum();
        self.server.nodes.bound(memory);
        while let Some(chain) = queues.pop_or_rearm(queue)? {
            let head = chain.head_index();
            let memory = queues.memory().clone();
            let outcome = match Buffers::new(&memory, chain.clone()) {
                Ok(mut buffers) => self.server.handle(&mut buffers),
                Err(error) => {
                    tracing::debug!(%error, "ignored a file system request");
                    Outcome::Done(0)
                }
            };
            match outcome {
                Outcome::Done(written) => {
                    let written = u32::try_from(written).unwrap_or(u32::MAX);
                    queues.add_used(queue, head, written)?;
                    queues.notify(queue)?;
                }
                Outcome::Later { unique, work } => {
                    let request = pending(queues, queue, memory, chain, unique)?;
                    self.workers.submit(Job { request, work });
                }
                Outcome::Wait { unique, lock } => {
                    let request = pending(queues, queue, memory, chain, unique)?;
                    self.waiting.add(request, lock, &mut self.server);
                }
                Outcome::Events { unique, last } => {
                    let request = pending(queues, queue, memory, chain, unique)?;
                    self.wait_for_events(request, last);
                }
            }
            self.waiting.try_released(&mut self.server);
        }
        self.tell_events();
        Ok(())
    }

    fn host_event(
        &mut self,
        token: u64,
        _ready: EventFlags,
        _queues: &mut Queues<'_>,
    ) -> Result<(), DeviceError> {
        if token == TIMER {
            self.waiting.try_due(&mut self.server);
            self.waiting.try_released(&mut self.server);
            return Ok(());
        }
        if token == EVENTS {
            self.server.receive_events();
            self.tell_events();
            return Ok(());
        }
        let mut count = [0; 8];
        // On failure the event was spurious.
        let _ = rustix::io::read(&self.wake, &mut count);
        while let Ok(command) = self.commands.try_recv() {
            self.obey(command);
        }
        self.waiting.try_released(&mut self.server);
        Ok(())
    }

    fn quiesce(&mut self, _queues: &mut Queues<'_>) -> Result<(), DeviceError> {
        self.workers.finish();
        self.waiting.finish();
        if let Some(request) = self.events.take() {
            // The guest asks again.
            request.finish(Err(Errno::AGAIN));
        }
        Ok(())
    }

    fn save(&mut self) -> Result<SavedState, SaveError> {
        state::save(&mut self.server)
    }

    /// The shares must have been added before, under their saved names.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        state::restore(&mut self.server, state)
    }

    fn reset(&mut self) {
        self.workers.discard();
        self.waiting.discard();
        self.events = None;
        self.server.reset();
    }
}

/// A request that is answered later.
fn pending(
    queues: &Queues<'_>,
    queue: usize,
    memory: Memory,
    chain: Chain,
    unique: u64,
) -> Result<Pending, DeviceError> {
    Ok(Pending {
        ring: queues.ring(queue)?.clone(),
        memory,
        chain,
        unique,
    })
}
