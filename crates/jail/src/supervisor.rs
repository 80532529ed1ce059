//! A process that starts jails and stays outside of them: the sandbox process, once its machine
//! runs. It still mounts, enters network namespaces and runs network plugins, so it keeps the
//! capabilities for that and its file systems; the others it loses, with the system calls that a
//! program needs only to take over a kernel. That makes an attack harder and does not end it: root
//! with SYS_ADMIN has ways left, in the file systems of the host for one.
//!
//! Not Landlock: a process with rules about files may not mount at all, and plugins write where
//! they like.

use rustix::thread::CapabilitySet;

use crate::filter::Filter;
use crate::{Error, Step, check_single_thread, privileges, sys};

/// Restricts the calling process, and all that it starts from now on, to these capabilities.
///
/// # Errors
/// [`Error::Threads`] if it has threads, which would keep theirs; [`Error::Step`].
pub fn restrict_supervisor(name: &str, keep: CapabilitySet) -> Result<(), Error> {
    let failed = |step| {
        move |errno| Error::Step {
            name: name.to_owned(),
            step,
            errno,
        }
    };
    check_single_thread(name)?;
    sys::limit_bounding_set(keep.bits()).map_err(failed(Step::BoundingSet))?;
    privileges::keep_only(keep).map_err(failed(Step::Capabilities))?;
    rustix::thread::set_no_new_privs(true).map_err(failed(Step::NoNewPrivileges))?;
    Filter::of_supervisor()
        .install()
        .map_err(failed(Step::Filter))
}
