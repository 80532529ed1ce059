//! Core scheduling: processors that share a core (SMT siblings) run a machine's threads at the same
//! time only with each other, so that no other machine and no program of the host can watch them
//! through what the siblings share.
#![allow(unsafe_code)]

use std::io;

use crate::error::{Error, Result};

// linux/prctl.h.
const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
const PR_SCHED_CORE_SHARE_TO: libc::c_ulong = 2;
const PIDTYPE_PID: libc::c_ulong = 0;
const PIDTYPE_TGID: libc::c_ulong = 1;

/// Gives the processes a group of their own, with all that they start. On a host without SMT there
/// is nothing to do.
///
/// # Errors
/// `Unsupported` when the host's kernel has no core scheduling.
pub(crate) fn isolate(pids: Vec<i32>) -> Result<()> {
    // A group is made for a thread, which then shares it: this one has no other use.
    let thread = std::thread::spawn(move || {
        call(PR_SCHED_CORE_CREATE, 0, PIDTYPE_PID)?;
        pids.into_iter()
            .try_for_each(|pid| call(PR_SCHED_CORE_SHARE_TO, pid, PIDTYPE_TGID))
    });
    let shared = thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")));
    match shared {
        Ok(()) => Ok(()),
        // No two processors share a core.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(Error::unsupported(
            "core_sched: the host's kernel has no core scheduling (CONFIG_SCHED_CORE)",
        )
        .hint("a kernel with it, or core_sched = false and a host without SMT")),
        Err(error) => Err(Error::new(format!("cannot set core scheduling: {error}"))),
    }
}

fn call(command: libc::c_ulong, pid: i32, scope: libc::c_ulong) -> io::Result<()> {
    let pid = pid as libc::c_ulong;
    // SAFETY: these commands take integers only; the last argument is for another one.
    match unsafe { libc::prctl(PR_SCHED_CORE, command, pid, scope, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
