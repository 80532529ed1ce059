//! The process that holds the devices of one sandbox: its threads, its control socket, its end.
//!
//! [`run`] is called by the hidden subcommand `device-process`, already jailed: there is nothing but `/proc` (of its
//! own pid namespace) and the descriptors that were inherited. Each device has its own thread and front end; the first
//! thread serves the control socket. The process ends when the sandbox closes the control socket or a front end goes away.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::block::Block;
use crate::control::{self, Call, Event, Request};
use crate::device::Device;
use crate::entropy::Entropy;
use crate::fs::{Fs, Shares};
use crate::net::{Handle as NetHandle, Net};
use crate::transport::vhost_user::{self, FrontEnd};
use crate::vsock::{Handle as VsockHandle, Vsock};

/// What `device-process` is told: numbers of inherited descriptors.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceProcessOptions {
    /// The `SOCK_SEQPACKET` socket to the sandbox.
    pub control_fd: RawFd,
    /// Listening vhost-user socket of the fs device.
    pub fs_fd: Option<RawFd>,
    /// Listening vhost-user socket of the vsock device.
    pub vsock_fd: Option<RawFd>,
    /// Listening vhost-user socket of the entropy device.
    pub entropy_fd: Option<RawFd>,
    /// The net devices, in order.
    pub nets: Vec<NetDeviceOptions>,
    /// The disks, in order.
    pub disks: Vec<DiskOptions>,
}

/// One net device of [`DeviceProcessOptions`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetDeviceOptions {
    /// Listening vhost-user socket.
    pub socket_fd: RawFd,
    /// Hardware address that the driver finds.
    pub mac: [u8; 6],
    /// Who drives it.
    pub front_end: FrontEnd,
}

/// One disk of [`DeviceProcessOptions`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOptions {
    /// Listening vhost-user socket.
    pub socket_fd: RawFd,
    /// The file or block device, opened for what the guest may do.
    pub file_fd: RawFd,
    /// The guest may only read.
    pub read_only: bool,
}

/// The serial number by which the guest knows the machine's disk `index`.
pub fn disk_serial(index: usize) -> String {
    format!("hull-disk{index}")
}

/// Why the process cannot run, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A descriptor number on the command line is not open, or is there twice.
    #[error("cannot use descriptor {0}: not an inherited descriptor, or given twice")]
    Descriptor(RawFd),
    /// The host refused something.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: io::Error,
    },
    /// A device's front end broke the protocol.
    #[error(transparent)]
    Transport(#[from] vhost_user::Error),
}

/// Runs the devices until the control socket is closed or a front end goes away.
pub fn run(options: DeviceProcessOptions) -> Result<(), Error> {
    let host = |action| move |source: io::Error| Error::Host { action, source };
    let mut inherited = Inherited::default();
    // All of them before anything else is opened, which could get the number of one that is not there.
    let control = Arc::new(inherited.take(options.control_fd)?);
    let mut take = |fd: Option<RawFd>| fd.map(|fd| inherited.take(fd)).transpose();
    let fs_socket = take(options.fs_fd)?;
    let vsock_socket = take(options.vsock_fd)?;
    let entropy_socket = take(options.entropy_fd)?;
    let mut net_sockets = Vec::new();
    for net in &options.nets {
        net_sockets.push((inherited.take(net.socket_fd)?, net));
    }
    let mut disks = Vec::new();
    for disk in &options.disks {
        let file = File::from(inherited.take(disk.file_fd)?);
        disks.push((inherited.take(disk.socket_fd)?, file, disk.read_only));
    }
    raise_descriptor_limit();
    // Of what group a file is must not matter to what the host lets the fs device do for a guest's user.
    if let Err(error) = rustix::thread::set_thread_groups(&[]) {
        tracing::debug!(%error, "cannot leave supplementary groups");
    }
    // The guest's umask was applied by the guest.
    rustix::process::umask(rustix::fs::Mode::empty());

    let ended = Arc::new(Ended::new().map_err(host("create an eventfd"))?);
    let mut targets = Targets::default();
    if let Some(socket) = fs_socket {
        let (device, shares) = Fs::new().map_err(host("create the fs device"))?;
        targets.shares = Some(shares);
        start("fs", Box::new(device), socket, FrontEnd::Usual, &ended)?;
    }
    if let Some(socket) = vsock_socket {
        let reports = control.clone();
        let (device, handle) = Vsock::new(Box::new(move |incoming| {
            let event = Event::Incoming {
                port: incoming.port,
                guest_port: incoming.guest_port,
            };
            tell(&reports, &event, Some(incoming.stream.as_fd()));
        }))
        .map_err(host("create the vsock device"))?;
        targets.vsock = Some(handle);
        start("vsock", Box::new(device), socket, FrontEnd::Usual, &ended)?;
    }
    if let Some(socket) = entropy_socket {
        let device = Entropy::new().map_err(host("create the entropy device"))?;
        start("entropy", Box::new(device), socket, FrontEnd::Usual, &ended)?;
    }
    for (socket, net) in net_sockets {
        let mut slot = NetSlot::Idle(socket, net.clone());
        if net.front_end == FrontEnd::QemuNet {
            // It is there from the boot on.
            slot.start(&ended)?;
        }
        targets.nets.push(slot);
    }
    for (index, (socket, file, read_only)) in disks.into_iter().enumerate() {
        let device =
            Block::new(file, read_only, &disk_serial(index)).map_err(host("measure a disk"))?;
        start("disk", Box::new(device), socket, FrontEnd::Usual, &ended)?;
    }
    serve_control(&control, &mut targets, &ended)
}

/// Takes inherited descriptors by number, each once.
#[derive(Default)]
struct Inherited {
    taken: Vec<RawFd>,
}

impl Inherited {
    fn take(&mut self, fd: RawFd) -> Result<OwnedFd, Error> {
        if fd <= 2 || self.taken.contains(&fd) {
            return Err(Error::Descriptor(fd));
        }
        // SAFETY: only borrowed for the question whether it is open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)
            .map_err(|_| Error::Descriptor(fd))?;
        self.taken.push(fd);
        // SAFETY: it is open, and not owned by anything else: the caller names only inherited descriptors, each is
        // taken once, and this runs before the process opens any of its own.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// What the control socket's calls reach.
#[derive(Default)]
struct Targets {
    shares: Option<Shares>,
    vsock: Option<VsockHandle>,
    nets: Vec<NetSlot>,
}

/// A net device. One that nothing was ever attached to costs no thread.
enum NetSlot {
    Idle(OwnedFd, NetDeviceOptions),
    Started(NetHandle),
    Failed,
}

impl NetSlot {
    /// The device, at work.
    fn start(&mut self, ended: &Arc<Ended>) -> Result<&NetHandle, Error> {
        if let Self::Idle(..) = self
            && let Self::Idle(socket, net) = std::mem::replace(self, Self::Failed)
        {
            let (device, handle) = Net::new(net.mac).map_err(|source| Error::Host {
                action: "create a net device",
                source,
            })?;
            start("net", Box::new(device), socket, net.front_end, ended)?;
            *self = Self::Started(handle);
        }
        self.started().ok_or(Error::Host {
            action: "use a net device",
            source: io::Error::other("it did not start"),
        })
    }

    fn started(&self) -> Option<&NetHandle> {
        match self {
            Self::Started(handle) => Some(handle),
            Self::Idle(..) | Self::Failed => None,
        }
    }
}

/// Each inode that the guest knows holds a descriptor here.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// How device threads wake the first thread at their end.
struct Ended {
    event: OwnedFd,
    result: Mutex<Option<Result<(), vhost_user::Error>>>,
}

impl Ended {
    fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC)?,
            result: Mutex::new(None),
        })
    }

    fn set(&self, result: Result<(), vhost_user::Error>) {
        self.result
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(result);
        if let Err(error) = rustix::io::write(&self.event, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot end the device process");
        }
    }
}

fn start(
    name: &'static str,
    device: Box<dyn Device>,
    socket: OwnedFd,
    front_end: FrontEnd,
    ended: &Arc<Ended>,
) -> Result<(), Error> {
    let ended = ended.clone();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = vhost_user::serve(name, device, socket, front_end);
            tracing::debug!(device = name, "front end is gone");
            ended.set(result);
        })
        .map_err(|source| Error::Host {
            action: "start a device thread",
            source,
        })?;
    Ok(())
}

fn serve_control(
    control: &Arc<OwnedFd>,
    targets: &mut Targets,
    ended: &Arc<Ended>,
) -> Result<(), Error> {
    loop {
        let mut ready = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&ended.event, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Error::Host {
                    action: "wait for the control socket",
                    source: error.into(),
                });
            }
        }
        if !ready[1].revents().is_empty() {
            let result = ended
                .result
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            return Ok(result.unwrap_or(Ok(()))?);
        }
        if ready[0].revents().is_empty() {
            continue;
        }
        match control::recv::<Request>(control) {
            Ok((request, fd)) => serve_call(request, fd, control, targets, ended),
            Err(error) => match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => return Ok(()),
                io::ErrorKind::WouldBlock => {}
                io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "ignored a request of the sandbox");
                }
                _ => {
                    return Err(Error::Host {
                        action: "read the control socket",
                        source: error,
                    });
                }
            },
        }
    }
}

fn serve_call(
    request: Request,
    fd: Option<OwnedFd>,
    control: &Arc<OwnedFd>,
    targets: &mut Targets,
    ended: &Arc<Ended>,
) {
    let id = request.id;
    let reply = |result: Result<(), String>| {
        let event = Event::Reply {
            id,
            error: result.err(),
        };
        tell(control, &event, None);
    };
    const NO_FS: &str = "this device process has no fs device";
    const NO_VSOCK: &str = "this device process has no vsock device";
    const NO_NET: &str = "this device process has no such net device";
    const NO_FD: &str = "no descriptor came with the request";
    const NO_TAP: &str = "no tap is attached";
    match request.call {
        Call::AddShare { name, cache } => match (&targets.shares, fd) {
            (Some(shares), Some(fd)) => shares.add(&name, fd, cache, done(id, control)),
            (None, _) => reply(Err(NO_FS.into())),
            (_, None) => reply(Err(NO_FD.into())),
        },
        Call::RemoveShare { name } => match &targets.shares {
            Some(shares) => shares.remove(&name, done(id, control)),
            None => reply(Err(NO_FS.into())),
        },
        Call::AttachNet { device, options } => {
            match (targets.nets.get_mut(usize::from(device)), fd) {
                (Some(net), Some(tap)) => match net.start(ended) {
                    Ok(net) => net.attach(tap, options, done(id, control)),
                    Err(error) => reply(Err(error.to_string())),
                },
                (None, _) => reply(Err(NO_NET.into())),
                (_, None) => reply(Err(NO_FD.into())),
            }
        }
        Call::ChangeNet { device, options } => match targets.nets.get(usize::from(device)) {
            Some(net) => match net.started() {
                Some(net) => net.change(options, done(id, control)),
                None => reply(Err(NO_TAP.into())),
            },
            None => reply(Err(NO_NET.into())),
        },
        Call::DetachNet { device } => match targets.nets.get(usize::from(device)) {
            Some(net) => match net.started() {
                Some(net) => net.detach(done(id, control)),
                None => reply(Ok(())),
            },
            None => reply(Err(NO_NET.into())),
        },
        Call::Listen { port } => match &targets.vsock {
            Some(vsock) => {
                if let Err(error) = vsock.listen(port, answered(id, control)) {
                    reply(Err(format!("cannot listen on host port {port}: {error}")));
                }
            }
            None => reply(Err(NO_VSOCK.into())),
        },
        Call::Drain => match &targets.vsock {
            Some(vsock) => {
                if let Err(error) = vsock.drain(answered(id, control)) {
                    reply(Err(error.to_string()));
                }
            }
            None => reply(Err(NO_VSOCK.into())),
        },
        Call::Connect {
            guest_port,
            host_port,
        } => match (&targets.vsock, fd) {
            (Some(vsock), Some(stream)) => {
                let control = control.clone();
                vsock.connect(
                    guest_port,
                    host_port,
                    stream,
                    Box::new(move |result| {
                        let event = Event::Reply {
                            id,
                            error: result.err().map(|error| error.to_string()),
                        };
                        tell(&control, &event, None);
                    }),
                );
            }
            (None, _) => reply(Err(NO_VSOCK.into())),
            (_, None) => reply(Err(NO_FD.into())),
        },
    }
}

/// Answers a request that cannot fail any more.
fn answered(id: u64, control: &Arc<OwnedFd>) -> Box<dyn FnOnce() + Send> {
    let control = control.clone();
    Box::new(move || tell(&control, &Event::Reply { id, error: None }, None))
}

/// Answers a request about a share or a net device.
fn done<E: std::fmt::Display>(
    id: u64,
    control: &Arc<OwnedFd>,
) -> Box<dyn FnOnce(Result<(), E>) + Send> {
    let control = control.clone();
    Box::new(move |result| {
        let event = Event::Reply {
            id,
            error: result.err().map(|error| error.to_string()),
        };
        tell(&control, &event, None);
    })
}

/// Sends an event. When it cannot be sent the sandbox is gone, which the control loop sees for itself.
fn tell(control: &OwnedFd, event: &Event, fd: Option<BorrowedFd<'_>>) {
    loop {
        match control::send(control, event, fd) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The sandbox made its end non-blocking, which is this end's too only if it shares the description.
                let mut ready = [PollFd::new(control, PollFlags::OUT)];
                if poll(&mut ready, None).is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(%error, "cannot report to the sandbox");
                return;
            }
            Ok(()) => return,
        }
    }
}
