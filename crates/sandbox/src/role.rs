//! The sandbox process: a sandbox with a control socket, in a process of its own.

use std::fs::File;
use std::os::fd::OwnedFd;

use hull_jail::CapabilitySet;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{CpuSet, UnshareFlags, sched_setaffinity, unshare_unsafe};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast::error::RecvError;

use crate::config::SandboxConfig;
use crate::control::protocol::{Received, Reply, receive, send};
use crate::control::serve;
use crate::error::{Context, Error, Result};
use crate::events::{Event, EventLog};
use crate::rootless;
use crate::sandbox::{Reason, Sandbox};
use crate::store::{SandboxDir, SandboxPath};

/// The hidden subcommand that is a sandbox process.
pub const ROLE: &str = "sandbox-process";

/// Runs a sandbox process to its end. `first` is the connection of who started it: its first
/// message is the configuration, with the lock of the sandbox's directory, its listening socket and
/// its disks.
///
/// Called in a process of its own, with one thread, by the hidden subcommand [`ROLE`].
///
/// # Errors
/// What went wrong before the machine was started; it was also sent on `first`.
pub fn run(path: &SandboxPath, first: OwnedFd) -> Result<()> {
    // A process group leader cannot become a session leader: it is one already then.
    let _ = rustix::process::setsid();
    // If this fails, starting the processes reports a limit that is too low.
    let _ = hull_jail::raise_open_files();
    let Some(Received {
        message: config,
        fds,
    }) = receive::<SandboxConfig>(&first).context(|| "read the configuration")?
    else {
        return Err(Error::new("nobody asks for a sandbox"));
    };
    let mut fds = fds.into_iter();
    let (Some(lock), Some(listener)) = (fds.next(), fds.next()) else {
        return Err(Error::invalid("the sandbox's lock and socket did not come"));
    };
    let dir = SandboxDir::adopt(path, File::from(lock))?;
    enter_mount_namespace()?;
    stay_on(&config.bounds.host_cpus)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "start the event loop")?;
    runtime.block_on(async {
        let booted = Sandbox::boot_then(config, dir, fds.collect(), restrict).await;
        let sandbox = match booted {
            Ok(sandbox) => sandbox,
            Err(error) => {
                // Who started it may have gone; the log has it, too.
                let _ = send(&first, &Reply::Failed(error.clone()), &[]);
                return Err(error);
            }
        };
        tokio::spawn(end_when_told(sandbox.clone()));
        let logging = tokio::spawn(log_events(sandbox.clone(), |_| {}));
        serve(&sandbox, Some(first), listener).await?;
        // The last events are those of the end.
        let _ = logging.await;
        Ok(())
    })
}

/// Gives this process a mount namespace of its own. Must be called while it has one thread.
///
/// # Errors
/// The kernel refuses it.
#[allow(unsafe_code)]
pub fn enter_mount_namespace() -> Result<()> {
    // SAFETY: only CLONE_FILES among the flags makes unshare unsafe, and it is not given.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context(|| "create a mount namespace")?;
    // What the host mounts later still appears here (volumes), what is mounted here stays here.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .context(|| "make the mount namespace private")
}

/// Keeps this process, and what it starts from now on, on some of the host's processors.
///
/// # Errors
/// The host has none of them.
fn stay_on(cpus: &[u32]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu as usize);
    }
    sched_setaffinity(None, &set).context(|| "keep the machine on processors of the host")
}

/// Takes from this process what it needs no more when its machine runs.
fn restrict() -> Result<()> {
    let mut keep = CapabilitySet::SYS_ADMIN // mounts, network namespaces
        | CapabilitySet::NET_ADMIN // taps, addresses, packet filters; also of plugins
        | CapabilitySet::NET_RAW // iptables, of plugins
        | CapabilitySet::SYS_NICE // moves the machine's processes to cpusets
        | CapabilitySet::SYS_PTRACE // what the machine's processes cost: their smaps_rollup
        | CapabilitySet::KILL // they have users of their own
        // Removes writable layers, whose files are anybody's (`--rm`).
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        // Connects to sockets of the host as the guest's users.
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID;
    if rootless::in_user_namespace() {
        // pasta drops privileges by itself.
        keep |= CapabilitySet::SETPCAP;
    }
    hull_jail::restrict_supervisor("the sandbox process", keep)
        .map_err(|error| Error::new(error.to_string()))
}

/// Ends the sandbox on SIGTERM.
async fn end_when_told(sandbox: Sandbox) {
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
            sandbox.shutdown(Reason::Terminated);
        }
        Err(error) => tracing::error!("cannot listen for SIGTERM: {error}"),
    }
}

/// Writes the sandbox's events to the log of the host until it has ended; `each` sees them first.
pub async fn log_events(sandbox: Sandbox, mut each: impl FnMut(&Event)) {
    let mut events = sandbox.events();
    let Some(log) = EventLog::of(sandbox.path()) else {
        return;
    };
    loop {
        let event = tokio::select! {
            biased;
            event = events.recv() => event,
            _ = sandbox.gone() => match events.try_recv() {
                Ok(event) => Ok(event),
                Err(_) => return,
            },
        };
        match event {
            Ok(event) => {
                each(&event);
                if let Err(error) = log.append(&event) {
                    tracing::warn!("cannot write {}: {error}", log.path().display());
                }
            }
            Err(RecvError::Lagged(missed)) => tracing::warn!("{missed} events are not logged"),
            Err(RecvError::Closed) => return,
        }
    }
}
