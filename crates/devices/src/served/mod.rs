//! The devices of one guest in the process that holds them: their threads, and requests of the
//! sandbox.
//!
//! That process is the device process, or the machine process of a kind that has its devices in
//! itself. Each device has its own thread; one more serves the control socket.

mod calls;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hull_device_control::{
    CONTROL_FD, DeviceConfig, DeviceType, Event, InvalidSetup, REQUEST_LIMITS, Request, Resources,
    SETUP_LIMITS, ServedDevice, Setup, disk_serial,
};
use hull_ipc::Received;
use rustix::event::{PollFd, PollFlags, poll};

use crate::balloon::Balloon;
use crate::block::Block;
use crate::device::Device;
use crate::ended::Ended;
use crate::entropy::Entropy;
use crate::fs::Fs;
use crate::net::{Handle as NetHandle, Net};
use crate::transport::{self, Connection};
use crate::vsock::Vsock;
use calls::Targets;

/// Why the process cannot run, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process was not started by a sandbox.
    #[error("descriptor {CONTROL_FD} is not a control socket")]
    NoControlSocket,
    /// The sandbox closed the control socket before it configured the devices.
    #[error("the sandbox has ended before it configured the devices")]
    NoSetup,
    /// The configuration is invalid.
    #[error("cannot set the devices up: {0}")]
    Setup(#[from] InvalidSetup),
    /// A call of the host failed.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// A device cannot be set up, or its front end broke the protocol.
    #[error(transparent)]
    Transport(#[from] transport::Error),
}

impl Error {
    fn host(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

/// Receives what the sandbox sends first: the devices with their descriptors.
///
/// # Errors
/// [`Error::NoSetup`] if the sandbox has ended, [`Error::Setup`] if it is invalid.
pub fn receive_setup(control: &OwnedFd) -> Result<Vec<(DeviceConfig, Resources)>, Error> {
    let received = hull_ipc::receive::<Setup>(control, SETUP_LIMITS)
        .map_err(Error::host("receive the configuration of the devices"))?;
    let Received { message, fds } = received.ok_or(Error::NoSetup)?;
    Ok(message.assign(fds)?)
}

/// Called first by the thread of each device. The error is for display.
pub type ConfineThread = fn(DeviceType) -> Result<(), String>;

/// The devices of a guest, some of which have threads.
pub struct Served {
    control: Arc<OwnedFd>,
    threads: Arc<Threads>,
    targets: Targets,
}

impl Served {
    /// No devices yet. Changes the process: it leaves supplementary groups and sets its umask,
    /// because the host must not decide on the fs device's file accesses by groups that the
    /// guest's user lacks, and the guest has applied its own umask.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn new(control: OwnedFd, confine: ConfineThread) -> Result<Self, Error> {
        if let Err(error) = rustix::thread::set_thread_groups(&[]) {
            tracing::debug!(%error, "cannot leave supplementary groups");
        }
        rustix::process::umask(rustix::fs::Mode::empty());
        Ok(Self {
            control: Arc::new(control),
            threads: Arc::new(Threads {
                confine,
                ended: Ended::new().map_err(Error::host("create an eventfd"))?,
                started: Mutex::default(),
            }),
            targets: Targets::default(),
        })
    }

    /// Starts a device; `file` is a disk's. A net device gets its thread when a tap is attached to
    /// it, unless its front end waits for it.
    ///
    /// # Errors
    /// The device cannot be set up.
    pub fn start(
        &mut self,
        device: DeviceConfig,
        connection: Connection,
        file: Option<OwnedFd>,
    ) -> Result<(), Error> {
        let kind = device.device_type();
        let (targets, threads) = (&mut self.targets, &self.threads);
        match device {
            DeviceConfig::Fs => {
                let (device, shares) = Fs::new().map_err(Error::host("create the fs device"))?;
                targets.shares = Some(shares);
                start(kind, 0, Box::new(device), connection, threads)
            }
            DeviceConfig::Vsock => {
                let reports = self.control.clone();
                let (device, handle) = Vsock::new(Box::new(move |incoming| {
                    let event = Event::Incoming {
                        port: incoming.port,
                        guest_port: incoming.guest_port,
                    };
                    report(&reports, &event, Some(incoming.stream.as_fd()));
                }))
                .map_err(Error::host("create the vsock device"))?;
                targets.vsock = Some(handle);
                start(kind, 0, Box::new(device), connection, threads)
            }
            DeviceConfig::Entropy => {
                let device = Entropy::new().map_err(Error::host("create the entropy device"))?;
                start(kind, 0, Box::new(device), connection, threads)
            }
            DeviceConfig::Balloon => {
                start(kind, 0, Box::new(Balloon::default()), connection, threads)
            }
            DeviceConfig::Net { mac, early_enable } => {
                let mut slot = NetSlot::Idle { connection, mac };
                if early_enable {
                    // QEMU's devices are present from boot.
                    slot.start(targets.nets.len(), threads)?;
                }
                targets.nets.push(slot);
                Ok(())
            }
            DeviceConfig::Disk { read_only } => {
                // `Setup::assign` gives each disk its file.
                let file = file.ok_or(Error::NoSetup)?;
                let mut slot = DiskSlot(Some(connection));
                slot.start(targets.disks.len(), file, read_only, threads)?;
                targets.disks.push(slot);
                Ok(())
            }
            DeviceConfig::SpareDisk => {
                targets.disks.push(DiskSlot(Some(connection)));
                Ok(())
            }
        }
    }

    /// Serves requests until the sandbox closes the control socket or a device ends.
    ///
    /// # Errors
    /// A front end broke the protocol, or the control socket failed.
    pub fn serve(mut self) -> Result<(), Error> {
        serve_control(&self.control, &mut self.targets, &self.threads)
    }
}

/// A disk: its connection, until it has a file and a thread.
struct DiskSlot(Option<Connection>);

impl DiskSlot {
    /// Starts the device of disk `number`.
    fn start(
        &mut self,
        number: usize,
        file: OwnedFd,
        read_only: bool,
        threads: &Arc<Threads>,
    ) -> Result<(), Error> {
        let device = Block::new(File::from(file), read_only, &disk_serial(number))
            .map_err(Error::host("measure a disk"))?;
        let connection = self.0.take().ok_or(Error::Host {
            action: "attach a disk",
            source: io::Error::other("it has a file already"),
        })?;
        start(
            DeviceType::Disk,
            number,
            Box::new(device),
            connection,
            threads,
        )
    }
}

/// A net device. It has no thread until something is attached to it.
enum NetSlot {
    Idle {
        connection: Connection,
        mac: [u8; 6],
    },
    Started(NetHandle),
    Failed,
}

impl NetSlot {
    /// Starts net device `number` if it is not running.
    fn start(&mut self, number: usize, threads: &Arc<Threads>) -> Result<&NetHandle, Error> {
        if let Self::Idle { .. } = self
            && let Self::Idle { connection, mac } = std::mem::replace(self, Self::Failed)
        {
            let (device, handle) = Net::new(mac).map_err(Error::host("create a net device"))?;
            start(
                DeviceType::Net,
                number,
                Box::new(device),
                connection,
                threads,
            )?;
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
            Self::Idle { .. } | Self::Failed => None,
        }
    }
}

/// How device threads begin, and wake the first thread when they end.
struct Threads {
    confine: ConfineThread,
    ended: Ended<Result<(), transport::Error>>,
    /// The devices that have one.
    started: Mutex<Vec<ServedDevice>>,
}

impl Threads {
    fn started(&self) -> Vec<ServedDevice> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<ServedDevice>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn start(
    kind: DeviceType,
    number: usize,
    device: Box<dyn Device>,
    connection: Connection,
    threads: &Arc<Threads>,
) -> Result<(), Error> {
    let threads = threads.clone();
    let name = kind.name();
    let served = ServedDevice {
        device: kind,
        number,
        queues: device.queue_sizes().to_vec(),
    };
    let thread_name = served.thread();
    let attached = connection.attach(name, device)?;
    threads.lock().push(served);
    std::thread::Builder::new()
        .name(thread_name)
        .spawn(move || {
            let result = match (threads.confine)(kind) {
                Ok(()) => attached.serve(),
                Err(why) => Err(transport::Error::Confine(why)),
            };
            tracing::debug!(device = name, "not served any more");
            threads.ended.set(result);
        })
        .map_err(Error::host("start a device thread"))?;
    Ok(())
}

fn serve_control(
    control: &Arc<OwnedFd>,
    targets: &mut Targets,
    threads: &Arc<Threads>,
) -> Result<(), Error> {
    loop {
        let mut ready = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(threads.ended.event(), PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::host("wait for the control socket")(error.into())),
        }
        if !ready[1].revents().is_empty() {
            return Ok(threads.ended.take().unwrap_or(Ok(()))?);
        }
        if ready[0].revents().is_empty() {
            continue;
        }
        match hull_ipc::receive::<Request>(control, REQUEST_LIMITS) {
            Ok(Some(Received { message, fds })) => {
                calls::serve(message, fds.into_iter().next(), control, targets, threads);
            }
            Ok(None) => return Ok(()),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => {}
                io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "ignored a request of the sandbox");
                }
                _ => return Err(Error::host("read the control socket")(error)),
            },
        }
    }
}

/// Sends an event. On failure the sandbox has ended, which the control loop notices itself.
fn report(control: &OwnedFd, event: &Event, fd: Option<BorrowedFd<'_>>) {
    loop {
        match hull_ipc::send(control, event, fd.as_slice()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Only if the sandbox has set the shared description non-blocking.
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
