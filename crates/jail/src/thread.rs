//! Confining one thread of a process that is jailed already.
//!
//! A thread's filter is added to its process's, and the stricter answer counts. Threads share
//! memory, so this is no border between them: it takes from an attacker who controls what one
//! thread does, but not yet the memory of the process, the system calls that the thread never
//! makes and the capabilities that it never uses.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::filter::Filter;
use crate::{Error, Step};

/// What a thread does, which decides what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadRole {
    /// Runs a virtual CPU: `KVM_RUN`, the state of its CPU, and notifications through eventfds.
    Vcpu,
    /// Moves data between queues of a device and descriptors that are open (sockets, a tap, a
    /// disk). Opens no file.
    Io,
}

/// Confines the calling thread: no capabilities, and the filter of its role. Threads that it
/// starts inherit both. The process is confined by [`crate::enter`] before it starts threads; its
/// [`crate::Role`] allows `seccomp`.
///
/// # Errors
/// [`Error::Step`] with the step that failed; the thread must not go on then, because it is
/// confined in part only.
pub fn restrict_thread(name: &str, role: ThreadRole) -> Result<(), Error> {
    let at = |step| {
        move |errno| Error::Step {
            name: name.to_owned(),
            step,
            errno,
        }
    };
    let filter = Filter::of_thread(role);
    drop_capabilities().map_err(at(Step::Capabilities))?;
    filter.install().map_err(at(Step::Filter))
}

/// Takes all capabilities from the calling thread, and from those that it starts.
///
/// # Errors
/// [`Error::Step`].
pub fn drop_thread_capabilities(name: &str) -> Result<(), Error> {
    drop_capabilities().map_err(|errno| Error::Step {
        name: name.to_owned(),
        step: Step::Capabilities,
        errno,
    })
}

fn drop_capabilities() -> Result<(), Errno> {
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}
