//! The clone, and the gate between it and the agent: see the table in [`super`].
//!
//! [`spawn`] is the only place where the agent clones itself. Its child side never returns.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Signal, WaitId, WaitIdOptions};

use super::error::{Context, CreateError, MESSAGE_LIMIT, Result};
use super::namespaces::{Namespaces, Visit};
use super::sys::{self, Cloned};

const MAPPED: &[u8] = b"m";
const TERMINAL: &[u8] = b"T";
const READY: &[u8] = b"R";
const SIBLING: u8 = b'P';

/// Descriptor of the child's end of the gate once its streams are in place.
const GATE: u32 = 3;

/// The agent's side of a clone.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
    pub(super) gate: OwnedFd,
}

/// The child's end of the gate.
pub(super) struct ChildGate(Cell<BorrowedFd<'static>>);

/// The namespaces of a clone.
pub(super) enum CloneTarget<'a> {
    /// In new or joined namespaces.
    Planned(&'a Namespaces),
    /// In the PID namespace of this process; the child joins the others itself.
    NamespacesOf(BorrowedFd<'a>),
}

/// Clones the agent. `child` runs in the clone and ends by `execve`; if it returns, the clone
/// reports the error and exits.
pub(super) fn spawn(
    target: &CloneTarget<'_>,
    cgroup: BorrowedFd<'_>,
    child: impl FnOnce(&ChildGate) -> CreateError,
) -> Result<Spawned> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .context(|| "cannot make the gate")?;
    let (visit, flags) = match target {
        CloneTarget::Planned(namespaces) if namespaces.joins_user() => {
            // SAFETY: the agent has one thread, and `run_between` does not return.
            return match unsafe { sys::clone3(0, Some(cgroup)) }.map_err(cannot_clone)? {
                Cloned::Parent { pidfd, .. } => {
                    drop(theirs);
                    sibling(ours, pidfd)
                }
                Cloned::Child => run_between(namespaces, theirs, child),
            };
        }
        CloneTarget::Planned(namespaces) => (namespaces.visit()?, namespaces.at_clone()),
        CloneTarget::NamespacesOf(process) => (Visit::pid_namespace_of(*process)?, 0),
    };
    // SAFETY: the agent has one thread, and `run` does not return.
    match unsafe { sys::clone3(flags, Some(cgroup)) }.map_err(cannot_clone)? {
        Cloned::Parent { pid, pidfd } => {
            drop(visit);
            Ok(Spawned {
                pid,
                pidfd,
                gate: ours,
            })
        }
        Cloned::Child => run(theirs, child),
    }
}

/// A new user namespace without a process: `map` writes its maps, of the process that is in it
/// meanwhile.
pub(super) fn user_namespace(map: impl FnOnce(u32) -> Result<()>) -> Result<OwnedFd> {
    // SAFETY: the agent has one thread, and the child does not return.
    match unsafe { sys::clone3(sys::CLONE_NEWUSER, None) }.map_err(cannot_clone)? {
        Cloned::Child => loop {
            // Until it is killed.
            sys::pause();
        },
        Cloned::Parent { pid, pidfd } => {
            let made = map(pid).and_then(|()| {
                let path = format!("/proc/{pid}/ns/user");
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                rustix::fs::openat(CWD, path.as_str(), flags, Mode::empty())
                    .context(|| format!("cannot open {path}"))
            });
            kill(pidfd.as_fd());
            made
        }
    }
}

fn cannot_clone(error: std::io::Error) -> CreateError {
    CreateError::other(
        "cannot clone a process for the container",
        super::error::reason(&error),
    )
}

/// Runs in the clone.
fn run(gate: OwnedFd, child: impl FnOnce(&ChildGate) -> CreateError) -> ! {
    // A panic must not unwind into the agent's code: there is a copy of all of it below this frame.
    let _bomb = Bomb;
    let gate = ChildGate(Cell::new(sys::leak(gate)));
    let error = child(&gate);
    gate.report(&error);
    sys::exit(1)
}

/// Runs in the process between the agent and a container that joins a user namespace: joins, clones
/// the container's process as its own sibling, hands its pidfd over, and exits.
fn run_between(
    namespaces: &Namespaces,
    gate: OwnedFd,
    child: impl FnOnce(&ChildGate) -> CreateError,
) -> ! {
    let _bomb = Bomb;
    let between = ChildGate(Cell::new(sys::leak(gate)));
    let failed = |error: &CreateError| -> ! {
        between.report(error);
        sys::exit(1)
    };
    if let Err(error) = namespaces.join() {
        failed(&error);
    }
    // SAFETY: this process has one thread, and `run` does not return.
    match unsafe { sys::clone3(namespaces.at_clone() | sys::CLONE_PARENT, None) } {
        Ok(Cloned::Parent { pid, pidfd }) => {
            let mut message = vec![SIBLING];
            message.extend(pid.to_ne_bytes());
            match between.send(&message, Some(pidfd.as_fd())) {
                Ok(()) => sys::exit(0),
                Err(error) => failed(&error),
            }
        }
        Ok(Cloned::Child) => match between.0.get().try_clone_to_owned() {
            Ok(gate) => run(gate, child),
            Err(_) => sys::exit(1),
        },
        Err(error) => failed(&cannot_clone(error)),
    }
}

/// The agent's side of [`run_between`].
fn sibling(gate: OwnedFd, between: OwnedFd) -> Result<Spawned> {
    let received = receive(gate.as_fd());
    reap(between.as_fd());
    let (message, descriptor) = received?;
    match (message.split_first(), descriptor) {
        (Some((&SIBLING, pid)), Some(pidfd)) => {
            let pid = pid.try_into().map(u32::from_ne_bytes).unwrap_or_default();
            Ok(Spawned { pid, pidfd, gate })
        }
        (None, _) => Err(CreateError::other(
            "cannot join the user namespace",
            "the process that did so was killed",
        )),
        _ => Err(CreateError::decode(&message)),
    }
}

/// Ends the process when dropped: nothing of the agent may run in a clone.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        sys::exit(101)
    }
}

impl ChildGate {
    /// Waits until the agent has mapped the ids of the new user namespace.
    pub(super) fn wait_for_maps(&self) -> Result<()> {
        self.wait()
    }

    /// Hands the terminal's master to the agent.
    pub(super) fn send_terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.send(TERMINAL, Some(master))
    }

    /// Reports that all is prepared, and waits for the permission to execute.
    pub(super) fn pass(&self) -> Result<()> {
        // Plain write and read: a seccomp filter is more likely to let these through.
        rustix::io::write(self.0.get(), READY)
            .context(|| "cannot tell the agent that the process is ready")?;
        self.wait()
    }

    fn wait(&self) -> Result<()> {
        loop {
            match rustix::io::read(self.0.get(), &mut [0; 1]) {
                // The agent has given up.
                Ok(0) => sys::exit(0),
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context(|| "cannot wait at the gate"),
            }
        }
    }

    fn send(&self, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        rustix::net::sendmsg(
            self.0.get(),
            &[IoSlice::new(message)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map(drop)
        .context(|| "cannot send a descriptor to the agent")
    }

    fn report(&self, error: &CreateError) {
        // If the agent is gone, the error is lost.
        let _ = rustix::io::write(self.0.get(), &error.encode());
    }

    /// Keeps the gate, closes every other descriptor but the standard streams.
    pub(super) fn close_others(&self) -> Result<()> {
        let gate = self.0.get();
        if gate.as_raw_fd() as u32 != GATE {
            sys::duplicate(gate, GATE as i32, libc::O_CLOEXEC)
                .context(|| "cannot move the gate")?;
            // SAFETY: open until execve closes it.
            self.0.set(unsafe { BorrowedFd::borrow_raw(GATE as i32) });
        }
        sys::close_from(GATE + 1).context(|| "cannot close the agent's descriptors")
    }
}

impl Spawned {
    /// Notifies the child that its ids are mapped.
    pub(super) fn maps_written(&self) -> Result<()> {
        rustix::net::send(&self.gate, MAPPED, SendFlags::NOSIGNAL)
            .map(drop)
            .context(|| "the new process has ended")
    }

    /// Waits until the child is ready; returns its terminal.
    pub(super) fn wait_until_ready(&self) -> Result<Option<OwnedFd>> {
        let mut terminal = None;
        loop {
            let (message, descriptor) = receive(self.gate.as_fd())?;
            match message.as_slice() {
                READY => return Ok(terminal),
                TERMINAL => terminal = descriptor,
                [] => return Err(self.died()),
                error => return Err(CreateError::decode(error)),
            }
        }
    }

    /// The error of a child that closed the gate without a message.
    fn died(&self) -> CreateError {
        let status = rustix::process::waitid(
            WaitId::PidFd(self.pidfd.as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        );
        let why = match status {
            Ok(Some(status)) => match (status.terminating_signal(), status.exit_status()) {
                (Some(signal), _) => format!("killed by signal {signal}"),
                (None, status) => format!("exited with status {}", status.unwrap_or_default()),
            },
            _ => "ended".into(),
        };
        CreateError::other("cannot prepare the new process", why)
    }

    /// Kills the child and reaps it.
    pub(super) fn kill(&self) {
        kill(self.pidfd.as_fd());
    }
}

fn kill(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
    reap(pidfd);
}

/// Fails only if the process has been reaped elsewhere.
fn reap(pidfd: BorrowedFd<'_>) {
    while let Err(Errno::INTR) =
        rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED)
    {}
}

/// Receives one message of the gate; empty at its end.
fn receive(gate: BorrowedFd<'_>) -> Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut message = vec![0; MESSAGE_LIMIT + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let mut buffers = [IoSliceMut::new(&mut message)];
        match rustix::net::recvmsg(gate, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_readable(gate)?,
            Err(Errno::CONNRESET) => break 0,
            Err(error) => return Err(error).context(|| "cannot read from the new process"),
        }
    };
    message.truncate(length);
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((message, descriptor))
}

/// Waits for a message: the caller may have made its end non-blocking.
fn wait_readable(gate: BorrowedFd<'_>) -> Result<()> {
    let mut poll = [rustix::event::PollFd::new(
        &gate,
        rustix::event::PollFlags::IN,
    )];
    match rustix::event::poll(&mut poll, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error).context(|| "cannot wait for the new process"),
    }
}
