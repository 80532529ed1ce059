//! Dropping privileges: bounding set, groups, user, capabilities. Called in the process to confine.

use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::{Step, sys};

/// Becomes `uid`:`gid` without supplementary groups and with no capability outside `keep`.
pub fn drop_to(uid: u32, gid: u32, keep: CapabilitySet) -> Result<(), (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    sys::limit_bounding_set(keep.bits()).map_err(at(Step::BoundingSet))?;
    // An exec as user 0 gains no capabilities, and none can become ambient. The effect of setuid on
    // capabilities is unchanged: the fs device changes its user for each request and relies on it.
    let bits = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    rustix::thread::set_capabilities_secure_bits(bits).map_err(at(Step::Capabilities))?;

    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .map_err(at(Step::User))?;

    keep_only(keep).map_err(at(Step::Capabilities))
}

/// Gives up all capabilities outside `keep`; none is inheritable.
pub fn keep_only(keep: CapabilitySet) -> Result<(), Errno> {
    let left = rustix::thread::capabilities(None)?.permitted & keep;
    let sets = CapabilitySets {
        effective: left,
        permitted: left,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets)
}
