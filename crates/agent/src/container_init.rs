//! The init process of a container that asks for one (`--init`): starts the command, forwards
//! signals to it, reaps every orphan, and exits with the command's status.
//!
//! The agent's own executable, seen in the container under the name [`NAME`]; `main` branches to
//! here before anything else. Runs with the container's rights and nothing more.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus};

/// File name under which the executable is this program.
pub const NAME: &str = "hull-init";

/// Exit statuses as a shell's: not executable, not found.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Runs `hull-init -- COMMAND [ARG…]` and returns the exit status.
pub fn run(arguments: impl Iterator<Item = OsString>) -> i32 {
    let mut arguments = arguments.skip_while(|argument| argument == "--");
    let Some(program) = arguments.next() else {
        eprintln!("{NAME}: no command");
        return NOT_EXECUTABLE;
    };
    let all = all_signals();
    // Every signal is taken from the queue below, so that none is lost before the command runs.
    let old = set_mask(&all);
    let mut command = Command::new(&program);
    command.args(arguments);
    // A process group of its own, in the foreground if there is a terminal: signals from the
    // keyboard reach it directly.
    command.process_group(0);
    // SAFETY: only system calls that are safe between fork and exec, on values copied before.
    unsafe {
        command.pre_exec(move || {
            libc::tcsetpgrp(0, libc::getpid());
            set_mask(&old);
            Ok(())
        });
    }
    let child = match command.spawn() {
        Ok(child) => child.id().cast_signed(),
        Err(error) => {
            eprintln!("{NAME}: cannot execute {}: {error}", program.display());
            return match error.kind() {
                std::io::ErrorKind::NotFound => NOT_FOUND,
                _ => NOT_EXECUTABLE,
            };
        }
    };
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to live values of the right types.
        if unsafe { libc::sigwait(&raw const all, &raw mut signal) } != 0 {
            continue;
        }
        match signal {
            libc::SIGCHLD => {
                if let Some(status) = reap(child) {
                    return status;
                }
            }
            // A stopped init could not be continued from inside; the terminal stops the command.
            libc::SIGTSTP | libc::SIGTTIN | libc::SIGTTOU => {}
            // SAFETY: kill has no memory effects. The child is not reaped yet, so its id is its
            // own.
            signal => unsafe {
                libc::kill(child, signal);
            },
        }
    }
}

/// Reaps everything that has ended; returns the command's exit status if that was among it.
fn reap(child: i32) -> Option<i32> {
    let mut ended = None;
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a live value.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid <= 0 {
            return ended;
        }
        if pid == child {
            let status = ExitStatus::from_raw(status);
            ended = status
                .code()
                .or_else(|| status.signal().map(|signal| 128 + signal));
        }
    }
}

fn all_signals() -> libc::sigset_t {
    // SAFETY: sigfillset initialises the whole set, for which all zeroes is a valid value.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        set
    }
}

/// Sets the mask of blocked signals; returns the old one.
fn set_mask(mask: &libc::sigset_t) -> libc::sigset_t {
    // SAFETY: both pointers are to live values; all zeroes is a valid set.
    unsafe {
        let mut old = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, std::ptr::from_ref(mask), &raw mut old);
        old
    }
}
