//! Requests of the sandbox: which device each of them goes to, and its reply.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use hull_device_control::{Call, Event, Request};

use super::{DiskSlot, NetSlot, Threads, report};
use crate::fs::{ShareError, Shares};
use crate::vsock::{Handle as VsockHandle, Socket};

const NO_FS: &str = "the machine has no fs device";
const NO_VSOCK: &str = "the machine has no vsock device";
const NO_NET: &str = "the machine has no such net device";
const NO_DISK: &str = "the machine has no such disk";
const NO_FD: &str = "no descriptor came with the request";
const NO_TAP: &str = "no tap is attached";

/// The devices that requests reach.
#[derive(Default)]
pub struct Targets {
    pub shares: Option<Shares>,
    pub vsock: Option<VsockHandle>,
    pub nets: Vec<NetSlot>,
    pub disks: Vec<DiskSlot>,
}

/// Sends the reply to one request.
struct Reply {
    id: u64,
    control: Arc<OwnedFd>,
}

impl Reply {
    fn send(self, result: Result<(), String>) {
        let event = Event::Reply {
            id: self.id,
            error: result.err(),
        };
        report(&self.control, &event, None);
    }

    /// For a request for a socket.
    fn on_socket(self) -> Box<dyn FnOnce(Result<Arc<OwnedFd>, ShareError>) + Send> {
        Box::new(move |found| match found {
            Ok(file) => {
                let event = Event::Socket { id: self.id };
                report(&self.control, &event, Some(file.as_fd()));
            }
            Err(error) => self.send(Err(error.to_string())),
        })
    }

    /// For a request to which a device replies with a result.
    fn on_result<E: std::fmt::Display>(self) -> Box<dyn FnOnce(Result<(), E>) + Send> {
        Box::new(move |result| self.send(result.map_err(|error| error.to_string())))
    }
}

/// Serves one request. Its device replies, now or later.
pub fn serve(
    request: Request,
    fd: Option<OwnedFd>,
    control: &Arc<OwnedFd>,
    targets: &mut Targets,
    threads: &Arc<Threads>,
) {
    let reply = Reply {
        id: request.id,
        control: control.clone(),
    };
    let unavailable = |reason: &str| Err(reason.to_owned());
    match request.call {
        Call::AddShare { name, cache } => match (&targets.shares, fd) {
            (Some(shares), Some(fd)) => shares.add(&name, fd, cache, reply.on_result()),
            (None, _) => reply.send(unavailable(NO_FS)),
            (_, None) => reply.send(unavailable(NO_FD)),
        },
        Call::RemoveShare { name } => match &targets.shares {
            Some(shares) => shares.remove(&name, reply.on_result()),
            None => reply.send(unavailable(NO_FS)),
        },
        Call::FindSocket { node } => match &targets.shares {
            Some(shares) => shares.find_socket(node, reply.on_socket()),
            None => reply.send(unavailable(NO_FS)),
        },
        Call::AttachNet { device, options } => {
            let number = usize::from(device);
            match (targets.nets.get_mut(number), fd) {
                (Some(net), Some(tap)) => match net.start(number, threads) {
                    Ok(net) => net.attach(tap, options, reply.on_result()),
                    Err(error) => reply.send(Err(error.to_string())),
                },
                (None, _) => reply.send(unavailable(NO_NET)),
                (_, None) => reply.send(unavailable(NO_FD)),
            }
        }
        Call::AttachDisk { disk, read_only } => {
            let number = usize::from(disk);
            match (targets.disks.get_mut(number), fd) {
                (Some(slot), Some(file)) => {
                    let started = slot.start(number, file, read_only, threads);
                    reply.send(started.map_err(|error| error.to_string()));
                }
                (None, _) => reply.send(unavailable(NO_DISK)),
                (_, None) => reply.send(unavailable(NO_FD)),
            }
        }
        Call::ChangeNet { device, options } => match targets.nets.get(usize::from(device)) {
            Some(net) => match net.started() {
                Some(net) => net.change(options, reply.on_result()),
                None => reply.send(unavailable(NO_TAP)),
            },
            None => reply.send(unavailable(NO_NET)),
        },
        Call::DetachNet { device } => match targets.nets.get(usize::from(device)) {
            Some(net) => match net.started() {
                Some(net) => net.detach(reply.on_result()),
                None => reply.send(Ok(())),
            },
            None => reply.send(unavailable(NO_NET)),
        },
        Call::Listen { port } => match &targets.vsock {
            Some(vsock) => vsock.listen(port, reply.on_result()),
            None => reply.send(unavailable(NO_VSOCK)),
        },
        Call::List => {
            let devices = threads.started();
            let id = request.id;
            report(control, &Event::Devices { id, devices }, None);
        }
        Call::Drain => match &targets.vsock {
            Some(vsock) => vsock.drain(reply.on_result()),
            None => reply.send(unavailable(NO_VSOCK)),
        },
        Call::CutStream { port } => match &targets.vsock {
            Some(vsock) => vsock.cut(port, reply.on_result()),
            None => reply.send(unavailable(NO_VSOCK)),
        },
        Call::ResetStreams => match &targets.vsock {
            Some(vsock) => vsock.reset_transport(reply.on_result()),
            None => reply.send(unavailable(NO_VSOCK)),
        },
        Call::Connect {
            guest_port,
            host_port,
            user,
        } => match (&targets.vsock, fd) {
            (Some(vsock), Some(stream)) => {
                let stream = Socket::of(stream, user);
                vsock.connect(guest_port, host_port, stream, reply.on_result());
            }
            (None, _) => reply.send(unavailable(NO_VSOCK)),
            (_, None) => reply.send(unavailable(NO_FD)),
        },
    }
}
