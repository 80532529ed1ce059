//! Steps by which a clone becomes a process of a container, in order.
//!
//! Runs in the clone, with its copy of the agent's memory; the agent has built the plans before.
//! [`run_init`] and [`run_exec`] return only on failure.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::clone::ChildGate;
use super::error::{Context, CreateError, Result};
use super::hooks::Hooks;
use super::namespaces::Namespaces;
use super::process_plan::{self, ProcessPlan};
use super::rootfs::{self, RootfsPlan};
use super::{ChildIo, devices, sys, terminal};

/// Everything that a container's init needs.
pub(super) struct InitPlan {
    pub(super) namespaces: Namespaces,
    pub(super) rootfs: RootfsPlan,
    pub(super) process: ProcessPlan,
    pub(super) hooks: Hooks,
    pub(super) hostname: Option<String>,
    pub(super) domainname: Option<String>,
}

/// Everything that a process executed in a container needs.
pub(super) struct ExecPlan<'a> {
    pub(super) process: ProcessPlan,
    /// The container's init, and which namespaces of its own it has.
    pub(super) init: BorrowedFd<'a>,
    pub(super) namespaces: u64,
}

/// Becomes a container's init.
pub(super) fn run_init(plan: &InitPlan, io: &ChildIo, gate: &ChildGate) -> CreateError {
    match prepare_init(plan, io, gate) {
        Err(error) => error,
        Ok((executable, pid)) => {
            let passed = gate.pass().and_then(|()| plan.process.confine());
            let started = passed.and_then(|()| match pid {
                Some(pid) => plan.hooks.run_start_container(&pid),
                None => Ok(()),
            });
            match started {
                Err(error) => error,
                Ok(()) => plan.process.execute(&executable),
            }
        }
    }
}

type Prepared = (process_plan::Executable, Option<String>);

fn prepare_init(plan: &InitPlan, io: &ChildIo, gate: &ChildGate) -> Result<Prepared> {
    start()?;
    if plan.namespaces.creates(sys::CLONE_NEWUSER) {
        gate.wait_for_maps()?;
    }
    plan.namespaces.make_rest()?;
    if plan.namespaces.has(sys::CLONE_NEWUSER) {
        become_root()?;
    }
    if plan.namespaces.creates(sys::CLONE_NEWNET) {
        loopback_up().context(|| "cannot set up the loopback interface")?;
    }
    if let Some(hostname) = &plan.hostname {
        rustix::system::sethostname(hostname.as_bytes())
            .context(|| format!("cannot set hostname to {hostname:?}"))?;
    }
    if let Some(domainname) = &plan.domainname {
        rustix::system::setdomainname(domainname.as_bytes())
            .context(|| format!("cannot set domainname to {domainname:?}"))?;
    }
    let root = plan.rootfs.attach()?;
    let unsealed = plan.rootfs.fill(root)?;
    let terminal = match io {
        ChildIo::Terminal => {
            let terminal = open_terminal(root, &plan.process)?;
            devices::bind_console(root, terminal.slave.as_fd())?;
            Some(terminal)
        }
        ChildIo::Pipes(_) => None,
    };
    plan.rootfs.protect(root, &unsealed)?;
    let pid = plan.hooks.run_create_container()?;
    plan.rootfs.pivot(root)?;
    set_streams(io, terminal, gate)?;
    plan.process.enter_cwd(true)?;
    plan.rootfs.seal()?;
    Ok((plan.process.become_user()?, pid))
}

/// Becomes another process of a container.
pub(super) fn run_exec(plan: &ExecPlan<'_>, io: &ChildIo, gate: &ChildGate) -> CreateError {
    match prepare_exec(plan, io, gate) {
        Err(error) => error,
        Ok(executable) => match gate.pass().and_then(|()| plan.process.confine()) {
            Err(error) => error,
            Ok(()) => plan.process.execute(&executable),
        },
    }
}

fn prepare_exec(
    plan: &ExecPlan<'_>,
    io: &ChildIo,
    gate: &ChildGate,
) -> Result<process_plan::Executable> {
    start()?;
    sys::setns(plan.init, plan.namespaces).context(|| "cannot join the container's namespaces")?;
    if plan.namespaces & sys::CLONE_NEWUSER != 0 {
        become_root()?;
    }
    let terminal = match io {
        ChildIo::Terminal => Some(open_terminal(rootfs::current_root()?, &plan.process)?),
        ChildIo::Pipes(_) => None,
    };
    set_streams(io, terminal, gate)?;
    plan.process.enter_cwd(false)?;
    plan.process.become_user()
}

fn start() -> Result<()> {
    // Processes of the container that see this one must not inspect it while it is still the
    // agent's.
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0).context(|| "cannot protect the new process")?;
    rustix::process::setsid().context(|| "cannot start a session")?;
    // Modes of files created for the container are exact.
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Becomes root of the user namespace; the process's ids are not mapped in it so far.
fn become_root() -> Result<()> {
    let what = || "cannot become root of the user namespace";
    let (uid, gid) = (rustix::fs::Uid::ROOT, rustix::fs::Gid::ROOT);
    rustix::thread::set_thread_groups(&[]).context(what)?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).context(what)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).context(what)
}

fn loopback_up() -> std::io::Result<()> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    let socket = sys::leak(socket);
    // SAFETY: the request is what the call reads, and is alive.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn open_terminal(root: BorrowedFd<'_>, process: &ProcessPlan) -> Result<terminal::Terminal> {
    let terminal = terminal::open(root, process.console_size)?;
    if process.uid != 0 {
        rustix::fs::fchown(
            &terminal.slave,
            Some(rustix::fs::Uid::from_raw(process.uid)),
            None,
        )
        .context(|| "cannot give the terminal to process.user")?;
    }
    Ok(terminal)
}

/// Puts the streams in place and closes everything else.
fn set_streams(io: &ChildIo, terminal: Option<terminal::Terminal>, gate: &ChildGate) -> Result<()> {
    match (io, terminal) {
        (ChildIo::Pipes(stdio), _) => {
            process_plan::set_stdio(
                stdio.stdin.as_fd(),
                stdio.stdout.as_fd(),
                stdio.stderr.as_fd(),
            )?;
        }
        (ChildIo::Terminal, Some(terminal)) => {
            gate.send_terminal(terminal.master.as_fd())?;
            let slave = sys::leak(terminal.slave);
            sys::leak(terminal.master);
            terminal::control(slave)?;
            process_plan::set_stdio(slave, slave, slave)?;
        }
        (ChildIo::Terminal, None) => {
            return Err(CreateError::other(
                "cannot set up streams",
                "no terminal was opened",
            ));
        }
    }
    gate.close_others()
}
